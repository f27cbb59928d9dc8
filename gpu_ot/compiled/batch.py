"""The functions of `block` for G costs, one after the other: whoever has several cores gives each of them some of the problems.

Arrays have the axis G in front. C may be one cost for all, of which every problem then has a kernel of its own.
"""

from __future__ import annotations

from .block import Measures, State, go
from .descent import begin, descend
from .kernel import Kernel
from .machine import compiled
from .mixing import Memory
from .symmetric import go_symmetric
from .watch import Watch


@compiled
def _at(k, problem, state, p):
    kernel = Kernel(k.C[min(p, len(k.C) - 1)], k.K[p], k.f0[p], k.g0[p], k.at[p], k.dropped, k.safe, k.crew)
    measures = Measures(problem.a[p], problem.b[p], problem.eps, problem.tau_a, problem.tau_b)
    return kernel, measures, State(state.f[p], state.g[p], state.g_next[p])


@compiled
def _watched(memory, watch, p):
    own = Memory(memory.changes[p], memory.moves[p], memory.last[p], memory.trial[p], memory.numbers[p], memory.work[p])
    return own, Watch(watch.f[p], watch.g[p], watch.error[p], watch.done[p], watch.progress[p])


@compiled
def begin_some(low, high, k, problem, f, weight, state):
    for p in range(low, high):
        kernel, measures, own = _at(k, problem, state, p)
        begin(kernel, measures, f[p], weight[p], own)


@compiled
def descend_some(low, high, k, problem, schedule, predict, state, sweeps):
    for p in range(low, high):
        kernel, measures, own = _at(k, problem, state, p)
        sweeps[p] += descend(kernel, measures, schedule, predict, own)


@compiled
def go_some(
    low, high, k, problem, state, before, memory, tuning, watch, rule, strict, counts, max_iter, every, plain_until, symmetric, errors, ends
):
    """`go` or `go_symmetric` for problems that still run; ends (G, 2): (status, checks so far) of each, errors (G, checks, H)."""
    for p in range(low, high):
        if ends[p, 0] != 0:
            continue
        found = errors[p, ends[p, 1] :]
        kernel, measures, own = _at(k, problem, state, p)
        kept, seen = _watched(memory, watch, p)
        if symmetric:
            status, checks = go_symmetric(kernel, measures, own, kept, tuning, seen, rule, strict, counts[p], max_iter, found)
        else:
            last = State(before.f[p], before.g[p], before.g_next[p])
            status, checks = go(
                kernel, measures, own, last, kept, tuning, seen, rule, strict, counts[p], max_iter, every, plain_until, found
            )
        ends[p, 0], ends[p, 1] = status, ends[p, 1] + checks
