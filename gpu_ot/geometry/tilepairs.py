"""Tiles of points along a curve, which pairs of them matter, and the sums over these: on any device, by Triton's kernel or by torch.

The torch form of `compiled.sparse`. A tile of columns is left out of a tile of rows where its box, and the total of its exp(L_j), prove
that it adds less than its share of `part` to the sum of each row; the sums over the closest tile, which come first, bound them from below.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .products import kernels_refused

#: Points of a tile, as `kernels.pairs` has it; bits of a coordinate on the curve.
BLOCK, BITS = 64, 16
#: Entries of one temporary of the torch form, and of a block of bounds.
ENTRIES = 2**22


class Tiled(NamedTuple):
    """Points along the curve, padded with copies of the last.

    points   (T BLOCK, 3) float64, in deviations of the kernel
    order    (n,) where each stood
    low      (T, 3) and high: the boxes
    handed   what the kernel reads, None where there is none
    """

    points: Tensor
    order: Tensor
    low: Tensor
    high: Tensor
    handed: Any

    @property
    def middle(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def widest(self) -> float:
        """The longest diagonal of a box."""
        return float((self.high - self.low).norm(dim=-1).amax())

    def padded(self, z: Tensor) -> Tensor:
        """(n, ...) as points stood -> (T BLOCK, ...)."""
        return z[_padded(self.order)]

    def levels(self, L: Tensor) -> Tensor:
        """(n,) as points stood -> (T BLOCK,), copies of the last point without weight."""
        L = self.padded(L)
        L[len(self.order) :] = -math.inf
        return L

    def coarser(self, L: Tensor) -> tuple[Tiled, Tensor]:
        """A point for each tile, where its weight is, and its level."""
        shares = L.view(-1, BLOCK).softmax(-1).nan_to_num(1 / BLOCK)
        points = (shares.unsqueeze(-1) * self.points.view(-1, BLOCK, 3)).sum(1)
        found = tiled(points, torch.arange(len(points), device=L.device))
        return found, found.levels(L.view(-1, BLOCK).logsumexp(-1))


class Sums(NamedTuple):
    """log sum_j exp(L_j - |x_i - y_j|^2 / 2) (n,) and means of v (n, c), along the curve; the part of a sum left out at most, and pairs."""

    logs: Tensor
    means: Tensor | None
    omitted: Tensor
    pairs: int


def curve(points: Tensor) -> Tensor:
    """The order (n,) of points (n, 3) along a Hilbert curve. Skilling 2004, doi:10.1063/1.1751381."""
    low, high = points.amin(0), points.amax(0)
    scale = (2**BITS - 1) / (high - low).amax().clamp(min=1e-300)
    axes = [axis for axis, wide in enumerate((high > low).tolist()) if wide]  # a plane has a curve of its own, which stays closer together
    z = [((points[:, axis] - low[axis]) * scale).long().clamp(0, 2**BITS - 1) for axis in axes or [0]]
    for bit in range(BITS - 1, 0, -1):
        q, p = 1 << bit, (1 << bit) - 1
        for axis in range(len(z)):
            inverted = (z[axis] & q) != 0
            swapped = torch.where(inverted, 0, (z[0] ^ z[axis]) & p)
            z[0] = z[0] ^ torch.where(inverted, p, swapped)
            z[axis] = z[axis] if axis == 0 else z[axis] ^ swapped
    for axis in range(1, len(z)):
        z[axis] = z[axis] ^ z[axis - 1]
    flip, key = torch.zeros_like(z[0]), torch.zeros_like(z[0])
    for bit in range(BITS - 1, 0, -1):
        flip = torch.where((z[-1] & (1 << bit)) != 0, flip ^ ((1 << bit) - 1), flip)
    for bit in range(BITS - 1, -1, -1):
        for each in z:
            key = (key << 1) | (((each ^ flip) >> bit) & 1)
    return key.argsort(stable=True)


def tiled(points: Tensor, order: Tensor) -> Tiled:
    """Points (n, 3) in tiles along a curve."""
    padded = points[_padded(order)]
    tiles = padded.view(-1, BLOCK, 3)
    low, high = tiles.amin(1), tiles.amax(1)
    handed = None
    if kernels_refused(points.device) is None:
        from ..kernels.pairs import Tiles  # pyright: ignore[reportMissingImports]

        middle = (low + high) / 2
        handed = Tiles((tiles - middle.unsqueeze(1)).float().view(-1, 3).mT.contiguous(), middle.contiguous())
    return Tiled(padded, order, low, high, handed)


def sums(rows: Tiled, columns: Tiled, L: Tensor, v: Tensor | None, part: float) -> Sums:
    """The sums with L (T BLOCK,) and v (T BLOCK, c), of which at most `part` is left out. A read for each strip of tiles:
    how many pairs there are."""
    tops, totals = L.view(-1, BLOCK).amax(1), L.view(-1, BLOCK).logsumexp(1)
    every = torch.arange(len(rows.low) + 1, device=L.device)
    least = _tile_sums(rows, columns, L, tops, every, _closest(rows, columns, totals), None)[0].view(-1, BLOCK).amin(1)
    starts, tiles, omitted = _matter(rows, columns, totals, least, part)
    logs, means = _tile_sums(rows, columns, L, tops, starts, tiles, v)
    n = len(rows.order)
    return Sums(logs[:n], None if means is None else means[:n], omitted, len(tiles) * BLOCK**2)


def _padded(order: Tensor) -> Tensor:
    missing = -len(order) % BLOCK
    return torch.cat((order, order[-1:].expand(missing))) if missing else order


def _strips(rows: Tiled, columns: Tiled) -> list[slice]:
    size = max(1, ENTRIES // len(columns.low))
    return [slice(i, i + size) for i in range(0, len(rows.low), size)]


def _closest(rows: Tiled, columns: Tiled, totals: Tensor) -> Tensor:
    """(T,): the tile that adds most at the middle of each, of those with weight."""
    found = []
    for strip in _strips(rows, columns):
        gap = torch.zeros(1, dtype=totals.dtype, device=totals.device)
        for axis in range(3):
            z = rows.middle[strip, axis].unsqueeze(-1)
            gap = gap + torch.maximum(columns.low[:, axis] - z, z - columns.high[:, axis]).clamp(min=0.0).square()
        found.append((totals - gap / 2).argmax(-1))
    return torch.cat(found)


def _matter(rows: Tiled, columns: Tiled, totals: Tensor, least: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, tiles) of the pairs that matter, where each sum is at least exp(least), and the part of a sum left out at most."""
    cut, counts, tiles, omitted = math.log(part / len(columns.low)), [], [], []
    for strip in _strips(rows, columns):
        gap = torch.zeros(1, dtype=totals.dtype, device=totals.device)
        for axis in range(3):
            low, high = (z[strip, axis].unsqueeze(-1) for z in (rows.low, rows.high))
            gap = gap + torch.maximum(columns.low[:, axis] - high, low - columns.high[:, axis]).clamp(min=0.0).square()
        bound = totals - gap / 2 - least[strip].unsqueeze(-1)
        keep = (bound >= cut) & (totals > -math.inf)
        counts.append(keep.sum(-1))
        tiles.append(keep.nonzero()[:, 1])
        omitted.append(torch.where(keep | (totals == -math.inf), 0.0, bound.exp()).sum(-1).amax())
    starts = torch.cat((counts[0].new_zeros(1), *counts)).cumsum(0)
    return starts, torch.cat(tiles), torch.stack(omitted).amax()


def _tile_sums(
    rows: Tiled, columns: Tiled, L: Tensor, tops: Tensor, starts: Tensor, tiles: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if rows.handed is None:
        return by_torch(rows.points, columns.points, L, starts, tiles, v)
    from ..kernels.pairs import tile_sums  # pyright: ignore[reportMissingImports]

    return tile_sums(rows.handed, columns.handed, L, tops, starts, tiles, v)


def by_torch(x: Tensor, y: Tensor, L: Tensor, starts: Tensor, tiles: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`kernels.pairs.tile_sums` by operations of torch, in float64: as many pairs of tiles at a time as make ENTRIES."""
    x, y, L = x.view(-1, BLOCK, 3), y.view(-1, BLOCK, 3), L.view(-1, BLOCK)
    owner = torch.repeat_interleave(torch.arange(len(x), device=x.device), starts.diff(), output_size=len(tiles))
    top, total = torch.full_like(x[..., 0], -math.inf), torch.zeros_like(x[..., 0])
    means = None if v is None else x.new_zeros(*total.shape, v.shape[-1])
    v = None if v is None else v.to(x).view(-1, BLOCK, v.shape[-1])
    for i, j in zip(owner.split(ENTRIES // BLOCK**2), tiles.split(ENTRIES // BLOCK**2), strict=True):
        z = L[j].unsqueeze(1).expand(-1, BLOCK, -1).clone()  # (pairs, rows, columns)
        for axis in range(3):
            z -= (x[i, :, axis].unsqueeze(-1) - y[j, :, axis].unsqueeze(1)).square_().mul_(0.5)
        higher = top.scatter_reduce(0, i.unsqueeze(-1).expand(-1, BLOCK), z.amax(-1), "amax")
        safe = torch.where(higher > -math.inf, higher, 0.0)
        e = z.sub_(safe[i].unsqueeze(-1)).exp_()
        shrink = (top - safe).exp()
        total, top = (total * shrink).index_add_(0, i, e.sum(-1)), higher
        if means is not None and v is not None:
            means = (means * shrink.unsqueeze(-1)).index_add_(0, i, e @ v[j])
    logs = torch.where(total > 0, top + total.log(), -math.inf).view(-1)
    if means is None:
        return logs, None
    return logs, torch.where(total > 0, 1 / total, 0.0).view(-1, 1) * means.flatten(0, 1)
