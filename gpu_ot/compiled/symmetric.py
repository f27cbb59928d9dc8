"""A measure moved onto itself: the compiled twin of `solver.step.Symmetric`."""

from __future__ import annotations

import math

import numpy as np

from .block import Room, damp, normalize
from .exponential import exp64, log64
from .kernel import absorb_at, copy, softmin_rows, within_range
from .machine import borrowing, compiled
from .mixing import propose
from .visits import sums_of_rows
from .watch import FAR, RUNNING, at_most, judge, marginal


@compiled
def go_symmetric(k, problem, state, memory, tuning, watch, rule, strict, counts, max_iter, errors):
    """As `go`, for the iterations of `solver.step.Symmetric`, each with a check."""
    H, n = problem.a.shape
    share, none = problem.a.copy(), np.empty(0)
    normalize(share)
    room = Room(np.empty(H), np.empty(H), np.empty(H), np.empty((H, n)), share, np.empty(n), none, state)
    w, s = np.empty(n, k.K.dtype), np.empty(n, k.K.dtype)
    return _go(k, problem, state, memory, tuning, watch, rule, strict, counts, max_iter, errors, w, s, room)


@borrowing
def _go(k, problem, state, memory, tuning, watch, rule, strict, counts, max_iter, errors, w, s, room):
    H, n = problem.a.shape
    eps, checks, status = problem.eps, 0, RUNNING
    scale, far = 1 / eps, FAR if problem.tau_a < np.inf else np.inf
    gap, level = room.gap, room.target
    while counts[0] < max_iter and checks < len(errors) and status == RUNNING:
        for h in range(H):
            g = state.g[h]
            if counts[0] and not watch.done[h]:
                propose(tuning, memory, h, g, state.g_next[h], problem.a[h], room.share[h], eps, g)
        if k.at[0] != eps:
            absorb_at(k, state.g, eps)
            counts[2] += 1
        for h in range(H):
            g, halfway, total, exact = state.g[h], state.g_next[h], 0.0, True
            for j in range(n):
                w[j] = problem.a[h, j] * exp64((g[j] - k.g0[j]) * scale) if problem.a[h, j] > 0 else 0.0
                total += w[j]
            sums_of_rows(k.K, w, s)
            for i in range(n):
                exact &= s[i] >= k.safe * total and s[i] < np.inf and within_range(total, w[0])
                halfway[i] = k.f0[i] - eps * log64(s[i])
            if not exact:
                for j in range(n):
                    level[j] = g[j] + eps * math.log(problem.a[h, j]) if problem.a[h, j] > 0 else -np.inf
                softmin_rows(k.C, level, eps, halfway)
                k.at[0] = np.nan
            for i in range(n):
                halfway[i] = (g[i] + damp(halfway[i], problem.tau_a, eps)) / 2
                gap[h, i] = math.expm1(at_most(2 * (g[i] - halfway[i]) / eps, far))
        copy(state.g, state.f)
        counts[0] += 1
        counts[2] += 1
        marginal(rule, problem.a, gap, state.g, eps, room.error, room.floor, room.unit)
        status = judge(rule, watch, False, state.f, state.g, room.error, room.floor, strict)
        for h in range(H):
            errors[checks, h] = room.error[h]
        checks += 1
    return status, checks
