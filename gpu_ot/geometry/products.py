"""Both products of an iteration, K w and K^T (a u) with u computed from K w, on a stored kernel K.

On a CPU, torch runs a lone matrix-vector product on one core. A kernel that fits the last cache is therefore posed as a batch, one
part a core. Of a larger one, threads take blocks of rows that fit a core's own cache: a block gives its sums, and then its part of the
column sums without being read from memory again. On a GPU one Triton kernel does the same with whole rows in registers, where rows fit
there and u is 1 / s or a `Power`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..vectors import exp, log

#: Below this many entries a product takes less time than waking another core.
LONE_ENTRIES = 2**17
#: Up to here a kernel stays in the last cache from one product to the next: half of a common one.
CACHED_BYTES = 2**24
#: Per block of a larger one, a core's own cache. Measured on 2 cores, n = 3000, ms an iteration at 0.5, 1, 1.5, 2 MB: 2.5, 2.6, 2.8, 2.6
#: in float64 (3.4 as a batch), 1.2, 1.1, 1.2, 1.3 in float32 (1.7 as a batch).
BLOCK_BYTES = 2**20

#: scaling(sums, rows) -> u for those rows, all when left out; None is 1 / sums, the hard constraint
Scaling = Callable[..., Tensor] | None


@dataclass(frozen=True)
class Power:
    """The scaling u = s^-p exp(c), in the form that kernels take: what KL(tau) makes of the sums of a kernel absorbed at f0.

    From u = exp((damp(f0 - eps log s) - f0) / eps) with damp(f) = f tau / (tau + eps): p = tau / (tau + eps), c = -f0 / (tau + eps).
    """

    p: Tensor  # (1,) float64
    c: Tensor  # (*batch, n) float64

    @classmethod
    def damped(cls, f0: Tensor, tau: float, eps: float) -> Power:
        return cls(f0.new_full((1,), 1 / (1 + eps / tau)), f0 / -(tau + eps))

    def __call__(self, sums: Tensor, rows: slice = slice(None)) -> Tensor:
        return exp(self.c[..., rows] - self.p * log(sums.to(self.c.dtype))).to(sums.dtype)


class Products:
    """A kernel K (n, m), shared by any batch of vectors, or (*batch, n, m)."""

    def __init__(self, K: Tensor) -> None:
        self.K = K
        n, m = K.shape[-2:]
        self.cores = min(torch.get_num_threads(), n) if n * m > LONE_ENTRIES else 1
        self.lone = K.ndim == 2 and K.device.type == "cpu"
        large = self.lone and self.cores > 1 and K.numel() * K.itemsize > CACHED_BYTES
        self.pool = ThreadPoolExecutor(self.cores - 1) if large else None
        self.whole_rows = K.device.type == "cuda" and _has_kernel(K)

    def iterate(
        self, w: Tensor, a: Tensor, b: Tensor, rows: Scaling, columns: Scaling, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """k iterations s = K w, t = K^T (a rows(s)), w = b columns(t): (s, t, w, the t before) of the last."""
        before, t = None, w
        if self.lone and self.cores == 1 and w.ndim == 1 and rows is None and columns is None:  # the small problem: nothing but products
            K, K_T, s = self.K, self.K.T, a
            for i in range(k):
                if i:
                    before, w = t, b / t
                s = torch.mv(K, w)
                t = torch.mv(K_T, a / s)
            return s, t, w, before
        s, t = self.both(w, a, rows)
        for _ in range(k - 1):
            before, w = t, b / t if columns is None else b * columns(t)
            s, t = self.both(w, a, rows)
        return s, t, w, before

    def both(self, w: Tensor, a: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """s = K w (*batch, n) and t = K^T (a u) (*batch, m), where u = scaling(s)."""
        if self.pool is not None and w.ndim == 1:
            return self._in_one_read(self.pool, w, a, scaling)
        # Vectors that share a kernel are a product of matrices instead, which reads it for all of them at once.
        if self.whole_rows and w.shape[:-1] == self.K.shape[:-2] and (scaling is None or isinstance(scaling, Power)):
            return self._by_whole_rows(w, a, scaling)
        s = self.rows(w)
        return s, self.columns(a / s if scaling is None else a * scaling(s))

    def rows(self, w: Tensor) -> Tensor:
        """K w (*batch, n)."""
        K, cores = self.K, self.cores
        if not self.lone or w.ndim > 1:
            return w @ K.mT if K.ndim == 2 else (K @ w.unsqueeze(-1)).squeeze(-1)
        even = len(K) // cores * cores
        # A row vector times matrices: the form in which a batch of products runs on all cores.
        s = torch.bmm(w.expand(cores, 1, -1), K[:even].view(cores, -1, K.shape[1]).mT).view(-1)
        return s if even == len(K) else torch.cat((s, K[even:] @ w))

    def columns(self, u: Tensor) -> Tensor:
        """K^T u (*batch, m)."""
        K, cores = self.K, self.cores
        if not self.lone or u.ndim > 1:
            return u @ K if K.ndim == 2 else (K.mT @ u.unsqueeze(-1)).squeeze(-1)
        even = len(K) // cores * cores
        t = torch.bmm(u[:even].view(cores, 1, -1), K[:even].view(cores, -1, K.shape[1])).sum((0, 1))
        return t if even == len(K) else t + u[even:] @ K[even:]

    def _by_whole_rows(self, w: Tensor, a: Tensor, scaling: Power | None) -> tuple[Tensor, Tensor]:
        from ..kernels.scaling import both  # pyright: ignore[reportMissingImports]

        n, m = self.K.shape[-2:]
        power = None if scaling is None else (scaling.p, scaling.c.reshape(-1, n))
        s, t = both(self.K.reshape(-1, n, m), w.reshape(-1, m), a.reshape(-1, n), power)
        return s.view(a.shape), t.view(w.shape)

    def _in_one_read(self, pool: ThreadPoolExecutor, w: Tensor, a: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        # numpy's products, on the same memory: they let the other threads run, and so little else does that they seldom wait.
        (n, m), K, vector, weights = self.K.shape, self.K.numpy(), w.numpy(), a.numpy()
        s = torch.empty_like(a)
        sums = s.numpy()

        def share(part: slice) -> np.ndarray:
            t = np.zeros_like(vector)
            for rows in by_rows(part.stop, max(1, BLOCK_BYTES // (m * K.itemsize)), part.start):
                np.dot(K[rows], vector, out=sums[rows])
                u = weights[rows] / sums[rows] if scaling is None else (a[rows] * scaling(s[rows], rows)).numpy()
                t += u.dot(K[rows])
            return t

        own, *others = by_rows(n, -(-n // self.cores))
        rest = [pool.submit(share, part) for part in others]
        t = sum((part.result() for part in rest), start=share(own))
        return s, torch.from_numpy(t)


def _has_kernel(K: Tensor) -> bool:
    """Whether the kernel that reads K once can be had here, and a row of K fits in it."""
    if kernels_refused(K.device) is not None:
        return False
    from ..kernels.scaling import fits  # pyright: ignore[reportMissingImports]

    return fits(K)


def kernels_refused(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None. Reads no numbers, and waits for no device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it has wheels for Linux; pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its tensors are on {device}, and Triton's kernels run on a GPU."
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than what the kernels are compiled for: compute capability 8.0, an A100 or RTX 30."
    try:
        importlib.import_module("gpu_ot.kernels.tiles")
    except ImportError as missing:
        return f"its kernels cannot be imported: {missing}"
    return None


def serves_vectors(*tensors: Tensor) -> bool:
    """Whether kernels may work on vectors like these. They know no derivatives, and what a transform makes of tensors they cannot read."""
    if any(z.device.type != "cuda" for z in tensors) and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return not torch.is_grad_enabled() and all(z.dtype == torch.float64 for z in tensors) and _run_on(tensors[0].device)


@functools.cache
def _run_on(device: torch.device) -> bool:
    return kernels_refused(device) is None


def flatten(z: Tensor) -> Tensor:
    """(*batch, n) -> (B, n), as kernels take it."""
    return z.reshape(-1, z.shape[-1]).contiguous()


def vectors(z: Tensor) -> Tensor:
    """`flatten`, or (n,) where all of the batch is one vector in memory."""
    if z.ndim == 1 or any(stride for stride, size in zip(z.stride()[:-1], z.shape[:-1], strict=True) if size > 1):
        return flatten(z)
    return z[(0,) * (z.ndim - 1)].contiguous()


def by_rows(stop: int, block: int, start: int = 0) -> list[slice]:
    if 0 < stop - start <= block:  # the usual case of a small problem
        return [slice(start, stop)]
    return [slice(i, min(i + block, stop)) for i in range(start, stop, block)]
