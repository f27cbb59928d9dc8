"""The derivative of a plan through the iterations that made it: the compiled twin of grad="unroll" for hard marginals.

Iteration k from w_(k-1) on the kernel K absorbed at the start, with scalings relative to it:

    w_k = b / t_(k-1),    s_k = K w_k,    u_k = a / s_k,    t_k = K^T u_k,    u_0 = 1,    P = diag(u_k) K diag(w_k).

The adjoint runs them backwards, one read of K an iteration. What falls on K itself is sum_k gs_k w_k^T + u_(k-1) gt_k^T, two products of
the recorded vectors.
"""

from __future__ import annotations

import math

import numpy as np

from .crew import alone
from .kernel import Kernel, aligned, first, largest, smallest
from .machine import borrowing, compiled
from .visits import both


@compiled
def record(C, a, b, eps, start, k, dropped, safe):
    """k iterations from row potentials start (n,), all in float64: K, u (k + 1, n), w (k, m), s (k, n), t (k + 1, m), and whether every sum
    was exact."""
    n, m = C.shape
    kernel = Kernel(C, aligned(n, m, C), np.empty(n), np.empty(m), np.full(1, np.nan), dropped, safe, alone(C))
    u, w, s, t = np.empty((k + 1, n)), np.empty((k, m)), np.empty((k, n)), np.empty((k + 1, m))
    start, ones = start.reshape((1, n)), np.ones((1, n))
    first(kernel, start, ones, eps, t[:1])
    u[0] = 1
    t[0] = 0
    for i in range(n):
        for j in range(m):
            t[0, j] += kernel.K[i, j]
    exact = kernel.at[0] == eps and _iterate(kernel.K, a, b, np.zeros(n), u, w, s, t, safe)
    return kernel.K, u, w, s, t, exact


@borrowing
def _iterate(K, a, b, none, u, w, s, t, safe):
    exact, m = True, len(b)
    for i in range(len(w)):
        total, mass = 0.0, 0.0
        for j in range(m):
            w[i, j] = b[j] / t[i, j] if b[j] > 0 else 0.0
            total += w[i, j]
        both(K, w[i], a, 0.0, none, s[i], u[i + 1], t[i + 1], i % 2 == 0)
        for j in range(len(a)):
            mass += u[i + 1, j]
        exact &= smallest(s[i]) >= safe * total and largest(s[i]) < np.inf
        exact &= smallest(t[i + 1]) >= safe * mass and math.isfinite(mass) and largest(t[i + 1]) < np.inf
    return exact


@compiled
def pull(K, a, b, u, w, s, t, grad):
    """(ga, gb, gs (k, n), gt (k, m)): the gradients of a function whose derivative in P is `grad` (n, m), and what falls on K."""
    n, m = K.shape
    k = len(w)
    ga, gb, gs, gt = np.zeros(n), np.zeros(m), np.empty((k, n)), np.empty((k, m))
    gw = np.zeros(m)
    for i in range(n):
        along, here = 0.0, u[k, i]
        for j in range(m):
            x = grad[i, j] * K[i, j]
            along += x * w[k - 1, j]
            gw[j] += here * x
        ga[i] += along / s[k - 1, i]
        gs[k - 1, i] = -along * here / s[k - 1, i]
    for i in range(n):
        here = gs[k - 1, i]
        for j in range(m):
            gw[j] += here * K[i, j]
    for r in range(k - 1, -1, -1):
        for j in range(m):
            gb[j] += gw[j] / t[r, j]
            gt[r, j] = -gw[j] * w[r, j] / t[r, j]
        if r == 0:
            break
        gw[:] = 0
        for i in range(n):
            along = 0.0
            for j in range(m):
                along += K[i, j] * gt[r, j]
            ga[i] += along / s[r - 1, i]
            here = -along * u[r, i] / s[r - 1, i]
            gs[r - 1, i] = here
            for j in range(m):
                gw[j] += here * K[i, j]
    return ga, gb, gs, gt


@compiled
def on_costs(K, u, w, grad, fall, eps):
    """The gradient in C, in place of `fall`, what fell on K beside P = u K w: -K (fall + grad u w) / eps."""
    n, m = K.shape
    scale = -1 / eps
    for i in range(n):
        for j in range(m):
            fall[i, j] = scale * K[i, j] * (fall[i, j] + grad[i, j] * u[i] * w[j])
