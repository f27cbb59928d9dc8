"""The absorbed kernel K_ij = exp((f0_i + g0_j - C_ij) / eps) of one cost, and its sums: the compiled twin of geometry/absorbed.py.

C and K are (n, m), both in the type of the sweeps; vectors are (H, n) and (H, m), of H problems that share the cost, in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types  # pyright: ignore[reportMissingImports]
from numba.extending import overload  # pyright: ignore[reportMissingImports]

from .exponential import exp32, exp64
from .machine import compiled

#: Four rows up to this size stay in the first cache.
NEAR_BYTES = 2**15


class Kernel(NamedTuple):
    """A cost and its kernel. `at` (1,) is the eps that K was absorbed at, NaN where there is none."""

    C: np.ndarray
    K: np.ndarray
    f0: np.ndarray  # (n,)
    g0: np.ndarray  # (m,)
    at: np.ndarray
    dropped: float  # exponents up to here are 0 in K
    safe: float  # a sum is exact from this part of the weights' total on


def narrow_exp(z, like):
    """exp(z) in the type of `like`."""


@overload(narrow_exp, inline="never")
def _(z, like):
    if like == types.float32:
        return lambda z, like: exp32(np.float32(z))
    return lambda z, like: exp64(z)


@compiled
def _absorb_row(k, i, scale):
    """Row i of K, at the f0 and g0 that are there."""
    C, K, f, g, zero, dropped = k.C[i], k.K[i], k.f0[i], k.g0, k.C.dtype.type(0), k.dropped
    for j in range(len(g)):
        z = (f + g[j] - C[j]) * scale
        e = narrow_exp(z, zero)
        K[j] = zero if z <= dropped else e


@compiled
def absorb_at(k, g, eps):
    """K at the mean g of the H problems, and the cheapest pair of each row."""
    n, m = k.C.shape
    H = len(g)
    for j in range(m):
        k.g0[j] = 0
        for h in range(H):
            k.g0[j] += g[h, j] / H
    for i in range(n):
        low, C = np.inf, k.C[i]
        for j in range(m):
            z = C[j] - k.g0[j]
            low = z if z < low else low
        k.f0[i] = low
        _absorb_row(k, i, 1 / eps)
    k.at[0] = eps


@compiled
def first(k, f, a, eps, out):
    """out = the softmin of f + eps log a over rows, (H, m), which leaves K absorbed there where H = 1 and all weights are positive."""
    n, m = k.C.shape
    H, usable = len(f), True
    h0 = np.empty(n)
    for i in range(n):
        h0[i] = f[0, i] + eps * math.log(a[0, i])
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
    k.g0[:] = np.inf
    for i in range(n):
        for j in range(m):
            z = k.C[i, j] - h0[i]
            k.g0[j] = z if z < k.g0[j] else k.g0[j]
    t = out[0]
    t[:] = 0
    for i in range(n):
        _absorb_row(k, i, 1 / eps)
        K = k.K[i]
        for j in range(m):
            t[j] += K[j]
    k.at[0] = eps
    for j in range(m):
        t[j] = k.g0[j] - eps * math.log(t[j])


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
        out[j] = -top[j] - eps * math.log(out[j])


@compiled
def softmin_rows(C, level, eps, out):
    """out_i = -eps log sum_j exp((level_j - C_ij) / eps)."""
    n, m = C.shape
    scale = 1 / eps
    for i in range(n):
        top = -np.inf
        for j in range(m):
            z = level[j] - C[i, j]
            top = z if z > top else top
        top = top if math.isfinite(top) else 0.0
        total = 0.0
        for j in range(m):
            z = (level[j] - C[i, j] - top) * scale
            e = exp64(z)
            total += 0.0 if z < -700 else e
        out[i] = -top - eps * math.log(total)


@compiled
def sums_of_rows(K, w, s):
    """s = K w, (m,) -> (n,)."""
    n, m = K.shape
    for i in range(n):
        total = K.dtype.type(0)
        for j in range(m):
            total += K[i, j] * w[j]
        s[i] = total


@compiled
def both(K, w, a, p, c, s, u, t):
    """s = K w, t = K^T u in one read of K, where u = a / s for p = 0, the hard marginal, and a exp(c - p log s) otherwise.

    Four rows at a time, whose part of t is added while the next four are summed: half as long again in turns, where rows fit the first
    cache. Longer rows come from memory, and there each four are finished first.
    """
    n, m = K.shape
    zero = K.dtype.type(0)
    t[:] = zero
    long = 4 * m * K.itemsize > NEAR_BYTES
    whole = n // 4 * 4
    u0, u1, u2, u3 = zero, zero, zero, zero
    for block in range(n // 4):
        i = 4 * block
        q = i - 4 if block else 0
        s0, s1, s2, s3 = zero, zero, zero, zero
        if long:
            for j in range(m):
                s0 += K[i, j] * w[j]
                s1 += K[i + 1, j] * w[j]
                s2 += K[i + 2, j] * w[j]
                s3 += K[i + 3, j] * w[j]
        else:
            for j in range(m):
                s0 += K[i, j] * w[j]
                s1 += K[i + 1, j] * w[j]
                s2 += K[i + 2, j] * w[j]
                s3 += K[i + 3, j] * w[j]
                t[j] += (u0 * K[q, j] + u1 * K[q + 1, j]) + (u2 * K[q + 2, j] + u3 * K[q + 3, j])
        s[i], s[i + 1], s[i + 2], s[i + 3] = s0, s1, s2, s3
        for r in range(i, i + 4):
            u[r] = a[r] / s[r] if p == 0 else a[r] * math.exp(c[r] - p * math.log(s[r]))
        u0, u1, u2, u3 = u[i], u[i + 1], u[i + 2], u[i + 3]
        if long:
            for j in range(m):
                t[j] += (u0 * K[i, j] + u1 * K[i + 1, j]) + (u2 * K[i + 2, j] + u3 * K[i + 3, j])
    if not long and whole:
        i = whole - 4
        for j in range(m):
            t[j] += (u0 * K[i, j] + u1 * K[i + 1, j]) + (u2 * K[i + 2, j] + u3 * K[i + 3, j])
    for i in range(whole, n):
        total = zero
        for j in range(m):
            total += K[i, j] * w[j]
        s[i] = total
        u[i] = a[i] / s[i] if p == 0 else a[i] * math.exp(c[i] - p * math.log(s[i]))
        last = u[i]
        for j in range(m):
            t[j] += last * K[i, j]
