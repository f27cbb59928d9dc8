"""What one iteration does to vectors: which g it starts from, the two updates in their order, and where that leaves the state.

A step is a value. Its accelerator says which g comes next, and its class in which order the sides are updated:

    Alternating   f is the update of g, g_next the update of f: Sinkhorn's iteration. The rows of the plan (f, g) are exact.
                  Columns last is the same step on the transposed problem, see `gpu_ot.solve.find`.
    Annealing     the same at an eps on the way to the target, with a prediction for the next eps.
    Symmetric     both sides are one: a softmin, and half of the way to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..geometry.protocol import Geometry, weigh
from ..penalties import best_shift
from ..problem import Problem
from . import fused
from .acceleration import PLAIN, Accelerator, Anderson, Plain


@dataclass(frozen=True)
class State:
    """Where the iterations stand: f is the update of g, and g_next the update of f.

    f, g, g_next  (*batch, n), (*batch, m), (*batch, m), in units of the cost.
    memory        what the accelerator remembers; None at first.
    done          (*batch,) problems that met the tolerance, which stay where they are.
    inexact       0-d bool on the device, or None for never: this state is void, since a product was not exact (`Absorbed`).
    n_iter        iterations so far; `age` of them since the iterate was last put somewhere else.
    plain         whether the last iterations were plain ones.
    n_sweeps      visits to all pairs so far.
    """

    f: Tensor
    g: Tensor
    g_next: Tensor
    memory: Any = None
    done: Tensor | None = None
    inexact: Tensor | None = None
    n_iter: int = 0
    age: int = 0
    n_sweeps: int = 0
    plain: bool = False


class Start(NamedTuple):
    """Row potentials f (*batch, n) to start from, the weights that belong to them, and g (*batch, m) if somebody compares with it."""

    f: Tensor
    weight: Tensor
    g: Tensor | None = None

    def numbers(self) -> Start:
        """Without what autograd or torch.func knows of them."""
        if not transforms.active():
            return Start(self.f.detach(), self.weight.detach(), self.g if self.g is None else self.g.detach())
        f, weight, g = (z if z is None else transforms.numbers(z).detach() for z in self)
        return Start(f, weight, g)  # pyright: ignore[reportArgumentType]


def scaled(rows: Tensor) -> Start:
    """From f + eps log a = eps log u (*batch, n): for conventions that have u where ours has f."""
    return Start(rows, torch.ones_like(rows))


@dataclass(frozen=True)
class Alternating:
    """Sinkhorn's iteration at one eps, rows last.

    plain_until   iterations that are plain before the accelerator is asked.
    """

    problem: Problem
    eps: float
    accelerator: Accelerator = PLAIN
    plain_until: int = 0

    #: Whether an iteration is a single sweep.
    one_sided = False
    #: What part of the way to the update an iteration goes: g_next - g is this part of it.
    part = 1.0

    def begin(self, geometry: Geometry, start: Start, state: State | None) -> State:
        """The state before the first iteration, or, given one, before the first of a new beginning."""
        new = self.start(geometry, start)
        if state is None:
            return new
        return replace(new, done=state.done, n_iter=state.n_iter, n_sweeps=state.n_sweeps + new.n_sweeps)

    def start(self, geometry: Geometry, start: Start) -> State:
        """The column update of the start: one sweep."""
        g_next = self.problem.penalties[1].damp(geometry.first(start.f, start.weight, self.eps), self.eps)
        return State(start.f, g_next if start.g is None else start.g, g_next, n_sweeps=1)

    @cached_property
    def share(self) -> Tensor:
        """(*batch, m): b as fractions of the mass."""
        return self.problem.b / self.problem.b.sum(-1, keepdim=True)

    def plain_among(self, state: State, k: int) -> int:
        """How many of the next k iterations are plain ones, which a backend may run in its own way."""
        if isinstance(self.accelerator, Plain):
            return k
        return max(0, min(k, self.plain_until - state.n_iter))

    def unproposed(self, state: State, k: int) -> int | None:
        """How many of the next k iterations start from g_next, before Anderson's mixing proposes the others; None for other rules."""
        if type(self) is not Alternating or type(self.accelerator) not in (Plain, Anderson):
            return None
        if isinstance(self.accelerator, Plain):
            return k
        return min(k, max(int(state.age == 0), self.plain_until + 1 - state.n_iter, 0))

    def propose(self, state: State) -> tuple[Tensor, Any]:
        """The g of the next iteration, and the accelerator's memory."""
        if state.age == 0 or self.plain_among(state, 1) or state.n_iter == self.plain_until:
            return state.g_next, None
        problem, accelerator = self.problem, self.accelerator
        if type(accelerator) is Anderson and (found := fused.propose(self, state, accelerator.gauge, accelerator.memory)):
            return found
        target = state.g_next - best_shift(problem.penalties, problem.a, problem.b, state.f, state.g_next)
        g, memory = accelerator.next(self, state.memory, state.g, target)
        return _hold(state, g), memory

    def advance(self, geometry: Geometry, state: State, k: int = 1) -> State:
        """An iteration from the g that the accelerator proposes, and k - 1 plain ones."""
        return self.moved(geometry, state, *self.propose(state), k)

    def moved(self, geometry: Geometry, state: State, g: Tensor, memory: Any, k: int, plain: bool = False) -> State:
        """k iterations without acceleration from g, which an accelerator may have proposed."""
        f, g, g_next = geometry.iterate(self.problem, g, self.eps, k)
        return State(f, g, g_next, memory, state.done, state.inexact, state.n_iter + k, state.age + k, state.n_sweeps + 2 * k, plain)

    def gap(self, state: State) -> Tensor:
        """(*batch, m): b expm1(gap) is the excess of the column marginal, exactly so where it is a hard constraint."""
        return (state.g - state.g_next) / self.eps

    def at(self, eps: float, following: float, predict: bool) -> Annealing:
        """The step at an eps on the way, before that at `following`."""
        return Annealing(self.problem, eps, target=self.eps, following=following, predict=predict)


@dataclass(frozen=True)
class Annealing(Alternating):
    """A plain iteration at an eps above the target.

    The solution is a smooth function of eps: continued to the next eps along a straight line through the last two, the potentials
    arrive with a third of the error (measured, bench/FACTS.md).

    target      the eps of the problem, and `following` the next one.
    predict     whether to continue along the line.
    """

    target: float = 0.0
    following: float = 0.0
    predict: bool = True

    def start(self, geometry: Geometry, start: Start) -> State:
        h = weigh(start.f, start.weight, self.target)  # weights count as they do in the end
        return super().start(geometry, Start(h, torch.ones_like(h), start.g))

    def plain_among(self, state: State, k: int) -> int:
        return 0

    def propose(self, state: State) -> tuple[Tensor, Any]:
        return state.g_next, state.memory

    def advance(self, geometry: Geometry, state: State, k: int = 1) -> State:
        found = super().advance(geometry, state, k)
        if not self.predict:
            return found
        before, g_next = state.memory, found.g_next
        if before is not None:
            last_eps, last = before
            g_next = fused.along(g_next, last, (self.following - self.eps) / (self.eps - last_eps))
        return replace(found, g_next=g_next, memory=(self.eps, found.g_next))


@dataclass(frozen=True)
class Symmetric(Alternating):
    """A measure moved onto itself: f with f = T(f), T(f) = damp(softmin(f + eps log a)), for both sides.

    Both sides move at once, halfway: f <- (f + T(f)) / 2, Feydy et al. 2019, arXiv:1810.08278, section 3.1. The derivative,
    1/2 (1 - diag(1/a) P) for hard marginals, lies in [0, 1/2] wherever exp(-C / eps) is positive definite: a sweep gains a factor of 2 at
    worst, whatever eps. Alternating updates would take two sweeps and bring (f, g) near f = g as slowly as two different clouds. Mixing
    these updates halves the sweeps again (measured: 3 to 10 to an error of 1e-6, where halving alone takes up to 20).
    """

    one_sided = True
    part = 0.5

    def start(self, geometry: Geometry, start: Start) -> State:
        f = self.problem.penalties[0].damp(start.f, self.eps)
        return State(f, f, f)

    def plain_among(self, state: State, k: int) -> int:
        return 0

    def advance(self, geometry: Geometry, state: State, k: int = 1) -> State:
        g, memory = self.mixed(state) if state.n_iter else (state.g, None)
        a = self.problem.a
        # A backend may prepare itself with the first sweep, which is the transpose's: the same for a symmetric cost.
        s = geometry.update(g, a, self.eps) if state.n_iter else geometry.first(g, a, self.eps)
        halfway = (g + self.problem.penalties[0].damp(s, self.eps)) / 2
        return State(g, g, halfway, memory, state.done, None, state.n_iter + 1, state.age + 1, state.n_sweeps + 1)

    def gap(self, state: State) -> Tensor:
        return 2 * (state.g - state.g_next) / self.eps

    def mixed(self, state: State) -> tuple[Tensor, Any]:
        accelerator = self.accelerator
        if type(accelerator) is Anderson and (found := fused.propose(self, state, accelerator.gauge, accelerator.memory, False)):
            return found
        g, memory = accelerator.next(self, state.memory, state.g, state.g_next)
        return _hold(state, g), memory


def _hold(state: State, g: Tensor) -> Tensor:
    """g, and where it was for problems that are done and states that are void."""
    if state.done is None:
        return g if state.inexact is None else torch.where(state.inexact, state.g, g)
    hold = state.done.unsqueeze(-1) if state.inexact is None else state.done.unsqueeze(-1) | state.inexact
    return torch.where(hold, state.g, g)
