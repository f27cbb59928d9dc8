"""The layout "ring": each rank has its own points of both sides, and the shards of one side travel round the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..communicator import COLUMNS, ROWS
from ..geometry.protocol import Geometry, needed
from ..problem import Problem
from .geometry import Bind, Spread, batch_of, softmin_of_softmins
from .pieces import Pieces

T = TypeVar("T")


class Ring(Spread):
    """O((n_r + m_r) d) memory, whatever n and m. The points of `side` stay; those of the other side visit."""

    def __init__(self, problem: Problem, bind_piece: Bind, pieces: Pieces) -> None:
        super().__init__(problem, bind_piece, pieces)
        self.side, self.other = ROWS, COLUMNS

    @property
    def exact(self) -> Geometry:
        exact = super().exact
        return exact if exact is self or self.side == ROWS else exact.T

    @property
    def T(self) -> Geometry:
        other = copy.copy(self)
        other.side, other.other = self.other, self.side
        return other

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        parts = self.visits(lambda geometry, there: geometry.softmin(h[..., there], eps))
        if not parts:
            parts = [h.new_full((*torch.broadcast_shapes(h.shape[:-1], self.problem.cost.shape[:-2]), self._size), torch.inf)]
        return self.gather(softmin_of_softmins(torch.stack(parts), eps), self.side)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        own = self.shard(k, self.side)
        parts = self.visits(lambda geometry, there: geometry.apply(own, h[..., there], eps, v[..., there, :]))
        return self.gather(self._sum(parts, k, h, v), self.side, -2)

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        own = self.shard(k, self.side)
        return self._sum(self.visits(lambda geometry, there, rows: geometry.apply(own, h[..., there], eps, rows), v), k, h, v)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """This rank's rows."""
        own, batch = self.shard(k, self.side), torch.broadcast_shapes(batch_of(k, h), self.problem.cost.shape[:-2])
        P = h.new_empty(*batch, self._size, h.shape[-1], dtype=self.problem.dtype)

        def fill(geometry: Geometry, there: slice) -> None:
            P[..., there] = geometry.plan(own, h[..., there], eps)

        self.visits(fill)
        return P

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """The gradients in points that visit travel with them, and are complete when these are home."""
        k, w, group = self.shard(k, self.side), self.shard(w, self.side), self.group
        sides, wanted = self.pieces.sides, needed(self.inputs)
        visiting = [i for i, side in enumerate(sides) if side == self.other and wanted[i]]
        sizes = self.shards.sizes[self.other] or ()
        grads = [torch.zeros_like(z) for z in self.inputs]
        travelling = [grads[i] for i in visiting]
        for step, (there, cost) in enumerate(self.pieces.ring(self.other)):
            found = self.pull_back_piece(cost, *self._places(there), self.side == COLUMNS, k, h[..., there], eps, w)
            grads = [grad + found[i] if sides[i] == self.side else grad for i, grad in enumerate(grads)]
            travelling = [(z + found[i]).contiguous() for z, i in zip(travelling, visiting, strict=True)]
            del found, cost
            if visiting and group.size > 1:
                travelling, handles = group.pass_on(travelling, sizes[(group.rank - step - 1) % group.size], tag=1)
                group.wait(handles)
        for z, i in zip(travelling, visiting, strict=True):
            grads[i] = z
        return tuple(grads)

    def visits(self, work: Callable[..., T], *brought: Tensor) -> list[T]:
        """`work(geometry, there, *brought)` for each rank's points of the other side, those at `there`, and the rows of `brought` that
        travel with them. Nothing of one visit is kept into the next."""
        points, found = self.pieces.points(self.other), []
        for owner, visitors in self.group.ring([*points, *brought], self.shards.sizes[self.other] or ()):
            there = self.shards.slice(self.other, owner)
            cost = self.pieces.with_points(self.other, visitors[: len(points)], detached=True)
            geometry = self.bound(cost, *self._places(there))
            if geometry is not None:
                found.append(work(geometry if self.side == ROWS else geometry.T, there, *visitors[len(points) :]))
            del geometry, cost, visitors
        return found

    def _places(self, there: slice) -> tuple[slice, slice]:
        """(rows, columns) of the problem where the points at `there` visit."""
        own = self.shards.slice(self.side)
        return (own, there) if self.side == ROWS else (there, own)

    @property
    def _size(self) -> int:
        own = self.shards.slice(self.side)
        return own.stop - own.start

    def _sum(self, parts: list[Tensor], k: Tensor, h: Tensor, v: Tensor) -> Tensor:
        if not parts:
            return h.new_zeros(*batch_of(k, h, v=v), self._size, v.shape[-1])
        return torch.stack([part.to(h.dtype) for part in parts]).sum(0)
