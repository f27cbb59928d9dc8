"""Gromov-Wasserstein: points of two spaces are matched by the distances within each, and by features where there are some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..costs import Cost, Matrix
from ..gradients.fixed_point import TOL, TOL_SINGLE, fixed_point
from ..penalties import BALANCED, Penalty
from ..problem import Problem
from ..solution import Plan
from ..solve import solve
from ..vectors import in_full_precision
from .loop import Posed, search
from .relaxed import relaxed
from .result import Gromov
from .spaces import Matrices, Moments, Points, given

LOSSES = ("square", "kl")


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
    tau: float | None = None,
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
    tau          a price of the marginals that is of pairs, as L is, in its units: the objective is then alpha <L, P⊗P> + (1 - alpha) <M, P>
                 + tau KL⊗(P1 | a) + tau KL⊗(P^T 1 | b) + eps KL⊗(P | a⊗b) with KL⊗(p | q) = KL(p⊗p | q⊗q). Through n-by-m arrays; without
                 `penalties`, `mass` and implicit derivatives.
    start        the plan to begin with, (*batch, n, m): a⊗b when left out. Another start may end elsewhere.
    grad         "envelope": first derivatives of `value` in costs, features and weights, exact at convergence. "implicit": of the plan
                 and of `distortion`, too, through n-by-m arrays.
    tol          the plan counts as settled when the costs move by less than `tol` times eps and its marginals are off by no more.
    max_iter, inner_iter   of the outer loop, and of each transport problem.

    Not converging is a status. Raises ProblemError for input that has no answer.
    Peyré, Cuturi and Solomon 2016, ICML; Vayer et al. 2019, arXiv:1811.02834 (fused); Scetbon, Peyré and Cuturi 2022, arXiv:2106.01128
    (factored costs); Séjourné, Vialard and Peyré 2021, arXiv:2009.04266 (tau).
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
    posed = Posed(spaces, _features(features, spaces), alpha, eps, a, b, penalties, mass)
    settings: dict[str, Any] = dict(max_iter=inner_iter, backend=backend)
    if tau is not None:
        if penalties is not BALANCED or mass is not None or grad == "implicit":
            raise errors.ProblemError('tau prices marginals in pairs: leave out `penalties`, `mass` and grad="implicit", or leave out tau.')
        Cx, Cy = (z if isinstance(z, Tensor) else z.dense() for z in (cost_x, cost_y))
        arrays = spaces if isinstance(spaces, Matrices) else Matrices(Cx, Cy, loss)
        return relaxed(arrays, posed.features, alpha, eps, a, b, tau, start, tol, max_iter, settings, on_check)
    end = search(posed, _first(posed, start), tol, max_iter, settings, on_check)
    solution = end.solution
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
        value.to(dtype), distortion.to(dtype), plan, solution.f, solution.g, end.status, end.settled.expand(solution.f.shape[:-1]),
        len(end.history), end.n_inner, torch.stack(end.history),
    )  # fmt: skip


def _live(posed: Posed) -> bool:
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


@torch.no_grad()
def _first(posed: Posed, start: Tensor | None) -> Moments:
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


def _implicit(posed: Posed, P: Tensor, f: Tensor, tol: float, settings: dict[str, Any]) -> Tensor:
    """The plan as a function of the problem: the fixed point of solving at its own slope."""

    def again(at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        problem = posed.problem(posed.slope(posed.spaces.moments(at[0])))
        return (solve(problem, start=f, tol=min(tol, 1e-9), grad="implicit", **settings).plan.to_dense(),)

    (found,) = fixed_point(again, (P,), TOL if P.dtype == torch.float64 else TOL_SINGLE)
    return found
