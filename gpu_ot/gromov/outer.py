"""Gromov-Wasserstein: points of two spaces are matched by the distances within each, and by features where there are some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..costs import Cost, Matrix
from ..gradients.fixed_point import TOL, TOL_SINGLE, fixed_point
from ..penalties import BALANCED, Penalty
from ..problem import Problem
from ..solution import Plan, Solution
from ..solve import find, solve
from ..solver.criterion import Marginal
from ..solver.status import DIVERGED, Status
from ..solver.step import Start
from ..vectors import in_full_precision
from .spaces import Factored, Matrices, Moments, Points, distance, given, largest

LOSSES = ("square", "kl")
#: The transport problem of an outer iteration is solved to this part of the change that the last one made; the first to LOOSEST.
INNER, LOOSEST = 0.1, 1e-2

SETTLED = Status("converged", "The plan has stopped moving, and its marginals are within the tolerance.")
MOVING = Status(
    "max_iter",
    "The iterations ran out before the plan stopped moving, or before its marginals were within the tolerance; the last entry of `errors` "
    "says how far it still moved. Raise max_iter or inner_iter, raise eps, or loosen tol.",
)


@dataclass(frozen=True, eq=False)
class Gromov:
    """The result of `gromov`.

    value       (*batch,) the objective, differentiable: see `gromov`.
    distortion  (*batch,) the sum over pairs of pairs alone, without features, entropy and weight.
    plan        lazy, detached; with grad="implicit" an array (*batch, n, m) that carries derivatives.
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


@in_full_precision
def gromov(
    cost_x: Cost | Tensor,
    cost_y: Cost | Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    features: Cost | Tensor | None = None,
    alpha: float | None = None,
    loss: str = "square",
    penalties: Penalty | tuple[Penalty, Penalty] = BALANCED,
    mass: Tensor | float | None = None,
    start: Tensor | None = None,
    backend: str = "auto",
    grad: str = "envelope",
    tol: float = 1e-6,
    max_iter: int = 1000,
    inner_iter: int = 1000,
    on_check: Callable[[int, Tensor], None] | None = None,
) -> Gromov:
    """Entropic (fused) Gromov-Wasserstein: a stationary plan P of

        (1 - alpha) <M, P> + alpha sum_ijkl L(Cx_ik, Cy_jl) P_ij P_kl + eps KL(P | a⊗b).

    Each outer iteration solves the transport problem of the objective's slope at the last plan, from its potentials. Problems of a batch
    are solved together: graphs (*batch, n, n), or several starts of one pair of spaces.

    cost_x, cost_y   the distances within each space: matrices (*batch, n, n) and (*batch, m, m), or costs of points to themselves. For
                 costs that fold, SqEuclidean(x, x), no such matrix is formed, and the transport problem's cost folds, too.
    eps          > 0, in units of the objective: of L.
    a, b         weights (*batch, n) and (*batch, m), uniform when left out.
    features     M, a cost or matrix (*batch, n, m); with it alpha in [0, 1], .5 when left out. Without, alpha is 1.
    loss         "square", (s - t)^2, or "kl", s log(s / t) - s + t for matrices > 0.
    penalties    prices of the marginals, as for `Problem`; `mass` for partial transport. L is then a sum over P as it is.
    start        the plan to begin with, (*batch, n, m): a⊗b when left out. Another start may end elsewhere.
    grad         "envelope": first derivatives of `value` in costs, features and weights, exact at convergence. "implicit": of the plan
                 and of `distortion`, too, through n-by-m arrays.
    tol          the plan counts as settled when the costs move by less than `tol` times eps and its marginals are off by no more.
    max_iter, inner_iter   of the outer loop, and of each transport problem.

    Not converging is a status. Raises ProblemError for input that has no answer.
    Peyré, Cuturi and Solomon 2016, ICML; Vayer et al. 2019, arXiv:1811.02834 (fused); Scetbon, Peyré and Cuturi 2022, arXiv:2106.01128
    (factored costs).
    """
    if grad not in ("envelope", "implicit"):
        raise errors.unknown("grad", grad, ("envelope", "implicit"))
    if loss not in LOSSES:
        raise errors.unknown("loss", loss, LOSSES)
    if isinstance(eps, tuple):
        raise errors.ProblemError(f"eps must be a number here, found {eps}: the costs that it would be relative to move with the plan.")
    if max_iter < 1 or inner_iter < 1:
        raise errors.ProblemError(f"max_iter and inner_iter must be at least 1, found {max_iter} and {inner_iter}.")
    alpha = (1.0 if features is None else 0.5) if alpha is None else float(alpha)
    if not 0 <= alpha <= 1 or (features is None and alpha != 1):
        raise errors.ProblemError(f"alpha must be in [0, 1], and 1 without features, found {alpha}: the features' part is 1 - alpha.")
    spaces = given(cost_x, cost_y, loss)
    posed = _Posed(spaces, _features(features, spaces), alpha, eps, a, b, penalties, mass)
    settings: dict[str, Any] = dict(max_iter=inner_iter, backend=backend)
    with torch.no_grad():
        slope = posed.slope(_first(posed, start))
        change, f, n_inner, history, ratio = None, None, 0, [], 1.0
        crowd, status = _Crowd(posed), MOVING
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
            change, slope, f = crowd.left(change, following, solution.f)
        solution = crowd.solution(INNER * tol * ratio, settings)
        settled = crowd.settled
    plan: Plan | Tensor = solution.plan
    if not _live(posed):
        with torch.no_grad():
            distortion = spaces.distortion(spaces.moments(plan), plan)
        value = solution.wide_value - alpha * distortion.to(solution.wide_value.dtype)
    else:
        moments = spaces.moments(plan)
        distortion = spaces.distortion(moments, plan)
        value = solve(posed.problem(posed.slope(moments)), start=solution.f, tol=min(tol, 1e-6), **settings).wide_value
        value = value - alpha * distortion.to(value.dtype)
        if grad == "implicit":
            plan = _implicit(posed, solution.plan.to_dense(), solution.f, tol, settings)
            distortion = spaces.distortion(spaces.moments(plan), plan)
    dtype = solution.problem.given_dtype
    return Gromov(
        value.to(dtype), distortion.to(dtype), plan, solution.f, solution.g, status, settled.expand(solution.f.shape[:-1]), len(history),
        n_inner, torch.stack(history),
    )  # fmt: skip


def _solved(problem: Problem, f: Tensor | None, tol: float, settings: dict[str, Any]) -> Solution:
    """`solve` from potentials f, if there are some, whose value nobody has asked for yet."""
    start = None if f is None else Start(f, problem.a)
    return find(problem, criterion=Marginal(tol), start=start, accelerate="auto" if f is None else "mixing", **settings)


class _Crowd:
    """The problems of a batch, of which those that have settled are left out once they are half of the rest. With one batch axis and
    matrices; other problems go on together to the end."""

    def __init__(self, posed: _Posed) -> None:
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

    def left(self, change: Tensor, slope: Any, f: Tensor) -> tuple[Tensor, Any, Tensor]:
        """The change, the slope and the potentials of the problems that go on."""
        if not hasattr(self, "f"):
            return change, slope, f
        rest = torch.arange(len(self.change), device=f.device) if self.rest is None else self.rest
        moving = ~self.settled[rest]
        if 2 * int(moving.sum()) > len(rest):
            return change, slope, f
        if self.rest is None:
            self.slope = self.slope.clone()
        self.rest = rest[moving]
        self.posed = self.whole.part(self.rest)
        return change[moving], slope[moving], f[moving]

    def solution(self, tol: float, settings: dict[str, Any]) -> Solution:
        """Of all problems."""
        assert self.last is not None
        if self.rest is None:
            return self.last
        return _solved(self.whole.problem(self.slope), self.f, tol, settings)


@dataclass(frozen=True, eq=False)
class _Posed:
    """The transport problem at a slope."""

    spaces: Matrices | Points
    features: Cost | None
    alpha: float
    eps: float
    a: Tensor | None
    b: Tensor | None
    penalties: Penalty | tuple[Penalty, Penalty]
    mass: Tensor | float | None

    def part(self, index: Tensor) -> _Posed:
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
            cost = (1 - self.alpha) * self.features.dense().to(slope.dtype) + slope
        else:
            cost = (1 - self.alpha) * self.features + slope
        return Problem(cost, self.eps, self.a, self.b, self.penalties, self.mass)


def _live(posed: _Posed) -> bool:
    """Whether a tensor of the problem requires a gradient here and now."""
    features = [] if posed.features is None else posed.features.inputs.values()
    given = [*posed.spaces.tensors, *features, posed.a, posed.b, posed.mass, posed.eps]
    return torch.is_grad_enabled() and any(isinstance(z, Tensor) and z.requires_grad for z in given)


def _features(features: Cost | Tensor | None, spaces: Matrices | Points) -> Cost | None:
    if features is None:
        return None
    cost = Matrix(features) if isinstance(features, Tensor) else features
    if cost.shape[-2:] != spaces.shape:
        raise errors.wrong_shape(
            "features", cost.shape, f"(*batch, {spaces.shape[0]}, {spaces.shape[1]}), the costs between the two spaces"
        )
    return cost


def _first(posed: _Posed, start: Tensor | None) -> Moments:
    """The moments of the first plan."""
    n, m = posed.spaces.shape
    if start is None:
        zeros = torch.zeros(n, m, dtype=posed.spaces.dtype, device=posed.spaces.device)
        problem = Problem(zeros, posed.eps, posed.a, posed.b, posed.penalties, posed.mass)
        left = (
            problem.b.sum(-1, keepdim=True) if problem.mass is None else problem.a.sum(-1, keepdim=True) * problem.b.sum(-1, keepdim=True)
        )
        scale = 1.0 if problem.mass is None else problem.mass.unsqueeze(-1)
        return posed.spaces.of_product(problem.a * (scale / left), problem.b)
    if start.shape[-2:] != (n, m):
        raise errors.wrong_shape("start", start.shape, f"(*batch, {n}, {m}), a plan")
    if not bool(((start >= 0) & start.isfinite()).all()):
        raise errors.ProblemError("start must hold finite masses >= 0: it is a plan, as of an earlier result, or a⊗b.")
    return posed.spaces.moments(start.to(posed.spaces.dtype))


def _implicit(posed: _Posed, P: Tensor, f: Tensor, tol: float, settings: dict[str, Any]) -> Tensor:
    """The plan as a function of the problem: the fixed point of solving at its own slope."""

    def again(at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        problem = posed.problem(posed.slope(posed.spaces.moments(at[0])))
        return (solve(problem, start=f, tol=min(tol, 1e-9), grad="implicit", **settings).plan.to_dense(),)

    (found,) = fixed_point(again, (P,), TOL if P.dtype == torch.float64 else TOL_SINGLE)
    return found
