"""The debiased Sinkhorn divergence: what is left of a transport cost when the cost of moving each measure onto itself is taken out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import errors, transforms
from ..costs.base import Cosine, Cost, Dot, Euclidean, Matrix, SqEuclidean, Sum
from ..errors import NotConverged, ProblemError
from ..geometry.protocol import Geometry, weigh
from ..geometry.select import bind
from ..gradients import implicit
from ..gradients import operators as gradients
from ..penalties import BALANCED, Penalty
from ..problem import Problem
from ..solution.solution import Plan, Solution
from ..solver.acceleration import Mixing
from ..solver.annealing import Constant
from ..solver.loop import Outcome, Progress, Stop, iterate
from ..solver.status import CONVERGED, MAX_ITER, STALLED, Status


@dataclass(frozen=True, eq=False)
class SelfTerm:
    """OT_eps(a, a): `value` (*batch,) in units of the cost, f (*batch, n) the potential of both sides, and how its loop ended.

    Wide, in the type of the potentials: it is there to be subtracted.
    """

    value: Tensor
    f: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_passes: int

    def detach(self) -> SelfTerm:
        """Without the graph: for the side of a loss that stays as it is."""
        return replace(self, value=self.value.detach(), f=self.f.detach())


@dataclass(frozen=True, eq=False)
class Divergence:
    """The result of `divergence`.

    value    S_eps(a, b), (*batch,), in units of the cost and the type of the inputs.
    f, g     debiased potentials, those of OT(a, b) less those of OT(a, a) and OT(b, b): (*batch, n) and (*batch, m), wide; detached but
             for grad="implicit". For hard marginals they are the derivatives in a and b, each up to a constant.
    between  the Solution of OT(a, b), with its plan.
    self_a, self_b  the self terms.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    between: Solution
    self_a: SelfTerm
    self_b: SelfTerm

    @property
    def plan(self) -> Plan:
        """The lazy plan between a and b, detached."""
        return self.between.plan

    @property
    def converged(self) -> Tensor:
        """(*batch,): whether all three solves met the tolerance."""
        return self.between.converged & self.self_a.converged & self.self_b.converged

    @property
    def status(self) -> Status:
        """How the first of the three solves that did not converge ended; "converged" if all did."""
        ends = (self.between.status, self.self_a.status, self.self_b.status)
        return next((status for status in ends if status is not CONVERGED), CONVERGED)

    @property
    def n_passes(self) -> int:
        """Sweeps over pairs of points made by the three loops together."""
        return self.between.n_passes + self.self_a.n_passes + self.self_b.n_passes


def divergence(
    problem: Problem,
    *,
    cost_aa: Cost | Tensor | None = None,
    cost_bb: Cost | Tensor | None = None,
    self_a: SelfTerm | None = None,
    self_b: SelfTerm | None = None,
    backend: str = "auto",
    grad: str = "envelope",
    tol: float = 1e-4,
    max_iter: int = 10_000,
    accelerate: str = "auto",
    strict: bool = False,
) -> Divergence:
    """The debiased Sinkhorn divergence of the two measures of `problem`, batched over leading axes:

        S(a, b) = OT(a, b) - 1/2 OT(a, a) - 1/2 OT(b, b) + eps/2 (|a| - |b|)^2

    It is 0 where the measures are the same and, for costs whose exp(-C / eps) is a positive definite kernel, such as Euclidean and
    squared Euclidean ones, positive elsewhere and convex in each measure. `value` carries envelope gradients to the points, the costs
    and the weights, exact at convergence, through both sides of each self term.

    cost_aa, cost_bb  the costs within each side, (*batch, n, n) and (*batch, m, m), symmetric: for problems whose cost is a matrix.
    self_a, self_b    terms to reuse, from `self_term` or an earlier result: the side of a loss that stays as it is (detach it first).
    grad              "envelope", or "implicit": f and g then carry gradients as well, and `value` second derivatives.
    backend, tol, max_iter, accelerate   as in `gpu_ot.solve`, for each of the three solves.
    strict            raise NotConverged, with the explanation, unless all met the tolerance.

    Raises ProblemError for a cost that is not symmetric within a side, or a matrix without its costs within; and whatever
    `gpu_ot.solve` raises. Not converging is a status.

    Feydy et al. 2019, arXiv:1810.08278, equation (3); Séjourné et al. 2019, arXiv:1910.12958, for relaxed marginals and other masses.
    """
    (eps, penalties), ranks = problem.asked, problem.cost.ranks
    ranks.agree(backend=backend, grad=grad, tol=tol, max_iter=max_iter, accelerate=accelerate, self_a=self_a is None, self_b=self_b is None)

    def own(side: int, given: Cost | Tensor | None) -> SelfTerm:
        weights = (problem.a, problem.b)[side].to(problem.dtype)  # wide ones would make the sweeps wide
        within = _within(problem.cost, side, given)
        return self_term(within, eps, weights, penalties[side], backend=backend, grad=grad, tol=tol, max_iter=max_iter)

    with ranks.report_failure(), torch.autocast(problem.a.device.type, enabled=False):  # it would turn products of float32 into halves
        if self_a is None:
            self_a = own(0, cost_aa)
        if self_b is None:
            self_b = own(1, cost_bb)
        between, value = _between(problem, self_a.f.detach(), backend, grad, Stop(tol), max_iter, accelerate)
    masses = problem.a.sum(-1) - problem.b.sum(-1)
    value = value - (self_a.value + self_b.value) / 2 + eps / 2 * masses.square()
    result = Divergence(value.to(problem.given_dtype), between.f - self_a.f, between.g - self_b.f, between, self_a, self_b)
    if strict and not bool(result.converged.all()):
        raise NotConverged(f"{result.status} (after {result.n_passes} passes over the pairs)")
    return result


def at_potentials(problem: Problem, f: Tensor, g: Tensor, own: tuple[Tensor, Tensor] | None, backend: str = "auto") -> Tensor:
    """The value (*batch,), wide, at potentials that are known: the divergence given its self potentials `own`, else OT(a, b).

    For derivatives without the solve that they belong to. Differentiable in the cost and the weights.
    """
    value, (eps, penalties) = gradients.value(problem, bind(problem, backend), f, g), problem.asked
    if own is None:
        return value
    for side, potential in enumerate(own):
        weights = (problem.a, problem.b)[side].to(problem.dtype)
        alone = Problem(_within(problem.cost, side, None), eps, weights, weights, penalties[side])
        value = value - gradients.value(alone, bind(alone, backend), potential, potential) / 2
    return value + eps / 2 * (problem.a.sum(-1) - problem.b.sum(-1)).square()


def self_term(
    cost: Cost | Tensor,
    eps: float | Tensor,
    a: Tensor | None = None,
    penalty: Penalty = BALANCED,
    *,
    backend: str = "auto",
    grad: str = "envelope",
    tol: float = 1e-4,
    max_iter: int = 10_000,
) -> SelfTerm:
    """OT_eps(a, a) for a symmetric `cost` (*batch, n, n) within one cloud, SqEuclidean(x, x) say, held by `penalty` on both sides.

    One softmin an iteration and about five of them, see `symmetric`; `value` carries envelope gradients through both sides. The
    arguments are those of `gpu_ot.solve`. Raises ProblemError for a cost that is not symmetric.
    """
    problem = Problem(cost, eps, a, a, penalty)
    _check_symmetric(problem)
    with torch.autocast(problem.a.device.type, enabled=False):

        def search(problem: Problem) -> tuple[Geometry, Outcome]:
            geometry = bind(problem, backend)
            with torch.no_grad():
                return geometry, symmetric(geometry, problem, Stop(tol), max_iter)

        geometry, end = gradients.apart(problem, search)
        value, f, _ = _differentiable(problem, geometry, end, grad)
    return SelfTerm(value, f, end.status, end.converged, end.n_iter, end.n_passes)


def symmetric(geometry: Geometry, problem: Problem, stop: Stop, max_iter: int) -> Outcome:
    """The f with f = T(f), T(f) = damp(softmin(f + eps log a)): the potential of both sides of a measure moved onto itself.

    Not `solver.loop.iterate`: there a column potential is carried across and back, two softmins an iteration, and the pair (f, g) comes
    near f = g as slowly as two different clouds come near each other. Here both sides move at once, halfway:

        f <- (f + T(f)) / 2,  Feydy et al. 2019, arXiv:1810.08278, section 3.1

    whose derivative, 1/2 (1 - diag(1/a) P) for hard marginals, lies in [0, 1/2] wherever exp(-C / eps) is positive definite: 1/2 a pass
    at worst, whatever eps. `Mixing` of these updates, which are self-adjoint like the loop's, halves the passes again (measured: 3 to 10
    to an error of 1e-6, where halving alone takes up to 20). It starts from C_ii / 2, the solution for eps -> 0 of such costs.
    """
    a, eps, penalty = problem.a.detach(), problem.eps, problem.penalties[0]
    mixing = Mixing(problem, eps)
    mixing.gauge = False  # (f + c, f + c) is another plan, unlike (f + c, g - c)
    progress, status, errors_seen = Progress(), None, []
    f = penalty.damp(_half_diagonal(problem), eps)
    kept, error, done = f, f.new_full(a.shape[:-1], torch.inf), torch.zeros(a.shape[:-1], dtype=torch.bool, device=a.device)
    sweep = geometry.first  # the transpose's softmin, the same for a symmetric cost, with which a machine may prepare itself
    for _ in range(max_iter):
        fresh = penalty.damp(sweep(weigh(f, a, eps), eps), eps)
        sweep = geometry.softmin
        found = stop.error(a, (f - fresh) / eps)  # for a hard constraint the L1 error of both marginals
        worse = done | ~(found < error)
        kept, error = torch.where(worse.unsqueeze(-1), kept, f), torch.where(worse, error, found)
        errors_seen.append(error)
        done = error <= stop.tol
        floor = stop.floor(a, kept, eps, geometry.dtype)
        status = progress.judge(progress.signs(error, done, floor, torch.zeros_like(done)).tolist())
        if status is not None:
            break
        f = torch.where(done.unsqueeze(-1), f, mixing.next(f, (f + fresh) / 2))
    n_iter = len(errors_seen)
    return Outcome(kept, kept, status or MAX_ITER, done, n_iter, n_iter + geometry.extra, errors_seen)


def _between(
    problem: Problem, start: Tensor, backend: str, grad: str, stop: Stop, max_iter: int, accelerate: str
) -> tuple[Solution, Tensor]:
    """The solve of OT(a, b) from the row potentials of OT(a, a), and its value, wide: what is left of it has fewer digits.

    At that start the dual is at least 1/2 (OT(a, a) + OT(b, b)) - eps/2 (|a| - |b|)^2 for a positive definite kernel (Feydy et al. 2019,
    Theorem 1), and plain iterations only raise it: stopped early, the divergence is not negative. (Accelerated ones are kept for smaller
    errors, which where measures are that close are larger duals; annealing forgets the start, and pays only where they are far
    apart.) For measures that are nearly the same, as at the end of a training, it is also most of the work.
    """
    start = start.expand_as(problem.a)

    def search(problem: Problem) -> tuple[Geometry, Outcome]:
        geometry = bind(problem, backend)
        how = "none" if accelerate == "auto" and not geometry.accelerates else accelerate
        check_every = 1 if how != "none" and problem.a.device.type == "cpu" else 10
        with torch.no_grad():
            rows = weigh(transforms.numbers(start), problem.a.detach(), problem.eps)
            return geometry, iterate(geometry, problem, Constant(problem.eps), rows, stop, max_iter, check_every, None, how)

    geometry, end = gradients.apart(problem, search)
    value, f, g = _differentiable(problem, geometry, end, grad)
    history = torch.stack(end.errors)
    narrow = value.to(problem.given_dtype)
    return Solution(problem, geometry, narrow, f, g, end.status, end.converged, end.n_iter, end.n_passes, history), value


def _differentiable(problem: Problem, geometry: Geometry, end: Outcome, grad: str) -> tuple[Tensor, Tensor, Tensor]:
    """(value, f, g), wide, with the derivatives that `grad` says."""
    if grad == "envelope":
        return gradients.value(problem, geometry, end.f, end.g), end.f, end.g
    if grad != "implicit":
        raise errors.unknown("grad", grad, ["envelope", "implicit"])
    settled = end.status in (CONVERGED, STALLED)
    f, g = implicit.potentials(problem, geometry, end.f, end.g, caution="" if settled else str(end.status))
    return implicit.value(problem, geometry, f, g), f, g


def _within(cost: Cost, side: int, given: Cost | Tensor | None) -> Cost | Tensor:
    """The cost from one side's points to themselves."""
    if given is not None:
        return given
    if isinstance(cost, Sum):  # term by term, so that each term's points get their own gradient
        return Sum(tuple((weight, _own(term, side)) for weight, term in cost.terms))
    return _own(cost, side)


def _own(cost: Cost, side: int) -> Cost:
    try:
        points = cost.points[side]
    except ProblemError:
        name = ("cost_aa", "cost_bb")[side]
        raise ProblemError(
            f"the divergence needs the costs within each measure too, and a cost of kind {type(cost).__name__} does not know them: pass "
            f"{name}, {errors.shape((*cost.shape[:-2], *[cost.shape[side - 2]] * 2))}, or a cost between clouds such as SqEuclidean(x, y)."
        ) from None
    return cost.at(x=points, y=points)


def _half_diagonal(problem: Problem) -> Tensor:
    """(*batch, n) C_ii / 2 where it is at hand, else 0."""
    cost, zeros = problem.cost, torch.zeros_like(problem.a)
    with torch.no_grad():
        if isinstance(cost, Matrix):
            diagonal = cost.M.diagonal(dim1=-2, dim2=-1)
        elif (folded := cost.fold()) is not None:
            diagonal = folded.alpha + folded.beta - (folded.u * folded.v).sum(-1)
        else:
            return zeros
        return torch.where(diagonal.isfinite(), diagonal / 2, 0.0).to(zeros).expand_as(zeros)


def _check_symmetric(problem: Problem) -> None:
    """Refuses a cost that is plainly not symmetric, by a look at its first entries; known formulas need none."""
    cost, piece = problem.cost, problem.cost.ranks.largest(problem).cost
    n, m = cost.shape[-2:]
    if n != m:
        raise errors.wrong_shape("the cost within a measure", cost.shape, "(*batch, n, n)")
    kinds = [term for _, term in piece.terms] if isinstance(piece, Sum) else [piece]
    if all(type(kind) in (SqEuclidean, Euclidean, Dot, Cosine) for kind in kinds):
        return
    few = slice(0, 64)
    with torch.no_grad():
        C = cost.part(few, few).dense() if piece is cost else cost.sample(64)
        C = torch.where(C.isfinite(), C, 0.0)
        gap, size = torch.stack([(C - C.mT).abs().amax(), C.abs().amax()]).tolist()
    if gap > 1e-3 * size:
        raise ProblemError(
            f"the cost within a measure must be symmetric, C_ij = C_ji, found entries that differ by {gap:.3g} of {size:.3g}. A divergence "
            "compares measures by one cost between points of one kind; for other costs, solve without debiasing."
        )
