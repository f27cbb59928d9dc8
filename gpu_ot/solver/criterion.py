"""When the iterations may end: rules that turn a state into an error, in a unit of their own, and the error that rounding alone makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import unknown
from ..penalties import translate
from ..vectors import expm1
from .step import Alternating, State

#: A sum of rounded numbers is off by a few of their last digits; below `ROUNDING` of them there is nothing to gain.
ROUNDING = 8.0
NORMS = ("l1", "l1_absolute", "l2", "l2_joint")


class Criterion(Protocol):
    tol: float

    def seen(self, step: Alternating, state: State) -> tuple[Tensor, Tensor]:
        """(f, g) as they are returned."""
        ...

    def error(self, step: Alternating, state: State, before: State, floor: Tensor) -> Tensor:
        """(*batch,): how far the state is from the end; `before` is the state when it was last checked, or one iteration earlier."""
        ...

    def next_error(self, step: Alternating, state: State) -> Tensor:
        """A lower bound of the error of the next iteration, which costs no sweep. Asked of pairwise criteria only."""
        ...

    def floor(self, step: Alternating, state: State, dtype: torch.dtype) -> Tensor:
        """(*batch,): the error that rounding to `dtype` makes."""
        ...

    def met(self, error: Tensor) -> Tensor: ...

    #: Whether `error` compares with one iteration earlier, so that a check takes an iteration of its own.
    pairwise: bool


@dataclass(frozen=True)
class Marginal:
    """The error of the column marginal; rows are exact.

    tol    in the unit of the norm.
    norm   "l1": L1 marginal error as a fraction of the mass (for relaxed marginals, its analogue);
           "l1_absolute": the same in units of mass;
           "l2": Euclidean norm, absolute, of each problem (POT's rule); "l2_joint": of the whole batch together.
    """

    tol: float = 1e-4
    norm: str = "l1"
    pairwise = False

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)

    def seen(self, step: Alternating, state: State) -> tuple[Tensor, Tensor]:
        return state.f, state.g

    def error(self, step: Alternating, state: State, before: State, floor: Tensor) -> Tensor:
        b = step.problem.b
        error = self._size(torch.where(b > 0, b * expm1(step.gap(state)), 0.0), b)
        # Exponents rounded to more than a tenth: no sum over them means anything, however small it comes out.
        return torch.where(floor > 0.1 * self._size(b, b), torch.maximum(error, floor), error)

    def next_error(self, step: Alternating, state: State) -> Tensor:
        raise NotImplementedError

    def floor(self, step: Alternating, state: State, dtype: torch.dtype) -> Tensor:
        """In the sums of the sweep, and in forming g / eps."""
        b, g = step.problem.b, state.g
        sums = ROUNDING * torch.finfo(dtype).eps
        differences = torch.finfo(g.dtype).eps * torch.where(b > 0, g.abs(), 0.0).amax(-1, keepdim=True) / step.eps
        return self._size(b * (sums + differences), b)

    def met(self, error: Tensor) -> Tensor:
        return error <= self.tol

    def _size(self, excess: Tensor, b: Tensor) -> Tensor:
        if self.norm == "l1":
            return excess.abs().sum(-1) / b.sum(-1)
        if self.norm == "l1_absolute":
            return excess.abs().sum(-1)
        if self.norm == "l2":
            return excess.square().sum(-1).sqrt()
        return excess.square().sum().sqrt().expand(b.shape[:-1])


@dataclass(frozen=True)
class Change:
    """POT's rule for relaxed marginals: u = exp(g / eps) and v = exp(f / eps) move by less than `tol` of their largest entry, or of 1.

    both_sides       the mean of the changes of u and v, rather than that of u alone.
    translate_after  beyond this iteration (f, g) are seen with the common constant that is best in the dual (`penalties.translate`).
    relative_after   beyond this iteration the change is relative to u and v themselves, on both sides: a u far below 1 never moves by
                     POT's rule.
    """

    tol: float = 1e-6
    both_sides: bool = True
    translate_after: float = math.inf
    relative_after: float = math.inf
    pairwise = True

    def seen(self, step: Alternating, state: State) -> tuple[Tensor, Tensor]:
        if state.n_iter and state.n_iter > self.translate_after:
            return translate(step.problem, state.f, state.g)
        return state.f, state.g

    def error(self, step: Alternating, state: State, before: State, floor: Tensor) -> Tensor:
        (f, g), (old_f, old_g), problem = self.seen(step, state), self.seen(step, before), step.problem
        relative = state.n_iter > self.relative_after
        change = _change(g, old_g, problem.b, step.eps, relative)
        if self.both_sides or relative:
            change = 0.5 * (change + _change(f, old_f, problem.a, step.eps, relative))
        return change.expand(problem.b.shape[:-1])

    def next_error(self, step: Alternating, state: State) -> Tensor:
        """A lower bound of the error of the next iteration, which costs no sweep: the change that g is about to make."""
        g, update = self.seen(step, state)[1], state.g_next - state.g
        if state.n_iter > self.translate_after:  # without its constant, which is settled otherwise: rather too small than too large
            update = update - (step.share * update).sum(-1, keepdim=True)
        return 0.5 * _change(g + update, g, step.problem.b, step.eps, state.n_iter > self.relative_after)

    def floor(self, step: Alternating, state: State, dtype: torch.dtype) -> Tensor:
        f, g = self.seen(step, state)
        size = torch.maximum(*(torch.where(z.isfinite(), z.abs(), 0.0).amax() for z in (f, g)))
        floor = ROUNDING * torch.finfo(dtype).eps + torch.finfo(f.dtype).eps * size / step.eps
        return floor.expand(step.problem.b.shape[:-1])

    def met(self, error: Tensor) -> Tensor:
        return error < self.tol if self.both_sides else error <= self.tol


def _change(new: Tensor, old: Tensor, w: Tensor, eps: float, relative: bool) -> Tensor:
    """max |u - u'| / max(u, u', 1), without the 1 when `relative`, over the atoms with mass, from logarithms: u itself may overflow."""
    new, old = (torch.where(w > 0, z / eps, -math.inf) for z in (new, old))
    top = torch.maximum(new.amax(), old.amax())
    top = top if relative else top.clamp(min=0.0)
    return ((new - top).exp() - (old - top).exp()).abs().amax()
