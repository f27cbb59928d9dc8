"""Small clouds on a CPU: every transport problem of a move as machine code, which forms its own costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..geometry.absorbed import range_of
from ..geometry.compiled import LARGEST_BYTES, Compiled
from ..problem import Problem
from ..solver import annealing
from ..solver.compiled import STATUS, each, rule_of, tuning
from ..solver.criterion import Marginal
from ..solver.status import CONVERGED, STALLED, Status


def serves(problem: Problem, backend: str) -> bool:
    """Whether one core at a time is the faster way for these problems (K, m, n)."""
    m, n = problem.shape[-2:]
    small = m * n * problem.dtype.itemsize <= LARGEST_BYTES and problem.given_dtype == problem.dtype  # numpy knows no bfloat16
    return small and backend in ("auto", "compiled") and Compiled.refuse(problem) is None


class Moves:
    """Transport from points to all clouds of a problem (K, m, n), move after move."""

    def __init__(self, problem: Problem, y: Tensor, tol: float, max_iter: int) -> None:
        K, m, n = problem.shape
        self.y = np.ascontiguousarray(y.mT.numpy())
        self.a, self.b = (np.ascontiguousarray(w.detach().expand(K, w.shape[-1]).numpy()) for w in (problem.b, problem.a))
        self.f, self.g, self.ends = np.zeros((K, m)), np.zeros((K, n)), np.zeros((K, 2), np.int64)
        self.settings = float(problem.eps), rule_of(Marginal(tol), y.dtype), max_iter
        self.opening = True

    def __call__(self, x: Tensor) -> tuple[Tensor, Status]:
        """(where the plans send the points x, (K, m, d); how the problems ended, the worst)."""
        from ..compiled.search import Annealing
        from ..compiled.support import move_some

        eps, rule, max_iter = self.settings
        constants = Annealing(annealing.PROBE_ITERATIONS, annealing.SETTLE, annealing.FEW, annealing.ANNEAL_FACTOR)
        sent = np.empty((len(self.y), *x.shape), self.y.dtype)
        arguments = np.ascontiguousarray(x.numpy()), self.y, self.a, self.b, eps, self.opening, rule, tuning(True), constants
        each(move_some, len(self.y), (*arguments, *range_of(self.y.itemsize), max_iter, self.f, self.g, sent, self.ends))
        self.opening = False
        ended = [STATUS[k] for k in self.ends[:, 0]]
        return torch.from_numpy(sent), next((z for z in ended if z not in (CONVERGED, STALLED)), CONVERGED)
