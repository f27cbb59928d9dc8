"""What an iteration does to vectors, as kernels: each against its twin in torch, in Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")

from gpu_ot.kernels import step as kernel

from gpu_ot import KL, Problem
from gpu_ot.geometry.dense import Dense
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.step import Alternating, Start
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
