"""Products with an absorbed kernel K (n, m): those of an iteration in one visit to its entries."""

from __future__ import annotations

import numpy as np

from .exponential import exp64, log64
from .kernel import absorb_row, cheapest
from .machine import apart

#: Eight rows up to this size stay in the first cache.
NEAR_BYTES = 2**15


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
        k.f0[i] = cheapest(k.C[i], k.g0)
        absorb_row(k, i, scale)
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
