"""Gromov-Wasserstein between small spaces: the outer loop of `gromov.outer` for G problems, one after the other, as machine code.

A space's matrix is (G, n, n), or (1, n, n) for all. Each outer iteration is one call of `block.go`, a plan, and two products with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from . import mixing, watch
from .block import Measures, State, go
from .crew import alone
from .descent import begin
from .kernel import Kernel, aligned
from .machine import borrowing, compiled
from .search import search
from .transport import write_plan
from .watch import CONVERGED, DIVERGED, RUNNING, STALLED, Rule

#: Checks of one call of `go`.
ERRORS = 256
#: Columns of the numbers that a problem carries from call to call: how far the last iteration moved its costs, and what a marginal error
#: counts for.
CHANGE, RATIO = 0, 1


class Spaces(NamedTuple):
    """As `gromov.spaces.Matrices`, of symmetric matrices, and costs of features with their weight, (G or 1, n, m) or (1, 0, 0)."""

    f1: np.ndarray
    f2: np.ndarray
    h1: np.ndarray
    h2: np.ndarray
    features: np.ndarray


class Limits(NamedTuple):
    """The settings and constants of `gromov.outer` and of `gromov.mixing`, by their names."""

    tol: float
    inner: float
    loosest: float
    max_iter: int
    inner_iter: int
    memory: int
    gate: float
    steady: int
    worse: float
    ridge: float


class Past(NamedTuple):
    """What mixing remembers of one problem: the last slope and its residual, differences of both, and their inner products."""

    slope: np.ndarray  # (n, m)
    residual: np.ndarray
    moves: np.ndarray  # (memory, n, m)
    changes: np.ndarray
    gram: np.ndarray  # (memory, memory) of the changes
    right: np.ndarray  # (memory,)
    factor: np.ndarray  # (memory, memory)
    counts: np.ndarray  # (3,): whether there is a last one, differences so far, and iterations for which the change has fallen


@borrowing
def product(A, B, out):
    """out = A B, by four rows and four columns of A at a time: as fast as a BLAS while B fits the second cache."""
    n, q = A.shape
    m = B.shape[1]
    for i in range(n):
        for j in range(m):
            out[i, j] = 0
    for i in range(0, n - 3, 4):
        o0, o1, o2, o3 = out[i], out[i + 1], out[i + 2], out[i + 3]
        for k in range(0, q - 3, 4):
            b0, b1, b2, b3 = B[k], B[k + 1], B[k + 2], B[k + 3]
            a00, a01, a02, a03 = A[i, k], A[i, k + 1], A[i, k + 2], A[i, k + 3]
            a10, a11, a12, a13 = A[i + 1, k], A[i + 1, k + 1], A[i + 1, k + 2], A[i + 1, k + 3]
            a20, a21, a22, a23 = A[i + 2, k], A[i + 2, k + 1], A[i + 2, k + 2], A[i + 2, k + 3]
            a30, a31, a32, a33 = A[i + 3, k], A[i + 3, k + 1], A[i + 3, k + 2], A[i + 3, k + 3]
            for j in range(m):
                x0, x1, x2, x3 = b0[j], b1[j], b2[j], b3[j]
                o0[j] += a00 * x0 + a01 * x1 + a02 * x2 + a03 * x3
                o1[j] += a10 * x0 + a11 * x1 + a12 * x2 + a13 * x3
                o2[j] += a20 * x0 + a21 * x1 + a22 * x2 + a23 * x3
                o3[j] += a30 * x0 + a31 * x1 + a32 * x2 + a33 * x3
        for k in range(q - q % 4, q):
            b = B[k]
            a0, a1, a2, a3 = A[i, k], A[i + 1, k], A[i + 2, k], A[i + 3, k]
            for j in range(m):
                o0[j] += a0 * b[j]
                o1[j] += a1 * b[j]
                o2[j] += a2 * b[j]
                o3[j] += a3 * b[j]
    for i in range(n - n % 4, n):
        o = out[i]
        for k in range(q):
            a, b = A[i, k], B[k]
            for j in range(m):
                o[j] += a * b[j]


@borrowing
def _times(A, w, out):
    """out = A w."""
    for i in range(len(A)):
        total, row = 0.0, A[i]
        for j in range(len(w)):
            total += row[j] * w[j]
        out[i] = total


@borrowing
def _slope(f1, f2, h1, h2, factor, P, half, rows, columns, of_rows, of_columns, out):
    """out = factor L⊗P."""
    n, m = P.shape
    for j in range(m):
        columns[j] = 0
    for i in range(n):
        total, row = 0.0, P[i]
        for j in range(m):
            total += row[j]
            columns[j] += row[j]
        rows[i] = total
    _times(f1, rows, of_rows)
    _times(f2, columns, of_columns)
    product(P, h2, half)
    product(h1, half, out)
    for i in range(n):
        row, here = out[i], of_rows[i]
        for j in range(m):
            row[j] = factor * (here + of_columns[j] - row[j])


@borrowing
def _inner(x, y):
    total = 0.0
    for i in range(x.shape[0]):
        row, other = x[i], y[i]
        for j in range(x.shape[1]):
            total += row[j] * other[j]
    return total


@borrowing
def _largest(slope, following):
    """(max |slope|, max |following - slope|), NaN where a number is not finite."""
    size, change, broken = 0.0, 0.0, 0.0
    for i in range(slope.shape[0]):
        old, new = slope[i], following[i]
        for j in range(slope.shape[1]):
            z = abs(old[j])
            size = z if z > size else size
            z = abs(new[j] - old[j])
            change = z if z > change else change
            broken += 0 * new[j]
    return size, change + broken


@borrowing
def _weights(past, kept, ridge):
    """right = the combination of the changes that is nearest to the residual, by Cholesky's factors."""
    gram, x, L = past.gram, past.right, past.factor
    trace = 0.0
    for c in range(kept):
        trace += gram[c, c]
    for c in range(kept):
        for d in range(c + 1):
            total = gram[c, d] + (ridge * trace if c == d else 0.0)
            for e in range(d):
                total -= L[c, e] * L[d, e]
            L[c, d] = total / L[d, d] if d < c else math.sqrt(total)
    for c in range(kept):
        for e in range(c):
            x[c] -= L[c, e] * x[e]
        x[c] /= L[c, c]
    for c in range(kept - 1, -1, -1):
        for e in range(c + 1, kept):
            x[c] -= L[e, c] * x[e]
        x[c] /= L[c, c]


@borrowing
def _mixed(past, limits, change, before, slope, following):
    """slope = the one to try next, given that it led to `following`: the twin of `gromov.mixing`."""
    n, m = slope.shape
    count, kept = past.counts, limits.memory
    count[2] = count[2] + 1 if change < before else 0
    if change > limits.worse * before:
        count[0] = count[1] = 0
    place = count[1] % kept
    if count[0]:
        move, other = past.moves[place], past.changes[place]
        for i in range(n):
            for j in range(m):
                move[i, j] = slope[i, j] - past.slope[i, j]
                other[i, j] = following[i, j] - slope[i, j] - past.residual[i, j]
        count[1] += 1
    for i in range(n):
        for j in range(m):
            past.slope[i, j], past.residual[i, j] = slope[i, j], following[i, j] - slope[i, j]
            slope[i, j] = following[i, j]
    if count[0] and _inner(past.moves[place], past.changes[place]) >= 0:
        count[1] = count[2] = 0
    count[0], kept = 1, min(count[1], kept)
    if count[1] and place < kept:
        for c in range(kept):
            past.gram[c, place] = past.gram[place, c] = _inner(past.changes[c], past.changes[place])
    if kept == 0 or change >= limits.gate or count[2] < limits.steady:
        return
    for c in range(kept):
        past.right[c] = _inner(past.changes[c], past.residual)
    _weights(past, kept, limits.ridge)
    for c in range(kept):
        if not math.isfinite(past.right[c]):
            return
    for c in range(kept):
        part, move, other = past.right[c], past.moves[c], past.changes[c]
        for i in range(n):
            for j in range(m):
                slope[i, j] -= part * (move[i, j] + other[i, j])


@compiled
def settle_some(
    low,
    high,
    spaces,
    factor,
    a,
    b,
    eps,
    tau_a,
    tau_b,
    rule,
    tuning,
    annealing,
    limits,
    dropped,
    safe,
    slope,
    f,
    numbers,
    counts,
    ends,
    history,
):
    """Outer iterations until a problem has settled, max_iter is reached, or `history` is full.

    factor   of L⊗P in the slope.
    slope    (G, n, m), of the plans at which the problems are; f (G, n), potentials to start from.
    numbers  (G, 2) and counts (G, 2): outer iterations so far, and inner ones. The first transport problem is solved by `search`.
    ends     (G, 2): RUNNING or how a problem ended, and how many entries of its row of `history` are filled.
    """
    n, m = slope.shape[1:]
    like, kept = slope[0], limits.memory
    C, P, half, following = aligned(n, m, like), aligned(n, m, like), aligned(n, m, like), aligned(n, m, like)
    k = Kernel(C, aligned(n, m, like), np.empty(n), np.empty(m), np.full(1, np.nan), dropped, safe, alone(like))
    rows, columns, of_rows, of_columns = np.empty(n), np.empty(m), np.empty(n), np.empty(m)
    state = State(np.empty((1, n)), np.empty((1, m)), np.empty((1, m)))
    before = State(np.empty((1, 0)), np.empty((1, 0)), np.empty((1, 0)))
    memory, seen, errors = mixing.blank(1, m), watch.blank(1, n, m), np.empty((ERRORS, 1))
    past = Past(
        np.empty((n, m)), np.empty((n, m)), np.empty((kept, n, m)), np.empty((kept, n, m)), np.zeros((kept, kept)), np.zeros(kept),
        np.zeros((kept, kept)), np.zeros(3, np.int64),
    )  # fmt: skip
    made = np.zeros(4, np.int64)
    for p in range(low, high):
        if ends[p, 0] != RUNNING:
            continue
        f1, f2 = spaces.f1[min(p, len(spaces.f1) - 1)], spaces.f2[min(p, len(spaces.f2) - 1)]
        h1, h2 = spaces.h1[min(p, len(spaces.h1) - 1)], spaces.h2[min(p, len(spaces.h2) - 1)]
        features = spaces.features[min(p, len(spaces.features) - 1)]
        own, measures = slope[p], Measures(a[p : p + 1], b[p : p + 1], eps, tau_a, tau_b)
        past.counts[:], checked = 0, 0
        while ends[p, 0] == RUNNING and counts[p, 0] < limits.max_iter and checked < history.shape[1]:
            for i in range(n):
                for j in range(m):
                    C[i, j] = own[i, j] + features[i, j] if len(features) else own[i, j]
            moves = max(numbers[p, CHANGE] if counts[p, 0] else limits.loosest, limits.tol)
            moves = limits.tol if counts[p, 0] + 1 == limits.max_iter else moves
            inner = min(limits.inner * moves * numbers[p, RATIO], limits.loosest)
            within = Rule(
                inner, rule.norm, rule.rounding, rule.stall_checks, rule.near, rule.both_sides, rule.translate_after, rule.relative_after
            )  # fmt: skip
            if counts[p, 0]:
                k.at[0] = np.nan
                begin(k, measures, f[p : p + 1], measures.a, state)
                seen.done[0], seen.progress[0], seen.progress[1], seen.progress[2] = False, 0.0, np.inf, 0.0
                made[0], made[1], made[2], made[3] = 0, 0, 0, 1
                status = RUNNING
                while status == RUNNING and made[0] < limits.inner_iter:
                    status, _ = go(k, measures, state, before, memory, tuning, seen, within, False, made, limits.inner_iter, 1, 0, errors)
                write_plan(k, measures, State(seen.f, seen.g, seen.g), P)
                f[p] = seen.f[0]
                counts[p, 1] += made[0]
            else:
                own_kernel, found_f, found_g, steps, status, _ = search(
                    C, a[p], b[p], eps, tau_a, tau_b, f[p], a[p], within, tuning, annealing, False, dropped, safe, limits.inner_iter
                )  # fmt: skip
                write_plan(own_kernel, measures, State(found_f, found_g, found_g), P)
                f[p] = found_f[0]
                counts[p, 1] += steps[0]
            _slope(f1, f2, h1, h2, factor, P, half, rows, columns, of_rows, of_columns, following)
            size, change = _largest(own, following)
            change /= eps
            numbers[p, RATIO] = min(1.0, eps / max(size, 1e-300))
            history[p, checked] = change
            counts[p, 0] += 1
            checked += 1
            if not math.isfinite(change):
                ends[p, 0] = DIVERGED
            elif change <= limits.tol and (status in (CONVERGED, STALLED)) and inner <= limits.tol * numbers[p, RATIO]:
                ends[p, 0] = CONVERGED  # its potentials are those of the slope that is there
            elif counts[p, 0] < limits.max_iter:
                _mixed(past, limits, change, numbers[p, CHANGE], own, following)
            numbers[p, CHANGE] = change
        ends[p, 1] = checked
