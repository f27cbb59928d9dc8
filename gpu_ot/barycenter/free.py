"""Barycentres of points that move, and of weights that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import errors, gradients
from ..costs import SqEuclidean
from ..geometry.select import bind
from ..gradients.fixed_point import TOL, TOL_SINGLE, fixed_point
from ..penalties import BALANCED
from ..problem import Problem
from ..solution import Solution
from ..solve import find, solve
from ..solver.barycentric import Agreement
from ..solver.criterion import Marginal
from ..solver.status import CONVERGED, DIVERGED, STALLED, Status
from ..solver.step import Start
from ..vectors import in_full_precision
from . import machine
from .fixed import masses, posed, solved
from .result import Barycenter

SETTLED = Status("converged", "The points have stopped moving.")
MOVING = Status(
    "max_iter",
    "The points still move, or a transport problem behind the last move had not converged: the last entry of `errors` is the squared "
    "displacement. Raise max_iter or inner_iter, raise eps, or loosen tol.",
)
#: Transport problems whose derivatives are wanted are solved to this, or better.
SHARP = 1e-11


@in_full_precision
def free_barycenter(
    clouds: Tensor | Sequence[Tensor],
    eps: float,
    start: Tensor,
    *,
    a: Tensor | Sequence[Tensor] | None = None,
    b: Tensor | None = None,
    weights: Tensor | None = None,
    free_weights: bool = False,
    tol: float = 1e-7,
    max_iter: int = 100,
    inner_tol: float = 1e-6,
    inner_iter: int = 1000,
    backend: str = "auto",
) -> Barycenter:
    """m points that move to the entropic barycentre of K clouds under squared distances: (m, d).

    Each move solves all K problems at once, from the potentials of the last, and sends every point to the weighted mean of where their
    plans send it.

    clouds      (K, n, d), or K clouds (n_k, d) of any numbers of points.
    eps         > 0, in units of the squared distance.
    start       (m, d), where the points begin.
    a, b        weights of the clouds, (K, n) or K tensors (n_k,), and of the points, (m,); None is uniform.
    weights     (K,) of the clouds in the barycentre; None is uniform.
    free_weights   True: the weights of the points move, too. Each move then solves the fixed-support barycentre on the points, with the
                objective of `barycenter`. Leave `b` out.
    tol         the squared displacement of all points together at which they count as settled.
    inner_tol, inner_iter   of the transport problems, see `solve`; of the fixed-support barycentre, see `barycenter`.

    Returns a Barycenter, with `points`. Points, and weights that move, carry derivatives in clouds, a, b and weights, where these require
    them: implicit, first ones, exact at a fixed point, so set `tol` as small as they should be exact. They take a transport problem's
    implicit derivative for each of the adjoint's iterations. Under torch.no_grad() there are none.
    Raises ProblemError for clouds that do not fit each other, and in the backward NotConverged where the moves do not contract.
    Cuturi and Doucet 2014, arXiv:1310.4375, algorithm 2; its step in the weights is here the exact minimum, Benamou et al. 2015,
    arXiv:1412.5154.
    """
    if not isinstance(start, Tensor):
        raise errors.not_a_tensor("start", start)
    if start.ndim != 2 or not start.shape[0]:
        raise errors.wrong_shape("start", start.shape, "(m, d), a row for each point")
    if max_iter < 1 or inner_iter < 1:
        raise errors.ProblemError(f"max_iter and inner_iter must be at least 1, found {max_iter} and {inner_iter}.")
    if free_weights and b is not None:
        raise errors.ProblemError("free_weights=True finds the weights of the points, and b gives them: leave one of the two out.")
    y, wa = _padded(clouds, a, start)
    w = _weights(weights, len(y), start)
    x = start.detach().to(y.dtype)
    held = y.detach(), wa.detach(), None if b is None else b.detach(), w.detach()
    settings: dict[str, Any] = dict(max_iter=inner_iter, backend=backend)
    kind = _Fixed if not free_weights else _Free
    moves, converged, status = [], False, MOVING
    with torch.no_grad():
        move: _Move = kind(eps, *held, x, inner_tol, settings)
        for _ in range(max_iter):
            sent, inner = move(x)
            moves.append((sent - x).double().square().sum())
            x = sent
            if not bool(moves[-1].isfinite()):
                status = DIVERGED
                break
            if float(moves[-1]) <= tol:
                converged = inner in (CONVERGED, STALLED)
                status = SETTLED if converged else MOVING
                break
    live = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (y, wa, b, w))
    found, points = move.weights, x
    if live and status is not DIVERGED:
        points, found = _differentiable(kind, (eps, y, wa, b, w), move, x, min(inner_tol, SHARP), settings)
    done = torch.tensor(converged, device=start.device)
    return Barycenter(found.to(start.dtype), points.to(start.dtype), move.f, move.g, status, done, len(moves), torch.stack(moves))


class _Move(Protocol):
    """Where points go. After a call `weights` (m,) are those of the points, and f (K, n) and g (K, m) the potentials."""

    weights: Tensor
    f: Tensor
    g: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Status]: ...


class _Fixed:
    """For points of given weights. Rows are the points, whose marginal is then exact at every move."""

    def __init__(
        self, eps: float, y: Tensor, a: Tensor, b: Tensor | None, w: Tensor, x: Tensor, tol: float, settings: dict[str, Any],
        start: Tensor | None = None, grad: str = "envelope",
    ) -> None:  # fmt: skip
        self.eps, self.y, self.a, self.w, self.tol, self.grad = eps, y, a, w, tol, grad
        self.b, self.settings = None if b is None else b.expand(len(y), len(x)), settings
        first = self._problem(x)
        self.weights, self.solution, self.start = first.a[0], None, start
        fast = grad == "envelope" and machine.serves(first, settings["backend"])
        self.machine = machine.Moves(first, y, tol, settings["max_iter"]) if fast else None

    def __call__(self, x: Tensor) -> tuple[Tensor, Status]:
        if self.machine is not None:
            images, status = self.machine(x)
            self.f, self.g = torch.from_numpy(self.machine.g), torch.from_numpy(self.machine.f)
        else:
            solution = self._solved(self._problem(x))
            self.start, self.f, self.g = solution.f.detach(), solution.g, solution.f
            images, status = self._images(solution), solution.status
        return _mean(self.w, images), status

    def _images(self, solution: Solution) -> Tensor:
        rows = solution.problem.a.unsqueeze(-1).to(self.y)
        # Rows are exact, so a product with the plan is enough; a point without weight has an image, too.
        return solution.transport(y=self.y) if self.grad == "implicit" or not bool((rows > 0).all()) else solution.plan @ self.y / rows

    def _problem(self, x: Tensor) -> Problem:
        return Problem(SqEuclidean(x.expand(len(self.y), *x.shape), self.y), self.eps, self.b, self.a)

    def _solved(self, problem: Problem) -> Solution:
        if self.grad == "implicit":
            return solve(problem, start=self.start, tol=self.tol, grad="implicit", **self.settings)
        start = None if self.start is None else Start(self.start, problem.a)
        return find(
            problem, criterion=Marginal(self.tol), start=start, accelerate="auto" if start is None else "mixing", **self.settings
        )  # fmt: skip


class _Free:
    """For points whose weights are those of the fixed-support barycentre on them. Rows are the clouds."""

    def __init__(
        self, eps: float, y: Tensor, a: Tensor, b: Tensor | None, w: Tensor, x: Tensor, tol: float, settings: dict[str, Any],
        start: Tensor | None = None, grad: str = "envelope",
    ) -> None:  # fmt: skip
        self.eps, self.y, self.a, self.w, self.rule, self.start = eps, y, a, w, Agreement(tol), start
        self.limit, self.backend = settings["max_iter"], settings["backend"]
        self.weights = y.new_full(x.shape[:1], 1 / len(x))

    def __call__(self, x: Tensor) -> tuple[Tensor, Status]:
        problem, w = posed(SqEuclidean(self.y, x.expand(len(self.y), *x.shape)), self.eps, self.a, self.w, BALANCED)
        geometry = bind(problem, self.backend)
        rows = torch.zeros_like(problem.a) if self.start is None else self.start
        state, end = solved(problem, w, geometry, rows, self.rule, max_iter=self.limit, check_every=1)
        self.weights, self.f, self.g, self.start = masses(problem, state), end.f, end.g, end.f.detach()
        images = gradients.barycentric(problem.T, geometry.T, state.f, self.y.to(state.f))
        return _mean(self.w, images.to(x.dtype)), end.status


def _differentiable(
    kind: Any, given: tuple[Any, ...], move: _Move, x: Tensor, tol: float, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(the points, their weights) as functions of clouds and weights: the fixed point of a move."""
    again = kind(*given, x, tol, settings, move.g if kind is _Fixed else move.f, "implicit")
    (points,) = fixed_point(lambda at: (again(at[0])[0],), (x,), TOL if x.dtype == torch.float64 else TOL_SINGLE)
    if kind is _Free:
        again(points)  # the weights at the points, which depend on them
    return points, again.weights


def _mean(w: Tensor, images: Tensor) -> Tensor:
    w = w.to(images)
    return (w.view(-1, 1, 1) * images).sum(0) / w.sum()


def _weights(weights: Tensor | None, K: int, like: Tensor) -> Tensor:
    if weights is not None and not isinstance(weights, Tensor):
        raise errors.not_a_tensor("weights", weights)
    w = torch.full((K,), 1 / K, dtype=torch.float64, device=like.device) if weights is None else weights.to(torch.float64)
    if w.shape != (K,):
        raise errors.wrong_shape("weights", w.shape, f"({K},), a weight for each cloud")
    found = w.detach()
    if not bool(((found >= 0) & found.isfinite()).all()):
        raise errors.bad_weights("weights", int(found.isnan().sum()), int((found < 0).sum()), int(found.isinf().sum()))
    if not float(found.sum()) > 0:
        raise errors.no_mass("weights")
    return w


def _padded(clouds: Tensor | Sequence[Tensor], a: Tensor | Sequence[Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Points (K, n, d) and weights (K, n), where clouds with fewer points have some without weight."""
    if not len(clouds):
        raise errors.ProblemError("clouds is empty: a barycentre needs at least one.")
    for k, z in enumerate(clouds):
        if not isinstance(z, Tensor):
            raise errors.not_a_tensor(f"clouds[{k}]", z)
        if z.ndim != 2 or z.shape[-1] != like.shape[-1] or not len(z):
            raise errors.wrong_shape(f"clouds[{k}]", z.shape, f"(n, {like.shape[-1]}) to match start with shape {errors.shape(like.shape)}")
    masses = [z.new_full(z.shape[:1], 1 / len(z)) for z in clouds] if a is None else list(a)
    if len(masses) != len(clouds):
        raise errors.ProblemError(f"a holds the weights of {len(masses)} clouds, and there are {len(clouds)}.")
    for k, (z, mass) in enumerate(zip(clouds, masses, strict=True)):
        if mass.shape != z.shape[:1]:
            raise errors.wrong_shape(f"a[{k}]", mass.shape, f"({len(z)},), a weight for each point of clouds[{k}]")
    most = max(map(len, clouds))
    y = torch.stack([torch.cat((z, z[:1].expand(most - len(z), -1))) for z in clouds])
    return y, torch.stack([torch.cat((mass, mass.new_zeros(most - len(mass)))) for mass in masses])
