"""How many bytes an iteration sends, counted from the layout."""

from __future__ import annotations

from ..communicator import COLUMNS, ROWS
from .costs import Sharded
from .group import even_sizes


def traffic(cost: Sharded, checks: int = 1, rank: int | None = None, vector_bytes: int = 8) -> int:
    """Bytes that a rank (this one) sends in an iteration with so many convergence checks. For n rows, m columns and R ranks:

    replicated  each rank sends its softmins of the columns to the ranks that join them, an even part of the columns each, and those send
                what they joined to all: 2 (R - 1) / R m numbers. A check gathers the row potentials: (R - 1) n_r, n_r the largest shard.
    ring        all shards but its successor's pass through a rank, y for the rows and x for the columns; and (R - 1) (n_r + m_r)
                numbers for the softmins.
    """
    size, rank = cost.ranks.group.size, cost.ranks.rank if rank is None else rank
    rows, columns = cost.ranks.sizes
    m, batch = cost.shape[-1], max(1, cost.shape[:-2].numel())
    if size == 1:
        return 0
    assert rows is not None
    if cost.layout == "replicated":
        parts = even_sizes(m, size)
        return batch * vector_bytes * (m - parts[rank] + (size - 1) * (parts[0] + checks * max(rows)))
    assert columns is not None
    sent = (size - 1) * (max(rows) + max(columns)) * vector_bytes * batch
    for side, sizes in ((ROWS, rows), (COLUMNS, columns)):
        width = sum(z.shape[-1] * z.itemsize for z in cost.pieces.points(side))
        sent += batch * width * (sum(sizes) - sizes[(rank + 1) % size])
    return sent
