"""Two clouds on one mesh of tiles: which tiles there are, and the way from the points of one cloud to those of the other."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import errors
from ..compiled.splines import BETA, CELL, STEEPEST, TILE

#: Tiles of a mesh at most, those near points (8 KiB each for both arrays) and all.
MOST_TILES, MOST_PLACES = 2**18, 2**21
#: Tiles or cells that a thread is worth waking for.
FEWEST = 32
#: After so many waits for others that are too long, the caller works alone for so many calls, some hundred sweeps.
LATENESS, REST = 5, 2000


class Levels(ABC):
    """The meshes of two clouds at the last two values of eps."""

    def __init__(self, per: float) -> None:
        self.per, self._kept = per, {}

    def level(self, eps: float) -> Any:
        level = self._kept.get(eps)
        if level is None:
            last = next(reversed(self._kept.values()), None)
            level = self._made(math.sqrt(eps) / self.per, last)
            self._kept = {**dict(list(self._kept.items())[-1:]), eps: level}
        return level

    @abstractmethod
    def _made(self, step: float, last: Any) -> Any:
        """The mesh of a step, with the tilts of the last."""


def frame(box: tuple[np.ndarray, np.ndarray], step: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates of the first node, in nodes, and the tiles along each axis, of a mesh of at most so many."""
    low, high = box
    # All points of an axis without extent lie in the middle of one tile, whose neighbours are not needed.
    origin = low / step - TILE - np.where(high == low, TILE / 2 - 0.5, 0.5)
    size = (high / step - origin) // TILE + 2
    if not size.prod() <= most:
        raise errors.backend_refused("mesh", _too_fine(size))
    return origin, size.astype(np.int64)


def spread(per: float) -> tuple[float, float, float]:
    """The variance of the mesh's Gaussian, in nodes, where there are `per` a deviation; the logarithm that a sum lacks; and the ratio of
    the variances of the Gaussians on the mesh and of those that are wanted."""
    variance = per**2 - 2 * BETA
    return variance, 1.5 * math.log(per**2 / variance), (per**2 - BETA) / per**2


class _Route(NamedTuple):
    """From one cloud to the other: the stages before and after each product."""

    source: Any
    target: Any
    stages: tuple[Any, ...]


class Level:
    """Both clouds on one mesh of a given step, for one eps."""

    def __init__(
        self, points: tuple[np.ndarray, np.ndarray], box: tuple[np.ndarray, np.ndarray], step: float, per: float, last: Level | None
    ) -> None:
        from ..compiled import mesh

        self.step, flat = step, box[0] == box[1]
        origin, self.shape = frame(box, step, MOST_PLACES)
        self.clouds = tuple(self._cloud(z / step - origin) for z in points)
        if last is not None:
            for mine, theirs in zip(self.clouds, last.clouds, strict=True):
                _hand_down(mine, theirs, step / last.step)
        near = [self._near(cloud, flat) for cloud in self.clouds]
        maps = [_stages(near[1 - side], near[side]) for side in (0, 1)]
        most = max(int(each.sum()) for stage in maps for each in stage)
        if most > MOST_TILES:
            raise errors.backend_refused("mesh", _too_fine(self.shape))
        arrays = [np.empty((most, mesh.TILE**3)) for _ in range(2)]
        self.routes = tuple(
            _Route(self.clouds[1 - side], self.clouds[side], tuple(_stage(z, arrays[k % 2]) for k, z in enumerate(maps[side])))
            for side in (0, 1)
        )
        self.planes = tuple(_planes(route.source) for route in self.routes)
        variance, self.constant, self.ratio = spread(per)
        self.blocks = [blocks(int(T), variance) for T in self.shape]

    def sums(self, h: np.ndarray, sign: np.ndarray, turned: bool, learn: bool, logs: np.ndarray, signs: np.ndarray) -> None:
        """log |sum_j exp(h_j - |x_i - y_j|^2 / 2) sign_j| less `constant`, and its sign, all in the order of the sorted points."""
        from ..compiled import mesh, product

        source, target, stages = self.routes[turned]
        first, last = stages[0], stages[-1]
        first.logs[:] = -np.inf
        for planes in self.planes[turned]:  # whose windows do not meet
            each(planes, mesh.deposit, source, h, sign, first)
        each(shares(len(first.slots), FEWEST), product.normalise, first)
        for axis in range(3):
            after = stages[axis + 1]
            each(shares(len(after.slots), FEWEST), product.convolve, axis, *self.blocks[axis], stages[axis], after)
        each(shares(len(target.cells), FEWEST), mesh.gather, target, last, self.ratio, learn, logs, signs)

    def _cloud(self, points: np.ndarray) -> Any:
        from ..compiled import mesh

        cells = self.shape * (TILE // CELL)
        order, counts = np.empty(len(points), np.int64), np.empty(int(cells.prod()) + 1, np.int64)
        mesh.sort_points(points, cells, order, counts)
        held = np.flatnonzero(np.diff(counts))
        starts = np.append(counts[held], len(points))
        places = np.stack(np.unravel_index(held, cells), -1).astype(np.int64)
        points = np.ascontiguousarray(points[order].T)
        centres = np.ascontiguousarray((np.add.reduceat(points, starts[:-1], 1) / np.diff(starts)).T)
        return mesh.Cloud(points, order, starts, places, centres, np.zeros_like(centres))

    def _near(self, cloud: Any, flat: np.ndarray) -> np.ndarray:
        """The tiles that its points may reach, a flag each."""
        near = np.zeros(self.shape, bool)
        near[tuple(cloud.cells.T // (TILE // CELL))] = True
        for axis in np.flatnonzero(~flat):
            before, after = np.roll(near, 1, axis), np.roll(near, -1, axis)  # the outermost tiles hold no points
            near = near | before | after
        return near


def _stages(source: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """Where the mesh is needed before and after each product, on the way from some tiles to others."""
    first = np.any(target, (1, 2), keepdims=True) & np.any(source, 0, keepdims=True)
    second = np.any(target, 2, keepdims=True) & np.any(source, (0, 1), keepdims=True)
    return [source, first, second, target]


def _stage(there: np.ndarray, values: np.ndarray) -> Any:
    from ..compiled import mesh

    slots = np.argwhere(there)
    index = np.full(there.shape, -1, np.int32)
    index[tuple(slots.T)] = np.arange(len(slots))
    return mesh.Stage(index, np.ascontiguousarray(slots), values, np.full(len(slots), -np.inf))


def blocks(T: int, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """exp(-k^2 / 2 variance) between the nodes of two tiles, [distance + T - 1, from, to], of largest entry 1, and what was taken off."""
    nodes, apart = np.arange(TILE), np.arange(1 - T, T)
    exponents = -((apart[:, None, None] * TILE + nodes[None, None, :] - nodes[None, :, None]) ** 2) / (2 * variance)
    tops = exponents.max((1, 2))
    return np.exp(exponents - tops[:, None, None]), tops


def _hand_down(mine: Any, theirs: Any, ratio: float) -> None:
    """The tilts of another mesh, of a step `ratio` times smaller: each cell takes that of its first point."""
    tile_of = np.empty(len(theirs.order), np.int64)
    tile_of[theirs.order] = np.repeat(np.arange(len(theirs.cells)), np.diff(theirs.starts))
    # The displacement z stays: a slope is z h / eps, and eps goes with h^2.
    mine.tilts[:] = theirs.tilts[tile_of[mine.order[mine.starts[:-1]]]] / ratio
    np.clip(mine.tilts, -STEEPEST, STEEPEST, out=mine.tilts)


def _planes(cloud: Any) -> list[list[tuple[int, int]]]:
    """The cells of each plane of tiles, as ranges, in three lists of planes whose windows do not meet."""
    planes = cloud.cells[:, 0] // (TILE // CELL)
    cuts = np.flatnonzero(np.diff(planes)) + 1
    ranges = pairwise([0, *cuts.tolist(), len(planes)])
    found: list[list[tuple[int, int]]] = [[], [], []]
    for low, high in ranges:
        found[int(planes[low]) % 3].append((low, high))
    return found


def shares(count: int, least: int = 1) -> list[tuple[int, int]]:
    """Parts of a range, more than there are threads so that all end together, of at least so many."""
    threads = torch.get_num_threads()
    parts = 0 if not count else 1 if threads == 1 else max(1, min(count // least, 8 * threads))
    return list(pairwise([count * k // parts for k in range(parts + 1)])) if parts else []


class _Helpers(threading.local):
    """How often those of this thread were late, and for how many calls it works alone."""

    late, calls_alone = 0.0, 0

    def judge(self, worked: float, waited: float) -> None:
        self.late = self.late + 1.0 if waited > 0.5 * worked + 2e-4 else max(0.0, self.late - 0.2)
        if self.late > LATENESS:
            self.late, self.calls_alone = 0.0, REST


_helpers = _Helpers()


def each(ranges: list[tuple[int, int]], work: Callable[..., None], *arguments: Any) -> None:
    """work(low, high, *arguments) of each range, on all cores: whoever calls takes part. Where cores are busy with something else, helpers
    come late, and the caller is faster alone: it then is, for a while."""
    threads = min(torch.get_num_threads(), len(ranges))
    parts, alone = iter(ranges), threads <= 1 or _helpers.calls_alone > 0
    if alone:
        _helpers.calls_alone = max(0, _helpers.calls_alone - (threads > 1))
        _take(parts, work, arguments)
        return
    others = [_pool(os.getpid(), threads - 1).submit(_take, parts, work, arguments) for _ in range(threads - 1)]
    begun = time.perf_counter()
    _take(parts, work, arguments)
    done = time.perf_counter()
    for other in others:
        if not other.cancel():  # who has not begun need not
            other.result()
    _helpers.judge(done - begun, time.perf_counter() - done)


def _take(parts: Iterator[tuple[int, int]], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for low, high in parts:  # shared by the threads: each takes the next
        work(low, high, *arguments)


@functools.lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that wait without spinning, kept from one sweep to the next; a process that was forked has none of its parent's."""
    return ThreadPoolExecutor(threads)


def _too_fine(size: np.ndarray) -> str:
    return (
        f"eps is so small beside the extent of the clouds that its mesh has {' x '.join(f'{8 * z:.0f}' for z in size)} nodes: "
        'take away points far from all others, raise eps, or use backend="multiscale"'
    )
