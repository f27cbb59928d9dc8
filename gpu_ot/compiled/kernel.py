"""The absorbed kernel K_ij = exp((f0_i + g0_j - C_ij) / eps) of one cost, and its sums: the compiled twin of geometry/absorbed.py.

C and K are (n, m), both in the type of the sweeps; vectors are (H, n) and (H, m), of H problems that share the cost, in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types  # pyright: ignore[reportMissingImports]
from numba.extending import overload  # pyright: ignore[reportMissingImports]

from .exponential import exp32, exp64, log64
from .machine import apart, borrowing, compiled, extreme, greater, lesser

#: Bytes of a cache line; rows and columns that are turned at once, which fit a few of these.
LINE, TURNED = 64, 8


class Kernel(NamedTuple):
    """A cost and its kernel. `at` (1,) is the eps that K was absorbed at, NaN where there is none."""

    C: np.ndarray
    K: np.ndarray
    f0: np.ndarray  # (n,)
    g0: np.ndarray  # (m,)
    at: np.ndarray
    dropped: float  # exponents up to here are 0 in K
    safe: float  # a sum is exact from this part of the weights' total on
    crew: Any  # a `crew.Crew`


@borrowing
def copy(z, out):
    """out[:] = z for two matrices, which as an assignment would make a third lest they overlap."""
    for h in range(z.shape[0]):
        for j in range(z.shape[1]):
            out[h, j] = z[h, j]


@apart
def turn(M, out):
    """out = M^T, by whole tiles first, whose loops the compiler knows."""
    n, m = M.shape
    rows, columns = n // TURNED, m // TURNED
    for left in range(columns):
        for low in range(rows):
            for j in range(TURNED):
                for i in range(TURNED):
                    out[TURNED * left + j, TURNED * low + i] = M[TURNED * low + i, TURNED * left + j]
    for j in range(m):
        for i in range(TURNED * rows if j < TURNED * columns else 0, n):
            out[j, i] = M[i, j]


@compiled
def aligned(n, m, like):
    """An empty (n, m) array of the type of an array, that begins with a cache line: vectors across two lines take twice as long."""
    size = like.itemsize
    buffer = np.empty(n * m + LINE // size, like.dtype)
    skip = (-buffer.ctypes.data % LINE) // size
    return buffer[skip : skip + n * m].reshape((n, m))


def narrow_exp(z, like):
    """exp(z) in the type of `like`."""


@overload(narrow_exp)
def _(z, like):
    if like == types.float32:
        return lambda z, like: exp32(np.float32(z))
    return lambda z, like: exp64(z)


def within_range(total, like) -> Any:
    """Whether numbers of this total, in the type of `like`, are far from where they overflow, and none that underflowed would count."""


@overload(within_range)
def _(total, like):
    low, high = (1e-31, 1e37) if like == types.float32 else (1e-292, 1e305)
    return lambda total, like: low <= total and total <= high


@extreme
def smallest(z):
    low = z.dtype.type(np.inf)
    for j in range(len(z)):
        low = lesser(low, z[j])
    return low


@extreme
def largest(z):
    return largest_among(z, len(z))


@extreme
def largest_among(z, size):
    """Of the first so many."""
    high = z.dtype.type(-np.inf)
    for j in range(size):
        high = greater(high, z[j])
    return high


@extreme
def cheapest(C, g):
    """min_j C_j - g_j."""
    low = np.inf
    for j in range(len(g)):
        z = C[j] - g[j]
        low = lesser(low, z)
    return low


@extreme
def _nearest(C, g):
    """max_j g_j - C_j."""
    top = -np.inf
    for j in range(len(g)):
        z = g[j] - C[j]
        top = greater(top, z)
    return top


@apart
def absorb_row(k, i, scale):
    """Row i of K, at the f0 and g0 that are there."""
    C, K, f, g, zero, dropped = k.C[i], k.K[i], k.f0[i], k.g0, k.C.dtype.type(0), k.dropped
    for j in range(len(g)):
        z = (f + g[j] - C[j]) * scale
        e = narrow_exp(z, zero)
        K[j] = zero if z <= dropped else e


@apart
def absorb_at(k, g, eps):
    """K at the mean g of the H problems, and the cheapest pair of each row."""
    n, m = k.C.shape
    H = len(g)
    for j in range(m):
        k.g0[j] = 0
        for h in range(H):
            k.g0[j] += g[h, j] / H
    for i in range(n):
        k.f0[i] = cheapest(k.C[i], k.g0)
        absorb_row(k, i, 1 / eps)
    k.at[0] = eps


@apart
def _absorb_at_columns(k, eps, t):
    """K at the f0 that is there and the cheapest pair of each column, whose softmin is t."""
    n, m = k.C.shape
    k.g0[:] = np.inf
    for i in range(n):
        here = k.f0[i]
        for j in range(m):
            z = k.C[i, j] - here
            k.g0[j] = z if z < k.g0[j] else k.g0[j]
    t[:] = 0
    for i in range(n):
        absorb_row(k, i, 1 / eps)
        for j in range(m):
            t[j] += k.K[i, j]
    k.at[0] = eps
    for j in range(m):
        t[j] = k.g0[j] - eps * log64(t[j])


@compiled
def first(k, f, a, eps, out):
    """out = the softmin of f + eps log a over rows, (H, m), which leaves K absorbed there where H = 1 and all weights are positive."""
    H, n, usable = len(f), len(k.f0), True
    h0 = np.empty(n)
    for i in range(n):
        h0[i] = f[0, i] + eps * log64(a[0, i])
        usable &= math.isfinite(h0[i])
    if H > 1 or not usable:
        level = np.empty(n)
        for h in range(H):
            for i in range(n):
                level[i] = f[h, i] + eps * math.log(a[h, i]) if a[h, i] > 0 else -np.inf
            softmin_columns(k.C, level, eps, out[h])
        k.at[0] = np.nan
        return
    k.f0[:] = h0
    _absorb_at_columns(k, eps, out[0])


@compiled
def softmin_columns(C, level, eps, out):
    """out_j = -eps log sum_i exp((level_i - C_ij) / eps)."""
    n, m = C.shape
    top, scale = np.full(m, -np.inf), 1 / eps
    for i in range(n):
        for j in range(m):
            z = level[i] - C[i, j]
            top[j] = z if z > top[j] else top[j]
    for j in range(m):
        top[j] = top[j] if math.isfinite(top[j]) else 0.0
    out[:] = 0
    for i in range(n):
        for j in range(m):
            z = (level[i] - C[i, j] - top[j]) * scale
            e = exp64(z)
            out[j] += 0.0 if z < -700 else e
    for j in range(m):
        out[j] = -top[j] - eps * log64(out[j])


@compiled
def softmin_rows(C, level, eps, out):
    """out_i = -eps log sum_j exp((level_j - C_ij) / eps)."""
    n, m = C.shape
    scale = 1 / eps
    for i in range(n):
        top = _nearest(C[i], level)
        top = top if math.isfinite(top) else 0.0
        total = 0.0
        for j in range(m):
            z = (level[j] - C[i, j] - top) * scale
            e = exp64(z)
            total += 0.0 if z < -700 else e
        out[i] = -top - eps * math.log(total)
