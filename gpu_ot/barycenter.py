"""Barycentres: the measure with the smallest weighted sum of transport values to others, on a fixed support or on points that move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import errors, gradients
from .costs import Cost, SqEuclidean
from .geometry.protocol import Geometry
from .geometry.select import bind
from .gradients.fixed_point import TOL, TOL_SINGLE, fixed_point
from .penalties import BALANCED, KL
from .problem import Problem
from .solve import find, needs_gradient
from .solver.barycentric import Agreement, Barycentric, Shared
from .solver.criterion import Marginal
from .solver.loop import iterations, sinkhorn
from .solver.status import DIVERGED, Status
from .solver.step import Start, State
from .vectors import in_full_precision


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
    problem, w = _posed(cost, eps, a, weights, penalty)
    own = _among(problem, cost_bb, backend) if debiased else None
    if own is not None and not penalty.balanced:
        raise errors.ProblemError("a debiased barycentre of relaxed marginals is not known: leave out `penalty`, or `debiased`.")
    geometry = bind(problem, backend)
    rows = torch.zeros_like(problem.a) if start is None else start.to(problem.a).expand_as(problem.a)
    begin = Start(rows, problem.a)
    step, rule = Barycentric(problem, problem.eps, weights=w, own=own), Agreement(tol)
    with torch.no_grad():
        end = sinkhorn(
            geometry, _numbers(step), rule, begin.numbers(), max_iter=max_iter, check_every=check_every, on_check=on_check
        )  # fmt: skip
    live = torch.is_grad_enabled() and (needs_gradient(problem) or w.requires_grad)
    if live and grad == "unroll":
        state = iterations(_recorded(geometry), replace(step, own=own and _recorded(own)), begin, end.n_iter)
    else:
        state = _at(step, geometry, end.g, live)
    beta = (problem.b * state.memory.log_b.exp())[..., 0, :].to(problem.given_dtype)
    history = torch.stack(end.errors)[..., 0] if end.errors else end.f.new_zeros(0, *end.f.shape[:-2])
    return Barycenter(beta, None, end.f, end.g, end.status, end.converged.all(-1), end.n_iter, history)


def _posed(cost: Cost | Tensor, eps: float | tuple[str, float], a: Tensor, weights: Tensor | None, penalty: KL) -> tuple[Problem, Tensor]:
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


#: How `free_barycenter` ends.
SETTLED = Status("converged", "The points have stopped moving.")
MOVING = Status(
    "max_iter",
    "The points still move, or a transport problem behind the last move had not converged: the last entry of `errors` is the squared "
    "displacement. Raise max_iter or inner_iter, raise eps, or loosen tol.",
)


@torch.no_grad()
def free_barycenter(
    clouds: Tensor | Sequence[Tensor],
    eps: float,
    start: Tensor,
    *,
    a: Tensor | Sequence[Tensor] | None = None,
    b: Tensor | None = None,
    weights: Tensor | None = None,
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
    tol         the squared displacement of all points together at which they count as settled.
    inner_tol, inner_iter   of the transport problems, see `solve`.

    Returns a Barycenter, with `points`, detached. Raises ProblemError for clouds that do not fit each other.
    Cuturi and Doucet 2014, arXiv:1310.4375, algorithm 2 with fixed weights.
    """
    if not isinstance(start, Tensor):
        raise errors.not_a_tensor("start", start)
    if start.ndim != 2 or not start.shape[0]:
        raise errors.wrong_shape("start", start.shape, "(m, d), a row for each point")
    if max_iter < 1:
        raise errors.ProblemError(f"max_iter must be at least 1, found {max_iter}.")
    y, wa = _padded(clouds, a, start)
    K, (m, d) = len(y), start.shape
    w = torch.full((K,), 1 / K, dtype=torch.float64, device=start.device) if weights is None else weights.to(torch.float64)
    if w.shape != (K,):
        raise errors.wrong_shape("weights", w.shape, f"({K},), a weight for each cloud")
    if not bool(((w >= 0) & w.isfinite()).all()):
        raise errors.bad_weights("weights", int(w.isnan().sum()), int((w < 0).sum()), int(w.isinf().sum()))
    if not float(w.sum()) > 0:
        raise errors.no_mass("weights")
    x, moves, solution = start.to(y.dtype), [], None
    converged, status = False, MOVING
    for _ in range(max_iter):
        problem = Problem(SqEuclidean(x.expand(K, m, d), y), eps, None if b is None else b.expand(K, m), wa)
        found = None if solution is None else Start(solution.f, problem.a)
        solution = find(
            problem, criterion=Marginal(inner_tol), start=found, accelerate="auto" if found is None else "mixing", max_iter=inner_iter,
            backend=backend,
        )  # fmt: skip
        rows = solution.problem.a.unsqueeze(-1).to(x)
        # Rows are exact, so a product with the plan is enough; a point without weight has an image, too.
        images = solution.plan @ y / rows if bool((rows > 0).all()) else solution.transport()
        sent = (w.view(K, 1, 1).to(x) * images).sum(0) / w.sum().to(x)
        moves.append((sent - x).double().square().sum())
        x = sent
        if not bool(moves[-1].isfinite()):
            status = DIVERGED
            break
        if float(moves[-1]) <= tol:
            converged = solution.status.name in ("converged", "stalled")
            status = SETTLED if converged else MOVING
            break
    assert solution is not None
    masses = solution.problem.a[0].to(start.dtype)
    done = torch.tensor(converged, device=start.device)
    return Barycenter(masses, x.to(start.dtype), solution.g, solution.f, status, done, len(moves), torch.stack(moves))


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
