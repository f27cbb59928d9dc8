"""Every target episode against every source episode: their labels made comparable, aligned in threads, the nearest kept."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import ProblemError
from .dtw import Alignment, checked, dtw
from .episodes import Recording, Side
from .pairs import PairOptions, Pairs

#: A recording of `read_recording`, or labels (frames, d) of each episode, numbered from 0.
Episodes = Recording | Sequence[np.ndarray]
#: Told (pairs done, pairs in all).
Progress = Callable[[int, int], None]


def pair_episodes(
    source: Episodes, target: Episodes, options: PairOptions | None = None, *, workers: int | None = None, progress: Progress | None = None
) -> Pairs:
    """DTW of every target episode with every source episode, in threads: the compiled kernel needs no lock.

    `workers` threads, by default one a processor; `progress` is told from this thread.
    Raises ProblemError naming the episode that cannot be compared.
    """
    options = options or PairOptions()
    (from_side, xs), (to_side, ys) = _episodes(source, "source"), _episodes(target, "target")
    xs, ys = _prepare(xs, ys, options)
    band = None if options.band is None else max(1.0, options.band / options.stride)
    kept_x, kept_y = ([np.unique([*range(0, len(z), options.stride), len(z) - 1]) for z in zs] for zs in (xs, ys))  # episodes end together
    short_x, short_y = ([z[k] for z, k in zip(zs, ks, strict=True)] for zs, ks in ((xs, kept_x), (ys, kept_y)))
    arcs = [[_arc(z, options.cost) for z in zs] if options.norm == "arc" else [] for zs in (xs, ys)]

    def work(task: tuple[int, int]) -> Alignment:
        return dtw(short_x[task[1]], short_y[task[0]], cost=options.cost, band=band)

    dtw(short_x[0], short_y[0][:1], cost=options.cost)  # compiled once, before threads wait for it
    tasks = list(itertools.product(range(len(ys)), range(len(xs))))
    rows: list[tuple[Any, ...]] = []
    gathered: list[tuple[float, int, Alignment]] = []
    with ThreadPoolExecutor(workers or _processors()) as pool:
        for done, ((j, i), alignment) in enumerate(zip(tasks, pool.map(work, tasks), strict=True), 1):
            gathered.append((_normalised(alignment, options, i, j, arcs), i, alignment))
            if i + 1 == len(xs):
                for distance, k, a in sorted(gathered, key=lambda each: each[:2])[: options.topk]:
                    # All frames of y meet the frames of x on straight lines between those that were compared.
                    at = np.arange(len(ys[j]))
                    first, last = (np.rint(np.interp(at, kept_y[j], kept_x[k][z])).astype(np.int32) for z in (a.first, a.last))
                    episodes = int(to_side.episodes[j]), int(from_side.episodes[k])
                    rows.append((*episodes, a.total, a.steps, distance, first, last - first + 1))
                gathered = []
            if progress is not None and (done % len(xs) == 0 or done % 32 == 0):
                progress(done, len(tasks))
    return Pairs.of_rows(from_side, to_side, options, rows)


def _episodes(given: Episodes, role: str) -> tuple[Side, Sequence[np.ndarray]]:
    if isinstance(given, Recording):
        return given.side, given.episodes()
    return Side(role, None, np.arange(len(given)), np.array([len(each) for each in given], dtype=np.int64)), given


def _prepare(source: Sequence[np.ndarray], target: Sequence[np.ndarray], options: PairOptions) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sliced, centred, scaled; checked on the way."""
    sides = []
    for role, given in (("source", source), ("target", target)):
        if len(given) == 0:
            raise ProblemError(f"{role} has no episodes.")
        episodes = [checked(each, f"{role} episode {k}") for k, each in enumerate(given)]
        if options.dim_slice is not None:
            a, b = options.dim_slice
            if narrow := [z.shape[1] for z in episodes if z.shape[1] < b]:
                raise ProblemError(f"dim_slice = [{a}, {b}) does not fit {role}, whose label has {narrow[0]} features.")
            episodes = [np.ascontiguousarray(z[:, a:b]) for z in episodes]
        sides.append([z - z.mean(0) for z in episodes] if options.center else episodes)
    widths = {z.shape[1] for side in sides for z in side}
    if len(widths) > 1:
        raise ProblemError(
            f"labels have {' and '.join(map(str, sorted(widths)))} features in different episodes; both sides need the same ones. "
            "Choose those they share with dim_slice, or other keys."
        )
    if options.zscore:
        every = np.concatenate([z for side in sides for z in side])
        mean, std = every.mean(0), every.std(0)
        std[std <= 1e-12 * np.abs(every).max(0)] = np.inf  # constant up to rounding: it tells nothing, so it becomes 0
        sides = [[(z - mean) / std for z in side] for side in sides]
    return sides[0], sides[1]


def _arc(z: np.ndarray, cost: str) -> float:
    """Length of a trajectory, its steps measured like the distance between trajectories."""
    gap = np.abs(np.diff(z, axis=0))
    return float((gap.sum(1) if cost == "l1" else gap.max(1, initial=0) if cost == "linf" else np.sqrt((gap * gap).sum(1))).sum())


def _normalised(a: Alignment, options: PairOptions, i: int, j: int, arcs: list[list[float]]) -> float:
    if options.norm != "arc" or a.total == 0:
        return a.total / (a.steps if options.norm == "steps" else 1)
    if (arc := (arcs[0][i] + arcs[1][j]) / 2) == 0:
        raise ProblemError(
            f'norm = "arc" is undefined where nothing moves: source episode {i} and target episode {j} stand still. Take "steps".'
        )
    return a.total * options.stride / arc


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
