"""Partial transport: a given mass moves, of marginals that are upper bounds. Each half of an iteration settles its multiplier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..geometry.protocol import Geometry
from ..penalties import clamped, filled
from .step import Alternating, Annealing, State


@dataclass(frozen=True)
class Partial(Alternating):
    """Sinkhorn's iteration for P1 <= a, P^T 1 <= b and |P| = mass.

    The dual has f <= 0, g <= 0 and a multiplier lam of the mass, and P_ij = a_i b_j exp((f_i + g_j + lam - C_ij) / eps). Here f stands for
    f + lam. For fixed g the dual is largest at f = min(s, lam) with s the softmin of g and lam such that the mass is right (`filled`), an
    O(n log n) operation on vectors. In the same way for the columns, whose lam goes over to the rows: g = min(t, lam) - lam. So every
    iterate has the mass and the rows that it should, and no third update slows the other two down, as in Dykstra's algorithm
    (Benamou et al. 2015, arXiv:1412.5154, section 5).
    """

    one_sided = True  # blocks of iterations are run here, one by one: no backend has a faster way

    @cached_property
    def mass(self) -> Tensor:
        """(*batch, 1)."""
        assert self.problem.mass is not None
        return self.problem.mass.unsqueeze(-1)

    def moved(self, geometry: Geometry, state: State, g: Tensor, memory: Any, k: int, plain: bool = False) -> State:
        (a, b), eps, columns = (self.problem.a, self.problem.b), self.eps, geometry.T
        f = g_next = g
        for _ in range(k):
            g = g_next
            s = geometry.update(g, b, eps)
            f = clamped(s, filled(s, a, self.mass, eps))
            t = columns.update(f, a, eps)
            lam = filled(t, b, self.mass, eps)
            g_next = clamped(t, lam) - lam
        return State(f, g, g_next, memory, state.done, state.inexact, state.n_iter + k, state.age + k, state.n_sweeps + 2 * k, plain)

    def at(self, eps: float, following: float, predict: bool) -> Annealing:
        return _PartialAnnealing(self.problem, eps, target=self.eps, following=following, predict=predict)


@dataclass(frozen=True)
class _PartialAnnealing(Partial, Annealing):
    """The same at an eps on the way to the target."""
