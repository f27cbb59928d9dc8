"""A plan that is computed where it is looked at: POT's `LazyTensor` to those who slice it, and an operator to those who multiply."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..geometry.protocol import Geometry, weigh
from ..geometry.select import bind
from ..problem import Problem
from ..solution.solution import Plan
from .arrays import take
from .clouds import ENTRIES, in_blocks, plan_entries


class LazyPlan:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), (n, m), detached.

    `P[rows, columns]` as POT's lazy tensors take it, ints and slices, always two-dimensional; `P @ v`, `P.T`, `P.sum(axis)`,
    `P.diagonal()`, `P.to_dense()`, and `P.sample(k)`, pairs drawn in proportion to their mass. Results are in the caller's kind of array.
    """

    ndim = 2

    def __init__(self, problem: Problem, f: Tensor, g: Tensor, back: Callable[[Tensor], Any], geometry: Geometry | None = None) -> None:
        self._problem, self._f, self._g, self._back, self._geometry = problem, f.detach(), g.detach(), back, geometry

    @property
    def shape(self) -> tuple[int, int]:
        n, m = self._problem.shape
        return n, m

    @property
    def dtype(self) -> torch.dtype:
        return self._problem.given_dtype

    @property
    def T(self) -> LazyPlan:
        geometry = None if self._geometry is None else self._geometry.T
        return LazyPlan(self._problem.T, self._g, self._f, self._back, geometry)

    def returning(self, back: Callable[[Tensor], Any]) -> LazyPlan:
        """The same plan, whose results are of another kind of array."""
        return LazyPlan(self._problem, self._f, self._g, back, self._geometry)

    def __getitem__(self, key: Any) -> Any:
        """(rows, columns) of the plan; one index may be left out."""
        rows, columns = (*key, slice(None))[:2] if isinstance(key, tuple) else (key, slice(None))
        return self._give(self._block(_slice(rows, self.shape[0]), _slice(columns, self.shape[1])))

    def to_dense(self) -> Any:
        n, m = self.shape
        return self._give(torch.cat([self._block(rows, slice(None)) for rows in in_blocks(n, m)]))

    def __matmul__(self, v: Any) -> Any:
        """(m,) or (m, c) -> (n,) or (n, c), in one sweep."""
        (vector,), back = take(v=v)
        if vector is None or vector.shape[:1] != (self.shape[1],):
            raise errors.wrong_shape("v", () if vector is None else vector.shape, f"({self.shape[1]},) or ({self.shape[1]}, c)")
        return back((self._operator @ vector.to(self._problem.a)).to(self.dtype))

    def sum(self, axis: int | None = None) -> Any:
        """P1 (n,) for axis 1, P^T 1 (m,) for axis 0, the mass for None."""
        if axis is None:
            return self._give(self._operator.marginals[0].sum())
        if axis not in (0, 1, -1, -2):
            raise errors.unknown("axis", axis, ["None", "0", "1"])
        return self._give(self._operator.marginals[0 if axis in (1, -1) else 1])

    def diagonal(self) -> Any:
        """P_ii, (min(n, m),)."""
        size, step = min(self.shape), math.isqrt(ENTRIES)
        parts = [slice(k, min(k + step, size)) for k in range(0, size, step)]
        return self._give(torch.cat([self._block(rows, rows).diagonal() for rows in parts]))

    def sample(self, k: int, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        """k pairs (i, j), drawn independently in proportion to P_ij: two vectors (k,) of indices."""
        mass = self._operator.marginals[0].clamp(min=0)
        rows = torch.multinomial(mass, k, replacement=True, generator=generator)
        return self._back(rows), self._back(self._columns_of(rows, generator))

    def sample_columns(self, rows: Any = None, generator: torch.Generator | None = None) -> Any:
        """For each of `rows` (all when left out) a column j drawn in proportion to P_ij: the partners of a minibatch."""
        (given,), _ = take(rows=rows)
        device = self._problem.a.device
        return self._back(self._columns_of(torch.arange(self.shape[0], device=device) if given is None else given.long(), generator))

    def _columns_of(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gumbel-max over blocks of columns: the largest of (h_j - C_ij) / eps plus Gumbel noise falls on j with the odds of P_ij.

        Maddison, Tarlow and Minka 2014, arXiv:1411.0030, section 2.
        """
        problem, m = self._problem, self.shape[1]
        h = weigh(self._g, problem.b.detach(), problem.eps)
        best = h.new_full((len(rows),), -torch.inf)
        chosen = torch.zeros_like(rows)
        width = max(1, ENTRIES // max(1, len(rows)))
        for k in range(0, m, width):
            columns = slice(k, min(k + width, m))
            C = self._cost(rows, columns)
            noise = torch.empty_like(C).exponential_(generator=generator).log_().neg_()
            score, at = ((h[columns] - C) / problem.eps + noise).max(-1)
            chosen = torch.where(score > best, at + k, chosen)
            best = torch.maximum(best, score)
        return chosen

    def _block(self, rows: Any, columns: Any) -> Tensor:
        a, b = self._problem.a.detach(), self._problem.b.detach()
        return plan_entries(self._cost(rows, columns), self._f[rows], self._g[columns], a[rows], b[columns], self._problem.eps)

    def _cost(self, rows: Any, columns: Any) -> Tensor:
        with torch.no_grad():
            return self._problem.cost.entries(rows, columns).to(self._f)

    @cached_property
    def _operator(self) -> Plan:
        problem = self._problem
        geometry = self._geometry or bind(problem)
        k, h = weigh(self._f, problem.a.detach(), problem.eps), weigh(self._g, problem.b.detach(), problem.eps)
        return Plan(geometry, k, h, problem.eps, problem.a.dtype)

    def _give(self, z: Tensor) -> Any:
        return self._back(z.to(self.dtype))

    def __repr__(self) -> str:
        return f"LazyPlan(shape={self.shape})"


def _slice(index: Any, size: int) -> Any:
    if isinstance(index, slice):
        return index
    if isinstance(index, int):
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for a plan with {size} rows or columns on that side")
        return slice(index % size, index % size + 1)
    raise NotImplementedError("a lazy plan takes ints and slices; P.to_dense() takes every index.")
