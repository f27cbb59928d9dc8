"""What an iteration does to vectors, as kernels: each against its twin in torch, in Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from gpu_ot.kernels import step as kernel
from gpu_ot.kernels import tuning

from gpu_ot import KL, TV, Problem, SqEuclidean
from gpu_ot.geometry import absorbed_launches
from gpu_ot.geometry.absorbed import Absorbed
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.resident import Resident
from gpu_ot.geometry.triton import Streaming
from gpu_ot.gradients import envelope
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


@pytest.mark.parametrize(
    "n, m, batch, penalties, after, k",
    [(20, 15, (), KL(), 0, 8), (33, 70, (3,), KL(), 3, 9), (17, 40, (2,), KL(0.5), 0, 7), (40, 9, (), (KL(), KL(1.0)), 2, 8)],
    ids=str,
)
def test_a_resident_block(n, m, batch, penalties, after, k):
    """One launch for k iterations, proposals included, against single launches and proposals by torch; then another k."""
    wide = posed(n, m, batch, penalties, 0.03)
    problem = Problem(wide.cost.dense().float(), 0.03, wide.a, wide.b, penalties)
    geometry, twin = Resident(problem.cost.dense()), Resident(problem.cost.dense())
    step = Alternating(problem, problem.eps, Anderson(gauge=problem.balanced), plain_until=after)
    with torch.no_grad():
        ours = theirs = step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)
        done = None
        for _ in range(2):
            ours = geometry.run(step, replace(ours, done=done), k)
            for _ in range(k):
                torch.set_grad_enabled(True)
                g, memory = step.propose(replace(theirs, done=done))
                torch.set_grad_enabled(False)
                theirs = step.moved(twin, theirs, g, memory, 1)
            for name in ("f", "g", "g_next"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-4, atol=2e-5)
            assert (ours.n_iter, ours.age, ours.n_sweeps) == (theirs.n_iter, theirs.age, theirs.n_sweeps)
            done = torch.arange(math.prod(batch)).view(batch) == 1 if batch else None
        if batch:
            stays = geometry.run(step, replace(ours, done=done), k)
            assert torch.equal(stays.g[1], ours.g[1]) and torch.equal(stays.f[1], ours.f[1]) and not torch.equal(stays.g[0], ours.g[0])


def test_where_a_problem_is_done_its_block_is_short():
    """A launch in which all are done changes nothing, bit for bit."""
    problem = Problem(posed(12, 10, (2,), KL()).cost.dense().float(), 0.05)
    geometry, step = Resident(problem.cost.dense()), Alternating(problem, problem.eps, Anderson(gauge=True))
    with torch.no_grad():
        state = geometry.run(step, step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None), 5)
        after = geometry.run(step, replace(state, done=torch.tensor([True, True])), 5)
    for name in ("f", "g", "g_next"):
        assert torch.equal(getattr(after, name), getattr(state, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalties, batch", [(KL(), ()), (KL(0.5), (3,)), ((KL(), KL(1.0)), (2,))], ids=str)
def test_an_absorbed_iteration(monkeypatch, dtype, penalties, batch):
    """The kernel's potentials and its word on exactness against torch's; held where it was when a sum left the range."""
    monkeypatch.setattr(tuning, "processors", lambda device: 3)
    wide = posed(30, 700, batch, penalties, 0.02)
    problem = Problem(wide.cost.dense().to(dtype), 0.02, wide.a, wide.b, penalties)
    geometry = Absorbed(problem.cost)
    with torch.no_grad():
        g = geometry.first(torch.zeros_like(problem.a), problem.a, 0.02)  # of columns: any potential will do
        _, g, _ = geometry.iterate(problem, g, 0.02, 1)
        assert geometry.kernel.products is not None
        for k in (1, 3):
            expected = geometry._multiply(problem, g, 0.02, k)
            ours = absorbed_launches.iterate(geometry, problem, g, 0.02, k)
            for mine, right in zip(ours, expected, strict=True):
                tight = 1e-13 if dtype == torch.float64 else 1e-6
                torch.testing.assert_close(mine, right, rtol=tight, atol=tight)
            assert ours[3]
        products = geometry.kernel.products
        products.whole_rows = True
        s = absorbed_launches.softmin(geometry, g, problem.b, 0.02)
        products.whole_rows = False
        torch.testing.assert_close(s, geometry.update(g, problem.b, 0.02), rtol=tight, atol=tight)
        *kept, inexact = absorbed_launches.iterate(geometry, problem, g, 0.02, 1, hold=True)
        assert not inexact and torch.equal(kept[0], absorbed_launches.iterate(geometry, problem, g, 0.02, 1)[0])
        far = g.clone()
        far[(-1,) * len(batch)] -= 1e3  # of one problem
        assert not absorbed_launches.iterate(geometry, problem, far, 0.02, 1)[3] and not geometry._multiply(problem, far, 0.02, 1)[3]
        f, still, g_next, inexact = absorbed_launches.iterate(geometry, problem, far, 0.02, 1, hold=True)
        assert inexact and torch.equal(g_next, far) and torch.equal(still, far) and torch.equal(f, geometry.kernel.f0)
        assert absorbed_launches.iterate(geometry, problem, g, 0.02, 1, hold=True, inexact=inexact)[3], "what was void stays void"


@pytest.mark.parametrize("batch, penalties", [((), KL()), ((3,), KL(0.5)), ((2, 2), (KL(), TV(0.3))), ((), (TV(0.2), KL(2.0)))], ids=str)
def test_the_value_and_the_vectors_of_its_gradient(batch, penalties):
    problem = posed(13, 70, batch, penalties)
    geometry = Dense(problem.cost)
    with torch.no_grad():
        step = Alternating(problem, problem.eps)
        state = geometry.run(step, step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None), 3)
    f, g, a, b = state.f, state.g, problem.a, problem.b
    grad = rand(*batch, seed=7) + 0.5
    unneeded_b = [True, False, True]
    with torch.enable_grad():  # by torch
        D, s = envelope.dual(problem.penalties, problem.eps, geometry, f, g, a, b)
        expected = envelope.pull_dual(problem.penalties, problem.eps, geometry, f, g, a, b, s, grad, unneeded_b)
    with torch.no_grad():
        assert envelope._kinds(problem.penalties, f, g, a, b, s) is not None
        ours = envelope.dual(problem.penalties, problem.eps, geometry, f, g, a, b)
        pulled = envelope.pull_dual(problem.penalties, problem.eps, geometry, f, g, a, b, s, grad, unneeded_b)
    torch.testing.assert_close(ours, (D, s), rtol=1e-12, atol=1e-14)
    assert pulled[1] is None
    for mine, right in zip(pulled, expected, strict=True):
        if right is not None:
            torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("processors", [1, 20])
@pytest.mark.parametrize(
    "n, m, batch, penalties", [(5, 1500, (), KL()), (140, 33, (3,), KL(0.5)), (1, 7, (2, 2), (KL(), TV(0.3)))], ids=str
)
def test_a_streamed_iteration(monkeypatch, n, m, batch, penalties, processors):
    """Weights, offsets, centring and damping inside of the sweeps, split columns too, against the same around them."""
    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    x, y = (3 * rand(*batch, size, 3, seed=size, dtype=torch.float32) + 5 for size in (n, m))
    wide = posed(n, m, batch, penalties)
    problem = Problem(SqEuclidean(x, y), 0.3, wide.a, wide.b, penalties)
    ours, theirs = Streaming(problem), Streaming(problem)
    g = 0.1 * rand(*batch, m, seed=3)
    for k in (1, 3):  # from no shift, and from the last potentials
        with torch.no_grad():
            found = ours.iterate(problem, g, 0.3, k)
        expected = theirs.iterate(problem, g, 0.3, k)  # with gradients on: by torch
        for mine, right in zip(found, expected, strict=True):
            assert mine.dtype == right.dtype == torch.float64
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)
