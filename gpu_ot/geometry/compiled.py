"""`Absorbed` on a CPU, where machine code runs whole stretches of iterations: `solver.compiled` does, on the arrays of this geometry."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import compiled
from ..costs import Cost
from ..penalties import KL
from ..problem import Problem
from .absorbed import Absorbed, _Kernel
from .products import Products

#: Up to this size one core does it all: more take longer to come together, and what is one call stays one.
LARGEST_BYTES = 24 * 2**20


class Arrays(NamedTuple):
    """The costs and kernels of G groups of H problems that share one: C (G or 1, n, m), K (G, n, m), f0 (G, n), g0 (G, m), at (G, 1)."""

    C: np.ndarray
    K: np.ndarray
    f0: np.ndarray
    g0: np.ndarray
    at: np.ndarray


class Compiled(Absorbed):
    """`Absorbed`, with its kernel in arrays that machine code fills."""

    def __init__(self, C: Tensor | Cost) -> None:
        super().__init__(C)
        self.C = self.C.resolve_neg().contiguous()
        self._arrays: Arrays | None = None

    def arrays(self, batch: torch.Size) -> Arrays | None:
        """The arrays for problems of this batch; None where some of its axes share a cost and others do not."""
        own, (n, m) = self.C.shape[:-2], self.C.shape[-2:]
        G = own.numel()
        if G > 1 and own != batch:
            return None
        if self._arrays is None:
            C = self.C.numpy().reshape(G, n, m)
            self._arrays = Arrays(C, _aligned(C), np.empty((G, n)), np.empty((G, m)), np.full((G, 1), math.nan))
        return self._arrays

    def take_over(self, eps: float) -> None:
        """What the arrays hold serves the verbs, where it is the kernel at eps."""
        assert self._arrays is not None
        _, K, f0, g0, at = self._arrays
        self.kernel = _Kernel()
        if not (at == eps).all():
            return
        shape = self.C.shape
        self.kernel.products, self.kernel.eps = Products(torch.from_numpy(K).view(shape)), eps
        self.kernel.f0, self.kernel.g0 = torch.from_numpy(f0).view(shape[:-1]), torch.from_numpy(g0).view(*shape[:-2], shape[-1])
        self._arrays = None  # a plan may take the array away

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, or None."""
        if problem.a.device.type != "cpu":
            return f"its tensors are on {problem.a.device}, and this is machine code of the CPU."
        if problem.forbids:
            return "some pairs are forbidden, and it does not look for plans that do not exist."
        if not all(penalty.balanced or isinstance(penalty, KL) for penalty in problem.penalties):
            return "it knows hard marginals and KL penalties, and one of these is neither."
        return compiled.refused()


def _aligned(like: np.ndarray) -> np.ndarray:
    """An empty array like this one that begins with a cache line, as `compiled.kernel.aligned`."""
    buffer = np.empty(like.nbytes + 64, np.uint8)
    skip = -buffer.ctypes.data % 64
    return buffer[skip : skip + like.nbytes].view(like.dtype).reshape(like.shape)
