"""A user's own LazyTensor as the cost, against the same formula as a stored matrix in float64.

All tests share one formula, whose reductions and derivatives KeOps compiles once each.
"""

import contextlib
import importlib.util
import io
import math
from typing import Any

import pytest
import torch

import gpu_ot
from conformance import COSTS, Conformance
from gpu_ot import BackendError, Matrix, Plan, ProblemError, SqEuclidean, unbalanced
from gpu_ot.costs import Lazy
from gpu_ot.geometry import keops
from gpu_ot.geometry.keops import Keops
from gpu_ot.geometry.select import bind
from gpu_ot.problem import Problem
from problems import clouds, rand, randn, weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or keops.compiler() is None, reason="KeOps needs pykeops and a C++ compiler"
)


def LazyTensor(*given):
    with contextlib.redirect_stdout(io.StringIO()):
        from pykeops.torch import LazyTensor
    return LazyTensor(*given)


def formula(x_i, y_j, w):
    """A weighted Manhattan distance and a squared one: each cloud twice, a parameter, a constant."""
    return ((x_i - y_j).abs() * w).sum(-1) + 0.5 * ((x_i - y_j) ** 2).sum(-1)


def lazy(x, y, w):
    return formula(LazyTensor(x.unsqueeze(-2)), LazyTensor(y.unsqueeze(-3)), w)


def stored(x, y, w):
    return formula(x.unsqueeze(-2), y.unsqueeze(-3), w)


def given(n=63, m=57, dtype=torch.float64):
    """Two clouds and the parameter."""
    return [z.to(dtype) for z in (*clouds(n, m), rand(3))]


#: With empty atoms, the first among them.
A, B = weights(63, empty=1), weights(57, empty=3)


@pytest.mark.slow
class TestLazy(Conformance):
    """The suite of all backends, in the points."""

    backend, costs, batches = "keops", ("lazy",), ()
    sizes = ((63, 57, 3), (1, 5, 3), (5, 1, 3), (1, 1, 3))
    drifts = True  # the user's own formula is float32 to the end

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        def with_parameter(cost):
            return lambda x, y: cost(x, y, rand(3).to(x))

        monkeypatch.setitem(COSTS, "lazy", (with_parameter(lambda *z: Lazy(lazy(*z))), with_parameter(formula)))


def test_a_solve_is_that_of_the_matrix():
    x, y, w = given()
    options: dict[str, Any] = dict(tol=0.0, max_iter=40, accelerate="none")
    ours = gpu_ot.solve(Problem(Lazy(lazy(x, y, w)), 0.1, A, B), backend="keops", **options)
    truth = gpu_ot.solve(Problem(stored(x, y, w), 0.1, A, B), backend="softmin", **options)
    torch.testing.assert_close((ours.value, ours.f, ours.g), (truth.value, truth.f, truth.g), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [gpu_ot.KL(), gpu_ot.KL(1.0)], ids=["balanced", "KL"])
@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4), (1,), (2,)], ids=["all", "y", "parameter"])
def test_value_plan_and_gradients_in_what_asks_for_them(penalty, wanted):
    """The points, the parameter, the weights."""

    def run(cost, backend):
        x, y, w, a, b = inputs = [z.clone().requires_grad_(k in wanted) for k, z in enumerate((*given(), A, B))]
        solution = gpu_ot.solve(Problem(cost(x, y, w), 0.1, a, b, penalty), backend=backend, tol=1e-13, max_iter=5000)
        return solution, torch.autograd.grad(solution.value, [inputs[k] for k in wanted])

    (ours, found), (truth, expected) = run(lambda *z: Lazy(lazy(*z)), "keops"), run(stored, "softmin")
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-7, atol=1e-10)
    if not penalty.balanced:  # potentials, and gradients in the weights, that have no gauge
        torch.testing.assert_close((ours.f, ours.g, *found[3:]), (truth.f, truth.g, *expected[3:]), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_the_matrix_and_parts_of_it(monkeypatch):
    x, y, w = (z.requires_grad_() for z in given())
    cost, C = Lazy(lazy(x, y, w)), stored(x, y, w)
    atol = 1e-14 * float(C.detach().max())
    torch.testing.assert_close(cost.dense(), C, rtol=0, atol=atol)
    torch.testing.assert_close(cost.T.dense(), C.mT, rtol=0, atol=atol)
    G = randn(*C.shape)
    torch.testing.assert_close(torch.autograd.grad(cost.dense(), (x, y, w), G), torch.autograd.grad(C, (x, y, w), G))
    rows, columns = torch.tensor([3, 3, 61]), slice(2, None, 7)
    torch.testing.assert_close(cost.part(rows, columns).dense(), C[rows, columns])
    torch.testing.assert_close(cost.part(slice(4, 5), slice(None)).dense(), C[4:5])
    torch.testing.assert_close(cost.scale("std"), C.std(correction=0).detach())
    monkeypatch.setattr("gpu_ot.costs.base.BLOCK", 5000)  # several strips
    torch.testing.assert_close(cost.dense(), C, rtol=0, atol=atol)
    alone = Lazy(lazy(x[:1], y, w))  # to KeOps, a lone row is a parameter
    torch.testing.assert_close(alone.part(torch.zeros(4, dtype=torch.long), slice(1, 3)).dense(), C[:1, 1:3].expand(4, 2))


@pytest.mark.slow
def test_a_sum_with_another_cost():
    x, y, w = given()
    solve = lambda cost, backend: gpu_ot.solve(Problem(cost, 0.1), backend=backend, tol=1e-12)  # noqa: E731
    ours = solve(Lazy(lazy(x, y, w)) + 0.5 * SqEuclidean(x, y), "keops")
    truth = solve(Matrix(stored(x, y, w) + 0.5 * torch.cdist(x, y).square()), "softmin")
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_pots_names_take_it_and_return_a_lazy_plan():
    z, a, b = given(), A, B
    M, C = lazy(*z), stored(*z)
    options: dict[str, Any] = dict(reg=0.1, stopThr=1e-11)
    plan, expected = gpu_ot.sinkhorn(a, b, M, **options), gpu_ot.sinkhorn(a, b, C, **options)
    assert isinstance(plan, Plan)
    v = torch.ones(63, 2, dtype=torch.float64)
    found, truth = ((P[3:9, ::4], P.T[:2]) for P in (plan, expected))
    torch.testing.assert_close((plan.to_dense(), *found), (expected, *truth), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(plan.T @ v, expected.mT @ v, rtol=1e-8, atol=1e-12)
    i, j = plan.sample(50)
    assert bool((expected[i, j] > 0).all())
    torch.testing.assert_close(gpu_ot.sinkhorn2(a, b, M, **options), gpu_ot.sinkhorn2(a, b, C, **options), rtol=1e-8, atol=0)
    for relaxed in (None, 1.0):
        ours, truth = (gpu_ot.pot.solve(cost, a, b, reg=0.1, unbalanced=relaxed, tol=1e-11) for cost in (M, C))
        torch.testing.assert_close((ours.value, ours.value_linear), (truth.value, truth.value_linear), rtol=1e-6, atol=1e-9)
        assert ours.plan is None and isinstance(ours.lazy_plan, Plan)
    numpys = gpu_ot.sinkhorn(a.numpy(), b.numpy(), M, **options)
    assert (numpys @ v[:57].numpy()).shape == (63, 2)


@pytest.mark.slow
def test_derivatives_through_pots_name_and_second_ones_of_the_matrix():
    def loss(cost):
        leaves = [z.requires_grad_() for z in given()]
        return torch.autograd.grad(gpu_ot.sinkhorn2(A, B, cost(*leaves), 0.1, stopThr=1e-11), leaves)

    def matrix(cost):
        leaves = [z.requires_grad_() for z in given(5, 4)]
        (first,) = torch.autograd.grad(cost(*leaves).square().sum(), leaves[2:], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    torch.testing.assert_close(loss(lazy), loss(stored), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(matrix(lambda *z: Lazy(lazy(*z)).dense()), matrix(stored), rtol=1e-9, atol=1e-9)


def test_keops_takes_it_and_the_others_say_why_not():
    problem = Problem(Lazy(lazy(*given())), 0.1)
    assert isinstance(bind(problem), Keops)
    for backend, why in (("chunked", "LazyTensor"), ("triton", "float32|fold|GPU")):
        with pytest.raises(BackendError, match=f'backend "{backend}" cannot serve this problem: .*({why})'):
            bind(problem, backend)
    assert "LazyTensor" in gpu_ot.explain(problem)
    with pytest.raises(ProblemError, match=r"unbalanced=reg_m"):
        unbalanced.sinkhorn_unbalanced(None, None, lazy(*given()), 0.1, 1.0)


def test_inputs_are_the_tensors_behind_it_each_once():
    x, y, w = given()
    cost = Lazy(lazy(x.requires_grad_(), y, w))
    assert list(cost.inputs) == ["C.variables[0]", "C.variables[1]", "C.variables[2]"] and cost.shape == (63, 57)
    for z, held in zip((x, y, w), cost.inputs.values(), strict=True):
        assert torch.equal(z, held) and z.requires_grad == held.requires_grad
    assert cost.T.shape == (57, 63) and cost.part(slice(4), slice(1, None)).shape == (4, 56)
    twin = cost.of([x, x[:57], w])  # the same storage on both sides stays two variables
    assert len(twin.inputs) == 3 and Problem(cost, 0.1).dtype == torch.float64
    assert Problem(cost.to(torch.float32), 0.1).given_dtype == torch.float32


def test_what_is_refused_says_why():
    x, y, w = given()
    C = lazy(x, y, w)
    x_i, y_j = LazyTensor(x[:, None, :]), LazyTensor(y[None, :, :])
    with contextlib.redirect_stdout(io.StringIO()):
        from pykeops.numpy import LazyTensor as NumpyLazyTensor
    numpys = ((NumpyLazyTensor(x.numpy()[:, None, :]) - NumpyLazyTensor(y.numpy()[None, :, :])) ** 2).sum(-1)
    batch = ((LazyTensor(x.expand(2, -1, -1)[:, :, None]) - LazyTensor(y.expand(2, -1, -1)[:, None])) ** 2).sum(-1)
    waiting = C.sum(1, call=False)
    for found, why in (
        (numpys, r"pykeops\.torch"),
        (batch, r"shape \(2, 63, 57\) with batch axes"),
        (x_i - y_j, r"shape \(63, 57, 3\), 3 numbers per pair .*C\.sum\(-1\)"),
        (waiting, "waits for a reduction"),
        (C * math.inf, "a constant that is not finite"),
        (x_i.exp1j().sum(-1), "complex"),
        (C + LazyTensor((0, 1, 0)), "symbolic"),
        (stored(x, y, w), "found Tensor"),
    ):
        with pytest.raises(ProblemError, match=why):
            Lazy(found)
    for found, why in ((numpys, r"pykeops\.torch"), (batch, "batch axes"), (x_i - y_j, "3 numbers per pair")):
        with pytest.raises(ProblemError, match=why):
            gpu_ot.sinkhorn(None, None, found, 0.1)
    x[5, 1] = math.nan
    with pytest.raises(ProblemError, match=r"C\.variables\[0\] .*NaN .* 1 of its entries"):
        Problem(Lazy(C), 0.1)
    with pytest.raises(ProblemError, match=r"a has shape \(62,\)"):
        Problem(Lazy(lazy(*given())), 0.1, a=torch.ones(62))
    with pytest.raises(BackendError, match=r"one problem at a time"):
        bind(Problem(Lazy(lazy(*given())), 0.1, a=torch.ones(2, 63) / 63), "keops")
