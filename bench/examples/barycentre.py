"""Wasserstein barycentres of two digits, by gradient descent on the weights of a grid.

    python bench/examples/barycentre.py --out barycentre.png

Minimises (1 - t) S(w, digit) + t S(w, other) over weights w >= 0 of mass 1 on the pixels, w = softmax(z). The divergence is convex in w
(Feydy et al. 2019, arXiv:1810.08278, Theorem 1); for OT_eps without its self terms the barycentres would be blurred.
The digits are scikit-learn's, 8 by 8.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from gpu_ot.losses.samples import SamplesLoss


def grid(side: int) -> Tensor:
    """(side^2, 2) pixel centres in the unit square, row by row from the top."""
    t = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.stack(torch.meshgrid(1 - t, t, indexing="ij"), -1).flatten(0, 1).flip(-1)


def barycentre(
    weights: Tensor, shares: Tensor, points: Tensor, steps: int = 100, rate: float = 0.3, blur: float = 0.05
) -> tuple[Tensor, list[float]]:
    """(w, objectives): the barycentre (n,) of measures `weights` (k, n) in the proportions `shares` (k,), all on `points` (n, d)."""
    k, n = weights.shape
    loss = SamplesLoss(p=2, blur=blur, tol=1e-3, static_y=True)
    clouds = points.expand(k, n, -1)
    z = torch.zeros(n, dtype=weights.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=rate)
    objectives = []
    for _ in range(steps):
        w = z.softmax(-1)
        objective = (shares * loss(w.expand(k, n), clouds, weights, clouds)).sum()
        optimiser.zero_grad()
        objective.backward()
        optimiser.step()
        objectives.append(float(objective.detach()))
    return z.detach().softmax(-1), objectives


def digits(*wanted: int) -> Tensor:
    """(k, 64): the first picture of each of these digits, as weights of mass 1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = torch.stack([torch.from_numpy(data.data[data.target == digit][0]) for digit in wanted])
    return pictures / pictures.sum(-1, keepdim=True)


def picture(pictures: list[Tensor], titles: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pictures), figsize=(1.9 * len(pictures), 2.3))
    for axis, w, title in zip(axes, pictures, titles, strict=True):
        side = round(len(w) ** 0.5)
        axis.imshow(w.view(side, side), cmap="magma", vmin=0)
        axis.set(title=title, xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--out", type=Path, default=Path("barycentre.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # 64 pixels: a second thread would mostly wait
    ends = digits(*given.digits)
    pictures, titles = [ends[0]], [f"digit {given.digits[0]}"]
    for t in (0.25, 0.5, 0.75):
        w, objectives = barycentre(ends, torch.tensor([1 - t, t], dtype=torch.float64), grid(8))
        pictures, titles = [*pictures, w], [*titles, f"t = {t}"]
        print(f"t = {t}: objective {objectives[0]:.4g} -> {objectives[-1]:.4g} in {len(objectives)} steps")
    picture([*pictures, ends[1]], [*titles, f"digit {given.digits[1]}"], given.out)
    print(f"picture in {given.out}")


if __name__ == "__main__":
    main()
