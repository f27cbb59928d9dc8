"""Geometry + step + criterion -> f, g, status. The only Sinkhorn loop in the package.

One iteration maps a column potential g to the next: f is the update of g, g_next that of f. The rows of the plan (f, g) are then exact,
and g_next holds the error of its columns without another sweep over the costs. The host asks the geometry for blocks of iterations,
and reads a few numbers after each; on a CPU machine code runs a whole stretch of blocks and checks, see `compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..geometry.protocol import Geometry
from . import compiled
from .annealing import Anneal, Constant, Stretch, stretches
from .criterion import Criterion
from .monitor import Monitor, Outcome
from .step import Alternating, Start, State


def sinkhorn(
    geometry: Geometry,
    step: Alternating,
    criterion: Criterion,
    start: Start,
    *,
    max_iter: int,
    check_every: int = 10,
    schedule: Constant | Anneal | None = None,
    auto: bool = False,
    leap: bool = False,
    on_check: Callable[[int, Tensor], None] | None = None,
    keep: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Outcome:
    """Iterate from `start` until the criterion is met, `max_iter` (>= 1) is reached or nothing moves.

    schedule   how eps reaches that of the step; `auto` and `leap` as in `annealing.stretches`.
    on_check   called with (iterations, errors) at each check; `keep` with (iterations, eps, f, g), the best so far.

    The error is checked after iterations 1, 1 + check_every, 1 + 2 check_every, ... and after the last. Accelerated, each
    problem of a batch stops on its own.
    """
    monitor = Monitor(step, criterion, geometry.dtype, on_check, keep, geometry.approximate)
    engine, state = compiled.engine(geometry, step, monitor, start), None
    for stretch in stretches(step, monitor, schedule or Constant(step.eps), max_iter, check_every, auto, leap):
        state = _run(geometry, monitor, start, stretch, state) if engine is None else engine.run(stretch, state)
        if monitor.status is not None:
            break
    assert state is not None
    if engine is not None:
        engine.finish()
    return monitor.outcome(state)


def _run(geometry: Geometry, monitor: Monitor, start: Start, stretch: Stretch, state: State | None) -> State | None:
    """The state after a stretch, block by block."""
    for block in stretch.blocks(monitor):
        if state is None or block.restart:
            state = block.step.begin(geometry, start, state)
        elif block.forget:
            state = replace(state, age=0, memory=None)
        before, state = state, geometry.run(block.step, state, block.k)
        assert before is not None and state is not None
        if block.check == "ahead":
            state = before if monitor.end_is_near(state) else state
        elif block.check:
            state = monitor.check(state, before)
            if monitor.status is not None:
                break
    return state


def iterations(geometry: Geometry, step: Alternating, start: Start, k: int) -> State:
    """The state after exactly k iterations: what `grad="unroll"` differentiates, on a geometry that can be."""
    return geometry.run(step, step.start(geometry, start), k)
