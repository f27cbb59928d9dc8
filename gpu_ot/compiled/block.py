"""Blocks of iterations for problems that share a cost, with their checks: the compiled twin of `solver.step` and `solver.monitor`.

One call runs until the rule is met or its checks are used up. State lives in the caller's arrays, so that the next call goes on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .crew import both_shared
from .exponential import exp64, log64
from .kernel import absorb_at, aligned, copy, largest, smallest, softmin_columns, softmin_rows, within_range
from .machine import apart, borrowing, compiled, inlined
from .mixing import forget, propose
from .visits import absorb_and_both, both
from .watch import EXP_FAR, FAR, RUNNING, at_most, change, judge, log_mass, marginal, seen


class Measures(NamedTuple):
    """H problems between weights a (H, n) and b (H, m), at one eps. tau is inf for a hard marginal."""

    a: np.ndarray
    b: np.ndarray
    eps: float
    tau_a: float
    tau_b: float


class State(NamedTuple):
    """As `solver.step.State`: (H, n), (H, m), (H, m)."""

    f: np.ndarray
    g: np.ndarray
    g_next: np.ndarray


class Sweep(NamedTuple):
    """What an iteration leaves: weights times scalings, w and u, and the sums s and t in the type of the kernel; the scalings v of g and
    v_next of g_next."""

    w: np.ndarray
    s: np.ndarray
    u: np.ndarray
    t: np.ndarray
    weights: np.ndarray  # a in the type of the kernel
    v: np.ndarray
    v_next: np.ndarray
    c: np.ndarray  # (n,): what damping makes of f0, for a relaxed marginal


class Room(NamedTuple):
    """What checks and proposals write to: (H,) each, (H, m), the weights b as parts of their sums (H, m), (m,), (n,) or (m,), and a state
    as it is returned."""

    error: np.ndarray
    floor: np.ndarray
    unit: np.ndarray
    gap: np.ndarray
    share: np.ndarray
    target: np.ndarray
    moved: np.ndarray
    seen: State


@compiled
def buffers(k, problem):
    H, n, m = len(problem.a), len(k.f0), len(k.g0)
    w, s, u, t = aligned(H, m, k.K), aligned(H, n, k.K), aligned(H, n, k.K), aligned(H, m, k.K)
    return Sweep(w, s, u, t, problem.a.astype(k.K.dtype), np.empty((H, m)), np.empty((H, m)), np.empty(n))


@inlined
def _multiply(k, problem, sweep, back, absorb):
    """An iteration from the scalings v by products alone: s, t and v_next. Whether every sum is exact. absorb: at k.g0, on the way."""
    H, n, m = len(problem.a), len(k.f0), len(k.g0)
    eps, tau_a, tau_b = problem.eps, problem.tau_a, problem.tau_b
    c, p = sweep.c, 0.0
    if tau_a < np.inf:
        p = 1 / (1 + eps / tau_a)
        for i in range(n):
            c[i] = -k.f0[i] / (tau_a + eps)
    exact = True
    for h in range(H):
        w, s, u, t = sweep.w[h], sweep.s[h], sweep.u[h], sweep.t[h]
        total = 0.0
        for j in range(m):
            w[j] = problem.b[h, j] * sweep.v[h, j] if problem.b[h, j] > 0 else 0.0
            total += w[j]
        if absorb:
            absorb_and_both(k, w, sweep.weights[h], eps, tau_a, s, u, t)
        elif len(k.crew.found):
            both_shared(k.K, w, sweep.weights[h], p, c, s, u, t, k.crew)
        else:
            both(k.K, w, sweep.weights[h], p, c, s, u, t, back)
        mass = 0.0
        for i in range(n):
            mass += u[i]
        exact &= smallest(s) >= k.safe * total and largest(s) < np.inf and within_range(total, w[0])
        reached = 0.0
        for j in range(m):
            reached += t[j]
        exact &= smallest(t) >= k.safe * mass and math.isfinite(reached) and within_range(mass, w[0])
        v = sweep.v_next[h]
        if tau_b < np.inf:
            shift, q = -1 / (tau_b + eps), 1 / (1 + eps / tau_b)
            for j in range(m):
                v[j] = exp64(shift * k.g0[j] - q * log64(t[j]))
        else:
            for j in range(m):
                v[j] = 1 / t[j]
    return exact


@borrowing
def damp(z, tau, eps):
    return z / (1 + eps / tau)


@apart
def potentials(k, problem, sweep, state):
    """The potentials of an iteration by products."""
    eps, p = problem.eps, 1 / (1 + problem.eps / problem.tau_a)
    for h in range(len(problem.a)):
        for i in range(len(k.f0)):
            state.f[h, i] = p * (k.f0[i] - eps * log64(sweep.s[h, i]))
        _columns(k, eps, sweep.v[h], state.g[h])
        _columns(k, eps, sweep.v_next[h], state.g_next[h])


@apart
def _columns(k, eps, v, out):
    for j in range(len(v)):
        out[j] = k.g0[j] + eps * log64(v[j])


@apart
def _scale(k, problem, g, sweep):
    """The scalings of g."""
    scale = 1 / problem.eps
    for h in range(len(g)):
        for j in range(len(k.g0)):
            sweep.v[h, j] = exp64((g[h, j] - k.g0[j]) * scale)


@compiled
def _in_logarithms(k, problem, state):
    """An iteration from state.g in the log domain."""
    eps, n, m = problem.eps, len(k.f0), len(k.g0)
    level, columns = np.empty(n), np.empty(m)
    for h in range(len(problem.a)):
        for j in range(m):
            columns[j] = state.g[h, j] + eps * math.log(problem.b[h, j]) if problem.b[h, j] > 0 else -np.inf
        softmin_rows(k.C, columns, eps, state.f[h])
        for i in range(n):
            state.f[h, i] = damp(state.f[h, i], problem.tau_a, eps)
            level[i] = state.f[h, i] + eps * math.log(problem.a[h, i]) if problem.a[h, i] > 0 else -np.inf
        softmin_columns(k.C, level, eps, state.g_next[h])
        for j in range(m):
            state.g_next[h, j] = damp(state.g_next[h, j], problem.tau_b, eps)


@inlined
def iterate(k, problem, sweep, state, follow, back):
    """An iteration from state.g, or with `follow` from what the last one left in v_next; `back` as in `both`. Where it was by products, the
    potentials are still to be had by `potentials`. (whether by products, sweeps)."""
    eps, H, m = problem.eps, len(problem.a), len(k.g0)
    sweeps, renewed = 2, k.at[0] != eps
    alone = renewed and H == 1 and len(k.crew.found) == 0
    if alone:  # the kernel is built in the visit that uses it
        for j in range(m):
            k.g0[j] = state.g[0, j]
        sweep.v[:] = 1
    elif follow and not renewed:
        copy(sweep.v_next, sweep.v)
    else:
        if renewed:
            absorb_at(k, state.g, eps)
            sweeps += 1
        _scale(k, problem, state.g, sweep)
    while True:
        if _multiply(k, problem, sweep, back, alone):
            return True, sweeps
        if renewed:
            break
        if follow:
            for h in range(H):
                _columns(k, eps, sweep.v[h], state.g[h])
                for j in range(m):
                    state.g[h, j] = state.g[h, j] if math.isfinite(state.g[h, j]) else 0.0
        absorb_at(k, state.g, eps)
        _scale(k, problem, state.g, sweep)
        sweeps, renewed = sweeps + 3, True
    _in_logarithms(k, problem, state)
    k.at[0] = np.nan
    return False, sweeps + 2


@apart
def _gap(problem, sweep, state, products, gap):
    """b * gap is the excess of the column marginal."""
    far, exp_far = (FAR, EXP_FAR) if problem.tau_b < np.inf else (np.inf, np.inf)  # `criterion.farthest`
    for h in range(len(gap)):
        for j in range(gap.shape[1]):
            if products:
                gap[h, j] = at_most(sweep.v[h, j] / sweep.v_next[h, j] - 1, exp_far)
            else:
                gap[h, j] = math.expm1(at_most((state.g[h, j] - state.g_next[h, j]) / problem.eps, far))


@borrowing
def normalize(share):
    """Each row a part of its sum."""
    for h in range(len(share)):
        total = 0.0
        for j in range(share.shape[1]):
            total += share[h, j]
        for j in range(share.shape[1]):
            share[h, j] /= total


@borrowing
def see(rule, problem, state, n_iter, out):
    """`Change.seen`: f and g of a state as they are returned."""
    copy(state.f, out.f)
    copy(state.g, out.g)
    if n_iter > rule.translate_after:
        seen(problem.a, problem.b, out.f, out.g, problem.tau_a, problem.tau_b, problem.eps)


@compiled
def go(k, problem, state, before, memory, tuning, watch, rule, strict, counts, max_iter, every, plain_until, errors):
    """Iterations with a check after 1, `every`, `every`, ... of them, until the rule is met, max_iter is reached or `errors` is full.

    before  State, of which f and g are those of the last check or, for a rule that compares, of one iteration earlier, as seen.
    counts  (4,) int64: iterations so far, those since the accelerator last began, sweeps, and iterations to the next check.
    errors  (checks, H), filled from the top.

    (RUNNING or how the run ended, how many checks were made). plain_until < 0 is never accelerated.
    """
    (H, n), m, pairwise = problem.a.shape, len(k.g0), rule.norm < 0
    room = Room(
        np.empty(H), np.empty(H), np.empty(H), np.empty((H, m)), problem.b.copy(), np.empty(m), np.empty(max(n, m)),
        State(np.empty((H * pairwise, n)), np.empty((H * pairwise, m)), np.empty((0, m))),
    )  # fmt: skip
    normalize(room.share)
    return _go(
        k, problem, state, before, memory, tuning, watch, rule, strict, counts, max_iter, every, plain_until, errors, buffers(k, problem),
        room,
    )  # fmt: skip


@apart
def _go(k, problem, state, before, memory, tuning, watch, rule, strict, counts, max_iter, every, plain_until, errors, sweep, room):
    H, m = problem.b.shape
    pairwise, share, target = rule.norm < 0, room.share, room.target
    # Not constants to the compiler, which would make functions for them of their own.
    follow = products = counts[0] < 0
    levels, checks, status = True, 0, RUNNING
    while counts[0] < max_iter and checks < len(errors) and status == RUNNING:
        n_iter = counts[0]
        plain = plain_until < 0 or n_iter < plain_until
        if plain or counts[1] == 0 or n_iter == plain_until:
            if not plain or counts[1] == 0:
                for h in range(H):
                    forget(memory, h)
            if not follow:
                copy(state.g_next, state.g)
        else:
            follow = False
            for h in range(H):
                if watch.done[h]:
                    continue
                shift = 0.0
                if problem.tau_a < np.inf or problem.tau_b < np.inf:
                    shift = log_mass(problem.a[h], state.f[h], -1 / problem.tau_a) - log_mass(
                        problem.b[h], state.g_next[h], -1 / problem.tau_b
                    )
                    shift /= 1 / problem.tau_a + 1 / problem.tau_b
                for j in range(m):
                    target[j] = state.g_next[h, j] - shift
                propose(tuning, memory, h, state.g[h], target, problem.b[h], share[h], problem.eps, state.g[h])
        products, visits = iterate(k, problem, sweep, state, follow, n_iter % 2 == 0)
        due = counts[3] == 1 or (n_iter + 1 == max_iter and (not pairwise or counts[3] == every))
        levels = due or not plain or n_iter + 1 == plain_until or (pairwise and counts[3] == 2)
        if products and levels:
            potentials(k, problem, sweep, state)
        follow = plain and products and n_iter + 1 != plain_until
        counts[0], counts[1], counts[2], counts[3] = n_iter + 1, counts[1] + 1, counts[2] + visits, counts[3] - 1
        if not due:
            if pairwise and counts[3] == 1:
                see(rule, problem, state, counts[0], before)
            continue
        counts[3] = every
        found = state
        if pairwise:
            found = room.seen
            see(rule, problem, state, counts[0], found)
            change(
                rule, problem.a, problem.b, found.f, found.g, before.f, before.g, problem.eps, counts[0], room.error, room.floor, room.moved
            )
            copy(found.f, before.f)
            copy(found.g, before.g)
        else:
            _gap(problem, sweep, state, products, room.gap)
            marginal(rule, problem.b, room.gap, state.g, problem.eps, room.error, room.floor, room.unit)
        status = judge(rule, watch, plain, found.f, found.g, room.error, room.floor, strict)
        for h in range(H):
            errors[checks, h] = room.error[h]
        checks += 1
    if products and not levels:
        potentials(k, problem, sweep, state)
    return status, checks
