"""Small spaces on a CPU: the outer loop as machine code, which spares the calls between its sweeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry.absorbed import range_of
from ..geometry.compiled import Compiled
from ..penalties import KL
from ..problem import Problem
from ..solver import annealing
from ..solver.compiled import each, rule_of, tuning
from ..solver.criterion import Marginal
from .mixing import GATE, MEMORY, RIDGE, STEADY, WORSE
from .spaces import Matrices

if TYPE_CHECKING:
    from .loop import Posed

#: Points of a space up to which products by simple loops are as fast as a BLAS, and factors of a matrix are not looked for.
LARGEST = 190
#: As `loop.INNER`, where an inner iteration takes a tenth of the time of an outer one.
INNER = 0.03
#: Outer iterations of one call.
CHUNK = 1024


class Found(NamedTuple):
    """The slopes (*batch, n, m) at which problems ended and their potentials (*batch, n), how far costs moved (k, *batch), which settled,
    inner iterations, and what a marginal error counts for."""

    slope: Tensor
    f: Tensor
    change: Tensor
    settled: Tensor
    n_inner: int
    ratio: float


def serves(posed: Posed, problem: Problem, backend: str) -> bool:
    """Whether these problems are such, of which `problem` is the first transport problem."""
    spaces = posed.spaces
    return (
        isinstance(spaces, Matrices) and not spaces.lopsided and max(spaces.shape) <= LARGEST and spaces.device.type == "cpu"
        and backend in ("auto", "compiled") and posed.mass is None and problem.a.numel() > 0 and Compiled.refuse(problem) is None
    )  # fmt: skip


def settle(posed: Posed, problem: Problem, slope: Tensor, constants: dict[str, Any]) -> Found:
    """Outer iterations from a slope, whose transport problem is `problem`."""
    from ..compiled import quadratic
    from ..compiled.search import Annealing
    from ..compiled.watch import CONVERGED, DIVERGED, RUNNING

    spaces, batch = posed.spaces, problem.a.shape[:-1]
    assert isinstance(spaces, Matrices)
    (n, m), G, tol = spaces.shape, batch.numel(), constants["tol"]
    features = torch.zeros(1, 0, 0, dtype=slope.dtype)
    if posed.features is not None:
        features = ((1 - posed.alpha) * posed.features.dense()).to(slope.dtype)
    matrices = [_arrays(z, batch) for z in (spaces.f1, spaces.f2, spaces.h1, spaces.h2, features)]
    own = slope.expand(*batch, n, m).contiguous().clone()
    f = np.zeros((G, n))
    a, b = (w.detach().expand(*batch, w.shape[-1]).contiguous().view(G, -1).numpy() for w in (problem.a, problem.b))
    taus = [float(penalty.tau) if isinstance(penalty, KL) else math.inf for penalty in problem.penalties]
    numbers, counts, ends = np.array([[math.inf, 1.0]] * G), np.zeros((G, 2), np.int64), np.zeros((G, 2), np.int64)
    limits = quadratic.Limits(
        inner=INNER,
        **{**constants, "max_iter": min(constants["max_iter"], 2**40)},
        memory=MEMORY,
        gate=GATE,
        steady=STEADY,
        worse=WORSE,
        ridge=RIDGE,
    )
    passing = Annealing(annealing.PROBE_ITERATIONS, annealing.SETTLE, annealing.FEW, annealing.ANNEAL_FACTOR)
    tables, moved = [], numbers[:, quadratic.CHANGE]
    while bool(((ends[:, 0] == RUNNING) & (counts[:, 0] < limits.max_iter)).any()):
        ends[:, 1] = 0
        history = np.empty((G, min(CHUNK, limits.max_iter)))
        each(
            quadratic.settle_some, G, (
                quadratic.Spaces(*matrices), 2 * posed.alpha, a, b, float(problem.eps), *taus, rule_of(Marginal(tol), slope.dtype),
                tuning(problem.balanced), passing, limits, *range_of(slope.dtype.itemsize), own.view(G, n, m).numpy(), f, numbers, counts,
                ends, history,
            ),
        )  # fmt: skip
        table = np.empty((int(ends[:, 1].max()), G))
        for i in range(len(table)):
            table[i] = moved = np.where(ends[:, 1] > i, history[:, i], moved)
        tables.append(table)
    table = torch.from_numpy(np.concatenate(tables)).view(-1, *batch)
    settled = torch.from_numpy(ends[:, 0] == CONVERGED).view(batch)
    broken = bool((ends[:, 0] == DIVERGED).any())
    potentials = torch.from_numpy(f).view(*batch, n)
    return Found(own, potentials, table, settled & (not broken), int(counts[:, 1].max()), float(numbers[:, quadratic.RATIO].min()))


def _arrays(C: Tensor, batch: torch.Size) -> np.ndarray:
    """(1, n, m) of one for all, or (G, n, m)."""
    C = C.detach()
    if C.shape[:-2].numel() > 1:
        C = C.expand(*batch, *C.shape[-2:])
    return C.reshape(C.shape[:-2].numel(), *C.shape[-2:]).contiguous().numpy()
