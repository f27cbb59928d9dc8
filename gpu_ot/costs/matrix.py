"""Costs that are numbers already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..communicator import ROWS
from .base import Cost, Index, take


@dataclass(frozen=True, eq=False)
class Matrix(Cost):
    """A cost the user has already computed: M (*batch, n, m). +inf forbids a pair."""

    M: Tensor
    stored = True
    sides = (ROWS,)  # ranks that share it hold whole rows

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"M": self.M}

    @property
    def shape(self) -> torch.Size:
        return self.M.shape

    def dense(self) -> Tensor:
        return self.M

    def of(self, inputs: Iterable[Tensor]) -> Matrix:
        return Matrix(*inputs)

    def part(self, rows: Index, cols: Index) -> Matrix:
        return Matrix(take(take(self.M, rows, -2), cols, -1))

    @property
    def T(self) -> Matrix:
        return Matrix(self.M.mT)
