"""A problem between arrays in one call: checked, solved, and its plan formed."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from . import mixing
from .block import Measures, State, go, see
from .crew import alone
from .descent import begin
from .exponential import exp64, log64
from .kernel import Kernel, aligned, copy, narrow_exp, turn, within_range
from .machine import apart, compiled
from .watch import DIVERGED, RUNNING, Watch

LARGE, MOST = 1e100, 10**7
#: Instead of a status: some number is not an ordinary one, or the masses differ.
UNUSUAL = -1


@compiled
def ordinary(M, a, b, rtol):
    """Whether costs and weights are finite, weights >= 0 and of a mass that leaves room for products of them, and, for rtol >= 0, of one
    mass up to that: b then gets that of a."""
    n, m = M.shape
    broken = 0.0 * M[0, 0]
    for i in range(n):
        for j in range(m):
            broken += 0 * M[i, j]  # 0, or NaN
    least, mass_a, mass_b = 0.0, 0.0, 0.0
    for i in range(n):
        least, mass_a = a[i] if a[i] < least else least, mass_a + a[i]
    for j in range(m):
        least, mass_b = b[j] if b[j] < least else least, mass_b + b[j]
    if not (broken == 0 and least >= 0 and 1 / LARGE < mass_a < LARGE and 1 / LARGE < mass_b < LARGE):
        return False
    if rtol < 0:
        return True
    if not abs(mass_a - mass_b) <= rtol * max(mass_a, mass_b):
        return False
    ratio = mass_a / mass_b
    for j in range(m):
        b[j] *= ratio
    return True


@compiled
def inner(P, M):
    """<P, M>, summed in float64."""
    total = 0.0
    for i in range(P.shape[0]):
        for j in range(P.shape[1]):
            total += float(P[i, j]) * float(M[i, j])
    return total


@apart
def _scale(K, u, w):
    """K_ij = u_i K_ij w_j: in vectors, which a compiler makes none of where it cannot tell K from another array."""
    for i in range(len(u)):
        here = u[i]
        for j in range(len(w)):
            K[i, j] = here * K[i, j] * w[j]


@compiled
def write_plan(k, problem, state, P):
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), by the kernel where there is one. P may be K."""
    n, m = k.C.shape
    scale, a, b, f, g = 1 / problem.eps, problem.a[0], problem.b[0], state.f[0], state.g[0]
    if k.at[0] == problem.eps:
        w, u = np.empty(m, k.K.dtype), np.empty(n, k.K.dtype)
        total, mass = 0.0, 0.0
        for j in range(m):
            w[j] = b[j] * exp64((g[j] - k.g0[j]) * scale) if b[j] > 0 else 0.0
            total += w[j]
        for i in range(n):
            u[i] = a[i] * exp64((f[i] - k.f0[i]) * scale) if a[i] > 0 else 0.0
            mass += u[i]
        if within_range(total, w[0]) and within_range(mass, w[0]):
            if P.ctypes.data != k.K.ctypes.data:
                copy(k.K, P)
            _scale(P, u, w)
            return
    zero, h = P.dtype.type(0), np.empty(m)
    for j in range(m):
        h[j] = g[j] + problem.eps * math.log(b[j]) if b[j] > 0 else -np.inf
    for i in range(n):
        top = f[i] + problem.eps * math.log(a[i]) if a[i] > 0 else -np.inf
        for j in range(m):
            z = (top + h[j] - k.C[i, j]) * scale
            P[i, j] = zero if z < -700 else narrow_exp(z, zero)


@compiled
def solve(M, a, b, eps, tau_a, tau_b, start, weight, before_g, rtol, rule, strict, tuning, dropped, safe, max_iter, every, plain_until):
    """The plan of one problem from row potentials `start` (n,) with their weights; a and b, (n,) and (m,) of float64, are overwritten.

    For limits of at most MOST iterations.

    before_g (m,) is what a rule that compares takes for the g at the start; rtol as in `ordinary`, the rest as in `block.go`.
    (plan, f, g, errors (checks,), counts, status). UNUSUAL: nothing was done.
    """
    n, m = M.shape
    K, counts, errors = aligned(n, m, M), np.array([0, 0, 1, 1]), np.empty((max_iter // every + 2, 1))
    watch = Watch(np.empty((1, n)), np.empty((1, m)), np.empty(1), np.zeros(1, np.bool_), np.array([0.0, np.inf, 0.0]))
    if not ordinary(M, a, b, rtol):
        return K, watch.f[0], watch.g[0], errors[:0, 0], counts, UNUSUAL
    k = Kernel(M, K, np.empty(n), np.empty(m), np.full(1, np.nan), dropped, safe, alone(M))
    problem = Measures(a.reshape((1, n)), b.reshape((1, m)), eps, tau_a, tau_b)
    state = State(np.empty((1, n)), np.empty((1, m)), np.empty((1, m)))
    before = State(start.copy().reshape((1, n)), before_g.copy().reshape((1, m)), np.empty((1, 0)))
    mixed = m if plain_until >= 0 else 0
    memory = mixing.blank(1, mixed)
    begin(k, problem, start.reshape((1, n)), weight.reshape((1, n)), state)
    status, checks = go(k, problem, state, before, memory, tuning, watch, rule, strict, counts, max_iter, every, plain_until, errors)
    kept = State(watch.f, watch.g, watch.g)
    if status == RUNNING and rule.norm < 0:
        see(rule, problem, state, counts[0], kept)
    write_plan(k, problem, kept, K)
    return K, watch.f[0], watch.g[0], errors[:checks, 0], counts, status


class Found(NamedTuple):
    """What `solve_some` writes for B problems: plans (B, n, m), f (B, n), g (B, m), log u = f / eps + log a and log v, <P, M> and
    <P, f + g> and eps <P, log a⊗b> (B, 3), errors (B, checks), and (iterations, sweeps, checks, status) (B, 4)."""

    P: np.ndarray
    f: np.ndarray
    g: np.ndarray
    log_u: np.ndarray
    log_v: np.ndarray
    sums: np.ndarray
    errors: np.ndarray
    ends: np.ndarray


@apart
def _sums(P, C, f, g, log_a, log_b):
    """<P, C>, <P, f + g> and <P, log_a + log_b>."""
    linear, dual, entropy = 0.0, 0.0, 0.0
    for i in range(len(f)):
        mass = 0.0
        for j in range(len(g)):
            mass += P[i, j]
            linear += float(P[i, j]) * float(C[i, j])
            dual += P[i, j] * g[j]
            entropy += P[i, j] * log_b[j]
        dual += mass * f[i]
        entropy += mass * log_a[i]
    return linear, dual, entropy


@compiled
def solve_some(low, high, M, a, b, eps, rtol, rule, tuning, dropped, safe, max_iter, every, found):
    """Problems low to high by `solve`, each turned so that its columns are the exact ones, from g = 0: plain iterations, each problem as
    many as it needs. M (B, n, m), a (B, n), b (B, m). It ends at the first that is UNUSUAL or diverges."""
    n, m = M.shape[1:]
    turned, log_a, log_b = aligned(m, n, M), np.empty(n), np.empty(m)
    for p in range(low, high):
        wa, wb = a[p].copy(), b[p].copy()
        ends = found.ends[p]
        if not ordinary(M[p], wa, wb, rtol):
            ends[3] = UNUSUAL
            return
        turn(M[p], turned)
        Q, g, f, errors, counts, status = solve(
            turned, wb, wa, eps, np.inf, np.inf, np.zeros(m), np.ones(m), np.zeros(n), -1.0, rule, False, tuning, dropped, safe,
            max_iter, every, -1,
        )  # fmt: skip
        ends[0], ends[1], ends[2], ends[3] = counts[0], counts[2], len(errors), status
        if status == DIVERGED:
            return
        found.errors[p, : len(errors)] = errors
        found.f[p], found.g[p] = f, g
        for i in range(n):
            log_a[i] = log64(wa[i]) if wa[i] > 0 else 0.0
            found.log_u[p, i] = f[i] / eps + log_a[i] if wa[i] > 0 else -np.inf
            f[i] = f[i] if wa[i] > 0 else 0.0
        for j in range(m):
            log_b[j] = log64(wb[j]) if wb[j] > 0 else 0.0
            found.log_v[p, j] = g[j] / eps + log_b[j] if wb[j] > 0 else -np.inf
            g[j] = g[j] if wb[j] > 0 else 0.0
        turn(Q, found.P[p])
        linear, dual, entropy = _sums(found.P[p], M[p], f, g, log_a, log_b)
        found.sums[p, 0], found.sums[p, 1], found.sums[p, 2] = linear, dual, eps * entropy
