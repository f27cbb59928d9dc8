"""Vectors of an iteration on one core: to and from the order of sorted points, the error of a check, and the next proposal.

torch would hand them to all cores, whose threads then spin where those of the sweeps want to run, see `gpu_ot.vectors`.
"""

from __future__ import annotations

import math

import numpy as np

from . import mixing, watch
from .exponential import exp64
from .machine import compiled


@compiled
def load(low, high, g, log_w, shift, order, eps, out):
    """out_i = (g - shift) / eps + log w of the points low..high in their order; log_w may be empty. No weight is -inf, whatever g."""
    scale = 1 / eps
    if not len(log_w):
        for i in range(low, high):
            j = order[i]
            out[i] = (g[j] - shift[j]) * scale
        return
    for i in range(low, high):
        j = order[i]
        out[i] = (g[j] - shift[j]) * scale + log_w[j] if log_w[j] > -np.inf else -np.inf


@compiled
def store(low, high, logs, shift, order, eps, damping, out):
    """out = (shift - eps logs) / damping, where each point stood."""
    scale = 1 / damping
    for i in range(low, high):
        j = order[i]
        out[j] = (shift[j] - eps * logs[i]) * scale


@compiled
def column_errors(b, g, g_next, slope, far, squared):
    """sum b |expm1 gap|, sum b and max |g| of a problem, the gap being slope (g - g_next), at most `far`; or the first two of squares."""
    off, mass, top = 0.0, 0.0, 0.0
    for j in range(len(b)):
        if b[j] > 0:
            gap = watch.at_most(slope * (g[j] - g_next[j]), far)
            # exp - 1 of a small number has few digits, of which the sum needs none.
            z = b[j] * (exp64(gap) - 1 if abs(gap) > 0.1 else math.expm1(gap))
            off += z * z if squared else abs(z)
            mass += b[j] * b[j] if squared else b[j]
            top = max(top, abs(g[j]))
    return off, mass, top


@compiled
def propose(tuning, memory, a, b, f, g, g_next, eps, tau_a, tau_b, done, out):
    """`fused.propose` for H problems: the g (H, m) to try next."""
    H, m = g.shape
    share, target = np.empty(m), np.empty(m)
    for h in range(H):
        if done[h]:
            out[h] = g[h]
            continue
        shift, mass = 0.0, 0.0
        if tau_a < np.inf or tau_b < np.inf:
            shift = watch.log_mass(a[h], f[h], -1 / tau_a) - watch.log_mass(b[h], g_next[h], -1 / tau_b)
            shift /= 1 / tau_a + 1 / tau_b
        for j in range(m):
            target[j] = g_next[h, j] - shift
            mass += b[h, j]
        for j in range(m):
            share[j] = b[h, j] / mass
        mixing.propose(tuning, memory, h, g[h], target, b[h], share, eps, out[h])


@compiled
def along(z, last, factor, out):
    """out = z + factor (z - last)."""
    for j in range(len(z)):
        out[j] = z[j] + factor * (z[j] - last[j])
