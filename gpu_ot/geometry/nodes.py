"""The sums of `compiled.mesh` by operations of torch, on any device: the same mesh, splines and tilts, without numba.

The points of a cell come in groups of one size, filled up, so that deposit and gather are batches of small products: a window of a group is
the sum over its points of three splines, (64, G) by (G, 8). The mesh is one array of all nodes of the box, with a logarithm for each tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compiled.splines import BETA, CELL, MIDDLE, STEEPEST, TILE, WINDOW
from ..problem import Problem
from .coordinates import coordinates
from .tiles import Levels, blocks, frame, spread

#: Nodes of a mesh at most, 1 GiB for each of its arrays.
MOST_NODES = 2**27
#: Points of a group at least and at most; entries of one temporary on a GPU and, where it should stay in a cache, on a CPU.
SMALLEST, LARGEST = 4, 64
ENTRIES, CPU_ENTRIES = 2**24, 2**18
#: What a level of nothing is taken for where a difference would be NaN.
LOWEST = -1e300


class Pair(Levels):
    """The two clouds in coordinates in which mass stays near, and their meshes at the last values of eps."""

    def __init__(self, problem: Problem, per: float) -> None:
        super().__init__(per)
        self.offsets, self.points = coordinates(problem)
        low, high = (torch.stack([reduce(z, 0) for z in self.points]) for reduce in (torch.amin, torch.amax))
        self.box = low.amin(0).cpu().numpy(), high.amax(0).cpu().numpy()

    def updated(self, g: Tensor, log_w: Tensor | None, eps: float, damping: float, turned: bool) -> Tensor:
        """softmin(g + eps log w) / damping at the rows, or, turned, at the columns. The tilts are found anew."""
        own, other = self.offsets[::-1] if turned else self.offsets
        L = (g.detach() - other) / eps
        L = L if log_w is None else torch.where(log_w > -math.inf, L + log_w, -math.inf)
        logs, _ = self.level(eps).sums(L, None, turned)
        return (own - eps * logs) / damping

    def sums(self, h: Tensor, v: Tensor, eps: float, turned: bool) -> tuple[Tensor, Tensor]:
        """log |sum_j exp((h_j - C_ij) / eps) v_j| and its sign, at the rows, or, turned, at the columns."""
        own, other = self.offsets[::-1] if turned else self.offsets
        # An atom whose factor is 0 is absent, and nothing bounds its exponent.
        L = torch.where(v == 0, -math.inf, (h.detach() - other) / eps)
        logs, sign = self.level(eps).sums(L, v.detach(), turned)
        return logs - own / eps, sign

    def _made(self, step: float, last: Level | None) -> Level:
        return Level(self.points, self.box, step, self.per, last)


class Side:
    """The points of a cloud in groups of G, those of a group in one cell of the mesh. Coordinates are in nodes.

    taken    (c G,) which point, the first of the group in places that are filled up, which `there` (c, G) tells
    slots    (n,) the place of each point
    cells    (c, 3), centres (c, 3) of the points, tilts (c, 3) those of the last gather
    """

    def __init__(self, points: Tensor, shape: np.ndarray) -> None:
        (_, T1, T2), device = (shape * (TILE // CELL)).tolist(), points.device
        cell = (points / CELL).long()
        key, order = ((cell[:, 0] * T1 + cell[:, 1]) * T2 + cell[:, 2]).sort(stable=True)
        _, of_cell, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
        size = 2 ** round(math.log2(len(points) / len(counts)))
        self.size = G = min(max(size, SMALLEST), LARGEST)
        groups = (counts + G - 1) // G
        ends, rank = groups.cumsum(0), torch.arange(len(points), device=device) - (counts.cumsum(0) - counts)[of_cell]
        place = (ends - groups)[of_cell] * G + rank
        taken = torch.full((int(ends[-1]), G), -1, device=device)
        taken.view(-1)[place] = order
        self.there = taken >= 0
        self.taken = torch.where(self.there, taken, taken[:, :1]).view(-1)
        self.slots = torch.empty_like(order).index_copy_(0, order, place)
        self.points = points[self.taken].view(-1, G, 3)
        self.cells = (self.points[:, 0] / CELL).long()
        self.centres = (self.points * self.there.unsqueeze(-1)).sum(1) / self.there.sum(1, keepdim=True)
        self.tilts = torch.zeros_like(self.centres)

    def padded(self, z: Tensor, rest: float) -> Tensor:
        """(n,) -> (c, G)."""
        return torch.where(self.there, z[self.taken].view(-1, self.size), rest)

    def parts(self) -> Iterator[slice]:
        """Groups that are taken together: a window and the products of their splines stay within ENTRIES."""
        step = max(1, entries(self.points) // (WINDOW**2 * max(WINDOW, self.size)))
        yield from (slice(i, i + step) for i in range(0, len(self.cells), step))

    def splines(self, part: slice, start: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of points moved by `moved` (c, 3): those of two axes (c, G, 64) and of the third (c, G, 8)."""
        z = self.points[part] + (moved - start).unsqueeze(1)
        nodes = torch.arange(WINDOW, device=z.device, dtype=z.dtype)
        t = (z.unsqueeze(-1) - nodes).abs_()
        w = ((2 - t).clamp_(min=0) ** 3 - 4 * (1 - t).clamp_(min=0) ** 3) / 6
        return (w[..., 0, :].unsqueeze(-1) * w[..., 1, :].unsqueeze(-2)).flatten(-2), w[..., 2, :]


class Stage(NamedTuple):
    """values (N0, N1, N2) times exp(logs) (T0, T1, T2) of the tile."""

    values: Tensor
    logs: Tensor


class Windows:
    """WINDOW^3 nodes from `start` (c, 3) on, and the tiles where they lie: two along each axis, or one twice."""

    def __init__(self, start: Tensor, stage: Stage) -> None:
        self.stage = stage
        places = start.unsqueeze(-1) + torch.arange(WINDOW, device=start.device)  # (c, 3, 8)
        self.at, self.tiles = _raveled(places, stage.values), _corners(start, stage.logs)
        which = places // TILE - places[..., :1] // TILE  # 0 or 1
        first, second, third = _crossed(which)
        self.which = ((first * 2 + second) * 2 + third).flatten(1)

    def of_nodes(self, z: Tensor) -> Tensor:
        """A number of each tile (c, 8) -> (c, 8, 8, 8)."""
        return z.gather(1, self.which).view(-1, WINDOW, WINDOW, WINDOW)

    def taken(self) -> tuple[Tensor, Tensor]:
        """The values divided by exp(level), and the level (c,), -inf where nothing is."""
        logs = self.stage.logs.view(-1)[self.tiles]
        level = logs.amax(1)
        factor = (logs - level.clamp(min=LOWEST).unsqueeze(-1)).exp()
        return self.stage.values.view(-1)[self.at] * self.of_nodes(factor), level


class Level:
    """Both clouds on one mesh of a given step, for one eps."""

    def __init__(
        self, points: tuple[Tensor, Tensor], box: tuple[np.ndarray, np.ndarray], step: float, per: float, last: Level | None
    ) -> None:
        origin, self.shape = frame(box, step, MOST_NODES // TILE**3)
        self.step = step
        place = torch.from_numpy(origin).to(points[0])
        self.sides = [Side(z / step - place, self.shape) for z in points]
        if last is not None:
            for mine, theirs in zip(self.sides, last.sides, strict=True):
                group = theirs.slots[mine.taken[:: mine.size]] // theirs.size  # that of the first point of each
                # The displacement z stays: a slope is z h / eps, and eps goes with h^2.
                mine.tilts = (theirs.tilts[group] * (last.step / step)).clamp(-STEEPEST, STEEPEST)
        variance, self.constant, self.ratio = spread(per)
        self.axes = [_matrices(int(T), variance, place) for T in self.shape]

    def sums(self, h: Tensor, v: Tensor | None, turned: bool) -> tuple[Tensor, Tensor]:
        """log |sum_j exp(h_j - |x_i - y_j|^2 / 2) v_j| (n,), and its sign. For v None the tilts are learnt."""
        source, target = self.sides if turned else self.sides[::-1]
        stage = _normalised(self._deposited(source, source.padded(h, -math.inf), None if v is None else source.padded(v, 0.0)))
        for axis in range(3):
            stage = _normalised(_along(axis, stage, *self.axes[axis]))
        logs, total = self._gathered(target, stage, learn=v is None)
        return (logs + self.constant).view(-1)[target.slots], total.sign().view(-1)[target.slots]

    def _deposited(self, side: Side, h: Tensor, v: Tensor | None) -> Stage:
        empty = h.new_zeros(*(self.shape * TILE)), h.new_full(tuple(self.shape), -math.inf)
        stage = Stage(*empty)
        e = h - ((side.points - side.centres.unsqueeze(1)) * side.tilts.unsqueeze(1)).sum(-1)
        level = e.amax(1)
        e = (e - level.clamp(min=LOWEST).unsqueeze(1)).exp()
        e = e if v is None else e * v
        moved = -BETA * side.tilts
        start = _starts(side, moved)
        level = level + (side.tilts * (start + MIDDLE - side.centres - moved / 2)).sum(-1)
        stage.logs.view(-1).scatter_reduce_(0, _corners(start, stage.logs).view(-1), level.repeat_interleave(8), "amax")
        logs = stage.logs.clamp(min=LOWEST).view(-1)
        for part in side.parts():
            window = Windows(start[part], stage)
            two, third = side.splines(part, start[part], moved[part])
            found = (e[part].unsqueeze(-1) * two).mT @ third
            factor = (level[part].unsqueeze(-1) - logs[window.tiles]).exp()
            found = found.view(-1, WINDOW, WINDOW, WINDOW) * window.of_nodes(factor) * _powers(side.tilts[part])
            stage.values.view(-1).index_add_(0, window.at.view(-1), found.view(-1))
        return stage

    def _gathered(self, side: Side, stage: Stage, learn: bool) -> tuple[Tensor, Tensor]:
        if learn:  # what is deposited here later falls where what is gathered rises
            side.tilts = -_slopes(stage, side.centres)
        s = -self.ratio * side.tilts
        moved = BETA * s
        start, totals, levels = _starts(side, moved), [], []
        for part in side.parts():
            values, level = Windows(start[part], stage).taken()
            two, third = side.splines(part, start[part], moved[part])
            totals.append(((two @ (values * _powers(-s[part])).flatten(1, 2)) * third).sum(-1))
            levels.append(level)
        level = torch.cat(levels) + (s * (moved / 2 - start - MIDDLE)).sum(-1)
        total = torch.cat(totals)
        return level.unsqueeze(1) + (side.points * s.unsqueeze(1)).sum(-1) + total.abs().log(), total


def entries(z: Tensor) -> int:
    """Of a temporary that holds what is taken together."""
    return CPU_ENTRIES if z.device.type == "cpu" else ENTRIES


def _starts(side: Side, moved: Tensor) -> Tensor:
    """The first node (c, 3) of the windows of groups whose points are moved."""
    return side.cells * CELL + moved.floor().long() - 1


def _powers(s: Tensor) -> Tensor:
    """exp(<s, k - middle>) at the nodes of a window: s (c, 3) -> (c, 8, 8, 8)."""
    k = torch.arange(WINDOW, device=s.device, dtype=s.dtype) - MIDDLE
    first, second, third = _crossed((s.unsqueeze(-1) * k).exp())
    return first * second * third


def _raveled(places: Tensor, array: Tensor) -> Tensor:
    """Indices (c, 3, k) along three axes -> (c, k, k, k) into the array."""
    first, second, third = _crossed(places)
    return (first * array.shape[1] + second) * array.shape[2] + third


def _crossed(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three axes of z (c, 3, k), which broadcast to (c, k, k, k)."""
    return z[:, 0, :, None, None], z[:, 1, None, :, None], z[:, 2, None, None, :]


def _corners(start: Tensor, tiles: Tensor) -> Tensor:
    """The tiles (c, 8) that a window meets, along each axis two, or one twice."""
    ends = torch.stack((start, start + WINDOW - 1), -1) // TILE
    return _raveled(ends, tiles).flatten(1)


def _slopes(stage: Stage, centres: Tensor) -> Tensor:
    """The slopes (c, 3) of the logarithm of a stage, from two nodes on either side of a point, held to STEEPEST."""
    apart = 2 * torch.eye(3, device=centres.device, dtype=torch.long)
    near = centres.round().long().unsqueeze(1)
    ends = []
    for places in (near - apart, near + apart):  # (c, 3, 3): for each axis a node
        value = stage.values[places.unbind(-1)]
        ends.append(stage.logs[(places // TILE).unbind(-1)] + value.clamp(min=0).log())
    s = (ends[1] - ends[0]) / 4
    return torch.where((ends[0] > -math.inf) & (ends[1] > -math.inf), s.clamp(-STEEPEST, STEEPEST), 0.0)


def _by_tile(values: Tensor) -> Tensor:
    """(N0, N1, N2) -> (T0, 8, T1, 8, T2, 8)."""
    return values.view(*(k for size in values.shape for k in (size // TILE, TILE)))


def _wide(z: Tensor) -> Tensor:
    """(..., T0, T1, T2) -> (..., T0, 1, T1, 1, T2, 1)."""
    return z[..., None, :, None, :, None]


def _normalised(stage: Stage) -> Stage:
    """Values of at most 1."""
    most = _by_tile(stage.values).abs().amax((1, 3, 5))
    _by_tile(stage.values).div_(_wide(most.clamp(min=1e-300)))
    return Stage(stage.values, stage.logs + most.log())


def _matrices(T: int, variance: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian along an axis of T tiles: (T, 8, 8 T), for each tile from all nodes to its own, and the logarithms (T, T) taken off."""
    nodes, tops = (torch.from_numpy(z).to(like) for z in blocks(T, variance))
    away = torch.arange(T, device=like.device).unsqueeze(1) - torch.arange(T, device=like.device) + T - 1  # (to, from)
    return nodes[away].permute(0, 3, 1, 2).reshape(T, TILE, T * TILE), tops[away]


def _along(axis: int, stage: Stage, matrices: Tensor, tops: Tensor) -> Stage:
    """The product along an axis: the tiles of a line are brought to one level for each of those that they reach."""
    values, logs = stage.values.movedim(axis, 0).contiguous(), stage.logs.movedim(axis, 0)
    T, out = len(tops), torch.empty_like(values)
    z = tops[..., None, None] + logs  # (to, from, T1, T2)
    top = z.amax(1)
    factor = (z - top.clamp(min=LOWEST).unsqueeze(1)).exp()
    step = max(1, entries(values) // values.numel())
    for i in range(0, T, step):
        near = (_wide(factor[i : i + step]) * _by_tile(values)).flatten(3).flatten(1, 2)
        torch.bmm(matrices[i : i + step], near, out=out[i * TILE : (i + step) * TILE].view(len(near), TILE, -1))
    return Stage(out.movedim(0, axis).contiguous(), top.movedim(0, axis).contiguous())
