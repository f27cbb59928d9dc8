"""
343,000 coloured points of a motorcycle
=======================================

A stereo camera's points in space, all of them, and a deformed copy in another order. The plan finds who went where from the places alone,
and carries the colours over. Nothing is sampled, and no pair of points is ever stored.
"""

# %%
# The picture and its disparities come with scikit-image. A pixel with a disparity is a point: depth is focal length times baseline over it.

import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data

from gpu_ot import Problem, SqEuclidean, explain, solve

left, _, disparity = data.stereo_motorcycle()
focal, baseline, offset, centre = 994.978, 0.193001, 31.086, (311.193, 254.877)
row, column = np.nonzero(np.isfinite(disparity) & (disparity > 0))
depth = focal * baseline / (disparity[row, column] + offset)
place = np.stack((column - centre[0], row - centre[1], np.full_like(depth, focal)), -1) * depth[:, None] / focal
x = torch.tensor(place, dtype=torch.float32)
colour = torch.tensor(left[row, column] / 255.0, dtype=torch.float64)
print(f"{len(x)} points, {(x.amax(0) - x.amin(0)).tolist()} metres")

# %%
# The copy is stretched and rippled by the gradient of a convex function. By Brenier's theorem that is the optimal map, so the plan has a
# right answer. Its points come in another order.


def deform(z):
    stretched = z * torch.tensor((1.15, 0.9, 1.0))
    stretched[:, 0] += 0.06 * (4 * z[:, 0]).sin()
    stretched[:, 2] += 0.06 * (3 * z[:, 2]).sin()
    return stretched


torch.manual_seed(0)
shuffle = torch.randperm(len(x))
y = deform(x)[shuffle]

# %%
# With eps = 2 blur^2, a point sees others within a decimetre.

problem = Problem(SqEuclidean(x, y), eps=2 * 0.05**2)
print(explain(problem, tol=1e-2).splitlines()[0])
start = time.perf_counter()
solution = solve(problem, tol=1e-2, backend="mesh")
print(f"{solution.status} {solution.n_iter} iterations, {time.perf_counter() - start:.1f} s")
print(solution.measured)

# %%
# How far the plan's average is from where each point really went, in metres, and the colours that arrive at the copy.

sent = solution.transport()
print(f"median distance from the truth {float((sent - deform(x)).norm(dim=1).median()):.4f} m")
k, h = solution.levels
ones = torch.ones(len(x), 1, dtype=k.dtype)
arrived = solution.geometry.T.apply(h, k, problem.eps, torch.cat((colour, ones), -1))
carried = arrived[:, :3] / arrived[:, 3:]
print(f"mean difference from the true colour {float((carried - colour[shuffle]).abs().mean()):.3f} of 1")

# %%
# Seen from the camera.


def view(axis, points, colours, title):
    behind = points[:, 2].argsort(descending=True)
    z = points[behind]
    axis.scatter(z[:, 0] / z[:, 2], -z[:, 1] / z[:, 2], s=0.3, c=colours[behind].clamp(0, 1).numpy(), linewidths=0, rasterized=True)
    axis.set(title=title, xticks=[], yticks=[], aspect="equal")


figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
view(axes[0], x, colour, "the points")
view(axes[1], y, torch.full((len(y), 3), 0.6) * (y[:, 2:].amin() / y[:, 2:]), "the copy, without colours")
view(axes[2], y, carried, "the copy in the colours that arrive")
plt.show()
