"""How a run begins, and passes larger values of eps on its way: the compiled twin of `solver.annealing`'s iterations."""

from __future__ import annotations

import numpy as np

from .block import Measures, buffers, damp, iterate, potentials
from .kernel import first
from .machine import compiled


@compiled
def begin(k, problem, f, weight, state):
    """The state before the first iteration, from row potentials f (H, n) with their weights."""
    state.f[:] = f
    first(k, f, weight, problem.eps, state.g_next)
    for h in range(len(f)):
        for j in range(len(k.g0)):
            state.g_next[h, j] = damp(state.g_next[h, j], problem.tau_b, problem.eps)
    state.g[:] = state.g_next


@compiled
def descend(k, problem, schedule, predict, state):
    """One plain iteration at each eps of schedule[:-1] from state.g_next, as `solver.step.Annealing`; schedule[-1] is the target's."""
    H, m = state.g.shape
    last = np.empty((H, m))
    sweeps, sweep = 0, buffers(k, problem)
    for i in range(len(schedule) - 1):
        at = Measures(problem.a, problem.b, schedule[i], problem.tau_a, problem.tau_b)
        state.g[:] = state.g_next
        products, visits = iterate(k, at, sweep, state, schedule[i] < 0, i % 2 == 0)
        sweeps += visits
        if products:
            potentials(k, at, sweep, state)
        if predict:
            slope = (schedule[i + 1] - schedule[i]) / (schedule[i] - schedule[i - 1]) if i else 0.0
            for h in range(H):
                for j in range(m):
                    now = state.g_next[h, j]
                    state.g_next[h, j] = now + (now - last[h, j]) * slope if i else now
                    last[h, j] = now
    return sweeps
