"""Points that move to a barycentre: one transport problem to each cloud, from the potentials of the last, as machine code."""

from __future__ import annotations

import math

import numpy as np

from . import mixing, watch
from .block import Measures, State, go
from .crew import alone
from .descent import begin
from .exponential import exp64
from .kernel import Kernel, aligned, smallest, within_range
from .machine import borrowing, compiled
from .search import search
from .watch import RUNNING

#: Checks of one call of `go`.
ERRORS = 256


@borrowing
def _distances(x, y, C):
    """C_ij = |x_i - y_j|^2 for x (m, d) and y (d, n), by differences: no digits are lost far from the origin."""
    m, d = x.shape
    for i in range(m):
        row = C[i]
        for c in range(d):
            here, other = x[i, c], y[c]
            if c == 0:
                for j in range(len(row)):
                    z = here - other[j]
                    row[j] = z * z
            else:
                for j in range(len(row)):
                    z = here - other[j]
                    row[j] += z * z


@borrowing
def _means(k, a, eps, g, y, h, scaled, total, sent):
    """sent (m, d): the mean of y (d, n) under each row of the plan at g, of rows without weight, too.

    h (n,), total (max(m, n),) and scaled (d + 1, n) are written to.
    """
    (m, n), d, scale = k.C.shape, len(y), 1 / eps
    kernel = k.at[0] == eps
    mass, exact = 0.0, kernel
    if kernel:
        for j in range(n):
            w = a[j] * exp64((g[j] - k.g0[j]) * scale) if a[j] > 0 else 0.0
            scaled[d, j] = w
            mass += w
        for c in range(d):
            for j in range(n):
                scaled[c, j] = scaled[d, j] * y[c, j]
        exact = within_range(mass, scaled[d, 0])
        for i in range(m):
            s, row, weights = 0.0, k.K[i], scaled[d]
            for j in range(n):
                s += row[j] * weights[j]
            total[i] = s
        exact &= smallest(total[:m]) >= k.safe * mass
    if exact:
        for i in range(m):
            row, s = k.K[i], 1 / total[i]
            for c in range(d):
                z, weights = 0.0, scaled[c]
                for j in range(n):
                    z += row[j] * weights[j]
                sent[i, c] = z * s
        return
    for j in range(n):
        h[j] = g[j] + eps * math.log(a[j]) if a[j] > 0 else -np.inf
    for i in range(m):
        row, top = k.C[i], -np.inf
        for j in range(n):
            top = max(top, h[j] - row[j])
        s = 0.0
        for j in range(n):
            e = exp64((h[j] - row[j] - top) * scale)
            total[j] = e if h[j] > -np.inf else 0.0
            s += total[j]
        for c in range(d):
            z = 0.0
            for j in range(n):
                z += total[j] * y[c, j]
            sent[i, c] = z / s


@compiled
def move_some(low, high, x, y, a, b, eps, opening, rule, tuning, annealing, dropped, safe, max_iter, f, g, sent, ends):
    """For each cloud p of K: the plan from points x (m, d) of weights b[p] to y[p] (d, n) of weights a[p], and where it sends them.

    f     (K, m), potentials of the points to start from, overwritten; g (K, n) those of the clouds. With `opening` by `search`.
    sent  (K, m, d); ends (K, 2): how the problem ended, and its iterations.
    """
    m, n = len(x), y.shape[2]
    C = aligned(m, n, y)
    k = Kernel(C, aligned(m, n, y), np.empty(m), np.empty(n), np.full(1, np.nan), dropped, safe, alone(C))
    state = State(np.empty((1, m)), np.empty((1, n)), np.empty((1, n)))
    before = State(np.empty((1, 0)), np.empty((1, 0)), np.empty((1, 0)))
    memory, seen, errors, made = mixing.blank(1, n), watch.blank(1, m, n), np.empty((ERRORS, 1)), np.zeros(4, np.int64)
    h, scaled, total = np.empty(n), np.empty((y.shape[1] + 1, n), y.dtype), np.empty(max(m, n))
    for p in range(low, high):
        _distances(x, y[p], C)
        if opening:
            own, found_f, found_g, steps, status, _ = search(
                C, b[p], a[p], eps, np.inf, np.inf, f[p], b[p], rule, tuning, annealing, False, dropped, safe, max_iter
            )  # fmt: skip
            f[p], g[p] = found_f[0], found_g[0]
            ends[p, 0], ends[p, 1] = status, steps[0]
            _means(own, a[p], eps, g[p], y[p], h, scaled, total, sent[p])
            continue
        k.at[0] = np.nan
        measures = Measures(b[p : p + 1], a[p : p + 1], eps, np.inf, np.inf)
        begin(k, measures, f[p : p + 1], measures.a, state)
        seen.done[0], seen.progress[0], seen.progress[1], seen.progress[2] = False, 0.0, np.inf, 0.0
        made[0], made[1], made[2], made[3] = 0, 0, 0, 1
        status = RUNNING
        while status == RUNNING and made[0] < max_iter:
            status, _ = go(k, measures, state, before, memory, tuning, seen, rule, False, made, max_iter, 1, 0, errors)
        f[p], g[p] = seen.f[0], seen.g[0]
        ends[p, 0], ends[p, 1] = status, made[0]
        _means(k, a[p], eps, g[p], y[p], h, scaled, total, sent[p])
