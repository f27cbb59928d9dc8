"""Keeps the best state of each problem, and decides from a few numbers of each check whether the loop should end.

A check is operations on the device and one copy of five numbers. On a GPU the copy is read one check later, so that nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..vectors import log, to_host
from . import fused
from .criterion import RESOLVED, Criterion
from .status import CONVERGED, DIVERGED, INFEASIBLE, MAX_ITER, STALLED, Status, unresolved
from .step import Alternating, State

#: Within `NEAR` rounding floors, so many checks without a new smallest error mean that rounding is all that is left.
STALL_CHECKS, NEAR = 10, 1e3
#: And on sums that are not exact, whose own floor is not known, so many wherever it happens.
STALL_CHECKS_APPROXIMATE = 30
#: Start testing for infeasibility after this many iterations.
INFEASIBILITY_AFTER = 50


@dataclass
class Outcome:
    """Where the loop stood when it stopped. `n_sweeps` visits to the n x m pairs were made, wherever they happened."""

    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_sweeps: int
    errors: list[Tensor] = field(default_factory=list)
    measured: Any = None  # by exact sums, of a backend that is not exact


class Monitor:
    """Watches one run at its target eps.

    on_check   called with (iterations, errors) at each check; `keep` with (iterations, eps, f, g), the best so far.
    """

    def __init__(
        self,
        step: Alternating,
        criterion: Criterion,
        dtype: torch.dtype,
        on_check: Callable[[int, Tensor], None] | None = None,
        keep: Callable[[int, float, Tensor, Tensor], None] | None = None,
        approximate: bool = False,
    ) -> None:
        self.step, self.criterion, self.dtype, self.on_check, self.keep = step, criterion, dtype, on_check, keep
        self.errors: list[Tensor] = []
        self.status: Status | None = None
        self.kept: tuple[Tensor, Tensor] | None = None  # (f, g), whose error is the last of `errors`
        self.done: Tensor | None = None
        self.near = False  # whether the end was found near, see `end_is_near`
        self.approximate = approximate
        self.progress = _Progress(endless=criterion.threshold == -math.inf)
        if approximate:
            self.progress.patience, self.progress.near = STALL_CHECKS_APPROXIMATE, math.inf
        self._ceiling: Tensor | None = None
        self._pending: Callable[[], list[float]] | None = None

    def check(self, state: State, before: State) -> State:
        """The state, in which problems that are done are marked."""
        f, g, error, done, flags = self.criterion.check(self, state) or self._check(state, before)
        self.kept, self.done = (f, g), done
        self.errors.append(error)
        if self.on_check is not None:
            self.on_check(state.n_iter, error)
        if self.keep is not None:
            self.keep(state.n_iter, self.step.eps, f, g)
        if not flags.is_cuda:
            self.status = self.progress.judge(flags.tolist())
        else:
            pending, self._pending = self._pending, to_host(flags)
            if pending is not None:
                self.status = self.progress.judge(pending())
        return replace(state, done=self.done)

    def _check(self, state: State, before: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(f, g, error, done) of the best state so far, and the flags."""
        f, g, error, floor = self.criterion.measure(self.step, state, before, self.dtype)
        if self.kept is not None and self.done is not None:
            # A problem that is done stays. Plain iterations only improve; an accelerated one may be a trial.
            worse = self.done if state.plain else self.done | ~(error < self.errors[-1])
            worse = worse if state.inexact is None else worse | state.inexact
            error = torch.where(worse, self.errors[-1], error)
            worse, (old_f, old_g) = worse.expand_as(error).unsqueeze(-1), self.kept
            if worse.numel() == 1 and fused.on_one_core(g):  # nothing waits for this number, and no vector is copied
                f, g = self.kept if bool(worse) else (f, g)
            else:
                f, g = torch.where(worse, old_f, f), torch.where(worse, old_g, g)
        tol = self.criterion.threshold
        self.kept, done = (f, g), error < tol if self.criterion.strict else error <= tol
        # All done; all done, at the rounding floor or infeasible; the largest error in floors; anything infeasible.
        worst, settled = (error / floor).amax(), done | (error <= floor)
        infeasible = self._infeasible() if self.step.problem.forbids and state.n_iter >= INFEASIBILITY_AFTER else None
        settled = settled if infeasible is None else settled | infeasible
        some = torch.zeros_like(worst) if infeasible is None else infeasible.any().to(worst)
        return f, g, error, done, torch.stack([done.all().to(worst), settled.all().to(worst), worst, some])

    def end_is_near(self, state: State) -> bool:
        """Whether one of the last iterations, or the next, may have met the criterion. Costs no sweep."""
        error, floor = self.criterion.next_error(self.step, state, self.dtype)
        self.near = not bool((error >= self.criterion.threshold) & (error > floor))
        return self.near

    def _infeasible(self) -> Tensor | None:
        """Where the dual has passed what any plan could cost, <C, P> + eps KL(P | a⊗b) <= |a| max C + eps H(b): then there is none."""
        problem = self.step.problem
        if self._ceiling is None:
            self._ceiling = _dearest_plan(problem, self.step.eps)
        if self._ceiling is None or self.kept is None:
            return None
        a, b, (f, g) = problem.a, problem.b, self.kept
        dual = torch.where(a > 0, a * f, 0.0).sum(-1) + torch.where(b > 0, b * g, 0.0).sum(-1)
        if problem.mass is not None:  # f holds the multiplier of the mass, its largest entry
            dual = dual + torch.where(a > 0, f, -math.inf).amax(-1) * (problem.mass - a.sum(-1))
        return dual > self._ceiling + 1e-9 * self._ceiling.abs()

    def outcome(self, state: State) -> Outcome:
        if self._pending is not None and self.status is None:
            self.status = self.progress.judge(self._pending())
        unseen = self.kept is None or (self.criterion.pairwise and self.status is None)  # iterations after the last check
        f, g = self.criterion.seen(self.step, state) if unseen or self.kept is None else self.kept
        done = torch.zeros(f.shape[:-1], dtype=torch.bool, device=f.device) if state.done is None else state.done
        status = self.status or MAX_ITER
        status = self._resolved(status, f, g) if status in (MAX_ITER, STALLED) else status
        return Outcome(f, g, status, done, state.n_iter, state.n_sweeps, self.errors)

    def _resolved(self, status: Status, f: Tensor, g: Tensor) -> Status:
        """The status of a run that did not converge, unless the reason is an eps too small for the numbers that it divides."""
        size = torch.maximum(*(torch.where(z.isfinite(), z.abs(), 0.0).amax() for z in (f, g)))
        digit = float(size) * torch.finfo(g.dtype).eps
        if digit <= RESOLVED * self.step.eps or not self.errors:
            return status
        error = float(self.criterion.relative(self.step, self.errors[-1]).amax())
        return unresolved(max(error, digit / self.step.eps), self.step.eps, digit / RESOLVED)


class _Progress:
    """Judges the flags of one check after the other.

    endless   nothing ends the run before its last iteration but numbers that are none.
    """

    def __init__(self, endless: bool = False) -> None:
        self.best, self.idle, self.endless = math.inf, 0, endless
        self.patience, self.near = STALL_CHECKS, NEAR

    def judge(self, flags: list[float]) -> Status | None:
        done, settled, ratio, infeasible = flags
        if done:
            return CONVERGED
        if settled and not self.endless:
            return INFEASIBLE if infeasible else STALLED
        if not math.isfinite(ratio):
            return DIVERGED
        if self.endless:
            return None
        self.idle = 0 if ratio < self.best else self.idle + 1
        self.best = min(self.best, ratio)
        # Far above rounding a standing error proves nothing: at small eps mass moves in long, flat stages.
        return STALLED if self.idle >= self.patience and ratio < self.near else None


def _dearest_plan(problem: Problem, eps: float) -> Tensor | None:
    """(*batch,): more than any plan can cost; None where mass may vanish, and there always is one."""
    if not problem.cost.stored or not (problem.balanced or problem.mass is not None):
        return None
    M, b = problem.cost.dense().detach(), problem.b.detach()
    dearest = torch.where(M.isposinf(), -math.inf, M).amax((-2, -1)).to(b.dtype)
    if problem.mass is not None:  # P_ij <= b_j, so sum P log(P / ab) <= sum_j b_j max(-log b_j, 0)
        return problem.mass.detach() * dearest + eps * torch.where(b > 0, b * (-log(b)).clamp(min=0), 0.0).sum(-1)
    return b.sum(-1) * dearest - eps * torch.where(b > 0, b * log(b), 0.0).sum(-1)
