"""
Learning a ground cost
======================

Known pairs tell what "close" should mean. The cost is ``|A x - A y|^2`` with a matrix ``A`` that is learned through the plan:
``grad="implicit"`` differentiates the plan itself.
"""

# %%
# Each object is seen twice. The first 2 of 8 coordinates are the object's, the rest is noise, larger than the signal.

import matplotlib.pyplot as plt
import torch

from gpu_ot import Problem, SqEuclidean, solve

generator = torch.Generator().manual_seed(0)


def twice(n):
    """(n, 8) and (n, 8): two views of n objects; row i of both is the same object."""
    signal = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    return torch.cat((signal, noise[0]), 1), torch.cat((signal + 0.1 * noise[1, :, :2], noise[1]), 1)


def match(x, y, A, grad="envelope"):
    return solve(Problem(SqEuclidean(x @ A, y @ A), eps=1.0), grad=grad, tol=1e-7).plan.to_dense()


def metric(free):
    """The length of A is held: it stands for 1 / eps, and a plan that is all but a permutation has no derivatives left."""
    return 8**0.5 * free / free.norm()


# %%
# The loss is the negative log-likelihood of the known pairs.

x, y = twice(48)
free = torch.eye(8, dtype=torch.float64, requires_grad=True)
optimiser = torch.optim.Adam([free], lr=0.1)
losses = []
for _ in range(40):
    loss = -(len(x) * match(x, y, metric(free), "implicit").diagonal()).log().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(float(loss.detach()))

# %%
# New objects: how much of the mass finds its own partner, before and after.

new, A = twice(48), metric(free.detach())
before, after = match(*new, torch.eye(8, dtype=torch.float64)), match(*new, A)
print(f"mass on the true pairs: {float(before.trace()):.0%} before, {float(after.trace()):.0%} after")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for axis, P, title in zip(axes, (before, after), ("plan of new objects, before", "and after"), strict=False):
    axis.imshow(P.sqrt(), cmap="magma")
    axis.set(title=title, xticks=[], yticks=[])
axes[2].bar(range(8), A.norm(dim=1).numpy(), color=["tab:blue"] * 2 + ["0.7"] * 6)
axes[2].set(title="weight of each coordinate", xlabel="coordinate: 0 and 1 are the signal")
plt.show()
