"""One problem by every means of `gpu_ot.solve`, its value and derivatives: what `loop.sinkhorn` and `gradients.value` do, in a call."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from . import mixing
from .block import Measures, State, go
from .crew import alone
from .descent import begin, descend
from .exponential import exp64, log64
from .kernel import Kernel, aligned, softmin_rows, within_range
from .machine import compiled
from .symmetric import go_symmetric
from .visits import sums_of_rows
from .watch import RUNNING, Watch

#: Checks of one call.
ERRORS = 2**12


class Annealing(NamedTuple):
    """The constants of `solver.annealing`, by their names."""

    probe: int
    settle: int
    few: int
    factor: float


@compiled
def _deviation(C, limit):
    """The standard deviation of at most limit by limit evenly strided costs."""
    n, m = C.shape
    rows, columns = -(-n // limit), -(-m // limit)
    count, mean, square = 0, 0.0, 0.0
    for i in range(0, n, rows):
        for j in range(0, m, columns):
            count, mean = count + 1, mean + C[i, j]
    mean /= count
    for i in range(0, n, rows):
        for j in range(0, m, columns):
            square += (C[i, j] - mean) ** 2
    return math.sqrt(square / count)


@compiled
def worth_annealing(C, eps, tol, errors, checks, annealing):
    """How many values of eps to pass on the way to the target, 0 where that does not pay: `annealing._worth_annealing`."""
    if min(C.shape) <= annealing.few or checks < annealing.probe:
        return 0
    steps = math.ceil(math.log(max(_deviation(C, 32) / eps, 1.0)) / -math.log(annealing.factor))
    before, now = math.log(max(errors[checks - 3, 0], 1e-300)), math.log(max(errors[checks - 1, 0], 1e-300))
    to_go = (now - math.log(max(tol, 1e-300))) / max((before - now) / 2, 1e-9)
    return 0 if steps < 2 or to_go <= steps + annealing.settle else steps


@compiled
def search(C, a, b, eps, tau_a, tau_b, start, weight, rule, tuning, annealing, symmetric, dropped, safe, max_iter):
    """(kernel, f (1, n), g (1, m), counts as `block.go`, status, error) of one problem: C (n, m), a and start (n,), b (m,)."""
    n, m = C.shape
    k = Kernel(C, aligned(n, m, C), np.empty(n), np.empty(m), np.full(1, np.nan), dropped, safe, alone(C))
    problem = Measures(a.reshape((1, n)), b.reshape((1, m)), eps, tau_a, tau_b)
    state = State(np.empty((1, n)), np.empty((1, m)), np.empty((1, m)))
    before = State(np.empty((1, 0)), np.empty((1, 0)), np.empty((1, 0)))
    watch = Watch(np.empty((1, n)), np.empty((1, m)), np.empty(1), np.zeros(1, np.bool_), np.array([0.0, np.inf, 0.0]))
    memory = mixing.blank(1, m)
    counts, errors = np.array([0, 0, 1, 1]), np.empty((min(max_iter + 2, ERRORS), 1))
    if symmetric:
        counts[2] = 0
        for i in range(n):
            state.f[0, i] = state.g[0, i] = state.g_next[0, i] = start[i] / (1 + eps / tau_a)
        status, checks = RUNNING, 0
        while status == RUNNING and counts[0] < max_iter:
            status, checks = go_symmetric(k, problem, state, memory, tuning, watch, rule, False, counts, max_iter, errors)
        return k, watch.f, watch.g, counts, status, errors[checks - 1, 0]
    start, weight = start.reshape((1, n)), weight.reshape((1, n))
    begin(k, problem, start, weight, state)
    probe = min(annealing.probe, max_iter)
    status, checks = go(k, problem, state, before, memory, tuning, watch, rule, False, counts, probe, 1, -1, errors)
    if status == RUNNING and probe < max_iter:
        steps = worth_annealing(C, eps, rule.tol, errors, checks, annealing)
        if 0 < steps < max_iter - probe:
            schedule = np.empty(steps + 1)
            for i in range(steps + 1):
                schedule[i] = eps * annealing.factor ** -(steps - i)
            level = np.empty((1, n))
            for i in range(n):
                level[0, i] = start[0, i] + eps * math.log(weight[0, i]) if weight[0, i] > 0 else -np.inf
            begin(k, Measures(problem.a, problem.b, schedule[0], tau_a, tau_b), level, np.ones((1, n)), state)
            counts[2] += 1 + descend(k, problem, schedule, True, state)
            counts[0] += steps
        counts[1], counts[3] = 0, 1
        while status == RUNNING and counts[0] < max_iter:
            status, checks = go(k, problem, state, before, memory, tuning, watch, rule, False, counts, max_iter, 1, 0, errors)
    return k, watch.f, watch.g, counts, status, errors[checks - 1, 0]


@compiled
def _sum(w):
    total = 0.0
    for z in w:
        total += z
    return total


@compiled
def _reward(f, tau):
    return f if tau == np.inf else -tau * math.expm1(-f / tau)


@compiled
def value(k, a, b, eps, tau_a, tau_b, f, g, slopes, ga, gb):
    """The dual at (f, g), `gradients.value`. With `slopes` also its derivatives with both held: in a and b, and in C, which replace K."""
    n, m = k.C.shape
    scale, mass_a, mass_b = 1 / eps, _sum(a), _sum(b)
    kernel = k.at[0] == eps
    w, s, level = np.zeros(m, k.K.dtype), np.empty(n, k.K.dtype), np.empty(n)
    if kernel:
        total, exact = 0.0, True
        for j in range(m):
            w[j] = b[j] * exp64((g[j] - k.g0[j]) * scale) if b[j] > 0 else 0.0
            total += w[j]
        sums_of_rows(k.K, w, s)
        for i in range(n):
            exact &= s[i] >= k.safe * total and s[i] < np.inf and within_range(total, w[0])
            level[i] = k.f0[i] - eps * log64(s[i])
        kernel = exact
    h = np.empty(m)
    for j in range(m):
        h[j] = g[j] + eps * math.log(b[j]) if b[j] > 0 else -np.inf
    if not kernel:
        softmin_rows(k.C, h, eps, level)
    D, moved = 0.0, np.empty(n)
    for i in range(n):
        moved[i] = math.exp((f[i] - level[i]) * scale) if math.isfinite(level[i]) else 0.0
        D += a[i] * _reward(f[i], tau_a) - eps * a[i] * moved[i]
        ga[i] = _reward(f[i], tau_a) - eps * moved[i] + eps * mass_b
    for j in range(m):
        gb[j] = _reward(g[j], tau_b) + eps * mass_a
        D += b[j] * _reward(g[j], tau_b)
    D += eps * mass_a * mass_b
    if not slopes:
        return D
    for i in range(n):
        # In C_ij: a_i moved_i exp((level_i + h_j - C_ij) / eps).
        K, C, carried = k.K[i], k.C[i], a[i] * moved[i]
        if kernel:
            u = K.dtype.type(carried * exp64((level[i] - k.f0[i]) * scale))
            for j in range(m):
                K[j] = u * K[j] * w[j]
        else:
            for j in range(m):
                e = exp64((level[i] + h[j] - C[j]) * scale)
                K[j] = carried * e if h[j] > -np.inf and carried > 0 else 0.0
    t = np.zeros(m)
    for i in range(n):
        for j in range(m):
            t[j] += k.K[i, j]
    for j in range(m):
        if b[j] > 0:
            gb[j] -= eps * t[j] / b[j]
        else:  # an atom without mass: what it would receive
            received = 0.0
            for i in range(n):
                received += a[i] * moved[i] * exp64((level[i] + g[j] - k.C[i, j]) * scale) if a[i] > 0 else 0.0
            gb[j] -= eps * received
    return D
