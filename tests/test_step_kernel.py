"""What an iteration does to vectors, as kernels: each against its twin in torch, in Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from gpu_ot.kernels import step as kernel

from gpu_ot import KL, Problem
from gpu_ot.geometry.dense import Dense
from gpu_ot.solver.acceleration import PLAIN, Anderson
from gpu_ot.solver.criterion import Marginal
from gpu_ot.solver.monitor import Monitor
from gpu_ot.solver.step import Alternating, Start, Symmetric
from problems import rand

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]


def posed(n, m, batch, penalties, eps=0.02, seed=0):
    """A problem of this size, with empty atoms where there are others."""
    C, a, b = (rand(*batch, *size, seed=seed + k) for k, size in enumerate(((n, m), (n,), (m,))))
    a, b = a + 0.05, b + 0.05
    if m > 3:
        b[..., 1] = 0
    if n > 3:
        a[..., 2] = 0
    return Problem(C, eps, a, b / b.sum(-1, keepdim=True) * a.sum(-1, keepdim=True), penalties)


def started(problem, step):
    """The state after one iteration, with the geometry."""
    geometry = Dense(problem.cost)
    return geometry, step.advance(geometry, step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None))


def flat(problem, *vectors):
    batch = problem.shape[:-2].numel()
    return [z.reshape(batch, z.shape[-1]) for z in vectors]


def test_both_twins_have_the_same_constants():
    for name in ("TURN", "CAP", "FOLLOW", "SHORT", "LONG", "NOTHING_NEW"):
        assert getattr(kernel, name).value == getattr(Anderson, name)


CASES = [
    *((20, 15, (), KL(), 0.02, 3, 20), (37, 1, (), KL(), 0.02, 3, 3), (1, 9, (), KL(), 0.02, 3, 3), (50, 1300, (2,), KL(), 0.02, 3, 6)),
    *((30, 70, (3,), KL(0.5), 0.02, 3, 8), (30, 70, (), (KL(), KL(1.0)), 0.02, 3, 12)),
    *((40, 33, (2, 2), KL(), 0.003, 5, 30), (40, 33, (), KL(), 0.003, 1, 20)),
]


@pytest.mark.parametrize("n, m, batch, penalties, eps, memory, iterations", CASES, ids=str)
def test_the_proposal(n, m, batch, penalties, eps, memory, iterations):
    """The same g, iteration after iteration, through overshoots, restarts and a ring that is full."""
    problem = posed(n, m, batch, penalties, eps)
    accelerator = Anderson(gauge=problem.balanced, memory=memory)
    step = Alternating(problem, problem.eps, accelerator)
    geometry, state = started(problem, step)
    a, b = flat(problem, problem.a, problem.b)
    held = kernel.Memory.of(b, len(b), memory)
    taus = None if problem.balanced else tuple(penalty.tau for penalty in problem.penalties)
    for _ in range(iterations):
        g, remembered = step.propose(state)
        given = a, b, *flat(problem, state.f, state.g, state.g_next)
        ours = kernel.propose(*given, eps, held, gauge=accelerator.gauge, taus=taus).view_as(g)
        torch.testing.assert_close(ours, g, rtol=1e-11, atol=1e-13)
        state = step.moved(geometry, state, g, remembered, 1)
    assert (state.g_next - state.g)[problem.b > 0].abs().max() < 0.05


@pytest.mark.parametrize("done, inexact", [([True, False], None), (None, True), ([False, True], False)])
def test_problems_that_stay_where_they_are(done, inexact):
    problem = posed(12, 10, (2,), KL())
    _, state = started(problem, Alternating(problem, problem.eps))
    marks = [None if z is None else torch.tensor(z) for z in (done, inexact)]
    given = problem.a, problem.b, state.f, state.g, state.g_next, problem.eps
    moved, held = (
        kernel.propose(*given, kernel.Memory.of(problem.b, 2, 3), gauge=True, done=first, inexact=second)
        for first, second in ((None, None), marks)
    )
    stay = torch.tensor(done or [False, False]) | bool(inexact)
    assert not torch.equal(moved, state.g)
    assert torch.equal(held, torch.where(stay[:, None], state.g, moved))


def test_weights_shared_by_a_batch():
    problem = posed(12, 10, (), KL(0.5))
    _, state = started(problem, Alternating(problem, problem.eps))
    f, g, g_next = (torch.stack((z, z + 0.01 * torch.sin(z))) for z in (state.f, state.g, state.g_next))
    shared, own = (
        kernel.propose(a, b, f, g, g_next, problem.eps, kernel.Memory.of(g, 2, 3), gauge=False, taus=(0.5, 0.5))
        for a, b in ((problem.a, problem.b), (problem.a.expand(2, -1).contiguous(), problem.b.expand(2, -1).contiguous()))
    )
    assert torch.equal(shared, own) and math.isfinite(float(own.sum()))


class TestTheCheck:
    """`Monitor.check` by the kernel and by torch: the same best state, errors, marks and flags at every check of a run."""

    @pytest.mark.parametrize(
        "batch, penalties, norm",
        [((), KL(), "l1"), ((3,), KL(), "l1_absolute"), ((2, 2), KL(0.5), "l2"), ((3,), KL(), "l2_joint"), ((), KL(0.5), "l2_joint")],
        ids=str,
    )
    @pytest.mark.parametrize("order", ["plain", "mixing", "symmetric"])
    def test_along_a_run(self, batch, penalties, norm, order):
        problem = posed(21, 21 if order == "symmetric" else 13, batch, penalties, 0.01)
        if order == "symmetric":
            problem = Problem(problem.cost.dense() + problem.cost.dense().mT, 0.05, problem.a, problem.a, penalties)
        accelerator = PLAIN if order == "plain" else Anderson(gauge=order == "mixing" and problem.balanced)
        step = (Symmetric if order == "symmetric" else Alternating)(problem, problem.eps, accelerator)
        criterion = Marginal(1e-3, norm)
        ours, theirs = (Monitor(step, criterion, torch.float64) for _ in range(2))
        geometry, state = Dense(problem.cost), None
        with torch.no_grad():
            state = step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)
            for k in range(12):
                before, state = state, geometry.run(step, state, 1)
                state = replace(state, inexact=torch.tensor(k == 4) if k > 2 else None)
                found = criterion.check(ours, state)
                assert found is not None
                *expected, flags = theirs._check(state, before)
                for mine, right in zip(found, (*expected, flags), strict=True):
                    assert mine.dtype == right.dtype
                    torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-13)
                for monitor, (f, g, error, done) in ((ours, found[:4]), (theirs, expected)):
                    monitor.kept, monitor.done = (f, g), done
                    monitor.errors.append(error)
                state = replace(state, done=theirs.done, inexact=None)
        assert float(theirs.errors[-1].amax()) < float(theirs.errors[0].amax())

    def test_numbers_that_are_none(self):
        """Potentials that left the range are worse than any, and show in the flags when they are the first."""
        problem = posed(9, 7, (2,), KL())
        step = Alternating(problem, problem.eps)
        with torch.no_grad():
            _, state = started(problem, step)
            broken = replace(state, g_next=torch.stack((state.g_next[0] * math.nan, state.g_next[1])))
            first, second = (Monitor(step, Marginal(), torch.float32) for _ in range(2))
            *_, flags = first.criterion.check(first, broken)
            assert math.isnan(float(flags[2]))
            second.check(state, state)
            _, kept, error, _, flags = second.criterion.check(second, broken)
        assert torch.equal(kept[0], state.g[0]) and error.isfinite().all() and flags.isfinite().all()
