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

from ..problem import Problem
from ..vectors import expm1


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
    #: A difference with less than this part of itself left after orthogonalisation is rounding.
    NOTHING_NEW = 1e-6

    def __init__(self, problem: Problem, eps: float, memory: int = 3) -> None:
        self.b, self.eps, self.memory = problem.b, eps, memory
        self.share = problem.b / problem.b.sum(-1, keepdim=True)
        self.tiny = torch.finfo(problem.b.dtype).tiny
        self.gauge = all(penalty.balanced for penalty in problem.penalties)  # f + c, g - c is the same plan
        self.restart()

    def restart(self) -> None:
        # (*batch, memory, m): changes of the update, orthonormal or zero, and the changes of g behind them.
        self.changes = self.b.new_zeros(*self.b.shape[:-1], self.memory, self.b.shape[-1])
        self.moves = self.changes
        self.last: tuple[Tensor, Tensor] | None = None  # (g, update)
        self.trial: _Trial | None = None

    def next(self, g: Tensor, fresh: Tensor) -> Tensor:
        gap = torch.where(self.b > 0, fresh - g, 0.0)
        excess = -self.b * expm1((-gap / self.eps).clamp(max=80.0))
        update = gap - (self.share * gap).sum(-1, keepdim=True) if self.gauge else gap
        size = self._size(update)

        none = torch.zeros_like(size, dtype=torch.bool)
        held, overshot, stale = (None, none, none) if self.trial is None else self._judge(self.trial, excess, size)
        self._remember(g, update, overshot, stale)
        along = self._along(update)
        left = update - _sum(along, self.changes)
        step = left - _sum(along, self.moves)
        cap = torch.full_like(size, self.CAP) if held is None else held.cap
        limit = cap * size / self._size(step).clamp(min=self.tiny)
        step = torch.where(limit < 1, step * limit, step)
        ascent = (excess * step).sum(-1, keepdim=True)
        # A plain step is never called an overshoot: Sinkhorn's own iterations cannot make the marginals worse.
        mixed, uphill = (along != 0).any(-2), ascent > 0
        plain = ~(mixed & uphill)
        self._forget(mixed & ~uphill)
        found = _Trial(
            g,
            torch.where(plain, update, step),
            torch.where(plain, math.inf, ascent),
            torch.where(plain | (limit < 1), math.inf, self._size(left)),
            size,
            cap,
        )
        if held is not None:
            found = _Trial(*(torch.where(overshot, old, new) for old, new in zip(held, found, strict=True)))
        self.trial = found
        return torch.where(self.b > 0, found.g + found.step, fresh)  # an empty atom only follows

    def _judge(self, trial: _Trial, excess: Tensor, size: Tensor) -> tuple[_Trial, Tensor, Tensor]:
        """The trial, shortened where it overshot and with the cap that its outcome allows; where it did; where the model was wrong."""
        slope = (excess * trial.step).sum(-1, keepdim=True)
        overshot = ~(slope >= -self.TURN * trial.ascent)  # NaN overshot
        shrink = (trial.ascent / (trial.ascent - slope)).nan_to_num(nan=0.0).clamp(self.SHORT, self.LONG)
        reached = self.FOLLOW * self._size(trial.step) / trial.size.clamp(min=self.tiny)
        cap = torch.where(overshot, (trial.cap * shrink).clamp(min=2.0), torch.maximum(trial.cap, reached))
        held = _Trial(trial.g, shrink * trial.step, shrink * trial.ascent, torch.full_like(size, math.inf), trial.size, cap)
        return held, overshot, size > trial.predicted

    def _remember(self, g: Tensor, update: Tensor, overshot: Tensor, stale: Tensor) -> None:
        """Adds what the last step has shown; where it overshot nothing yet, where the model was wrong nothing at all."""
        if self.last is None:
            self.last = g, update
            return
        before, was = self.last
        forget = overshot | stale
        self._forget(forget)
        changes, moves = self.changes, self.moves
        change, move = update - was, g - before
        whole = self._size(change)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            along = self._along(change)
            change, move = change - _sum(along, changes), move - _sum(along, moves)
        new = self._size(change)
        fit = (new > self.NOTHING_NEW * whole) & ~forget  # False for NaN
        change, move = (torch.where(fit, z / new, 0.0).unsqueeze(-2) for z in (change, move))
        self.changes, self.moves = torch.cat((changes[..., 1:, :], change), -2), torch.cat((moves[..., 1:, :], move), -2)
        self.last = torch.where(overshot, before, g), torch.where(overshot, was, update)

    def _forget(self, where: Tensor) -> None:
        self.changes, self.moves = (torch.where(where.unsqueeze(-1), 0.0, z) for z in (self.changes, self.moves))

    def _along(self, p: Tensor) -> Tensor:
        """(*batch, memory, 1): the parts of p along the remembered changes, in the inner product in which the map is self-adjoint."""
        return self.changes @ (self.share * p).unsqueeze(-1)

    def _size(self, p: Tensor) -> Tensor:
        return (self.share * p * p).sum(-1, keepdim=True).sqrt()


def _sum(along: Tensor, vectors: Tensor) -> Tensor:
    return (along.mT @ vectors).squeeze(-2)
