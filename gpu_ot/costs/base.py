"""The protocol of a cost: what it costs to move a unit of mass from x_i to y_j, for all pairs of one problem or of a batch.

The package calls these methods and never tests for a class, so a user's own cost serves wherever ours do:

    class Minkowski(Cost):
        sides = (ROWS, COLUMNS)                                  # may: blocks, other points, self terms, ranks

        def __init__(self, x, y): self.x, self.y = x, y
        inputs = property(lambda self: {"x": self.x, "y": self.y})
        shape = property(lambda self: torch.Size((*self.x.shape[:-1], self.y.shape[-2])))
        def dense(self): return torch.cdist(self.x, self.y, p=3)
        def of(self, inputs): return Minkowski(*inputs)
        def formula(self, i, j): return ((i(self.x) - j(self.y)).abs() ** 3).sum(-1) ** (1 / 3)  # may: KeOps

A cost must write `inputs`, `shape`, `dense` and `of`. The stored backends, every gradient, scales and plans need no more.
"chunked" takes it in blocks if it has `part`, or `sides` where a pair's cost depends on its own two points alone. "triton" streams a
cost that has `fold`, whose gradients need no matrix. "keops" compiles one that has a `formula`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from ..communicator import ALONE, COLUMNS, ROWS, Alone
from ..vectors import in_full_precision, vector_dtype
from . import scale


class Folded(NamedTuple):
    """C_ij = alpha_i + beta_j - <u_i, v_j>: a matmul-shaped kernel needs nothing else."""

    alpha: Tensor  # (*batch, n)
    beta: Tensor  # (*batch, m)
    u: Tensor  # (*batch, n, d)
    v: Tensor  # (*batch, m, d)

    @property
    def T(self) -> Folded:
        return Folded(self.beta, self.alpha, self.v, self.u)


#: Numbers of a block (32 MiB in float64), and of the entries that a median is taken over.
BLOCK, SORTED = 2**22, 2**24

#: Rows or columns: a slice, or int64 indices (k,), or (*batch, k) for a choice of each problem's own.
Index = slice | Tensor
#: Points (*batch, n, d), or one such tensor for each term of a sum.
Points = Tensor | tuple[Tensor, ...]


class Cost:
    """A cost bound to its two sides, see above. `shape` is (*batch, n, m); `dense()` is that array, differentiable in the inputs."""

    #: Whether the entries are in memory already, so that `dense` costs nothing. Only such costs may forbid pairs, by +inf.
    stored: bool = False
    #: The backend it is written for, by name: "auto" takes that one, and others that stream refuse the cost. None for any.
    backend: str | None = None
    #: The side of each input: ROWS for points x (*batch, n, d), COLUMNS for y (*batch, m, d), None for a parameter. For costs whose C_ij
    #: depends on x_i, y_j and parameters alone, which get `part`, `points` and `at` from it; None for others.
    sides: tuple[int | None, ...] | None = None
    #: Whether C_ij = C_ji between points and themselves.
    symmetric: bool = False
    #: The communicator of the ranks that hold its points: of this process, unless they are sharded, see distributed/costs.py.
    ranks: Alone = ALONE

    # What every cost must write.

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors the cost is made of, by the names that errors use."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def dense(self) -> Tensor:
        raise NotImplementedError

    def of(self, inputs: Iterable[Tensor]) -> Cost:
        """The same cost of other tensors, which come in the order of `inputs`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is bound to other tensors: it has no of().")

    # What it may write, to get more.

    def part(self, rows: Index, cols: Index) -> Cost:
        """The same cost between some of its rows and some of its columns: slices, or indices (k,) or (*batch, k)."""
        if (sides := self.sides) is None:
            kind = type(self).__name__
            raise NotImplementedError(f"{kind} does not say how to take rows and columns of it: it has no part() and no sides.")
        index = rows, cols
        return self._between([z if side is None else take(z, index[side], -2) for z, side in zip(self.inputs.values(), sides, strict=True)])

    def fold(self) -> Folded | None:
        """The folded form, or None when the cost has none."""
        return None

    @property
    def folds(self) -> bool:
        """Whether `fold` gives a form. Kinds that know it without numbers say so."""
        return self.fold() is not None

    def formula(self, i: Axis, j: Axis) -> Any:
        """The cost as a LazyTensor of KeOps: `i(x)` and `j(y)` are points as lazy tensors over rows and over columns."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    @property
    def points(self) -> tuple[Points, Points]:
        """The points of the two sides, (x, y); for a sum over several clouds, two tuples with one tensor a term."""
        sides = self.sides or ()
        if sides.count(ROWS) != 1 or sides.count(COLUMNS) != 1:
            raise errors.ProblemError(
                f"a cost of kind {type(self).__name__} has no points, so what moving or adding some would cost is not known. "
                "Write it as a cost between clouds: SqEuclidean(x, y), or Formula(function, x, y)."
            )
        inputs = list(self.inputs.values())
        return inputs[sides.index(ROWS)], inputs[sides.index(COLUMNS)]

    def at(self, x: Points | None = None, y: Points | None = None) -> Cost:
        """The same cost between other points, (*batch, n, d) and (*batch, m, d), of any number; None keeps a side as it is. Points
        without batch axes are shared by the problems of a batch.

        A sum over several clouds takes a tuple, one tensor a term. Raises ProblemError for a matrix, which has no points.
        """
        pair = []
        for name, new, old in zip("xy", (x, y), self.points, strict=True):
            z = old if new is None else new[0] if isinstance(new, tuple) and len(new) == 1 else new
            if isinstance(z, tuple) or isinstance(old, tuple):
                raise errors.ProblemError(f"{name} holds the points of {len(z)} terms, and this cost has one: pass a tensor.")
            if z.ndim < 2 or z.shape[-1] != old.shape[-1]:
                raise errors.wrong_shape(name, z.shape, f"(*batch, k, {old.shape[-1]}), points like those of the cost")
            pair.append(z.to(old.dtype))
        return self._between([z if side is None else pair[side] for z, side in zip(self.inputs.values(), self.sides or (), strict=True)])

    @property
    def depth(self) -> int:
        """Numbers formed per pair: a formula may hold all coordinates of every difference, torch's own distances do not."""
        return 1

    @property
    def T(self) -> Cost:
        """Rows for columns."""
        from .transposed import Transposed

        return Transposed(self)

    # What follows.

    def to(self, dtype: torch.dtype) -> Cost:
        inputs = self.inputs.values()
        for z in inputs:
            if z.dtype != dtype:
                return self.of([z.to(dtype) for z in inputs])
        return self

    def within(self, side: int) -> Cost:
        """The cost from one side's points to themselves. Raises ProblemError for a cost without points."""
        points = self.points[side]
        return self.at(x=points, y=points)

    @property
    def cuts(self) -> bool:
        """Whether `part` is known."""
        try:
            self.part(slice(0, 1), slice(0, 1))
        except NotImplementedError:
            return False
        return True

    def entries(self, rows: Index, cols: Index) -> Tensor:
        """The costs between some rows and some columns, cut out of the whole array where `part` is not known."""
        return self.part(rows, cols).dense() if self.cuts else take(take(self.dense(), rows, -2), cols, -1)

    def strips(self, dim: int = -2) -> Iterator[tuple[slice, Cost]]:
        """(rows, the part of the cost between those rows and all columns), each of about BLOCK numbers or a single row; or columns and
        all rows, for dim = -1. All at once where `part` is not known."""
        size, across = self.shape[dim], self.shape[-3 - dim]
        step = max(1, BLOCK // (max(1, self.shape[:-2].numel()) * across * self.depth))
        if step >= size or not self.cuts:
            yield slice(0, size), self
            return
        for i in range(0, size, step):
            window = slice(i, min(i + step, size))
            yield window, self.part(window, slice(None)) if dim == -2 else self.part(slice(None), window)

    def sample(self, limit: int = 256, problems: int = 4) -> Tensor:
        """(*batch', n', m'): the costs between at most `limit` evenly strided rows and columns, detached; of a batch, its axes made one
        and at most `problems` evenly strided ones."""
        rows, cols = (every(size, limit) for size in self.shape[-2:])
        with torch.no_grad():
            if (some := self.some(problems)) is not None:
                return some.entries(rows, cols)
            return self.entries(rows, cols).flatten(0, -3)[every(self.shape[:-2].numel(), problems)]

    @in_full_precision
    def scale(self, kind: str) -> Tensor:
        """The "std", "mean", "median" or "max" of all finite entries of all problems together: 0-d, float64, detached; NaN without any.

        The standard deviation (divided by the count) and mean of a cost that folds are exact, from O((n + m) d^2) operations on its
        clouds; everything else takes one pass over blocks of at most 2^22 numbers. The median is the lower of the middle two, exact
        for up to 2^24 entries and otherwise that of an evenly strided sample of about as many. Raises ProblemError for another kind.
        """
        if kind not in scale.SCALES:
            raise errors.unknown("kind", kind, scale.SCALES)
        with torch.no_grad():
            if kind == "median":
                small = self.shape.numel() <= SORTED
                return scale.median(torch.cat([C.flatten() for C in self._blocks()]) if small else self._many())
            if kind == "max":
                return scale.largest(self._blocks())
            folded = self._folded_in_short()
            mean, variance = scale.pooled(self._blocks()) if folded is None else scale.moments(*folded)
            return mean if kind == "mean" else variance.sqrt()

    def some(self, problems: int) -> Cost | None:
        """At most `problems` of a batch, as a batch with one axis; a single problem stays as it is. None where it is not known how."""
        batch = self.shape[:-2]
        if not batch:
            return self
        if (sides := self.sides) is None:
            return None
        chosen = every(batch.numel(), problems)
        return self.of(
            z if side is None else z.expand(*batch, *z.shape[-2:]).flatten(0, len(batch) - 1)[chosen]
            for z, side in zip(self.inputs.values(), sides, strict=True)
        )

    def __add__(self, other: Cost) -> Cost:
        from .sum import Sum

        return Sum(((1.0, self), (1.0, other)))

    def __rmul__(self, weight: float) -> Cost:
        from .sum import Sum

        return Sum(((weight, self),))

    __mul__ = __rmul__

    def geometry(self, problem: Any, bind: Callable[[Any], Any]) -> Any:
        """The cost of `problem` on a backend, of which `bind` makes a Geometry."""
        return bind(problem)

    def describe(self) -> str:
        """In words, for `explain`."""
        return "a matrix" if self.stored else "a cost that folds" if self.folds else "a cost that does not fold"

    # Its own.

    def _between(self, inputs: Sequence[Tensor]) -> Cost:
        """The same cost of these points; either side may lack batch axes that the other has."""
        sides = self.sides or ()
        clouds = [z for z, side in zip(inputs, sides, strict=True) if side is not None]
        try:
            batch = torch.broadcast_shapes(*(z.shape[:-2] for z in clouds))
        except RuntimeError:
            raise unmatched(clouds[0], clouds[-1]) from None
        return self.of(z if side is None else z.expand(*batch, *z.shape[-2:]) for z, side in zip(inputs, sides, strict=True))

    def _many(self) -> Tensor:
        """An evenly strided sample of about SORTED entries."""
        side = math.isqrt(SORTED // self.depth) if len(self.shape) == 2 else 1024
        size = self.depth * math.prod(min(k, side) for k in self.shape[-2:])
        return self.sample(side, max(1, SORTED // size))

    def _folded_in_short(self) -> Folded | None:
        """The folded form in float64, where its d^2 is less work than the n m pairs."""
        (n, m), folded = self.shape[-2:], self.fold()
        if folded is None or folded.u.shape[-1] * (n + m) > n * m:
            return None
        return self.to(vector_dtype(folded.u.device)).fold()

    def _blocks(self) -> Iterator[Tensor]:
        """All entries, in pieces of about BLOCK numbers."""
        return (block.dense() for _, strip in self.strips() for _, block in strip.strips(-1))


class Axis:
    """Points (k, d) as lazy tensors of KeOps over the rows of a formula (axis 0), or its columns (axis 1)."""

    def __init__(self, lazy_tensor: Callable[[Tensor], Any], axis: int) -> None:
        self.lazy_tensor, self.axis = lazy_tensor, axis

    def __call__(self, z: Tensor) -> Any:
        return self.lazy_tensor(z.contiguous().unsqueeze(1 - self.axis))


def unmatched(x: Tensor, y: Tensor) -> errors.ProblemError:
    return errors.wrong_shape("y", y.shape, f"(*batch, m, d) to match x with shape {errors.shape(x.shape)}")


def every(size: int, limit: int) -> slice:
    """At most `limit` of `size`, evenly strided."""
    return slice(None, None, -(-size // limit))


def take(z: Tensor, index: Index, dim: int) -> Tensor:
    """Some rows (dim = -2) or columns (-1) of z, whose last two axes these are."""
    if isinstance(index, slice):
        return z[..., index, :] if dim == -2 else z[..., index]
    if index.ndim == 1:
        return z.index_select(dim, index)
    batch = torch.broadcast_shapes(z.shape[:-2], index.shape[:-1])
    return z.expand(*batch, *z.shape[-2:]).take_along_dim(index.unsqueeze(-1 if dim == -2 else -2), dim)
