"""
Learning eps
============

``eps`` may be a tensor that requires a gradient. Here it is learned together with nothing else: which ``eps`` explains pairs that
were drawn from a plan?
"""

# %%
# Pairs drawn at a hidden ``eps`` of 0.1.

import matplotlib.pyplot as plt
import torch

from gpu_ot import Problem, SqEuclidean, solve

generator = torch.Generator().manual_seed(0)
x, y = torch.rand(120, 2, generator=generator, dtype=torch.float64), torch.rand(120, 2, generator=generator, dtype=torch.float64)
true = 0.1
i, j = solve(Problem(SqEuclidean(x, y), eps=true)).plan.sample(4000, generator=generator)
mean_cost = SqEuclidean(x, y).dense()[i, j].mean()

# %%
# The log-likelihood of a pair is ``(f_i + g_j - C_ij) / eps`` up to a constant. Summed over pairs whose marginals are those of the
# problem, it is ``(value - mean cost) / eps``: the value and its derivative in ``eps`` are all that is needed.

log_eps = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
optimiser = torch.optim.Adam([log_eps], lr=0.2)
path, losses = [], []
for _ in range(60):
    eps = log_eps.exp()
    value = solve(Problem(SqEuclidean(x, y), eps=eps), tol=1e-7).value
    loss = (mean_cost - value) / eps
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    path.append(float(eps.detach()))
    losses.append(float(loss.detach()))
print(f"hidden eps {true}, found {path[-1]:.3f}")

# %%
# The way down, and the plan at three values of ``eps`` on the way.

figure, axes = plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained")
axes[0].semilogy(path, color="tab:blue")
axes[0].axhline(true, color="0.5", linestyle="--", label="hidden")
axes[0].set(xlabel="step", title="eps")
axes[0].legend()
order = x[:, 0].argsort(), y[:, 0].argsort()
for axis, eps in zip(axes[1:], (path[0], path[6], path[-1]), strict=True):
    P = solve(Problem(SqEuclidean(x, y), eps=eps)).plan.to_dense()
    axis.imshow(P[order[0]][:, order[1]].sqrt(), cmap="magma")
    axis.set(title=f"plan at eps = {eps:.2g}", xticks=[], yticks=[])
plt.show()
