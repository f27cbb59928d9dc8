"""
Soft quantile regression
========================

A line through points of which a third are outliers: the median of the squared residuals, blurred so that it has a derivative, does not
see them.
"""

# %%
# Points on a line, and a cluster far from it.

import matplotlib.pyplot as plt
import torch

from gpu_ot import soft_quantile

generator = torch.Generator().manual_seed(0)
t = torch.rand(90, generator=generator)
y = 1.5 * t - 0.5 + 0.05 * torch.randn(90, generator=generator)
y[:30] = -1.5 + 0.1 * torch.randn(30, generator=generator)
t[:30] = 0.7 + 0.3 * t[:30]


def fit(loss):
    """The slope and the height at which a loss of the residuals is smallest."""
    line = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([line], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        loss(y - line[0] * t - line[1]).backward()
        optimiser.step()
    return line.detach()


# %%
# Least squares, and least median of squares.

lines = {
    "mean of squares": fit(lambda r: r.square().mean()),
    "soft median of squares": fit(lambda r: soft_quantile(r.square(), 0.5, eps=1e-2)),
}
for name, (slope, height) in lines.items():
    print(f"{name:<24} slope {slope:.2f}, height {height:.2f}")

plt.figure(figsize=(6, 3.6), layout="constrained")
plt.scatter(t, y, s=10, color="0.5")
ends = torch.tensor([0.0, 1.0])
for (name, (slope, height)), color in zip(lines.items(), ("tab:orange", "tab:blue"), strict=True):
    plt.plot(ends, slope * ends + height, color=color, label=name)
plt.legend()
plt.show()
