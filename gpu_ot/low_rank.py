"""Couplings of low nonnegative rank between clouds: linear in the number of points, in time and in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import errors
from .communicator import ALONE
from .costs import Cost, Matrix
from .problem import Problem
from .solve import solve
from .solver.factors import FIRST, SLACK, Descent, Factors, project, where
from .solver.status import Status
from .vectors import in_full_precision

#: Points of each cloud that a first plan between them is found for, at least, and its eps in units of the clouds' spread.
SAMPLE, COARSE = 256, 0.05
#: Slope at which starts are compared.
ROUGH = 1e-2
#: Rounds of k-means that make clusters of the sampled pairs; the least logarithm of an entry.
ROUNDS, LEAST = 10, -690.0

SETTLED = Status("converged", "The factors have stopped moving; the marginals are those asked for.")
MOVING = Status(
    "max_iter",
    "The iterations ran out before the factors stopped moving: the last entry of `errors` is their slope. The marginals are those asked "
    "for, and the value is an upper bound. Raise max_iter, loosen tol, or raise eps.",
)
INEXACT = Status(
    "inexact",
    "The first projection ran out of iterations before the marginals were right, and no step was short enough for the next. Raise "
    "inner_iter, raise `least`, or ask for a lower rank.",
)
STALLED = Status("stalled", "No step is short enough for the floating type: this is as far as the descent goes. The marginals are right.")


class LowRankPlan:
    """P = Q diag(1/g) R^T for Q (*batch, n, r), R (*batch, m, r) and g (*batch, r). Products cost O((n + m) r) and P is not stored."""

    def __init__(self, Q: Tensor, R: Tensor, g: Tensor) -> None:
        self.Q, self.R, self.g = Q, R, g
        self.shape = torch.Size((*Q.shape[:-1], R.shape[-2]))
        self.ndim, self.dtype = len(self.shape), Q.dtype

    @property
    def T(self) -> LowRankPlan:
        return LowRankPlan(self.R, self.Q, self.g)

    @in_full_precision
    def __matmul__(self, v: Tensor) -> Tensor:
        """(m,) or (*batch, m, c) -> (*batch, n) or (*batch, n, c)."""
        columns = v.unsqueeze(-1) if v.ndim == 1 else v
        if v.ndim == 0 or columns.shape[-2] != self.shape[-1]:
            raise errors.wrong_shape("v", v.shape, f"({self.shape[-1]},) or (*batch, {self.shape[-1]}, c)")
        out = self.Q @ ((self.R.mT @ columns.to(self.dtype)) * self.inverse.unsqueeze(-1))
        return out.squeeze(-1) if v.ndim == 1 else out

    @property
    def inverse(self) -> Tensor:
        """1 / g, and 0 where g is."""
        return torch.where(self.g > 0, 1 / torch.where(self.g > 0, self.g, 1.0), 0.0)

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """P1 (*batch, n) and P^T 1 (*batch, m)."""
        return self.sum(-1), self.sum(-2)

    def sum(self, dim: int | None = None) -> Tensor:
        """P1 for the last axis, P^T 1 for the last but one; for None the sum of all entries, 0-d."""
        if dim is None:
            return self.sum(-1).sum()
        axis = dim - self.ndim if dim >= 0 else dim
        if axis not in (-1, -2):
            raise errors.unknown("dim", dim, ["None", "-1", "-2", str(self.ndim - 2), str(self.ndim - 1)])
        plan = self if axis == -1 else self.T
        return (plan.Q @ (plan.R.sum(-2) * self.inverse).unsqueeze(-1)).squeeze(-1)

    def diagonal(self) -> Tensor:
        """P_ii, (*batch, min(n, m))."""
        k = min(self.shape[-2:])
        return (self.Q[..., :k, :] * self.inverse.unsqueeze(-2) * self.R[..., :k, :]).sum(-1)

    def __getitem__(self, key: Any) -> Tensor:
        """Entries (*batch, n', m') of some rows and, if given, columns: slices, or ints, which keep their axis."""
        rows, columns = (*key, slice(None))[:2] if isinstance(key, tuple) else (key, slice(None))
        rows, columns = (slice(z, z + 1 or None) if isinstance(z, int) else z for z in (rows, columns))
        return (self.Q[..., rows, :] * self.inverse.unsqueeze(-2)) @ self.R[..., columns, :].mT

    def to_dense(self) -> Tensor:
        return self[:, :]

    def __repr__(self) -> str:
        return f"LowRankPlan{tuple(self.shape)} of rank {self.g.shape[-1]}"


@dataclass(frozen=True, eq=False)
class LowRank:
    """The result of `low_rank`.

    value       (*batch,) the objective, differentiable: see `low_rank`.
    sharp_cost  (*batch,) <C, P> alone: at least the optimal transport cost.
    plan        the coupling Q diag(1/g) R^T, detached: `plan @ v`, `plan.marginals`, `plan[rows, columns]`, `plan.Q`, `plan.R`, `plan.g`.
    status      how the descent ended, in words; for a batch, the worst. A stationary point, not always the least.
    converged   (*batch,)
    n_iter      steps of mirror descent.
    errors      (n_iter, *batch) the slope along the constraints in units of the clouds' spread, for each step.
    """

    value: Tensor
    sharp_cost: Tensor
    plan: LowRankPlan
    status: Status
    converged: Tensor
    n_iter: int
    errors: Tensor


@in_full_precision
def low_rank(
    cost: Cost | Tensor,
    rank: int,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float = 0.0,
    least: float = 1e-10,
    start: LowRank | None = None,
    starts: int = 1,
    generator: torch.Generator | None = None,
    tol: float = 1e-3,
    max_iter: int = 500,
    inner_iter: int = FIRST,
) -> LowRank:
    """A coupling of nonnegative rank at most r with small cost, P = Q diag(1/g) R^T: both clouds are cut into r soft clusters, and cluster
    k of the one is coupled with cluster k of the other. Memory is O((n + m) (r + d)), and the time of a step r times that.

    Minimises <C, P> + eps (KL(Q | a⊗1/r) + KL(R | b⊗1/r) + KL(g | 1/r)) over Q, R >= 0 with rows a and b and common columns g.

    cost       one that folds into few features: SqEuclidean(x, y), Dot, Cosine or a sum of such, for (*batch, n, d) and (*batch, m, d).
    rank       r, from 1, whose only coupling is a⊗b, to the smaller of n and m, which any coupling of least cost needs at most.
    a, b       weights (*batch, n) and (*batch, m) of one mass, uniform when left out.
    eps        >= 0, in units of the cost. With 0, where clusters become sharp, the last digits come slowly.
    least      the smallest part of the mass that a cluster may have.
    start      an earlier result to go on from, of the same sizes. Otherwise clusters are made of a plan between samples of both clouds.
    starts     so many of those are gone on from until their slopes are 0.01, and then the best of them, for each problem.
    generator  draws the samples; a fixed one when left out, so that equal calls have equal results.
    tol        the descent ends when its slope along the constraints is below `tol` in units of the clouds' spread.
    inner_iter Newton iterations of a projection on the marginals, at most; ten are usual.

    The problem is not convex: a start leads to a stationary point. The marginals are right to 1e-9 wherever it ends, or the status is
    *inexact*. Derivatives of `value` in points and weights are those of the objective at a fixed coupling (envelope), exact at convergence:
    set eps > 0 and `tol` as small as they should be exact. Everything of n or m rows is computed in float64.

    Not converging is a status. Raises ProblemError for input that has no answer.
    Scetbon, Cuturi and Peyré 2021, arXiv:2103.04737; Scetbon and Cuturi 2022, arXiv:2205.12365 (starts).
    """
    problem, eps = _posed(cost, eps, a, b), float(eps)
    n, m = problem.shape[-2:]
    if not 1 <= rank <= min(n, m) or rank != int(rank):
        raise errors.ProblemError(f"rank must be a whole number from 1 to min(n, m) = {min(n, m)}, found {rank}.")
    if not 0 < least * rank <= 1:
        raise errors.ProblemError(f"least must be > 0 and at most 1 / rank = {1 / rank:.6g}, found {least}: there are {rank} clusters.")
    for name, found in (("max_iter", max_iter), ("inner_iter", inner_iter), ("starts", starts)):
        if found < 1:
            raise errors.ProblemError(f"{name} must be at least 1, found {found}.")
    batch = problem.a.shape[:-1]
    count = batch.numel()
    with torch.no_grad():
        folded = problem.cost.fold()
        assert folded is not None
        mass = problem.a.detach().sum(-1, keepdim=True)
        w = tuple((z.detach() / mass).reshape(count, z.shape[-1]) for z in (problem.a, problem.b))
        features = (z.expand(*batch, *z.shape[-2:]).reshape(count, *z.shape[-2:]).to(w[0]) for z in folded[2:])
        (u, spread_u), (v, spread_v) = (_standard(z, weights) for z, weights in zip(features, w, strict=True))
        scale = spread_u * spread_v
        descent = Descent(u, v, w, eps / scale, math.log(least), inner_iter)  # type: ignore[arg-type]
        factors = _best(descent, rank, generator, starts, max_iter) if start is None else _again(start, descent, problem, rank)
        end = descent.run(factors, tol, max_iter)
    exact = bool((end.factors.error <= SLACK).all())
    status = INEXACT if not exact else SETTLED if bool(end.converged.all()) else STALLED if end.stalled else MOVING
    Q, R = ((z.unsqueeze(-1) * p).view(*batch, *p.shape[-2:]) * mass.unsqueeze(-1) for (_, p), z in zip(end.factors.sides, w, strict=True))
    plan = LowRankPlan(Q, R, end.factors.g.view(*batch, rank) * mass)
    # A multiplier of the marginals, by which the value grows with a weight, is -(1 + step eps) / step times what the projection took off.
    unit = -(scale * (1 + end.step * descent.eps) / end.step).unsqueeze(-1)
    multipliers = tuple((unit * z).view(*batch, z.shape[-1]) for z in end.factors.levels)
    sharp, value = _values(problem, plan, eps * end.entropy.view(batch) * mass.squeeze(-1), multipliers)
    dtype = problem.given_dtype
    plan = LowRankPlan(*(z.to(dtype) for z in (plan.Q, plan.R, plan.g)))
    slopes = torch.stack(end.slopes).view(len(end.slopes), *batch) if end.slopes else unit.new_zeros(0, *batch)
    return LowRank(value.to(dtype), sharp.to(dtype), plan, status, end.converged.view(batch), len(slopes), slopes)


def _posed(cost: Cost | Tensor, eps: float, a: Tensor | None, b: Tensor | None) -> Problem:
    if isinstance(eps, (tuple, Tensor)) or not 0 <= eps < math.inf:
        raise errors.ProblemError(f"eps must be a finite number >= 0 in units of the cost, found {eps}.")
    cost = Matrix(cost) if isinstance(cost, Tensor) else cost
    if not hasattr(cost, "folds"):
        raise errors.not_a_tensor("cost", cost)
    if not cost.folds:
        raise errors.ProblemError(
            f"cost is {cost.describe()}, which does not fold into few features, and a coupling of low rank is for those that do: pass "
            "SqEuclidean(x, y), Dot, Cosine or a sum of them, or solve(Problem(cost, eps)) for a plan of any rank."
        )
    if cost.ranks is not ALONE:
        raise errors.ProblemError("low_rank takes the points of one process, and these are shared between ranks: gather them first.")
    return Problem(cost, 1.0, a, b)


def _standard(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, n, d) about their mean and in units of their spread (B,), which is 1 where they are all one."""
    z = z - (w.unsqueeze(-2) @ z)
    spread = (w * z.square().sum(-1)).sum(-1).sqrt()
    spread = torch.where(spread > 0, spread, 1.0)
    return z / spread[..., None, None], spread


def _best(descent: Descent, rank: int, generator: torch.Generator | None, starts: int, max_iter: int) -> Factors:
    """The best of some first factors, for each problem."""
    generator = torch.Generator(descent.u.device).manual_seed(0) if generator is None else generator
    best = _first(descent, rank, generator)
    if starts == 1:
        return best
    best = descent.run(best, ROUGH, max_iter).factors
    for _ in range(starts - 1):
        other = descent.run(_first(descent, rank, generator), ROUGH, max_iter).factors
        best = where(descent.objective(other) < descent.objective(best), other, best)
    return best


def _first(descent: Descent, rank: int, generator: torch.Generator) -> Factors:
    """Clusters by k-means of pairs that an entropic plan between samples of the clouds makes: near ones in both."""
    u, v, w = descent.u, descent.v, descent.w

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, dtype=u.dtype, device=generator.device, generator=generator).to(u.device)

    chosen = []
    for z, weights in ((u, w[0]), (v, w[1])):
        # A sample without repetitions in proportion to the weights: Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003.
        keys = draw(*weights.shape).log() / weights
        found = keys.topk(min(max(SAMPLE, 2 * rank), weights.shape[-1])).indices
        some = z.gather(-2, found.unsqueeze(-1).expand(*found.shape, z.shape[-1]))
        counts = (weights.gather(-1, found) > 0).to(z)
        chosen.append((some, counts / counts.sum(-1, keepdim=True)))
    (us, ws), (vs, vw) = chosen
    C = -us @ vs.mT
    plan = solve(Problem(C, COARSE, ws, vw), tol=1e-2, max_iter=200).plan
    image = plan.to_dense() @ vs / torch.where(ws > 0, ws, 1.0).unsqueeze(-1)
    pairs, d = torch.cat((us, image), -1), u.shape[-1]
    order = (draw(*ws.shape) - 2.0 * (ws <= 0)).argsort(-1, descending=True)[..., :rank]
    centres = pairs.gather(-2, order.unsqueeze(-1).expand(*order.shape, 2 * d))
    for _ in range(ROUNDS):
        nearest = torch.nn.functional.one_hot(torch.cdist(pairs, centres).argmin(-1), rank).to(u) * ws.unsqueeze(-1)
        counts = nearest.sum(-2).unsqueeze(-1)
        centres = torch.where(counts > 0, nearest.mT @ pairs / torch.where(counts > 0, counts, 1.0), centres)
    # Two centres in one place would stay one cluster for ever.
    centres = centres + 1e-3 * (draw(*centres.shape) - 0.5)
    within = (ws * torch.cdist(pairs, centres).square().amin(-1)).sum(-1) + 1e-2
    z = tuple(-torch.cdist(x, c).square() / within[..., None, None] for x, c in ((u, centres[..., :d]), (v, centres[..., d:])))
    level = torch.full((*u.shape[:-2], rank), -math.log(rank), dtype=u.dtype, device=u.device)
    return project(z, w, level, descent.log_floor, max_iter=descent.inner_iter)  # type: ignore[arg-type]


def _again(start: LowRank, descent: Descent, problem: Problem, rank: int) -> Factors:
    """The factors of an earlier result, for the weights of this problem."""
    plan, w, batch = start.plan, descent.w, problem.a.shape[:-1]
    for name, z, size in (("start.plan.Q", plan.Q, problem.shape[-2]), ("start.plan.R", plan.R, problem.shape[-1])):
        if z.shape != (*batch, size, rank):
            raise errors.wrong_shape(name, z.shape, f"{errors.shape((*batch, size, rank))}: a result of the same sizes and rank")
    log_g = (plan.g / plan.g.sum(-1, keepdim=True)).to(w[0]).reshape(batch.numel(), rank).log()
    z = []
    for factor in (plan.Q, plan.R):
        factor = factor.to(log_g).reshape(batch.numel(), *factor.shape[-2:])
        rows = factor.sum(-1, keepdim=True)
        logs = (factor / torch.where(rows > 0, rows, 1.0)).log().clamp(min=LEAST)
        z.append(torch.where(rows > 0, logs, log_g.unsqueeze(-2)))
    return project(tuple(z), w, log_g, descent.log_floor, max_iter=descent.inner_iter)  # type: ignore[arg-type]


def _values(problem: Problem, plan: LowRankPlan, entropy: Tensor, multipliers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """<C, P> and the objective, (*batch,) each: the latter with its derivatives at the fixed coupling."""
    folded = problem.cost.fold()
    assert folded is not None
    a, b = problem.a.detach(), problem.b.detach()
    alpha, beta, u, v = (z.to(a.dtype) for z in folded)
    mass = a.sum(-1, keepdim=True)
    mean_u, mean_v = ((w.unsqueeze(-2) @ z) / mass.unsqueeze(-1) for w, z in ((a, u), (b, v)))
    # What the clusters differ from the means by has few digits to lose: a⊗b pays the first three terms, and clusters save the last.
    A, B = (factor.mT @ (z - mean.detach()) for factor, z, mean in ((plan.Q, u, mean_u), (plan.R, v, mean_v)))
    product = (a * alpha).sum(-1) + (b * beta).sum(-1) - mass.squeeze(-1) * (mean_u * mean_v).sum((-1, -2))
    sharp = product - (plan.inverse.unsqueeze(-1) * A * B).sum((-1, -2))
    value = sharp + entropy
    if torch.is_grad_enabled() and (problem.a.requires_grad or problem.b.requires_grad):
        with torch.no_grad():
            rows = alpha - (u @ mean_v.mT).squeeze(-1) + multipliers[0]
            columns = beta - (v @ mean_u.mT).squeeze(-1) + multipliers[1]
            # The objective is of degree 1 in both weights together, which settles the constant.
            rest = value.unsqueeze(-1) - (a * rows).sum(-1, keepdim=True) - (b * columns).sum(-1, keepdim=True)
            rows = rows + rest / mass
        value = value + ((problem.a - a) * rows).sum(-1) + ((problem.b - b) * columns).sum(-1)
    return sharp.detach(), value
