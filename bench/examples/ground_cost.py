"""Learns a ground cost through the transport plan: the metric in which known pairs are each other's partners.

    python bench/examples/ground_cost.py --out ground_cost.png

Objects are seen twice, with a few features that identify them and more that are nothing but noise. For C_ij = |(x_i - y_j) A|^2 the
plan is a soft matching, and A minimises -sum over known pairs of log P_ij: the derivative of the plan in the cost, grad="implicit",
through the equations that the potentials solve and not through the iterations. The length of A is held: it stands for 1 / eps, and a
plan that is all but a permutation has no derivatives left. In the same spirit Cuturi & Avis 2014 (JMLR 15, "Ground metric learning") and
Li et al. 2019 (JMLR 20, "Learning to match via inverse optimal transport"). Objects not seen before are the judge.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import gpu_ot
from gpu_ot import Problem, Solution, SqEuclidean

EPS = 1.0
#: Features that identify an object, features that do not, how well the former are measured, and how loud the latter are.
SIGNAL, NOISE, BLUR, LOUD = 3, 5, 0.05, 1.0


def twice(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, SIGNAL + NOISE) features of n objects, seen from two sides; row i of either is object i."""
    z = torch.randn(n, SIGNAL, generator=generator, dtype=torch.float64)

    def seen() -> Tensor:
        noise = torch.randn(n, SIGNAL + NOISE, generator=generator, dtype=torch.float64)
        return torch.cat((z + BLUR * noise[:, :SIGNAL], LOUD * noise[:, SIGNAL:]), -1)

    return seen(), seen()


def mixed(*clouds: Tensor, seed: int = 1) -> tuple[Tensor, ...]:
    """The clouds in axes turned alike, so that no single feature is the signal."""
    d = clouds[0].shape[-1]
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return tuple(z @ turn for z in clouds)


def match(x: Tensor, y: Tensor, A: Tensor) -> Solution:
    """Transport between clouds (n, d) and (n, d) under |(x_i - y_j) A|^2, with its implicit derivatives; A is (d, k)."""
    return gpu_ot.solve(Problem(SqEuclidean(x @ A, y @ A), EPS), grad="implicit", tol=1e-7)


def found(P: Tensor) -> float:
    """The share of rows whose heaviest partner is their own."""
    return float((P.detach().argmax(-1) == torch.arange(len(P))).double().mean())


def learn(x: Tensor, y: Tensor, steps: int = 40, rate: float = 0.1) -> tuple[Tensor, list[float]]:
    """(A, losses): the metric (d, d), of norm sqrt(d), in which x_i and y_i are partners, from the Euclidean one, by Adam."""
    n, d = x.shape
    free = torch.eye(d, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=rate)
    losses = []
    for _ in range(steps):
        A = d**0.5 * free / free.norm()
        loss = -(n * match(x, y, A).plan.to_dense().diagonal()).log().mean()  # 0 where every row goes to its partner
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return (d**0.5 * free / free.norm()).detach(), losses


def picture(plans: tuple[Tensor, Tensor], A: Tensor, losses: list[float], path: Path) -> None:
    """The held-out plans before and after, what the metric sees of the signal and of the noise, and the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    for axis, P, name in zip(axes, plans, ("Euclidean", "learned"), strict=False):
        axis.imshow((len(P) * P).detach().numpy(), cmap="magma", vmin=0, vmax=1)
        axis.set(title=f"{name}: {found(P):.0%} of held-out found", xlabel="j", ylabel="i")
    (turn,) = mixed(torch.eye(len(A), dtype=A.dtype))
    lengths = (turn @ A).norm(dim=-1)  # of each unmixed feature under the metric
    axes[2].bar(range(len(A)), lengths.tolist(), color=["tab:orange"] * SIGNAL + ["0.7"] * NOISE)
    axes[2].set(title="weight of each hidden feature", xlabel="signal (orange), noise (grey)", xticks=[])
    axes[3].semilogy(losses, color="black")
    axes[3].set(title="-mean log P of known pairs", xlabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("ground_cost.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)  # a second thread would mostly wait
    generator = torch.Generator().manual_seed(0)
    x, y = mixed(*twice(given.objects, generator))
    A, losses = learn(x, y)
    held = mixed(*twice(40, generator))
    before, after = (match(*held, metric).plan.to_dense() for metric in (torch.eye(len(A), dtype=A.dtype), A))
    picture((before, after), A, losses, given.out)
    print(f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in {len(losses)} steps; picture in {given.out}")
    print(f"partners found among objects not seen before: {found(before):.0%} -> {found(after):.0%}")


if __name__ == "__main__":
    main()
