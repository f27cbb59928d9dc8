"""How far the marginals are off, measured by exact sums at a random sample of the points: for backends that are not exact themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import compiled
from ..costs import Cost
from ..geometry.protocol import weigh
from ..geometry.several import singles
from ..geometry.tiles import each, shares
from ..problem import Problem

#: Points of a sample, and the chance that the bound is allowed to be wrong.
SAMPLES, RISK = 256, 0.005


@dataclass(frozen=True)
class Measured:
    """The L1 errors of the marginals as parts of the mass, from exact sums at `samples` points of each side, drawn by their weight.

    rows, columns              the means over the samples.
    rows_bound, columns_bound  not exceeded but in one of 200 cases, as far as a sample can tell: mean + sqrt(2 L var / k) + L max / k with
                               L = log(2 / 0.005), Maurer and Pontil 2009, arXiv:0907.3740, theorem 4, with the largest error that was
                               seen in the place of the largest there is.
    samples                    points of each side; those of a side with fewer are all taken, and its bound is its error.
    """

    rows: float
    columns: float
    rows_bound: float
    columns_bound: float
    samples: int

    @property
    def T(self) -> Measured:
        """Rows for columns."""
        return Measured(self.columns, self.rows, self.columns_bound, self.rows_bound, self.samples)

    @property
    def error(self) -> float:
        """The larger of both sides' errors."""
        return max(self.rows, self.columns)

    @property
    def bound(self) -> float:
        """The larger of both sides' bounds."""
        return max(self.rows_bound, self.columns_bound)

    def __str__(self) -> str:
        return (
            f"marginals off by {self.rows:.2g} of the mass in rows (at most {self.rows_bound:.2g}) and {self.columns:.2g} in columns "
            f"(at most {self.columns_bound:.2g}), by exact sums at {self.samples} points of each side"
        )


def measure(problem: Problem, f: Tensor, g: Tensor, samples: int = SAMPLES, seed: int = 0) -> Measured:
    """The errors of potentials f (*batch, n) and g (*batch, m), as `Solution.measure`: the largest of a batch. Relaxed marginals: how far
    each side is from its update."""
    found = []
    with torch.no_grad():
        for one, p, q in zip(singles(problem), *(z.detach().reshape(-1, z.shape[-1]) for z in (f, g)), strict=True):
            generator = torch.Generator().manual_seed(seed)
            found.append([_estimate(_misses(one, side, p, q, samples, generator)) for side in (0, 1)])
    (rows, rows_bound), (columns, columns_bound) = (tuple(map(max, zip(*side, strict=True))) for side in zip(*found, strict=True))
    return Measured(rows, columns, rows_bound, columns_bound, samples)


def _misses(problem: Problem, side: int, f: Tensor, g: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, bool]:
    """|P1_i / a_i - 1| of points of one side and their weights in the mean, and whether these are all points."""
    w = (problem.a, problem.b)[side].detach()
    own, other = (f, g) if side == 0 else (g, f)
    h = weigh(other.detach(), (problem.b, problem.a)[side].detach(), problem.eps)
    everything = len(w) <= samples
    if everything:
        chosen = torch.arange(len(w), device=w.device)
        share = w / w.sum()
    else:
        cumulated = w.cumsum(0).cpu()
        at = torch.rand(samples, generator=generator, dtype=torch.float64) * float(cumulated[-1])
        chosen = torch.searchsorted(cumulated, at).clamp(max=len(w) - 1).to(w.device)
        share = torch.full((samples,), 1 / samples, dtype=w.dtype, device=w.device)
    cost = problem.cost.T if side else problem.cost
    cost = cost.of(z.detach() for z in cost.inputs.values()).to(h.dtype)
    update = problem.penalties[side].damp(-problem.eps * _log_sums(cost, chosen, h, problem.eps), problem.eps)
    miss = ((own.detach()[chosen] - update) / problem.eps).expm1().abs()
    return torch.where(share > 0, miss, 0.0), share, everything


def _log_sums(cost: Cost, chosen: Tensor, h: Tensor, eps: float) -> Tensor:
    """log sum_j exp((h_j - C_ij) / eps) of the chosen rows, from every pair."""
    folded = None if h.device.type != "cpu" or compiled.refused() else cost.fold()
    if folded is None:
        part = cost.part(chosen, slice(None))
        return torch.cat([((h - strip.dense()) / eps).logsumexp(-1) for _, strip in part.strips()])
    from ..compiled.sparse import exact_sums

    alpha, beta, u, v = folded
    logs = h.new_empty(len(chosen))
    U, V = (u[chosen] / eps).contiguous(), v.mT.contiguous()
    each(shares(len(chosen)), exact_sums, U.numpy(), V.numpy(), ((h - beta) / eps).numpy(), logs.numpy())
    return logs - alpha[chosen] / eps


def _estimate(found: tuple[Tensor, Tensor, bool]) -> tuple[float, float]:
    """The mean and its bound."""
    miss, share, everything = found
    mean = float((share * miss).sum())
    if everything:
        return mean, mean
    k, log_risk = len(miss), math.log(2 / RISK)
    bound = mean + math.sqrt(2 * log_risk * float(miss.var()) / k) + log_risk * float(miss.amax()) / k
    return mean, bound
