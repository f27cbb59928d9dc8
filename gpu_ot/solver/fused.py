"""Steps and checks in one launch each, where Triton's kernels run: the same operations as in `step`, `acceleration` and `monitor`.

Those are the reference, on any device; here tensors are only laid out as the kernels want them. None means: by torch, please.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..geometry.products import flatten, serves_vectors, vectors
from ..penalties import KL

if TYPE_CHECKING:
    from .monitor import Monitor
    from .step import Alternating, State


def propose(step: Alternating, state: State, gauge: bool, memory: int, shifted: bool = True) -> tuple[Tensor, Any] | None:
    """The g that Anderson's mixing tries next, held where problems are done or the state is void; and what is remembered."""
    problem = step.problem
    if not serves_vectors(state.g) or state.g.shape != problem.b.shape:
        return None
    from ..kernels.step import Memory, propose  # pyright: ignore[reportMissingImports]

    penalties = problem.penalties
    taus = tuple(penalty.tau for penalty in penalties if isinstance(penalty, KL))
    taus = taus if shifted and len(taus) == 2 and not problem.balanced else None
    moved = [flatten(z) for z in (state.f, state.g, state.g_next)]
    held = Memory.of(moved[1], len(moved[1]), memory) if state.memory is None else state.memory
    done = None if state.done is None else state.done.reshape(-1)
    g = propose(vectors(problem.a), vectors(problem.b), *moved, step.eps, held, gauge=gauge, taus=taus, done=done, inexact=state.inexact)
    return g.view(state.g.shape), held


def check(
    monitor: Monitor, state: State, slope: float, norm: str, sums: float, far: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """(f, g, error, done, flags) of `Monitor.check`, where the gap is slope (g - g_next), at most `far`."""
    problem, g = monitor.step.problem, state.g
    if not serves_vectors(g) or problem.forbids or g.shape != problem.b.shape:
        return None
    from ..kernels.check import check  # pyright: ignore[reportMissingImports]

    last = None
    if monitor.kept is not None and monitor.done is not None:
        f_kept, g_kept = monitor.kept
        last = flatten(f_kept), flatten(g_kept), monitor.errors[-1].reshape(-1), monitor.done.reshape(-1)
    differences = torch.finfo(g.dtype).eps / monitor.step.eps
    f, kept, error, done, flags = check(
        vectors(problem.b), flatten(state.f), flatten(g), flatten(state.g_next), slope, monitor.criterion.threshold, sums, differences,
        far, norm, last=last, plain=state.plain, inexact=state.inexact,
    )  # fmt: skip
    each = problem.b.shape[:-1]
    return f.view(state.f.shape), kept.view(g.shape), error.view(each), done.view(each), flags
