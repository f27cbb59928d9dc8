"""Geometry + penalties + schedule -> f, g, status. The only Sinkhorn loop in the package.

One iteration maps a column potential to the next: f is the update of g, `fresh` the update of f. The rows of the plan
(f, g) are then exact, and `fresh` holds the error of its columns without another pass over the costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import unknown
from .geometry import Geometry
from .problem import Problem
from .schedule import Anneal, Constant
from .solution import CONVERGED, DIVERGED, MAX_ITER, STALLED, Status
from .vectors import expm1

#: Within `NEAR` rounding floors, so many looks without a new smallest error mean that rounding is all that is left.
PATIENCE, NEAR = 10, 1e3
#: A sum of rounded numbers is off by a few of their last digits; below `ROUNDING` of them there is nothing to gain.
ROUNDING = 8.0


@dataclass(frozen=True)
class Stop:
    """When the marginals are good enough.

    tol    in the unit of the norm.
    norm   "l1": L1 marginal error as a fraction of the mass (for relaxed marginals, its analogue);
           "l2": Euclidean norm, absolute, of each problem; "l2_joint": of the whole batch together.
    """

    tol: float = 1e-4
    norm: str = "l1"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2", "l2_joint"):
            raise unknown("norm", self.norm, ["l1", "l2", "l2_joint"])

    def error(self, b: Tensor, gap: Tensor) -> Tensor:
        """gap = (g - fresh) / eps; b expm1(gap) is the excess of the column marginal, exactly so when it is a hard constraint."""
        return self._size(torch.where(b > 0, b * expm1(gap), 0.0), b)

    def floor(self, b: Tensor, g: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """The error that rounding alone makes: in the sums of the sweep, and in forming g / eps."""
        sums = ROUNDING * torch.finfo(dtype).eps
        differences = torch.finfo(g.dtype).eps * torch.where(b > 0, g.abs(), 0.0).amax(-1, keepdim=True) / eps
        return self._size(b * (sums + differences), b)

    def _size(self, excess: Tensor, b: Tensor) -> Tensor:
        if self.norm == "l1":
            return excess.abs().sum(-1) / b.sum(-1)
        if self.norm == "l2":
            return excess.square().sum(-1).sqrt()
        return excess.square().sum().sqrt().expand(b.shape[:-1])


@dataclass
class Outcome:
    """Where the loop stood when it stopped."""

    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    errors: list[Tensor] = field(default_factory=list)


def iterate(
    geometry: Geometry,
    problem: Problem,
    schedule: Constant | Anneal,
    start: Tensor,
    stop: Stop,
    max_iter: int,
    check_every: int = 10,
    on_check: Callable[[int, Tensor], None] | None = None,
) -> Outcome:
    """Iterate from the row potentials `start` = f + eps log a until `stop` is content, `max_iter` (>= 1) is reached or nothing moves.

    The error is looked at after iterations 1, 1 + check_every, 1 + 2 check_every, ... and after the last.
    """
    penalty_b = problem.penalties[1]
    eps, b = schedule.target, problem.b
    first = next(schedule.approach(), eps)
    g = penalty_b.damp(geometry.first(start, first), first)
    n_iter = 0
    for warm in schedule.approach():
        g = geometry.advance(problem, g, warm, 1)[2]
        n_iter += 1

    errors: list[Tensor] = []
    progress = _Progress()
    f = fresh = g
    status: Status | None = None
    converged = torch.zeros(b.shape[:-1], dtype=torch.bool, device=b.device)
    for k in _strides(max_iter - n_iter, check_every):
        f, g, fresh = geometry.advance(problem, fresh, eps, k)
        n_iter += k
        error = stop.error(b, (g - fresh) / eps)
        errors.append(error)
        if on_check is not None:
            on_check(n_iter, error)
        converged = error <= stop.tol
        status = progress.judge(error, converged, stop.floor(b, g, eps, geometry.dtype))
        if status is not None:
            break
    return Outcome(f, g, status or MAX_ITER, converged, n_iter, errors)


def _strides(total: int, check_every: int) -> Iterator[int]:
    """1, check_every, check_every, ... summing to `total` (at least one iteration)."""
    yield 1
    total -= 1
    while total > 0:
        yield min(check_every, total)
        total -= check_every


class _Progress:
    """Decides from a look at the errors whether the loop should end; one copy to the host each."""

    def __init__(self) -> None:
        self.best = math.inf
        self.idle = 0

    def judge(self, error: Tensor, converged: Tensor, floor: Tensor) -> Status | None:
        settled = converged | (error <= floor)
        worst = (error / floor).amax()
        done, at_floor, ratio = torch.stack([converged.all().to(error.dtype), settled.all().to(error.dtype), worst]).tolist()
        if done:
            return CONVERGED
        if at_floor:
            return STALLED
        if not math.isfinite(ratio):
            return DIVERGED
        self.idle = 0 if ratio < self.best else self.idle + 1
        self.best = min(self.best, ratio)
        # Far above rounding a standing error proves nothing: at small eps mass moves in long, flat stages.
        return STALLED if self.idle >= PATIENCE and ratio < NEAR else None
