"""What a call reads back from the device: every such read makes the host wait. Counted on a CPU, where the same lines run.

Budgets on the dense backend, with L checks:

    Problem(...)                     1: all checks of the input in one copy
    gpu_ot.solve(problem)            L, one a check; 1 for the start, one a stride of products on the absorbed kernel, 1 for the value
    gpu_ot.sinkhorn(...)             the gate, the solver's, and 1 for the plan
    gpu_ot.sinkhorn_unbalanced(...)  likewise; 1 for its check of +inf in M

An absorbed kernel's products are exact or are taken again, so their sums are looked at where they are used: after 1, 2, 4, ... iterations
at first, and once a stride when they hold. Accelerated iterations come one by one: where the host would wait, on a GPU, a kernel that
has been exact SURE times is from then on taken for exact; whether a block was is read once the next has been launched. There a solve reads

    gpu_ot.solve(problem)            2 L; 1 for the value, 1 for each step of an annealed eps, and 5 for each kernel that is new

(On a GPU small problems have no such kernel.)
"""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_ot
from gpu_ot.geometry.absorbed import SURE, Absorbed
from problems import pairwise

#: Whatever hands a tensor's numbers to Python, and what moves them to the host.
READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__complex__")


@contextmanager
def reads(monkeypatch):
    """How often a tensor was read, by the method that did."""
    found, inside = Counter(), [False]

    def counting(name, original):
        def call(*z, **k):
            if inside[0]:  # `bool(z)` may go through `item`: one read
                return original(*z, **k)
            found[name] += 1
            inside[0] = True
            try:
                return original(*z, **k)
            finally:
                inside[0] = False

        return call

    with monkeypatch.context() as patched:
        for name in READS:
            patched.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield found


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch):
    """As on a GPU: machine code would take these problems, whose tensors are on a CPU."""
    monkeypatch.setattr(gpu_ot.compiled, "refused", lambda: "hidden from these tests")


@pytest.fixture
def strides(monkeypatch):
    """Calls of the absorbed kernel's products, each of which ends in one read."""
    calls = []
    original = Absorbed._multiply
    monkeypatch.setattr(Absorbed, "_multiply", lambda *z: calls.append(1) or original(*z))
    return calls


def test_everything_that_reads_is_counted(monkeypatch):
    z = torch.ones(1)
    with reads(monkeypatch) as found:
        _ = float(z), int(z), bool(z), z.item(), z.tolist(), z.cpu(), z.numpy(), z.detach().double().sum().item(), [0, 1][z.long()]
        if z > 0:
            pass
    assert found.total() == 10


def test_the_gate_reads_once(problem, monkeypatch):
    a, b, M = problem(20, 15)
    with reads(monkeypatch) as found:
        gpu_ot.Problem(M, 0.05, a, b)
        gpu_ot.Problem(gpu_ot.SqEuclidean(torch.rand(20, 3), torch.rand(15, 3)), 0.05)
    assert found.total() == 2


@pytest.mark.parametrize("backend", ["dense", "softmin"])
@pytest.mark.parametrize("check_every", [1, 10, 25])
@pytest.mark.parametrize("accelerate", ["none", "mixing"])
def test_solve_reads_at_its_checks(problem, monkeypatch, strides, backend, check_every, accelerate):
    a, b, M = problem(20, 15)
    posed = gpu_ot.Problem(M, 0.02, a, b)
    with reads(monkeypatch) as found:
        done = gpu_ot.solve(posed, backend=backend, tol=1e-9, check_every=check_every, accelerate=accelerate)
    checks = len(done.errors)
    assert checks == 1 + -(-(done.n_iter - 1) // check_every) > 1
    start_and_value = 2 if backend == "dense" else 0
    assert checks <= found.total() <= checks + len(strides) + start_and_value


@pytest.fixture
def waiting(monkeypatch):
    """A CPU that is waited for like a GPU."""
    monkeypatch.setattr(Absorbed, "waits", True)


@pytest.mark.parametrize("penalty", [gpu_ot.KL(), gpu_ot.KL(0.5)], ids=str)
def test_accelerated_iterations_read_once_a_block(problem, monkeypatch, waiting, penalty):
    a, b, M = problem(60, 50)
    posed = gpu_ot.Problem(M, 0.005, a, b, penalty)
    with reads(monkeypatch) as found:
        done = gpu_ot.solve(posed, backend="dense", tol=1e-9, check_every=10, accelerate="mixing")
    assert done.status.name == "converged" and done.n_iter > 30
    value_and_a_new_kernel = 1 + 5
    assert found.total() <= 2 * len(done.errors) + value_and_a_new_kernel < done.n_iter


@pytest.mark.parametrize("penalty, accelerate, batch", pairwise([gpu_ot.KL(), gpu_ot.KL(0.5)], ["auto", "mixing"], [(), (3,)]), ids=str)
def test_inexact_products_are_taken_again(problem, monkeypatch, waiting, accelerate, penalty, batch):
    """What is not exact is NaN here: it moves nothing, is never kept, and a new kernel goes on from where the last good one stood."""
    drawn = [problem(30, 25, seed=seed) for seed in range(3)]
    a, b, M = (torch.stack(z) for z in zip(*drawn, strict=True)) if batch else drawn[0]
    posed = gpu_ot.Problem(M, 0.005, a, b, penalty)
    truth = gpu_ot.solve(posed, backend="softmin", tol=1e-9, check_every=10, accelerate=accelerate)
    kernels, original = [], Absorbed._multiply

    def failing(self, problem, g, eps, k):
        *moved, exact = original(self, problem, g, eps, k)
        if self.kernel.products not in kernels:
            kernels.append(self.kernel.products)
        # The first two kernels fail once they are trusted, and remain bad.
        return (*(z * math.nan for z in moved), exact & False) if len(kernels) < 3 and self.stride >= SURE else (*moved, exact)

    monkeypatch.setattr(Absorbed, "_multiply", failing)
    done = gpu_ot.solve(posed, backend="dense", tol=1e-9, check_every=10, accelerate=accelerate)
    assert len(kernels) >= 3 and done.status.name == "converged"
    assert done.errors.isfinite().all()
    assert done.n_iter <= truth.n_iter + 2 * 20  # up to ten iterations are lost before the host learns of either
    torch.testing.assert_close(done.plan.to_dense(), truth.plan.to_dense(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("accelerate", ["auto", "mixing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_left_behind_by_their_potentials(problem, waiting, dtype, accelerate):
    """Costs a thousand times eps: sums leave the range in earnest."""
    a, b, M = problem(40, 35, dtype=dtype)
    options = dict(tol=1e-4, check_every=10, accelerate=accelerate)
    ours, truth = (gpu_ot.solve(gpu_ot.Problem(M, 1e-3, a, b), backend=name, **options) for name in ("dense", "softmin"))
    assert ours.status == truth.status
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-4, atol=0)
    assert accelerate == "mixing" or ours.status.name == "converged"  # float32 does not always reach it


def test_sinkhorn_reads_at_its_checks(problem, monkeypatch, strides):
    a, b, M = problem(20, 15)
    for iterations in (11, 101, 201):
        strides.clear()
        with pytest.warns(UserWarning, match="did not converge"), reads(monkeypatch) as found:
            gpu_ot.sinkhorn(a, b, M, 0.01, numItermax=iterations, stopThr=0.0)
        checks = 1 + iterations // 10
        gate_start_and_plan, unconverged = 3, 2  # the size of the potentials, and the error for the warning
        assert found.total() == gate_start_and_plan + unconverged + checks + len(strides)
        assert len(strides) <= checks + 8  # one a check; 1 + 1 + 2 + 4 + 2 at first


def test_sinkhorn_unbalanced_reads_at_its_leaps(problem, monkeypatch, strides):
    a, b, M = problem(20, 15)
    totals = []
    for iterations in (100, 200):
        with reads(monkeypatch) as found:
            gpu_ot.sinkhorn_unbalanced(a, 1.3 * b, M, 0.01, 50.0, numItermax=iterations, stopThr=1e-15, accelerate=False)
        totals.append(found.total())
    assert totals[1] - totals[0] == 2 * 10  # a look ahead and a stride of products for ten iterations


class Operations(TorchDispatchMode):
    """Which operators ran, also those that others called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [z for group in args if isinstance(group, (list, tuple)) for z in group]
        masked = any(isinstance(z, torch.Tensor) and z.dtype == torch.bool for z in given)
        self.names[func.overloadpacket.__name__ + "_by_mask" * (masked and "index" in func.overloadpacket.__name__)] += 1
        return func(*args, **(kwargs or {}))


def test_no_result_has_a_shape_that_only_the_device_knows(problem):
    """Boolean masks as indices, `nonzero` and the like wait without a method of the tensor being called."""
    a, b, M = problem(20, 15)
    with Operations() as ran:
        gpu_ot.solve(gpu_ot.Problem(M, 0.02, a, b), accelerate="mixing")
        gpu_ot.sinkhorn(a, b, M, 0.05)
        gpu_ot.sinkhorn_unbalanced(a, 1.3 * b, M, 0.05, 1.0)
    assert ran.names["mm"] + ran.names["bmm"] + ran.names["mv"] > 10  # it sees the work
    waiting = {"nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero", "index_by_mask", "index_put__by_mask"}
    assert not waiting & set(ran.names)
    with Operations() as ran:
        M[M > 0.5].unique()
    assert {"index_by_mask", "_unique2"} <= set(ran.names)
