"""What `gromov` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..solution import Plan
from ..solver.status import Status


@dataclass(frozen=True, eq=False)
class Gromov:
    """The result of `gromov`.

    value       (*batch,) the objective, differentiable: see `gromov`.
    distortion  (*batch,) the sum over pairs of pairs alone, without features, entropy and weight.
    plan        lazy, detached; with grad="implicit" an array (*batch, n, m) that carries derivatives, with `tau` a
                detached one.
    f, g        (*batch, n) and (*batch, m), potentials of the last transport problem.
    status      how the outer loop ended, in words; for a batch, the worst. A stationary point, not always the least.
    converged   (*batch,)
    n_iter      transport problems solved; n_inner, the iterations of all of them.
    errors      (n_iter, *batch) how far the costs moved, in units of eps: the logarithm of the plan moves about as far.
    """

    value: Tensor
    distortion: Tensor
    plan: Plan | Tensor
    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_inner: int
    errors: Tensor
