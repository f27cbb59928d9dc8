"""Anderson mixing for one problem: the compiled twin of `gpu_ot.solver.acceleration.Anderson`, where the reasons are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .machine import borrowing, compiled

TINY = float(np.finfo(np.float64).tiny)
LAST, TRIAL, ASCENT, PREDICTED, SIZE, CAPPED = range(6)


class Tuning(NamedTuple):
    """The constants of `Anderson`, by its names in lower case, and its `gauge`."""

    gauge: bool
    turn: float
    cap: float
    follow: float
    short: float
    long: float
    nothing_new: float


class Memory(NamedTuple):
    """`_Memory` and `_Trial` in fixed buffers, for H problems."""

    changes: np.ndarray  # (H, memory, m)
    moves: np.ndarray
    last: np.ndarray  # (H, 2, m): g and its update
    trial: np.ndarray  # (H, 2, m): g and the step
    numbers: np.ndarray  # (H, 6): whether there is a last and a trial; the trial's ascent, predicted, size and cap
    work: np.ndarray  # (5, m or memory if that is more), of one problem at a time


@compiled
def blank(H, m, memory=3):
    return Memory(
        np.zeros((H, memory, m)), np.zeros((H, memory, m)), np.empty((H, 2, m)), np.empty((H, 2, m)), np.zeros((H, 6)),
        np.empty((5, max(m, memory))),
    )  # fmt: skip


@borrowing
def _size(share, p):
    total = 0.0
    for j in range(len(p)):
        total += share[j] * p[j] * p[j]
    return math.sqrt(total)


@borrowing
def _dot(x, y):
    total = 0.0
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@borrowing
def _weighted(share, x, y):
    total = 0.0
    for j in range(len(x)):
        total += share[j] * x[j] * y[j]
    return total


@borrowing
def forget(memory, h):
    """Nothing is known of problem h."""
    memory.changes[h] = 0
    memory.moves[h] = 0
    memory.numbers[h] = 0


@borrowing
def propose(tuning, memory, h, g, target, b, share, eps, out):
    """out = the g to try next, given that an iteration led from g to `target`: (m,)."""
    m = len(g)
    changes, moves, last, trial, numbers = memory.changes[h], memory.moves[h], memory.last[h], memory.trial[h], memory.numbers[h]
    update, excess, change, move, along = (
        memory.work[0, :m], memory.work[1, :m], memory.work[2, :m], memory.work[3, :m], memory.work[4]
    )  # fmt: skip
    kept = len(changes)
    mean = 0.0
    for j in range(m):
        update[j] = target[j] - g[j] if b[j] > 0 else 0.0
        excess[j] = -b[j] * math.expm1(min(-update[j] / eps, 80.0))
        mean += share[j] * update[j]
    if tuning.gauge:
        for j in range(m):
            update[j] -= mean
    size = _size(share, update)

    judged, overshot, stale, shrink, cap = numbers[TRIAL] > 0, False, False, 1.0, tuning.cap
    if judged:
        ascent = numbers[ASCENT]
        slope = _dot(excess, trial[1])
        overshot = not slope >= -tuning.turn * ascent
        shrink = ascent / (ascent - slope)
        shrink = min(max(0.0 if math.isnan(shrink) else shrink, tuning.short), tuning.long)
        reached = tuning.follow * _size(share, trial[1]) / max(numbers[SIZE], TINY)
        cap = max(numbers[CAPPED] * shrink, 2.0) if overshot else max(numbers[CAPPED], reached)
        stale = size > numbers[PREDICTED]

    if numbers[LAST] > 0:
        if overshot or stale:
            changes[:], moves[:] = 0, 0
        for j in range(m):
            change[j], move[j] = update[j] - last[1, j], g[j] - last[0, j]
        whole = _size(share, change)
        for _ in range(2):
            for c in range(kept):
                along[c] = _weighted(share, changes[c], change)
            for c in range(kept):
                for j in range(m):
                    change[j] -= along[c] * changes[c, j]
                    move[j] -= along[c] * moves[c, j]
        new = _size(share, change)
        fit = new > tuning.nothing_new * whole and not (overshot or stale)
        for c in range(kept):
            for j in range(m):
                if c + 1 < kept:
                    changes[c, j], moves[c, j] = changes[c + 1, j], moves[c + 1, j]
                else:
                    changes[c, j], moves[c, j] = change[j] / new if fit else 0.0, move[j] / new if fit else 0.0
    if not (overshot and numbers[LAST] > 0):
        for j in range(m):
            last[0, j], last[1, j] = g[j], update[j]
    numbers[LAST] = 1

    if judged and overshot:
        for j in range(m):
            trial[1, j] *= shrink
        numbers[ASCENT] *= shrink
        numbers[PREDICTED] = np.inf
        numbers[CAPPED] = cap
    left, mixed = change, False
    for c in range(kept):
        along[c] = _weighted(share, changes[c], update)
        mixed |= along[c] != 0
    for j in range(m):
        left[j] = update[j]
    for c in range(kept):
        for j in range(m):
            left[j] -= along[c] * changes[c, j]
    for j in range(m):
        move[j] = left[j]
    for c in range(kept):
        for j in range(m):
            move[j] -= along[c] * moves[c, j]
    limit = cap * size / max(_size(share, move), TINY)
    if limit < 1:
        for j in range(m):
            move[j] *= limit
    ascent = _dot(excess, move)
    plain = not (mixed and ascent > 0)
    if mixed and not ascent > 0:
        changes[:], moves[:] = 0, 0
    if not (judged and overshot):
        for j in range(m):
            trial[0, j], trial[1, j] = g[j], update[j] if plain else move[j]
        numbers[ASCENT] = np.inf if plain else ascent
        numbers[PREDICTED] = np.inf if plain or limit < 1 else _size(share, left)
        numbers[SIZE], numbers[CAPPED] = size, cap
    numbers[TRIAL] = 1
    for j in range(m):
        out[j] = trial[0, j] + trial[1, j] if b[j] > 0 else target[j]
