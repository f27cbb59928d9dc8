"""Where the next iterate is looked for: at Sinkhorn's own update, or further along what the last updates have shown.

One iteration maps g to `fresh`. Its derivative at the solution, diag(1/b) P^T diag(1/a) P for hard marginals, is self-adjoint in the
inner product weighted by b, so what works for symmetric linear systems works here. Everything is a tensor operation on the batch:
problems decide each for itself, and nothing waits for the device. O(m) numbers a remembered step, no pass over the costs.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .problem import Problem
from .vectors import expm1


class Accelerator(Protocol):
    def next(self, g: Tensor, fresh: Tensor) -> Tensor:
        """The g to try next, given that an iteration led from g to `fresh`."""
        ...

    def restart(self) -> None:
        """Forget the past: eps has changed, or the iterate was replaced."""
        ...


class Plain:
    """Sinkhorn's own step."""

    def next(self, g: Tensor, fresh: Tensor) -> Tensor:
        return fresh

    def restart(self) -> None:
        pass


class Relaxed:
    """Over-relaxation by the factor omega = 2 / (1 + sqrt(1 - r)) for an observed contraction r an iteration.

    Relaxing both half-steps by omega is, once f is eliminated, the same as momentum in g: a step of omega^2 along the update and
    (omega - 1)^2 of the step before. Where the update grows, plain steps follow until the rate is known again.
    Thibault et al. 2017, arXiv:1711.01851; Lehmann et al. 2020, arXiv:2012.12562 (the factor).
    """

    #: Updates whose rate is averaged; the factor is kept from the largest ones, where a rounding error would end the contraction.
    OBSERVED, LARGEST = 4, 1.97

    def __init__(self, problem: Problem, eps: float) -> None:
        self.b = problem.b / problem.b.sum(-1, keepdim=True)
        self.restart()

    def restart(self) -> None:
        self.sizes: list[Tensor] = []
        self.omega: Tensor | None = None
        self.before: Tensor | None = None

    def next(self, g: Tensor, fresh: Tensor) -> Tensor:
        step = torch.where(self.b > 0, fresh - g, 0.0)
        step = step - (self.b * step).sum(-1, keepdim=True)
        self.sizes.append((self.b * step.square()).sum(-1, keepdim=True).sqrt())
        if self.omega is None or self.before is None:
            self.before = g
            if len(self.sizes) > self.OBSERVED:
                rate = (self.sizes[-1] / self.sizes[0]).pow(1 / self.OBSERVED).nan_to_num(nan=0.0).clamp(0, 1)
                self.omega = (2 / (1 + (1 - rate).sqrt())).clamp(max=self.LARGEST)
                self.sizes = self.sizes[-1:]
            return fresh
        grown = self.sizes[-1] > self.sizes[0]
        omega = self.omega
        moved = g + omega.square() * step + (omega - 1).square() * (g - self.before)
        self.before = g
        # A factor that is too large makes the updates swing instead of shrink: back to half the relaxation.
        self.omega = torch.where(grown, 1 + (omega - 1) / 2, omega)
        self.sizes = [torch.minimum(self.sizes[0], self.sizes[-1]) if len(self.sizes) < 3 * self.OBSERVED else self.sizes[-1]]
        return torch.where(grown | (self.b == 0), fresh, moved)


class _Trial(NamedTuple):
    """A step that was proposed and not yet judged; (*batch, m) and (*batch, 1)."""

    g: Tensor  # where it began
    step: Tensor
    ascent: Tensor  # the dual's slope along it, where it began; inf for a plain step
    predicted: Tensor  # the size that the model gave the next update
    size: Tensor  # of the update where it began
    cap: Tensor


class Mixing:
    """Anderson mixing over orthogonal differences, each step held to the slope of the dual.

    The last `memory` changes of the update are kept orthogonal in the inner product of b, each beside the change of g that made it;
    the next g is where their linear model has the smallest update. For a self-adjoint map a memory of 3 then sees as far as
    all history would (Tang et al. 2024, arXiv:2403.14961).

    The dual is concave in g with derivative `excess` = b - P^T 1, so along a step its slope tells progress from overshoot, without a
    value and whatever the rounding: a step past the top by more than the slope it started with is shortened by regula falsi, and
    the past is forgotten. (For relaxed marginals `excess` is that derivative up to positive factors: the same zeros.) A step of
    more than `cap` updates is not tried at once: where masses must travel far, updates hardly change and the model would
    jump out of sight; the cap follows the steps that held.
    """

    #: A slope that turned by less than this part of what it was is taken for arrival.
    TURN = 0.9
    #: Largest step to begin with, and how fast the cap follows: in units of the plain step.
    CAP, FOLLOW = 8.0, 4.0
    #: Least and largest part of an overshooting step that is tried next.
    SHORT, LONG = 0.1, 0.5
    #: A difference with less than this (squared) part of its own direction left after orthogonalisation is rounding.
    NOTHING_NEW = 1e-12

    def __init__(self, problem: Problem, eps: float, memory: int = 3) -> None:
        self.b, self.eps, self.memory = problem.b, eps, memory
        self.share = problem.b / problem.b.sum(-1, keepdim=True)
        self.gauge = all(penalty.balanced for penalty in problem.penalties)  # f + c, g - c is the same plan
        self.restart()

    def restart(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (change of the update, of unit size; the change of g behind it)
        self.last: tuple[Tensor, Tensor] | None = None  # (g, update)
        self.trial: _Trial | None = None

    def next(self, g: Tensor, fresh: Tensor) -> Tensor:
        gap = torch.where(self.b > 0, fresh - g, 0.0)
        excess = -self.b * expm1((-gap / self.eps).clamp(max=80.0))
        update = gap - self._dot(gap, torch.ones_like(gap)) if self.gauge else gap
        size = self._size(update)

        trial = self.trial
        overshot = stale = torch.zeros_like(size, dtype=torch.bool)
        if trial is not None:
            slope = (excess * trial.step).sum(-1, keepdim=True)
            overshot = ~(slope >= -self.TURN * trial.ascent)
            stale = size > trial.predicted
            shrink = (trial.ascent / (trial.ascent - slope)).nan_to_num(nan=0.0).clamp(self.SHORT, self.LONG)
            grown = torch.maximum(trial.cap, self.FOLLOW * self._size(trial.step) / trial.size.clamp(min=1e-300))
            trial = trial._replace(cap=torch.where(overshot, (trial.cap * shrink).clamp(min=2.0), grown))

        self._remember(g, update, overshot, stale)
        step, predicted = update, update
        mixed = torch.zeros_like(overshot)
        for change, move in self.pairs:
            along = self._dot(update, change)
            step, predicted = step - along * (move + change), predicted - along * change
            mixed = mixed | (self._size(change) > 0)
        cap = torch.full_like(size, self.CAP) if trial is None else trial.cap
        limit = cap * size / self._size(step).clamp(min=1e-300)
        step = torch.where(limit < 1, step * limit, step)
        ascent = (excess * step).sum(-1, keepdim=True)
        ahead = mixed & (ascent > 0)
        self.pairs = [(torch.where(mixed & ~ahead, 0.0, change), torch.where(mixed & ~ahead, 0.0, move)) for change, move in self.pairs]
        # A plain step is never called an overshoot: Sinkhorn's own iterations cannot make the marginals worse.
        found = _Trial(
            g,
            torch.where(ahead, step, update),
            torch.where(ahead, ascent, math.inf),
            torch.where(ahead & (limit >= 1), self._size(predicted), math.inf),
            size,
            cap,
        )
        if trial is not None:
            held = (trial.g, shrink * trial.step, shrink * trial.ascent, torch.full_like(size, math.inf), trial.size, trial.cap)
            found = _Trial(*(torch.where(overshot, old, new) for old, new in zip(held, found, strict=True)))
            g = found.g
        self.trial = found
        return torch.where(self.b > 0, g + found.step, fresh)  # an empty atom only follows

    def _remember(self, g: Tensor, update: Tensor, overshot: Tensor, stale: Tensor) -> None:
        """Adds what the last step has shown; where it overshot nothing yet, where the model was wrong nothing at all."""
        forget = overshot | stale
        self.pairs = [(torch.where(forget, 0.0, change), torch.where(forget, 0.0, move)) for change, move in self.pairs]
        if self.last is not None:
            before, was = self.last
            change, move = update - was, g - before
            whole = self._dot(change, change)
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                for other, moved in self.pairs:
                    along = self._dot(change, other)
                    change, move = change - along * other, move - along * moved
            left = self._dot(change, change)
            unit = torch.where((left > self.NOTHING_NEW * whole) & ~forget, left.rsqrt(), 0.0).nan_to_num(nan=0.0, posinf=0.0)
            self.pairs = [*self.pairs, (torch.where(unit > 0, change * unit, 0.0), torch.where(unit > 0, move * unit, 0.0))][-self.memory :]
            g, update = torch.where(overshot, before, g), torch.where(overshot, was, update)
        self.last = g, update

    def _dot(self, p: Tensor, q: Tensor) -> Tensor:
        """(*batch, 1): the inner product in which the map is self-adjoint."""
        return (self.share * p * q).sum(-1, keepdim=True)

    def _size(self, p: Tensor) -> Tensor:
        return self._dot(p, p).sqrt()
