"""
Every pixel of two photographs
==============================

Colour transfer without a sample: one plan between all 273,280 pixels of each photograph. A pixel is a point in three dimensions, so the
sums go by way of a mesh, and how exact they are is measured.
"""

# %%
# The photographs come with scikit-learn.

import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images

from gpu_ot import Problem, SqEuclidean, explain, solve

china, flower = (torch.tensor(image / 255.0, dtype=torch.float32) for image in load_sample_images().images)
x, y = (image.reshape(-1, 3) for image in (china, flower))

# %%
# ``auto`` would take the mesh for a problem of this size on a CPU. It is named here, so that the page shows what its title says.

problem = Problem(SqEuclidean(x, y), eps=0.005)
print(explain(problem, tol=1e-2).splitlines()[0])
start = time.perf_counter()
solution = solve(problem, tol=1e-2, backend="mesh")
print(f"{solution.status} {solution.n_iter} iterations, {time.perf_counter() - start:.1f} s")

# %%
# The loop ended by the sums of the mesh. Exact sums at some of the pixels say how far the marginals are off.

print(solution.measured)

# %%
# Where each pixel's colour goes on average. The other direction averages over the same plan.

sent = solution.transport().view_as(china)
k, h = solution.levels
ones = torch.ones(len(x), 1, dtype=k.dtype)
back = solution.geometry.T.apply(h, k, problem.eps, torch.cat((x.double(), ones), -1))
returned = (back[:, :3] / back[:, 3:]).view_as(flower)

figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
for axis, image, title in zip(
    axes.flat,
    (china, sent, flower, returned),
    ("temple", "temple in the flower's colours", "flower", "flower in the temple's colours"),
    strict=True,
):
    axis.imshow(image.clamp(0, 1))
    axis.set(title=title, xticks=[], yticks=[])
plt.show()
