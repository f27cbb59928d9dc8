"""The result of a solve: potentials, the plan, and a report of how the loop ended. The other interfaces translate it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import errors, gradients, transforms
from ..communicator import COLUMNS, ROWS
from ..costs.base import Cost, Points
from ..errors import NotConverged, ProblemError
from ..geometry.protocol import Geometry, weigh
from ..problem import Problem
from ..solver.status import Status
from ..vectors import in_full_precision, log
from .measured import SAMPLES, Measured, measure
from .plan import Live, Plan

#: For more pairs than this, <P, C> of a cost that folds is one sweep of the backend rather than a sum over entries.
LARGE = 2**24


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `solve`.

    value    (*batch,) the regularised optimum, in units of the cost; differentiable as `grad` says.
    f, g     (*batch, n) and (*batch, m) potentials, float64: f / eps needs more digits than float32 has.
    status   how the loop ended, in words; for a batch, the worst of its problems.
    converged  (*batch,) which problems met the tolerance.
    n_iter   iterations run.
    n_sweeps sweeps over the n-by-m pairs: two an iteration, those before the first, and any that the backend adds.
    errors   (checks, *batch) the marginal errors at each check, in the unit of the stopping rule.
    measured  for a backend that is not exact, such as "mesh": the marginal errors by exact sums at a random sample of points, with a bound.
    """

    problem: Problem
    geometry: Geometry
    compute_value: Callable[[], Tensor]
    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_sweeps: int
    errors: Tensor
    measured: Measured | None = None

    @cached_property
    def wide_value(self) -> Tensor:
        """`value` in the type of the potentials."""
        return self.compute_value()

    @cached_property
    def value(self) -> Tensor:
        return self.wide_value.to(self.problem.given_dtype)

    @cached_property
    def plan(self) -> Plan:
        """The lazy plan. With grad="implicit" or "unroll" it carries derivatives, see Plan; otherwise it is detached."""
        return self._plan(self._live)

    def _plan(self, live: Live | None = None) -> Plan:
        return Plan(self.geometry, *self.levels, self.problem.eps, self.problem.given_dtype, self.problem.cost, live=live)

    @property
    def _live(self) -> Live | None:
        """The potentials, if they carry derivatives."""
        carried = transforms.requires_grad(self.f, self.g)
        return Live(self.problem, self.geometry, self.f, self.g) if carried else None

    @in_full_precision
    def transport(self, x_new: Points | None = None, y: Tensor | None = None) -> Tensor:
        """Where the plan sends the source points, or `x_new` (*batch, k, d), on average: sum_j P_ij y_j / sum_j P_ij, (*batch, n or k, c).

        y  the values to average, (m, c) or (*batch, m, c): the target points when left out, or colours, or one-hot labels.

        For new points this is the entropic map, Pooladian and Niles-Weed 2021, arXiv:2109.12004, equation (6). Gradients flow to `x_new`,
        which keeps the k-by-m costs in memory, and not to the problem. For the source points and grad="implicit" or "unroll", derivatives
        reach the problem and y. A point that may go nowhere gives NaN. The result has the problem's type.
        Raises ProblemError for new points where the cost is a matrix, which has none.
        """
        if y is None:
            found = self.problem.cost.points[1]
            if isinstance(found, tuple):
                raise ProblemError(f"this cost is a sum over {len(found)} clouds: say which target points to carry over, y=...")
            y = found
        ranks, (_, h), eps = self.problem.cost.ranks, self.levels, self.problem.eps
        targets = ranks.shard(h, COLUMNS).shape[-1]
        if y.ndim < 2 or y.shape[-2] != targets:
            raise errors.wrong_shape("y", y.shape, f"(*batch, {targets}, c), a row for each target point")
        if x_new is None and self._live:
            sent = gradients.barycentric(self.problem, self.geometry, self.g, ranks.gather(y.to(self.g), COLUMNS, -2))
            return ranks.shard(sent, ROWS, -2).to(self.problem.given_dtype)
        y = y.detach().to(h)
        if x_new is not None:
            cost, y = self._detached_cost.at(x=x_new), ranks.gather(y, COLUMNS, -2)
            parts = [((h.unsqueeze(-2) - part.dense().to(h.dtype)) / eps).softmax(-1) @ y for _, part in cost.strips()]
            return torch.cat(parts, -2).to(self.problem.given_dtype)
        with torch.no_grad():
            s = self.geometry.softmin(h, eps)  # each row's own total: rows without weight have an image, too
            sent = self.geometry.product(torch.where(s.isfinite(), s, 0.0), h, eps, y)
            return torch.where(ranks.shard(s, ROWS).isfinite().unsqueeze(-1), sent, math.nan).to(self.problem.given_dtype)

    def potential_a(self, x_new: Points | Cost) -> Tensor:
        """f at points x_new (*batch, k, d): the update damp(softmin over y of C(x_new, y) with g), (*batch, k), in the type of f.

        At the source points it is f, as exact as the last iteration. For a Cost it is f at the row points of that cost: a warm start. A
        cost without points, such as a matrix, has the same rows and gets f. A point that may go nowhere gets +inf. Detached from the
        problem; gradients flow to `x_new`. Raises ProblemError for a cost whose points are of another kind.
        """
        return self._extended(0, x_new)

    def potential_b(self, y_new: Points | Cost) -> Tensor:
        """g at points y_new (*batch, k, d), as `potential_a`. At the target points it is the next update of g: g within the tolerance."""
        return self._extended(1, y_new)

    @cached_property
    def transport_mass(self) -> Tensor:
        """(*batch,) sum_ij P_ij, |a| for balanced problems. Carries derivatives as the plan does."""
        return self.plan.wide_marginals[0].sum(-1).to(self.problem.given_dtype)

    @cached_property
    @in_full_precision
    def sharp_cost(self) -> Tensor:
        """(*batch,) <P, C>, without the entropy and penalties of `value`; in units of the cost. Carries derivatives as the plan does.

        A sum over entries, in blocks, for up to 2^24 pairs a problem and for costs that do not fold. Beyond, one sweep with the folded
        form of C, alpha P1 + P beta - <u, P v>, whose rounding error is that of the largest of these terms. On a `Grid` products along its
        axes, whatever the size.
        """
        ranks, live = self.problem.cost.ranks, self._live
        return (self._sharp_cost if live is None else ranks.sum(gradients.plan_cost(*live.local()))).to(self.problem.given_dtype)

    @property
    def held_cost(self) -> Tensor:
        """(*batch,) <P, C> with P constant: its derivative in C is P, whatever `grad` was."""
        return gradients.held_cost(self.geometry, self.problem.eps, self.sharp_cost.detach(), *self.levels)

    @cached_property
    @in_full_precision
    def normalized_entropy(self) -> Tensor:
        """(*batch,) how blurred the plan is: 0 for a one-to-one matching of equal weights, 1 for a⊗b. Detached.

        1 - I(P) / min(H(P1), H(P^T 1)) for P of mass 1, with the mutual information I = H(P1) + H(P^T 1) - H(P) and H(p) = -sum p log p.
        For n = m uniform weights this is H(P) / log n - 1. 1 where one side is a single point.
        """
        marginals = self._plan().wide_marginals
        mass = marginals[0].sum(-1)
        # log P_ij = (k_i + h_j - C_ij) / eps, so sum P log P needs the marginals and <P, C> alone.
        inner = [torch.where(p > 0, p * z, 0.0).sum(-1) for p, z in zip(marginals, self.levels, strict=True)]
        H = (self._sharp_cost - inner[0] - inner[1]) / (self.problem.eps * mass) + log(mass)
        H_a, H_b = (_entropy(p / mass.unsqueeze(-1)) for p in marginals)
        least = torch.minimum(H_a, H_b)
        blur = 1 - (H_a + H_b - H) / torch.where(least > 0, least, 1.0)
        return torch.where(least > 0, blur, 1.0).to(self.problem.given_dtype)

    @in_full_precision
    def measure(self, samples: int = SAMPLES, seed: int = 0) -> Measured:
        """The marginal errors by exact sums at a random sample of points, O(samples (n + m)), whatever the backend.

        Points are drawn by their weight; the same seed draws the same. Of a batch the largest errors of all its problems. Raises
        ProblemError for a batch of matrices, which are there to be summed.
        """
        if self.problem.cost.shape[:-2] and self.problem.cost.sides is None:
            raise ProblemError(
                f"marginals are measured at points, and {self.problem.cost.describe()} has none: sum `plan` over its rows and its columns."
            )
        return measure(self.problem, self.f, self.g, samples, seed)

    @property
    def shape(self) -> torch.Size:
        """(*batch, n, m)."""
        return self.problem.shape

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        """k = f + eps log a and h = g + eps log b, detached: P_ij = exp((k_i + h_j - C_ij) / eps)."""
        p = self.problem
        return weigh(self.f.detach(), p.a.detach(), p.eps), weigh(self.g.detach(), p.b.detach(), p.eps)

    @property
    def _detached_cost(self) -> Cost:
        return self.problem.cost.of(z.detach() for z in self.problem.cost.inputs.values())

    @cached_property
    def _sharp_cost(self) -> Tensor:
        plan = self._plan()
        with torch.no_grad():
            if (found := self.geometry.plan_cost(*self.levels, self.problem.eps)) is not None:
                return found
            folded = self.problem.cost.to(self.f.dtype).fold() if self.shape[-2:].numel() > LARGE else None
        if folded is None:
            parts = [P.mul_(C).nan_to_num_(0.0).sum((-1, -2)) for C, P in plan.strips()]  # 0 of a forbidden pair's cost is 0
            return self.problem.cost.ranks.sum(torch.stack([self.f.new_zeros(self.shape[:-2]), *parts]).sum(0))
        alpha, beta, u, v = folded
        sent = plan._apply(torch.cat((torch.ones_like(beta).unsqueeze(-1), beta.unsqueeze(-1), v), -1))
        return (alpha * sent[..., 0] + sent[..., 1] - (u * sent[..., 2:]).sum(-1)).sum(-1)

    @in_full_precision
    def _extended(self, side: int, new: Points | Cost) -> Tensor:
        """The potential of a side, 0 for rows and 1 for columns, at other points of that side."""
        own, other = (self.f, self.g)[side].detach(), self.levels[1 - side]
        if isinstance(new, Cost):
            try:
                points, old = new.points[side], self.problem.cost.points[side]
            except ProblemError:
                if (size := new.shape[side - 2]) != own.shape[-1]:
                    line = "column" if side else "row"
                    raise errors.wrong_shape("the new cost", new.shape, f"{own.shape[-1]} {line}s like the old, found {size}") from None
                return own
            if points is old:
                return own
            return new.ranks.gather(self._extended(side, points), side)
        dim = side - 2
        cost = self._detached_cost.at(x=new) if side == 0 else self._detached_cost.at(y=new)
        h, eps = other.unsqueeze(dim), self.problem.eps
        logs = [((h - part.dense().to(h.dtype)) / eps).logsumexp(-3 - dim) for _, part in cost.strips(dim)]
        return self.problem.penalties[side].damp(-eps * torch.cat(logs, -1), eps)

    def raise_unless_converged(self) -> Solution:
        """This solution, or NotConverged with the status's explanation."""
        if not bool(self.converged.all()):
            last = float(self.errors[-1].max()) if len(self.errors) else float("nan")
            raise NotConverged(f"{self.status} (after {self.n_iter} iterations, marginal error {last:.3g})")
        return self


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over the last axis."""
    return -torch.where(p > 0, p * log(p), 0.0).sum(-1)
