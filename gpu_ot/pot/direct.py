"""The commonest call in one piece: a balanced problem between plain arrays on a CPU, without a gradient.

Everything between the caller's arrays and the plan is one compiled function, `gpu_ot.compiled.transport.sinkhorn`, whose steps and rules
are those of every other solve. What is not plain, and whatever is to be refused, goes the usual way.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import compiled, transforms
from ..geometry.absorbed import range_of
from ..geometry.compiled import LARGEST_BYTES
from ..problem import MASS_RTOL
from ..solver.compiled import STATUS, rule_of, tuning
from ..solver.criterion import Marginal
from ..solver.status import DIVERGED, Status
from . import arrays

_TYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
#: The types of reg that are a number for sure.
NUMBERS = (float, int, np.float64, np.float32)


class Found(NamedTuple):
    """The plan P (n, m) of costs M in the caller's type, potentials, errors at the checks, and how the loop ended."""

    P: np.ndarray
    M: np.ndarray
    f: np.ndarray
    g: np.ndarray
    errors: np.ndarray
    n_iter: int
    status: Status
    tensors: bool

    def plan(self) -> Any:
        return torch.from_numpy(self.P) if self.tensors else self.P

    def cost(self) -> Any:
        """<P, M>."""
        from ..compiled.transport import inner

        total = self.P.dtype.type(inner(self.P, self.M))
        return torch.as_tensor(total) if self.tensors else total


def solve(a: Any, b: Any, M: Any, reg: Any, rules: Any, max_iter: int, tol: float, after: float) -> Found | None:
    """The problem solved by the rules of one of POT's methods, as `balanced.solve_balanced`; None where it must go the usual way."""
    kind = type(M)
    if type(reg) not in NUMBERS or not 0 < reg < math.inf or not (kind is np.ndarray or kind is Tensor):
        return None
    tensors = kind is Tensor
    given = [M, a, b]
    if tensors:
        if any(type(z) is Tensor and not _plain(z) for z in given) or transforms.active() or torch.compiler.is_compiling():
            return None
        given = [z.detach().numpy() if type(z) is Tensor else z for z in given]
    elif arrays.numpy_device is not None:
        return None
    M, a, b = given
    if M.ndim != 2 or M.dtype not in _TYPES or not 0 < M.nbytes <= LARGEST_BYTES or compiled.refused() is not None:
        return None
    n, m = M.shape
    wa, wb = _weights(a, n, M.dtype), _weights(b, m, M.dtype)
    if wa is None or wb is None:
        return None
    from ..compiled.transport import UNUSUAL, sinkhorn

    eps, (dropped, safe) = float(reg), range_of(M.itemsize)
    start = np.full(n, -eps * math.log(n) if rules.uniform_start else 0.0)
    limit = max(max_iter, 1)
    plain_until = -1 if after >= limit else int(after)
    C = M if M.flags.c_contiguous and M.flags.writeable else np.array(M, order="C")
    P, f, g, errors, counts, status = sinkhorn(
        C, wa, wb, eps, start, MASS_RTOL, _rule(tol, rules.joint, _TYPES[M.dtype]), _tuning(), dropped, safe, limit, rules.check_every,
        plain_until,
    )  # fmt: skip
    if status == UNUSUAL or STATUS[status] is DIVERGED:
        return None
    return Found(P, C, f, g, errors, int(counts[0]), STATUS[status], tensors)


def _plain(z: Tensor) -> bool:
    return z.device.type == "cpu" and z.layout == torch.strided and not (z.requires_grad and torch.is_grad_enabled())


@functools.lru_cache
def _rule(tol: float, joint: bool, dtype: torch.dtype) -> Any:
    return rule_of(Marginal(tol, "l2_joint" if joint else "l2"), dtype)


@functools.cache
def _tuning() -> Any:
    return tuning(True)


def _weights(w: Any, size: int, dtype: np.dtype) -> np.ndarray | None:
    """A copy in float64; uniform for an empty list. None for what is not a plain vector of this type."""
    if type(w) is np.ndarray:
        return w.astype(np.float64) if w.shape == (size,) and w.dtype == dtype else None
    return np.full(size, 1 / size) if type(w) is list and not w else None
