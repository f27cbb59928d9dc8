"""Iterations that may be inexact, where the host would have to wait to learn whether they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..vectors import to_host
from . import graphs
from .protocol import Geometry

#: After this many exact iterations, stop waiting for the exactness check.
SURE = 16


class Trusting(Geometry):
    """A backend that runs an iteration in a fast way, whose sums tell afterwards whether it was exact.

    Where the host would wait for the device to learn that, accelerated iterations go on without knowing once they have been exact SURE
    times: an inexact one marks the state on the device (`State.inexact`), which then stays where it was, and a later block starts from
    there the slow way: the host reads the answer of a block when the next has been launched.
    """

    #: Treat this device as one whose numbers the host must wait for, as a GPU's: for tests.
    waits = False

    def __init__(self) -> None:
        self._told: list[Callable[[], list[Any]]] = []  # whether the last blocks were inexact, on their way to the host
        self.repeated = graphs.Repeated()

    def _waited_for(self, z: Tensor) -> bool:
        return self.waits or z.device.type != "cpu"

    def _trusts(self, eps: float) -> bool:
        """Whether iterations at eps have been exact for so long that nobody need wait for the answer."""
        raise NotImplementedError

    def _held(self, problem: Problem, g: Tensor, eps: float, inexact: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, g_next, inexact): a fast iteration, which moves nothing where its sums are not exact, and says so in the last."""
        raise NotImplementedError

    def _same(self, step: Any, state: Any) -> Any:
        """What makes the next blocks the same launches as this one; None where the host looks at numbers meanwhile."""
        return None

    def _distrust(self) -> None:
        """An iteration that was trusted was not exact."""
        raise NotImplementedError

    def run(self, step: Any, state: Any, k: int) -> Any:
        if not self._waited_for(state.g) or step.one_sided or step.plain_among(state, k) or torch.is_grad_enabled():
            return super().run(step, state, k)
        # The answer of the block before the last has arrived; an inexact state stays where it is until it has.
        if len(self._told) > 1 and self._told.pop(0)()[0]:
            self._distrust()
            self._told.clear()
            state = replace(state, memory=None, inexact=None)  # the accelerator has seen updates of 0
        same = self._same(step, state)
        state = self._advance(step, state, k) if same is None else graphs.block(self.repeated, same, self._advance, step, state, k)
        if state.inexact is not None:
            self._told.append(to_host(state.inexact.view(1)))
        return self.counted(state)

    def _advance(self, step: Any, state: Any, k: int) -> Any:
        waiting = _Unchecked(self, state.inexact)
        for _ in range(k):
            state = step.advance(waiting if state.n_iter and self._trusts(step.eps) else self, state)
            state = replace(state, inexact=waiting.inexact)
        return state


class _Unchecked:
    """Single iterations that nobody waits for."""

    def __init__(self, geometry: Trusting, inexact: Tensor | None = None) -> None:
        self.geometry, self.inexact = geometry, inexact

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        assert k == 1
        f, g, g_next, self.inexact = self.geometry._held(problem, g, eps, self.inexact)
        return f, g, g_next
