"""What a GPU would be asked to launch, counted without one: operations of torch that are no views, and kernels of Triton.

A launch takes some 4 us of the host, whatever it does; a sweep over small problems takes less. So the budgets below are what an
iteration costs there. Counted in Triton's interpreter, on a CPU whose branches are those of a GPU. bench/FACTS.md has the table.
"""

from collections import Counter

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from gpu_ot.kernels import tuning
from triton.runtime.interpreter import InterpretedFunction

from gpu_ot import KL, Problem, SqEuclidean, gradients
from gpu_ot.geometry.absorbed import SURE, Absorbed
from gpu_ot.geometry.products import Products
from gpu_ot.geometry.select import bind
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.criterion import NORMS, Marginal
from gpu_ot.solver.monitor import Monitor
from gpu_ot.solver.step import Alternating, Start
from problems import rand

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

aten = torch.ops.aten
#: The host waits for the numbers of the device.
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"}
#: No kernel runs.
NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "set_",
}
NOTHING |= {"scalar_tensor", "promote_types"}  # numbers on the host
#: Kernels inside of one operation, where they are more.
INSIDE = {"logsumexp": 8, "sort": 4, "median": 4, "cumsum": 2}


class Launches(TorchDispatchMode):
    """Counts while it is entered: launches and reads, and the names of both."""

    def __init__(self):
        super().__init__()
        self.launches, self.reads, self.names, self.interpreting = 0, 0, Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace != "aten" and not self.interpreting:  # an operator of our own: what it does
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if not self.interpreting and name in READS:
            self.read(name)
        elif not self.interpreting and name not in NOTHING and not is_view(func):
            self.count(name, INSIDE.get(name, 1))
        return func(*args, **(kwargs or {}))

    def count(self, name, kernels=1):
        self.launches += kernels
        self.names[name] += kernels

    def read(self, name):
        self.reads += 1
        self.names["read by " + name] += 1


def is_view(func):
    returns, given = func._schema.returns, func._schema.arguments
    written = [z for z in (*returns, *given) if z.alias_info is not None and z.alias_info.is_write]
    return not written and any(z.alias_info is not None for z in returns)


@pytest.fixture
def launches(monkeypatch):
    """What a function launches: launches(f) -> Launches, with the result in `result`."""

    def measure(function):
        counted = Launches()
        run, tolist = InterpretedFunction.run, torch.Tensor.tolist

        def kernel(self, *args, **options):
            counted.count(self.fn.__name__)
            counted.interpreting = True
            try:
                return run(self, *args, **options)
            finally:
                counted.interpreting = False

        def listed(z):
            counted.read("tolist")
            return tolist(z)

        with monkeypatch.context() as patched:
            patched.setattr(InterpretedFunction, "run", kernel)
            patched.setattr(torch.Tensor, "tolist", listed)
            with counted:
                counted.result = function()
        return counted

    return measure


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The branches that a GPU takes."""
    init = Products.__init__

    def on_chip(self, K):
        init(self, K)
        self.lone, self.whole_rows = False, True

    monkeypatch.setattr(Products, "__init__", on_chip)
    monkeypatch.setattr(Absorbed, "waits", True)


def test_everything_that_a_gpu_would_run_is_counted(launches):
    z = torch.ones(3, 4)
    found = launches(lambda: ((z + 1).exp_().T[0].sum() * 2, z.tolist(), z.sum().item(), torch.empty(3), z.view(-1), z.double()))
    assert found.launches == 6 and found.reads == 2, found.names


def costs(backend, batch, learnable=False):
    if backend == "triton":
        x, y = (rand(*batch, n, 3, seed=n, dtype=torch.float32) for n in (12, 15))
        return SqEuclidean(x.requires_grad_(learnable), y)
    return rand(*batch, 12, 15, dtype=torch.float32).requires_grad_(learnable)


def weights(batch):
    a, b = rand(*batch, 12, seed=1) + 0.1, rand(*batch, 15, seed=2) + 0.1
    return a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


#: A block of five iterations of Sinkhorn's own, and of accelerated ones; for resident it is one launch.
BLOCK = {"triton": (11, 20), "dense": (12, 25), "resident": (1, 1)}
KINDS = [(backend, penalty, batch) for backend in BLOCK for penalty, batch in ((KL(), ()), (KL(0.5), (3,)))]


@pytest.mark.parametrize("backend, penalty, batch", KINDS, ids=str)
def test_iterations(launches, like_a_gpu, backend, penalty, batch):
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
    """Where rows alone would leave processors idle, two launches a sweep."""
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    x, y = (rand(1100, 3, seed=k, dtype=torch.float32) for k in range(2))
    problem = Problem(SqEuclidean(x, y), 0.5)
    step = Alternating(problem, problem.eps, Anderson(gauge=True))
    with torch.no_grad():
        geometry = bind(problem, "triton")
        state = step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)
        state = geometry.run(step, state, 1)
        found = launches(lambda: geometry.run(step, state, 1))
    assert found.names["join_kernel"] == 2 and found.launches <= 6 and not found.reads, found.names


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_check(launches, batch, norm):
    """At most three launches, and one read: on a GPU a copy that nobody waits for until the next check."""
    problem = Problem(costs("dense", batch), 0.05, *weights(batch))
    step = Alternating(problem, problem.eps)
    monitor = Monitor(step, Marginal(1e-9, norm), torch.float32)
    with torch.no_grad():
        geometry = bind(problem, "softmin")
        state = geometry.run(step, step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None), 1)
        monitor.check(state, state)
        found = launches(lambda: monitor.check(state, state))
    assert found.launches <= 1 + bool(batch) + (norm == "l2_joint"), found.names
    assert found.reads == 1, found.names


#: Problem, bind and the first half-step.
SET_UP = {"triton": (40, 1), "dense": (40, 1), "resident": (40, 1)}
#: value and backward
VALUE = {"triton": (40, 0), "dense": (40, 2), "resident": (40, 0)}


@pytest.mark.parametrize("backend, penalty, batch", KINDS, ids=str)
def test_the_set_up(launches, like_a_gpu, backend, penalty, batch):
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
def test_the_value_and_its_gradient(launches, like_a_gpu, backend, penalty, batch):
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
