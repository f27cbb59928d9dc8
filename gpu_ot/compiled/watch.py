"""Whether a run may end: the compiled twin of `gpu_ot.solver.criterion` and of `Monitor.check`, where the reasons are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .exponential import exp64
from .machine import borrowing, compiled, extreme, greater

RUNNING, CONVERGED, STALLED, DIVERGED = range(4)
NORMS = ("l1", "l1_absolute", "l2", "l2_joint")
L1, L1_ABSOLUTE, L2, L2_JOINT = range(4)
#: `solver.criterion.RESOLVED`.
RESOLVED = 1e-3
#: `solver.criterion.FAR`.
FAR = 40.0
EXP_FAR = math.exp(FAR)


class Rule(NamedTuple):
    """A criterion, and the constants that belong to it.

    tol    `Criterion.threshold`; -inf: nothing ends the run before its last iteration.
    norm   of Marginal, an index into NORMS; -1 for Change, with its settings.
    """

    tol: float
    norm: int
    rounding: float  # ROUNDING times the last digit of the sweeps
    stall_checks: int
    near: float
    both_sides: bool = True
    translate_after: float = math.inf
    relative_after: float = math.inf


class Watch(NamedTuple):
    """The best state of each of H problems, and how the errors went."""

    f: np.ndarray  # (H, n)
    g: np.ndarray  # (H, m)
    error: np.ndarray  # (H,)
    done: np.ndarray  # (H,) bool
    progress: np.ndarray  # (3,): whether anything was kept, the smallest error in floors, checks since then


@compiled
def blank(H, n, m):
    return Watch(np.empty((H, n)), np.empty((H, m)), np.empty(H), np.zeros(H, np.bool_), np.array([0.0, math.inf, 0.0]))


@borrowing
def at_most(z, most):
    return most if z > most else z  # NaN stays


@extreme
def _top(z, w, scale):
    """The largest scale z among atoms with weight."""
    top = -np.inf
    for j in range(len(w)):
        here = scale * z[j] if w[j] > 0 else -np.inf
        top = greater(top, here)
    return top


@borrowing
def log_mass(w, z, scale):
    """log sum w exp(scale z)."""
    top, total = _top(z, w, scale), 0.0
    for j in range(len(w)):
        e = w[j] * exp64(scale * z[j] - top)
        total += e if w[j] > 0 else 0.0
    return math.log(total) + top


@borrowing
def translation(a, b, f, g, tau_a, tau_b, eps):
    """The constant p of `penalties.translate`."""
    rate = 1 / tau_b + 1 / (tau_a + eps)
    return (log_mass(b, g, -1 / tau_b) - log_mass(a, f, -1 / tau_a)) / rate if rate > 0 else 0.0


@borrowing
def seen(a, b, f, g, tau_a, tau_b, eps):
    """(f, g) moves to the best mass, in place."""
    for h in range(len(f)):
        p = translation(a[h], b[h], f[h], g[h], tau_a, tau_b, eps)
        for i in range(f.shape[1]):
            f[h, i] -= p / (1 + eps / tau_a)
        for j in range(g.shape[1]):
            g[h, j] += p


@extreme
def _largest(z):
    high = 0.0
    for j in range(len(z)):
        high = greater(high, z[j])
    return high


@borrowing
def _change(new, old, w, eps, relative, moved):
    """`criterion._change`."""
    H, m = w.shape
    top, scale, change = -np.inf, 1 / eps, 0.0
    for h in range(H):
        top = max(top, _top(new[h], w[h], scale), _top(old[h], w[h], scale))
    top = top if relative else max(top, 0.0)
    for h in range(H):
        broken = 0.0
        for j in range(m):
            e = abs(exp64(new[h, j] * scale - top) - exp64(old[h, j] * scale - top))
            moved[j] = e if w[h, j] > 0 else 0.0
            broken += 0 * moved[j]
        if broken != 0:  # NaN
            return broken
        change = max(change, _largest(moved[:m]))
    return change


@borrowing
def _finite_size(z):
    size = 0.0
    for h in range(z.shape[0]):
        for j in range(z.shape[1]):
            size = max(size, abs(z[h, j])) if math.isfinite(z[h, j]) else size
    return size


@borrowing
def change(rule, a, b, f, g, old_f, old_g, eps, n_iter, error, floor, moved):
    """Fills error and floor (H,) by the rule `Change`, from the state (f, g) and the one an iteration earlier, both as seen.

    moved  for at least n and m numbers.
    """
    relative = n_iter > rule.relative_after
    found = _change(g, old_g, b, eps, relative, moved)
    if rule.both_sides or relative:
        found = 0.5 * (found + _change(f, old_f, a, eps, relative, moved))
    size = max(_finite_size(f), _finite_size(g))
    floor[:] = rule.rounding + 2.220446049250313e-16 * size / eps
    if floor[0] > RESOLVED and found < floor[0]:
        found = floor[0]
    error[:] = found


@borrowing
def marginal(rule, b, gap, g, eps, error, floor, unit):
    """Fills error and floor (H,), and unit, by the rule `Marginal`; b * gap (H, m) is the excess of the column marginal."""
    H, m = b.shape
    squared = rule.norm == L2 or rule.norm == L2_JOINT
    for h in range(H):
        off, mass, top = 0.0, 0.0, 0.0
        for j in range(m):
            if b[h, j] > 0:
                z = b[h, j] * gap[h, j]
                off += z * z if squared else abs(z)
                mass += b[h, j] * b[h, j] if squared else b[h, j]
                top = max(top, abs(g[h, j]))
        error[h], unit[h] = off, mass
        floor[h] = rule.rounding + 2.220446049250313e-16 * top / eps
    if rule.norm == L2_JOINT:
        joint, whole, noise = 0.0, 0.0, 0.0
        for h in range(H):
            joint, whole, noise = joint + error[h], whole + unit[h], noise + unit[h] * floor[h] ** 2
        for h in range(H):
            error[h], unit[h], floor[h] = math.sqrt(joint), math.sqrt(whole), math.sqrt(noise)
    else:
        for h in range(H):
            if squared:
                error[h], unit[h] = math.sqrt(error[h]), math.sqrt(unit[h])
            if rule.norm == L1:
                error[h] /= unit[h]
                unit[h] = 1.0
            floor[h] *= unit[h]
    for h in range(H):
        if floor[h] > RESOLVED * unit[h]:
            error[h] = floor[h] if error[h] < floor[h] else error[h]  # NaN stays


@borrowing
def judge(rule, watch, plain, f, g, error, floor, strict):
    """The state is kept where it is better; `error` becomes that of what is kept. RUNNING, or how the run ends."""
    H, progress, done = len(f), watch.progress, watch.done
    for h in range(H):
        worse = False
        if progress[0] > 0:
            worse = done[h] or not (plain or error[h] < watch.error[h])
        if worse:
            error[h] = watch.error[h]
        else:
            for i in range(f.shape[1]):
                watch.f[h, i] = f[h, i]
            for j in range(g.shape[1]):
                watch.g[h, j] = g[h, j]
            watch.error[h] = error[h]
        done[h] = error[h] < rule.tol if strict else error[h] <= rule.tol
    progress[0] = 1
    converged, settled, worst, broken = True, True, -np.inf, False
    for h in range(H):
        ratio = error[h] / floor[h]
        converged &= done[h]
        settled &= done[h] or error[h] <= floor[h]
        worst, broken = max(worst, ratio), broken or math.isnan(ratio)
    if converged:
        return CONVERGED
    if settled and rule.tol > -np.inf:
        return STALLED
    if broken or not math.isfinite(worst):
        return DIVERGED
    if rule.tol == -np.inf:
        return RUNNING
    progress[2] = 0 if worst < progress[1] else progress[2] + 1
    progress[1] = min(progress[1], worst)
    return STALLED if progress[2] >= rule.stall_checks and worst < rule.near else RUNNING
