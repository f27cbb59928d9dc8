"""Costs that fold in one feature, of many points on a line: sums of Gaussians over cells, exact to rounding, without pairs."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import compiled
from ..problem import Problem
from . import mesh, tiles
from .chunked import Chunked
from .protocol import Geometry
from .swept import pull_by_apply

#: Terms below exp(-DROP) of the largest, divided by their number, are left out of a sum.
DROP = 36.0


def refuse(problem: Problem) -> str | None:
    """Why these problems are not of points on a line, or None."""
    cost = problem.cost
    if problem.a.device.type != "cpu":
        return f"its tensors are on {problem.a.device}, and this is machine code of the CPU"
    if not cost.folds:
        return f"the cost is {cost.describe()}, and its sums are of Gaussian kernels alone"
    if (d := mesh.features(problem)) != 1:
        return f"its points have {d} features, and a line has one"
    return compiled.refused()


def memory(problem: Problem) -> int:
    """Bytes of both sides' points, in order, with what is kept beside them."""
    return 64 * (problem.a.numel() + problem.b.numel())


class Line(Geometry):
    """`softmin` and `apply` of a batch of problems, C_ij = own_i + other_j + (u_i - v_j)^2 / 2."""

    dtype = torch.float64

    def __init__(self, problem: Problem) -> None:
        folded = problem.cost.to(torch.float64).fold()  # alpha and u^2 cancel: what float32 loses of them would stay
        assert folded is not None
        self.inputs, self.problem, self._turned = tuple(folded), problem, False
        self.shared: dict[str, Any] = {"eps": math.nan}

    @property
    def T(self) -> Line:
        other, (alpha, beta, u, v) = copy.copy(self), self.inputs
        other.inputs, other._turned = (beta, alpha, v, u), not self._turned
        return other

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        return -eps * self._sums(h, None, eps)[0]

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        logs, means = self._sums(h, v, eps)
        mass = (logs + k / eps).exp()
        return torch.where(mass > 0, mass, 0.0).unsqueeze(-1) * means

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """Every pair."""
        return Chunked(self.problem.cost.T if self._turned else self.problem.cost).plan(k, h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return pull_by_apply(self, k, h, eps, w)

    def _sums(self, h: Tensor, v: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """log sum_j exp((h_j - C_ij) / eps) (*batch, n), and the means of v (*batch, m, c) with these weights."""
        batch = torch.broadcast_shapes(h.shape[:-1], self.inputs[0].shape[:-1], () if v is None else v.shape[:-2])
        n, m = self.inputs[0].shape[-1], h.shape[-1]
        v = h.new_empty(*batch, m, 0) if v is None else v.detach().to(h).expand(*batch, m, v.shape[-1])
        levels, factors = h.detach().expand(*batch, m).reshape(-1, m).numpy(), v.reshape(batch.numel(), m, v.shape[-1]).numpy()
        logs, means = np.empty((len(levels), n)), np.empty((len(levels), n, v.shape[-1]))
        for p, sides in enumerate(self._sides(eps, batch)):
            rows, columns = sides[::-1] if self._turned else sides
            _one(rows, columns, levels[p], factors[p], eps, logs[p], means[p])
        return torch.from_numpy(logs).view(*batch, n), torch.from_numpy(means).view(*batch, n, v.shape[-1])

    def _sides(self, eps: float, batch: torch.Size) -> list[tuple[_Side, _Side]]:
        """The rows and the columns of each problem, in cells for this eps."""
        if self.shared["eps"] != eps or self.shared["batch"] != batch:
            alpha, beta, u, v = (self.T if self._turned else self).inputs
            points = [z.detach().double().expand(*batch, *z.shape[-2:]).reshape(-1, z.shape[-2]).numpy() for z in (u, v)]
            shifts = [z.detach().double().expand(*batch, z.shape[-1]).reshape(-1, z.shape[-1]).numpy() for z in (alpha, beta)]
            width = math.sqrt(2 * eps)
            rows, columns = ([_Side(x, s, width) for x, s in zip(*both, strict=True)] for both in zip(points, shifts, strict=True))
            self.shared.update(eps=eps, batch=batch, sides=list(zip(rows, columns, strict=True)))
        return self.shared["sides"]


class _Side:
    """One side of a problem: its points in order, and what its costs add to the squares."""

    def __init__(self, points: np.ndarray, shift: np.ndarray, width: float) -> None:
        from ..compiled.line import Cells

        self.order = np.argsort(points, kind="stable")
        x = points[self.order]
        self.shift = shift - points**2 / 2
        at = np.floor((x - x[0]) / width)
        starts = np.concatenate(([0], np.flatnonzero(np.diff(at)) + 1, [len(x)]))
        self.cells = Cells(x, starts, x[0] + (at[starts[:-1]] + 0.5) * width)


def _one(rows: _Side, columns: _Side, h: np.ndarray, v: np.ndarray, eps: float, logs: np.ndarray, means: np.ndarray) -> None:
    from ..compiled import line

    L = ((h - columns.shift) / eps)[columns.order]
    top = np.empty(len(columns.cells.centres))
    line.tops(columns.cells, L, top)
    F = np.ascontiguousarray(v[columns.order].T)
    found, products = np.empty(len(rows.order)), np.empty((len(rows.order), len(F)))
    count, drop = len(rows.cells.centres), DROP + math.log(len(L))
    before, after = np.maximum.accumulate(top), np.maximum.accumulate(top[::-1])[::-1].copy()
    arguments = rows.cells, columns.cells, L, top, before, after, 0.5 / eps, math.sqrt(2 * eps), drop, F, found, products
    tiles.each(tiles.shares(count), line.line_sums, *arguments)
    logs[rows.order], means[rows.order] = found, products
    logs -= rows.shift / eps
