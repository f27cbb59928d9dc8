"""Costs that fold in at most three features, from the pairs of points that matter: exact to a given part of every sum, at any eps.

Where a blur reaches few points, almost all pairs add nothing. Which ones is proved from boxes and the potentials of the moment, in every
sweep anew: see `compiled.sparse`. The way there, at larger eps and before the first sweep at the target, goes by way of a mesh.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError
from ..problem import Problem
from . import mesh, tiles
from .chunked import Chunked
from .protocol import Geometry, pull_folded

#: The part of a sum that may be left out, where no tolerance says how much, and the part of the tolerance that it is.
PART, SHARE = 1e-13, 0.05
#: Deviations of the kernel that count, both sides together, and the part of the pairs up to which it pays to look for them.
REACH, FEW = 14.0, 0.2


def refuse(problem: Problem) -> str | None:
    """Why this problem cannot be taken from the pairs that matter, or None."""
    return mesh.refuse(problem)


def bind(problem: Problem, tol: float | None = None) -> Geometry:
    """The problem on a mesh, whose `exact` are the pairs that matter; these from the beginning, where a mesh at eps would be too large."""
    pairs = Multiscale(problem, PART if tol is None else max(SHARE * tol, PART))
    if tol is not None:
        with contextlib.suppress(BackendError):
            return _Coarse(problem, mesh.per_of(problem, tol), pairs)
    return pairs


def share(problem: Problem) -> float:
    """About what part of the pairs has to be taken: those within REACH deviations, and what the boxes of leaves add."""
    extent = mesh.extents(problem)
    leaf = extent * (32 / min(problem.shape[-2:])) ** (1 / max(1, len(extent)))
    return float(((REACH + 2 * leaf) / extent.clamp(min=1e-300)).clamp(max=1.0).prod())


def memory(problem: Problem) -> int:
    """Bytes of both clouds with what is kept beside them."""
    n, m = problem.shape[-2:]
    return 400 * (n + m)


class _Coarse(mesh.Mesh):
    """A mesh that is only the way to the exact sums."""

    def __init__(self, problem: Problem, per: float, pairs: Multiscale) -> None:
        super().__init__(problem, per)
        self.pairs = pairs

    @property
    def exact(self) -> Geometry:
        return self.pairs


class Multiscale(Geometry):
    """`softmin` and `apply` with at most `part` of any sum left out.

    omitted   the part of a sum that was left out at most, in the last sweep.
    pairs     pairs of points taken in the last sweep, of n m.
    """

    dtype = torch.float64

    def __init__(self, problem: Problem, part: float) -> None:
        folded = problem.cost.fold()
        assert folded is not None
        self.inputs = tuple(folded)
        self.problem, self.part = problem, part
        self.pair = mesh.Pair.of(problem, mesh.COARSEST)
        self.shared: dict[str, Any] = {"omitted": 0.0, "pairs": 0, "eps": math.nan}
        self._turned = False

    @property
    def omitted(self) -> float:
        return self.shared["omitted"]

    @property
    def pairs(self) -> int:
        return self.shared["pairs"]

    @property
    def T(self) -> Multiscale:
        other, (alpha, beta, u, v) = copy.copy(self), self.inputs
        other.inputs, other._turned = (beta, alpha, v, u), not self._turned
        return other

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        if h.ndim > 1:
            return torch.stack([self.softmin(each, eps) for each in h])
        if eps > self.problem.eps and (logs := self._by_mesh(h, eps)) is not None:
            return -eps * logs
        logs, _ = self._sums(h, None, eps)
        return -eps * torch.from_numpy(logs)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        logs, means = self._sums(h, v, eps)
        mass = (torch.from_numpy(logs) + k / eps).exp()
        return torch.where(mass > 0, mass, 0.0).unsqueeze(-1) * torch.from_numpy(means)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """Every pair."""
        return Chunked(self.problem.cost.T if self._turned else self.problem.cost).plan(k, h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        def products(right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            on_rows = None if right is None else self.apply(k, h, eps, right.mT).mT
            return on_rows, None if left is None else self.T.apply(h, k, eps, left.mT).mT

        return pull_folded(self.inputs, w, products)

    def _by_mesh(self, h: Tensor, eps: float) -> Tensor | None:
        try:
            return torch.from_numpy(self.pair.sums(h.detach().numpy(), None, eps, self._turned, learn=True)[0])
        except BackendError:
            return None

    def _sums(self, h: Tensor, v: Tensor | None, eps: float) -> tuple[np.ndarray, np.ndarray]:
        """log sum_j exp((h_j - C_ij) / eps) (n,), and the means of v (n, c) with these weights."""
        from ..compiled import sparse

        own, other = self.pair.shifts[::-1] if self._turned else self.pair.shifts
        if self.shared["eps"] != eps:
            self.shared.update(eps=eps, trees=tuple(_tree(z / math.sqrt(eps)) for z in self.pair.points))
        rows, columns = self.shared["trees"][::-1] if self._turned else self.shared["trees"]
        L = ((h.detach().numpy() - other) / eps)[columns.order]
        factors = np.empty((0, len(L))) if v is None else np.ascontiguousarray(v.detach().to(h).numpy()[columns.order].T)
        weights = np.empty(int(columns.offsets[-1]))
        sparse.totals(columns, L, weights)
        n, leaves = len(rows.order), int(rows.offsets[1])
        logs, products, missed, pairs = np.empty(n), np.empty((n, len(factors))), np.empty(leaves), np.empty(leaves, np.int64)
        tiles.each(tiles.shares(leaves), sparse.softmin_sums, rows, columns, L, weights, factors, self.part, logs, products, missed, pairs)
        self.shared.update(omitted=float(missed.max()), pairs=int(pairs.sum()))
        found, means = np.empty_like(logs), np.empty_like(products)
        found[rows.order], means[rows.order] = logs, products
        return found - own / eps, means


def _tree(points: np.ndarray) -> Any:
    from ..compiled import sparse

    low, high = points.min(0), points.max(0)
    keys = np.empty(len(points), np.int64)
    sparse.hilbert(points, low, (2**sparse.BITS - 1) / max(float((high - low).max()), 1e-300), keys)
    order = np.argsort(keys, kind="stable")
    points = np.ascontiguousarray(points[order].T)
    sizes = [-(-len(order) // sparse.LEAF)]
    while sizes[-1] > 2 * sparse.FANOUT:
        sizes.append(-(-sizes[-1] // sparse.FANOUT))
    offsets = np.cumsum([0, *sizes])
    boxes = np.empty((int(offsets[-1]), 3)), np.empty((int(offsets[-1]), 3))
    sparse.boxes(points, offsets, *boxes)
    return sparse.Tree(points, order, offsets, *boxes)
