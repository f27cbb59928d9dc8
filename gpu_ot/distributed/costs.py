"""A cost whose points are shared out over the ranks of a process group."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..communicator import COLUMNS, ROWS, SHARE, is_dtensor, local
from ..costs import Cost, Index, Points, Sum
from ..problem import check_cost
from .ranks import Ranks, Shares

LAYOUTS = ("auto", "replicated", "ring")

#: Up to so many bytes "auto" holds all column points on every rank: a million points of a thousand float32 numbers.
REPLICATED_BYTES = 2**32


class Sharded(Cost):
    """The cost between all ranks' points, of which this process holds its own: C_ij for x the ranks' x, one after the other, and y alike.

    cost    this rank's own: SqEuclidean(x_local, y_local), any other cost between clouds or sum of them; or a Matrix whose rows
            are this rank's and whose columns are everyone's. Shares may be of any size, also empty. DTensors are taken as they are, if
            they are sharded by points.
    group   a process group or one-dimensional DeviceMesh; the default group when left out, and without any, this process alone.
    layout  "replicated": every rank holds all y and its own x; an iteration sends one number for each column, twice, and one for each
            row. "ring": every rank holds its own x and y, and the shares of points go round twice an iteration while they are worked on;
            memory falls as 1 / ranks. "auto": the first while y takes no more than 4 GiB.

    `shape` is that of the whole. Made, solved and differentiated by all ranks of the group together, in the same order; every rank
    gets the same Solution, to the bit, whose potentials and marginals are whole. Points, weights, products with the plan and gradients
    are each rank's share: the gradient in x_local is the derivative of the one value, which all ranks hold. (DDP divides gradients by
    the number of ranks: multiply the loss by it there.) Ranks must run the same build on the same kind of machine: they decide alike
    because their numbers are alike.

    Raises ProblemError, on every rank, where one's cost does not fit the others'. RankFailed where one ends.
    """

    def __init__(self, cost: Cost, group: Any = None, layout: str = "auto") -> None:
        ranks = Ranks(_group_of(cost, group))
        cost = localized(cost)
        self.cost, self._wholes = cost, dict[int, tuple[Tensor, ...]]()
        self._shares = Shares(ranks, (None, None))
        sides: list[int | None] = []
        told: list[Any] = []

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
            told.extend(ranks.exchange(tuple(cost.shape[-2:])))

        ranks.meet()
        forms = {f"the form of {name}": _form(z) for name, z in cost.inputs.items()}
        ranks.together(check, {"layout": layout, "the kind of cost": _kind(cost), **forms})
        rows, columns = ([shape[side] for shape in told] for side in (ROWS, COLUMNS))
        if COLUMNS not in sides and len(set(columns)) > 1:
            raise errors.ranks_differ("the number of columns of a matrix", 0, f"{columns[0]}", *_odd(columns))
        self._shares = Shares(ranks, (rows, columns if COLUMNS in sides else None))
        self._sides, self.symmetric = sides, cost.symmetric
        size = sum(z.numel() * z.itemsize // max(1, z.shape[-2]) for z, side in self.sided if side == COLUMNS)
        self.layout = layout if layout != "auto" else "ring" if size * self.shape[-1] > REPLICATED_BYTES else "replicated"

    @property
    def ranks(self) -> Shares:
        return self._shares

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.cost.inputs

    @property
    def shape(self) -> torch.Size:
        sizes = self.ranks.sizes
        n, m = (self.cost.shape[side - 2] if sizes[side] is None else sum(sizes[side] or ()) for side in (ROWS, COLUMNS))
        return torch.Size((*self.cost.shape[:-2], n, m))

    @property
    def points(self) -> tuple[Points, Points]:
        """This rank's points."""
        return self.cost.points

    @property
    def depth(self) -> int:
        return self.cost.depth

    @property
    def T(self) -> Cost:
        raise errors.ProblemError("a cost that ranks share is not turned: swap x and y.")

    def within(self, side: int) -> Sharded:
        return Sharded(self.cost.within(side), self.ranks.ranks.group, self.layout)

    def typical(self, problem: Any) -> Any:
        from .geometry import largest

        return largest(problem)

    def geometry(self, problem: Any, bind: Any) -> Any:
        from .geometry import share_out

        return share_out(problem, bind)

    def describe(self) -> str:
        rows, columns = (size if size is None else "+".join(map(str, size)) for size in self.ranks.sizes)
        about = "each holds its rows and all columns" if self.layout == "replicated" else "shares of points go round"
        return f'rows {rows}, columns {columns or "whole"} on the ranks, layout "{self.layout}": {about}'

    def dense(self) -> Tensor:
        raise NotImplementedError(
            "the n-by-m array of a cost that ranks share is on none of them, nor are its derivatives: multiply the plan, or detach it."
        )

    def of(self, inputs: Iterable[Tensor]) -> Sharded:
        other = copy.copy(self)
        other.cost, other._wholes = self.cost.of(inputs), {}
        return other

    def at(self, x: Points | None = None, y: Points | None = None) -> Cost:
        """Between other points of both sides, shared like these: another Sharded. Of one side: the cost of this rank's own new points to
        all points of the other side, which are gathered."""
        if x is not None and y is not None:
            return Sharded(self.cost.at(x=x, y=y), self.ranks.ranks.group, self.layout)
        return self.piece(COLUMNS).at(x=x) if x is not None else self.piece(ROWS).at(y=y)

    def part(self, rows: Index, cols: Index) -> Cost:
        """Slices count all points of a side, which are gathered once; indices (k,) are of this rank's own points, see `Alone.own`."""
        wholes = [side for side, index in ((ROWS, rows), (COLUMNS, cols)) if isinstance(index, slice)]
        rows, cols = (z if isinstance(z, slice) else z - (self.ranks.slice(side).start or 0) for side, z in ((ROWS, rows), (COLUMNS, cols)))
        return self.piece(*wholes).part(rows, cols)

    def strips(self, dim: int = -2) -> Iterator[tuple[slice, Cost]]:
        """Of this rank's own rows, or columns; the slices count all points."""
        side = ROWS if dim == -2 else COLUMNS
        start = self.ranks.slice(side).start or 0
        piece = self.piece(COLUMNS if side == ROWS else ROWS)
        if not piece.shape[dim]:
            return
        for window, part in piece.strips(dim):
            yield slice(start + window.start, start + window.stop), part

    def rows(self) -> Cost:
        """The cost between this rank's rows and all columns, differentiable in every rank's points for work of which each does its rows."""
        whole = (self.ranks.apart(self.ranks.whole(z, side, -2)) if side == COLUMNS else z for z, side in self.sided)
        return self.cost.of(whole)

    def piece(self, *wholes: int) -> Cost:
        """The cost between this rank's points, and all of those on the sides `wholes`: detached, where they are gathered."""
        inputs = list(self.cost.inputs.values())
        for side in wholes:
            if self.ranks.sizes[side] is None:
                continue
            if side not in self._wholes:
                self._wholes[side] = tuple(self._gathered(z, side, -2) for z, own in self.sided if own == side)
            gathered = iter(self._wholes[side])
            inputs = [next(gathered) if own == side else z for z, own in zip(inputs, self._sides, strict=True)]
        return self.cost.of(inputs)

    def sample(self, limit: int = 256, problems: int = 4) -> Tensor:
        """The same entries as of the cost in one place, on every rank."""
        inputs = list(self.cost.inputs.values())
        with torch.no_grad():
            for side in (ROWS, COLUMNS):
                size, own = self.shape[side - 2], self.ranks.slice(side)
                step = -(-size // limit)
                if own.start is None:
                    inputs = [z[..., ::step] for z in inputs]  # a matrix
                    continue
                first = (-own.start) % step
                taken = [len(range((-self.ranks.slice(side, r).start) % step, n, step)) for r, n in enumerate(self.ranks.sizes[side] or ())]
                for i, z in enumerate(inputs):
                    if self._sides[i] == side:
                        inputs[i] = self.ranks.ranks.gather(z.detach()[..., first::step, :], taken, -2)
            return self.cost.of(inputs).sample(limit, problems)

    def scale(self, kind: str) -> Tensor:
        if kind == "median":
            raise errors.ProblemError('the "median" of a cost that ranks share is not known: eps=("std", ...), or another scale.')
        found = (0.0, 0.0, 0.0, -math.inf)
        check_cost(self)  # before points travel
        self.ranks.ranks.exchange(None)  # whoever has just failed is met here, before points travel
        with torch.no_grad():
            for _, piece in self.visits(ROWS):
                if not piece.shape.numel():
                    continue
                count = float(piece.shape.numel())
                one = [float(piece.scale(each)) for each in (("mean", "std") if kind != "max" else ("max",))]
                if kind == "max":
                    found = (*found[:3], max(found[3], one[0]))
                else:
                    found = (*_pooled(found[0], found[1], found[2], count, one[0], count * one[1] ** 2), found[3])
        told = self.ranks.ranks.exchange(found)
        if kind == "max":
            return torch.tensor(max(top for *_, top in told), dtype=torch.float64)
        count, mean, total = told[0][:3]
        for other in told[1:]:
            count, mean, total = _pooled(count, mean, total, *other[:3])
        number = mean if kind == "mean" else math.sqrt(total / count) if count else math.nan
        return torch.tensor(number, dtype=torch.float64)

    def visits(self, side: int) -> Iterator[tuple[slice, Cost]]:
        """(slice, piece): the cost between this rank's points of one side and, in turn, all of the other: at once where every rank holds
        them, or as they come round. To be taken to its end."""
        other = COLUMNS if side == ROWS else ROWS
        if self.layout == "replicated":
            yield slice(0, self.shape[other - 2]), self.piece(other)
            return
        mine = [z.detach() for z, own in self.sided if own == other]
        for owner, points in self.ranks.ranks.round(mine, self.ranks.sizes[other] or ()):
            yield self.ranks.slice(other, owner), self.with_points(other, points)

    def with_points(self, side: int, points: Iterable[Tensor]) -> Cost:
        """The cost between this rank's points of the other side and these."""
        given = iter(points)
        return self.cost.of(next(given) if own == side else z.detach() for z, own in self.sided)

    @property
    def sided(self) -> list[tuple[Tensor, int | None]]:
        """The inputs, each with the side that it belongs to."""
        return list(zip(self.cost.inputs.values(), self._sides, strict=True))

    def _gathered(self, z: Tensor, side: int, dim: int) -> Tensor:
        return self.ranks.ranks.gather(z.detach(), self.ranks.sizes[side] or (), dim)


SHARE[:] = [Sharded]


def localized(cost: Cost) -> Cost:
    """The cost of this rank's shares, where the inputs are DTensors."""
    if not any(is_dtensor(z) for z in cost.inputs.values()):
        return cost
    return cost.of(local(name, z) for name, z in cost.inputs.items())


def _group_of(cost: Cost, group: Any) -> Any:
    meshes = [z.device_mesh for z in cost.inputs.values() if is_dtensor(z)]  # type: ignore[attr-defined]
    return meshes[0] if group is None and meshes else group


def _sides(cost: Cost) -> list[int | None]:
    """The side that each input belongs to: points x or y, or the rows of a matrix."""
    if cost.sides is None or None in cost.sides:
        raise errors.ProblemError(
            f"a cost of kind {type(cost).__name__} with inputs {', '.join(cost.inputs)} cannot be shared over ranks: known are costs "
            "between clouds x and y, sums of them, and a matrix."
        )
    return list(cost.sides)


def _kind(cost: Cost) -> str:
    return " + ".join(f"{weight} {_kind(term)}" for weight, term in cost.terms) if isinstance(cost, Sum) else type(cost).__name__


def _form(z: Tensor) -> tuple[Any, ...]:
    """What must be the same of the points on all ranks: all but their number."""
    return tuple(z.shape[:-2]), z.shape[-1], z.dtype, z.device.type, z.requires_grad


def _odd(values: list[int]) -> tuple[int, str]:
    """The first rank that differs, and what it has."""
    rank = next(rank for rank, value in enumerate(values) if value != values[0])
    return rank, str(values[rank])


def _pooled(k: float, mean: float, total: float, k2: float, mean2: float, total2: float) -> tuple[float, float, float]:
    """Chan, Golub and LeVeque 1983, equation (2.1)."""
    if not k or not k2:
        return (k2, mean2, total2) if not k else (k, mean, total)
    gap = mean2 - mean
    return k + k2, mean + gap * k2 / (k + k2), total + total2 + gap * gap * k * k2 / (k + k2)
