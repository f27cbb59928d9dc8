"""A cost whose points are sharded over the ranks of a process group."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import communicator, errors
from ..communicator import COLUMNS, ROWS
from ..costs import Cost, Index, Points, Sum
from ..costs.scale import SCALES, merged
from ..geometry.protocol import Geometry
from ..problem import Problem, check_cost
from .communicator import Shards
from .dtensors import local, local_cost, mesh_of
from .group import Group
from .pieces import Pieces
from .replicated import Replicated
from .ring import Ring

LAYOUTS = ("auto", "replicated", "ring")

#: Up to so many bytes "auto" holds all column points on every rank: a million points of a thousand float32 numbers.
REPLICATED_BYTES = 2**32


class Sharded(Cost):
    """The cost between the points of all ranks, in their order. This process holds its own points.

    cost    this rank's own: SqEuclidean(x_local, y_local), any other cost between clouds or sum of them; or a Matrix whose rows
            are this rank's and whose columns are everyone's. Shards may be of any size, also empty. DTensors are taken as they are, if
            they are sharded by points.
    group   a process group or one-dimensional DeviceMesh; the default group when left out, and without any, this process alone.
    layout  "replicated": every rank holds all y and its own x; an iteration sends one number for each column, twice, and one for each
            row. "ring": every rank holds its own x and y, and the shards travel round the ranks twice an iteration; memory falls as
            1 / ranks. "auto": "replicated" while y takes no more than 4 GiB.

    `shape` is that of the whole problem. All ranks make, solve and differentiate it together, in the same order, and get the same
    Solution to the bit: value, potentials and marginals are replicated. Points, weights, products with the plan and gradients are this
    rank's shard: the gradient in x_local is the derivative of the one value that all ranks hold. (DDP divides gradients by the number of
    ranks: multiply the loss by it there.) Every rank must run the same build on the same kind of machine, since all decide by numbers
    that must be equal.

    Raises ProblemError, on every rank, if one's cost does not fit the others'; RankFailed if a rank ends or does not answer.
    """

    def __init__(self, cost: Cost, group: Any = None, layout: str = "auto") -> None:
        group = Group(mesh_of(cost) if group is None else group)
        cost = local_cost(cost)
        sides: list[int] = []
        shapes: list[Any] = []

        def check() -> None:
            sides.extend(_sides(cost))
            if len(cost.shape) < 2:
                raise errors.wrong_shape(next(iter(cost.inputs)), cost.shape, "(*batch, n, m)")
            if layout not in LAYOUTS:
                raise errors.unknown("layout", layout, LAYOUTS)
            if layout == "ring" and COLUMNS not in sides:
                raise errors.ProblemError('layout = "ring" passes points on, and a matrix has none: use layout="replicated".')
            if cost.stored and bool(cost.dense().isposinf().any()):
                raise errors.ProblemError(
                    "M holds +inf: forbidden pairs are not known of a matrix that ranks share. Write a large cost instead."
                )
            shapes.extend(group.exchange(tuple(cost.shape[-2:])))

        forms = {f"the form of {name}": _form(z) for name, z in cost.inputs.items()}
        group.on_every_rank(check, {"layout": layout, "the kind of cost": _kind(cost), **forms})
        rows, columns = ([shape[side] for shape in shapes] for side in (ROWS, COLUMNS))
        if COLUMNS not in sides and len(set(columns)) > 1:
            odd = next(rank for rank, size in enumerate(columns) if size != columns[0])
            raise errors.ranks_differ("the number of columns of a matrix", 0, f"{columns[0]}", odd, f"{columns[odd]}")
        self.symmetric = cost.symmetric
        self.ranks: Shards = Shards(group, (rows, columns if COLUMNS in sides else None))  # pyright: ignore[reportIncompatibleVariableOverride]
        self.pieces = Pieces(cost, sides, self.ranks)
        size = sum(z.numel() * z.itemsize // max(1, z.shape[-2]) for z in self.pieces.points(COLUMNS))
        self.layout = layout if layout != "auto" else "ring" if size * self.shape[-1] > REPLICATED_BYTES else "replicated"

    def describe(self) -> str:
        rows, columns = (size if size is None else "+".join(map(str, size)) for size in self.ranks.sizes)
        about = "each holds its rows and all columns" if self.layout == "replicated" else "shares of points go round"
        return f'rows {rows}, columns {columns or "whole"} on the ranks, layout "{self.layout}": {about}'

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.pieces.cost.inputs

    @property
    def shape(self) -> torch.Size:
        *batch, n, m = self.pieces.cost.shape
        return torch.Size((*batch, *(own if sizes is None else sum(sizes) for own, sizes in zip((n, m), self.ranks.sizes, strict=True))))

    @property
    def points(self) -> tuple[Points, Points]:
        """This rank's points."""
        return self.pieces.cost.points

    @property
    def depth(self) -> int:
        return self.pieces.cost.depth

    @property
    def T(self) -> Cost:
        raise errors.ProblemError("a cost that ranks share is not turned: swap x and y.")

    def within(self, side: int) -> Sharded:
        return Sharded(self.pieces.cost.within(side), self.ranks.group.process_group, self.layout)

    def dense(self) -> Tensor:
        raise NotImplementedError(
            "the n-by-m array of a cost that ranks share is on none of them, nor are its derivatives: multiply the plan, or detach it."
        )

    def to(self, dtype: torch.dtype) -> Sharded:
        """Always another cost: what this one has gathered may have changed in place since."""
        return self.of([z.to(dtype) for z in self.inputs.values()])

    def of(self, inputs: Iterable[Tensor]) -> Sharded:
        other = copy.copy(self)
        other.pieces = Pieces(self.pieces.cost.of(inputs), self.pieces.sides, self.ranks)
        return other

    def at(self, x: Points | None = None, y: Points | None = None) -> Cost:
        """Between other points of both sides, sharded like these: another Sharded. With one side given: the cost between these points of
        this rank and all points of the other side, which are gathered."""
        if x is not None and y is not None:
            return Sharded(self.pieces.cost.at(x=x, y=y), self.ranks.group.process_group, self.layout)
        return self.pieces.gathered(COLUMNS).at(x=x) if x is not None else self.pieces.gathered(ROWS).at(y=y)

    def part(self, rows: Index, cols: Index) -> Cost:
        """Slices count all points of a side, which are gathered once; indices (k,) must be of this rank's points."""
        named = ((ROWS, rows), (COLUMNS, cols))
        rows, cols = (z if isinstance(z, slice) else z - (self.ranks.slice(side).start or 0) for side, z in named)
        return self.pieces.gathered(*(side for side, z in named if isinstance(z, slice))).part(rows, cols)

    def strips(self, dim: int = -2) -> Iterator[tuple[slice, Cost]]:
        """Of this rank's rows, or columns for dim = -1; the slices count all points."""
        side, other = (ROWS, COLUMNS) if dim == -2 else (COLUMNS, ROWS)
        start, piece = self.ranks.slice(side).start or 0, self.pieces.gathered(other)
        for window, part in piece.strips(dim) if piece.shape[dim] else ():
            yield slice(start + window.start, start + window.stop), part

    def sample(self, limit: int = 256, problems: int = 4) -> Tensor:
        """The same entries as of the cost in one place, on every rank."""
        inputs = list(self.inputs.values())
        with torch.no_grad():
            for side, sizes in enumerate(self.ranks.sizes):
                step = -(-self.shape[side - 2] // limit)
                if sizes is None:
                    inputs = [z[..., ::step] for z in inputs]  # a matrix
                    continue
                firsts = [-self.ranks.slice(side, rank).start % step for rank in range(len(sizes))]
                taken = [len(range(first, size, step)) for first, size in zip(firsts, sizes, strict=True)]
                for i, z in enumerate(inputs):
                    if self.pieces.sides[i] == side:
                        inputs[i] = self.ranks.group.gather(z.detach()[..., firsts[self.ranks.rank] :: step, :], taken, -2)
            return self.pieces.cost.of(inputs).sample(limit, problems)

    def scale(self, kind: str) -> Tensor:
        if kind not in SCALES:
            raise errors.unknown("kind", kind, SCALES)
        if kind == "median":
            raise errors.ProblemError('the "median" of a cost that ranks share is not known: eps=("std", ...), or another scale.')
        check_cost(self)
        self.ranks.group.exchange(None)  # a rank that has just failed says so here, before points travel
        kinds = ("max",) if kind == "max" else ("mean", "std")
        with torch.no_grad():
            rows = [self.pieces.gathered(COLUMNS)] if self.layout == "replicated" else (cost for _, cost in self.pieces.ring(COLUMNS))
            own = [(float(z.shape.numel()), *(float(z.scale(name)) for name in kinds)) for z in rows if z.shape.numel()]
        found = self.ranks.group.exchange(own)
        if kind == "max":
            return torch.tensor(max((top for pieces in found for _, top in pieces), default=-math.inf), dtype=torch.float64)
        count, mean, total = merged((count, mean, count * std**2) for pieces in found for count, mean, std in pieces)
        number = mean if kind == "mean" else math.sqrt(total / count) if count else math.nan
        return torch.tensor(number, dtype=torch.float64)

    # For the communicator.

    def local_rows(self) -> Cost:
        """The cost between this rank's rows and all columns, differentiable in every rank's points when each rank works on its rows."""
        columns = [self.ranks.replicate(self.ranks.gather(z, COLUMNS, -2)) for z, side in self.pieces.inputs if side == COLUMNS]
        return self.pieces.with_points(COLUMNS, columns)

    def largest(self, problem: Problem) -> Problem:
        rows, columns = self.ranks.sizes
        m = self.shape[-1] if columns is None or self.layout == "replicated" else max(columns)
        return self.pieces.zeros(problem, max(rows or [self.shape[-2]]), m)

    def bind(self, problem: Problem, bind_piece: Callable[[Problem], Geometry]) -> Geometry:
        return (Ring if self.layout == "ring" else Replicated)(problem, bind_piece, self.pieces)


def _localize(cost: Cost, a: Any, b: Any) -> tuple[Cost, Any, Any]:
    """What a problem is given, with DTensors as this rank's shards."""
    if "torch.distributed.tensor" not in sys.modules:
        return cost, a, b
    return cost if mesh_of(cost) is None else Sharded(cost), local("a", a, -1), local("b", b, -1)


communicator.localize = _localize


def _sides(cost: Cost) -> list[int]:
    """The side that each input belongs to: points x or y, or the rows of a matrix."""
    sides = [side for side in cost.sides or () if side is not None]
    if len(sides) != len(cost.inputs):
        raise errors.ProblemError(
            f"a cost of kind {type(cost).__name__} with inputs {', '.join(cost.inputs)} cannot be shared over ranks: known are costs "
            "between clouds x and y, sums of them, and a matrix."
        )
    return sides


def _kind(cost: Cost) -> str:
    return " + ".join(f"{weight} {_kind(term)}" for weight, term in cost.terms) if isinstance(cost, Sum) else type(cost).__name__


def _form(z: Tensor) -> tuple[Any, ...]:
    """What must be the same of the points on all ranks: all but their number."""
    return tuple(z.shape[:-2]), z.shape[-1], z.dtype, z.device.type, z.requires_grad
