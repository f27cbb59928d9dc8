"""The plan as a cost and two potentials. Products, marginals, entries and draws are computed on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors, gradients
from ..communicator import ALONE, ROWS, Alone
from ..costs.base import BLOCK, Cost
from ..errors import ProblemError
from ..geometry.protocol import Geometry
from ..problem import Problem
from ..vectors import in_full_precision

#: Least columns of a block that partners are drawn from. Many rows are drawn at once, and long rows in several blocks.
WIDTH = 2**10


class Live(NamedTuple):
    """Potentials that carry derivatives, and the problem that they solve."""

    problem: Problem
    geometry: Geometry
    f: Tensor
    g: Tensor

    def local(self) -> Live:
        """The problem of this rank's rows and all columns."""
        problem, ranks = self.problem, self.problem.cost.ranks
        local = problem.restricted(ranks.local_rows(problem.cost), ranks.shard(problem.a, ROWS), ranks.replicate(problem.b))
        return Live(local, self.geometry, ranks.shard(self.f, ROWS), ranks.replicate(self.g))


class Plan:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), computed where it is needed and never stored.

    `P @ v`, `P.T @ v`, `marginals` and `sum` are sweeps over the cost. `P[rows, columns]` and `diagonal` form entries, `sample` draws
    matched pairs, `to_dense()` is the (*batch, n, m) array. With grad="implicit" or "unroll", products, sums and the array carry
    derivatives; everything else is detached. Internally P_ij = exp((k_i + h_j - C_ij) / eps), k = f + eps log a and h = g + eps log b.
    """

    def __init__(
        self, geometry: Geometry, k: Tensor, h: Tensor, eps: float, dtype: torch.dtype, cost: Cost | None = None,
        flipped: bool = False, live: Live | None = None,
    ) -> None:  # fmt: skip
        self._geometry, self._k, self._h, self._eps, self.dtype = geometry, k, h, eps, dtype
        self._own_cost, self._flipped, self._live = cost, flipped, live  # flipped: rows of the plan are columns of the cost

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._k.shape, self._h.shape[-1]))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Plan:
        return Plan(self._geometry.T, self._h, self._k, self._eps, self.dtype, self._own_cost, not self._flipped, self._live)

    @in_full_precision
    def to_dense(self) -> Tensor:
        if self._live is None:
            with torch.no_grad():
                return self._geometry.plan(self._k, self._h, self._eps).to(self.dtype)
        if self._flipped and self._ranks is not ALONE:
            raise ProblemError("with derivatives, ranks that share the points hold rows of the plan: transpose them, P.to_dense().mT.")
        problem, geometry, f, g = self._live.local()
        P = gradients.plan(problem, geometry, f, g)
        return (P.mT if self._flipped else P).to(self.dtype)

    def __getitem__(self, key: Any) -> Tensor:
        """Entries (*batch, n', m') of some rows and, if given, columns: ints or slices. An int keeps its axis."""
        rows, columns = (*key, slice(None))[:2] if isinstance(key, tuple) else (key, slice(None))
        *batch, n, m = self.shape
        kept, columns = range(n)[_slice(rows, n)], _slice(columns, m)
        size = max(1, BLOCK // max(1, math.prod(batch) * len(range(m)[columns]) * self._cost.depth))
        parts = [kept[i : i + size] for i in range(0, max(1, len(kept)), size)]
        return torch.cat([self._entries(slice(z.start, z.stop, z.step), columns).to(self.dtype) for z in parts], -2)

    @in_full_precision
    def __matmul__(self, v: Tensor) -> Tensor:
        """(m,) or (*batch, m, c) -> (n,) or (*batch, n, c). Where ranks share the points, v and the result are this rank's shards."""
        columns = v.unsqueeze(-1) if v.ndim == 1 else v
        if self._ranks is ALONE and (v.ndim == 0 or columns.shape[-2] != self.shape[-1]):
            raise errors.wrong_shape("v", v.shape, f"({self.shape[-1]},) or (*batch, {self.shape[-1]}, c)")
        if self._live is not None:
            out = self._ranks.shard(self._apply(self._ranks.gather(columns, 1 - self._flipped, -2)), int(self._flipped), -2)
        else:
            with torch.no_grad():
                out = self._geometry.product(self._k, self._h, self._eps, columns)
        return (out.squeeze(-1) if v.ndim == 1 else out).to(self.dtype)

    def _apply(self, v: Tensor) -> Tensor:
        """P @ v for the whole v (*batch, m, c), in the type of the potentials."""
        if (s := self._live) is not None:
            return gradients.plan_product(s.problem, s.geometry, s.f, s.g, v.to(s.f), self._flipped)
        with torch.no_grad():
            return self._geometry.apply(self._k, self._h, self._eps, v)

    @cached_property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """P1 (*batch, n) and P^T 1 (*batch, m)."""
        rows, columns = self.wide_marginals
        return rows.to(self.dtype), columns.to(self.dtype)

    @cached_property
    @in_full_precision
    def wide_marginals(self) -> tuple[Tensor, Tensor]:
        """The marginals in the type of the potentials."""
        ones_m, ones_n = torch.ones_like(self._h).unsqueeze(-1), torch.ones_like(self._k).unsqueeze(-1)
        return self._apply(ones_m).squeeze(-1), self.T._apply(ones_n).squeeze(-1)

    def sum(self, dim: int | None = None) -> Tensor:
        """P1 (*batch, n) for the last axis, P^T 1 (*batch, m) for the last but one; for None the sum of all entries, 0-d."""
        if dim is None:
            return self.wide_marginals[0].sum().to(self.dtype)
        axis = dim - self.ndim if dim >= 0 else dim
        if axis not in (-1, -2):
            raise errors.unknown("dim", dim, ["None", "-1", "-2", str(self.ndim - 2), str(self.ndim - 1)])
        return self.marginals[0 if axis == -1 else 1]

    def diagonal(self) -> Tensor:
        """P_ii, (*batch, min(n, m))."""
        size, step = min(self.shape[-2:]), 64
        blocks = [slice(i, min(i + step, size)) for i in range(0, size, step)]
        return torch.cat([self._entries(block, block).diagonal(dim1=-2, dim2=-1) for block in blocks], -1).to(self.dtype)

    def sample(self, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """k matched pairs (i, j) of each problem, drawn independently and in proportion to P_ij: two int64 arrays (*batch, k).

        It takes one sweep, for the marginal that the rows are drawn from, and the costs of k rows, see `sample_columns`. Where ranks
        share the points, a rank gets the pairs whose rows are its own. Both indices count all points.
        """
        total = self.wide_marginals[0].clamp(min=0).cumsum(-1)
        # The first row whose running total exceeds the draw, which has mass. Draws stay below the total, or no row would exceed them.
        top = torch.nextafter(total[..., -1:], torch.zeros_like(total[..., -1:]))
        u = self._ranks.broadcast(torch.rand(*total.shape[:-1], k, dtype=total.dtype, device=total.device, generator=generator))
        rows = self._ranks.local_indices(torch.searchsorted(total, torch.minimum(u * total[..., -1:], top), right=True), int(self._flipped))
        return rows, self.sample_columns(rows, generator)

    def sample_columns(self, rows: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A column for each of `rows`, drawn in proportion to P_ij: int64 (*batch, k), -1 where a row has no mass.

        rows  int64 (k,) or (*batch, k); every row when left out.

        Gumbel-max: the largest of (h_j - C_ij) / eps plus Gumbel noise is at j with probability P_ij / sum_j P_ij. The maximum is taken
        over blocks of columns, O(m) costs a row. Maddison, Tarlow and Minka 2014, arXiv:1411.0030, section 2.
        """
        batch, (n, m) = self.shape[:-2], self.shape[-2:]
        rows = torch.arange(n, device=self._h.device) if rows is None else rows
        rows = rows.expand(*batch, rows.shape[-1])
        copies = max(1, batch.numel()) * self._cost.depth
        drawn = []
        for part in rows.split(max(1, BLOCK // (copies * min(m, WIDTH))), -1):
            best = torch.full_like(part, -math.inf, dtype=self._h.dtype)
            chosen = torch.full_like(part, -1)
            width = max(1, BLOCK // (copies * max(1, part.shape[-1])))  # without rows, this rank still takes part in gathering
            for j in range(0, m, width):
                columns = slice(j, min(j + width, m))
                scores = (self._h[..., columns].unsqueeze(-2) - self._costs(part, columns)).div_(self._eps)
                noise = torch.empty_like(scores).exponential_(generator=generator)
                score, at = scores.sub_(noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()).max(-1)
                chosen = torch.where(score > best, at + j, chosen)
                best = torch.maximum(best, score)
            drawn.append(chosen)
        return torch.cat(drawn, -1)

    def strips(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(C, P) of this rank's rows of the cost and all columns, some rows at a time: detached, in the type of the potentials."""
        k, h = (self._h, self._k) if self._flipped else (self._k, self._h)
        for rows, part in self._cost.strips():
            with torch.no_grad():
                C = part.dense().to(h.dtype)
                size = max(1, C.numel() // max(1, h.shape[:-1].numel() * C.shape[-1]))  # problems that share a cost have a plan each
                for i in range(0, C.shape[-2], size):
                    block, levels = C[..., i : i + size, :], k[..., rows][..., i : i + size]
                    yield block, entries(levels, h, block, self._eps)

    def _entries(self, rows: slice, columns: slice) -> Tensor:
        """P_ij of some rows and columns, in the type of the potentials."""
        with torch.no_grad():
            return entries(self._k[..., rows], self._h[..., columns], self._costs(rows, columns), self._eps)

    @in_full_precision
    def _costs(self, rows: slice | Tensor, columns: slice) -> Tensor:
        with torch.no_grad():
            C = self._cost.entries(columns, rows).mT if self._flipped else self._cost.entries(rows, columns)
            return C.to(self._h.dtype)

    @property
    def _ranks(self) -> Alone:
        """The ranks that share the points."""
        return ALONE if self._own_cost is None else self._own_cost.ranks

    @property
    def _cost(self) -> Cost:
        if self._own_cost is None:
            raise ProblemError("this plan was made without its cost: Plan(..., cost=problem.cost) has entries to look at and draw from.")
        return self._own_cost

    def __repr__(self) -> str:
        return f"Plan{tuple(self.shape)}"


def entries(k: Tensor, h: Tensor, C: Tensor, eps: float) -> Tensor:
    """exp((k_i + h_j - C_ij) / eps), bitwise equal for the plan and its transpose."""
    return (k.unsqueeze(-1) + h.unsqueeze(-2)).sub_(C).div_(eps).exp_()


def _slice(index: Any, size: int) -> slice:
    if isinstance(index, slice):
        return index
    if isinstance(index, int):
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for a plan with {size} rows or columns on that side")
        return slice(index % size, index % size + 1)
    raise NotImplementedError("a lazy plan takes ints and slices; P.to_dense() takes every index.")
