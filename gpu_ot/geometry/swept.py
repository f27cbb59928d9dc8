"""What meshes and pairs share: sweeps of machine code between two sides of one problem, and vectors that never leave it."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch
from torch import Tensor

from ..penalties import KL
from ..problem import Problem
from .chunked import Chunked
from .protocol import Geometry, pull_folded


class Swept(Geometry):
    """A cost alpha_i + beta_j - <u_i, v_j> whose sweeps begin and end with vectors as they were given, in float64."""

    dtype = torch.float64

    def __init__(self, problem: Problem) -> None:
        folded = problem.cost.fold()
        assert folded is not None
        self.problem, self.inputs, self._turned = problem, tuple(folded), False

    @property
    def T(self) -> Swept:
        other, (alpha, beta, u, v) = copy.copy(self), self.inputs
        other.inputs, other._turned = (beta, alpha, v, u), not self._turned
        return other

    @property
    @abstractmethod
    def offsets(self) -> tuple[Tensor, Tensor]:
        """What C has beside half a squared distance, in coordinates that move one cloud's mean and covariance onto the other's."""

    def initial_rows(self) -> Tensor:
        """The potentials of that linear map."""
        return self.offsets[self._turned]

    @abstractmethod
    def updated(self, g: Tensor, log_w: Tensor | None, eps: float, damping: float) -> Tensor:
        """softmin(g + eps log w) / damping: (m,) -> (n,)."""

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        if h.ndim > 1:
            return torch.stack([self.softmin(each, eps) for each in h])
        return self.updated(h, None, eps, 1.0)

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = problem.penalties
        if not (isinstance(rows, KL) and isinstance(columns, KL)) or g.ndim > 1:
            return super().iterate(problem, g, eps, k)
        turned = self.T
        f = g_next = g
        for _ in range(k):
            g = g_next
            f = self.updated(g, problem.log_b, eps, 1 + eps / rows.tau)
            g_next = turned.updated(f, problem.log_a, eps, 1 + eps / columns.tau)
        return f, g, g_next

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """Every pair, exactly."""
        return Chunked(self.problem.cost.T if self._turned else self.problem.cost).plan(k, h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return pull_by_apply(self, k, h, eps, w)


def pull_by_apply(geometry: Geometry, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
    """`Geometry.pull_back` of a cost that folds, from two of its products with the plan."""

    def products(right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        on_rows = None if right is None else geometry.apply(k, h, eps, right.mT).mT
        return on_rows, None if left is None else geometry.T.apply(h, k, eps, left.mT).mT

    return pull_folded(geometry.inputs, w, products)
