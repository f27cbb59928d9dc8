"""What came out: potentials, a lazy plan, and an account of how the loop ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import errors, transforms
from ..communicator import ALONE, COLUMNS, ROWS, Alone
from ..costs.base import BLOCK, Cost, Points
from ..errors import NotConverged, ProblemError
from ..geometry.protocol import Geometry, weigh
from ..gradients import operators as gradients
from ..problem import Problem
from ..solver.status import Status
from ..vectors import log

#: Pairs of a problem beyond which <P, C> of a cost that folds is taken in one sweep of the machine rather than entry by entry.
LARGE = 2**24
#: Columns of a block that partners are drawn from: many draws are made at once, and long rows of costs in pieces.
WIDTH = 2**10


class Plan:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), computed where it is needed and never stored.

    `P @ v`, `P.T @ v`, `marginals` and `sum` are sweeps over the cost; `sample` draws matched pairs, `diagonal` forms P_ii; `to_dense()`
    is the (*batch, n, m) array. Internally P_ij = exp((k_i + h_j - C_ij) / eps). Detached; of a solution by grad="implicit" or "unroll",
    products, sums and the array carry its derivatives.
    """

    def __init__(
        self,
        geometry: Geometry,
        k: Tensor,
        h: Tensor,
        eps: float,
        dtype: torch.dtype,
        cost: Cost | None = None,
        flipped: bool = False,
        live: Solution | None = None,
    ) -> None:
        self._geometry, self._k, self._h, self._eps, self.dtype = geometry, k, h, eps, dtype
        self._own_cost, self._flipped = cost, flipped  # flipped: rows of the plan are columns of the cost
        self._live = live  # whose potentials carry derivatives

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._k.shape, self._h.shape[-1]))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Plan:
        return Plan(self._geometry.T, self._h, self._k, self._eps, self.dtype, self._own_cost, not self._flipped, self._live)

    def to_dense(self) -> Tensor:
        if (s := self._live) is not None:
            if self._flipped and s.problem.cost.ranks is not ALONE:
                raise ProblemError("with derivatives, ranks that share the points hold rows of the plan: transpose them, P.to_dense().mT.")
            problem, f, g = s._held()
            P = gradients.plan(problem, s.geometry, f, g)
            return (P.mT if self._flipped else P).to(self.dtype)
        return self._geometry.plan(self._k, self._h, self._eps).to(self.dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        """(m,) or (*batch, m, c) -> (n,) or (*batch, n, c). Where ranks share the points, each has the rows of its own on either side."""
        columns = v.unsqueeze(-1) if v.ndim == 1 else v
        if self._live is not None:
            out = self._ranks.shard(self._apply(self._ranks.gather(columns, 1 - self._flipped, -2)), int(self._flipped), -2)
        else:
            with torch.no_grad():
                out = self._geometry.product(self._k, self._h, self._eps, columns)
        return (out.squeeze(-1) if v.ndim == 1 else out).to(self.dtype)

    def _apply(self, v: Tensor) -> Tensor:
        """P @ v for all of v, in the type of the potentials."""
        columns = v.unsqueeze(-1) if v.ndim == 1 else v
        if (s := self._live) is not None:
            out = gradients.transport(s.problem, s.geometry, s.f, s.g, columns.to(s.f), self._flipped)
        else:
            with torch.no_grad():
                out = self._geometry.apply(self._k, self._h, self._eps, columns)
        return out.squeeze(-1) if v.ndim == 1 else out

    @cached_property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """P1 (*batch, n) and P^T 1 (*batch, m)."""
        rows, columns = self._marginals
        return rows.to(self.dtype), columns.to(self.dtype)

    @cached_property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        """The marginals in the type of the potentials."""
        ones_m, ones_n = torch.ones_like(self._h).unsqueeze(-1), torch.ones_like(self._k).unsqueeze(-1)
        return self._apply(ones_m).squeeze(-1), self.T._apply(ones_n).squeeze(-1)

    def sum(self, dim: int | None = None) -> Tensor:
        """P1 (*batch, n) for the last axis, P^T 1 (*batch, m) for the last but one, the sum of everything, 0-d, for None."""
        if dim is None:
            return self._marginals[0].sum().to(self.dtype)
        axis = dim - self.ndim if dim >= 0 else dim
        if axis not in (-1, -2):
            raise errors.unknown("dim", dim, ["None", "-1", "-2", str(self.ndim - 2), str(self.ndim - 1)])
        return self.marginals[0 if axis == -1 else 1]

    def diagonal(self) -> Tensor:
        """P_ii, (*batch, min(n, m))."""
        size, step = min(self.shape[-2:]), 64
        parts = []
        for i in range(0, size, step):
            block = slice(i, min(i + step, size))
            parts.append(self._exponents(block, block).diagonal(dim1=-2, dim2=-1))
        return torch.cat(parts, -1).add_(self._k[..., :size]).div_(self._eps).exp_().to(self.dtype)

    def sample(self, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """k matched pairs (i, j) of each problem, drawn independently and in proportion to P_ij: two int64 arrays (*batch, k).

        Costs one sweep (the marginal, of which the rows are drawn) and the costs of k rows; see `sample_columns`. Where ranks share the
        points, each gets those of the k pairs whose rows are its own, both counted among all points.
        """
        total = self._marginals[0].clamp(min=0).cumsum(-1)
        # The first row whose running total exceeds the draw: one without mass never does. A draw that rounds up to the total would
        # find none.
        top = torch.nextafter(total[..., -1:], torch.zeros_like(total[..., -1:]))
        u = self._ranks.broadcast(torch.rand(*total.shape[:-1], k, dtype=total.dtype, device=total.device, generator=generator))
        rows = self._ranks.local_indices(torch.searchsorted(total, torch.minimum(u * total[..., -1:], top), right=True), int(self._flipped))
        return rows, self.sample_columns(rows, generator)

    def sample_columns(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """For each of `rows`, int64 (k,) or (*batch, k), a column drawn in proportion to P_ij: int64 (*batch, k). -1 where a row has none.

        Gumbel-max over blocks of columns: the largest of (h_j - C_ij) / eps plus Gumbel noise falls on j with the odds of P_ij, and a
        largest of largests is a largest. O(m) costs a row. Maddison, Tarlow and Minka 2014, arXiv:1411.0030, section 2.
        """
        batch, m = self.shape[:-2], self.shape[-1]
        rows = rows.expand(*batch, rows.shape[-1])
        copies = max(1, batch.numel()) * self._cost.depth
        drawn = []
        for part in rows.split(max(1, BLOCK // (copies * min(m, WIDTH))), -1):
            best = torch.full_like(part, -math.inf, dtype=self._h.dtype)
            chosen = torch.full_like(part, -1)
            width = max(1, BLOCK // (copies * max(1, part.shape[-1])))  # no rows: another rank's, who gathers the columns with this one
            for j in range(0, m, width):
                scores = self._exponents(part, slice(j, min(j + width, m))).div_(self._eps)
                noise = torch.empty_like(scores).exponential_(generator=generator)
                score, at = scores.sub_(noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()).max(-1)
                chosen = torch.where(score > best, at + j, chosen)
                best = torch.maximum(best, score)
            drawn.append(chosen)
        return torch.cat(drawn, -1)

    def _strips(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, C, P) of some rows of the cost's and all columns at a time, in the type of the potentials."""
        k, h = (self._h, self._k) if self._flipped else (self._k, self._h)
        for rows, part in self._cost.strips():
            with torch.no_grad():
                C = part.dense().to(h.dtype)
                yield rows, C, (h.unsqueeze(-2) - C).add_(k[..., rows].unsqueeze(-1)).div_(self._eps).exp_()

    def _exponents(self, rows: slice | Tensor, cols: slice) -> Tensor:
        """h_j - C_ij, a new array in the type of the potentials."""
        with torch.no_grad():
            C = self._cost.part(cols, rows).dense().mT if self._flipped else self._cost.part(rows, cols).dense()
            return self._h[..., cols].unsqueeze(-2) - C.to(self._h.dtype)

    @property
    def _ranks(self) -> Alone:
        """Who holds the points."""
        return ALONE if self._own_cost is None else self._own_cost.ranks

    @property
    def _cost(self) -> Cost:
        if self._own_cost is None:
            raise ProblemError("this plan was made without its cost: Plan(..., cost=problem.cost) has entries to look at and draw from.")
        return self._own_cost

    def __repr__(self) -> str:
        return f"Plan{tuple(self.shape)}"


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `solve`.

    value    (*batch,) the regularised optimum, in units of the cost; differentiable as `grad` says.
    f, g     (*batch, n) and (*batch, m) potentials, float64: f / eps needs more digits than float32 has.
    status   how the loop ended, in words; for a batch, the least happy of its problems.
    converged  (*batch,) which problems met the tolerance.
    n_iter   iterations run.
    n_passes sweeps over the n-by-m pairs made on the way, wherever they happened: two an iteration, and those that start it.
    errors   (checks, *batch) the marginal errors at each look, in the unit of the stopping rule.
    """

    problem: Problem
    geometry: Geometry
    value: Tensor
    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_passes: int
    errors: Tensor

    @cached_property
    def plan(self) -> Plan:
        """The lazy plan. By grad="implicit" or "unroll" it carries derivatives, see Plan; otherwise it is detached."""
        return self._plan(self if self._live else None)

    def _plan(self, live: Solution | None) -> Plan:
        problem = self.problem
        return Plan(self.geometry, self._k, self._h, problem.eps, problem.given_dtype, problem.cost, live=live)

    @property
    def _live(self) -> bool:
        """Whether the potentials carry derivatives."""
        return transforms.asks(self.f) or transforms.asks(self.g)

    def transport(self, x_new: Points | None = None, y: Tensor | None = None) -> Tensor:
        """Where the plan sends the source points, or `x_new` (*batch, k, d), on average: sum_j P_ij y_j / sum_j P_ij, (*batch, n or k, c).

        y  what is carried over, (m, c) or (*batch, m, c); the target points when left out. Colours or labels (one-hot) work as well.

        New points are sent by the same potentials: the entropic map, Pooladian and Niles-Weed 2021, arXiv:2109.12004, equation (6). A
        point that may go nowhere gives NaN. New points see the problem detached; gradients flow to `x_new`, at the price of keeping the
        k-by-m costs. For the source points and grad="implicit" or "unroll", derivatives reach the problem and y. In the problem's type.
        Raises ProblemError for new points where the cost is a matrix, which knows none.
        """
        if y is None:
            found = self.problem.cost.points[1]
            if isinstance(found, tuple):
                raise ProblemError(f"this cost is a sum over {len(found)} clouds: say which target points to carry over, y=...")
            y = found
        ranks, h, eps = self.problem.cost.ranks, self._h, self.problem.eps
        targets = ranks.shard(h, COLUMNS).shape[-1]
        if y.ndim < 2 or y.shape[-2] != targets:
            raise errors.wrong_shape("y", y.shape, f"(*batch, {targets}, c), a row for each target point")
        if x_new is None and self._live:
            sent = gradients.average(self.problem, self.geometry, self.g, ranks.gather(y.to(self.g), COLUMNS, -2))
            return ranks.shard(sent, ROWS, -2).to(self.problem.given_dtype)
        y = y.detach().to(h)
        if x_new is not None:
            cost, y = self._detached_cost.at(x=x_new), ranks.gather(y, COLUMNS, -2)
            parts = [((h.unsqueeze(-2) - part.dense().to(h.dtype)) / eps).softmax(-1) @ y for _, part in cost.strips()]
            return torch.cat(parts, -2).to(self.problem.given_dtype)
        with torch.no_grad():
            s = self.geometry.softmin(h, eps)  # each row's own total, so that rows without weight have an image too
            sent = self.geometry.product(torch.where(s.isfinite(), s, 0.0), h, eps, y)
            return torch.where(ranks.shard(s, ROWS).isfinite().unsqueeze(-1), sent, math.nan).to(self.problem.given_dtype)

    def potential_a(self, x_new: Points | Cost) -> Tensor:
        """f as a function, at points x_new (*batch, k, d): the update damp(softmin over y of C(x_new, y) with g), (*batch, k), wide.

        At the source points it is f itself, as exact as the last iteration. Given a Cost, at its row points, which is a warm start for
        it; a matrix, or another cost without points, stands for the same rows and gets f. +inf for a point that may go nowhere.
        Detached from the problem; gradients flow to `x_new`. Raises ProblemError for a cost whose points are of another kind.
        """
        return self._extended(0, x_new)

    def potential_b(self, y_new: Points | Cost) -> Tensor:
        """g as a function, at points y_new (*batch, k, d), as `potential_a`. At the target points it is the next update of g, which is
        g within the tolerance."""
        return self._extended(1, y_new)

    @cached_property
    def transport_mass(self) -> Tensor:
        """(*batch,) the mass that moves, sum_ij P_ij: |a| for balanced problems. Carries derivatives as the plan does."""
        return self.plan._marginals[0].sum(-1).to(self.problem.given_dtype)

    @cached_property
    def sharp_cost(self) -> Tensor:
        """(*batch,) <P, C>, without the entropy and penalties that `value` holds; in units of the cost. Carries derivatives as the
        plan does.

        Exact entry by entry, in blocks, for up to 2^24 pairs a problem and for costs that do not fold. Beyond, by one sweep with C's folded
        form, alpha P1 + P beta - <u, P v>, whose rounding error is that of the largest of these terms.
        """
        if self._live:
            problem, f, g = self._held()
            return self.problem.cost.ranks.sum(gradients.sharp_cost(problem, self.geometry, f, g)).to(self.problem.given_dtype)
        return self._sharp_cost.to(self.problem.given_dtype)

    @cached_property
    def normalized_entropy(self) -> Tensor:
        """(*batch,) how blurred the plan is: 0 for a one-to-one matching of equal weights, 1 for a⊗b. Detached.

        1 - I(P) / min(H(P1), H(P^T 1)) with I the mutual information H(P1) + H(P^T 1) - H(P) and H(p) = -sum p log p, all of P divided by
        its mass. For n = m uniform weights this is H(P) / log n - 1. 1 where one side is a single point.
        """
        plan = self._plan(None)
        marginals, mass = plan._marginals, plan._marginals[0].sum(-1)
        # log P_ij = (k_i + h_j - C_ij) / eps, so that sum P log P takes the marginals and the cost alone.
        inner = [torch.where(p > 0, p * z, 0.0).sum(-1) for p, z in zip(marginals, (self._k, self._h), strict=True)]
        H = (self._sharp_cost - inner[0] - inner[1]) / (self.problem.eps * mass) + log(mass)
        H_a, H_b = (_entropy(p / mass.unsqueeze(-1)) for p in marginals)
        least = torch.minimum(H_a, H_b)
        blur = 1 - (H_a + H_b - H) / torch.where(least > 0, least, 1.0)
        return torch.where(least > 0, blur, 1.0).to(self.problem.given_dtype)

    @property
    def shape(self) -> torch.Size:
        """(*batch, n, m)."""
        return self.problem.shape

    @property
    def _k(self) -> Tensor:
        return weigh(self.f.detach(), self.problem.a.detach(), self.problem.eps)

    @property
    def _h(self) -> Tensor:
        return weigh(self.g.detach(), self.problem.b.detach(), self.problem.eps)

    def _held(self) -> tuple[Problem, Tensor, Tensor]:
        """The problem of the rows whose points are held here and all columns, with its potentials; carries derivatives."""
        problem, ranks = self.problem, self.problem.cost.ranks
        local = problem.between(ranks.local_rows(problem.cost), ranks.shard(problem.a, ROWS), ranks.replicate(problem.b))
        return local, ranks.shard(self.f, ROWS), ranks.replicate(self.g)

    @property
    def _detached_cost(self) -> Cost:
        return self.problem.cost.of(z.detach() for z in self.problem.cost.inputs.values())

    @cached_property
    def _sharp_cost(self) -> Tensor:
        plan = self._plan(None)
        with torch.no_grad():
            folded = self.problem.cost.to(self.f.dtype).fold() if self.shape[-2:].numel() > LARGE else None
        if folded is None:
            parts = [torch.where(P > 0, P * C, 0.0).sum((-1, -2)) for _, C, P in plan._strips()]
            return self.problem.cost.ranks.sum(torch.stack([self.f.new_zeros(self.shape[:-2]), *parts]).sum(0))
        alpha, beta, u, v = folded
        sent = plan._apply(torch.cat((torch.ones_like(beta).unsqueeze(-1), beta.unsqueeze(-1), v), -1))
        return (alpha * sent[..., 0] + sent[..., 1] - (u * sent[..., 2:]).sum(-1)).sum(-1)

    def _extended(self, side: int, new: Points | Cost) -> Tensor:
        """The potential of one side, 0 for rows and 1 for columns, at other points of that side."""
        own, other = (self.f.detach(), self._h) if side == 0 else (self.g.detach(), self._k)
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
        cost, dim = self._detached_cost, side - 2
        cost = cost.at(x=new) if side == 0 else cost.at(y=new)
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
