"""Both products of an iteration, K w and K^T (a u) with u computed from K w, on a stored kernel K.

On a CPU, torch runs a lone matrix-vector product on one core, so each is posed as a batch with one part a core. A kernel larger
than the last cache goes block by block: rows still in the cache when their sums are known give their column contributions
without a second trip to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Below this many entries a product takes less time than waking another core.
LONE_ENTRIES = 2**17
#: Up to here a kernel stays in the last cache from one product to the next, and is one block.
CACHED_BYTES = 2**24
#: Per block of a larger one. Measured on 2 cores with n = 3000, ms an iteration at 1.4, 2.4, 6, 12 and 72 MB: 2.6, 2.6, 2.7, 2.9, 3.1
#: in float64; at 0.7, 1.2, 3, 6 and 36 MB: 1.4, 1.2, 1.5, 1.5, 1.6 in float32.
BLOCK_BYTES = 5 * 2**19

#: scaling(sums, rows) -> u for those rows
Scaling = Callable[[Tensor, slice], Tensor]


class Products:
    """A kernel K (n, m), shared by any batch of vectors, or (*batch, n, m)."""

    def __init__(self, K: Tensor) -> None:
        self.K = K
        self.blocks = list(_blocks(K)) if K.ndim == 2 and K.device.type == "cpu" else []

    def both(self, w: Tensor, a: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """s = K w (*batch, n) and t = K^T (a scaling(s)) (*batch, m)."""
        if self.blocks and w.ndim == 1:
            return self._by_blocks(w, a, scaling)
        s = w @ self.K.mT if self.K.ndim == 2 else (self.K @ w.unsqueeze(-1)).squeeze(-1)
        u = a * scaling(s, slice(None))
        return s, u @ self.K if self.K.ndim == 2 else (self.K.mT @ u.unsqueeze(-1)).squeeze(-1)

    def _by_blocks(self, w: Tensor, a: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        s, t = torch.empty_like(a), torch.zeros_like(w)
        shared = {cores: (w.expand(cores, 1, -1), t.new_zeros(cores, 1, len(t))) for _, cores, _, _ in self.blocks}
        for rows, cores, block, transpose in self.blocks:
            vector, partial = shared[cores]
            sums = s[rows]
            # Row vectors times matrices: the form in which a batch of products runs on all cores.
            torch.bmm(vector, transpose, out=sums.view(cores, 1, -1))
            partial.baddbmm_((a[rows] * scaling(sums, rows)).view(cores, 1, -1), block)
        return s, sum((partial.sum((0, 1)) for _, partial in shared.values()), start=t)


def by_rows(n: int, block: int) -> Iterator[slice]:
    return (slice(i, min(i + block, n)) for i in range(0, n, block))


def _blocks(K: Tensor) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """(rows, cores, K[rows] as (cores, size, m), its transpose) over all rows; the few that do not share out evenly come last."""
    n, m = K.shape
    cores = min(torch.get_num_threads(), n) if K.numel() > LONE_ENTRIES else 1
    even = n // cores * cores
    size = K.numel() * K.itemsize if K.numel() * K.itemsize <= CACHED_BYTES else BLOCK_BYTES
    for rows in by_rows(even, max(1, size // (cores * m * K.itemsize)) * cores):
        block = K[rows].view(cores, -1, m)
        yield rows, cores, block, block.mT
    if even < n:
        block = K[even:].unsqueeze(0)
        yield slice(even, n), 1, block, block.mT
