"""What both functions return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..solver.status import Status


@dataclass(frozen=True, eq=False)
class Barycenter:
    """The result of `barycenter` and `free_barycenter`.

    weights    (*batch, m) of the barycentre, of the mass of the measures; differentiable as `grad` says.
    points     (*batch, m, d) where they moved; None on a fixed support.
    f, g       (*batch, K, n) and (*batch, K, m) potentials, float64: detached.
    status     how the loop ended, in words; for a batch, the worst.
    converged  (*batch,)
    n_iter     iterations run; for points that move, how often they did.
    errors     (checks, *batch) at each check.
    """

    weights: Tensor
    points: Tensor | None
    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    errors: Tensor
