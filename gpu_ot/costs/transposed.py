"""The other side of a cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import Axis, Cost, Folded, Index


class Transposed(Cost):
    """A cost seen from the other side, for kinds that do not say how they turn."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.stored, self.backend, self.symmetric = cost.stored, cost.backend, cost.symmetric
        self.sides = None if cost.sides is None else tuple(None if side is None else 1 - side for side in cost.sides)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.cost.inputs

    @property
    def shape(self) -> torch.Size:
        *batch, n, m = self.cost.shape
        return torch.Size((*batch, m, n))

    def dense(self) -> Tensor:
        return self.cost.dense().mT

    def of(self, inputs: Iterable[Tensor]) -> Cost:
        return self.cost.of(inputs).T

    def part(self, rows: Index, cols: Index) -> Cost:
        return self.cost.part(cols, rows).T

    def fold(self) -> Folded | None:
        folded = self.cost.fold()
        return None if folded is None else folded.T

    @property
    def folds(self) -> bool:
        return self.cost.folds

    def formula(self, i: Axis, j: Axis) -> Any:
        return self.cost.formula(j, i)

    @property
    def depth(self) -> int:
        return self.cost.depth

    @property
    def T(self) -> Cost:
        return self.cost
