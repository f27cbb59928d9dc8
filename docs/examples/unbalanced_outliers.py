"""
Outliers: let mass vanish
=========================

Balanced transport has to move every point, outliers too. With relaxed marginals, a point whose trip costs more than its mass is
worth stays at home.
"""

# %%
# A cloud, the same cloud turned a little, and outliers far away on both sides.

import matplotlib.pyplot as plt
import torch

from gpu_ot import KL, Problem, SqEuclidean, solve

generator = torch.Generator().manual_seed(0)
t = 6.28 * torch.rand(80, generator=generator)
ring = torch.stack((2 * t.cos(), t.sin()), 1)
turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
x = torch.cat((ring, torch.tensor([-4.0, 3.0]) + 0.3 * torch.randn(12, 2, generator=generator)))
y = torch.cat((ring @ turn.T + torch.tensor([1.0, 0.0]), torch.tensor([5.0, -3.0]) + 0.3 * torch.randn(12, 2, generator=generator)))

# %%
# ``tau`` has the unit of the cost: below it, moving a unit of mass is worth it; far above, dropping the mass is.
# Trips within the ring cost a few units, trips between the outliers about 100.

plans = {}
for name, penalty in (("balanced", KL()), ("relaxed, tau = 3", KL(3.0))):
    solution = solve(Problem(SqEuclidean(x, y), eps=0.02, penalties=penalty))
    plans[name] = solution.plan.to_dense()
    print(f"{name:<18}{float(solution.transport_mass):.3f} of the mass moves, {solution.status.name}")

figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True, sharey=True)
for axis, (name, P) in zip(axes, plans.items(), strict=True):
    for i, j in (0.2 / len(x) < P).nonzero().tolist():
        axis.plot(*torch.stack((x[i], y[j])).T.numpy(), color="0.6", linewidth=0.7, zorder=0)
    axis.scatter(*x.T.numpy(), s=4 + 1500 * P.sum(1).numpy(), color="tab:blue", label="x")
    axis.scatter(*y.T.numpy(), s=4 + 1500 * P.sum(0).numpy(), color="tab:orange", label="y")
    axis.set(title=name, xticks=[], yticks=[], aspect="equal")
axes[0].legend()
plt.show()
