"""
Flow matching: eight Gaussians to two moons
===========================================

Conditional flow matching pairs noise with data by a transport plan. On its running example the usual float32 call fails:
``exp(-M / reg)`` underflows, and POT returns a plan with almost no mass. The log-domain solver pairs the points.
"""

# %%
# The data: costs up to about 140, and ``reg = 0.05``.

import math
import warnings

import matplotlib.pyplot as plt
import ot
import torch

import gpu_ot

n, generator = 256, torch.Generator().manual_seed(0)
angle = torch.randint(8, (n,), generator=generator) * math.pi / 4
x = 5 * torch.stack((angle.cos(), angle.sin()), 1) + 0.1**0.5 * torch.randn(n, 2, generator=generator)
t, upper = math.pi * torch.rand(n, generator=generator), torch.arange(n) < n // 2
moons = torch.stack((torch.where(upper, t.cos(), 1 - t.cos()), torch.where(upper, t.sin(), 0.5 - t.sin())), 1)
y = 3 * (moons + 0.2 * torch.randn(n, 2, generator=generator)) - 1

# %%
# The same call twice: once to POT, once to this package.

M = torch.cdist(x, y).square()
a = torch.full((n,), 1 / n)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = ot.sinkhorn(a, a, M, reg=0.05)
    ours = gpu_ot.sinkhorn(a, a, M, reg=0.05)
print(f"mass of POT's plan: {float(theirs.sum()):.4f}, of ours: {float(ours.sum()):.4f}")

# %%
# In a training loop only pairs are needed. ``plan.sample`` draws them without an n-by-m array.

solution = gpu_ot.solve(gpu_ot.Problem(gpu_ot.SqEuclidean(x, y), eps=0.05))
i, j = solution.plan.sample(200, generator=generator)
k = torch.randint(n, (200,), generator=generator), torch.randint(n, (200,), generator=generator)

figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharex=True, sharey=True)
for axis, (rows, columns), title in ((axes[0], k, "independent pairs"), (axes[1], (i, j), "pairs drawn from the plan")):
    lines = torch.stack((x[rows], y[columns]), 1)
    axis.plot(*lines.permute(2, 1, 0).numpy(), color="0.6", linewidth=0.5, zorder=0)
    axis.scatter(*x.T.numpy(), s=8, color="tab:blue", label="noise")
    axis.scatter(*y.T.numpy(), s=8, color="tab:orange", label="data")
    axis.set(title=title, xticks=[], yticks=[], aspect="equal")
axes[0].legend(loc="upper right")
plt.show()
