"""Gaussian sums over points in three dimensions by way of a mesh: deposit, one product per axis, gather.

The mesh is cut into tiles of TILE^3 nodes. Each holds values of at most 1 and the logarithm of what they were divided by, so nothing
overflows and what a sum loses is far below its last digit. Only tiles near points exist.

A cell's points meet the mesh through cubic B-splines (positive, of variance BETA in nodes) tilted by exp(t (k - y)), with t the slope of
the logarithm of what is deposited or gathered there. For Gaussians of variance v, and the point moved to y - t BETA (deposit) or to
x + s BETA (gather), the result is the Gaussian of variance v + BETA, wherever x and y are: the splines' own shape counts only for what
the tilt has left, which at the solution is the width of a conditional plan. Without tilts the error grows like the fourth power of how
far mass travels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .exponential import exp64, log64
from .kernel import largest_among
from .machine import apart, compiled
from .splines import BETA, CELL, MIDDLE, STEEPEST, TILE, WINDOW

#: Points whose exponentials and weights are taken together, by vector instructions; and the nodes of a line of the buffer for a window
#: along the third axis: two whole tiles.
BATCH, LINE = 64, 2 * TILE


class Cloud(NamedTuple):
    """Points sorted by cell. Coordinates are in nodes; `tilts` are those of the last gather."""

    points: np.ndarray  # (3, n)
    order: np.ndarray  # (n,), where each stood
    starts: np.ndarray  # (c + 1,), the first point of each cell that holds some
    cells: np.ndarray  # (c, 3)
    centres: np.ndarray  # (c, 3), the mean of its points
    tilts: np.ndarray  # (c, 3), slopes of log softmin sums, a node


class Stage(NamedTuple):
    """The values of a mesh at the tiles of `slots`."""

    slot_of: np.ndarray  # (T0, T1, T2), the slot of each tile, -1 for none
    slots: np.ndarray  # (s, 3)
    values: np.ndarray  # (s, TILE^3)
    logs: np.ndarray  # (s,)


@compiled
def sort_points(points, shape, order, counts):
    """Counts the points of each cell, and sorts them by it: `order` (n,), `counts` (T0 T1 T2 + 1,) where each begins."""
    n, (_, T1, T2) = len(points), shape
    key = np.empty(n, np.int64)
    counts[:] = 0
    for i in range(n):
        at = ((int(points[i, 0]) // CELL) * T1 + int(points[i, 1]) // CELL) * T2 + int(points[i, 2]) // CELL
        key[i] = at
        counts[at + 1] += 1
    for t in range(1, len(counts)):
        counts[t] += counts[t - 1]
    place = counts[:-1].copy()
    for i in range(n):
        order[place[key[i]]] = i
        place[key[i]] += 1


@compiled
def _window_start(cell, shift):
    """The first node of the window of a cell whose points are moved by `shift`."""
    return cell * CELL + math.floor(shift) - 1


@apart
def _place(cloud, first, last, moved, start, W, at):
    """The weights of cubic B-splines, W (12, BATCH) of which each axis has four, and the first node `at` (BATCH,) in the window, for the
    points first..last moved by `moved`."""
    size = last - first
    at[:size] = 0
    for axis in range(3):
        y, shift = cloud.points[axis], moved[axis] - start[axis]
        offset = start[2] % TILE if axis == 2 else 0
        w0, w1, w2, w3 = W[4 * axis], W[4 * axis + 1], W[4 * axis + 2], W[4 * axis + 3]
        for j in range(size):
            z = y[first + j] + shift
            k = min(int(z), WINDOW - 3)
            q = z - k
            p = 1.0 - q
            w0[j] = p * p * p / 6.0
            w3[j] = q * q * q / 6.0
            w1[j] = (4.0 - 6.0 * q * q + 3.0 * q * q * q) / 6.0
            w2[j] = 1.0 - w0[j] - w1[j] - w3[j]
            at[j] = at[j] * (WINDOW if axis < 2 else LINE) + k - 1 + offset


@apart
def _exponents(cloud, h, first, last, s, c, out):
    """h_j - <s, y_j - c>."""
    y0, y1, y2 = cloud.points[0], cloud.points[1], cloud.points[2]
    s0, s1, s2 = s[0], s[1], s[2]
    rest = s0 * c[0] + s1 * c[1] + s2 * c[2]
    for j in range(last - first):
        out[j] = h[first + j] + (rest - s0 * y0[first + j] - s1 * y1[first + j] - s2 * y2[first + j])


@apart
def _spread(size, e, W, at, buffer):
    """Adds so many points to a window."""
    for j in range(size):
        z0, z1, z2, z3 = W[8, j], W[9, j], W[10, j], W[11, j]
        for i in range(4):
            ex = e[j] * W[i, j]
            for k in range(4):
                exy = ex * W[4 + k, j]
                line = buffer[at[j] + (i * WINDOW + k) * LINE :]
                line[0] += exy * z0
                line[1] += exy * z1
                line[2] += exy * z2
                line[3] += exy * z3


@apart
def _collect(size, buffer, W, at, total):
    """The sums of a window at so many points."""
    for j in range(size):
        z0, z1, z2, z3 = W[8, j], W[9, j], W[10, j], W[11, j]
        sums = 0.0
        for i in range(4):
            part = 0.0
            for k in range(4):
                line = buffer[at[j] + (i * WINDOW + k) * LINE :]
                part += W[4 + k, j] * (z0 * line[0] + z1 * line[1] + z2 * line[2] + z3 * line[3])
            sums += W[i, j] * part
        total[j] = sums


@compiled
def deposit(low, high, cloud, h, sign, stage):
    """Adds exp(h_j) sign_j of the points of the cells low..high to the stage. h (n,), as the points are sorted; -inf is none."""
    buffer, W, at, e = np.empty(WINDOW * WINDOW * LINE), np.empty((12, BATCH)), np.empty(BATCH, np.int64), np.empty(BATCH)
    start, grow, moved = np.empty(3, np.int64), np.empty((3, LINE)), np.empty(3)
    for t in range(low, high):
        begin, end = cloud.starts[t], cloud.starts[t + 1]
        c, s = cloud.centres[t], cloud.tilts[t]
        level = -np.inf
        for first in range(begin, end, BATCH):
            last = min(end, first + BATCH)
            _exponents(cloud, h, first, last, s, c, e)
            level = max(level, largest_among(e, last - first))
        if level == -np.inf:
            continue
        constant = 0.0
        for axis in range(3):
            moved[axis] = -s[axis] * BETA
            start[axis] = _window_start(cloud.cells[t, axis], moved[axis])
            constant += 0.5 * s[axis] * s[axis] * BETA
        buffer[:] = 0.0
        for first in range(begin, end, BATCH):
            last = min(end, first + BATCH)
            if end - begin > BATCH:  # otherwise they are there still
                _exponents(cloud, h, first, last, s, c, e)
            for j in range(last - first):
                z = e[j] - level
                e[j] = exp64(z) * sign[first + j] if z > -700.0 else 0.0
            _place(cloud, first, last, moved, start, W, at)
            _spread(last - first, e, W, at, buffer)
        _add_window(buffer, start, s, c, level + constant, grow, stage)


@apart
def _powers(s, start, out):
    """exp(s (k - middle)) of the nodes of a window, and along the third axis of whole tiles, 0 outside of it. At most exp(42), so products
    of three overflow nowhere."""
    out[2] = 0.0
    for axis in range(3):
        first = start[2] % TILE if axis == 2 else 0
        half = math.exp(0.5 * s[axis])
        low, high = 1 / half, half
        for k in range(WINDOW // 2):
            out[axis, first + WINDOW // 2 + k] = high
            out[axis, first + WINDOW // 2 - 1 - k] = low
            high *= half * half
            low /= half * half


@apart
def _add_window(buffer, start, s, c, level, grow, stage):
    """Adds a window, times exp(s (k - c) + level), to the tiles that it meets."""
    for axis in range(3):
        level += s[axis] * (start[axis] + MIDDLE - c[axis])
    _powers(s, start, grow)
    for t0 in range(start[0] // TILE, (start[0] + WINDOW - 1) // TILE + 1):
        a0, b0 = max(start[0], t0 * TILE), min(start[0] + WINDOW, t0 * TILE + TILE)
        for t1 in range(start[1] // TILE, (start[1] + WINDOW - 1) // TILE + 1):
            a1, b1 = max(start[1], t1 * TILE), min(start[1] + WINDOW, t1 * TILE + TILE)
            for t2 in range(start[2] // TILE, (start[2] + WINDOW - 1) // TILE + 1):
                part = (t2 - start[2] // TILE) * TILE
                slot = stage.slot_of[t0, t1, t2]
                if slot < 0:
                    continue
                values = stage.values[slot]
                scale = 1.0
                if stage.logs[slot] == -np.inf:
                    values[:] = 0.0
                    stage.logs[slot] = level
                elif level > stage.logs[slot]:
                    values *= math.exp(stage.logs[slot] - level)
                    stage.logs[slot] = level
                else:
                    scale = math.exp(level - stage.logs[slot])
                g2 = grow[2, part : part + TILE]
                for k0 in range(a0, b0):
                    g0 = scale * grow[0, k0 - start[0]]
                    for k1 in range(a1, b1):
                        g01 = g0 * grow[1, k1 - start[1]]
                        source = ((k0 - start[0]) * WINDOW + k1 - start[1]) * LINE + part
                        target = ((k0 - t0 * TILE) * TILE + k1 - t1 * TILE) * TILE
                        for k in range(TILE):
                            values[target + k] += g01 * g2[k] * buffer[source + k]


@compiled
def _slopes(stage, centre, s):
    """The slope of the logarithm of the stage at a point, from two nodes on either side of it, held to STEEPEST."""
    node, total = np.empty(3, np.int64), np.empty(2)
    for axis in range(3):
        known = True
        for side in range(2):
            for other in range(3):
                node[other] = round(centre[other])
            node[axis] += 4 * side - 2
            slot = stage.slot_of[node[0] // TILE, node[1] // TILE, node[2] // TILE]
            total[side] = 0.0
            value = 0.0
            if slot >= 0 and stage.logs[slot] > -np.inf:
                value = stage.values[slot][((node[0] % TILE) * TILE + node[1] % TILE) * TILE + node[2] % TILE]
            if value > 0.0:
                total[side] = stage.logs[slot] + math.log(value)
            else:
                known = False
        s[axis] = min(max((total[1] - total[0]) / 4.0, -STEEPEST), STEEPEST) if known else 0.0


@compiled
def gather(low, high, cloud, stage, ratio, learn, logs, sign):
    """log |sum| (n,) at the points of the cells low..high as they are sorted, and its sign.

    ratio   of the variances of the Gaussians on the stage and of those that are wanted: what is smoother is less steep.
    learn   take the tilts from the stage.
    """
    buffer, W, at, total = np.empty(WINDOW * WINDOW * LINE), np.empty((12, BATCH)), np.empty(BATCH, np.int64), np.empty(BATCH)
    start, shrink, s = np.empty(3, np.int64), np.empty((3, LINE)), np.empty(3)
    moved, turned = np.empty(3), np.empty(3)
    x0, x1, x2 = cloud.points[0], cloud.points[1], cloud.points[2]
    for t in range(low, high):
        c = cloud.centres[t]
        if learn:
            _slopes(stage, c, s)
            for axis in range(3):  # what is deposited here later falls where what is gathered rises
                cloud.tilts[t, axis] = -s[axis]
        constant = 0.0
        for axis in range(3):
            s[axis] = -ratio * cloud.tilts[t, axis]
            moved[axis] = s[axis] * BETA
            start[axis] = _window_start(cloud.cells[t, axis], moved[axis])
            constant += s[axis] * (0.5 * moved[axis] - c[axis])
        level = _take_window(buffer, start, s, c, shrink, turned, stage) + constant
        begin, end = cloud.starts[t], cloud.starts[t + 1]
        if level == -np.inf:
            logs[begin:end], sign[begin:end] = -np.inf, 0.0
            continue
        for first in range(begin, end, BATCH):
            last = min(end, first + BATCH)
            _place(cloud, first, last, moved, start, W, at)
            _collect(last - first, buffer, W, at, total)
            for j in range(last - first):
                i = first + j
                logs[i] = level + (s[0] * x0[i] + s[1] * x1[i] + s[2] * x2[i]) + log64(abs(total[j]))
                sign[i] = 1.0 if total[j] > 0.0 else -1.0 if total[j] < 0.0 else 0.0


@apart
def _take_window(buffer, start, s, c, shrink, moved, stage):
    """Fills a window with the stage times exp(-s (k - c) - level), and returns the level, -inf for nothing."""
    level, shift = -np.inf, 0.0
    for t0 in range(start[0] // TILE, (start[0] + WINDOW - 1) // TILE + 1):
        for t1 in range(start[1] // TILE, (start[1] + WINDOW - 1) // TILE + 1):
            for t2 in range(start[2] // TILE, (start[2] + WINDOW - 1) // TILE + 1):
                slot = stage.slot_of[t0, t1, t2]
                if slot >= 0:
                    level = max(level, stage.logs[slot])
    if level == -np.inf:
        return level
    for axis in range(3):
        moved[axis] = -s[axis]
        shift -= s[axis] * (start[axis] + MIDDLE - c[axis])
    _powers(moved, start, shrink)
    for t0 in range(start[0] // TILE, (start[0] + WINDOW - 1) // TILE + 1):
        a0, b0 = max(start[0], t0 * TILE), min(start[0] + WINDOW, t0 * TILE + TILE)
        for t1 in range(start[1] // TILE, (start[1] + WINDOW - 1) // TILE + 1):
            a1, b1 = max(start[1], t1 * TILE), min(start[1] + WINDOW, t1 * TILE + TILE)
            for t2 in range(start[2] // TILE, (start[2] + WINDOW - 1) // TILE + 1):
                part = (t2 - start[2] // TILE) * TILE
                slot = stage.slot_of[t0, t1, t2]
                scale = math.exp(stage.logs[slot] - level) if slot >= 0 else 0.0
                values, g2 = stage.values[max(slot, 0)], shrink[2, part : part + TILE]
                for k0 in range(a0, b0):
                    g0 = scale * shrink[0, k0 - start[0]]
                    for k1 in range(a1, b1):
                        g01 = g0 * shrink[1, k1 - start[1]]
                        target = ((k0 - start[0]) * WINDOW + k1 - start[1]) * LINE + part
                        source = ((k0 - t0 * TILE) * TILE + k1 - t1 * TILE) * TILE
                        if scale == 0.0:  # whose values may be those of an earlier sweep, or none
                            for k in range(TILE):
                                buffer[target + k] = 0.0
                        else:
                            for k in range(TILE):
                                buffer[target + k] = g01 * g2[k] * values[source + k]
    return level + shift
