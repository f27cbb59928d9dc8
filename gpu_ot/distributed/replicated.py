"""The layout "replicated": each rank has its rows against all columns, and the ranks' softmins of the columns are softminned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..communicator import COLUMNS, ROWS
from ..geometry.protocol import Geometry, needed
from ..penalties import BALANCED
from ..problem import Problem
from .geometry import Bind, Spread, batch_of, softmin_of_softmins
from .pieces import Pieces


class Replicated(Spread):
    """This rank's rows and all columns on one backend. O(n_r m) work, and all column points on every rank."""

    def __init__(self, problem: Problem, bind_piece: Bind, pieces: Pieces) -> None:
        super().__init__(problem, bind_piece, pieces)
        self.rows, self.columns = self.shards.slice(ROWS), slice(0, problem.shape[-1])
        # The column update is damped after the ranks' softmins are joined, so a piece takes it as a plain softmin.
        penalties = (problem.penalties[0], BALANCED)
        with torch.no_grad():
            self.local = self.bound(pieces.gathered(COLUMNS), self.rows, self.columns, penalties)
        self.local_problem = problem.restricted(problem.cost, problem.a.detach()[..., self.rows], problem.b.detach(), penalties)

    @property
    def T(self) -> Geometry:
        return _Columns(self)

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        return self.gather(self._empty(h) if self.local is None else self.local.softmin(h, eps), ROWS)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self.gather(self._rows(k, h, eps, v), ROWS, -2)

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self._rows(k, h, eps, self.gather(v, COLUMNS, -2))

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """This rank's rows."""
        if self.local is None:
            return h.new_empty(*batch_of(k, h), 0, h.shape[-1])
        return self.local.plan(self.shard(k, ROWS), h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return self.pull_back_rows(False, self.shard(k, ROWS), h, eps, self.shard(w, ROWS))

    def pull_back_rows(self, flipped: bool, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """`pull_back` of this rank's rows, or their transpose; the gradients in column points are summed on the rank that holds these."""
        grads = self.pull_back_piece(self.pieces.gathered(COLUMNS), self.rows, self.columns, flipped, k, h, eps, w)
        sizes = self.shards.sizes[COLUMNS]
        for i, ((z, side), wanted) in enumerate(zip(self.pieces.inputs, needed(self.inputs), strict=True)):
            if side == COLUMNS and sizes is not None:
                grads[i] = self.group.scatter(grads[i], sizes, -2).sum(0) if wanted else torch.zeros_like(z)
        return tuple(grads)

    def first(self, f: Tensor, a: Tensor, eps: float) -> Tensor:
        part = None if self.local is None else self.local.first(self.shard(f, ROWS), self.shard(a, ROWS), eps)
        return self.join(part, f, eps)

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """A piece takes both half-steps at once, as fast as its backend can; only softmins of the columns travel between iterations."""
        f, g_next = self._empty(g), g
        for _ in range(k):
            g, part = g_next, None
            if self.local is not None:
                f, _, part = self.local.iterate(self.local_problem, g, eps, 1)
            g_next = self.problem.penalties[1].damp(self.join(part, g, eps), eps)
        if self.local is not None:
            self.extra_sweeps, self.local.extra_sweeps = self.extra_sweeps + self.local.extra_sweeps, 0
        return self.gather(f, ROWS), g, g_next

    def join(self, s: Tensor | None, like: Tensor, eps: float) -> Tensor:
        """The softmin of the ranks' softmins of the columns; None on a rank without rows."""
        if s is None:
            s = like.new_full((*like.shape[:-1], self.problem.shape[-1]), torch.inf)
        return self.group.reduce(s, lambda parts: softmin_of_softmins(parts, eps))

    def _rows(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        if self.local is None:
            return h.new_empty(*batch_of(k, h, v=v), 0, v.shape[-1])
        return self.local.apply(self.shard(k, ROWS), h, eps, v).to(h.dtype)

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(*torch.broadcast_shapes(like.shape[:-1], self.problem.shape[:-2]), 0)


class _Columns(Geometry):
    """The transpose of `Replicated`: every rank has a part of each sum."""

    def __init__(self, upright: Replicated) -> None:
        self.upright, self.inputs, self.dtype = upright, upright.inputs, upright.dtype

    @property
    def T(self) -> Geometry:
        return self.upright

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        up = self.upright
        return up.join(None if up.local is None else up.local.T.softmin(up.shard(h, ROWS), eps), h, eps)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self.upright.group.sum(self._part(k, h, eps, self.upright.shard(v, ROWS, -2)), -2)

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        up, part = self.upright, self._part(k, h, eps, v)
        sizes = up.shards.sizes[COLUMNS]
        return up.group.sum(part, -2) if sizes is None else up.group.scatter(part, sizes, -2).sum(0)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """This rank's columns, for which the points of all rows are gathered."""
        up = self.upright
        if up.shards.sizes[COLUMNS] is None:
            raise NotImplementedError("the columns of a matrix are on no rank in one piece: transpose the rows, P.to_dense().mT.")
        rows, columns = slice(0, up.problem.shape[-2]), up.shards.slice(COLUMNS)
        geometry = up.bound(up.pieces.gathered(ROWS), rows, columns)
        if geometry is None:
            return h.new_empty(*batch_of(k, h), 0, h.shape[-1])
        return geometry.T.plan(up.shard(k, COLUMNS), h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return self.upright.pull_back_rows(True, k, self.upright.shard(h, ROWS), eps, w)

    def _part(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        """What this rank's rows, and their rows of v, add to each column."""
        up = self.upright
        if up.local is None:
            return h.new_zeros(*batch_of(k, h, v=v), k.shape[-1], v.shape[-1])
        return up.local.T.apply(k, up.shard(h, ROWS), eps, v).to(h.dtype)
