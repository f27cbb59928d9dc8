"""Any machine, spread over the ranks of a process group: each binds the cost of its own points, and the ranks' softmins are softminned.

What is whole, vectors, goes in and comes out whole; see ranks.py. Bytes that a rank sends, for n rows and m columns of 8 bytes, R ranks:

    replicated  an iteration is one pass over its rows and all columns. The columns' softmins of its rows are sent to the ranks that
                join them, a part of the columns each, and those hand on what they joined: 2 (R - 1) / R m. The row potentials are
                sent where they are looked at: (R - 1) n_r, n_r the largest share.
    ring        all ranks' points but its successor's pass through it, y for the rows and x for the columns; (R - 1) (n_r + m_r) for what
                they found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..communicator import COLUMNS, ROWS
from ..costs import Cost
from ..geometry.protocol import Geometry
from ..penalties import BALANCED, Penalty
from ..problem import Problem
from .costs import Sharded
from .ranks import even

T = TypeVar("T")

#: A problem's cost bound to a machine.
Machine = Callable[[Problem], Geometry]


def share_out(problem: Problem, machine: Machine) -> Geometry:
    """The geometry of a Sharded problem, whose pieces `machine` binds."""
    assert isinstance(problem.cost, Sharded)
    return (Ring if problem.cost.layout == "ring" else Replicated)(problem, machine)


def largest(problem: Problem) -> Problem:
    """A problem of the size of the largest piece, with points of zeros: what all ranks choose their machine by."""
    rows, columns = _sizes(problem)
    if _shared(problem).layout == "replicated":
        columns = [problem.shape[-1]]
    return _blank(problem, max(rows), max(columns))


def traffic(cost: Sharded, looks: int = 1, rank: int | None = None, vector_bytes: int = 8) -> int:
    """Bytes that a rank (this one) sends in an iteration, with the row potentials sent `looks` times."""
    ranks = cost.ranks.ranks
    size, rank = ranks.size, ranks.rank if rank is None else rank
    rows, columns = cost.ranks.sizes
    m, batch = cost.shape[-1], max(1, cost.shape[:-2].numel())
    if size == 1:
        return 0
    assert rows is not None
    if cost.layout == "replicated":
        parts = even(m, size)
        return batch * vector_bytes * (m - parts[rank] + (size - 1) * (parts[0] + looks * max(rows)))
    assert columns is not None
    sent = (size - 1) * (max(rows) + max(columns)) * vector_bytes * batch
    for side, sizes in ((ROWS, rows), (COLUMNS, columns)):
        widths = [z.shape[-1] * z.itemsize for z, own in cost.sided if own == side]
        sent += batch * sum(widths) * (sum(sizes) - sizes[(rank + 1) % size])
    return sent


class _Spread(Geometry):
    """What the layouts have in common: the machines of the pieces, and whole vectors."""

    def __init__(self, problem: Problem, machine: Machine) -> None:
        self.problem, self.machine, self.cost = problem, machine, _shared(problem)
        self.inputs = tuple(self.cost.inputs.values())
        self.shares, self.ranks = self.cost.ranks, self.cost.ranks.ranks
        one = machine(_blank(problem, 1, 1))  # what kind of machine it is, also where a rank holds no points
        self.dtype, self.rounds = one.dtype, one.exact is not one

    def share(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        mine = self.shares.slice(side)
        return z if mine.start is None else z.narrow(dim, mine.start, mine.stop - mine.start)

    def whole(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        sizes = self.shares.sizes[side]
        return z if sizes is None else self.ranks.gather(z, sizes, dim)

    def bound(self, cost: Cost, rows: slice, columns: slice, penalties: tuple[Penalty, Penalty] | None = None) -> Geometry | None:
        """The piece of the cost between these points, on its machine; None where it is empty."""
        if not cost.shape[-2:].numel():
            return None
        a, b = self.problem.a.detach()[..., rows], self.problem.b.detach()[..., columns]
        return self.machine(self.problem.between(cost, a, b, penalties))

    def pulled(self, cost: Cost, rows: slice, columns: slice, flipped: bool, k: Tensor, h: Tensor, eps: float, w: Tensor) -> list[Tensor]:
        """`pull_back` in the inputs of a piece, or of its transpose."""
        leaves = [z.detach().requires_grad_(asked) for z, asked in zip(cost.inputs.values(), self.needed(), strict=True)]
        with torch.enable_grad():
            geometry = self.bound(cost.of(leaves), rows, columns)
            if geometry is None:
                return [torch.zeros_like(z) for z in leaves]
            geometry = geometry.T if flipped else geometry
            into = geometry.inputs
        with torch.no_grad():
            found = geometry.pull_back(k, h, eps, w)
        into, found = zip(*((z, grad) for z, grad in zip(into, found, strict=True) if z.requires_grad), strict=True)
        grads = iter(torch.autograd.grad(into, [z for z in leaves if z.requires_grad], found, allow_unused=True))
        pulled = [next(grads) if z.requires_grad else None for z in leaves]
        return [torch.zeros_like(z) if grad is None else grad for z, grad in zip(leaves, pulled, strict=True)]

    def needed(self) -> list[bool]:
        """Which inputs ask for a gradient; all, where this is called without autograd. The same on every rank."""
        asked = [z.requires_grad for z in self.inputs]
        return asked if any(asked) else [True] * len(asked)


class Replicated(_Spread):
    """This rank's rows and all columns, on one machine. O(n_r m) work, and the columns' points on every rank."""

    def __init__(self, problem: Problem, machine: Machine) -> None:
        super().__init__(problem, machine)
        self.rows, self.columns = self.shares.slice(ROWS), slice(0, problem.shape[-1])
        self.penalty = problem.penalties[1]
        # The columns' update is for the ranks together to damp: each takes its part of it as a plain softmin.
        penalties = (problem.penalties[0], BALANCED)
        with torch.no_grad():
            self.local = self.bound(self.cost.piece(COLUMNS), self.rows, self.columns, penalties)
        self.piece = problem.between(self.cost, problem.a.detach()[..., self.rows], problem.b.detach(), penalties)

    @property
    def exact(self) -> Geometry:
        return Replicated(self.problem, lambda piece: self.machine(piece).exact) if self.rounds else self

    @property
    def T(self) -> Geometry:
        return _Columns(self)

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        s = self._none(h) if self.local is None else self.local.softmin(h, eps)
        return self.whole(s, ROWS)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self.whole(self._rows(k, h, eps, v), ROWS, -2)

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self._rows(k, h, eps, self.whole(v, COLUMNS, -2))

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """This rank's rows."""
        if self.local is None:
            return h.new_empty(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1]), 0, h.shape[-1])
        return self.local.plan(self.share(k, ROWS), h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return self.home(self.pulled(self.all_columns, self.rows, self.columns, False, self.share(k, ROWS), h, eps, self.share(w, ROWS)))

    def first(self, f: Tensor, a: Tensor, eps: float) -> Tensor:
        return self.joined(None if self.local is None else self.local.first(self.share(f, ROWS), self.share(a, ROWS), eps), f, eps)

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pieces advance with both half-steps at once, as fast as their machine can; between them only the columns' softmins travel."""
        f, fresh = self._none(g), g
        for _ in range(k):
            g, part = fresh, None
            if self.local is not None:
                f, _, part = self.local.iterate(self.piece, g, eps, 1)
            fresh = self.penalty.damp(self.joined(part, g, eps), eps)
        return self.whole(f, ROWS), g, fresh

    def extra_sweeps(self) -> int:
        return 0 if self.local is None else self.local.extra_sweeps()

    def joined(self, s: Tensor | None, like: Tensor, eps: float) -> Tensor:
        """The softmin of the ranks' softmins of the columns."""
        if s is None:
            s = like.new_full((*like.shape[:-1], self.problem.shape[-1]), torch.inf)
        return self.ranks.joined(s, lambda parts: _softmin(parts, eps))

    @property
    def all_columns(self) -> Cost:
        return self.cost.piece(COLUMNS)

    def home(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients in the points of all columns, summed where these live."""
        sizes = self.shares.sizes[COLUMNS]
        found = []
        for grad, (z, side), asked in zip(grads, self.cost.sided, self.needed(), strict=True):
            if side == COLUMNS and sizes is not None:
                grad = self.ranks.scatter(grad, sizes, -2).sum(0) if asked else torch.zeros_like(z)
            found.append(grad)
        return tuple(found)

    def _rows(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        if self.local is None:
            return h.new_empty(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], v.shape[:-2]), 0, v.shape[-1])
        return self.local.apply(self.share(k, ROWS), h, eps, v).to(h.dtype)

    def _none(self, like: Tensor) -> Tensor:
        return like.new_empty(*torch.broadcast_shapes(like.shape[:-1], self.problem.shape[:-2]), 0)


class _Columns(Geometry):
    """`Replicated` seen from its columns: every rank has a part of each sum."""

    def __init__(self, upright: Replicated) -> None:
        self.upright, self.inputs, self.dtype = upright, upright.inputs, upright.dtype

    @property
    def T(self) -> Geometry:
        return self.upright

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        up = self.upright
        return up.joined(None if up.local is None else up.local.T.softmin(up.share(h, ROWS), eps), h, eps)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self.upright.ranks.total(self._parts(k, h, eps, self.upright.share(v, ROWS, -2)), -2)

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        up, part = self.upright, self._parts(k, h, eps, v)
        sizes = up.shares.sizes[COLUMNS]
        return up.ranks.total(part, -2) if sizes is None else up.ranks.scatter(part, sizes, -2).sum(0)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """This rank's columns, for which the points of all rows are gathered."""
        up = self.upright
        if up.shares.sizes[COLUMNS] is None:
            raise NotImplementedError("the columns of a matrix are on no rank in one piece: transpose the rows, P.to_dense().mT.")
        rows, columns = slice(0, up.problem.shape[-2]), up.shares.slice(COLUMNS)
        geometry = up.bound(up.cost.piece(ROWS), rows, columns)
        if geometry is None:
            return h.new_empty(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1]), 0, h.shape[-1])
        return geometry.T.plan(up.share(k, COLUMNS), h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        up = self.upright
        return up.home(up.pulled(up.all_columns, up.rows, up.columns, True, k, up.share(h, ROWS), eps, w))

    def _parts(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        """What this rank's rows, of which v are, add to each column."""
        up = self.upright
        if up.local is None:
            return h.new_zeros(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], v.shape[:-2]), k.shape[-1], v.shape[-1])
        return up.local.T.apply(k, up.share(h, ROWS), eps, v).to(h.dtype)


class Ring(_Spread):
    """This rank's points of both sides; the others' come round. O((n_r + m_r) d) memory, whatever n and m.

    From either side alike: the points of `side` stay, and those of the other side visit.
    """

    def __init__(self, problem: Problem, machine: Machine, side: int = ROWS) -> None:
        super().__init__(problem, machine)
        self.side, self.other = side, COLUMNS if side == ROWS else ROWS

    @property
    def exact(self) -> Geometry:
        return Ring(self.problem, lambda piece: self.machine(piece).exact, self.side) if self.rounds else self

    @property
    def T(self) -> Geometry:
        other = copy.copy(self)
        other.side, other.other = self.other, self.side
        return other

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        parts = self.met(lambda geometry, there: geometry.softmin(h[..., there], eps))
        s = _softmin(torch.stack(parts), eps) if parts else h.new_full((*self._batch(h), self._size), torch.inf)
        return self.whole(s, self.side)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        own = self.share(k, self.side)
        parts = self.met(lambda geometry, there: geometry.apply(own, h[..., there], eps, v[..., there, :]))
        return self.whole(self._sum(parts, k, h, v), self.side, -2)

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        own = self.share(k, self.side)
        parts = self.met(lambda geometry, there, brought: geometry.apply(own, h[..., there], eps, brought), v)
        return self._sum(parts, k, h, v)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """This rank's rows."""
        own, batch = self.share(k, self.side), torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], self.cost.shape[:-2])
        P = h.new_empty(*batch, self._size, h.shape[-1], dtype=self.problem.dtype)

        def fill(geometry: Geometry, there: slice) -> None:
            P[..., there] = geometry.plan(own, h[..., there], eps)

        self.met(fill)
        return P

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """The gradients in the points that visit go with them, and are complete when they are home."""
        k, w, ranks = self.share(k, self.side), self.share(w, self.side), self.ranks
        sided, needed = self.cost.sided, self.needed()
        asked = [i for i, (_, side) in enumerate(sided) if side == self.other and needed[i]]
        sizes = self.shares.sizes[self.other] or ()
        grads = [torch.zeros_like(z) for z, _ in sided]
        travelling = [grads[i] for i in asked]
        for step, (owner, points) in enumerate(ranks.round([z.detach() for z, side in sided if side == self.other], sizes)):
            there = self.shares.slice(self.other, owner)
            found = self.pulled(
                self.cost.with_points(self.other, points), *self._places(there), self.side == COLUMNS, k, h[..., there], eps, w
            )
            grads = [
                grad if i in asked or side == self.other else grad + found[i]
                for i, (grad, (_, side)) in enumerate(zip(grads, sided, strict=True))
            ]
            travelling = [(z + found[i]).contiguous() for z, i in zip(travelling, asked, strict=True)]
            del found, points
            if asked and ranks.size > 1:
                size = sizes[(ranks.rank - step - 1) % ranks.size]
                coming = [z.new_empty(*z.shape[:-2], size, z.shape[-1]) for z in travelling]
                ranks.arrived(ranks.send_on(travelling, coming, tag=1))
                travelling = coming
        for z, i in zip(travelling, asked, strict=True):
            grads[i] = z
        return tuple(grads)

    def met(self, work: Callable[..., T], *brought: Tensor) -> list[T]:
        """What `work(machine, which points, *brought)` finds with each rank's points of the other side, as they come round with what they
        bring, a row for each. Nothing of one visit is kept into the next."""
        points, found = [z.detach() for z, side in self.cost.sided if side == self.other], []
        for owner, visitors in self.ranks.round([*points, *brought], self.shares.sizes[self.other] or ()):
            there = self.shares.slice(self.other, owner)
            geometry = self.bound(self.cost.with_points(self.other, visitors[: len(points)]), *self._places(there))
            if geometry is not None:
                found.append(work(geometry if self.side == ROWS else geometry.T, there, *visitors[len(points) :]))
            del geometry, visitors
        return found

    def _places(self, there: slice) -> tuple[slice, slice]:
        """(rows, columns) of the problem where the points at `there` visit."""
        mine = self.shares.slice(self.side)
        return (mine, there) if self.side == ROWS else (there, mine)

    @property
    def _size(self) -> int:
        mine = self.shares.slice(self.side)
        return mine.stop - mine.start

    def _batch(self, h: Tensor) -> torch.Size:
        return torch.broadcast_shapes(h.shape[:-1], self.cost.shape[:-2])

    def _sum(self, parts: list[Tensor], k: Tensor, h: Tensor, v: Tensor) -> Tensor:
        if not parts:
            return h.new_zeros(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], v.shape[:-2]), self._size, v.shape[-1])
        return torch.stack([part.to(h.dtype) for part in parts]).sum(0)


def _softmin(parts: Tensor, eps: float) -> Tensor:
    """Of softmins (parts, *) over the first axis."""
    return parts[0] if len(parts) == 1 else -eps * (parts / -eps).logsumexp(0)


def _shared(problem: Problem) -> Sharded:
    assert isinstance(problem.cost, Sharded)
    return problem.cost


def _sizes(problem: Problem) -> tuple[list[int], list[int]]:
    rows, columns = _shared(problem).ranks.sizes
    return rows or [problem.shape[-2]], columns or [problem.shape[-1]]


def _blank(problem: Problem, n: int, m: int) -> Problem:
    """A problem like a piece of this one, of n rows and m columns of zeros."""
    cost = _shared(problem)
    sized = []
    for z, side in cost.sided:
        width = z.shape[-1] if any(own == COLUMNS for _, own in cost.sided) else m  # the rows of a matrix are as long as it has columns
        sized.append(z.new_zeros(()).expand(*z.shape[:-2], n if side == ROWS else m, width))
    a, b = (w.detach()[..., :1].expand(*w.shape[:-1], size) for w, size in ((problem.a, n), (problem.b, m)))
    return problem.between(cost.cost.of(sized), a, b)
