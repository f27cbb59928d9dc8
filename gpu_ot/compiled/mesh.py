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
#: The middle of a window.
MIDDLE = (WINDOW - 1) / 2


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
    start, grow = np.empty(3, np.int64), np.empty((3, WINDOW))
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
        _add_window(buffer, start, s, c, level + constant, grow, stage)


@compiled
def _powers(s, out):
    """out[k] = exp(s (k - MIDDLE)), k = 0 ... WINDOW - 1. At most exp(42), so products of three overflow nowhere."""
    half = math.exp(0.5 * s)
    low, high = 1 / half, half
    for k in range(WINDOW // 2):
        out[WINDOW // 2 + k] = high
        out[WINDOW // 2 - 1 - k] = low
        high *= half * half
        low /= half * half


@compiled
def _add_window(buffer, start, s, c, level, grow, stage):
    """Adds a window, times exp(s (k - c) + level), to the tiles that it meets."""
    for axis in range(3):
        level += s[axis] * (start[axis] + MIDDLE - c[axis])
        _powers(s[axis], grow[axis])
    for t0 in range(start[0] // TILE, (start[0] + WINDOW - 1) // TILE + 1):
        a0, b0 = max(start[0], t0 * TILE), min(start[0] + WINDOW, t0 * TILE + TILE)
        for t1 in range(start[1] // TILE, (start[1] + WINDOW - 1) // TILE + 1):
            a1, b1 = max(start[1], t1 * TILE), min(start[1] + WINDOW, t1 * TILE + TILE)
            for t2 in range(start[2] // TILE, (start[2] + WINDOW - 1) // TILE + 1):
                a2, b2 = max(start[2], t2 * TILE), min(start[2] + WINDOW, t2 * TILE + TILE)
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
                for k0 in range(a0, b0):
                    g0 = scale * grow[0, k0 - start[0]]
                    for k1 in range(a1, b1):
                        g01 = g0 * grow[1, k1 - start[1]]
                        source = ((k0 - start[0]) * WINDOW + k1 - start[1]) * WINDOW - start[2]
                        target = ((k0 - t0 * TILE) * TILE + k1 - t1 * TILE) * TILE - t2 * TILE
                        for k2 in range(a2, b2):
                            values[target + k2] += g01 * grow[2, k2 - start[2]] * buffer[source + k2]


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
        shift -= s[axis] * (start[axis] + MIDDLE - c[axis])
        _powers(-s[axis], shrink[axis])
    for t0 in range(start[0] // TILE, (start[0] + WINDOW - 1) // TILE + 1):
        a0, b0 = max(start[0], t0 * TILE), min(start[0] + WINDOW, t0 * TILE + TILE)
        for t1 in range(start[1] // TILE, (start[1] + WINDOW - 1) // TILE + 1):
            a1, b1 = max(start[1], t1 * TILE), min(start[1] + WINDOW, t1 * TILE + TILE)
            for t2 in range(start[2] // TILE, (start[2] + WINDOW - 1) // TILE + 1):
                a2, b2 = max(start[2], t2 * TILE), min(start[2] + WINDOW, t2 * TILE + TILE)
                slot = stage.slot_of[t0, t1, t2]
                scale = math.exp(stage.logs[slot] - level) if slot >= 0 else 0.0
                values = stage.values[max(slot, 0)]
                for k0 in range(a0, b0):
                    g0 = scale * shrink[0, k0 - start[0]]
                    for k1 in range(a1, b1):
                        g01 = g0 * shrink[1, k1 - start[1]]
                        target = ((k0 - start[0]) * WINDOW + k1 - start[1]) * WINDOW - start[2]
                        source = ((k0 - t0 * TILE) * TILE + k1 - t1 * TILE) * TILE - t2 * TILE
                        if scale == 0.0:  # whose values may be those of an earlier sweep, or none
                            buffer[target + a2 : target + b2] = 0.0
                            continue
                        for k2 in range(a2, b2):
                            buffer[target + k2] = g01 * shrink[2, k2 - start[2]] * values[source + k2]
    return level + shift
