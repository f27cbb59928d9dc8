"""A measure moved onto itself: the compiled twin of `solver.step.Symmetric`."""

from __future__ import annotations

import math

import numpy as np

from .block import damp, normalize
from .exponential import exp64, log64
from .kernel import absorb_at, softmin_rows, sums_of_rows, within_range
from .machine import compiled
from .mixing import propose
from .watch import FAR, RUNNING, at_most, judge, marginal


@compiled
def go_symmetric(k, problem, state, memory, tuning, watch, rule, strict, counts, max_iter, errors):
    """As `go`, for the iterations of `solver.step.Symmetric`, each with a check."""
    H, n = problem.a.shape
    eps, checks, status = problem.eps, 0, RUNNING
    scale, far = 1 / eps, FAR if problem.tau_a < np.inf else np.inf
    error, floor, gap, share = np.empty(H), np.empty(H), np.empty((H, n)), problem.a.copy()
    w, s, level = np.empty(n, k.K.dtype), np.empty(n, k.K.dtype), np.empty(n)
    normalize(share)
    while counts[0] < max_iter and checks < len(errors) and status == RUNNING:
        for h in range(H):
            g = state.g[h]
            if counts[0] and not watch.done[h]:
                propose(tuning, memory, h, g.copy(), state.g_next[h], problem.a[h], share[h], eps, g)
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
            state.f[h] = g
        counts[0] += 1
        counts[2] += 1
        marginal(rule, problem.a, gap, state.g, eps, error, floor)
        status = judge(rule, watch, False, state.f, state.g, error, floor, strict)
        errors[checks] = error
        checks += 1
    return status, checks
