"""
One silhouette flows into another
=================================

Points of a horse move along the gradient of the debiased Sinkhorn divergence until they fill a chess knight.
"""

# %%
# The horse is an image of scikit-image, the knight a letter of matplotlib's font. Their dark pixels are sampled.

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from skimage import data

from gpu_ot import SamplesLoss

generator = torch.Generator().manual_seed(0)


def silhouette(mask, count=600):
    """(count, 2) points spread over the pixels of a mask, about one unit wide."""
    rows, columns = torch.tensor(mask).nonzero(as_tuple=True)
    points = torch.stack((columns, -rows), 1).float()
    points = points[torch.randperm(len(points), generator=generator)[:count]]
    points = points - points.mean(0)
    return points / points.abs().amax() / 2


def letter(text, side=200):
    """(side, side): True inside of the outline of a letter, without its holes."""
    outline = max(TextPath((0, 0), text, size=100).to_polygons(), key=len)
    low, size = outline.min(0), np.ptp(outline, 0).max()
    grid = np.stack(np.meshgrid(np.linspace(0, 1, side), np.linspace(1, 0, side)), -1).reshape(-1, 2)
    return Path((outline - low) / size).contains_points(grid).reshape(side, side)


x, y = silhouette(~data.horse()), silhouette(letter("\N{BLACK CHESS KNIGHT}"))

# %%
# The loss is the one of GeomLoss, converged. Each point moves by n times its gradient, which is the
# steepest descent in the Wasserstein metric.

loss = SamplesLoss(p=2, blur=0.02, static_y=True)
clouds, values = [x], []
for _ in range(24):
    z = clouds[-1].clone().requires_grad_()
    value = loss(z, y)
    (gradient,) = torch.autograd.grad(value, z)
    values.append(float(value.detach()))
    clouds.append(z.detach() - 0.4 * len(z) * gradient)
print(f"divergence: {values[0]:.4f} at the start, {values[-1]:.6f} at the end")

# %%
# The cloud after 0, 2, 5 and 24 steps.

figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained", sharex=True, sharey=True)
for axis, step in zip(axes, (0, 2, 5, 24), strict=True):
    axis.scatter(*clouds[step].T.numpy(), s=4, c=x[:, 0].numpy(), cmap="viridis")
    axis.set(title=f"step {step}", xticks=[], yticks=[], aspect="equal")
plt.show()
