"""The dense solver: two forms of one algorithm, any type and shape, and the edges of both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_ot
from gpu_ot.geometry.absorbed import Absorbed
from gpu_ot.geometry.dense import Dense
from gpu_ot.problem import Problem

TIGHT = dict(tol=1e-12, norm="l2", max_iter=5000)


def plans(a, b, M, eps, backend, iterations):
    problem = Problem(M, eps, a, b)
    return gpu_ot.solve(problem, backend=backend, tol=0.0, norm="l2", max_iter=iterations, accelerate="none").plan.to_dense()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    log_eps=st.floats(-4, 0),
    iterations=st.integers(1, 150),
    unit=st.sampled_from([1e-8, 1.0, 1e8]),
    empty=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_absorbed_and_log_domain_forms_agree_to_rounding(n, m, log_eps, iterations, unit, empty, seed):
    """Down to reg = 1e-4 of the largest cost, after any number of iterations, in any units, with empty atoms."""
    gen = torch.Generator().manual_seed(seed)
    M = unit * torch.rand(n, m, generator=gen, dtype=torch.float64)
    a, b = torch.rand(n, generator=gen, dtype=torch.float64), torch.rand(m, generator=gen, dtype=torch.float64)
    if empty and n > 1:
        a[0] = 0
    a, b = a / a.sum(), b / b.sum()
    eps = 10**log_eps * float(M.max())
    for dtype, budget in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        cost = M.to(dtype)
        absorbed, readable = (plans(a, b, cost, eps, backend, iterations) for backend in ("dense", "softmin"))
        assert (absorbed - readable).abs().max() <= budget * readable.max()


@pytest.mark.parametrize("eps", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_float32_costs_lose_no_digits_to_the_exponent(problem, eps):
    """f / eps is of the order of 1 / eps, which float32 potentials would turn into a relative error of 1e-7 / eps."""
    a, b, M = problem(60, 50)
    M = M.float()
    truth = plans(a, b, M.double(), eps, "softmin", 200)
    ours = plans(a, b, M, eps, "dense", 200)
    assert (ours - truth).abs().max() <= 1e-5 * truth.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(problem, dtype):
    a, b, M = problem(20, 30)
    solution = gpu_ot.solve(Problem(M.to(dtype), 0.05, a.to(dtype), b.to(dtype)), **TIGHT | dict(tol=1e-6))
    assert solution.problem.dtype == torch.float32
    assert solution.plan.to_dense().dtype == solution.value.dtype == dtype
    a32, b32 = a.to(dtype).double(), b.to(dtype).double()
    truth = plans(a32, b32 * a32.sum() / b32.sum(), M.to(dtype).double(), 0.05, "softmin", 2000)
    assert (solution.plan.to_dense().double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.max()


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (1, 7, 2), (63, 1, 3), (63, 257, 3), (128, 100, 17)])
@pytest.mark.parametrize("backend", ["dense", "softmin"])
def test_softmin_is_as_accurate_as_torch(n, m, d, backend):
    """The budget is torch's own error in the same type, measured against float64."""
    gen = torch.Generator().manual_seed(n + m + d)
    M = torch.cdist(torch.randn(n, d, generator=gen), torch.randn(m, d, generator=gen)).square()
    h = torch.randn(m, generator=gen)
    truth = -0.05 * torch.logsumexp((h.double() - M.double()) / 0.05, -1)
    torchs = -0.05 * torch.logsumexp((h - M) / 0.05, -1)
    ours = (Absorbed if backend == "dense" else Dense)(M).softmin(h.double(), 0.05)
    assert (ours - truth).abs().max() <= 2 * (torchs.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_softmin_of_softmins_is_a_softmin(pieces):
    C, h = torch.rand(7, 23, dtype=torch.float64), torch.randn(23, dtype=torch.float64)
    parts = [Dense(C[:, k]).softmin(h[k], 0.1) for k in torch.arange(23).chunk(pieces)]
    joined = Dense(torch.stack(parts, -1)).softmin(torch.zeros(len(parts), dtype=torch.float64), 0.1)
    torch.testing.assert_close(joined, Dense(C).softmin(h, 0.1))


def test_apply_is_the_derivative_of_softmin():
    C, h = torch.rand(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64, requires_grad=True)
    geometry, v = Dense(C), torch.randn(8, dtype=torch.float64)
    s = -0.3 * torch.logsumexp((h - C) / 0.3, -1)
    (derivative,) = torch.autograd.functional.jvp(lambda h: -0.3 * torch.logsumexp((h - C) / 0.3, -1), h.detach(), v)[1:]
    torch.testing.assert_close(-geometry.apply(s.detach(), h.detach(), 0.3, v.unsqueeze(-1)).squeeze(-1), derivative)
    torch.testing.assert_close(geometry.softmin(h.detach(), 0.3), s.detach())


@pytest.mark.parametrize("backend", ["dense", "softmin"])
def test_batches_are_solved_like_each_of_their_problems(problem, backend):
    ours = [problem(12, 9, seed=s) for s in range(4)]
    a, b, M = (torch.stack(z).reshape(2, 2, *z[0].shape) for z in zip(*ours, strict=True))
    batch = gpu_ot.solve(Problem(M, 0.02, a, b), backend=backend, **TIGHT)
    for k, (ak, bk, Mk) in enumerate(ours):
        one = gpu_ot.solve(Problem(Mk, 0.02, ak, bk), backend=backend, **TIGHT)
        i, j = divmod(k, 2)
        torch.testing.assert_close(batch.plan.to_dense()[i, j], one.plan.to_dense(), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(batch.value[i, j], one.value)
    assert batch.converged.shape == (2, 2) and batch.converged.all()


def test_many_weights_over_one_cost(problem):
    a, _, M = problem(12, 9)
    weights = torch.rand(5, 9, dtype=torch.float64) + 0.01
    weights /= weights.sum(-1, keepdim=True)
    batch = gpu_ot.solve(Problem(M, 0.02, a, weights), **TIGHT)
    for k, b in enumerate(weights):
        one = gpu_ot.solve(Problem(M, 0.02, a, b), **TIGHT)
        torch.testing.assert_close(batch.plan.to_dense()[k], one.plan.to_dense(), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_matrices_go_block_by_block(monkeypatch, problem, threads):
    """One read of the kernel for both products gives what two reads give, for sizes that share out unevenly too."""
    from gpu_ot.geometry import products

    a, b, M = problem(101, 37)
    whole = plans(a, b, M, 0.01, "dense", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(products, "LONE_ENTRIES", 0)
    monkeypatch.setattr(products, "CACHED_BYTES", 0)
    monkeypatch.setattr(products, "BLOCK_BYTES", 7 * 37 * 8)
    torch.testing.assert_close(plans(a, b, M, 0.01, "dense", 50), whole, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset, scale", [(1e4, 1.0), (0.0, 1e-6), (0.0, 1e6)])
def test_far_off_centre_clouds_and_extreme_units(dtype, offset, scale):
    gen = torch.Generator().manual_seed(0)
    x, y = (scale * torch.rand(n, 3, generator=gen, dtype=torch.float64) for n in (40, 50))
    x, y = (x + offset).to(dtype), (y + offset).to(dtype)
    shift = x.double().mean(0)
    truth = gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x.double() - shift, y.double() - shift), 0.02 * scale**2), **TIGHT)
    ours = gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.02 * scale**2), **TIGHT | dict(tol=1e-7))
    assert (ours.plan.to_dense() - truth.plan.to_dense()).abs().max() <= 2e-5 * truth.plan.to_dense().max()


def test_extreme_weights():
    """Weights from 1e-12 to 1 in float32: the small ones keep their relative accuracy."""
    a = torch.logspace(-12, 0, 13, dtype=torch.float64)
    a /= a.sum()
    M = torch.rand(13, 13, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = plans(a, a.flip(0), M, 0.05, "softmin", 2000)
    ours = plans(a, a.flip(0), M.float(), 0.05, "dense", 2000)
    torch.testing.assert_close(ours.sum(1).double(), a, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-20)


def test_forbidden_pairs_and_padding(problem):
    a, b, M = problem(6, 6)
    M = M.clone()
    M[0, 1:] = M[3, :2] = math.inf
    a[0] = 0.9 * b[0]
    a[1:] *= (1 - a[0]) / a[1:].sum()
    P = gpu_ot.solve(Problem(M, 0.05, a, b), **TIGHT).plan.to_dense()
    assert P.isfinite().all() and (P[M.isinf()] == 0).all()
    torch.testing.assert_close(P.sum(1), a)
    torch.testing.assert_close(P.sum(0), b, rtol=1e-6, atol=1e-9)

    padded = torch.full((8, 7), math.inf, dtype=torch.float64)
    padded[:6, :6] = M
    wide = gpu_ot.solve(Problem(padded, 0.05, torch.cat((a, a.new_zeros(2))), torch.cat((b, b.new_zeros(1)))), **TIGHT)
    torch.testing.assert_close(wide.plan.to_dense()[:6, :6], P, rtol=1e-8, atol=1e-12)
    assert wide.plan.to_dense().sum() == pytest.approx(1)


def test_single_points_and_equal_costs():
    assert gpu_ot.solve(Problem(torch.tensor([[3.0]]), 0.1)).plan.to_dense().item() == 1
    P = gpu_ot.solve(Problem(torch.full((4, 5), 7.0, dtype=torch.float64), 1e-4)).plan.to_dense()
    torch.testing.assert_close(P, torch.full((4, 5), 1 / 20, dtype=torch.float64))


def test_the_lazy_plan_is_the_plan(problem):
    a, b, M = problem(11, 8)
    solution = gpu_ot.solve(Problem(M, 0.05, a, b), **TIGHT)
    P, v = solution.plan.to_dense(), torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(solution.plan @ v, P @ v)
    torch.testing.assert_close(solution.plan.T @ P[:, 0], P.mT @ P[:, 0])
    torch.testing.assert_close(solution.plan.T.to_dense(), P.mT)
    for marginal, weights in zip(solution.plan.marginals, (a, b), strict=True):
        torch.testing.assert_close(marginal, weights, rtol=1e-9, atol=1e-12)
    assert solution.plan.shape == (11, 8)


def test_warm_starts_converge_at_once(problem):
    a, b, M = problem(30, 30)
    first = gpu_ot.solve(Problem(M, 0.01, a, b), **TIGHT)
    again = gpu_ot.solve(Problem(M, 0.01, a, b), start=first.f, **TIGHT | dict(tol=1e-10))
    assert first.n_iter > 20 and again.n_iter == 1


def test_annealing_reaches_the_same_plan(problem):
    a, b, M = problem(30, 40)
    plain = gpu_ot.solve(Problem(M, 0.01, a, b), **TIGHT)
    annealed = gpu_ot.solve(Problem(M, 0.01, a, b), schedule=gpu_ot.Anneal(1.0, 0.01), **TIGHT)
    torch.testing.assert_close(annealed.plan.to_dense(), plain.plan.to_dense(), rtol=1e-8, atol=1e-12)


def test_asking_for_the_exception(problem):
    a, b, M = problem(30, 30)
    with pytest.raises(gpu_ot.NotConverged, match="raise max_iter"):
        gpu_ot.solve(Problem(M, 1e-3, a, b), max_iter=3).raise_unless_converged()
    assert gpu_ot.solve(Problem(M, 0.1, a, b)).raise_unless_converged().converged
