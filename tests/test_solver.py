"""The dense solver: two forms of one algorithm, relaxed marginals held to duality, and the edges of both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_ot
from gpu_ot import KL, TV, Problem
from gpu_ot.geometry import products
from problems import measures, pairwise, rand, random_problem

TIGHT = dict(tol=1e-12, norm="l2", max_iter=5000)


def plans(a, b, M, eps, backend, iterations):
    problem = Problem(M, eps, a, b)
    return gpu_ot.solve(problem, backend=backend, tol=0.0, norm="l2", max_iter=iterations, accelerate="none").plan.to_dense()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    log_eps=st.floats(-4, 0),
    iterations=st.integers(1, 150),
    unit=st.sampled_from([1e-8, 1.0, 1e8]),
    empty=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_absorbed_and_log_domain_forms_agree_to_rounding(shape, log_eps, iterations, unit, empty, seed):
    """Down to reg = 1e-4 of the largest cost, after any number of iterations, in any units, with empty atoms."""
    M, a, b = unit * rand(*shape, seed=seed), rand(shape[0], seed=seed + 1), rand(shape[1], seed=seed + 2)
    if empty and len(a) > 1:
        a[0] = 0
    a, b = a / a.sum(), b / b.sum()
    eps = 10**log_eps * float(M.max())
    for dtype, budget in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        absorbed, readable = (plans(a, b, M.to(dtype), eps, backend, iterations) for backend in ("dense", "softmin"))
        assert (absorbed - readable).abs().max() <= budget * readable.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(problem, dtype):
    a, b, M = (z.to(dtype) for z in problem(20, 30))
    solution = gpu_ot.solve(Problem(M, 0.05, a, b), **TIGHT | dict(tol=1e-6))
    assert solution.problem.dtype == torch.float32
    assert solution.plan.to_dense().dtype == solution.value.dtype == dtype
    a, b, M = (z.double() for z in (a, b, M))
    truth = plans(a, b * a.sum() / b.sum(), M, 0.05, "softmin", 2000)
    assert (solution.plan.to_dense().double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_matrices_go_block_by_block(monkeypatch, problem, threads):
    """One read of the kernel for both products gives what two reads give, for sizes that share out unevenly too."""
    a, b, M = problem(101, 37)
    whole = plans(a, b, M, 0.01, "dense", 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name, bound in (("LONE_ENTRIES", 0), ("CACHED_BYTES", 0), ("BLOCK_BYTES", 7 * 37 * 8)):
        monkeypatch.setattr(products, name, bound)
    torch.testing.assert_close(plans(a, b, M, 0.01, "dense", 50), whole, rtol=1e-11, atol=1e-16)


def test_extreme_weights():
    """Weights from 1e-12 to 1 in float32: the small ones keep their relative accuracy."""
    a = torch.logspace(-12, 0, 13, dtype=torch.float64)
    a /= a.sum()
    M = rand(13, 13, seed=3)
    ours, truth = (plans(a, a.flip(0), *how, 2000) for how in ((M.float(), 0.05, "dense"), (M, 0.05, "softmin")))
    torch.testing.assert_close(ours.sum(1).double(), a, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-20)


def test_forbidden_pairs_and_padding(problem):
    a, b, M = problem(6, 6)
    M[0, 1:] = M[3, :2] = math.inf
    a[0] = 0.9 * b[0]
    a[1:] *= (1 - a[0]) / a[1:].sum()
    P = gpu_ot.solve(Problem(M, 0.05, a, b), **TIGHT).plan.to_dense()
    assert P.isfinite().all() and (P[M.isinf()] == 0).all()
    torch.testing.assert_close((P.sum(1), P.sum(0)), (a, b), rtol=1e-6, atol=1e-9)
    padded = torch.nn.functional.pad(M, (0, 1, 0, 2), value=math.inf)
    wide = gpu_ot.solve(Problem(padded, 0.05, torch.cat((a, a.new_zeros(2))), torch.cat((b, b.new_zeros(1)))), **TIGHT).plan.to_dense()
    torch.testing.assert_close(wide[:6, :6], P, rtol=1e-8, atol=1e-12)
    assert wide.sum() == pytest.approx(1)


def test_warm_starts_converge_at_once_and_annealing_reaches_the_same_plan(problem):
    a, b, M = problem(30, 40)
    first = gpu_ot.solve(Problem(M, 0.01, a, b), **TIGHT)
    again = gpu_ot.solve(Problem(M, 0.01, a, b), start=first.f, **TIGHT | dict(tol=1e-10))
    assert first.n_iter > 20 and again.n_iter == 1
    annealed = gpu_ot.solve(Problem(M, 0.01, a, b), schedule=gpu_ot.Anneal(1.0, 0.01), **TIGHT)
    torch.testing.assert_close(annealed.plan.to_dense(), first.plan.to_dense(), rtol=1e-8, atol=1e-12)


RELAXED = [KL(), KL(0.3), KL(30.0), TV(0.2), (KL(), TV(0.1))]


@pytest.mark.parametrize("penalty, backend", pairwise(RELAXED, ["dense", "softmin"]), ids=str)
def test_primal_and_dual_meet(problem, penalty, backend):
    """No gap between <P, C> + eps KL(P | a⊗b) + penalties and the dual value: neither can be wrong alone."""
    a, b, M = problem(15, 18)
    solution = gpu_ot.solve(Problem(M, 0.05, a, b, penalty), backend=backend, tol=1e-13, max_iter=5000)
    P, (held_a, held_b) = solution.plan.to_dense(), solution.problem.penalties

    def kl(p, q):
        return (p * (p / q).log()).sum() - p.sum() + q.sum()

    def price(p, q, held):
        return 0.0 if held.balanced else held.tau * (kl(p, q) if isinstance(held, KL) else (p - q).abs().sum())

    primal = (P * M).sum() + 0.05 * kl(P, a.unsqueeze(-1) * b) + price(P.sum(1), a, held_a) + price(P.sum(0), b, held_b)
    assert abs(float(primal - solution.value)) <= 1e-11


def test_a_dear_penalty_is_a_constraint(problem):
    a, b, M = problem(10, 12)
    hard, dear = (gpu_ot.solve(Problem(M, 0.05, a, b, KL(tau)), tol=1e-8, max_iter=10_000) for tau in (math.inf, 1e5))
    torch.testing.assert_close(dear.plan.to_dense(), hard.plan.to_dense(), rtol=1e-4, atol=1e-9)


def test_autocast_changes_nothing():
    x, y, *_ = measures(40, 30, dtype=torch.float32)
    plain = gpu_ot.solve(Problem(gpu_ot.Dot(x, y), 0.1), tol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gpu_ot.solve(Problem(gpu_ot.Dot(x, y), 0.1), tol=1e-6)
    assert cast.value.dtype == torch.float32 and torch.equal(cast.value, plain.value)


def test_autocast_reaches_no_front_door():
    """Its products would be rounded to bfloat16, and the loop would not notice."""
    a, b, M = random_problem(60, 50, dtype=torch.float32)
    doors = [
        lambda: gpu_ot.sinkhorn(a, b, M, 0.1),
        lambda: gpu_ot.sinkhorn_unbalanced(a, b, M, 0.1, 1.0),
        lambda: gpu_ot.sinkhorn2(a, b, M, 0.1),
    ]
    for door in doors:
        plain = door()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(door(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("grad", ["envelope", "implicit"])
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_autocast_reaches_no_method_of_a_solution(backend, grad):
    x, y, *_ = measures(40, 30, dtype=torch.float32)
    x.requires_grad_()

    def read():
        done = gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.5), backend=backend, grad=grad, tol=1e-6)
        P = done.plan
        return (P @ y, P.T @ x.detach(), P.to_dense(), *P.marginals, done.sharp_cost, done.transport(), done.normalized_entropy, done.value)

    plain = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = read()
    for found, expected in zip(cast, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
