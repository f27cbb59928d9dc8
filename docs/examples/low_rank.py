"""
Clusters sent to clusters
=========================

A coupling of low rank cuts two clouds into a few soft clusters each and sends cluster to cluster. It takes time and memory linear in the
number of points, and its cost is an upper bound of the optimal one.
"""

# %%
# A ring, and a cloud of two lobes.

import matplotlib.pyplot as plt
import torch

from gpu_ot import Problem, SqEuclidean, low_rank, solve

generator = torch.Generator().manual_seed(0)
angle = 6.2832 * torch.rand(600, generator=generator, dtype=torch.float64)
noise = torch.randn(600, 2, generator=generator, dtype=torch.float64)
x = torch.stack((angle.cos(), angle.sin()), 1) + 0.08 * noise
side = torch.where(torch.rand(600, generator=generator, dtype=torch.float64) > 0.5, 1.0, -1.0)
y = 0.25 * torch.randn(600, 2, generator=generator, dtype=torch.float64) + torch.stack((3.5 + 0.7 * side, 0.3 * side), 1)

# %%
# What is paid above a sharp plan of full rank, against the number of clusters. Rank 1 is the product of the two measures.

full = solve(Problem(SqEuclidean(x, y), eps=0.005), tol=1e-5).sharp_cost
ranks = (1, 2, 3, 5, 8, 12, 20)
found = [low_rank(SqEuclidean(x, y), r, starts=3) for r in ranks]
for r, each in zip(ranks, found, strict=True):
    print(f"rank {r:2d}  cost {float(each.sharp_cost):.4f}  above full rank {float(each.sharp_cost - full):.4f}  {each.status.name}")

# %%
# Points of one colour belong to one cluster, and lines join the clusters' centres: the plan moves each to its partner.

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(2, 1))
plan = found[4].plan
for z, factor in ((x, plan.Q), (y, plan.R)):
    left.scatter(*z.T.numpy(), c=factor.argmax(1).numpy(), cmap="tab10", s=6)
centres = [(factor.T @ z / plan.g[:, None]).numpy() for z, factor in ((x, plan.Q), (y, plan.R))]
for one, other in zip(*centres, strict=True):
    left.plot((one[0], other[0]), (one[1], other[1]), color="black", lw=0.8)
left.set(title="rank 8", aspect="equal", xticks=[], yticks=[])
right.loglog(ranks, [float(each.sharp_cost - full) for each in found], "o-")
right.set(xlabel="rank", title="cost above full rank")
plt.show()
