"""Pictures of the pages that are no part of the gallery, drawn when the site is built."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from gpu_ot import Problem, SqEuclidean, solve


def eps(path: Path) -> None:
    """The same two clouds with four values of eps: the heaviest pairs, and how blurred the plan is."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 6.0, 40)
    x = torch.stack((t.cos(), t.sin()), 1)
    y = torch.randn(40, 2, generator=generator) * torch.tensor([0.25, 0.7]) + torch.tensor([2.6, 0.0])
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axis, share in zip(axes, (1.0, 0.1, 0.03, 0.003), strict=True):
        solution = solve(Problem(SqEuclidean(x, y), eps=("std", share)))
        P = solution.plan.to_dense()
        for i, j in (P.amax() / 50 < P).nonzero().tolist():
            axis.plot(*torch.stack((x[i], y[j])).T.numpy(), color="0.35", linewidth=0.7, alpha=float(P[i, j] * len(x)) ** 0.5, zorder=0)
        axis.scatter(*x.T.numpy(), s=14, color="tab:blue")
        axis.scatter(*y.T.numpy(), s=14, color="tab:orange")
        entropy = float(solution.normalized_entropy)
        axis.set(title=f'eps = ("std", {share:g})\n{solution.n_sweeps} sweeps, normalized_entropy {entropy:.2f}', xticks=[], yticks=[])
        axis.set_aspect("equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / "eps.png").exists():
        eps(folder / "eps.png")
