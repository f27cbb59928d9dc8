"""The debiased Sinkhorn divergence: a transport cost less half the costs of moving each measure onto itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import errors, gradients, transforms
from ..costs import Cost
from ..errors import NotConverged, ProblemError
from ..geometry.select import bind
from ..penalties import BALANCED, Penalty
from ..problem import Problem
from ..solution import Plan, Solution
from ..solve import find
from ..solver.criterion import Marginal
from ..solver.status import CONVERGED, Status
from ..solver.step import Start


@dataclass(frozen=True, eq=False)
class SelfTerm:
    """OT_eps(a, a): `value` (*batch,) in units of the cost, f (*batch, n) the potential of both sides, and how its loop ended.

    `value` has the type of the potentials, because it will be subtracted.
    """

    value: Tensor
    f: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_sweeps: int

    def detach(self) -> SelfTerm:
        """Without gradients: for the constant side of a loss."""
        return replace(self, value=self.value.detach(), f=self.f.detach())

    @property
    def kept(self) -> SelfTerm:
        """This, where autograd may keep its tensors."""
        return replace(self, value=transforms.kept(self.value), f=transforms.kept(self.f))


@dataclass(frozen=True, eq=False)
class Divergence:
    """The result of `divergence`.

    value    S_eps(a, b), (*batch,), in units of the cost and the type of the inputs.
    f, g     debiased potentials, those of OT(a, b) less those of OT(a, a) and OT(b, b): (*batch, n) and (*batch, m), float64.
             For hard marginals they are the derivatives in a and b, each up to a constant. Detached unless grad="implicit".
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
    def n_sweeps(self) -> int:
        """Sweeps over pairs of points in all three loops."""
        return self.between.n_sweeps + self.self_a.n_sweeps + self.self_b.n_sweeps


@transforms.eagerly
def divergence(
    problem: Problem, *, cost_aa: Cost | Tensor | None = None, cost_bb: Cost | Tensor | None = None, self_a: SelfTerm | None = None,
    self_b: SelfTerm | None = None, backend: str = "auto", grad: str = "envelope", tol: float = 1e-4, max_iter: int = 10_000,
    accelerate: str = "auto", strict: bool = False,
) -> Divergence:  # fmt: skip
    """The debiased Sinkhorn divergence of the two measures of `problem`, batched over leading axes:

        S(a, b) = OT(a, b) - 1/2 OT(a, a) - 1/2 OT(b, b) + eps/2 (|a| - |b|)^2

    It is 0 where the measures are the same. Where exp(-C / eps) is a positive definite kernel, as for Euclidean and squared Euclidean
    costs, it is positive elsewhere and convex in each measure. `value` carries envelope gradients to the points, the costs and the
    weights, exact at convergence, through both sides of each self term.

    cost_aa, cost_bb  the costs within each side, (*batch, n, n) and (*batch, m, m), symmetric: for problems whose cost is a matrix.
    self_a, self_b    terms to reuse, from `self_term` or an earlier result, for a constant side of a loss (detach them first).
    grad              "envelope", or "implicit": f and g then carry gradients as well, and `value` second derivatives.
    backend, tol, max_iter, accelerate   as in `gpu_ot.solve`, for each of the three solves.
    strict            raise NotConverged, with the explanation, unless all met the tolerance.

    Raises ProblemError for a cost that is not symmetric within a side, or a matrix without its costs within; and whatever
    `gpu_ot.solve` raises. Not converging is a status.

    Feydy et al. 2019, arXiv:1810.08278, equation (3); Séjourné et al. 2019, arXiv:1910.12958, for relaxed marginals and other masses.
    """
    if problem.mass is not None:
        raise ProblemError("there is no divergence of partial transport: a measure moves onto itself with all its mass. Leave mass out.")
    (eps, penalties), ranks = problem.as_given, problem.cost.ranks
    ranks.agree(backend=backend, grad=grad, tol=tol, max_iter=max_iter, accelerate=accelerate, self_a=self_a is None, self_b=self_b is None)

    def own(side: int, given: Cost | Tensor | None) -> SelfTerm:
        weights = (problem.a, problem.b)[side].to(problem.dtype)  # float64 weights would make the sweeps float64
        within = _within(problem.cost, side, given)
        return self_term(within, eps, weights, penalties[side], backend=backend, grad=grad, tol=tol, max_iter=max_iter)

    with ranks.report_failure(), torch.autocast(problem.a.device.type, enabled=False):  # it would turn products of float32 into halves
        self_a, self_b = (self_a or own(0, cost_aa)).kept, (self_b or own(1, cost_bb)).kept
        # At the row potentials of OT(a, a) the dual is at least 1/2 (OT(a, a) + OT(b, b)) - eps/2 (|a| - |b|)^2 for a positive definite
        # kernel (Feydy et al. 2019, Theorem 1). Plain iterations only raise it, so the divergence of a loop stopped early is not negative.
        # Accelerated ones are accepted for smaller errors, which means larger duals where the measures are close. Annealing, which forgets
        # the start, is used only where they are far from each other. Measures that are nearly equal converge within few iterations.
        start = Start(self_a.f.detach().expand_as(problem.a), problem.a)
        between = find(
            problem, backend=backend, grad=_mode(grad), criterion=Marginal(tol), start=start, max_iter=max_iter, accelerate=accelerate
        )
    masses = problem.a.sum(-1) - problem.b.sum(-1)
    value = between.wide_value - (self_a.value + self_b.value) / 2 + eps / 2 * masses.square()
    result = Divergence(value.to(problem.given_dtype), between.f - self_a.f, between.g - self_b.f, between, self_a, self_b)
    if strict and not bool(result.converged.all()):
        raise NotConverged(f"{result.status} (after {result.n_sweeps} sweeps over the pairs)")
    return result


def at_potentials(problem: Problem, f: Tensor, g: Tensor, own: tuple[Tensor, Tensor] | None, backend: str = "auto") -> Tensor:
    """The value (*batch,), float64, at known potentials: the divergence with self potentials `own`, or OT(a, b) without.

    Differentiable in the cost and the weights, without another solve.
    """
    value, (eps, penalties) = gradients.value(problem, bind(problem, backend), f, g), problem.as_given
    if own is None:
        return value
    for side, potential in enumerate(own):
        weights = (problem.a, problem.b)[side].to(problem.dtype)
        alone = Problem(_within(problem.cost, side, None), eps, weights, weights, penalties[side])
        value = value - gradients.value(alone, bind(alone, backend), potential, potential) / 2
    return value + eps / 2 * (problem.a.sum(-1) - problem.b.sum(-1)).square()


@transforms.eagerly
def self_term(
    cost: Cost | Tensor, eps: float | Tensor, a: Tensor | None = None, penalty: Penalty = BALANCED, *, backend: str = "auto",
    grad: str = "envelope", tol: float = 1e-4, max_iter: int = 10_000,
) -> SelfTerm:  # fmt: skip
    """OT_eps(a, a) for a symmetric `cost` (*batch, n, n) within one cloud, such as SqEuclidean(x, x), with `penalty` on both sides.

    About five iterations of one softmin each, see `Symmetric`. `value` carries envelope gradients through both sides. The arguments are
    those of `gpu_ot.solve`. Raises ProblemError for a cost that is not symmetric.
    """
    problem = Problem(cost, eps, a, a, penalty)
    _check_symmetric(problem.cost)
    # C_ii / 2 is the solution for eps -> 0 of costs with exp(-C / eps) positive definite.
    start = Start(_half_diagonal(problem), problem.a)
    rule = Marginal(tol)
    found = find(
        problem, order="symmetric", backend=backend, grad=_mode(grad), criterion=rule, start=start, max_iter=max_iter, check_every=1
    )
    return SelfTerm(found.wide_value, found.f, found.status, found.converged, found.n_iter, found.n_sweeps)


def _mode(grad: str) -> str:
    if grad not in ("envelope", "implicit"):
        raise errors.unknown("grad", grad, ["envelope", "implicit"])
    return grad


def _within(cost: Cost, side: int, given: Cost | Tensor | None) -> Cost | Tensor:
    """The cost from one side's points to themselves."""
    if given is not None:
        return given
    try:
        return cost.within(side)
    except ProblemError:
        name = ("cost_aa", "cost_bb")[side]
        raise ProblemError(
            f"the divergence needs the costs within each measure too, and a cost of kind {type(cost).__name__} does not know them: pass "
            f"{name}, {errors.shape((*cost.shape[:-2], *[cost.shape[side - 2]] * 2))}, or a cost between clouds such as SqEuclidean(x, y)."
        ) from None


def _half_diagonal(problem: Problem) -> Tensor:
    """(*batch, n) C_ii / 2 for costs that are stored or fold, 0 for others."""
    cost, zeros = problem.cost, torch.zeros_like(problem.a)
    with torch.no_grad():
        if cost.stored:
            diagonal = cost.dense().diagonal(dim1=-2, dim2=-1)
        elif (folded := cost.fold()) is not None:
            diagonal = folded.alpha + folded.beta - (folded.u * folded.v).sum(-1)
        else:
            return zeros
        return torch.where(diagonal.isfinite(), diagonal / 2, 0.0).to(zeros).expand_as(zeros)


def _check_symmetric(cost: Cost) -> None:
    """Raises ProblemError if some entries show that the cost is not symmetric. Costs with a known formula are not sampled."""
    n, m = cost.shape[-2:]
    if n != m:
        raise errors.wrong_shape("the cost within a measure", cost.shape, "(*batch, n, n)")
    if cost.symmetric:
        return
    with torch.no_grad():
        C = cost.sample(64, max(1, cost.shape[:-2].numel()))
        C = torch.where(C.isfinite(), C, 0.0)
        gap, size = torch.stack([(C - C.mT).abs().amax(), C.abs().amax()]).tolist()
    if gap > 1e-3 * size:
        raise ProblemError(
            f"the cost within a measure must be symmetric, C_ij = C_ji, found entries that differ by {gap:.3g} of {size:.3g}. A divergence "
            "compares measures by one cost between points of one kind; for other costs, solve without debiasing."
        )
