"""What a GPU would be asked to launch, counted without one: operations of torch that are no views, and kernels of Triton.

A launch takes some 4 us of the host, whatever it does; a sweep over small problems takes less. So the budgets below are what an
iteration costs there. Counted in Triton's interpreter, on a pretended device. bench/FACTS.md has the table.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gpu_ot.kernels import tuning

import pretend
from gpu_ot import KL, Problem, SqEuclidean, gradients
from gpu_ot.geometry.absorbed import SURE
from gpu_ot.geometry.select import bind
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.criterion import NORMS, Marginal
from gpu_ot.solver.monitor import Monitor
from gpu_ot.solver.step import Alternating, Start
from problems import rand

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def launches():
    """What a function launches: launches(f) -> its launches and reads, the names of both, and the result."""

    def measure(function):
        before = seen.launches, seen.reads, seen.names.copy()
        result = function()
        return SimpleNamespace(
            launches=seen.launches - before[0], reads=seen.reads - before[1], names=seen.names - before[2], result=result
        )

    with pretend.device() as seen:
        yield measure


def costs(backend, batch, learnable=False):
    if backend == "triton":
        x, y = (rand(*batch, n, 3, seed=n, dtype=torch.float32).to("cuda") for n in (12, 15))
        return SqEuclidean(x.requires_grad_(learnable), y)
    return rand(*batch, 12, 15, dtype=torch.float32).to("cuda").requires_grad_(learnable)


def weights(batch):
    a, b = ((rand(*batch, n, seed=k) + 0.1).to("cuda") for k, n in ((1, 12), (2, 15)))
    return a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


#: A block of five iterations of Sinkhorn's own, and of accelerated ones; for resident it is one launch.
BLOCK = {"triton": (11, 20), "dense": (12, 25), "resident": (1, 1)}
KINDS = [(backend, penalty, batch) for backend in BLOCK for penalty, batch in ((KL(), ()), (KL(0.5), (3,)))]


@pytest.mark.parametrize("backend, penalty, batch", KINDS, ids=str)
def test_iterations(launches, backend, penalty, batch):
    """And no read between checks."""
    problem = Problem(costs(backend, batch), 0.05, *weights(batch), penalty)
    plain, mixing = Alternating(problem, problem.eps), Alternating(problem, problem.eps, Anderson(gauge=problem.balanced))
    with torch.no_grad():
        geometry = bind(problem, backend)
        state = plain.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)
        state = geometry.run(plain, state, 3)
        geometry.stride = SURE  # a kernel that has been exact for long
        own = launches(lambda: geometry.run(plain, state, 5))
        state = geometry.run(mixing, geometry.run(mixing, state, 1), 2)
        mixed = launches(lambda: geometry.run(mixing, state, 5))
        state = mixed.result
        later = launches(lambda: geometry.run(mixing, state, 5))
    assert own.launches <= BLOCK[backend][0], own.names
    assert mixed.launches <= BLOCK[backend][1], mixed.names
    assert mixed.reads + later.reads <= (backend == "dense"), (
        mixed.names,
        later.names,
    )  # dense: whether the block before the last was exact
    assert own.reads <= (backend == "dense"), own.names


def test_an_iteration_with_split_columns(launches, monkeypatch):
    """Where rows alone would leave processors idle, two launches a sweep: here for the update of 200 rows from 6200 columns."""
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    x, y = (rand(n, 3, seed=n, dtype=torch.float32).to("cuda") for n in (200, 6200))
    problem = Problem(SqEuclidean(x, y), 0.5)
    step = Alternating(problem, problem.eps, Anderson(gauge=True))
    with torch.no_grad():
        geometry = bind(problem, "triton")
        state = step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)
        state = geometry.run(step, state, 1)
        found = launches(lambda: geometry.run(step, state, 1))
    assert found.names["join_kernel"] == 1 and found.launches <= 6 and not found.reads, found.names


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_check(launches, batch, norm):
    """At most three launches, and a copy that nobody waits for until the next check."""
    problem = Problem(costs("dense", batch), 0.05, *weights(batch))
    step = Alternating(problem, problem.eps)
    monitor = Monitor(step, Marginal(1e-9, norm), torch.float32)
    with torch.no_grad():
        geometry = bind(problem, "softmin")
        state = geometry.run(step, step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None), 1)
        monitor.check(state, state)
        found = launches(lambda: monitor.check(state, state))
    assert found.launches <= 1 + bool(batch) + (norm == "l2_joint"), found.names
    assert found.reads == 0, found.names


#: Problem, bind and the first half-step.
SET_UP = {"triton": (40, 1), "dense": (40, 1), "resident": (40, 1)}
#: value and backward
VALUE = {"triton": (40, 0), "dense": (40, 2), "resident": (40, 0)}


@pytest.mark.parametrize("backend, penalty, batch", KINDS, ids=str)
def test_the_set_up(launches, backend, penalty, batch):
    cost, (a, b) = costs(backend, batch), weights(batch)

    def start():
        problem = Problem(cost, 0.05, a, b, penalty)
        step, geometry = Alternating(problem, problem.eps), bind(problem, backend)
        return step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)

    with torch.no_grad():
        found = launches(start)
    most, reads = SET_UP[backend]
    assert found.launches <= most and found.reads <= reads, found.names


@pytest.mark.parametrize("backend, penalty, batch", KINDS, ids=str)
def test_the_value_and_its_gradient(launches, backend, penalty, batch):
    cost = costs(backend, batch, learnable=True)
    problem = Problem(cost, 0.05, *weights(batch), penalty)
    geometry, step = bind(problem, backend), Alternating(problem, problem.eps)
    with torch.no_grad():
        state = geometry.run(step, step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None), 4)
    inputs = [z for z in problem.cost.inputs.values() if z.requires_grad]
    value = launches(lambda: gradients.value(problem, geometry, state.f, state.g).sum())
    back = launches(lambda: torch.autograd.grad(value.result, inputs))
    most, reads = VALUE[backend]
    assert value.launches + back.launches <= most and value.reads + back.reads <= reads, (value.names, back.names)
