"""Steps and checks in one launch each, where Triton's kernels run: the same operations as in `step`, `acceleration` and `monitor`.

Those are the reference, on any device; here tensors are only laid out as the kernels want them. None means: by torch, please. Long vectors
of a CPU are taken by compiled functions on one core, so that torch's threads sleep while others sweep.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import compiled
from ..geometry.products import flatten, serves_vectors, vectors
from ..penalties import KL
from ..vectors import PIECE

if TYPE_CHECKING:
    from .monitor import Monitor
    from .step import Alternating, State


def propose(step: Alternating, state: State, gauge: bool, memory: int, shifted: bool = True) -> tuple[Tensor, Any] | None:
    """The g that Anderson's mixing tries next, held where problems are done or the state is void; and what is remembered."""
    problem = step.problem
    if state.g.shape != problem.b.shape:
        return None
    if not serves_vectors(state.g):
        return _compiled_proposal(step, state, gauge, memory, shifted) if on_one_core(state.g) else None
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


def on_one_core(*tensors: Tensor) -> bool:
    """Whether compiled functions take these vectors: torch would hand them to all cores."""
    long = all(z.device.type == "cpu" and z.dtype == torch.float64 and z.numel() > PIECE for z in tensors)
    return long and not torch.is_grad_enabled() and compiled.refused() is None


def _compiled_proposal(step: Alternating, state: State, gauge: bool, memory: int, shifted: bool) -> tuple[Tensor, Any] | None:
    from ..compiled import levels, mixing
    from .compiled import tuning

    problem, m = step.problem, state.g.shape[-1]
    taus = [float(penalty.tau) for penalty in problem.penalties if isinstance(penalty, KL)]
    if state.inexact is not None:
        return None
    tau_a, tau_b = taus if shifted and len(taus) == 2 else (math.inf, math.inf)
    a, b, f, g, g_next = (_array(z) for z in (problem.a, problem.b, state.f, state.g, state.g_next))
    held, count = state.memory, len(g)
    if held is None:
        zeros, empty = np.zeros((count, memory, m)), np.empty((count, 2, m))
        held = mixing.Memory(zeros, zeros.copy(), empty, empty.copy(), np.zeros((count, 6)), np.empty((5, max(m, memory))))
    done = np.zeros(count, np.bool_) if state.done is None else state.done.reshape(-1).numpy()
    out = np.empty_like(g)
    levels.propose(tuning(gauge), held, a, b, f, g, g_next, step.eps, tau_a, tau_b, done, out)
    return torch.from_numpy(out).view(state.g.shape), held


def column_errors(step: Alternating, state: State, slope: float, norm: str, far: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """(*batch,) each: sum |b expm1 gap|, sum b and max |g| over atoms with weight, the gap being slope (g - g_next), at most `far`; or the
    first two of squares. None where torch takes them."""
    g, b = state.g, step.problem.b
    if g.shape != b.shape or not on_one_core(g):
        return None
    from ..compiled import levels

    squared = not norm.startswith("l1")
    found = [levels.column_errors(*z, slope, far, squared) for z in zip(_array(b), _array(g), _array(state.g_next), strict=True)]
    off, mass, top = torch.tensor(found, dtype=torch.float64).view(*b.shape[:-1], 3).unbind(-1)
    return off, mass, top


def along(z: Tensor, last: Tensor, factor: float) -> Tensor:
    """z + factor (z - last)."""
    if not on_one_core(z, last):
        return z + (z - last) * factor
    from ..compiled import levels

    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    levels.along(_array(z).reshape(-1), _array(last).reshape(-1), factor, out.numpy().reshape(-1))
    return out


def _array(z: Tensor) -> np.ndarray:
    """(B, n)."""
    return flatten(z.detach().resolve_neg()).numpy()
