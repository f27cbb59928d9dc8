"""The outer loop: the transport problem of the slope, the slope at its plan, until neither moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..costs import Cost, Matrix
from ..penalties import Penalty
from ..problem import Problem
from ..solution import Solution
from ..solve import find
from ..solver.criterion import Marginal
from ..solver.status import DIVERGED, Status
from ..solver.step import Start
from . import machine
from .mixing import Mixing
from .spaces import Factored, Matrices, Moments, Points, distance, largest

#: The transport problem of an outer iteration is solved to this part of the change that the last one made; the first to LOOSEST.
INNER, LOOSEST = 0.1, 1e-2

SETTLED = Status("converged", "The plan has stopped moving, and its marginals are within the tolerance.")
MOVING = Status(
    "max_iter",
    "The iterations ran out before the plan stopped moving, or before its marginals were within the tolerance; the last entry of `errors` "
    "says how far it still moved. Raise max_iter or inner_iter, raise eps, or loosen tol.",
)


@dataclass(frozen=True, eq=False)
class Posed:
    """The transport problem at a slope."""

    spaces: Matrices | Points
    features: Cost | None
    alpha: float
    eps: float
    a: Tensor | None
    b: Tensor | None
    penalties: Penalty | tuple[Penalty, Penalty]
    mass: Tensor | float | None

    def part(self, index: Tensor) -> Posed:
        """Some problems of a batch with one axis, between matrices."""
        assert isinstance(self.spaces, Matrices)
        features = self.features
        if features is not None and len(features.shape) > 2:
            features = Matrix(features.dense()[index])
        a, b = (w[index] if w is not None and w.ndim > 1 else w for w in (self.a, self.b))
        return replace(self, spaces=self.spaces.part(index), features=features, a=a, b=b)

    def slope(self, at: Moments) -> Tensor | Factored:
        """2 alpha L⊗P."""
        found = self.spaces.slope(at)
        if isinstance(found, Tensor):
            return 2 * self.alpha * found
        alpha, beta, u, v = found.parts
        return Factored(2 * self.alpha * alpha, 2 * self.alpha * beta, 2 * self.alpha * u, v)

    def problem(self, slope: Tensor | Factored) -> Problem:
        if self.features is None:
            cost: Any = slope
        elif isinstance(slope, Tensor):
            cost = torch.add(slope, self.features.dense().to(slope.dtype), alpha=1 - self.alpha)
        else:
            cost = (1 - self.alpha) * self.features + slope
        return Problem(cost, self.eps, self.a, self.b, self.penalties, self.mass)


@dataclass(frozen=True, eq=False)
class End:
    """How the loop ended: the last transport problem's solution, and what `Gromov` says of the rest."""

    solution: Solution
    status: Status
    settled: Tensor
    n_inner: int
    history: list[Tensor]


@torch.no_grad()
def search(
    posed: Posed, first: Moments, tol: float, max_iter: int, settings: dict[str, Any], on_check: Callable[[int, Tensor], None] | None
) -> End:
    """Outer iterations from the moments of a plan. `settings` are those of each transport problem."""
    slope = posed.slope(first)
    if on_check is None and machine.serves(posed, problem := posed.problem(slope), settings["backend"]):
        return _by_machine(posed, problem, slope, tol, max_iter, settings)
    change, f, n_inner, history, ratio = None, None, 0, [], 1.0
    crowd, status, mixing = _Crowd(posed), MOVING, Mixing()
    for k in range(max_iter):
        # As exact as the problem that moves least needs: each is to settle on its own.
        moves = tol if k == max_iter - 1 else LOOSEST if change is None else max(float(change.amin()), tol)
        inner = min(INNER * moves * ratio, LOOSEST)
        solution = _solved(crowd.posed.problem(slope), f, inner, settings)
        n_inner += solution.n_iter
        # A marginal error of the plan moves its slope by as much, times the largest slope.
        ratio = min(1.0, solution.problem.eps / max(largest(slope), 1e-300))
        following = crowd.posed.slope(crowd.posed.spaces.moments(solution.plan))
        change = (distance(following, slope) / solution.problem.eps).expand(solution.f.shape[:-1])
        exact = solution.converged | (solution.status.name == "stalled")
        crowd.tell(solution, slope, change, (change <= tol) & exact & (inner <= tol * ratio))
        history.append(crowd.change)
        if on_check is not None:
            on_check(k + 1, crowd.change)
        if not bool(change.isfinite().all()):
            status = DIVERGED
            break
        if bool(crowd.settled.all()):
            status = SETTLED
            break
        slope, f = mixing.following(slope, following, change), solution.f
        if (moving := crowd.moving(slope)) is not None:
            change, slope, f = change[moving], slope[moving], f[moving]  # pyright: ignore[reportIndexIssue]
            mixing.part(moving)
    return End(crowd.solution(INNER * tol * ratio, settings), status, crowd.settled, n_inner, history)


def _by_machine(posed: Posed, problem: Problem, slope: Any, tol: float, max_iter: int, settings: dict[str, Any]) -> End:
    """The same in one call."""
    constants = dict(tol=tol, loosest=LOOSEST, max_iter=max_iter, inner_iter=settings["max_iter"])
    found = machine.settle(posed, problem, slope, constants)
    status = SETTLED if bool(found.settled.all()) else MOVING if bool(found.change[-1].isfinite().all()) else DIVERGED
    solution = _solved(posed.problem(found.slope), found.f, machine.INNER * tol * found.ratio, settings)
    return End(solution, status, found.settled, found.n_inner, [*found.change])


def _solved(problem: Problem, f: Tensor | None, tol: float, settings: dict[str, Any]) -> Solution:
    """`solve` from potentials f, if there are some, whose value nobody has asked for yet."""
    start = None if f is None else Start(f, problem.a)
    return find(problem, criterion=Marginal(tol), start=start, accelerate="auto" if f is None else "mixing", **settings)


class _Crowd:
    """The problems of a batch, of which those that have settled are left out once they are half of the rest. With one batch axis and
    matrices; other problems go on together to the end."""

    def __init__(self, posed: Posed) -> None:
        self.whole = self.posed = posed
        self.rest: Tensor | None = None
        self.last: Solution | None = None
        self.change = self.settled = torch.zeros(())

    def tell(self, solution: Solution, slope: Tensor | Factored, change: Tensor, settled: Tensor) -> None:
        """What an iteration has found for the problems that are left."""
        self.last = solution
        if self.rest is None:
            self.change, self.settled = change, settled
            if isinstance(slope, Tensor) and change.ndim == 1 and not isinstance(self.whole.mass, Tensor):
                self.f, self.slope = solution.f.clone(), slope.expand(*change.shape, *slope.shape[-2:])
            return
        self.change, self.settled = self.change.index_copy(0, self.rest, change), self.settled.index_copy(0, self.rest, settled)
        self.f[self.rest] = solution.f
        assert isinstance(slope, Tensor)
        self.slope[self.rest] = slope

    def moving(self, slope: Tensor | Factored) -> Tensor | None:
        """Which of the problems that are left go on, (B,) bool; None where all of them do."""
        if not hasattr(self, "f") or not isinstance(slope, Tensor):
            return None
        rest = torch.arange(len(self.change), device=slope.device) if self.rest is None else self.rest
        moving = ~self.settled[rest]
        if 2 * int(moving.sum()) > len(rest):
            return None
        if self.rest is None:
            self.slope = self.slope.clone()
        self.rest = rest[moving]
        self.posed = self.whole.part(self.rest)
        return moving

    def solution(self, tol: float, settings: dict[str, Any]) -> Solution:
        """Of all problems."""
        assert self.last is not None
        if self.rest is None:
            return self.last
        return _solved(self.whole.problem(self.slope), self.f, tol, settings)
