"""Gaussian sums over points in three dimensions from the pairs that matter, log sum_j exp(L_j - |x_i - y_j|^2 / 2), to a part of each.

Points are sorted along a Hilbert curve and cut into leaves, the leaves put into a tree. A node far from the rows of a leaf is left out
where its box, and the total of its exp(L_j), prove that it adds too little. What is left out is added up, and the rows are taken again with
a stricter bound should it be too much: the error is at most `part` of every sum, whatever the points and potentials.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .exponential import exp64, log64
from .kernel import largest_among
from .machine import apart, compiled, extreme, greater

LEAF, FANOUT = 32, 8
#: Bits of a coordinate on the curve.
BITS = 20
#: A node may be left out at first if it adds less than `part` / SHARES of a sum; and how much stricter each further try is.
SHARES, STRICTER = 32.0, 64.0


class Tree(NamedTuple):
    """Points along the curve, and the boxes of the nodes, level by level from the leaves on."""

    points: np.ndarray  # (3, n)
    order: np.ndarray  # (n,), where each stood
    offsets: np.ndarray  # (levels + 1,), the first node of each level
    low: np.ndarray  # (nodes, 3)
    high: np.ndarray  # (nodes, 3)


@compiled
def hilbert(points, axes, low, scale, keys):
    """The places of points (n, 3) on a Hilbert curve along some axes: a plane has a curve of its own, which stays closer together.
    Skilling 2004, doi:10.1063/1.1751381."""
    d = len(axes)
    z = np.empty(d, np.int64)
    for i in range(len(points)):
        for k in range(d):
            z[k] = min(int((points[i, axes[k]] - low[axes[k]]) * scale), (1 << BITS) - 1)
        q = 1 << (BITS - 1)
        while q > 1:
            p = q - 1
            for k in range(d):
                if z[k] & q:
                    z[0] ^= p
                else:
                    t = (z[0] ^ z[k]) & p
                    z[0] ^= t
                    z[k] ^= t
            q >>= 1
        for k in range(1, d):
            z[k] ^= z[k - 1]
        t = 0
        q = 1 << (BITS - 1)
        while q > 1:
            if z[d - 1] & q:
                t ^= q - 1
            q >>= 1
        key = 0
        for bit in range(BITS - 1, -1, -1):
            for k in range(d):
                key = (key << 1) | (((z[k] ^ t) >> bit) & 1)
        keys[i] = key


@compiled
def boxes(points, offsets, low, high):
    """The boxes of all nodes."""
    n = points.shape[1]
    for node in range(offsets[1]):
        for axis in range(3):
            low[node, axis], high[node, axis] = np.inf, -np.inf
            for j in range(node * LEAF, min(n, node * LEAF + LEAF)):
                low[node, axis] = min(low[node, axis], points[axis, j])
                high[node, axis] = max(high[node, axis], points[axis, j])
    for level in range(1, len(offsets) - 1):
        for node in range(offsets[level + 1] - offsets[level]):
            at = offsets[level] + node
            first = offsets[level - 1] + node * FANOUT
            for axis in range(3):
                low[at, axis], high[at, axis] = np.inf, -np.inf
                for child in range(first, min(offsets[level], first + FANOUT)):
                    low[at, axis] = min(low[at, axis], low[child, axis])
                    high[at, axis] = max(high[at, axis], high[child, axis])


@compiled
def totals(tree, L, found):
    """log sum exp(L) of the points of each node."""
    n = len(L)
    for node in range(tree.offsets[1]):
        top = -np.inf
        for j in range(node * LEAF, min(n, node * LEAF + LEAF)):
            top = greater(top, L[j])
        total = 0.0
        if top > -np.inf:
            for j in range(node * LEAF, min(n, node * LEAF + LEAF)):
                total += exp64(L[j] - top)
        found[node] = top + math.log(total) if top > -np.inf else -np.inf
    for level in range(1, len(tree.offsets) - 1):
        for node in range(tree.offsets[level + 1] - tree.offsets[level]):
            first = tree.offsets[level - 1] + node * FANOUT
            last = min(tree.offsets[level], first + FANOUT)
            top = -np.inf
            for child in range(first, last):
                top = max(top, found[child])
            total = 0.0
            if top > -np.inf:
                for child in range(first, last):
                    total += math.exp(found[child] - top)
            found[tree.offsets[level] + node] = top + math.log(total) if top > -np.inf else -np.inf


@compiled
def _nearest(low, high, other_low, other_high):
    """The squared distance of two boxes."""
    d = 0.0
    for axis in range(3):
        gap = max(max(other_low[axis] - high[axis], low[axis] - other_high[axis]), 0.0)
        d += gap * gap
    return d


@extreme
def _exponents(x0, x1, x2, Y, L, first, last, z):
    """z = L - |x - y|^2 / 2 of the points of a leaf, and the largest."""
    top = -np.inf
    Y0, Y1, Y2 = Y[0], Y[1], Y[2]
    for j in range(first, last):
        d0, d1, d2 = x0 - Y0[j], x1 - Y1[j], x2 - Y2[j]
        t = L[j] - 0.5 * (d0 * d0 + d1 * d1 + d2 * d2)
        z[j - first] = t
        top = greater(top, t)
    return top


@apart
def _take_leaf(node, rows, columns, first, last, L, weights, v, cut, z, tops, sums, omitted):
    """Adds the pairs of a leaf of columns to the rows first..last. sums (rows, 1 + c), with ones and with v, in units of exp(tops)."""
    low, high = node * LEAF, min(columns.points.shape[1], node * LEAF + LEAF)
    X, box_low, box_high, weight = rows.points, columns.low[node], columns.high[node], weights[node]
    if weight == -np.inf:
        return
    for i in range(first, last):
        at = i - first
        x0, x1, x2 = X[0, i], X[1, i], X[2, i]
        g0 = max(max(box_low[0] - x0, x0 - box_high[0]), 0.0)
        g1 = max(max(box_low[1] - x1, x1 - box_high[1]), 0.0)
        g2 = max(max(box_low[2] - x2, x2 - box_high[2]), 0.0)
        bound = weight - 0.5 * (g0 * g0 + g1 * g1 + g2 * g2) - tops[at]
        if bound < cut:  # False for a row that has met nothing yet
            omitted[at] += math.exp(bound)
            continue
        top = _exponents(x0, x1, x2, columns.points, L, low, high, z)
        if top == -np.inf:
            continue
        if top > tops[at]:
            shrink = math.exp(tops[at] - top)
            for c in range(sums.shape[1]):
                sums[at, c] *= shrink
            omitted[at] *= shrink
            tops[at] = top
        level = tops[at]
        if top < level + cut:
            omitted[at] += (high - low) * math.exp(top - level)
            continue
        total = 0.0
        for j in range(high - low):
            z[j] = exp64(z[j] - level)
            total += z[j]
        sums[at, 0] += total
        for c in range(1, sums.shape[1]):
            total = 0.0
            for j in range(high - low):
                total += z[j] * v[c - 1, low + j]
            sums[at, c] += total


@compiled
def softmin_sums(low, high, rows, columns, L, weights, v, part, logs, products, missed, pairs):
    """For the leaves low..high of rows: log sum_j exp(L_j - |x_i - y_j|^2 / 2) in `logs` (n,), the same sums with v (c, m) divided by
    these in `products` (n, c), the part of a sum left out at most in `missed` (leaves,), and the pairs taken in `pairs` (leaves,)."""
    n, c = rows.points.shape[1], v.shape[0]
    z, tops, sums, omitted = np.empty(LEAF), np.empty(LEAF), np.empty((LEAF, c + 1)), np.empty(LEAF)
    levels = len(columns.offsets) - 1
    stack = np.empty((levels * FANOUT + columns.offsets[levels] - columns.offsets[levels - 1], 2), np.int64)
    for leaf in range(low, high):
        first, last = leaf * LEAF, min(n, leaf * LEAF + LEAF)
        box_low, box_high = rows.low[leaf], rows.high[leaf]
        strict, worst, left_out, taken = math.log(part / SHARES), 0.0, 0.0, 0
        while True:
            tops[:], sums[:], omitted[:] = -np.inf, 0.0, 0.0
            taken = 0
            level, near = _closest(columns, weights, box_low, box_high)
            for node in range(near * FANOUT, min(columns.offsets[1], near * FANOUT + FANOUT)) if level == 1 else range(near, near + 1):
                _take_leaf(node, rows, columns, first, last, L, weights, v, strict, z, tops, sums, omitted)
                taken += 1
            least = np.inf
            for i in range(last - first):
                least = min(least, tops[i] + math.log(sums[i, 0]) if sums[i, 0] > 0.0 else -np.inf)
            left_out = 0.0
            size = 0
            for node in range(columns.offsets[levels] - columns.offsets[levels - 1]):
                stack[size, 0], stack[size, 1] = levels - 1, node
                size += 1
            while size > 0:
                size -= 1
                at, node = stack[size]
                if at == level and node == near:
                    continue
                where = columns.offsets[at] + node
                bound = weights[where] - 0.5 * _nearest(box_low, box_high, columns.low[where], columns.high[where]) - least
                if not bound >= strict:  # a node without weight is -inf, and -inf - -inf is left out, too
                    left_out += math.exp(bound) if bound > -700.0 else 0.0
                    continue
                if at == 0:
                    if level == 1 and node // FANOUT == near:
                        continue
                    _take_leaf(node, rows, columns, first, last, L, weights, v, strict, z, tops, sums, omitted)
                    taken += 1
                    continue
                for child in range(node * FANOUT, min(columns.offsets[at] - columns.offsets[at - 1], node * FANOUT + FANOUT)):
                    stack[size, 0], stack[size, 1] = at - 1, child
                    size += 1
            worst = 0.0
            for i in range(last - first):
                if sums[i, 0] > 0.0:
                    worst = max(worst, omitted[i] / sums[i, 0])
            if worst + left_out <= part or strict < -690.0:
                break
            strict -= math.log(STRICTER)
        missed[leaf], pairs[leaf] = worst + left_out, taken * LEAF * (last - first)
        for i in range(last - first):
            logs[first + i] = tops[i] + log64(sums[i, 0]) if sums[i, 0] > 0.0 else -np.inf
            for k in range(c):
                products[first + i, k] = sums[i, k + 1] / sums[i, 0] if sums[i, 0] > 0.0 else 0.0


@compiled
def _closest(tree, weights, low, high):
    """(level, node) that adds most to the rows of a box, as far as distances from its middle tell: eight leaves, or the only one."""
    level = len(tree.offsets) - 2
    first, last = 0, tree.offsets[level + 1] - tree.offsets[level]
    while True:
        best, found = -np.inf, first
        for node in range(first, last):
            where = tree.offsets[level] + node
            d = 0.0
            for axis in range(3):
                middle = 0.5 * (low[axis] + high[axis])
                gap = max(max(tree.low[where, axis] - middle, middle - tree.high[where, axis]), 0.0)
                d += gap * gap
            z = weights[where] - 0.5 * d
            if z > best:
                best, found = z, node
        if level <= 1:
            return level, found
        level -= 1
        first = found * FANOUT
        last = min(tree.offsets[level + 1] - tree.offsets[level], first + FANOUT)


@compiled
def exact_sums(low, high, U, V, L, logs):
    """log sum_j exp(L_j + <u_i, v_j>) of the rows low..high, from every pair. U (n, d), V (d, m)."""
    m, d, z = len(L), U.shape[1], np.empty(1024)
    levels, totals = np.full(high - low, -np.inf), np.zeros(high - low)
    for first in range(0, m, 1024):  # which stay in the first cache for all rows
        size = min(1024, m - first)
        for i in range(low, high):
            z[:size] = L[first : first + size]
            for axis in range(d):
                u, v = U[i, axis], V[axis]
                for j in range(size):
                    z[j] += u * v[first + j]
            top, level, total = largest_among(z, size), levels[i - low], totals[i - low]
            if top < level - 45.0 or top == -np.inf:  # less than a last digit, whatever follows
                continue
            if top > level:
                total *= math.exp(level - top)
                level = top
            for j in range(size):
                total += exp64(z[j] - level)
            levels[i - low], totals[i - low] = level, total
    for i in range(high - low):
        logs[low + i] = levels[i] + math.log(totals[i]) if totals[i] > 0.0 else -np.inf
