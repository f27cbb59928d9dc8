"""Which g the next iteration starts from: Sinkhorn's own update, or further along what the last updates have shown.

One iteration maps g to g_next. Its derivative at the solution, diag(1/b) P^T diag(1/a) P for hard marginals, is self-adjoint in the
inner product weighted by b, so what works for symmetric linear systems works here. Everything is a tensor operation on the batch:
each problem decides for itself, and nothing waits for the device. O(m) numbers a remembered step, no sweep over the costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..vectors import expm1

if TYPE_CHECKING:
    from .step import Alternating


class Accelerator(Protocol):
    def next(self, step: Alternating, memory: Any, g: Tensor, g_next: Tensor) -> tuple[Tensor, Any]:
        """The g to try next and what to remember, given that an iteration led from g to g_next. `memory` None: nothing known yet."""
        ...


class Plain:
    """Sinkhorn's own update."""

    def next(self, step: Alternating, memory: Any, g: Tensor, g_next: Tensor) -> tuple[Tensor, Any]:
        return g_next, None


PLAIN = Plain()


class _Trial(NamedTuple):
    """A proposed step that is not judged yet; (*batch, m) and (*batch, 1)."""

    g: Tensor  # where it began
    step: Tensor
    ascent: Tensor  # the dual's slope along it, where it began; inf for a plain step
    predicted: Tensor  # the size that the model gave the next update
    size: Tensor  # of the update where it began
    cap: Tensor


class _Memory(NamedTuple):
    changes: Tensor  # (*batch, memory, m): changes of the update, orthonormal or zero,
    moves: Tensor  # and the changes of g behind them
    last: tuple[Tensor, Tensor] | None  # (g, update)
    trial: _Trial | None


@dataclass(frozen=True)
class Anderson:
    """Anderson mixing over orthogonal differences, each step held to the slope of the dual.

    The last `memory` changes of the update are kept orthogonal in the inner product of b, each beside the change of g that made it;
    the next g is where their linear model has the smallest update. For a self-adjoint map a memory of 3 then sees as far as
    all history would (Tang et al. 2024, arXiv:2403.14961).

    The dual is concave in g with derivative `excess` = b - P^T 1, so along a step its slope tells progress from overshoot, without a
    value and whatever the rounding: a step past the top by more than the slope it started with is shortened by regula falsi, and
    the past is forgotten. (For relaxed marginals `excess` is that derivative up to positive factors: the same zeros.) A step of
    more than `cap` updates is not tried at once: where masses must travel far, updates hardly change and the model would
    jump out of sight; the cap follows the steps that held.

    gauge    whether (f + c, g - c) is the same plan: True for hard marginals. Updates then have no part along 1.
    """

    gauge: bool
    memory: int = 3

    #: A slope that turned by less than this part of what it was is taken for arrival.
    TURN = 0.9
    #: Largest step to begin with, and how fast the cap follows: in units of the plain step.
    CAP, FOLLOW = 8.0, 4.0
    #: Least and largest part of an overshooting step that is tried next.
    SHORT, LONG = 0.1, 0.5
    #: A difference with less than this part of itself left after orthogonalisation is rounding.
    NOTHING_NEW = 1e-6

    def next(self, step: Alternating, memory: _Memory | None, g: Tensor, g_next: Tensor) -> tuple[Tensor, _Memory]:
        b, eps, share = step.problem.b, step.eps, step.share
        if memory is None:
            none = b.new_zeros(*b.shape[:-1], self.memory, b.shape[-1])
            memory = _Memory(none, none, None, None)
        gap = torch.where(b > 0, g_next - g, 0.0)
        excess = -b * expm1((-gap / eps).clamp(max=80.0))
        update = gap - (share * gap).sum(-1, keepdim=True) if self.gauge else gap
        size = _size(share, update)

        none = torch.zeros_like(size, dtype=torch.bool)
        held, overshot, stale = (None, none, none) if memory.trial is None else self._judge(share, memory.trial, excess, size)
        changes, moves, last = self._remember(share, memory, g, update, overshot, stale)
        along = changes @ (share * update).unsqueeze(-1)
        left = update - _sum(along, changes)
        move = left - _sum(along, moves)
        cap = torch.full_like(size, self.CAP) if held is None else held.cap
        limit = cap * size / _size(share, move).clamp(min=torch.finfo(b.dtype).tiny)
        move = torch.where(limit < 1, move * limit, move)
        ascent = (excess * move).sum(-1, keepdim=True)
        # A plain step is never called an overshoot: Sinkhorn's own iterations cannot make the marginals worse.
        mixed, uphill = (along != 0).any(-2), ascent > 0
        plain = ~(mixed & uphill)
        changes, moves = _forget(mixed & ~uphill, changes, moves)
        found = _Trial(
            g,
            torch.where(plain, update, move),
            torch.where(plain, math.inf, ascent),
            torch.where(plain | (limit < 1), math.inf, _size(share, left)),
            size,
            cap,
        )
        if held is not None:
            found = _Trial(*(torch.where(overshot, old, new) for old, new in zip(held, found, strict=True)))
        proposed = torch.where(b > 0, found.g + found.step, g_next)  # an empty atom only follows
        return proposed, _Memory(changes, moves, last, found)

    def _judge(self, share: Tensor, trial: _Trial, excess: Tensor, size: Tensor) -> tuple[_Trial, Tensor, Tensor]:
        """The trial, shortened where it overshot and with the cap that its outcome allows; where it did; where the model was wrong."""
        slope = (excess * trial.step).sum(-1, keepdim=True)
        overshot = ~(slope >= -self.TURN * trial.ascent)  # NaN overshot
        shrink = (trial.ascent / (trial.ascent - slope)).nan_to_num(nan=0.0).clamp(self.SHORT, self.LONG)
        reached = self.FOLLOW * _size(share, trial.step) / trial.size.clamp(min=torch.finfo(share.dtype).tiny)
        cap = torch.where(overshot, (trial.cap * shrink).clamp(min=2.0), torch.maximum(trial.cap, reached))
        held = _Trial(trial.g, shrink * trial.step, shrink * trial.ascent, torch.full_like(size, math.inf), trial.size, cap)
        return held, overshot, size > trial.predicted

    def _remember(
        self, share: Tensor, memory: _Memory, g: Tensor, update: Tensor, overshot: Tensor, stale: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(changes, moves, last) with what the last step has shown; where it overshot without it, where the model was wrong empty."""
        if memory.last is None:
            return memory.changes, memory.moves, (g, update)
        before, was = memory.last
        forget = overshot | stale
        changes, moves = _forget(forget, memory.changes, memory.moves)
        change, move = update - was, g - before
        whole = _size(share, change)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            along = changes @ (share * change).unsqueeze(-1)
            change, move = change - _sum(along, changes), move - _sum(along, moves)
        new = _size(share, change)
        fit = (new > self.NOTHING_NEW * whole) & ~forget  # False for NaN
        change, move = (torch.where(fit, z / new, 0.0).unsqueeze(-2) for z in (change, move))
        changes, moves = torch.cat((changes[..., 1:, :], change), -2), torch.cat((moves[..., 1:, :], move), -2)
        return changes, moves, (torch.where(overshot, before, g), torch.where(overshot, was, update))


def _forget(where: Tensor, changes: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    where = where.unsqueeze(-1)
    return torch.where(where, 0.0, changes), torch.where(where, 0.0, moves)


def _size(share: Tensor, p: Tensor) -> Tensor:
    """The norm in which the map is self-adjoint."""
    return (share * p * p).sum(-1, keepdim=True).sqrt()


def _sum(along: Tensor, vectors: Tensor) -> Tensor:
    return (along.mT @ vectors).squeeze(-2)
