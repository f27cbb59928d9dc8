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
from .machine import compiled

#: Nodes along an axis of a tile and of a cell, whose points share a tilt; those that a cell's points reach; the variance of a B-spline.
TILE, CELL, WINDOW, BETA = 8, 4, 8, 1 / 3
#: Largest tilt, e-folds a node: points then move by at most 4 nodes, and stay within their window.
STEEPEST = 12.0
#: Tiles whose values are below exp(-FAINT) of the largest are left out of a sum. Within a tile values differ by up to exp(100).
FAINT = 160.0


class Cloud(NamedTuple):
    """Points sorted by cell. Coordinates are in nodes; `tilts` are those of the last gather."""

    points: np.ndarray  # (n, 3)
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


@compiled
def _splines(q, w):
    """The four weights of a cubic B-spline, q in [0, 1) behind the second node."""
    p = 1.0 - q
    w[0] = p * p * p / 6.0
    w[3] = q * q * q / 6.0
    w[1] = (4.0 - 6.0 * q * q + 3.0 * q * q * q) / 6.0
    w[2] = 1.0 - w[0] - w[1] - w[3]


@compiled
def deposit(low, high, cloud, h, sign, stage):
    """Adds exp(h_j) sign_j of the points of the cells low..high to the stage. h (n,), as the points are sorted; -inf is none."""
    buffer, wx, wy, wz = np.empty(WINDOW**3), np.empty(4), np.empty(4), np.empty(4)
    start, grow, top = np.empty(3, np.int64), np.empty((3, WINDOW)), np.empty(3)
    for t in range(low, high):
        first, last = cloud.starts[t], cloud.starts[t + 1]
        c, s = cloud.centres[t], cloud.tilts[t]
        level = -np.inf
        for j in range(first, last):
            y = cloud.points[j]
            z = h[j] - (s[0] * (y[0] - c[0]) + s[1] * (y[1] - c[1]) + s[2] * (y[2] - c[2]))
            level = z if z > level else level
        if level == -np.inf:
            continue
        constant = 0.0
        for axis in range(3):
            start[axis] = _window_start(cloud.cells[t, axis], -s[axis] * BETA)
            constant += 0.5 * s[axis] * s[axis] * BETA
        buffer[:] = 0.0
        for j in range(first, last):
            y = cloud.points[j]
            z = h[j] - (s[0] * (y[0] - c[0]) + s[1] * (y[1] - c[1]) + s[2] * (y[2] - c[2])) - level
            if z < -700.0:
                continue
            e = exp64(z) * sign[j]
            q0, q1, q2 = y[0] - s[0] * BETA - start[0], y[1] - s[1] * BETA - start[1], y[2] - s[2] * BETA - start[2]
            i0, i1, i2 = min(int(q0), WINDOW - 3), min(int(q1), WINDOW - 3), min(int(q2), WINDOW - 3)
            _splines(q0 - i0, wx)
            _splines(q1 - i1, wy)
            _splines(q2 - i2, wz)
            z0, z1, z2, z3 = wz[0], wz[1], wz[2], wz[3]
            for i in range(4):
                ex = e * wx[i]
                for k in range(4):
                    exy = ex * wy[k]
                    at = ((i0 - 1 + i) * WINDOW + i1 - 1 + k) * WINDOW + i2 - 1
                    buffer[at] += exy * z0
                    buffer[at + 1] += exy * z1
                    buffer[at + 2] += exy * z2
                    buffer[at + 3] += exy * z3
        _add_window(buffer, start, s, c, level + constant, grow, top, stage)


@compiled
def _add_window(buffer, start, s, c, level, grow, top, stage):
    """Adds a window, times exp(s (k - c) + level), to the tiles that it meets."""
    first0, first1, first2 = start[0] // TILE, start[1] // TILE, start[2] // TILE
    for t0 in range(first0, (start[0] + WINDOW - 1) // TILE + 1):
        a0, b0 = max(start[0], t0 * TILE), min(start[0] + WINDOW, t0 * TILE + TILE)
        for t1 in range(first1, (start[1] + WINDOW - 1) // TILE + 1):
            a1, b1 = max(start[1], t1 * TILE), min(start[1] + WINDOW, t1 * TILE + TILE)
            for t2 in range(first2, (start[2] + WINDOW - 1) // TILE + 1):
                a2, b2 = max(start[2], t2 * TILE), min(start[2] + WINDOW, t2 * TILE + TILE)
                slot = stage.slot_of[t0, t1, t2]
                if slot < 0:
                    continue
                whole = level
                for axis in range(3):
                    a = a0 if axis == 0 else a1 if axis == 1 else a2
                    b = b0 if axis == 0 else b1 if axis == 1 else b2
                    most = max(s[axis] * (a - c[axis]), s[axis] * (b - 1 - c[axis]))
                    for k in range(a, b):
                        grow[axis, k - start[axis]] = math.exp(s[axis] * (k - c[axis]) - most)
                    whole += most
                values = stage.values[slot]
                scale = 1.0
                if stage.logs[slot] == -np.inf:
                    values[:] = 0.0
                    stage.logs[slot] = whole
                elif whole > stage.logs[slot]:
                    values *= math.exp(stage.logs[slot] - whole)
                    stage.logs[slot] = whole
                else:
                    scale = math.exp(whole - stage.logs[slot])
                for k0 in range(a0, b0):
                    g0 = scale * grow[0, k0 - start[0]]
                    for k1 in range(a1, b1):
                        g01 = g0 * grow[1, k1 - start[1]]
                        source = ((k0 - start[0]) * WINDOW + k1 - start[1]) * WINDOW - start[2]
                        target = ((k0 - t0 * TILE) * TILE + k1 - t1 * TILE) * TILE - t2 * TILE
                        for k2 in range(a2, b2):
                            values[target + k2] += g01 * grow[2, k2 - start[2]] * buffer[source + k2]


@compiled
def normalise(low, high, stage):
    """Values of the slots low..high that are at most 1."""
    for slot in range(low, high):
        if stage.logs[slot] > -np.inf:
            _store(stage.values[slot], stage.logs[slot], stage, slot)


@compiled
def _store(values, level, stage, slot):
    """values exp(level) in a slot."""
    most = 0.0
    for z in range(TILE**3):
        most = max(most, abs(values[z]))
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
    for slot in range(low, high):
        t0, t1, t2 = after.slots[slot]
        own = t0 if axis == 0 else t1 if axis == 1 else t2
        top = -np.inf
        for t in range(T):
            source = before.slot_of[t, t1, t2] if axis == 0 else before.slot_of[t0, t, t2] if axis == 1 else before.slot_of[t0, t1, t]
            if source >= 0:
                z = before.logs[source] + tops[own - t + T - 1]
                top = z if z > top else top
        after.logs[slot] = -np.inf
        if top == -np.inf:
            continue
        acc[:] = 0.0
        for t in range(T):
            source = before.slot_of[t, t1, t2] if axis == 0 else before.slot_of[t0, t, t2] if axis == 1 else before.slot_of[t0, t1, t]
            if source < 0:
                continue
            z = before.logs[source] + tops[own - t + T - 1] - top
            if z < -FAINT:
                continue
            _add_product(axis, math.exp(z), blocks[own - t + T - 1], before.values[source], acc)
        _store(acc, top, after, slot)


@compiled
def _add_product(axis, factor, block, values, acc):
    if axis == 0:
        for q in range(8):
            for r in range(8):
                c = factor * block[q, r]
                for z in range(64):
                    acc[r * 64 + z] += c * values[q * 64 + z]
    elif axis == 1:
        for q in range(8):
            for r in range(8):
                c = factor * block[q, r]
                for i in range(8):
                    for z in range(8):
                        acc[i * 64 + r * 8 + z] += c * values[i * 64 + q * 8 + z]
    else:
        for i in range(64):
            for q in range(8):
                c = factor * values[i * 8 + q]
                for r in range(8):
                    acc[i * 8 + r] += c * block[q, r]


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
    buffer, wx, wy, wz = np.empty(WINDOW**3), np.empty(4), np.empty(4), np.empty(4)
    start, shrink, s = np.empty(3, np.int64), np.empty((3, WINDOW)), np.empty(3)
    for t in range(low, high):
        c = cloud.centres[t]
        if learn:
            _slopes(stage, c, s)
            for axis in range(3):  # what is deposited here later falls where what is gathered rises
                cloud.tilts[t, axis] = -s[axis]
        constant = 0.0
        for axis in range(3):
            s[axis] = -ratio * cloud.tilts[t, axis]
            start[axis] = _window_start(cloud.cells[t, axis], s[axis] * BETA)
            constant += 0.5 * s[axis] * s[axis] * BETA
        level = _take_window(buffer, start, s, c, shrink, stage)
        for i in range(cloud.starts[t], cloud.starts[t + 1]):
            if level == -np.inf:
                logs[i], sign[i] = -np.inf, 0.0
                continue
            x = cloud.points[i]
            q0, q1, q2 = x[0] + s[0] * BETA - start[0], x[1] + s[1] * BETA - start[1], x[2] + s[2] * BETA - start[2]
            i0, i1, i2 = min(int(q0), WINDOW - 3), min(int(q1), WINDOW - 3), min(int(q2), WINDOW - 3)
            _splines(q0 - i0, wx)
            _splines(q1 - i1, wy)
            _splines(q2 - i2, wz)
            z0, z1, z2, z3 = wz[0], wz[1], wz[2], wz[3]
            total = 0.0
            for i_ in range(4):
                part = 0.0
                for k in range(4):
                    at = ((i0 - 1 + i_) * WINDOW + i1 - 1 + k) * WINDOW + i2 - 1
                    part += wy[k] * (z0 * buffer[at] + z1 * buffer[at + 1] + z2 * buffer[at + 2] + z3 * buffer[at + 3])
                total += wx[i_] * part
            rise = s[0] * (x[0] - c[0]) + s[1] * (x[1] - c[1]) + s[2] * (x[2] - c[2])
            logs[i] = level + constant + rise + log64(abs(total))
            sign[i] = 1.0 if total > 0.0 else -1.0 if total < 0.0 else 0.0


@compiled
def _take_window(buffer, start, s, c, shrink, stage):
    """Fills a window with the stage times exp(-s (k - c) - level), and returns the level, -inf for nothing."""
    level = -np.inf
    ends = np.empty((3, 2), np.int64)
    for pass_ in range(2):
        if pass_ == 1:
            if level == -np.inf:
                return level
            buffer[:] = 0.0
        for t0 in range(start[0] // TILE, (start[0] + WINDOW - 1) // TILE + 1):
            ends[0, 0], ends[0, 1] = max(start[0], t0 * TILE), min(start[0] + WINDOW, t0 * TILE + TILE)
            for t1 in range(start[1] // TILE, (start[1] + WINDOW - 1) // TILE + 1):
                ends[1, 0], ends[1, 1] = max(start[1], t1 * TILE), min(start[1] + WINDOW, t1 * TILE + TILE)
                for t2 in range(start[2] // TILE, (start[2] + WINDOW - 1) // TILE + 1):
                    ends[2, 0], ends[2, 1] = max(start[2], t2 * TILE), min(start[2] + WINDOW, t2 * TILE + TILE)
                    slot = stage.slot_of[t0, t1, t2]
                    if slot < 0 or stage.logs[slot] == -np.inf:
                        continue
                    whole = stage.logs[slot]
                    for axis in range(3):
                        a, b = ends[axis]
                        most = max(-s[axis] * (a - c[axis]), -s[axis] * (b - 1 - c[axis]))
                        whole += most
                        if pass_ == 1:
                            for k in range(a, b):
                                shrink[axis, k - start[axis]] = math.exp(-s[axis] * (k - c[axis]) - most)
                    if pass_ == 0:
                        level = whole if whole > level else level
                        continue
                    scale, values = math.exp(whole - level), stage.values[slot]
                    for k0 in range(ends[0, 0], ends[0, 1]):
                        g0 = scale * shrink[0, k0 - start[0]]
                        for k1 in range(ends[1, 0], ends[1, 1]):
                            g01 = g0 * shrink[1, k1 - start[1]]
                            target = ((k0 - start[0]) * WINDOW + k1 - start[1]) * WINDOW - start[2]
                            source = ((k0 - t0 * TILE) * TILE + k1 - t1 * TILE) * TILE - t2 * TILE
                            for k2 in range(ends[2, 0], ends[2, 1]):
                                buffer[target + k2] = g01 * shrink[2, k2 - start[2]] * values[source + k2]
    return level
