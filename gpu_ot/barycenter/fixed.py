"""Barycentres on a fixed support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import errors, gradients
from ..costs import Cost
from ..geometry.protocol import Geometry
from ..geometry.select import bind
from ..gradients.fixed_point import TOL, TOL_SINGLE, fixed_point
from ..penalties import BALANCED, KL
from ..problem import Problem
from ..solve import needs_gradient
from ..solver.barycentric import Agreement, Barycentric, Shared
from ..solver.loop import iterations, sinkhorn
from ..solver.monitor import Outcome
from ..solver.step import Start, State
from ..vectors import in_full_precision
from .result import Barycenter


@in_full_precision
def barycenter(
    cost: Cost | Tensor,
    eps: float | tuple[str, float],
    a: Tensor,
    weights: Tensor | None = None,
    *,
    penalty: KL = BALANCED,
    debiased: bool = False,
    cost_bb: Cost | Tensor | None = None,
    backend: str = "auto",
    grad: str = "implicit",
    tol: float = 1e-6,
    max_iter: int = 10_000,
    check_every: int = 10,
    start: Tensor | None = None,
    on_check: Callable[[int, Tensor], None] | None = None,
) -> Barycenter:
    """The barycentre of K measures on a fixed support, in the log domain: (*batch, m) weights.

    Minimises sum_k w_k (<C, P_k> + eps KL(P_k | a_k⊗u)) over plans P_k with rows a_k and one common column marginal, the
    barycentre; u is the uniform measure of mass 1.

    cost       from the support of the measures to that of the barycentre: a Cost, or the matrix (n, m), or one for each measure,
               (*batch, K, n, m).
    eps        > 0, in units of the cost or relative to it, as for `Problem`.
    a          the measures, (*batch, K, n), of one mass; 0 is legal.
    weights    (*batch, K), >= 0, of any positive sum, which is brought to 1; None is uniform. With several sets of weights and one set
               of measures all their barycentres are found at once.
    penalty    KL(tau): marginals at a price, for measures of different masses.
    debiased   True: the barycentre of Sinkhorn divergences, without the blur that eps adds. It needs costs among the points of the
               barycentre: those of the cost, which for a square symmetric matrix are itself, or `cost_bb` (m, m).
    grad       derivatives of the barycentre in the measures, the weights and the cost: "implicit", exact at convergence (set `tol` as small
               as they should be exact), or "unroll", through every iteration that was run. First derivatives.
    tol        the standard deviation over the measures of the mass that a point gets, summed over points, as a part of the mass.
    start      (*batch, K, n) row potentials to start from, as `f` of an earlier result.
    on_check   called with (iterations, errors) at each check.

    Returns a Barycenter. Not converging is a status. Raises ProblemError for input that has no answer.
    Benamou et al. 2015, arXiv:1412.5154; Janati et al. 2020, arXiv:2006.02575 (debiased); Chizat et al. 2018, arXiv:1607.05816 (relaxed).
    """
    if grad not in ("implicit", "unroll"):
        raise errors.unknown("grad", grad, ("implicit", "unroll"))
    if max_iter < 1:
        raise errors.ProblemError(f"max_iter must be at least 1, found {max_iter}.")
    problem, w = posed(cost, eps, a, weights, penalty)
    own = _among(problem, cost_bb, backend) if debiased else None
    if own is not None and not penalty.balanced:
        raise errors.ProblemError("a debiased barycentre of relaxed marginals is not known: leave out `penalty`, or `debiased`.")
    rows = torch.zeros_like(problem.a) if start is None else start.to(problem.a).expand_as(problem.a)
    state, end = solved(
        problem, w, bind(problem, backend), rows, Agreement(tol), own=own, grad=grad, max_iter=max_iter, check_every=check_every,
        on_check=on_check,
    )  # fmt: skip
    history = torch.stack(end.errors)[..., 0] if end.errors else end.f.new_zeros(0, *end.f.shape[:-2])
    return Barycenter(masses(problem, state), None, end.f, end.g, end.status, end.converged.all(-1), end.n_iter, history)


def solved(
    problem: Problem, w: Tensor, geometry: Geometry, rows: Tensor, rule: Agreement, *, own: Geometry | None = None, grad: str = "implicit",
    **settings: Any,
) -> tuple[State, Outcome]:  # fmt: skip
    """(the state, as a function of the problem where something requires a gradient; how the loop ended) from row potentials."""
    begin, step = Start(rows, problem.a), Barycentric(problem, problem.eps, weights=w, own=own)
    with torch.no_grad():
        end = sinkhorn(geometry, _numbers(step), rule, begin.numbers(), **settings)
    live = torch.is_grad_enabled() and (needs_gradient(problem) or w.requires_grad)
    if live and grad == "unroll":
        return iterations(_recorded(geometry), replace(step, own=own and _recorded(own)), begin, end.n_iter), end
    return _at(step, geometry, end.g, live), end


def masses(problem: Problem, state: State) -> Tensor:
    """(*batch, m): the barycentre of a state."""
    return (problem.b * state.memory.log_b.exp())[..., 0, :].to(problem.given_dtype)


def posed(cost: Cost | Tensor, eps: float | tuple[str, float], a: Tensor, weights: Tensor | None, penalty: KL) -> tuple[Problem, Tensor]:
    """The problem (*batch, K, n, m), whose b is uniform, and the weights (*batch, K, 1)."""
    if not isinstance(a, Tensor):
        raise errors.not_a_tensor("a", a)
    if a.ndim < 2 or not a.shape[-2]:
        raise errors.wrong_shape("a", a.shape, "(*batch, K, n), a row for each measure")
    K, m = a.shape[-2], (*getattr(cost, "shape", ()), 1)[-2:][0]
    w = torch.full((K,), 1 / K, dtype=torch.float64, device=a.device) if weights is None else weights
    if not isinstance(w, Tensor):
        raise errors.not_a_tensor("weights", w)
    if w.ndim == 0 or w.shape[-1] != K:
        raise errors.wrong_shape("weights", w.shape, f"(*batch, {K}), a weight for each measure")
    found = w.detach()
    if not bool(((found >= 0) & found.isfinite()).all()):
        raise errors.bad_weights("weights", int(found.isnan().sum()), int((found < 0).sum()), int(found.isinf().sum()))
    if not bool((found.sum(-1) > 0).all()):
        raise errors.no_mass("weights")
    try:
        batch = torch.broadcast_shapes(w.shape[:-1], a.shape[:-2])
    except RuntimeError:
        raise errors.wrong_shape("weights", w.shape, f"batches that broadcast with a of shape {errors.shape(a.shape)}") from None
    a = a.expand(*batch, *a.shape[-2:])
    mass = a.detach().double().sum(-1)
    if penalty.balanced and mass.numel() and bool(mass.isfinite().all()):
        low, high = float(mass.amin()), float(mass.amax())
        if high - low > 1e-5 * abs(high):
            raise errors.unequal_masses(low, high)
    level = a.detach().sum(-1, keepdim=True).mean(-2, keepdim=True) / m
    problem = Problem(cost, eps, a, level.expand(*batch, K, m), penalty)
    w = (w / w.sum(-1, keepdim=True)).to(problem.a).unsqueeze(-1)
    # The reference measure of the columns is a constant, whatever the mass of a.
    return problem.restricted(problem.cost, problem.a, torch.full_like(problem.b.detach(), 1 / m)), w


def _among(problem: Problem, given: Cost | Tensor | None, backend: str) -> Geometry:
    """The cost among the points of the barycentre, (*batch, 1, m, m)."""
    cost: Cost | Tensor
    if given is not None:
        cost = given
    else:
        try:
            cost = problem.cost.within(1)
        except errors.ProblemError:
            cost = problem.cost
            C = problem.cost.dense().detach() if problem.cost.stored else None
            if C is None or C.shape[-2] != C.shape[-1] or not torch.allclose(C, C.mT):
                raise errors.ProblemError(
                    "a debiased barycentre needs the costs among its own points, and this matrix is not square and symmetric: pass cost_bb "
                    "(m, m), or a cost between clouds."
                ) from None
    m = problem.shape[-1]
    if cost.shape[-2:] != (m, m):
        raise errors.wrong_shape("cost_bb", cost.shape, f"(*batch, {m}, {m}), the costs among the points of the barycentre")
    uniform = torch.ones_like(problem.b[..., :1, :]) if len(cost.shape) <= 2 else torch.ones_like(problem.b)
    return bind(Problem(cost, problem.eps, uniform, uniform), backend)


def _numbers(step: Barycentric) -> Barycentric:
    return replace(step, weights=step.weights.detach() if step.weights is not None else None)


def _at(step: Barycentric, geometry: Geometry, g: Tensor, live: bool) -> State:
    """The state after one more iteration from g and the debiasing scaling that belongs to it; if `live`, as a function of the problem."""
    with torch.no_grad():
        plain = _numbers(step)
        assert plain.weights is not None
        zeros = torch.zeros_like(g[..., :1, :])
        log_d = zeros if step.own is None else (plain.weights * g).sum(-2, keepdim=True) / step.eps  # sum_k w_k g_k is eps log d
        if not live:
            return plain.moved(geometry, State(g, g, g, _shared(log_d)), g, None, 1)
    map_ = replace(step, own=step.own and _recorded(step.own))
    differentiable = _recorded(geometry)

    def once(at: tuple[Tensor, ...]) -> State:
        g, log_d = at if len(at) == 2 else (at[0], zeros)
        return map_.moved(differentiable, State(g, g, g, _shared(log_d)), g, None, 1)

    def advance(at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state = once(at)
        return (state.g_next,) if step.own is None else (state.g_next, state.memory.log_d)

    at = (g,) if step.own is None else (g, log_d)
    return once(fixed_point(advance, at, TOL if geometry.dtype == torch.float64 else TOL_SINGLE))


def _recorded(geometry: Geometry) -> Geometry:
    """The geometry whose updates autograd records."""
    return geometry if geometry.native else gradients.Differentiable(geometry)


def _shared(log_d: Tensor) -> Shared:
    return Shared(log_d, log_d, log_d)
