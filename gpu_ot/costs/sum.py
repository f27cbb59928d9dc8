"""Weighted sums of costs. A sum of costs that fold is again one of them, on concatenated features scaled by sqrt(weight)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..communicator import COLUMNS, ROWS
from .base import Axis, Cost, Folded, Index, Points


@dataclass(frozen=True, eq=False)
class Sum(Cost):
    """sum_k weight_k * cost_k, all over the same pairs. Written `0.01 * SqEuclidean(z_s, z_t) + 0.05 * SqEuclidean(l_s, l_t)`."""

    terms: tuple[tuple[float, Cost], ...]

    def __post_init__(self) -> None:
        flat: list[tuple[float, Cost]] = []
        for weight, cost in self.terms:
            flat += [(weight * w, c) for w, c in cost.terms] if isinstance(cost, Sum) else [(weight, cost)]
        known = [cost.sides for _, cost in flat if cost.sides is not None and (COLUMNS in cost.sides or len(flat) == 1)]
        sides = tuple(side for each in known for side in each) if len(known) == len(flat) else None
        for field, value in dict(terms=tuple(flat), sides=sides, symmetric=all(cost.symmetric for _, cost in flat)).items():
            object.__setattr__(self, field, value)
        for _, cost in flat[1:]:
            if cost.shape != self.shape:
                raise errors.wrong_shape("a term of the cost", cost.shape, f"{errors.shape(self.shape)} like its first term")

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {f"{name} of term {k}": z for k, (_, cost) in enumerate(self.terms) for name, z in cost.inputs.items()}

    @property
    def shape(self) -> torch.Size:
        return self.terms[0][1].shape

    def dense(self) -> Tensor:
        return _total(weight * cost.dense() for weight, cost in self.terms)

    def formula(self, i: Axis, j: Axis) -> Any:
        return _total(weight * cost.formula(i, j) for weight, cost in self.terms)

    def fold(self) -> Folded | None:
        folded = [(weight, cost.fold()) for weight, cost in self.terms]
        if any(part is None or weight < 0 for weight, part in folded):
            return None
        parts = [(weight, part) for weight, part in folded if part is not None]
        alpha, beta = (_total(weight * part[side] for weight, part in parts) for side in (ROWS, COLUMNS))
        u = torch.cat([weight**0.5 * part.u for weight, part in parts], -1)
        v = torch.cat([weight**0.5 * part.v for weight, part in parts], -1)
        return Folded(alpha, beta, u, v)

    @property
    def folds(self) -> bool:
        return all(cost.folds and not weight < 0 for weight, cost in self.terms)

    def of(self, inputs: Iterable[Tensor]) -> Sum:
        left = iter(inputs)
        return Sum(tuple((weight, cost.of([next(left) for _ in cost.inputs])) for weight, cost in self.terms))

    def part(self, rows: Index, cols: Index) -> Sum:
        return self._each(lambda cost: cost.part(rows, cols))

    def within(self, side: int) -> Sum:
        """Term by term, so that each term's points get their own gradient."""
        return self._each(lambda cost: cost.within(side))

    def some(self, problems: int) -> Sum | None:
        some = [(weight, cost.some(problems)) for weight, cost in self.terms]
        known = tuple((weight, cost) for weight, cost in some if cost is not None)
        return Sum(known) if len(known) == len(some) else None

    @property
    def T(self) -> Sum:
        return self._each(lambda cost: cost.T)

    @property
    def points(self) -> tuple[Points, Points]:
        sides = zip(*(cost.points for _, cost in self.terms), strict=True)
        x, y = (_one(tuple(z for z in side if isinstance(z, Tensor))) for side in sides)
        return x, y

    @property
    def depth(self) -> int:
        return max(cost.depth for _, cost in self.terms)

    def at(self, x: Points | None = None, y: Points | None = None) -> Sum:
        given = [self._spread(name, new, old) for name, new, old in zip("xy", (x, y), self.points, strict=True)]
        return Sum(tuple((weight, cost.at(*pair)) for (weight, cost), *pair in zip(self.terms, *given, strict=True)))

    def _each(self, change: Callable[[Cost], Cost]) -> Sum:
        return Sum(tuple((weight, change(cost)) for weight, cost in self.terms))

    def _spread(self, name: str, new: Points | None, old: Points) -> Sequence[Tensor | None]:
        """New points of one side, one for each term."""
        count = len(self.terms)
        if isinstance(new, tuple):
            if len(new) != count:
                raise errors.ProblemError(f"{name} holds the points of {len(new)} terms, and this cost is a sum of {count}.")
            return new
        if new is not None and isinstance(old, tuple):
            raise errors.ProblemError(
                f"this cost is a sum over {count} clouds of different points: pass {name} as a tuple, one tensor a term."
            )
        return [new] * count


def _one(points: tuple[Tensor, ...]) -> Points:
    """The points that all terms share, or each term's own."""
    first, *others = points
    return first if all(z is first or (z.shape == first.shape and torch.equal(z, first)) for z in others) else points


def _total(terms: Iterable[Any]) -> Any:
    first, *rest = terms
    return sum(rest, start=first)
