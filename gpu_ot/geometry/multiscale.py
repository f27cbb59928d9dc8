"""Costs that fold in at most three features, from the pairs of points that matter: exact to a given part of every sum, at any eps.

Where a blur reaches few points, almost all pairs add nothing. Which ones is proved from boxes and the potentials of the moment, in every
sweep anew: see `compiled.sparse`. The way there, at larger eps and before the first sweep at the target, goes by way of a mesh.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError
from ..problem import Problem
from . import mesh
from .pairs import Pairs
from .protocol import Geometry
from .several import bind_each
from .swept import Swept
from .tiles import each, shares

#: The part of a sum that may be left out, where no tolerance says how much, and the part of the tolerance that it is.
PART, SHARE = 1e-13, 0.05
#: Deviations of the kernel that count, both sides together, and the part of the pairs up to which it pays to look for them: by machine
#: code; on a GPU, not timed but counted, since a pair of tiles takes 2.5 times the instructions of a streamed one; by torch on a CPU, where
#: it takes ten times as long as in blocks.
REACH, FEW, FEW_GPU, FEW_TORCH = 14.0, 0.2, 0.1, 0.02


def refuse(problem: Problem) -> str | None:
    """Why this problem cannot be taken from the pairs that matter, or None."""
    return mesh.refuse(problem)


def bind(problem: Problem, tol: float | None = None) -> Geometry:
    """The problem on a mesh, whose `exact` are the pairs that matter; these from the beginning, where a mesh at eps would be too large."""
    return bind_each(problem, lambda one: _bind(one, tol))


def _bind(problem: Problem, tol: float | None) -> Geometry:
    part = PART if tol is None else max(SHARE * tol, PART)
    if mesh.by_torch(problem):
        return Pairs(problem, part)
    pairs = Multiscale(problem, part)
    if tol is not None:
        with contextlib.suppress(BackendError):
            return _Coarse(problem, mesh.per_of(problem, tol), pairs)
    return pairs


def share(problem: Problem) -> float:
    """About what part of the pairs has to be taken: those within REACH deviations, and what the boxes of leaves add."""
    extent = mesh.extents(problem)
    leaf = extent * (32 / min(problem.shape[-2:])) ** (1 / max(1, len(extent)))
    return float(((REACH + 2 * leaf) / extent.clamp(min=1e-300)).clamp(max=1.0).prod())


def pays(problem: Problem) -> bool:
    """Whether so few pairs are left that finding them takes less time than all of them would."""
    few = FEW if not mesh.by_torch(problem) else FEW_TORCH if problem.a.device.type == "cpu" else FEW_GPU
    return share(problem) < few


def memory(problem: Problem) -> int:
    """Bytes of both clouds with what is kept beside them."""
    *batch, n, m = problem.shape
    by_tiles = 300 * 2**20 if mesh.by_torch(problem) else 0  # temporaries of the torch form
    return math.prod(batch) * 400 * (n + m) + by_tiles


class _Coarse(mesh.Mesh):
    """A mesh that is only the way to the exact sums."""

    def __init__(self, problem: Problem, per: float, pairs: Multiscale) -> None:
        super().__init__(problem, per)
        self.pairs = pairs

    @property
    def exact(self) -> Geometry:
        return self.pairs


class Multiscale(Swept):
    """`softmin` and `apply` with at most `part` of any sum left out.

    omitted   the part of a sum that was left out at most, in the last sweep.
    pairs     pairs of points taken in the last sweep, of n m.
    """

    def __init__(self, problem: Problem, part: float) -> None:
        super().__init__(problem)
        self.part, self.pair = part, mesh.Pair(problem, mesh.COARSEST)
        self.shared: dict[str, Any] = {"omitted": 0.0, "pairs": 0, "eps": math.nan}

    @property
    def omitted(self) -> float:
        return self.shared["omitted"]

    @property
    def pairs(self) -> int:
        return self.shared["pairs"]

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        return self.pair.offsets

    def updated(self, g: Tensor, log_w: Tensor | None, eps: float, damping: float) -> Tensor:
        from ..compiled import levels

        if eps > self.problem.eps:  # on the way to the target
            with contextlib.suppress(BackendError):
                return self.pair.updated(g, log_w, eps, damping, self._turned)
        (own, other), (rows, columns) = self._sides(eps)
        L, out = np.empty(len(other)), torch.empty(len(own), dtype=torch.float64)
        log_weights = np.empty(0) if log_w is None else mesh.array(log_w)
        each(shares(len(L), mesh.LEAST), levels.load, mesh.array(g), log_weights, other, columns.order, eps, L)
        logs, _ = self._sums(rows, columns, L, np.empty((0, len(L))))
        each(shares(len(logs), mesh.LEAST), levels.store, logs, own, rows.order, eps, damping, out.numpy())
        return out

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        (own, other), (rows, columns) = self._sides(eps)
        L = ((mesh.array(h) - other) / eps)[columns.order]
        logs, means = self._sums(rows, columns, L, np.ascontiguousarray(mesh.array(v.to(h))[columns.order].T))
        sums, found = torch.empty(len(own), dtype=torch.float64), torch.empty(len(own), v.shape[-1], dtype=torch.float64)
        sums.numpy()[rows.order], found.numpy()[rows.order] = logs, means
        mass = (sums + (k - torch.from_numpy(own)) / eps).exp()
        return torch.where(mass > 0, mass, 0.0).unsqueeze(-1) * found

    def _sides(self, eps: float) -> tuple[tuple[np.ndarray, np.ndarray], tuple[Any, Any]]:
        """The shifts and the trees of this side and the other."""
        if self.shared["eps"] != eps:
            self.shared.update(eps=eps, trees=tuple(_tree(z / math.sqrt(eps)) for z in self.pair.points))
        (alpha, beta), (rows, columns) = self.pair.shifts, self.shared["trees"]
        return ((beta, alpha), (columns, rows)) if self._turned else ((alpha, beta), (rows, columns))

    def _sums(self, rows: Any, columns: Any, L: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log sum_j exp(L_j - |x_i - y_j|^2 / 2) (n,), and the means of v (c, m) with these weights (n, c), as points are sorted."""
        from ..compiled import sparse

        weights = np.empty(int(columns.offsets[-1]))
        sparse.totals(columns, L, weights)
        n, leaves = len(rows.order), int(rows.offsets[1])
        logs, means, missed, pairs = np.empty(n), np.empty((n, len(v))), np.empty(leaves), np.empty(leaves, np.int64)
        each(shares(leaves), sparse.softmin_sums, rows, columns, L, weights, v, self.part, logs, means, missed, pairs)
        self.shared.update(omitted=float(missed.max()), pairs=int(pairs.sum()))
        return logs, means


def _tree(points: np.ndarray) -> Any:
    from ..compiled import sparse

    low, high = points.min(0), points.max(0)
    keys = np.empty(len(points), np.int64)
    axes = np.flatnonzero(high > low) if (high > low).any() else np.zeros(1, np.int64)
    sparse.hilbert(points, axes, low, (2**sparse.BITS - 1) / max(float((high - low).max()), 1e-300), keys)
    order = np.argsort(keys, kind="stable")
    points = np.ascontiguousarray(points[order].T)
    sizes = [-(-len(order) // sparse.LEAF)]
    while sizes[-1] > 2 * sparse.FANOUT:
        sizes.append(-(-sizes[-1] // sparse.FANOUT))
    offsets = np.cumsum([0, *sizes])
    boxes = np.empty((int(offsets[-1]), 3)), np.empty((int(offsets[-1]), 3))
    sparse.boxes(points, offsets, *boxes)
    return sparse.Tree(points, order, offsets, *boxes)
