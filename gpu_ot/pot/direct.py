"""The commonest calls in one piece: a problem between plain arrays on a CPU, without a gradient.

Everything between the caller's arrays and the plan is one compiled function, `gpu_ot.compiled.transport.solve`, whose steps and rules
are those of every other solve. What is not plain, and whatever is to be refused, goes the usual way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import compiled, transforms
from ..costs.matrix import Matrix
from ..geometry.absorbed import Absorbed, range_of
from ..geometry.compiled import LARGEST_BYTES
from ..problem import MASS_RTOL, Problem
from ..solution.solution import Solution
from ..solver.compiled import STATUS, resolved, rule_of, share_out, tuning
from ..solver.criterion import Change, Marginal
from ..solver.status import CONVERGED, DIVERGED, MAX_ITER, STALLED, Status
from . import arrays
from .answer import Answer
from .arrays import take, tensors

TYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
BALANCED = math.inf, math.inf
#: Of a batch, plain iterations between two checks, and errors that there is room for.
BATCH_CHECKS_EVERY, MOST_ERRORS = 10, 2**24
TENSORS = (Tensor, torch.nn.Parameter)
#: The types of reg that are a number for sure.
NUMBERS = (float, int, np.float64, np.float32)


class Found(NamedTuple):
    """The plan P (n, m) of costs M between weights a and b, potentials, errors (checks,), and how the loop ended. `back` makes the
    caller's kind of array, None where that is numpy's."""

    P: np.ndarray
    M: np.ndarray
    eps: float
    a: np.ndarray
    b: np.ndarray
    f: np.ndarray
    g: np.ndarray
    start: np.ndarray
    errors: np.ndarray
    counts: np.ndarray
    status: Status
    back: Callable[[Tensor], Any] | None

    def plan(self) -> Any:
        return self.P if self.back is None else self.back(torch.from_numpy(self.P))

    def cost(self) -> Any:
        """<P, M>."""
        from ..compiled.transport import inner

        total = self.P.dtype.type(inner(self.P, self.M))
        return total if self.back is None else self.back(torch.as_tensor(total))

    def answer(self) -> Answer:
        """For POT's `log`."""
        M, a, b, f, g, errors = map(torch.from_numpy, (self.M, self.a, self.b, self.f, self.g, self.errors))
        problem = Problem.checked(Matrix(M), self.eps, a, b)
        done = torch.tensor(self.status is CONVERGED)
        found = Solution(problem, Absorbed(M), f.sum, f, g, self.status, done, int(self.counts[0]), int(self.counts[2]), errors)
        return Answer(found, self.back or arrays.to_numpy)


class Given(NamedTuple):
    """A problem's numbers as numpy's arrays, copies of the weights in float64; C is M in rows that follow each other."""

    C: np.ndarray
    a: np.ndarray
    b: np.ndarray
    eps: float
    back: Callable[[Tensor], Any] | None


def take_plain(a: Any, b: Any, M: Any, reg: Any, *, transposed: bool = False, gradients: bool = False) -> Given | None:
    """The numbers, with `transposed` rows for columns; None where they are not plain, or require a gradient without `gradients`."""
    if type(reg) not in NUMBERS or not 0 < reg < math.inf or compiled.refused() is not None:
        return None
    back = None
    if type(M) is not np.ndarray:
        if type(M) in TENSORS:
            back = tensors
        elif hasattr(M, "__dlpack__") and not hasattr(M, "__torch_function__"):
            (a, b, M), back = take(a=a, b=b, M=M)
        usual = all(_plain(z, gradients) if type(z) in TENSORS else type(z) is not np.ndarray for z in (a, b, M))
        if back is None or not usual or _elsewhere():
            return None
        a, b, M = (z.detach().numpy() if type(z) in TENSORS else z for z in (a, b, M))
    elif arrays.numpy_device is not None:
        return None
    if M.ndim != 2 or M.dtype not in TYPES or not 0 < M.nbytes <= LARGEST_BYTES:
        return None
    wa, wb = _weights(a, M.shape[0]), _weights(b, M.shape[1])
    if wa is None or wb is None:
        return None
    if transposed:
        M, wa, wb = M.T, wb, wa
    C = M if M.flags.c_contiguous and M.flags.writeable else np.array(M, order="C")
    return Given(C, wa, wb, float(reg), back)


def _solve(given: Given, taus: tuple[float, float], start: np.ndarray, weight: np.ndarray, rtol: float, rule: Any, strict: bool,
           limit: int, every: int, after: float) -> Found | None:  # fmt: skip
    from ..compiled.transport import MOST, UNUSUAL, solve

    if limit > MOST:
        return None
    (C, wa, wb, eps, back), (dropped, safe) = given, range_of(given.C.itemsize)
    P, f, g, errors, counts, status = solve(
        C, wa, wb, eps, *taus, start, weight, np.zeros(len(wb)), rtol, rule, strict, _tuning(taus[0] == taus[1] == math.inf), dropped, safe,
        limit, every, -1 if after >= limit else int(after),
    )  # fmt: skip
    if status == UNUSUAL or STATUS[status] is DIVERGED:
        return None
    if STATUS[status] is not CONVERGED and not resolved(f, g, eps):
        return None
    return Found(P, C, eps, wa, wb, f, g, start, errors, counts, STATUS[status], back)


def balanced(
    a: Any, b: Any, M: Any, reg: Any, rules: Any, max_iter: int, tol: float, after: float, gradients: bool = False
) -> Found | None:
    """The problem solved by the rules of one of POT's methods, as `balanced.solve_balanced`; None where it must go the usual way.

    With `gradients` its numbers may require some, see `unrolled.plan`.
    """
    given = take_plain(a, b, M, reg, gradients=gradients)
    if given is None:
        return None
    n, rule = len(given.a), _marginal(tol, rules.joint, TYPES[given.C.dtype])
    start = np.full(n, -given.eps * math.log(n) if rules.uniform_start else 0.0)
    return _solve(given, BALANCED, start, np.ones(n), MASS_RTOL, rule, False, _limit(max_iter), rules.check_every, after)


def relaxed(
    a: Any, b: Any, M: Any, reg: Any, taus: tuple[float, float], rules: Any, max_iter: int, tol: float, after: float
) -> Found | None:
    """The same for relaxed marginals, as `relaxed.run`."""
    given = take_plain(a, b, M, reg, transposed=True)
    if given is None:
        return None
    rule = _change(tol, rules.both_sides, after, math.inf if rules.translate else after, TYPES[given.C.dtype])
    start, swapped = np.zeros(len(given.a)), (taus[1], taus[0])
    found = _solve(given, swapped, start, given.a.copy(), -1.0, rule, rules.both_sides, _limit(max_iter), rules.check_every, math.inf)
    return found and found._replace(P=np.ascontiguousarray(found.P.T), M=found.M.T)


class Batch(NamedTuple):
    """B problems solved: their answer, plans P (B, n, m), value and <P, M> (B,), log u (B, n) and log v (B, m)."""

    answer: Answer
    P: Tensor
    value: Tensor
    linear: Tensor
    logarithms: tuple[Tensor, Tensor]


def batch(a: Any, b: Any, M: Any, reg: Any, max_iter: int, tol: float, entropy: bool) -> Batch | None:
    """The problems of `batch.solve_batch` with costs M (B, n, m); None where they must go the usual way."""
    kinds = all(z is None or (_plain(z, False) if type(z) in TENSORS else type(z) is np.ndarray) for z in (a, b, M))
    if not kinds or M is None or type(reg) not in NUMBERS or not 0 < reg < math.inf or compiled.refused() is not None or _elsewhere():
        return None
    (C, ta, tb), back = take(M=M, a=a, b=b)
    checks = _limit(max_iter) // BATCH_CHECKS_EVERY + 2
    if C.ndim != 3 or C.dtype not in TYPES.values() or C.device.type != "cpu" or not C.numel() or len(C) * checks > MOST_ERRORS:
        return None
    wa, wb = (_weights_of_each(w, len(C), size) for w, size in ((ta, C.shape[1]), (tb, C.shape[2])))
    if wa is None or wb is None:
        return None
    return _solve_each(C.contiguous(), wa, wb, float(reg), _limit(max_iter), tol, entropy, checks, back)


def _solve_each(
    C: Tensor, a: Tensor, b: Tensor, eps: float, limit: int, tol: float, entropy: bool, checks: int, back: Callable[[Tensor], Any]
) -> Batch | None:
    from ..compiled import transport

    (B, n, m), every = C.shape, BATCH_CHECKS_EVERY
    if limit > transport.MOST:
        return None
    P = torch.from_numpy(np.empty(C.shape, C.numpy().dtype))  # in huge pages, unlike torch's own
    f, g, log_u, log_v, sums, errors = (torch.empty(B, size, dtype=torch.float64) for size in (n, m, n, m, 3, checks))
    ends = np.zeros((B, 4), np.int64)
    found = transport.Found(P.numpy(), f.numpy(), g.numpy(), log_u.numpy(), log_v.numpy(), sums.numpy(), errors.numpy(), ends)
    rule, range_ = _marginal(tol, False, C.dtype), range_of(C.itemsize)
    given = (*(z.numpy() for z in (C, a, b)), eps, MASS_RTOL, rule, _tuning(True), *range_, limit, every, found)
    share_out(B, n * m, transport.solve_some, given)
    n_iter, n_sweeps, made, status = ends.T
    ended = [STATUS[k] for k in status] if (status != transport.UNUSUAL).all() else [DIVERGED]
    if DIVERGED in ended or not (all(end is CONVERGED for end in ended) or resolved(f.numpy(), g.numpy(), eps)):
        return None
    last = torch.from_numpy(np.minimum(np.arange(made.max())[:, None], made - 1))  # a problem that has ended stays
    worst = MAX_ITER if MAX_ITER in ended else STALLED if STALLED in ended else CONVERGED
    problem, done = Problem.checked(Matrix(C), eps, a, b), torch.from_numpy(status == STATUS.index(CONVERGED))
    solution = Solution(
        problem, Absorbed(C), lambda: sums[:, 1], f, g, worst, done, int(n_iter.max()), int(n_sweeps.max()), errors.mT.gather(0, last)
    )
    value = sums[:, 1] + sums[:, 2] if entropy else sums[:, 1]
    return Batch(Answer(solution, back, entropy=entropy), P, value, sums[:, 0], (log_u, log_v))


def _weights_of_each(w: Tensor | None, B: int, size: int) -> Tensor | None:
    """(B, size) in float64; None for what is neither that nor one for all."""
    w = torch.full((size,), 1 / size, dtype=torch.float64) if w is None else w
    usual = w.dtype in TYPES.values() and w.device.type == "cpu" and w.shape in ((size,), (B, size), (1, size))
    return w.double().expand(B, size).contiguous() if usual else None


def _limit(max_iter: float) -> int:
    return int(max(max_iter, 1))


def _elsewhere() -> bool:
    """Whether a transform or a compiler looks on."""
    return transforms.active() or torch.compiler.is_compiling()


def _plain(z: Tensor, gradients: bool) -> bool:
    usual = z.device.type == "cpu" and z.layout == torch.strided and z.dtype in TYPES.values() and not z.is_neg()
    return usual and (gradients or not (z.requires_grad and torch.is_grad_enabled())) and not transforms.unkept(z)


@functools.lru_cache
def _marginal(tol: float, joint: bool, dtype: torch.dtype) -> Any:
    return rule_of(Marginal(tol, "l2_joint" if joint else "l2"), dtype)


@functools.lru_cache
def _change(tol: float, both_sides: bool, translate_after: float, relative_after: float, dtype: torch.dtype) -> Any:
    return rule_of(Change(tol, both_sides, translate_after, relative_after), dtype)


@functools.cache
def _tuning(gauge: bool) -> Any:
    return tuning(gauge)


def _weights(w: Any, size: int) -> np.ndarray | None:
    """A copy in float64; uniform for None and an empty list. None for what is not a plain vector."""
    if type(w) is np.ndarray:
        return w.astype(np.float64) if w.shape == (size,) and w.dtype in TYPES else None
    return np.full(size, 1 / size) if w is None or (type(w) is list and not w) else None
