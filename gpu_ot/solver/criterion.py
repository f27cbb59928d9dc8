"""When the iterations may end: rules that turn a state into an error, in a unit of their own, and the error that rounding alone makes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import unknown
from ..penalties import translate
from ..vectors import expm1
from . import fused
from .step import Alternating, State

if TYPE_CHECKING:
    from .monitor import Monitor

#: A sum of rounded numbers is off by a few of their last digits; below `ROUNDING` of them there is nothing to gain.
ROUNDING = 8.0
#: An eps is resolved where rounding moves the marginals by less than this part of the mass.
RESOLVED = 1e-3
#: A relaxed column that is heavier than it should be by more than exp(FAR) is far off, however far: it may overflow on its way.
FAR = 40.0
NORMS = ("l1", "l1_absolute", "l2", "l2_joint")


def farthest(step: Alternating) -> float:
    """The largest gap that counts as such. Of a hard marginal there is none: potentials that overflow there have diverged."""
    return math.inf if step.problem.penalties[1].balanced else FAR


class Measured(NamedTuple):
    """A state as it is returned, (*batch, n) and (*batch, m), and its error and the error that rounding alone makes, (*batch,) each."""

    f: Tensor
    g: Tensor
    error: Tensor
    floor: Tensor


class Criterion(ABC):
    """A rule for stopping."""

    tol: float
    #: Whether the error must be below `tol`, rather than at most that.
    strict: bool = False
    #: Whether `measure` compares with one iteration earlier, so that a check takes an iteration of its own.
    pairwise: bool = False

    @property
    def threshold(self) -> float:
        """The error below which a run may end. A tolerance of 0 asks for every iteration: no error is below -inf."""
        return self.tol if self.tol > 0 else -math.inf

    @property
    def part_of_mass(self) -> float | None:
        """The tolerance, where it is an L1 error of the marginals as a part of the mass."""
        return None

    def stricter(self) -> Criterion:
        """Half of such a tolerance, which leaves the other half to the error of the sums."""
        return self

    def seen(self, step: Alternating, state: State) -> tuple[Tensor, Tensor]:
        """(f, g) as they are returned."""
        return state.f, state.g

    @abstractmethod
    def relative(self, step: Alternating, error: Tensor) -> Tensor:
        """Errors (*batch,) as parts of the mass, or of the scalings."""

    @abstractmethod
    def measure(self, step: Alternating, state: State, before: State, dtype: torch.dtype) -> Measured:
        """How far the state is from the end. `before` is the state at the last check, which is one iteration earlier for a pairwise
        criterion; `dtype` the type of the sweeps."""

    def check(self, monitor: Monitor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """What `Monitor` makes of a measurement, by a kernel; None where none does."""
        return None

    def next_error(self, step: Alternating, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a lower bound of the error of the next iteration, the floor), 0-d, at no sweep. Asked of pairwise criteria only."""
        raise NotImplementedError


@dataclass(frozen=True)
class Marginal(Criterion):
    """The error of the column marginal; rows are exact.

    tol    in the unit of the norm.
    norm   "l1": L1 marginal error as a fraction of the mass (for relaxed marginals, its analogue);
           "l1_absolute": the same in units of mass;
           "l2": Euclidean norm, absolute, of each problem (POT's rule); "l2_joint": of the whole batch together.
    """

    tol: float = 1e-4
    norm: str = "l1"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)

    @property
    def part_of_mass(self) -> float | None:
        return self.tol if self.norm == "l1" and self.tol > 0 else None

    def stricter(self) -> Marginal:
        return self if self.part_of_mass is None else replace(self, tol=self.tol / 2)

    def measure(self, step: Alternating, state: State, before: State, dtype: torch.dtype) -> Measured:
        """The floor: rounding in the sums of the sweep, and in forming g / eps."""
        b, g = step.problem.b, state.g
        rounding, digit = ROUNDING * torch.finfo(dtype).eps, torch.finfo(g.dtype).eps / step.eps
        slope = 1 / (step.part * step.eps)
        if self.norm != "l2_joint" and (found := fused.column_errors(step, state, slope, self.norm, farthest(step))):
            error, unit, top = found
            floor = rounding + digit * top
            floor = floor * unit if self.norm != "l2" else floor * unit.sqrt()
            if self.norm == "l1":
                error, floor, unit = error / unit, floor / unit, torch.ones_like(unit)
            elif self.norm == "l2":
                error, unit = error.sqrt(), unit.sqrt()
            return Measured(state.f, g, torch.where(floor > RESOLVED * unit, torch.maximum(error, floor), error), floor)
        excess = torch.where(b > 0, b * expm1(step.gap(state).clamp(max=farthest(step))), 0.0)
        differences = digit * torch.where(b > 0, g.abs(), 0.0).amax(-1, keepdim=True)
        error, floor, unit = self._sizes(torch.stack((excess, b * (rounding + differences), b.expand_as(excess))), b)
        # Exponents rounded to more than that: no sum over them means anything, however small it comes out.
        error = torch.where(floor > RESOLVED * unit, torch.maximum(error, floor), error)
        return Measured(state.f, g, error, floor)

    def relative(self, step: Alternating, error: Tensor) -> Tensor:
        return error / self._sizes(step.problem.b.unsqueeze(0), step.problem.b)[0]

    def check(self, monitor: Monitor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        if type(self) is not Marginal:
            return None
        slope = 1 / (monitor.step.part * monitor.step.eps)
        return fused.check(monitor, state, slope, self.norm, ROUNDING * torch.finfo(monitor.dtype).eps, farthest(monitor.step))

    def _sizes(self, z: Tensor, b: Tensor) -> Tensor:
        """The norms of several vectors, stacked in front."""
        if self.norm == "l1":
            return z.abs().sum(-1) / b.sum(-1)
        if self.norm == "l1_absolute":
            return z.abs().sum(-1)
        size = z.square().sum(-1)
        if self.norm == "l2_joint":
            size = size.view(len(z), -1).sum(-1).view(-1, *[1] * (z.ndim - 2)).expand(z.shape[:-1])
        return size.sqrt()


@dataclass(frozen=True)
class Change(Criterion):
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

    @property
    def strict(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.both_sides

    def seen(self, step: Alternating, state: State) -> tuple[Tensor, Tensor]:
        if state.n_iter and state.n_iter > self.translate_after:
            problem = step.problem
            return translate(problem.penalties, problem.eps, problem.a, problem.b, state.f, state.g)
        return state.f, state.g

    def measure(self, step: Alternating, state: State, before: State, dtype: torch.dtype) -> Measured:
        (f, g), (old_f, old_g), problem = self.seen(step, state), self.seen(step, before), step.problem
        relative = state.n_iter > self.relative_after
        change = _change(g, old_g, problem.b, step.eps, relative)
        if self.both_sides or relative:
            change = 0.5 * (change + _change(f, old_f, problem.a, step.eps, relative))
        each, floor = problem.b.shape[:-1], self.floor(step, f, g, dtype)
        change = torch.where(floor > RESOLVED, torch.maximum(change, floor), change)  # as of `Marginal`
        return Measured(f, g, change.expand(each), floor.expand(each))

    def relative(self, step: Alternating, error: Tensor) -> Tensor:
        return error

    def next_error(self, step: Alternating, state: State, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The change that g is about to make."""
        (f, g), update = self.seen(step, state), state.g_next - state.g
        if state.n_iter > self.translate_after:  # without its constant, which is settled otherwise: rather too small than too large
            update = update - (step.share * update).sum(-1, keepdim=True)
        change = 0.5 * _change(g + update, g, step.problem.b, step.eps, state.n_iter > self.relative_after)
        return change, self.floor(step, f, g, dtype)

    def floor(self, step: Alternating, f: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        """The change that rounding alone makes: in the sums of a sweep, and in forming f / eps."""
        size = torch.maximum(*(torch.where(z.isfinite(), z.abs(), 0.0).amax() for z in (f, g)))
        return ROUNDING * torch.finfo(dtype).eps + torch.finfo(f.dtype).eps * size / step.eps


def _change(new: Tensor, old: Tensor, w: Tensor, eps: float, relative: bool) -> Tensor:
    """max |u - u'| / max(u, u', 1), without the 1 when `relative`, over the atoms with mass, from logarithms: u itself may overflow."""
    new, old = (torch.where(w > 0, z / eps, -math.inf) for z in (new, old))
    top = torch.maximum(new.amax(), old.amax())
    top = top if relative else top.clamp(min=0.0)
    return ((new - top).exp() - (old - top).exp()).abs().amax()
