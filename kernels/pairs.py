"""Gaussian sums over the pairs of tiles on a list: log sum_j exp(L_j - |x_i - y_j|^2 / 2), and means with these weights."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of

#: Points of a tile, and columns of v that a launch takes.
BLOCK, WIDTH = 64, 16
WARPS = 8


@dataclass(frozen=True)
class Tiles:
    """Points in tiles of BLOCK.

    offsets   (3, T BLOCK) float32, of each point from the centre of its tile: a few deviations, whatever the coordinates.
    centres   (T, 3) float64
    """

    offsets: Tensor
    centres: Tensor

    @property
    def count(self) -> int:
        return len(self.centres)


def tile_sums(
    rows: Tiles, columns: Tiles, L: Tensor, tops: Tensor, starts: Tensor, tiles: Tensor, v: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(logs (T BLOCK,) float64, means (T BLOCK, c) float64): log sum_j exp(L_j - |x_i - y_j|^2 / 2) over the tiles on the list, -inf for
    none, and the means of v with these weights, None without v.

    L       (T' BLOCK,) float64; -inf for an empty atom
    tops    (T',) float64, the largest L of each tile
    starts  (T + 1,) int64, and tiles (pairs,) int64: the tiles of columns for the tile i of rows are tiles[starts[i] : starts[i + 1]]
    v       (T' BLOCK, c)
    """
    n = rows.offsets.shape[1]
    logs = torch.empty(n, dtype=torch.float64, device=L.device)
    tops = torch.where(tops > -torch.inf, tops, 0.0)
    near = (L.view(-1, BLOCK) - tops.unsqueeze(-1)).float().view(-1)
    chunks = [None] if v is None else v.split(WIDTH, -1)
    found = []
    with on_device_of(L):
        for chunk in chunks:
            padded = near if chunk is None else torch.nn.functional.pad(chunk, (0, WIDTH - chunk.shape[-1])).float().contiguous()
            means = logs if chunk is None else torch.empty(n, WIDTH, dtype=torch.float32, device=L.device)
            pairs_kernel[(rows.count,)](
                rows.offsets, columns.offsets, rows.centres, columns.centres, near, tops, starts, tiles, padded, logs, means,
                n, columns.offsets.shape[1], WEIGHED=chunk is not None, BLOCK=BLOCK, WIDTH=WIDTH, num_warps=WARPS, **FUSED,
            )  # fmt: skip
            found += [] if chunk is None else [means[:, : chunk.shape[-1]].double()]
    return logs, torch.cat(found, -1) if v is not None else None


@triton.jit(do_not_specialize=COUNTS)
def pairs_kernel(
    x, y, x_centres, y_centres, L, tops, starts, tiles, v, logs, means, n, columns,
    WEIGHED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of rows and walks along its list: per pair three subtractions, three multiply-adds, an exp2 and a sum, and
    for v a row of multiply-adds. Differences of centres are taken in float64, all else in float32: a distance keeps its digits however far
    the tiles are from the origin. State per row: (top, total), the running maximum of the exponent and the sum relative to it.
    """
    tile = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    rows = tile * BLOCK + lane  # [N]
    x0 = tl.load(x + rows)
    x1 = tl.load(x + n + rows)
    x2 = tl.load(x + 2 * n.to(tl.int64) + rows)
    c0 = tl.load(x_centres + tile * 3)
    c1 = tl.load(x_centres + tile * 3 + 1)
    c2 = tl.load(x_centres + tile * 3 + 2)
    first = tl.load(starts + tile)
    last = tl.load(starts + tile + 1)
    # Levels may be far from 0: those of the tiles on the list are taken relative to that of the first.
    level = tl.load(tops + tl.load(tiles + first, mask=first < last, other=0), mask=first < last, other=0.0)
    top = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    wide = tl.arange(0, WIDTH)
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    for k in range(first, last):
        other = tl.load(tiles + k)
        cols = other * BLOCK + lane  # [M]
        e0 = (c0 - tl.load(y_centres + other * 3)).to(tl.float32)
        e1 = (c1 - tl.load(y_centres + other * 3 + 1)).to(tl.float32)
        e2 = (c2 - tl.load(y_centres + other * 3 + 2)).to(tl.float32)
        lift = (tl.load(tops + other) - level).to(tl.float32)
        d0 = (x0 + e0)[:, None] - tl.load(y + cols)[None, :]  # [N, M]
        d1 = (x1 + e1)[:, None] - tl.load(y + columns + cols)[None, :]
        d2 = (x2 + e2)[:, None] - tl.load(y + 2 * columns.to(tl.int64) + cols)[None, :]
        z = (tl.load(L + cols) + lift)[None, :] - 0.5 * (d0 * d0 + d1 * d1 + d2 * d2)
        higher = tl.maximum(top, tl.max(z, 1))
        # exp2 is one instruction; the change of base is one multiplication.
        e = tl.exp2((z - higher[:, None]) * 1.4426950408889634)
        shrink = tl.exp2((top - higher) * 1.4426950408889634)
        total = total * shrink + tl.sum(e, 1)
        top = higher
        if WEIGHED:
            values = tl.load(v + cols[:, None] * WIDTH + wide[None, :])  # [M, W]
            sums = tl.dot(e, values, acc=sums * shrink[:, None], input_precision="ieee")
    # A row that has met nothing is -inf; its mean is 0.
    some = total > 0
    safe = tl.where(some, total, 1.0)
    found = level + top.to(tl.float64) + tl.log2(safe).to(tl.float64) * 0.6931471805599453
    tl.store(logs + rows, tl.where(some, found, -float("inf")))
    if WEIGHED:
        tl.store(means + rows[:, None] * WIDTH + wide[None, :], sums / safe[:, None])
