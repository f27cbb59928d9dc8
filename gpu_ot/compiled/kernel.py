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

#: Eight rows up to this size stay in the first cache.
NEAR_BYTES = 2**15


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
def _cheapest(C, g):
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
def _absorb_row(k, i, scale):
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
        k.f0[i] = _cheapest(k.C[i], k.g0)
        _absorb_row(k, i, 1 / eps)
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
        _absorb_row(k, i, 1 / eps)
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


@apart
def sums_of_rows(K, w, s):
    """s = K w, (m,) -> (n,)."""
    n, m = K.shape
    for i in range(n):
        total = K.dtype.type(0)
        for j in range(m):
            total += K[i, j] * w[j]
        s[i] = total


@apart
def both(K, w, a, p, c, s, u, t, back):
    """s = K w, u = a / s for p = 0, the hard marginal, and a exp(c - p log s) otherwise, and t = K^T u, in one read of K.

    Some rows' part of t is added while the next rows are summed: half as long again in turns, where rows fit the first cache. Longer
    rows come from memory, and there each four are finished first. back: from the last rows on, which are near still where the visit
    before ended with them.
    """
    n, m = K.shape
    t[:] = K.dtype.type(0)
    whole = 0
    if p > 0 and 12 * m * K.itemsize <= NEAR_BYTES:
        whole = _eights(K, w, a, p, c, s, u, t)
    elif 8 * m * K.itemsize <= NEAR_BYTES:
        whole = _fours(K, w, a, p, c, s, u, t, back)
    zero, blocks = K.dtype.type(0), n // 4
    for block in range(whole // 4, blocks):
        i = 4 * (blocks - 1 - block + whole // 4 if back else block)
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(m):
            s0 += K[i, j] * w[j]
            s1 += K[i + 1, j] * w[j]
            s2 += K[i + 2, j] * w[j]
            s3 += K[i + 3, j] * w[j]
        s[i], s[i + 1], s[i + 2], s[i + 3] = s0, s1, s2, s3
        for r in range(i, i + 4):
            u[r] = a[r] / s[r] if p == 0 else a[r] * exp64(c[r] - p * log64(s[r]))
        u0, u1, u2, u3 = u[i], u[i + 1], u[i + 2], u[i + 3]
        for j in range(m):
            t[j] += (u0 * K[i, j] + u1 * K[i + 1, j]) + (u2 * K[i + 2, j] + u3 * K[i + 3, j])
    for i in range(n // 4 * 4, n):
        total = zero
        for j in range(m):
            total += K[i, j] * w[j]
        s[i] = total
        u[i] = a[i] / s[i] if p == 0 else a[i] * exp64(c[i] - p * log64(s[i]))
        last = u[i]
        for j in range(m):
            t[j] += last * K[i, j]


@apart
def absorb_and_both(k, w, a, eps, tau, s, u, t):
    """`absorb_at` the g0 that is there and `both` in one visit to the pairs: each row is summed while it is near."""
    n, m = k.C.shape
    scale, p, zero = 1 / eps, 1 / (1 + eps / tau), k.K.dtype.type(0)
    t[:] = zero
    for i in range(n):
        k.f0[i] = _cheapest(k.C[i], k.g0)
        _absorb_row(k, i, scale)
        K, total = k.K[i], zero
        for j in range(m):
            total += K[j] * w[j]
        s[i] = total
        u[i] = a[i] / total if tau == np.inf else a[i] * exp64(-k.f0[i] / (tau + eps) - p * log64(total))
        here = u[i]
        for j in range(m):
            t[j] += here * K[j]
    k.at[0] = eps


@apart
def _fours(K, w, a, p, c, s, u, t, back):
    """`both` for all fours of rows, whose number is returned: the four before are added meanwhile."""
    n, m = K.shape
    zero, whole = K.dtype.type(0), n // 4 * 4
    if not whole:
        return 0
    u0, u1, u2, u3 = zero, zero, zero, zero
    last = n // 4 - 1
    q = 4 * last if back else 0
    for block in range(n // 4):
        i = 4 * (last - block) if back else 4 * block
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(m):
            s0 += K[i, j] * w[j]
            s1 += K[i + 1, j] * w[j]
            s2 += K[i + 2, j] * w[j]
            s3 += K[i + 3, j] * w[j]
            t[j] += (u0 * K[q, j] + u1 * K[q + 1, j]) + (u2 * K[q + 2, j] + u3 * K[q + 3, j])
        s[i], s[i + 1], s[i + 2], s[i + 3] = s0, s1, s2, s3
        if p == 0:
            u0, u1, u2, u3 = a[i] / s0, a[i + 1] / s1, a[i + 2] / s2, a[i + 3] / s3
            u[i], u[i + 1], u[i + 2], u[i + 3] = u0, u1, u2, u3
        else:
            for r in range(i, min(i + 4, n)):
                u[r] = a[r] * exp64(c[r] - p * log64(s[r]))
            u0, u1, u2, u3 = u[i], u[i + 1], u[i + 2], u[i + 3]
        q = i
    for j in range(m):
        t[j] += (u0 * K[q, j] + u1 * K[q + 1, j]) + (u2 * K[q + 2, j] + u3 * K[q + 3, j])
    return whole


@apart
def _eights(K, w, a, p, c, s, u, t):
    """`both` for a relaxed marginal and all eights of rows, whose logarithms are then taken at once."""
    n, m = K.shape
    zero, whole = K.dtype.type(0), n // 8 * 8
    for block in range(n // 8):
        for half in range(2):
            i = 8 * block + 4 * half
            q = i - 8 if block else i
            u0, u1, u2, u3 = u[q], u[q + 1], u[q + 2], u[q + 3]
            if not block:
                u0, u1, u2, u3 = zero, zero, zero, zero
            s0, s1, s2, s3 = zero, zero, zero, zero
            for j in range(m):
                s0 += K[i, j] * w[j]
                s1 += K[i + 1, j] * w[j]
                s2 += K[i + 2, j] * w[j]
                s3 += K[i + 3, j] * w[j]
                t[j] += (u0 * K[q, j] + u1 * K[q + 1, j]) + (u2 * K[q + 2, j] + u3 * K[q + 3, j])
            s[i], s[i + 1], s[i + 2], s[i + 3] = s0, s1, s2, s3
        for r in range(8 * block, min(8 * block + 8, n)):
            u[r] = a[r] * exp64(c[r] - p * log64(s[r]))
    for i in range(max(0, whole - 8), whole):
        last = u[i]
        for j in range(m):
            t[j] += last * K[i, j]
    return whole
