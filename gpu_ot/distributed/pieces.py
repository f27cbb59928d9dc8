"""The pieces of a sharded cost that a rank can form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from ..communicator import COLUMNS, ROWS
from ..costs import Cost
from ..problem import Problem
from .communicator import Shards


class Pieces:
    """`cost`, between this rank's points, and the same cost between other ranks' points: gathered, or as they come round the ring.

    sides   the side whose points each input of the cost holds: ROWS or COLUMNS.
    """

    def __init__(self, cost: Cost, sides: list[int], shards: Shards) -> None:
        self.cost, self.sides, self.shards = cost, sides, shards
        self._gathered: dict[int, list[Tensor]] = {}

    @property
    def inputs(self) -> list[tuple[Tensor, int]]:
        """Each input with its side."""
        return list(zip(self.cost.inputs.values(), self.sides, strict=True))

    def points(self, side: int) -> list[Tensor]:
        """This rank's points of a side, detached."""
        return [z.detach() for z, own in self.inputs if own == side]

    def with_points(self, side: int, points: Iterable[Tensor], *, detached: bool = False) -> Cost:
        """The cost with these points on one side and this rank's on the other."""
        given = iter(points)
        return self.cost.of(next(given) if own == side else z.detach() if detached else z for z, own in self.inputs)

    def gathered(self, *sides: int) -> Cost:
        """The cost with all ranks' points, detached, on these sides and this rank's on the others. Gathered once."""
        inputs = list(self.cost.inputs.values())
        for side in sides:
            if (sizes := self.shards.sizes[side]) is None:
                continue
            if side not in self._gathered:
                self._gathered[side] = [self.shards.group.gather(z, sizes, -2) for z in self.points(side)]
            found = iter(self._gathered[side])
            inputs = [next(found) if own == side else z for z, own in zip(inputs, self.sides, strict=True)]
        return self.cost.of(inputs)

    def ring(self, side: int) -> Iterator[tuple[slice, Cost]]:
        """(slice, cost) for each rank in turn: its points on `side`, at the positions of the slice, and this rank's on the other side,
        detached. Must be run to its end."""
        for owner, points in self.shards.group.ring(self.points(side), self.shards.sizes[side] or ()):
            yield self.shards.slice(side, owner), self.with_points(side, points, detached=True)
            del points  # or it lives until the next shard has come

    def zeros(self, problem: Problem, n: int, m: int) -> Problem:
        """A problem like a piece of this one, with n rows and m columns of zeros."""
        points = COLUMNS in self.sides  # the rows of a matrix are as long as it has columns
        sizes = [(n if side == ROWS else m, z.shape[-1] if points else m) for z, side in self.inputs]
        sized = [z.new_zeros(()).expand(*z.shape[:-2], *size) for (z, _), size in zip(self.inputs, sizes, strict=True)]
        a, b = (w.detach()[..., :1].expand(*w.shape[:-1], size) for w, size in ((problem.a, n), (problem.b, m)))
        return problem.restricted(self.cost.of(sized), a, b)
