"""The product of a mesh of tiles with a Gaussian along one axis. See `mesh`, whose stages these are."""

from __future__ import annotations

import math

import numpy as np

from .kernel import turn
from .machine import apart, compiled, extreme, greater, lesser
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
            values = stage.values[slot]
            scale = _level(values, stage.logs[slot], stage, slot)
            for z in range(TILE**3):
                values[z] *= scale


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
def _level(values, level, stage, slot):
    """Takes the largest of values exp(level) as the level of a slot, and returns what the values are to be multiplied by."""
    most = _largest(values)
    stage.logs[slot] = level + math.log(most) if most > 0.0 else -np.inf
    return 1.0 / most if most > 0.0 else 0.0


@compiled
def convolve(low, high, axis, blocks, tops, before, after):
    """The product along an axis, for the slots low..high of `after`. blocks (2 T - 1, TILE, TILE), [tile distance, from, to], of largest
    entry 1 and tops (2 T - 1,) the logarithms taken off them. The axis is the first of the tiles before and the last of those after."""
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
                    _add_product(factor, block, before.values[sources[t]], acc, first, last)
        scale = _level(acc, top, after, slot)
        for z in range(TILE**3):
            acc[z] *= scale
        turn(acc.reshape((TILE, TILE**2)), after.values[slot].reshape((TILE**2, TILE)))


@apart
def _add_product(factor, block, values, acc, first, last):
    """acc += factor times the product along the first axis, at its nodes first..last, two at a time: entries stay in a register for the
    eight terms of a sum."""
    for half in range(TILE // 2):
        r = 2 * half
        if r + 2 <= first or r >= last:
            continue
        a0, a1, a2, a3 = factor * block[0, r], factor * block[1, r], factor * block[2, r], factor * block[3, r]
        a4, a5, a6, a7 = factor * block[4, r], factor * block[5, r], factor * block[6, r], factor * block[7, r]
        b0, b1, b2, b3 = factor * block[0, r + 1], factor * block[1, r + 1], factor * block[2, r + 1], factor * block[3, r + 1]
        b4, b5, b6, b7 = factor * block[4, r + 1], factor * block[5, r + 1], factor * block[6, r + 1], factor * block[7, r + 1]
        for z in range(64):
            v0, v1, v2, v3 = values[z], values[64 + z], values[128 + z], values[192 + z]
            v4, v5, v6, v7 = values[256 + z], values[320 + z], values[384 + z], values[448 + z]
            acc[64 * r + z] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3 + a4 * v4 + a5 * v5 + a6 * v6 + a7 * v7
            acc[64 * r + 64 + z] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3 + b4 * v4 + b5 * v5 + b6 * v6 + b7 * v7
