"""
Partial matching
================

How much of two clouds corresponds is often known better than the price of leaving a point out: `mass` says it.
"""

# %%
# A ring, the same ring turned and moved, and a quarter of each cloud somewhere else.

import matplotlib.pyplot as plt
import torch

from gpu_ot import Problem, SqEuclidean, solve

generator = torch.Generator().manual_seed(0)
t = 6.28 * torch.rand(90, generator=generator)
ring = torch.stack((2 * t.cos(), t.sin()), 1)
turn = torch.tensor([[0.9, -0.44], [0.44, 0.9]])
x = torch.cat((ring, torch.tensor([-4.0, 2.0]) + 0.4 * torch.randn(30, 2, generator=generator)))
y = torch.cat((ring @ turn.T + torch.tensor([0.8, 0.0]), torch.tensor([5.0, -2.5]) + 0.4 * torch.randn(30, 2, generator=generator)))

# %%
# One solve for twenty masses: they are a batch. The value is smallest where what moves is cheap, and its derivative in the mass is what
# the dearest unit costs. It jumps where the outliers begin.

masses = torch.linspace(0.05, 1, 20, dtype=torch.float64, requires_grad=True)
solution = solve(Problem(SqEuclidean(x, y), eps=0.02, mass=masses), tol=1e-6)
(price,) = torch.autograd.grad(solution.value.sum(), masses)

figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
levels = masses.detach()
axes[0].plot(levels, price, "o-", color="tab:blue")
axes[0].axvline(0.75, color="0.6", linestyle="--", label="what corresponds")
axes[0].set(xlabel="mass", title="price of one more unit")
axes[0].legend()
for axis, k in zip(axes[1:], (14, 19), strict=True):
    P = solution.plan.to_dense()[k]
    for i, j in (0.2 / len(x) < P).nonzero().tolist():
        axis.plot(*torch.stack((x[i], y[j])).T.numpy(), color="0.6", linewidth=0.7, zorder=0)
    axis.scatter(*x.T.numpy(), s=2 + 1500 * P.sum(1).numpy(), color="tab:blue", label="x")
    axis.scatter(*y.T.numpy(), s=2 + 1500 * P.sum(0).numpy(), color="tab:orange", label="y")
    axis.set(title=f"mass {float(levels[k]):.2g}", xticks=[], yticks=[], aspect="equal")
axes[1].legend()
plt.show()
