"""Stretches of a run in machine code: the arrays of a geometry, a step and a criterion, handed to the room `compiled`.

The twin of what `loop` does block by block; the two agree to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..geometry.compiled import LARGEST_BYTES, Compiled
from ..geometry.protocol import Geometry, weigh
from ..penalties import KL
from .acceleration import Anderson, Plain
from .annealing import Stretch
from .criterion import RESOLVED, ROUNDING, Change, Criterion, Marginal
from .monitor import NEAR, STALL_CHECKS, Monitor
from .status import CONVERGED, DIVERGED, MAX_ITER, STALLED
from .step import Alternating, Start, State, Symmetric

#: Numbers of the buffer that errors are written to: one call goes on until it is full.
ERRORS = 2**16
#: Iterations that are as good as without end.
MOST = 2**40
#: Rows of a lone kernel of more than LARGEST_BYTES are shared out to at most so many cores.
MOST_HANDS = 8
#: A thread is worth waking for so many entries of kernels.
SHARE = 2**14

#: What `block.go` returns.
STATUS = (MAX_ITER, CONVERGED, STALLED, DIVERGED)


def engine(geometry: Geometry, step: Alternating, monitor: Monitor, start: Start) -> Engine | None:
    """What runs this in machine code; None where the torch operations do."""
    if not isinstance(geometry, Compiled) or type(step) not in (Alternating, Symmetric):
        return None
    problem, rule = step.problem, monitor.criterion
    batch = problem.a.shape[:-1]
    if not isinstance(rule, (Marginal, Change)) or type(step.accelerator) not in (Plain, Anderson) or start.f.shape != problem.a.shape:
        return None
    if not batch.numel() or problem.a.dtype != torch.float64:
        return None
    arrays = geometry.arrays(batch)
    told = monitor.on_check is not None or monitor.keep is not None
    if arrays is None or (len(arrays.K) > 1 and (not isinstance(rule, Marginal) or rule.norm == "l2_joint" or told)):
        return None
    return Engine(geometry, arrays, step, monitor, start)


class Engine:
    """One run. Vectors are (G, H, n) and (G, H, m): G costs, each shared by H problems."""

    def __init__(self, geometry: Any, arrays: Any, step: Alternating, monitor: Monitor, start: Start) -> None:
        from ..compiled import block, kernel, mixing, watch

        self.geometry, self.monitor, self.step = geometry, monitor, step
        problem, rule = step.problem, monitor.criterion
        G, (n, m) = len(arrays.K), arrays.C.shape[-2:]
        H = problem.a.shape[:-1].numel() // G
        self.shape = G, H, n, m
        self.kernel = kernel.Kernel(
            arrays.C, arrays.K, arrays.f0, arrays.g0, arrays.at, geometry.log_dropped, geometry.safe, self._crew(G, n, m)
        )
        tau_a, tau_b = (float(penalty.tau) if isinstance(penalty, KL) else math.inf for penalty in problem.penalties)
        a, b = self._rows(problem.a), self._columns(problem.b)
        self.at = functools.partial(block.Measures, a, b, tau_a=tau_a, tau_b=tau_b)
        self.start, self.weight = self._rows(start.f), self._rows(start.weight)
        self.state = block.State(np.empty((G, H, n)), np.empty((G, H, m)), np.empty((G, H, m)))
        self.before = block.State(np.empty((G, H, n)), np.empty((G, H, m)), np.empty((G, H, 0)))
        self.start_g = None if start.g is None else self._columns(start.g)
        mixed = m if isinstance(step.accelerator, Anderson) else 0
        size = step.accelerator.memory if isinstance(step.accelerator, Anderson) else 0
        self.memory = mixing.Memory(
            np.zeros((G, H, size, mixed)), np.zeros((G, H, size, mixed)), np.empty((G, H, 2, mixed)), np.empty((G, H, 2, mixed)),
            np.zeros((G, H, 6)), np.empty((G, 5, max(mixed, size))),
        )  # fmt: skip
        progress = np.zeros((G, 3))
        progress[:, 1] = math.inf
        self.watch = watch.Watch(np.empty((G, H, n)), np.empty((G, H, m)), np.empty((G, H)), np.zeros((G, H), np.bool_), progress)
        self.rule = rule_of(rule, geometry.dtype)
        self.tuning = tuning(isinstance(step.accelerator, Anderson) and step.accelerator.gauge)
        self.counts = np.zeros((G, 4), np.int64)
        self.counts[:, 3] = 1
        self.ends = np.zeros((G, 2), np.int64)
        self.begun = False

    def run(self, stretch: Stretch, state: State | None) -> State:
        """The state after a stretch; what the checks found goes to the monitor."""
        from ..compiled import batch

        eps = self.step.eps
        if stretch.descent:
            self._descend(stretch)
        elif not self.begun:
            if isinstance(self.step, Symmetric):
                self.state.g[:] = self.start
                for side in self.state:
                    side[:] = self.start / (1 + eps / self.at(eps).tau_a)
            else:
                self._each(batch.begin_some, self.kernel, self.at(eps), self.start, self.weight, self.state)
                self.counts[:, 2] += 1 + (self.kernel.at[:, 0] == eps)  # the kernel is a sweep of its own
            self.before.f[:], self.before.g[:] = self.start, self.state.g if self.start_g is None else self.start_g
        self.begun = True
        if stretch.k > 0:
            self._go(stretch)
        return self._state()

    def finish(self) -> None:
        """The kernel serves the verbs from now on."""
        self.geometry.take_over(self.step.eps)

    def _descend(self, stretch: Stretch) -> None:
        from ..compiled import batch

        first = self.at(stretch.descent[0])
        level = weigh(torch.from_numpy(self.start), torch.from_numpy(self.weight), self.step.eps).numpy()  # as in the end
        self._each(batch.begin_some, self.kernel, first, level, np.ones_like(level), self.state)
        made = 1 + (self.kernel.at[:, 0] == first.eps)
        sweeps = np.zeros(self.shape[0], np.int64)
        schedule = np.array([*stretch.descent, self.step.eps])
        self._each(batch.descend_some, self.kernel, first, schedule, stretch.predict, self.state, sweeps)
        self.counts[:, 0] += len(stretch.descent)
        self.counts[:, 2] += sweeps + made

    def _go(self, stretch: Stretch) -> None:
        from ..compiled import batch

        (G, H, _, _), step, monitor, ends = self.shape, stretch.step, self.monitor, self.ends
        plain_until = step.plain_until if isinstance(step.accelerator, Anderson) else -1
        limit = int(self.counts[ends[:, 0] == 0, 0].max()) + int(min(stretch.k, MOST))
        self.counts[:, 1], self.counts[:, 3], ends[:, 1] = 0, 1, 0

        def go() -> None:
            self._each(
                batch.go_some, self.kernel, self.at(step.eps), self.state, self.before, self.memory, self.tuning, self.watch, self.rule,
                bool(monitor.criterion.strict), self.counts, limit, stretch.every, plain_until, isinstance(step, Symmetric), self.found,
                ends,
            )  # fmt: skip

        told = monitor.on_check is not None or monitor.keep is not None
        self.found = np.empty((G, 1 if told else min(limit // stretch.every + 2, max(64, ERRORS // (G * H))), H))
        go()
        while ((ends[:, 0] == 0) & (self.counts[:, 0] < limit)).any():
            if told:
                self._report()
                ends[:, 1] = 0
            else:
                self.found = np.concatenate((self.found, np.empty_like(self.found)), 1)
            go()
        self._report()

    def _report(self) -> None:
        """The errors, to the monitor: those of a problem that has ended stay."""
        monitor, (G, H, _, _), made = self.monitor, self.shape, self.ends[:, 1]
        batch = self.step.problem.a.shape[:-1]
        if G == 1:
            table = self.found[0, : made[0]].copy()
        else:
            last = monitor.errors[-1].view(G, H).numpy() if monitor.errors else self.found[:, 0]
            table = np.empty((int(made.max()), G, H))
            for i in range(len(table)):
                table[i] = last = np.where((made > i)[:, None], self.found[:, min(i, self.found.shape[1] - 1)], last)
        monitor.errors += torch.from_numpy(table).view((-1, *batch)).unbind()
        monitor.kept, monitor.done = (self._tensor(self.watch.f), self._tensor(self.watch.g)), self._tensor(self.watch.done)
        state = self._state()
        if monitor.on_check is not None and len(table):
            monitor.on_check(state.n_iter, monitor.errors[-1])
        if monitor.keep is not None and len(table):
            monitor.keep(state.n_iter, self.step.eps, *monitor.kept)
        status = self.ends[:, 0]
        if status.all() or (status == 3).any():
            monitor.status = STATUS[status.max()]

    def _each(self, work: Callable[..., None], *arguments: Any) -> None:
        """Every problem, a few at a time, on all cores."""
        G, _, n, m = self.shape
        if G == 1:
            self._with_help(work, arguments)
        else:
            share_out(G, n * m, work, arguments)

    def _crew(self, G: int, n: int, m: int) -> Any:
        from ..compiled.crew import crew

        itemsize = self.geometry.dtype.itemsize
        hands = torch.get_num_threads() if G == 1 and n * m * itemsize > LARGEST_BYTES and not isinstance(self.step, Symmetric) else 0
        return crew(n, m, np.dtype(f"f{itemsize}"), min(hands, MOST_HANDS))

    def _with_help(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """`work` on this core, and the rows of a large kernel on others too."""
        G, hands = self.shape[0], len(self.kernel.crew.found)
        if hands <= 1:
            work(0, G, *arguments)
            return
        from ..compiled.crew import LATE, MASK, STOP, WORD, dismiss, help_out

        crew = self.kernel.crew
        crew.words[STOP], crew.words[LATE], crew.words[WORD] = 0, 0, crew.words[WORD] | MASK
        with ThreadPoolExecutor(hands - 1) as pool:
            others = [pool.submit(help_out, self.kernel.K[0], crew, hand) for hand in range(1, hands)]
            try:
                work(0, G, *arguments)
            finally:
                dismiss(crew)
            for other in others:
                other.result()

    def _state(self) -> State:
        f, g, g_next = map(self._tensor, self.state)
        n_iter, age, n_sweeps = (int(z) for z in self.counts[:, :3].max(0))
        return State(f, g, g_next, None, self.monitor.done, None, n_iter, age, n_sweeps)

    def _rows(self, z: Tensor) -> np.ndarray:
        G, H, n, _ = self.shape
        return z.detach().resolve_neg().contiguous().view(G, H, n).numpy()

    def _columns(self, z: Tensor) -> np.ndarray:
        G, H, _, m = self.shape
        return z.detach().resolve_neg().contiguous().view(G, H, m).numpy()

    def _tensor(self, z: np.ndarray) -> Tensor:
        batch = self.step.problem.a.shape[:-1]
        return torch.from_numpy(z).view((*batch, *z.shape[2:]))


def share_out(G: int, size: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """`each` for G problems with kernels of `size` entries, on as many cores as they are worth."""
    threads = min(torch.get_num_threads(), G, max(1, G * size // SHARE))
    each(work, G, arguments, threads, max(1, G // (8 * threads)))


def each(work: Callable[..., None], count: int, arguments: tuple[Any, ...], threads: int | None = None, step: int = 1) -> None:
    """work(low, high, *arguments) for every problem of `count`, `step` at a time, on all cores."""
    threads = min(torch.get_num_threads(), count) if threads is None else threads
    if threads == 1:
        work(0, count, *arguments)
        return
    parts = iter([(i, min(i + step, count)) for i in range(0, count, step)])
    share = functools.partial(_take, parts, work, arguments)
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(share) for _ in range(threads - 1)]
        share()
        for other in others:
            other.result()


def _take(parts: Any, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for low, high in parts:  # shared by the threads: each takes the next
        work(low, high, *arguments)


def resolved(f: np.ndarray, g: np.ndarray, eps: float) -> bool:
    """Whether eps is large enough for potentials of this size, as in `Monitor`."""
    size = max(float(np.abs(f).max()), float(np.abs(g).max()))
    return size * torch.finfo(torch.float64).eps <= RESOLVED * eps


def rule_of(criterion: Criterion, dtype: torch.dtype) -> Any:
    """The criterion as `compiled.watch.Rule`, for sweeps in this type."""
    from ..compiled.watch import NORMS, Rule

    common = ROUNDING * torch.finfo(dtype).eps, STALL_CHECKS, NEAR
    if isinstance(criterion, Marginal):
        return Rule(float(criterion.threshold), NORMS.index(criterion.norm), *common)
    assert isinstance(criterion, Change)
    settings = bool(criterion.both_sides), float(criterion.translate_after), float(criterion.relative_after)
    return Rule(float(criterion.threshold), -1, *common, *settings)


def tuning(gauge: bool) -> Any:
    """The constants of Anderson mixing as `compiled.mixing.Tuning`."""
    from ..compiled.mixing import Tuning

    known = Anderson
    return Tuning(gauge, known.TURN, known.CAP, known.FOLLOW, known.SHORT, known.LONG, known.NOTHING_NEW)
