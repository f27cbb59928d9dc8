"""A user's own LazyTensor as the cost, against the same formula as a stored matrix in float64.

All tests share one formula, whose reductions and derivatives KeOps compiles once each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from typing import Any

import pytest
import torch

import gpu_ot
from gpu_ot import BackendError, Matrix, Plan, ProblemError, SqEuclidean, unbalanced
from gpu_ot.costs import Lazy
from gpu_ot.geometry import keops
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.keops import Keops
from gpu_ot.geometry.select import bind
from gpu_ot.problem import Problem

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or keops.compiler() is None, reason="KeOps needs pykeops and a C++ compiler"
)

SIZE = 63, 57, 3


def LazyTensor(*given):
    with contextlib.redirect_stdout(io.StringIO()):
        from pykeops.torch import LazyTensor
    return LazyTensor(*given)


def formula(x_i, y_j, w):
    """A weighted Manhattan distance and a squared one: each cloud twice, a parameter, a constant."""
    return ((x_i - y_j).abs() * w).sum(-1) + 0.5 * ((x_i - y_j) ** 2).sum(-1)


def lazy(x, y, w):
    return formula(LazyTensor(x[:, None, :]), LazyTensor(y[None, :, :]), w)


def stored(x, y, w):
    return formula(x[:, None, :], y[None, :, :], w)


def given(n, m, d, dtype=torch.float64):
    """Two clouds and the parameter."""
    gen = torch.Generator().manual_seed(n + m + d)
    x, y = (torch.randn(k, d, generator=gen, dtype=torch.float64) for k in (n, m))
    return x.to(dtype), y.to(dtype), torch.rand(d, generator=gen, dtype=torch.float64).to(dtype)


def weights(n, m):
    """Two histograms with empty atoms, the first among them."""
    gen = torch.Generator().manual_seed(4)
    a, b = (torch.rand(k, generator=gen, dtype=torch.float64) for k in (n, m))
    a[0] = b[:3] = 0
    return a / a.sum(), b / b.sum()


def potentials(C, eps):
    """Row and column vectors as the loop makes them, some atoms empty."""
    h = 0.3 * C.max() * torch.randn(C.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if len(h) > 2:
        h[0] = h[len(h) // 2] = -math.inf
    return Dense(C).softmin(h, eps), h


def test_a_solve_is_that_of_the_matrix():
    a, b = weights(*SIZE[:2])
    x, y, w = given(*SIZE)
    options: dict[str, Any] = dict(tol=0.0, max_iter=40, accelerate="none")
    ours = gpu_ot.solve(Problem(Lazy(lazy(x, y, w)), 0.1, a, b), backend="keops", **options)
    truth = gpu_ot.solve(Problem(stored(x, y, w), 0.1, a, b), backend="softmin", **options)
    torch.testing.assert_close((ours.value, ours.f, ours.g), (truth.value, truth.f, truth.g), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [gpu_ot.KL(), gpu_ot.KL(1.0)], ids=["balanced", "KL"])
def test_value_plan_and_gradients_in_points_weights_and_parameter(penalty):
    def run(cost, backend):
        x, y, w, a, b = leaves = [z.clone().requires_grad_() for z in (*given(*SIZE), *weights(*SIZE[:2]))]
        solution = gpu_ot.solve(Problem(cost(x, y, w), 0.1, a, b, penalty), backend=backend, tol=1e-13, max_iter=5000)
        return solution, torch.autograd.grad(solution.value, leaves)

    (ours, found), (truth, expected) = run(lambda *z: Lazy(lazy(*z)), "keops"), run(stored, "softmin")
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-7, atol=1e-10)
    if not penalty.balanced:  # potentials, and gradients in the weights, that have no gauge
        torch.testing.assert_close((ours.f, ours.g, *found[3:]), (truth.f, truth.g, *expected[3:]), rtol=1e-7, atol=1e-9)
    v = torch.randn(57, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours.plan @ v, truth.plan @ v, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(ours.plan.to_dense(), truth.plan.to_dense(), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("size", [SIZE, (1, 5, 3), (5, 1, 3), (1, 1, 3)], ids=str)
def test_both_verbs_both_ways(size, sharpness):
    x, y, w = given(*size)
    n, m, d = size
    C = stored(x, y, w)
    ours, truth, eps = Keops(Lazy(lazy(x, y, w))), Dense(C), sharpness * float(C.max())
    k, h = potentials(C, eps)
    v = torch.randn(m, 1 + d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, atol = v.new_ones(n, 1), 1e-12 * float(C.max())
    both = [(g.softmin(h, eps), g.T.softmin(k, eps), g.T.T.softmin(h, eps)) for g in (ours, truth)]
    torch.testing.assert_close(*both, rtol=0, atol=atol)
    both = [(g.apply(k, h, eps, v), g.T.apply(h, k, eps, u)) for g in (ours, truth)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.T.plan(h, k, eps), truth.T.plan(h, k, eps), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [(True, True, True), (False, True, False), (False, False, True)], ids=["all", "y", "parameter"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_pull_back_reaches_what_asks_for_it(transposed, asked):
    leaves = [z.requires_grad_(wanted) for z, wanted in zip(given(*SIZE), asked, strict=True)]
    C, geometry = stored(*leaves), Keops(Lazy(lazy(*leaves)))
    eps = 0.1 * float(C.detach().max())
    k, h = potentials(C.detach(), eps)
    if transposed:
        k, h, C, geometry = h, k, C.mT, geometry.T
    w = torch.randn(k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = [z for z in leaves if z.requires_grad]
    expected = torch.autograd.grad(C, wanted, Dense(C.detach()).pull_back(k, h, eps, w)[0])
    pairs = list(zip(geometry.inputs, geometry.pull_back(k, h, eps, w), strict=True))
    assert all(not grad.any() for z, grad in pairs if not z.requires_grad)
    reached = [(z, grad) for z, grad in pairs if z.requires_grad]
    found = torch.autograd.grad([z for z, _ in reached], wanted, [grad for _, grad in reached])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 0.05, 1e-3])
def test_float32_stays_and_is_as_accurate_as_torch(sharpness):
    """The budget is torch's own error in the same type, measured against float64."""
    z = given(*SIZE, dtype=torch.float32)
    exact, C = stored(*(each.double() for each in z)), stored(*z)
    eps = sharpness * float(exact.max())
    k, h = potentials(exact, eps)
    truth, geometry, v = Dense(exact), Keops(Lazy(lazy(*z))), torch.ones(57, 1)
    assert geometry.dtype == torch.float32
    torchs = -eps * torch.logsumexp((h.float() - C) / eps, -1), ((k.float().unsqueeze(-1) + h.float() - C) / eps).exp() @ v
    ours, exactly = ((g.softmin(h, eps), g.apply(k, h, eps, v.double())) for g in (geometry, truth))
    for found, peer, right in zip(ours, torchs, exactly, strict=True):
        allowed = 2 * float((peer.double() - right).abs().max()) + 1e-6
        assert found.dtype == torch.float64 and float((found - right).abs().max()) <= allowed
    solution = gpu_ot.solve(Problem(Lazy(lazy(*z)), 0.1), backend="keops")
    assert solution.value.dtype == torch.float32 and solution.f.dtype == torch.float64 and bool(solution.converged)


@pytest.mark.slow
def test_the_matrix_and_parts_of_it(monkeypatch):
    x, y, w = (z.requires_grad_() for z in given(*SIZE))
    cost, C = Lazy(lazy(x, y, w)), stored(x, y, w)
    atol = 1e-14 * float(C.detach().max())
    torch.testing.assert_close(cost.dense(), C, rtol=0, atol=atol)
    torch.testing.assert_close(cost.T.dense(), C.mT, rtol=0, atol=atol)
    G = torch.randn(C.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
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
    x, y, w = given(*SIZE)
    solve = lambda cost, backend: gpu_ot.solve(Problem(cost, 0.1), backend=backend, tol=1e-12)  # noqa: E731
    ours = solve(Lazy(lazy(x, y, w)) + 0.5 * SqEuclidean(x, y), "keops")
    truth = solve(Matrix(stored(x, y, w) + 0.5 * torch.cdist(x, y).square()), "softmin")
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_pots_names_take_it_and_return_a_lazy_plan():
    a, b = weights(*SIZE[:2])
    z = given(*SIZE)
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
        leaves = [z.requires_grad_() for z in given(*SIZE)]
        return torch.autograd.grad(gpu_ot.sinkhorn2(*weights(*SIZE[:2]), cost(*leaves), 0.1, stopThr=1e-11), leaves)

    def matrix(cost):
        leaves = [z.requires_grad_() for z in given(5, 4, 3)]
        (first,) = torch.autograd.grad(cost(*leaves).square().sum(), leaves[2:], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    torch.testing.assert_close(loss(lazy), loss(stored), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(matrix(lambda *z: Lazy(lazy(*z)).dense()), matrix(stored), rtol=1e-9, atol=1e-9)


def test_keops_takes_it_and_the_others_say_why_not():
    problem = Problem(Lazy(lazy(*given(*SIZE))), 0.1)
    assert isinstance(bind(problem), Keops)
    for backend, why in (("chunked", "LazyTensor"), ("triton", "float32|fold|GPU")):
        with pytest.raises(BackendError, match=f'backend "{backend}" cannot serve this problem: .*({why})'):
            bind(problem, backend)
    assert "LazyTensor" in gpu_ot.explain(problem)
    with pytest.raises(ProblemError, match=r"unbalanced=reg_m"):
        unbalanced.sinkhorn_unbalanced(None, None, lazy(*given(*SIZE)), 0.1, 1.0)


def test_inputs_are_the_tensors_behind_it_each_once():
    x, y, w = given(*SIZE)
    cost = Lazy(lazy(x.requires_grad_(), y, w))
    assert list(cost.inputs) == ["C.variables[0]", "C.variables[1]", "C.variables[2]"] and cost.shape == (63, 57)
    for z, held in zip((x, y, w), cost.inputs.values(), strict=True):
        assert torch.equal(z, held) and z.requires_grad == held.requires_grad
    assert cost.T.shape == (57, 63) and cost.part(slice(4), slice(1, None)).shape == (4, 56)
    twin = cost.of([x, x[:57], w])  # the same storage on both sides stays two variables
    assert len(twin.inputs) == 3 and Problem(cost, 0.1).dtype == torch.float64
    assert Problem(cost.to(torch.float32), 0.1).given_dtype == torch.float32


def test_what_is_refused_says_why():
    x, y, w = given(*SIZE)
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
        Problem(Lazy(lazy(*given(*SIZE))), 0.1, a=torch.ones(62))
    with pytest.raises(BackendError, match=r"one problem at a time"):
        bind(Problem(Lazy(lazy(*given(*SIZE))), 0.1, a=torch.ones(2, 63) / 63), "keops")
