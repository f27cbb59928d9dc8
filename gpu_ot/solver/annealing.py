"""Which eps the loop uses when, and in which blocks it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch

from .acceleration import PLAIN
from .monitor import Monitor
from .step import Alternating

#: So many plain iterations tell how fast they converge; annealing is worth its own iterations and `SETTLE` more; and with at most `FEW`
#: rows or columns acceleration sees so much of the problem at once that it does as well alone. Measured, see bench/FACTS.md.
PROBE_ITERATIONS, SETTLE, FEW = 6, 16, 32
#: Of the way from the cost's standard deviation down to eps, in steps of this factor.
ANNEAL_FACTOR = 0.6
#: Iterations of a block after which a pairwise criterion is only foretold.
LEAP = 10


@dataclass(frozen=True)
class Constant:
    """The target from the first iteration on."""

    target: float

    def approach(self) -> Iterator[float]:
        """The values of eps, one iteration each, before the loop settles on `target`."""
        return iter(())


@dataclass(frozen=True)
class Anneal:
    """From `start`, of the order of the largest cost, down to `target` by `factor` an iteration.

    Large eps moves mass far in few iterations, small eps sharpens it: Schmitzer 2019, arXiv:1610.06519, section 3.2.
    """

    start: float
    target: float
    factor: float = 0.5

    def approach(self) -> Iterator[float]:
        eps = self.start
        while eps > self.target:
            yield eps
            eps *= self.factor


class Block(NamedTuple):
    """k iterations of a step, run by the backend without the host.

    check    whether the monitor checks the state after it. "ahead": only whether the end is near; if it is, the block is undone.
    forget   whether the accelerator forgets what it knows before it.
    restart  whether the iterations begin anew from the start.
    """

    step: Alternating
    k: int
    check: bool | str = True
    forget: bool = False
    restart: bool = False


class Stretch(NamedTuple):
    """A part of a run in which nothing is decided but whether to end it.

    k         iterations of `step`, checked after 1, every, every, ... of them and after the last; of a descent none.
    descent   values of eps, one iteration each, begun anew from the start and not checked.
    predict   whether they continue along the line through the last two.
    leap      LEAP iterations at a time while the end is not near (plain iterations and a pairwise criterion).
    on        whether it goes on from the stretch before, with what the accelerator knows.
    """

    step: Alternating
    k: int = 0
    every: int = 1
    descent: tuple[float, ...] = ()
    predict: bool = False
    leap: bool = False
    on: bool = False

    def blocks(self, monitor: Monitor) -> Iterator[Block]:
        """The stretch as it is run where the host looks after each check."""
        step, left = self.step, self.k
        for eps, following in pairwise((*self.descent, step.eps)):
            yield Block(step.at(eps, following, self.predict), 1, check=False, restart=eps == self.descent[0])
        while self.leap and left >= LEAP and not monitor.near:
            yield Block(step, LEAP, check="ahead")
            left -= 0 if monitor.near else LEAP
        k, forget = 1, not self.on
        while left > 0:
            if not monitor.criterion.pairwise or k == 1:
                yield Block(step, k, forget=forget)
            else:
                short = k < self.every
                yield Block(step, k if short else k - 1, check=False)
                if not short:
                    yield Block(step, 1)
            left -= k
            k, forget = min(self.every, left), False


def stretches(
    step: Alternating, monitor: Monitor, schedule: Constant | Anneal, max_iter: int, check_every: int, auto: bool, leap: bool
) -> Iterator[Stretch]:
    """The stretches of a run, of at least one iteration: those on the way to the target, and the one at it.

    auto   a few plain iterations first, then eps annealed where they show that this pays.
    """
    left, warm = max(max_iter, 1), tuple(schedule.approach())
    if auto and not warm:
        probe = min(PROBE_ITERATIONS, left)
        # By sums that are not exact the probe is accelerated, too: 10 iterations fewer of 40, measured on clouds of 20000 points.
        yield Stretch(step if monitor.approximate else replace(step, accelerator=PLAIN), probe)
        left -= probe
        found = tuple(_worth_annealing(step, monitor))
        warm = found if len(found) < left else ()
    if warm:
        yield Stretch(step, descent=warm, predict=auto)
        left -= len(warm)
    yield Stretch(step, left, check_every, leap=leap, on=monitor.approximate and not warm and left < max_iter)


def _worth_annealing(step: Alternating, monitor: Monitor) -> list[float]:
    """The eps to pass on the way to the target, where that takes fewer iterations than going on seems to; else none."""
    problem, errors = step.problem, monitor.errors
    if min(problem.shape[-2:]) <= FEW or len(errors) < PROBE_ITERATIONS or monitor.done is None:
        return []
    try:
        sample = problem.cost.sample(32).to(errors[-1].dtype)
    except NotImplementedError:  # a cost of the user's own that cannot be taken apart
        return []
    there = sample.isfinite()
    count = there.sum()
    mean = torch.where(there, sample, 0.0).sum() / count
    spread = (torch.where(there, sample - mean, 0.0).square().sum() / count).sqrt()
    tiny, tol = 1e-300 if sample.dtype == torch.float64 else 1e-38, max(monitor.criterion.tol, 1e-300)
    before, now = (z.clamp(min=tiny).log() for z in (errors[-3], errors[-1]))
    to_go = torch.where(monitor.done, 0.0, (now - math.log(tol)) / ((before - now) / 2).clamp(min=1e-9))
    deviation, furthest = torch.stack((spread, to_go.amax())).tolist()  # the one time that the host waits
    if not math.isfinite(deviation):  # no finite entry
        return []
    steps = math.ceil(math.log(max(deviation / step.eps, 1.0)) / -math.log(ANNEAL_FACTOR))
    if steps < 2 or furthest <= steps + SETTLE:
        return []
    return [step.eps * ANNEAL_FACTOR**-k for k in range(steps, 0, -1)]
