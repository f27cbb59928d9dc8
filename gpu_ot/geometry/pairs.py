"""Costs that fold in at most three features, from the pairs of tiles that matter, on any device: the twin of `multiscale` without numba."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from . import tilepairs
from .coordinates import coordinates
from .products import kernels_refused
from .swept import Swept

#: On the way to the target a tile of columns is one point, where it is no wider than so many deviations of the kernel.
SMALL = 0.5


class Pairs(Swept):
    """`softmin` and `apply` with at most `part` of any sum left out: float32 in the kernel, float64 by operations of torch.

    omitted   the part of a sum that was left out at most, in the last sweep.
    pairs     pairs of points taken in the last sweep, with those of padded tiles.
    """

    def __init__(self, problem: Problem, part: float) -> None:
        super().__init__(problem)
        self.part = part
        self.dtype = torch.float64 if kernels_refused(problem.a.device) else torch.float32
        self.shifts, self.points = coordinates(problem)
        self.orders = tuple(map(tilepairs.curve, self.points))
        self.shared: dict[str, Any] = {"omitted": 0.0, "pairs": 0, "eps": math.nan}

    @property
    def omitted(self) -> float:
        return float(self.shared["omitted"])

    @property
    def pairs(self) -> int:
        return self.shared["pairs"]

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        return self.shifts

    def updated(self, g: Tensor, log_w: Tensor | None, eps: float, damping: float) -> Tensor:
        (own, other), (rows, columns) = self._sides(eps)
        L = (g.detach() - other) / eps
        L = columns.levels(L if log_w is None else torch.where(log_w > -math.inf, L + log_w, -math.inf))
        while eps > self.problem.eps and len(columns.low) > 1 and columns.widest <= SMALL:
            columns, L = columns.coarser(L)
        logs, _ = self._sums(rows, columns, L, None)
        return (own - eps * logs) / damping

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        (own, other), (rows, columns) = self._sides(eps)
        logs, means = self._sums(rows, columns, columns.levels((h.detach() - other) / eps), columns.padded(v.detach().to(h)))
        assert means is not None
        mass = (logs + (k - own) / eps).exp()
        return torch.where(mass > 0, mass, 0.0).unsqueeze(-1) * means

    def _sums(self, rows: tilepairs.Tiled, columns: tilepairs.Tiled, L: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As `tilepairs.sums`, where points stood."""
        found = tilepairs.sums(rows, columns, L, v, self.part)
        self.shared.update(omitted=found.omitted, pairs=found.pairs)
        logs = torch.empty_like(found.logs).index_copy_(0, rows.order, found.logs)
        return logs, None if found.means is None else torch.empty_like(found.means).index_copy_(0, rows.order, found.means)

    def _sides(self, eps: float) -> tuple[tuple[Tensor, Tensor], tuple[tilepairs.Tiled, tilepairs.Tiled]]:
        """The shifts and the tiles of this side and the other."""
        if self.shared["eps"] != eps:
            each = zip(self.points, self.orders, strict=True)
            self.shared.update(eps=eps, tiles=tuple(tilepairs.tiled(z / math.sqrt(eps), order) for z, order in each))
        rows, columns = self.shared["tiles"]
        alpha, beta = self.shifts
        return ((beta, alpha), (columns, rows)) if self._turned else ((alpha, beta), (rows, columns))
