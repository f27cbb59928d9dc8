"""What a machine must offer: a cost bound to two sides, with two verbs and a transpose.

A softmin of softmins is a softmin: the reduction is associative over blocks of columns, so one verb serves a stored
matrix, streamed tiles, lazy formulas and rows spread over ranks. Weights enter through h = g + eps log b, so a machine
knows no weights, and everything else (gradients, marginals, maps) is `apply`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .problem import Problem
from .vectors import log


class Geometry(ABC):
    """A cost bound to its two sides on one machine. Vectors have the type of the potentials, see `problem.vector_dtype`."""

    #: The type the sweeps run in; what they round to bounds what the loop can reach.
    dtype: torch.dtype
    #: Sweeps over the pairs made beside those that `advance` is known to make, two an iteration: a kernel formed anew, say.
    extra: int = 0
    #: Whether fewer iterations are worth more than faster ones: not where a launch runs many at the price of one.
    accelerates: bool = True
    #: Whether the one input is the matrix itself, of which derivatives of any order are made.
    stored: bool = False
    #: The tensors that gradients flow to, as the machine holds them: (C,) for a matrix.
    inputs: tuple[Tensor, ...]

    @property
    @abstractmethod
    def T(self) -> Geometry:
        """The same cost seen from the other side."""

    @property
    def exact(self) -> Geometry:
        """The same cost without the rounding that this machine was allowed; itself, where it was allowed none."""
        return self

    @abstractmethod
    def softmin(self, h: Tensor, eps: float) -> Tensor:
        """(*batch, m) -> (*batch, n):  -eps log sum_j exp((h_j - C_ij) / eps). h = -inf is an empty atom."""

    @abstractmethod
    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        """(*batch, m, c) -> (*batch, n, c):  sum_j exp((k_i + h_j - C_ij) / eps) v_j, the plan times a matrix."""

    @abstractmethod
    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """(*batch, n, m):  exp((k_i + h_j - C_ij) / eps), for whoever needs the array itself."""

    @abstractmethod
    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """The gradient in each of `inputs` of a function whose derivative in C_ij is w_i exp((k_i + h_j - C_ij) / eps)."""

    def first(self, h: Tensor, eps: float) -> Tensor:
        """The column update of the row potentials h = f + eps log a, from which the loop starts: T.softmin(h)."""
        return self.T.softmin(h, eps)

    def advance(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """k >= 1 iterations from g: (f, g, fresh), where f is the update of the g returned and `fresh` the update of f.

        A machine may override this with something that computes the same faster.
        """
        penalty_a, penalty_b = problem.penalties
        f = fresh = g
        for _ in range(k):
            g = fresh
            f = penalty_a.damp(self.softmin(weigh(g, problem.b, eps), eps), eps)
            fresh = penalty_b.damp(self.T.softmin(weigh(f, problem.a, eps), eps), eps)
        return f, g, fresh


def weigh(g: Tensor, b: Tensor, eps: float) -> Tensor:
    """h = g + eps log b; an empty atom is -inf whatever its potential."""
    return torch.where(b > 0, g + eps * log(b), -math.inf)
