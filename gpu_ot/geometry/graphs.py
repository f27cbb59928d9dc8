"""What is launched again and again becomes a CUDA graph: one launch instead of tens.

A launch costs the host some microseconds whatever it does, which is more than a sweep over a few thousand points takes. A graph is made of
functions from tensors to tensors: it begins with a copy of what it is given, and ends with one of what it found, so nobody ever sees
its own memory. Before the first graph of a process counts on a device, it has to give the bits that its launches give; where it does
not, or where graphs are refused, all goes on launch by launch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import transforms

#: So many equal calls in a row are launched one by one: capturing costs the host about as much as launching, and short runs end before.
AFTER = 3

Work = Callable[..., tuple[Tensor, ...]]

#: Devices whose graphs have given what launches give, and those whose graphs have not.
_proven: set[torch.device] = set()
_refused: set[torch.device] = set()
#: The last graph of each stream, in each thread. The next one shares its memory, which would otherwise grow with every solve.
_last = threading.local()


class Repeated:
    """Calls that are the same launches while their kind is the same, whatever the numbers."""

    def __init__(self) -> None:
        self.kind: Any = None
        self.times, self.graph = 0, None

    def __call__(self, kind: Any, work: Work, *given: Tensor) -> tuple[Tensor, ...]:
        """work(*given). The work may write to what it is given, which is then worth nothing."""
        if not given[0].is_cuda or torch.is_grad_enabled() or transforms.active() or torch.cuda.is_current_stream_capturing():
            return work(*given)
        if kind != self.kind:
            self.kind, self.times, self.graph = kind, 0, None
        self.times += 1
        if self.graph is not None:
            return self.graph(*given)
        if self.times <= AFTER or given[0].device in _refused:
            return work(*given)
        found = work(*_copies(given))  # in memory as the graph's, for which Triton may compile other code
        self.graph = _Graph.of(work, given, found)
        return found


class _Graph:
    """Work captured, from tensors `held` to `found`."""

    def __init__(self, graph: Any, held: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
        self.graph, self.held, self.found = graph, held, found

    @classmethod
    def of(cls, work: Work, given: tuple[Tensor, ...], launched: tuple[Tensor, ...]) -> _Graph | None:
        """The graph of work that gives `launched`; None where it cannot be had, which is said once for a device."""
        device, held = given[0].device, _copies(given)
        current, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        kept, key = vars(_last).setdefault("graphs", {}), (device, current.cuda_stream)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(current)
        try:
            with torch.cuda.device(device), torch.cuda.stream(aside):
                graph.capture_begin(kept[key].pool() if key in kept else None, capture_error_mode="thread_local")
                try:
                    found = work(*held)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            return _refuse(device, f"cannot be captured: {error}")
        current.wait_stream(aside)
        kept[key] = graph
        made = cls(graph, held, found)
        if device not in _proven:
            same = [(_bits(z) == _bits(w)).all() for z, w in zip(made(*given), launched, strict=True)]
            if not torch.stack(same).all().item():
                return _refuse(device, "give other numbers when they are captured")
            _proven.add(device)
        return made

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        _copy(self.held, given)
        self.graph.replay()
        return _copies(self.found)


def _refuse(device: torch.device, why: str) -> None:
    _refused.add(device)
    warnings.warn(f"iterations on {device} {why}. They are launched one by one.", stacklevel=2)


def _bits(z: Tensor) -> Tensor:
    """Whole numbers, since NaN is not equal to itself."""
    return z.view({1: torch.uint8, 4: torch.int32, 8: torch.int64}[z.itemsize])


def _copies(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = tuple(torch.empty_like(z) for z in given)
    _copy(out, given)
    return out


def _copy(to: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
    """One launch for each type of numbers."""
    for dtype in {z.dtype for z in given}:
        pairs = [(w, z) for w, z in zip(to, given, strict=True) if z.dtype == dtype]
        torch._foreach_copy_([w for w, _ in pairs], [z for _, z in pairs])  # pyright: ignore[reportPrivateImportUsage]


class Same:
    """Equal to itself alone, and kept alive as long as somebody compares with it."""

    def __init__(self, *things: Any) -> None:
        self.things = things

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and all(z is w for z, w in zip(self.things, other.things, strict=True))

    __hash__ = None  # type: ignore[assignment]


def block(
    repeated: Repeated, kind: Any, run: Callable[[Any, Any, int], Any], step: Any, state: Any, k: int, carried: tuple[Any, ...] = ()
) -> Any:
    """run(step, state, k), k iterations of two sweeps each, that are plain or accelerated from what is remembered in fixed buffers.

    carried  objects whose attribute `last`, a tensor, passes from one block to the next.
    """
    plain = step.plain_among(state, k)
    memory: Any = state.memory
    remembered = [] if plain or memory is None else [name for name, z in vars(memory).items() if isinstance(z, Tensor)]
    if k < 2 or plain not in (0, k) or (not plain and (not remembered or step.unproposed(state, k) != 0)):
        return run(step, state, k)
    moving = [name for name in ("f", "g", "g_next", "inexact") if getattr(state, name) is not None]
    held = [] if state.done is None else [state.done]

    def work(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        start = replace(state, **{name: next(rest) for name in moving})
        if remembered:
            start = replace(start, memory=replace(memory, **{name: next(rest) for name in remembered}))
        for each in carried:
            each.last = next(rest)
        if held:
            start = replace(start, done=next(rest))
        end = run(step, start, k)
        kept = [getattr(end.memory, name) for name in remembered]
        return *(getattr(end, name) for name in moving), *kept, *(each.last for each in carried)

    given = *(getattr(state, name) for name in moving), *(getattr(memory, name) for name in remembered), *(each.last for each in carried)
    kind = Same(step), k, plain, len(held), moving, remembered, kind
    found = iter(repeated(kind, work, *given, *held))
    end = replace(state, **{name: next(found) for name in moving})
    memory = replace(memory, **{name: next(found) for name in remembered}) if remembered else None  # pyright: ignore[reportArgumentType]
    for each in carried:
        each.last = next(found)
    return replace(
        end, memory=memory, n_iter=state.n_iter + k, age=state.age + k, n_sweeps=state.n_sweeps + 2 * k, plain=plain == k
    )  # fmt: skip
