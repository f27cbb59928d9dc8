"""Entropic transport as a loss, for matrices of costs or for clouds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import errors, transforms
from ..costs import Cost, SqEuclidean
from ..errors import ProblemError
from ..penalties import KL
from ..problem import Problem
from ..solve import solve
from ..solver.status import CONVERGED, STALLED
from . import foreign


class SinkhornLoss(nn.Module):
    """Entropic transport as a loss, for costs or for clouds: OT_eps(a, b), or <P, C> with a constant plan P.

    eps          > 0, in units of the cost.
    tau          None holds the marginals exactly; a number, or a pair (rows, columns), relaxes them by tau KL, in units of the cost.
                 eps and tau may be tensors of one number, such as parameters, and then get derivatives (grad="envelope").
    cost         the cost of moving x_i to y_j, (x, y) -> Cost or costs (*batch, n, m); for clouds only.
    reduction    "mean" or "sum" over the batch, "none" for each problem's own, (*batch,).
    detach_plan  False: the value <C, P> + eps KL(P | a⊗b) + penalties, whose gradients in C, x, y, a and b are exact at convergence.
                 True: sum_ij P_ij C_ij with P constant. Its gradient in C is P, and in x and y that of the cost under P.
    backend, grad, tol, max_iter  as in `gpu_ot.solve`.

    Call it with costs (*batch, n, m), with a gpu_ot.Cost, or with clouds x (*batch, n, d) and y (*batch, m, d), and weights a=(*batch, n)
    and b=(*batch, m), uniform when left out. Streamed clouds need no n-by-m array. Raises what `gpu_ot.solve` raises; not converging is
    a warning.

    Cuturi 2013, arXiv:1306.0895; Feydy et al. 2019, arXiv:1810.08278, equation (9).
    """

    def __init__(
        self, eps: float | Tensor, tau: float | Tensor | tuple[float | Tensor, float | Tensor] | None = None,
        cost: Callable[[Tensor, Tensor], Cost | Tensor] = SqEuclidean, reduction: str = "mean", detach_plan: bool = False,
        *, backend: str = "auto", grad: str = "envelope", tol: float = 1e-4, max_iter: int = 10_000, **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        foreign.refuse("SinkhornLoss", others)
        if reduction not in ("mean", "sum", "none"):
            raise errors.unknown("reduction", reduction, ["mean", "sum", "none"])
        self.eps, self.tau, self.cost, self.reduction, self.detach_plan = eps, tau, cost, reduction, detach_plan
        self.backend, self.grad, self.tol, self.max_iter = backend, grad, tol, max_iter

    def extra_repr(self) -> str:
        return f"eps={self.eps}, tau={self.tau}, reduction={self.reduction!r}, detach_plan={self.detach_plan}"

    @transforms.eagerly
    def forward(self, x: Tensor | Cost, y: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        if not isinstance(x, (Tensor, Cost)):
            raise errors.not_a_tensor("x", x)
        if not isinstance(x, Tensor) and y is not None:
            raise ProblemError("a Cost is bound to both clouds already: leave y out.")
        device = x.device if isinstance(x, Tensor) else next(iter(x.inputs.values())).device
        rows, columns = self.tau if isinstance(self.tau, tuple) else (self.tau, self.tau)
        rows, columns = (KL(math.inf if tau is None else tau) for tau in (rows, columns))  # pyright: ignore[reportArgumentType]
        with torch.autocast(device.type, enabled=False):
            cost = self.cost(x, y) if isinstance(x, Tensor) and y is not None else x
            problem = Problem(cost, self.eps, a, b, (rows, columns))
            solution = solve(problem, backend=self.backend, grad=self.grad, tol=self.tol, max_iter=self.max_iter)
            value = solution.held_cost if self.detach_plan else solution.value
        if solution.status not in (CONVERGED, STALLED) and solution.status.name != "unresolved":  # which `solve` has said
            warnings.warn(f"SinkhornLoss, {solution.n_iter} iterations, {solution.status}", RuntimeWarning, stacklevel=5)
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" and value.numel() else value.sum()  # of no problems: 0
