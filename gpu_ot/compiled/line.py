"""Sums of Gaussians on a line, at O(n) for each pair of neighbouring cells that matters: the fast Gauss transform in the log domain.

sum_j exp(L_j - h (x_i - y_j)^2) for points in cells of width w, h w^2 = 1. About the centres of two cells, x = c + u and y = s + v,

    h (x - y)^2 = h (c - y)^2 + h u^2 + 2 h (c - s) u - 2 h u v,

and exp(2 h u v), |2 h u v| <= 1/2, is its Taylor polynomial in u v with TERMS terms, to 1e-18: the moments of v of a cell serve all
points of another. Cells whose terms are below exp(-drop) of the largest are left out. Greengard and Strain 1991, doi:10.1137/0912004.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .exponential import exp64
from .machine import borrowing, compiled

TERMS = 16
#: Exponents up to here go through moments; where a cell has others, its sums are taken term by term.
WIDE = 300.0


class Cells(NamedTuple):
    """Points (n,) in order, and the cells that hold some: where each begins, (cells + 1,), and its centre, (cells,)."""

    points: np.ndarray
    starts: np.ndarray
    centres: np.ndarray


@compiled
def tops(sources, L, out):
    """The largest L of each cell."""
    for s in range(len(out)):
        top = -np.inf
        for j in range(sources.starts[s], sources.starts[s + 1]):
            top = L[j] if L[j] > top else top
        out[s] = top


@borrowing
def _moments(points, low, high, centre, shift, L, h, scale, F, factor, M):
    """M (c + 1, TERMS): the coefficients of u^k of the sums over a cell's points, times F and, in the last row, alone."""
    c, terms = len(F), M.shape[1]
    for a in range(c + 1):
        for k in range(terms):
            M[a, k] = 0
    for j in range(low, high):
        d, v = shift - points[j], points[j] - centre
        z = L[j] - h * d * d - scale
        e = exp64(z) if z > -700 else 0.0
        for k in range(terms):
            M[c, k] += e
            for a in range(c):
                M[a, k] += e * F[a, j]
            e *= v
    for a in range(c + 1):
        for k in range(terms):
            M[a, k] *= factor[k]


@borrowing
def _by_terms(x, i, sources, near, L, h, F, logs, products):
    """The sums of one point, term by term over the cells in `near`."""
    top = -np.inf
    for s in near:
        for j in range(sources.starts[s], sources.starts[s + 1]):
            d = x - sources.points[j]
            z = L[j] - h * d * d
            top = z if z > top else top
    total = 0.0
    for a in range(len(F)):
        products[i, a] = 0
    for s in near:
        for j in range(sources.starts[s], sources.starts[s + 1]):
            d = x - sources.points[j]
            z = L[j] - h * d * d - top
            e = exp64(z) if z > -700 else 0.0
            total += e
            for a in range(len(F)):
                products[i, a] += e * F[a, j]
    for a in range(len(F)):
        products[i, a] /= total
    logs[i] = math.log(total) + top


@compiled
def line_sums(low, high, targets, sources, L, top, before, after, h, width, drop, F, logs, products):
    """For the target cells from low to high: logs (n,) of the sums, and products (n, c), the means of F (c, m) with these weights.

    before, after  the largest `top` of a cell and all before, or after it.
    """
    count, c = len(sources.centres), len(F)
    near, M, factor, sums = np.empty(count, np.int64), np.empty((c + 1, TERMS)), np.empty(TERMS), np.empty(c + 1)
    factor[0] = 1
    for k in range(1, TERMS):
        factor[k] = factor[k - 1] * 2 * h / k
    for t in range(low, high):
        first, last, centre = targets.starts[t], targets.starts[t + 1], targets.centres[t]
        # Outwards from the target: all cells further on are at most the largest of their tops, at this distance.
        best, found, here = -np.inf, 0, np.searchsorted(sources.centres, centre)
        for s in range(here - 1, -1, -1):
            d = centre - sources.centres[s] + width
            if before[s] - h * d * d <= best:
                break
            best = max(best, top[s] - h * d * d)
        for s in range(here, count):
            d = sources.centres[s] - centre + width
            if after[s] - h * d * d <= best:
                break
            best = max(best, top[s] - h * d * d)
        if not best > -np.inf:
            logs[first:last] = -np.inf
            products[first:last] = 0
            continue
        middle, scale = 0, -np.inf
        for turn in range(2):
            s, step = (here, 1) if turn else (here - 1, -1)
            while 0 <= s < count:
                d = max(abs(centre - sources.centres[s]) - width, 0.0)
                if (after[s] if turn else before[s]) - h * d * d < best - drop:
                    break
                if top[s] - h * d * d >= best - drop:
                    near[found] = s
                    found += 1
                    d = centre - sources.centres[s]
                    if top[s] - h * d * d > scale:
                        middle, scale = s, top[s] - h * d * d
                s += step
        wide = False
        for s in near[:found]:
            d = abs(centre - sources.centres[s])
            wide |= d * width * h > WIDE or top[s] - h * d * d < scale - WIDE
        if wide:
            for i in range(first, last):
                _by_terms(targets.points[i], i, sources, near[:found], L, h, F, logs, products)
            continue
        for i in range(first, last):
            logs[i] = 0
            for a in range(c):
                products[i, a] = 0
        for s in near[:found]:
            _moments(sources.points, sources.starts[s], sources.starts[s + 1], sources.centres[s], centre, L, h, scale, F, factor, M)
            tilt = 2 * h * (sources.centres[s] - sources.centres[middle])
            for i in range(first, last):
                u = targets.points[i] - centre
                e = exp64(tilt * u)
                for a in range(c + 1):
                    value = M[a, TERMS - 1]
                    for k in range(TERMS - 2, -1, -1):
                        value = value * u + M[a, k]
                    sums[a] = value * e
                logs[i] += sums[c]
                for a in range(c):
                    products[i, a] += sums[a]
        for i in range(first, last):
            u = targets.points[i] - centre
            for a in range(c):
                products[i, a] /= logs[i]
            logs[i] = math.log(logs[i]) + scale - h * u * u + 2 * h * (sources.centres[middle] - centre) * u
