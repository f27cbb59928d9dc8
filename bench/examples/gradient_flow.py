"""One cloud flows into another along the gradient of the debiased Sinkhorn divergence.

    python bench/examples/gradient_flow.py --out flow.png

Each point moves by -n times its gradient: the steepest descent of the loss in the Wasserstein metric, Feydy et al. 2019,
arXiv:1810.08278, section 4. Far away, points move along the transport plan; at the end they stop, because the divergence of a measure
from itself is 0, which the cost OT_eps alone is not: it would shrink the cloud.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from gpu_ot.losses.samples import SamplesLoss


def disc(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2) points spread evenly over a small disc."""
    radius, angle = torch.rand(2, n, generator=generator)
    return 0.18 * radius.sqrt().unsqueeze(-1) * torch.stack(((2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()), -1)


def spiral(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2) points along two turns of a spiral."""
    t = torch.rand(n, generator=generator).sqrt()
    angle, noise = 4 * math.pi * t, 0.015 * torch.randn(n, 2, generator=generator)
    return 0.9 * t.unsqueeze(-1) * torch.stack((angle.cos(), angle.sin()), -1) + noise


def flow(x: Tensor, y: Tensor, steps: int = 40, rate: float = 0.6, blur: float = 0.03) -> tuple[list[Tensor], list[float]]:
    """(clouds, divergences) from `x` to `y`, one more than `steps`."""
    loss = SamplesLoss(p=2, blur=blur, tol=1e-3, static_y=True)
    clouds, values = [x], []
    for _ in range(steps):
        x = clouds[-1].clone().requires_grad_()
        value = loss(x, y)
        (grad,) = torch.autograd.grad(value, x)
        values.append(float(value.detach()))
        clouds.append((x - rate * len(x) * grad).detach())
    return clouds, [*values, float(loss(clouds[-1], y))]


def picture(clouds: list[Tensor], values: list[float], y: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [0, 1, 2, 4, 8, len(clouds) - 1]
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(2.1 * len(shown) + 3.4, 2.6), width_ratios=[1] * len(shown) + [1.3])
    colour = torch.atan2(clouds[0][:, 1], clouds[0][:, 0])
    for axis, k in zip(axes, shown, strict=False):
        axis.scatter(*y.T, s=2, color="0.8")
        axis.scatter(*clouds[k].T, s=3, c=colour, cmap="hsv")
        axis.set(title=f"step {k}", xticks=[], yticks=[], xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    axes[-1].semilogy(values, color="black")
    axes[-1].set(title="divergence", xlabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("flow.png"))
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x, y = disc(given.points, generator), spiral(given.points, generator)
    clouds, values = flow(x, y)
    picture(clouds, values, y, given.out)
    print(f"divergence {values[0]:.3g} -> {values[-1]:.3g} in {len(values) - 1} steps; picture in {given.out}")


if __name__ == "__main__":
    main()
