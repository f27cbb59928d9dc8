"""Both products of an iteration, K w and K^T (a u) with u computed from K w, reading K once where that can be had.

A block of rows that is still in the cache when its sums are known gives its column contributions without a second read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: A CPU matrix above this size is worth cutting into blocks; below it both reads hit the last cache anyway.
CACHED_BYTES = 2**24
#: Rows per block: 64 rows of 3000 float64 are 1.5 MB, a core's second-level cache. Measured: 32-128 alike, 256 slower.
BLOCK_ROWS = 64

#: scaling(sums, rows) -> u for those rows
Scaling = Callable[[Tensor, slice], Tensor]


def by_rows(n: int, block: int, start: int = 0) -> Iterator[slice]:
    return (slice(i, min(i + block, n)) for i in range(start, n, block))


def both_products(K: Tensor, w: Tensor, a: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """s = K w (*batch, n) and t = K^T (a scaling(s)) (*batch, m), for K (n, m) shared by the batch or (*batch, n, m)."""
    everything = slice(None)
    if K.ndim == 2 and w.ndim == 1 and K.device.type == "cpu":
        if K.numel() * K.itemsize > CACHED_BYTES:
            return _in_one_read(K, w, a, scaling)
        s = _dot(K, w)
        return s, _dot(a * scaling(s, everything), K)
    if K.ndim == 2:
        s = w @ K.mT
        return s, (a * scaling(s, everything)) @ K
    s = (K @ w.unsqueeze(-1)).squeeze(-1)
    return s, (K.mT @ (a * scaling(s, everything)).unsqueeze(-1)).squeeze(-1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    # numpy's BLAS, on the same memory: torch's matrix-vector product runs on one thread on processors its MKL does not favour.
    return torch.from_numpy(left.numpy().dot(right.numpy()))


def _in_one_read(K: Tensor, w: Tensor, a: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    n, m = K.shape
    s = K.new_empty(n)

    def columns_of(part: slice) -> Tensor:
        t = K.new_zeros(m)
        for rows in by_rows(part.stop, BLOCK_ROWS, part.start):
            s[rows] = _dot(K[rows], w)
            t += _dot(a[rows] * scaling(s[rows], rows), K[rows])
        return t

    threads = torch.get_num_threads()
    parts = by_rows(n, -(-n // threads))
    with ThreadPoolExecutor(threads) as pool:  # the products release the interpreter's lock
        first, *rest = pool.map(columns_of, parts)
    return s, sum(rest, start=first)
