"""
Barycentres of silhouettes
==========================

The shape between several shapes, for many weights at once; and what eps blurs, a debiased barycentre does not.
"""

# %%
# Three silhouettes on a grid of 28 by 28 points.

import matplotlib.pyplot as plt
import torch

from gpu_ot import SqEuclidean, barycenter

side = 28
t = torch.linspace(-1, 1, side)
u, v = torch.meshgrid(t, t, indexing="ij")
disc = ((u**2 + v**2).sqrt() - 0.55).abs() < 0.12
cross = ((u.abs() < 0.13) | (v.abs() < 0.13)) & (u.abs().maximum(v.abs()) < 0.75)
heart = ((u + 0.1) ** 2 + v**2 - 0.35) ** 3 + 1.2 * v**2 * (u + 0.1) ** 3 < 0
a = torch.stack([z.float().flatten() for z in (disc, cross, heart)])
a = a / a.sum(-1, keepdim=True)
points = torch.stack((u.flatten(), v.flatten()), 1)

# %%
# Six sets of weights along the sides of a triangle, in one call. The measures share their cost.

steps = torch.linspace(0, 1, 3)[:-1].unsqueeze(-1)
corners = torch.eye(3)
weights = torch.cat([(1 - steps) * corners[k] + steps * corners[(k + 1) % 3] for k in range(3)])
found = barycenter(SqEuclidean(points, points), 0.01, a, weights, tol=1e-3, max_iter=60)
print(found.status.name, tuple(found.weights.shape))

# %%
# The same in the middle, with and without the blur of eps.

middle = [barycenter(SqEuclidean(points, points), 0.03, a, tol=1e-3, max_iter=60, debiased=z).weights for z in (False, True)]

figure, axes = plt.subplots(1, 8, figsize=(13, 2.1), layout="constrained")
titles = [", ".join(f"{w:.1f}" for w in each) for each in weights.tolist()] + ["eps .03", "debiased"]
for axis, image, title in zip(axes, [*found.weights, *middle], titles, strict=True):
    axis.imshow(image.view(side, side), cmap="magma")
    axis.set_axis_off()
    axis.set_title(title, fontsize=8)
plt.show()
