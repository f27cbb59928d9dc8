"""Blocks of iterations launched at once: a block that comes again and again becomes a CUDA graph.

A launch costs the host some microseconds whatever it does, a sweep over a few thousand points less, and a graph is one launch. Before the
first graph of a process counts on a device, its block runs both ways: where a bit differs, blocks are launched one by one, as before.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..geometry.products import serves_vectors
from ..geometry.protocol import Geometry
from .step import Alternating, State

#: So many equal blocks in a row are launched one by one: capturing costs the host about as much as launching, and short runs end before.
AFTER = 3

#: Devices whose graphs have given what launches give, and those whose graphs have not.
_proven: set[torch.device] = set()
_refused: set[torch.device] = set()
#: The last graph of each stream and thread. The next one shares its memory, which would otherwise grow with every solve.
_last = threading.local()


class Blocks:
    """Runs the blocks of one loop. `pairwise`: whether the loop compares states, so that none may be overwritten."""

    def __init__(self, geometry: Geometry, pairwise: bool) -> None:
        self.geometry, self.pairwise = geometry, pairwise
        self.kind: Any = None
        self.times, self.graph = 0, None

    def run(self, step: Alternating, state: State, k: int) -> State:
        """As `Geometry.run`. The state that a graph returns is overwritten by the next block."""
        kind = self._kind(step, state, k)
        if kind != self.kind:
            self.kind, self.times, self.graph = kind, 0, None
        self.times += 1
        if kind is None or (self.graph is None and (self.times <= AFTER or state.g.device in _refused)):
            return self.geometry.run(step, state, k)
        if self.graph is None:
            self.graph = Graph.of(self.geometry, step, state, k)
        if self.graph is None:
            return self.geometry.run(step, state, k)
        return self.graph.run(state)

    def _kind(self, step: Alternating, state: State, k: int) -> Any:
        """What makes two blocks the same launches; None for what is not to be captured."""
        if not state.g.is_cuda or self.pairwise or self.geometry.carried is None or not serves_vectors(state.f, state.g) or k < 2:
            return None
        if type(step) is not Alternating or transforms.active() or torch.cuda.is_current_stream_capturing():
            return None
        plain, fresh = step.plain_among(state, k), step.unproposed(state, k)
        if plain not in (0, k) or fresh != plain or state.inexact is not None:
            return None
        return id(step), k, plain, state.done is None, state.memory is None


class Graph:
    """A block of k iterations from `held` to `held`, its own state, of which `carried` is the geometry's part."""

    def __init__(self, held: State, carried: tuple[Tensor, ...], graph: Any, end: State) -> None:
        self.held, self.carried, self.graph = held, carried, graph
        self.k, self.sweeps, self.plain = end.n_iter - held.n_iter, end.n_sweeps - held.n_sweeps, end.plain

    @classmethod
    def of(cls, geometry: Geometry, step: Alternating, state: State, k: int) -> Graph | None:
        """The graph of k iterations from this state; None where it cannot be had, and the state is untouched."""
        device, before, held = state.g.device, geometry.carried, _copy(state)
        assert before is not None
        geometry.carry(carried := tuple(z.clone() for z in before))
        current, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
        key = device, current.cuda_stream
        kept = vars(_last).get("graphs", {})
        aside = torch.cuda.Stream(device)
        aside.wait_stream(current)
        try:
            with torch.cuda.device(device), torch.cuda.stream(aside):
                graph.capture_begin(kept[key].pool() if key in kept else None, capture_error_mode="thread_local")
                try:
                    end = geometry.run(step, held, k)
                    for old, new in zip((*_moving(held), *carried), (*_moving(end), *(geometry.carried or ())), strict=True):
                        old.copy_(new)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            _refused.add(device)
            warnings.warn(f"blocks of iterations cannot be captured on {device}, and are launched one by one: {error}", stacklevel=2)
            geometry.carry(before)
            return None
        current.wait_stream(aside)
        vars(_last).setdefault("graphs", {})[key] = graph
        found = cls(held, carried, graph, end)
        if device not in _proven and not found._proves_itself(geometry, step, state, k, before):
            _refused.add(device)
            warnings.warn(f"a captured block differs from its launches on {device}: blocks are launched one by one.", stacklevel=2)
            geometry.carry(before)
            return None
        geometry.carry(carried)
        return found

    def run(self, state: State) -> State:
        held = self.held
        if state.g is not held.g:
            for old, new in zip(_moving(held), _moving(state), strict=True):
                old.copy_(new)
        if held.done is not None and state.done is not None:
            held.done.copy_(state.done)
        self.graph.replay()
        return replace(
            state, f=held.f, g=held.g, g_next=held.g_next, memory=held.memory, n_iter=state.n_iter + self.k, age=state.age + self.k,
            n_sweeps=state.n_sweeps + self.sweeps, plain=self.plain,
        )  # fmt: skip

    def _proves_itself(self, geometry: Geometry, step: Alternating, state: State, k: int, before: tuple[Tensor, ...]) -> bool:
        """Whether a replay gives the bits that launches give. Both begin at copies: all is then as it was."""
        ours, start = self.held, _copy(state)
        geometry.carry(before)
        launched = geometry.run(step, start, k)
        there = [z.clone() for z in (*_buffers(ours), *_moving(ours), *self.carried)]
        self.graph.replay()
        ended = (*_moving(launched), *_buffers(launched), *(geometry.carried or ()))
        same = all(torch.equal(z, w) for z, w in zip((*_moving(ours), *_buffers(ours), *self.carried), ended, strict=True))
        for z, w in zip((*_buffers(ours), *_moving(ours), *self.carried), there, strict=True):
            z.copy_(w)
        if same:
            _proven.add(state.g.device)
        return same


def _moving(state: State) -> tuple[Tensor, Tensor, Tensor]:
    return state.f, state.g, state.g_next


def _buffers(state: State) -> list[Tensor]:
    """What kernels remember of a state, which they write in place."""
    return [] if state.memory is None else [z for z in vars(state.memory).values() if isinstance(z, Tensor)]


def _copy(state: State) -> State:
    """In memory of its own."""
    memory = state.memory
    if memory is not None:
        memory = replace(memory, **{name: z.clone() for name, z in vars(memory).items() if isinstance(z, Tensor)})
    done = None if state.done is None else state.done.clone()
    return replace(state, f=state.f.clone(), g=state.g.clone(), g_next=state.g_next.clone(), memory=memory, done=done)
