"""Geometry + penalties + schedule -> f, g, status. The only Sinkhorn loop in the package.

One iteration maps a column potential to the next: f is the update of g, `fresh` the update of f. The rows of the plan
(f, g) are then exact, and `fresh` holds the error of its columns without another pass over the costs. An accelerator says where
to look next, see acceleration.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import unknown
from ..geometry.protocol import Geometry
from ..penalties import shift
from ..problem import Problem
from ..solver.status import CONVERGED, DIVERGED, INFEASIBLE, MAX_ITER, STALLED, Status
from ..vectors import expm1, log
from .acceleration import Accelerator, Mixing, Plain, Relaxed
from .annealing import Anneal, Constant

#: Within `NEAR` rounding floors, so many looks without a new smallest error mean that rounding is all that is left.
PATIENCE, NEAR = 10, 1e3
#: A sum of rounded numbers is off by a few of their last digits; below `ROUNDING` of them there is nothing to gain.
ROUNDING = 8.0
#: "auto": so many plain iterations tell how fast they converge; annealing is worth its own iterations and `SETTLE` more; and with at
#: most `FEW` rows or columns mixing sees so much of the problem at once that it does as well alone. Measured, see bench/FACTS.md.
OPENING, SETTLE, FEW = 6, 16, 32
#: Of the way from the cost's standard deviation down to eps, in steps of this factor.
COOLING = 0.6
#: Whether some mass can have no partner is asked once so many iterations have not been enough.
DOUBT = 50


@dataclass(frozen=True)
class Stop:
    """When the marginals are good enough.

    tol    in the unit of the norm.
    norm   "l1": L1 marginal error as a fraction of the mass (for relaxed marginals, its analogue);
           "l1_absolute": the same in units of mass;
           "l2": Euclidean norm, absolute, of each problem (POT's rule); "l2_joint": of the whole batch together.
    """

    tol: float = 1e-4
    norm: str = "l1"

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l1_absolute", "l2", "l2_joint"):
            raise unknown("norm", self.norm, ["l1", "l1_absolute", "l2", "l2_joint"])

    def error(self, b: Tensor, gap: Tensor) -> Tensor:
        """gap = (g - fresh) / eps; b expm1(gap) is the excess of the column marginal, exactly so when it is a hard constraint."""
        return self._size(torch.where(b > 0, b * expm1(gap), 0.0), b)

    def floor(self, b: Tensor, g: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """The error that rounding alone makes: in the sums of the sweep, and in forming g / eps."""
        sums = ROUNDING * torch.finfo(dtype).eps
        differences = torch.finfo(g.dtype).eps * torch.where(b > 0, g.abs(), 0.0).amax(-1, keepdim=True) / eps
        return self._size(b * (sums + differences), b)

    def unit(self, b: Tensor) -> Tensor:
        """The error of a plan with nothing in its columns."""
        return self._size(b, b)

    def _size(self, excess: Tensor, b: Tensor) -> Tensor:
        if self.norm == "l1":
            return excess.abs().sum(-1) / b.sum(-1)
        if self.norm == "l1_absolute":
            return excess.abs().sum(-1)
        if self.norm == "l2":
            return excess.square().sum(-1).sqrt()
        return excess.square().sum().sqrt().expand(b.shape[:-1])


@dataclass
class Outcome:
    """Where the loop stood when it stopped. `n_passes` sweeps over the n x m pairs were made, wherever they happened."""

    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    n_passes: int
    errors: list[Tensor] = field(default_factory=list)

    def then(self, later: Outcome) -> Outcome:
        """This run and the one that went on from it, as one."""
        n_iter, n_passes = self.n_iter + later.n_iter, self.n_passes + later.n_passes
        return replace(later, n_iter=n_iter, n_passes=n_passes, errors=self.errors + later.errors)


def iterate(
    geometry: Geometry,
    problem: Problem,
    schedule: Constant | Anneal,
    start: Tensor,
    stop: Stop,
    max_iter: int,
    check_every: int = 10,
    on_check: Callable[[int, Tensor], None] | None = None,
    accelerate: str = "none",
    keep: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Outcome:
    """Iterate from the row potentials `start` = f + eps log a until `stop` is content, `max_iter` (>= 1) is reached or nothing moves.

    accelerate  "none": plain iterations. "relaxation", "mixing": see acceleration.py. "auto": mixing, after annealing eps where
                the first few iterations, which are plain, show that this will pay.
    keep        called with (iterations, eps, f, g) at each look: the best so far.

    The error is looked at after iterations 1, 1 + check_every, 1 + 2 check_every, ... and after the last. Accelerated, each
    problem of a batch stops on its own.
    """
    if accelerate not in ACCELERATORS:
        raise unknown("accelerate", accelerate, list(ACCELERATORS))
    eps, warm = schedule.target, list(schedule.approach())
    run = _Run(geometry, problem, eps, stop, on_check, keep)
    g = run.approach(run.first(start, warm[0] if warm else eps), warm)
    if accelerate == "auto" and not warm:
        g = run.settle(g, Plain(), min(OPENING, max_iter), 1)
        if run.status is None and 0 < len(warm := run.worth_annealing()) < max_iter - run.n_iter:
            g = run.approach(run.first(start, warm[0]), warm, straight=True)
    if run.status is None and run.n_iter < max(max_iter, 1):
        run.settle(g, ACCELERATORS[accelerate](problem, eps), max_iter - run.n_iter, check_every)
    return run.outcome()


#: By name, what says where to look next.
ACCELERATORS: dict[str, Callable[[Problem, float], Accelerator]] = {
    "auto": Mixing,
    "mixing": Mixing,
    "relaxation": Relaxed,
    "none": lambda problem, eps: Plain(),
}


class _Run:
    """One run of the loop: counts, the best potentials of each problem, and what became of it."""

    def __init__(
        self,
        geometry: Geometry,
        problem: Problem,
        eps: float,
        stop: Stop,
        on_check: Callable[[int, Tensor], None] | None,
        keep: Callable[[int, float, Tensor, Tensor], None] | None,
    ) -> None:
        self.geometry, self.problem, self.eps, self.stop, self.on_check, self.keep = geometry, problem, eps, stop, on_check, keep
        self.n_iter = self.n_starts = 0
        self.status: Status | None = None
        self.errors: list[Tensor] = []
        self.progress = Progress()
        self.done = torch.zeros(problem.b.shape[:-1], dtype=torch.bool, device=problem.b.device)
        self.kept: tuple[Tensor, Tensor] | None = None  # (f, g), whose error is the last of `errors`
        self.ceiling: Tensor | None = None
        self.doubt: Tensor | None = None  # whether the last attempt was in doubt, and any since the last look
        self.doubts: Tensor | None = None
        self.doubted = False  # what the host has been told of it
        self.waiting: Callable[[], list[float]] | None = None

    def first(self, start: Tensor, eps: float) -> Tensor:
        """The column update of the start."""
        self.n_starts += 1
        return self.problem.penalties[1].damp(self.geometry.first(start, eps), eps)

    def approach(self, g: Tensor, warm: list[float], straight: bool = False) -> Tensor:
        """One iteration at each eps of `warm`; the g to go on from at the target.

        The solution is a smooth function of eps: drawn on to the next eps in a straight line through the last two (`straight`), the
        potentials arrive with a third of the error (measured, bench/FACTS.md).
        """
        last = None
        for eps, following in zip(warm, [*warm, self.eps][1:], strict=True):
            fresh = self.geometry.advance(self.problem, g, eps, 1)[2]
            self.n_iter += 1
            g = fresh
            if straight and last is not None:
                g = fresh + (fresh - last[1]) * ((following - eps) / (eps - last[0]))
            last = eps, fresh
        return g

    def settle(self, g: Tensor, accelerator: Accelerator, iterations: int, check_every: int) -> Tensor:
        """Iterations at the target until there is a status; the g to go on from."""
        for k in _strides(iterations, check_every):
            f, g, fresh = self.move(g, accelerator, k)
            self.look(f, g, fresh, isinstance(accelerator, Plain))
            if self.status is not None:
                break
            if self.doubted:
                self.geometry.renew()
                accelerator.restart()  # it has seen updates of 0
                self.doubted = False
            g = self.next(accelerator, f, g, fresh)
        return g

    def move(self, g: Tensor, accelerator: Accelerator, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """k iterations: (f, g, fresh) of the last."""
        self.n_iter += k
        if isinstance(accelerator, Plain):
            self.doubt = None
            return self.geometry.advance(self.problem, g, self.eps, k)
        f, g, fresh = self.attempt(g)
        for _ in range(k - 1):
            f, g, fresh = self.attempt(self.next(accelerator, f, g, fresh))
        return f, g, fresh

    def attempt(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kept is None:  # nothing to fall back on
            return self.geometry.advance(self.problem, g, self.eps, 1)
        f, g, fresh, self.doubt = self.geometry.attempt(self.problem, g, self.eps)
        if self.doubt is not None:
            self.doubts = self.doubt if self.doubts is None else self.doubts | self.doubt
        return f, g, fresh

    def next(self, accelerator: Accelerator, f: Tensor, g: Tensor, fresh: Tensor) -> Tensor:
        if isinstance(accelerator, Plain):
            return fresh
        moved = accelerator.next(g, fresh - shift(self.problem.penalties, self.problem.a, self.problem.b, f, fresh))
        stay = self.done.unsqueeze(-1) if self.doubt is None else self.done.unsqueeze(-1) | self.doubt
        return torch.where(stay, g, moved)

    def look(self, f: Tensor, g: Tensor, fresh: Tensor, plain: bool) -> None:
        """Keeps what is best, and judges the run by numbers that on a GPU have travelled while it went on."""
        b = self.problem.b
        error = self.stop.error(b, (g - fresh) / self.eps)
        floor = self.stop.floor(b, g, self.eps, self.geometry.dtype)
        # Exponents rounded to more than a tenth: no sum over them means anything, however small it comes out.
        error = torch.where(floor > 0.1 * self.stop.unit(b), torch.maximum(error, floor), error)
        if self.kept is not None:
            # Plain iterations only improve, and go on together. An accelerated one may be a trial, and a problem that is done stays.
            worse = self.done.all() if plain else self.done | ~(error < self.errors[-1])
            worse = worse if self.doubt is None else worse | self.doubt
            worse = worse.expand_as(error)
            error = torch.where(worse, self.errors[-1], error)
            f, g = (torch.where(worse.unsqueeze(-1), old, new) for old, new in zip(self.kept, (f, g), strict=True))
        self.kept = f, g
        self.errors.append(error)
        self.done = error <= self.stop.tol
        if self.on_check is not None:
            self.on_check(self.n_iter, error)
        if self.keep is not None:
            self.keep(self.n_iter, self.eps, *self.kept)
        signs = self.progress.signs(error, self.done, floor, self.stuck(f, g))
        if self.doubts is not None:
            signs, self.doubts = torch.cat((signs, self.doubts.to(signs).view(1))), None
        told = _on_its_way(signs)
        told, self.waiting = (self.waiting, told) if error.is_cuda else (told, None)
        if told is not None:
            *signs, doubted = (*told(), 0.0)[:5]
            self.doubted = doubted > 0
            self.status = self.progress.judge(signs)

    def stuck(self, f: Tensor, g: Tensor) -> Tensor:
        """Whether the dual has passed what any plan could cost, <C, P> + eps KL(P | a⊗b) <= |a| max C + eps H(b): then there is none."""
        a, b = self.problem.a, self.problem.b
        if self.ceiling is None and self.n_iter >= DOUBT and self.problem.forbids:
            self.ceiling = _ceiling(self.problem, self.eps)
        if self.ceiling is None:
            return torch.zeros_like(self.done)
        dual = torch.where(a > 0, a * f, 0.0).sum(-1) + torch.where(b > 0, b * g, 0.0).sum(-1)
        return dual > self.ceiling + 1e-9 * self.ceiling.abs()

    def worth_annealing(self) -> list[float]:
        """The eps to pass on the way to the target, where that takes fewer iterations than going on seems to; else none."""
        if min(self.problem.shape[-2:]) <= FEW or len(self.errors) < OPENING:
            return []
        try:
            spread = self.problem.cost.sample(32).double()
        except NotImplementedError:  # a cost of the user's own that cannot be taken apart
            return []
        spread = spread[spread.isfinite()]
        if not len(spread):
            return []
        steps = math.ceil(math.log(max(float(spread.std(correction=0)) / self.eps, 1.0)) / -math.log(COOLING))
        before, now = (z.double().clamp(min=1e-300).log() for z in (self.errors[-3], self.errors[-1]))
        rate = (before - now) / 2
        to_go = torch.where(self.done, 0.0, (now - math.log(max(self.stop.tol, 1e-300))) / rate.clamp(min=1e-9))
        if steps < 2 or float(to_go.amax()) <= steps + SETTLE:
            return []
        return [self.eps * COOLING**-k for k in range(steps, 0, -1)]

    def outcome(self) -> Outcome:
        if self.waiting is not None and self.status is None:
            self.status = self.progress.judge(self.waiting()[:4])
        assert self.kept is not None
        n_passes = self.n_starts + 2 * self.n_iter + self.geometry.extra
        return Outcome(*self.kept, self.status or MAX_ITER, self.done, self.n_iter, n_passes, self.errors)


def _strides(total: int, check_every: int) -> Iterator[int]:
    """1, check_every, check_every, ... summing to `total` (at least one iteration)."""
    yield 1
    total -= 1
    while total > 0:
        yield min(check_every, total)
        total -= check_every


def _on_its_way(numbers: Tensor) -> Callable[[], list[float]]:
    """Starts the copy to the host; the result waits for it to arrive, not for what the device was given to do since."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read


def _ceiling(problem: Problem, eps: float) -> Tensor | None:
    """(*batch,): more than any plan can cost; None where mass may vanish, and there always is one."""
    if not problem.cost.stored or not all(penalty.balanced for penalty in problem.penalties):
        return None
    M, b = problem.cost.dense().detach(), problem.b.detach()
    dearest = torch.where(M.isposinf(), -math.inf, M).amax((-2, -1)).to(b.dtype)
    return b.sum(-1) * dearest - eps * torch.where(b > 0, b * log(b), 0.0).sum(-1)


class Progress:
    """Decides from a look at the errors whether the loop should end."""

    def __init__(self) -> None:
        self.best = math.inf
        self.idle = 0

    def signs(self, error: Tensor, done: Tensor, floor: Tensor, stuck: Tensor) -> Tensor:
        """(4,): all done, all done or at the rounding floor, the largest error in floors, anything without a solution."""
        settled = done | (error <= floor)
        worst = (error / floor).amax()
        return torch.stack([done.all().to(worst), (settled | stuck).all().to(worst), worst, stuck.any().to(worst)])

    def judge(self, signs: list[float]) -> Status | None:
        done, over, ratio, stuck = signs
        if done:
            return CONVERGED
        if over:
            return INFEASIBLE if stuck else STALLED
        if not math.isfinite(ratio):
            return DIVERGED
        self.idle = 0 if ratio < self.best else self.idle + 1
        self.best = min(self.best, ratio)
        # Far above rounding a standing error proves nothing: at small eps mass moves in long, flat stages.
        return STALLED if self.idle >= PATIENCE and ratio < NEAR else None
