"""The product of a mesh of tiles with a Gaussian along one axis. See `mesh`, whose stages these are."""

from __future__ import annotations

import math

import numpy as np

from .machine import compiled, extreme, greater, lesser
from .splines import TILE

#: Tiles whose values are below exp(-FAINT) of the largest are left out of a sum. Within a tile values differ by up to exp(100).
FAINT = 160.0
#: And tiles further than the neighbours that add less than this part to each sum of a tile, where all of these are positive.
NOTHING = 1e-13


@compiled
def normalise(low, high, stage):
    """Values of the slots low..high that are at most 1."""
    for slot in range(low, high):
        if stage.logs[slot] > -np.inf:
            _store(stage.values[slot], stage.logs[slot], stage, slot)


@extreme
def _largest(values):
    most = 0.0
    for z in range(TILE**3):
        most = greater(most, abs(values[z]))
    return most


@extreme
def _least(values):
    least = values[0]
    for z in range(TILE**3):
        least = lesser(least, values[z])
    return least


@compiled
def _store(values, level, stage, slot):
    """values exp(level) in a slot."""
    most = _largest(values)
    stage.logs[slot] = -np.inf
    if most > 0.0:
        stage.logs[slot] = level + math.log(most)
        target, scale = stage.values[slot], 1.0 / most
        for z in range(TILE**3):
            target[z] = values[z] * scale


@compiled
def convolve(low, high, axis, blocks, tops, before, after):
    """The product along an axis, for the slots low..high of `after`. blocks (2 T - 1, TILE, TILE), [tile distance, from, to], of largest
    entry 1 and tops (2 T - 1,) the logarithms taken off them."""
    T, acc = before.slot_of.shape[axis], np.empty(TILE**3)
    sources = np.empty(T, np.int64)
    for slot in range(low, high):
        t0, t1, t2 = after.slots[slot]
        own = t0 if axis == 0 else t1 if axis == 1 else t2
        top = -np.inf
        for t in range(T):
            source = before.slot_of[t, t1, t2] if axis == 0 else before.slot_of[t0, t, t2] if axis == 1 else before.slot_of[t0, t1, t]
            sources[t] = source
            if source >= 0:
                z = before.logs[source] + tops[own - t + T - 1]
                top = z if z > top else top
        after.logs[slot] = -np.inf
        if top == -np.inf:
            continue
        acc[:] = 0.0
        least = 0.0
        for away in range(max(own, T - 1 - own) + 1):
            if away == 2:
                least = _least(acc) * (NOTHING / TILE)
            for side in range(2 if away else 1):
                t = own + away if side else own - away
                if t < 0 or t >= T or sources[t] < 0:
                    continue
                z = before.logs[sources[t]] + tops[own - t + T - 1] - top
                if z < -FAINT:
                    continue
                factor, block = math.exp(z), blocks[own - t + T - 1]
                first, last, near = 0, TILE, 0 if t > own else TILE - 1
                if away > 1:  # of whose nodes the far ones get nothing to speak of
                    while first < last and factor * block[near, first] <= least:
                        first += 1
                    while first < last and factor * block[near, last - 1] <= least:
                        last -= 1
                if first < last:
                    _add_product(axis, factor, block, before.values[sources[t]], acc, first, last)
        _store(acc, top, after, slot)


@compiled
def _add_product(axis, factor, block, values, acc, first, last):
    """acc += factor times the product along an axis, at its nodes first..last: entries stay in a register for the eight terms of a sum.
    (Along the third axis, whose nodes are a vector, at all of them.)"""
    if axis == 2:
        for i in range(64):
            at = 8 * i
            v0, v1, v2, v3 = factor * values[at], factor * values[at + 1], factor * values[at + 2], factor * values[at + 3]
            v4, v5, v6, v7 = factor * values[at + 4], factor * values[at + 5], factor * values[at + 6], factor * values[at + 7]
            for r in range(8):
                acc[at + r] += (
                    v0 * block[0, r] + v1 * block[1, r] + v2 * block[2, r] + v3 * block[3, r]
                    + v4 * block[4, r] + v5 * block[5, r] + v6 * block[6, r] + v7 * block[7, r]
                )  # fmt: skip
        return
    for r in range(first, last):
        c0, c1, c2, c3 = factor * block[0, r], factor * block[1, r], factor * block[2, r], factor * block[3, r]
        c4, c5, c6, c7 = factor * block[4, r], factor * block[5, r], factor * block[6, r], factor * block[7, r]
        if axis == 0:
            for z in range(64):
                acc[r * 64 + z] += (
                    c0 * values[z] + c1 * values[64 + z] + c2 * values[128 + z] + c3 * values[192 + z]
                    + c4 * values[256 + z] + c5 * values[320 + z] + c6 * values[384 + z] + c7 * values[448 + z]
                )  # fmt: skip
        else:
            for i in range(8):
                at = 64 * i
                for z in range(8):
                    acc[at + r * 8 + z] += (
                        c0 * values[at + z] + c1 * values[at + 8 + z] + c2 * values[at + 16 + z] + c3 * values[at + 24 + z]
                        + c4 * values[at + 32 + z] + c5 * values[at + 40 + z] + c6 * values[at + 48 + z] + c7 * values[at + 56 + z]
                    )  # fmt: skip
