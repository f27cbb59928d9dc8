"""POT's iteration for relaxed marginals, its rule for stopping, and the translation that gives an iterate its best mass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..geometry.protocol import Geometry
from ..penalties import KL
from ..problem import Problem
from ..solver.status import CONVERGED, DIVERGED, MAX_ITER, STALLED, Status
from .arrays import number

#: The change that rounding alone makes, in last digits, and the looks without progress within `NEAR` of it that end the loop.
ROUNDING, NEAR, PATIENCE = 8.0, 1e3, 10
#: Iterations between looks.
LEAP = 10


class Method(NamedTuple):
    """What distinguishes POT's methods: when they stop, and whether the common constant of (f, g) is set to its optimum."""

    both_sides: bool = True  # the change of u and of v, rather than of u alone
    check_every: int = 1
    header_every: int = 50
    translate: bool = False
    warns: bool = False


@dataclass
class State:
    """Where the loop stood when it stopped, on POT's sides."""

    f: Tensor  # (*batch, n)
    g: Tensor  # (*batch, m)
    n_iter: int
    status: Status
    errors: list[Tensor] = field(default_factory=list)


def alternate(
    geometry: Geometry,
    problem: Problem,
    start: Tensor,
    before: tuple[Tensor, Tensor],
    rules: Method,
    max_iter: int,
    tol: float,
    every: bool,
    after: float,
) -> State:
    """POT's iterations until POT's rule holds: u and v move by less than `tol` of their largest entry, or of 1.

    The iterate returned is the first for which it does. Unless `every` change is wanted, iterations are run ten at a time until the
    next change is below `tol`, and the last ten are then repeated one by one.

    Beyond iteration `after` they are translated. Where POT would not, its rule goes, too: a u far below 1 never moves by it, so the
    change is then relative to u and v themselves, on both sides.
    """
    eps = problem.eps
    own = math.inf if rules.translate else after

    def move(f: Tensor, g: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
        return translated(problem, f, g) if n_iter > after else (f, g)

    f, g = before
    fresh = problem.penalties[1].damp(geometry.first(start, eps), eps)
    n_iter = 0
    floor = _floor(geometry, eps)
    while rules.both_sides and not every and n_iter + LEAP <= max_iter:
        ahead_g, ahead_f, ahead = geometry.advance(problem, fresh, eps, LEAP)
        then = n_iter + LEAP
        base, step = move(ahead_f, ahead_g, then)[0], ahead - ahead_f
        if then > after:  # without its constant, which is settled otherwise: rather too small than too large
            step = step - (problem.b * step).sum(-1, keepdim=True) / problem.b.sum(-1, keepdim=True)
        change = 0.5 * _change(base + step, base, problem.b, eps, then > own)
        if not bool((change >= tol) & (change > floor(ahead_f, ahead_g))):
            break
        f, g, fresh, n_iter = ahead_f, ahead_g, ahead, then

    f, g = move(f, g, n_iter) if n_iter else (f, g)
    looks: list[tuple[Tensor, Tensor, State]] = []
    judge = _Judge(tol, strict=rules.both_sides)
    errors: list[Tensor] = []
    state = State(f, g, n_iter, MAX_ITER)
    while n_iter < max(max_iter, 1):
        if skip := min(-n_iter % rules.check_every, max_iter - n_iter):
            g, f, fresh = geometry.advance(problem, fresh, eps, skip)
            n_iter += skip
            f, g = move(f, g, n_iter)
            state = State(f, g, n_iter, MAX_ITER)
            continue
        old_f, old_g = f, g
        g, f, fresh = geometry.advance(problem, fresh, eps, 1)
        n_iter += 1
        f, g = move(f, g, n_iter)
        change = _change(f, old_f, problem.b, eps, n_iter > own)
        if rules.both_sides or n_iter > own:
            change = 0.5 * (change + _change(g, old_g, problem.a, eps, n_iter > own))
        state = State(f, g, n_iter, MAX_ITER)
        looks.append((change, floor(f, g), state))
        if len(looks) * rules.check_every >= LEAP or n_iter >= max_iter:
            at, status = judge(looks)
            errors += [error for error, _, _ in looks[: at + 1]]
            if status is not None:
                state = looks[at][2]
                state.status = status
                break
            looks = []
    state.errors = errors
    return state


def translated(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """f + p and its update g + q, for the constant p that is best in the dual. `problem` is the transposed one: f belongs to its columns.

    g must be the update of f. Shifting f by p shifts it by q = -p tau_b / (tau_b + eps) and leaves the columns' mass at
    sum b exp(-(g + q) / tau_b); the dual is largest in p where sum a exp(-(f + p) / tau_a) is the same:

        p = log(sum a exp(-f / tau_a) / sum b exp(-g / tau_b)) / (1 / tau_a + 1 / (tau_b + eps)).

    With tau = inf the sum is |a| or |b|. Shifted potentials have shifted updates, so iterations between two translations move (f, g)
    as if each had been translated: an iterate of the translation-invariant Sinkhorn of Séjourné, Vialard and Peyré 2022,
    arXiv:2201.00730, is the plain one, translated.
    """
    tau_b, tau_a = (cast(KL, penalty).tau for penalty in problem.penalties)
    rate = 1 / tau_a + 1 / (tau_b + problem.eps)
    if not number(rate) > 0:  # both hard: the dual does not depend on p
        return f, g
    p = (_log_sum(problem.b, -f / tau_a) - _log_sum(problem.a, -g / tau_b)) / rate
    return f + p, g - p / (1 + problem.eps / tau_b)


def _log_sum(w: Tensor, z: Tensor) -> Tensor:
    """log sum w exp(z), (*batch, 1), with a derivative at w = 0."""
    top = torch.where(w > 0, z, -math.inf).amax(-1, keepdim=True).detach()
    z = torch.where(z > top, top, z)  # an empty atom may lie anywhere
    return (w * (z - top).exp()).sum(-1, keepdim=True).log() + top


def _floor(geometry: Geometry, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The change that rounding alone makes: in the sums of a sweep, and in forming f / eps."""

    def floor(f: Tensor, g: Tensor) -> Tensor:
        size = torch.maximum(torch.where(f.isfinite(), f.abs(), 0.0).amax(), torch.where(g.isfinite(), g.abs(), 0.0).amax())
        return ROUNDING * torch.finfo(geometry.dtype).eps + torch.finfo(f.dtype).eps * size / eps

    return floor


def _change(new: Tensor, old: Tensor, w: Tensor, eps: float, relative: bool) -> Tensor:
    """max |u - u'| / max(u, u', 1), without the 1 when `relative`, over the atoms with mass, from logarithms: u itself may overflow."""
    new, old = (torch.where(w > 0, z / eps, -math.inf) for z in (new, old))
    top = torch.maximum(new.amax(), old.amax())
    top = top if relative else top.clamp(min=0.0)
    return ((new - top).exp() - (old - top).exp()).abs().amax()


class _Judge:
    """Decides from some looks, read in one copy to the host, at which of them the loop should have ended, and why."""

    def __init__(self, tol: float, strict: bool) -> None:
        self.tol, self.strict = tol, strict
        self.best, self.idle = math.inf, 0

    def __call__(self, looks: list[tuple[Tensor, Tensor, State]]) -> tuple[int, Status | None]:
        errors, floors = torch.stack([torch.stack((error, floor)) for error, floor, _ in looks]).T.tolist()
        for at, (error, floor) in enumerate(zip(errors, floors, strict=True)):
            if error < self.tol or (error == self.tol and not self.strict):
                return at, CONVERGED
            if error <= floor:
                return at, STALLED
            if not math.isfinite(error):
                return at, DIVERGED
            self.idle = 0 if error < self.best else self.idle + 1
            self.best = min(self.best, error)
            if self.idle >= PATIENCE and error < NEAR * floor:
                return at, STALLED
        return len(looks) - 1, None


def print_progress(changes: list[Tensor], rules: Method) -> None:
    for k, change in enumerate(changes):
        at = k * rules.check_every
        if at % rules.header_every == 0:
            print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
        print(f"{at:5d}|{float(change):8e}|")
