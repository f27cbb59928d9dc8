"""The debiased divergence: its definition, its gradients in float64, its sign, and self terms in few passes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_ot import KL, TV, Cosine, Dot, Euclidean, Formula, Matrix, NotConverged, Problem, ProblemError, SqEuclidean
from gpu_ot.losses.divergence import divergence, self_term
from gpu_ot.solve import solve
from problems import differences, first, leaves, measures, pairwise, rand, randn, second

BACKENDS = ["dense", "chunked", "softmin"]
PENALTIES = [KL(), KL(0.3), TV(0.3), (KL(), KL(0.2))]


def fitting(a, b, penalty):
    """Masses as the penalty needs them: hard on both sides, they must be the same."""
    return (a, b * (a.sum() / b.sum())) if penalty == KL() else (a, b)


def assert_differences_agree(value, inputs):
    """Each input's gradient along a random direction, to 1e-6 of the gradient's size."""
    for k, grad in enumerate(first(value, inputs)):
        v = randn(*grad.shape, seed=7 + k)
        (truth,) = differences(lambda z: [float(value(*z))], [(z, v if i == k else 0 * z) for i, z in enumerate(inputs)], 1e-3)
        assert abs(truth - float((grad * v).sum())) <= 1e-6 * float(grad.norm() * v.norm() / v.numel() ** 0.5) + 1e-10, k


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_definition(backend, penalty):
    """S = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps/2 (|a| - |b|)^2, each term by the ordinary loop."""
    x, y, a, b = measures(30, 20)
    a, b = fitting(a, b, penalty)
    pair = penalty if isinstance(penalty, tuple) else (penalty, penalty)

    def cost(p, q, w, v, held):
        return solve(Problem(SqEuclidean(p, q), 0.05, w, v, held), tol=1e-10, backend="softmin").value

    own = cost(x, x, a, a, pair[0]) + cost(y, y, b, b, pair[1])
    truth = cost(x, y, a, b, pair) - own / 2 + 0.05 / 2 * (a.sum() - b.sum()).square()
    found = divergence(Problem(SqEuclidean(x, y), 0.05, a, b, penalty), tol=1e-9, backend=backend)
    assert bool(found.converged) and found.status.name == "converged"
    torch.testing.assert_close(found.value, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("penalty, kind, backend", pairwise(PENALTIES, [SqEuclidean, Euclidean, Cosine], ["dense", "chunked"]), ids=str)
def test_gradients(backend, kind, penalty):
    """In the points and the weights, through both sides of the self terms: central differences in float64."""

    def value(x, y, a, b):
        a, b = fitting(a, b, penalty)
        found = divergence(Problem(kind(x, y), 0.1, a, b, penalty), tol=1e-11, backend=backend)
        assert bool(found.converged)
        return found.value

    assert_differences_agree(value, measures())


def test_gradients_reach_each_cloud_of_a_sum():
    x, y, a, _ = measures(6, 5)
    u, v = measures(6, 5, d=3, seed=1)[:2]

    def value(x, y, u, v):
        cost = 0.7 * SqEuclidean(x, y) + 0.3 * Euclidean(u, v)
        return divergence(Problem(cost, 0.1, a / a.sum()), tol=1e-11).value

    assert_differences_agree(value, (x, y, u, v))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_matrices_bring_their_costs_within(penalty):
    x, y, a, b = measures()
    a, b = fitting(a, b, penalty)
    C_xy, C_xx, C_yy = (SqEuclidean(p, q).dense().clone().requires_grad_() for p, q in ((x, y), (x, x), (y, y)))
    x.requires_grad_()
    found = divergence(Problem(C_xy, 0.1, a, b, penalty), cost_aa=C_xx, cost_bb=Matrix(C_yy), tol=1e-10)
    whole = divergence(Problem(SqEuclidean(x, y), 0.1, a, b, penalty), tol=1e-10)
    torch.testing.assert_close(found.value, whole.value, rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(found.value, (C_xy, C_xx, C_yy))
    P = found.plan.to_dense()
    torch.testing.assert_close(grads[0], P)
    # dS/dx_i = sum_j dS/dC_ij 2 (x_i - y_j), and both sides of C_xx.
    truth = 2 * (grads[0].sum(-1, keepdim=True) * x - grads[0] @ y)
    both = grads[1] + grads[1].mT
    truth = truth + 2 * (both.sum(-1, keepdim=True) * x - both @ x)
    torch.testing.assert_close(torch.autograd.grad(whole.value, x)[0], truth.detach(), rtol=1e-7, atol=1e-9)


def test_what_it_refuses():
    x, y, a, b = measures()
    cost, exponential = SqEuclidean(x, y), Formula(lambda p, q: (p - q)[..., 0].exp(), x, y)
    for says, call in (
        (r"pass cost_aa, \(7, 7\)", lambda: divergence(Problem(cost.dense(), 0.1))),
        ("cost_bb", lambda: divergence(Problem(cost.dense(), 0.1), cost_aa=SqEuclidean(x, x))),
        ("symmetric", lambda: divergence(Problem(exponential, 0.1))),
        (r"\(\*batch, n, n\)", lambda: self_term(cost, 0.1)),
        (r"sum\(a\)", lambda: divergence(Problem(cost, 0.1, a, b))),
        ("grad", lambda: divergence(Problem(cost, 0.1), grad="unroll")),
    ):
        with pytest.raises(ProblemError, match=says):
            call()
    with pytest.raises(NotImplementedError, match="implicit"):
        second(lambda x: divergence(Problem(SqEuclidean(x, y), 0.1)).value, [x], x)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(1, 4),
    kind=st.sampled_from([SqEuclidean, Euclidean]),
    eps=st.sampled_from([0.003, 0.05, 1.0]),
    penalty=st.sampled_from([KL(), KL(0.1), KL(10.0), TV(0.2), (KL(), KL(0.5))]),
    shift=st.sampled_from([0.0, 1e-5, 0.1, 2.0]),
    mass=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_never_negative(n, m, d, kind, eps, penalty, shift, mass, seed):
    """At the default tolerance, up to what rounding leaves of numbers the size of the terms; also between nearly the same measures."""
    x, y, a, b = measures(n, m, d, seed=seed, shift=shift)
    if seed % 2:  # the same measure but for the shift
        y, b = x + shift, a.clone()
    a, b = (z * mass for z in fitting(a, b, penalty))
    found = divergence(Problem(kind(x, y), eps, a, b, penalty))
    size = abs(float(found.self_a.value)) + abs(float(found.self_b.value)) + eps * mass * float(a.sum() + b.sum())
    assert float(found.value) >= -1e-12 * max(size, 1.0)


@pytest.mark.parametrize("penalty, max_iter", pairwise(PENALTIES, [1, 3]), ids=str)
def test_not_negative_however_early_it_stops(penalty, max_iter):
    """The start makes half the squared kernel distance of the scaled measures a lower bound, and iterations only raise the dual."""
    x, _, a, _ = measures(40)
    problem = Problem(SqEuclidean(x, x + 1e-3 * randn(*x.shape, seed=1)), 0.01, a, a, penalty)
    found = divergence(problem, tol=1e-13, max_iter=max_iter)
    assert found.status.name == "max_iter" and not bool(found.converged) and float(found.value) >= 0
    with pytest.raises(NotConverged, match="max_iter"):
        divergence(problem, tol=1e-13, max_iter=max_iter, strict=True)


@pytest.mark.parametrize("penalty", PENALTIES[:3], ids=str)
def test_zero_between_the_same_measures_and_only_there(penalty):
    x, _, a, _ = measures(25)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    same = divergence(Problem(SqEuclidean(x, x[order]), 0.02, a, a[order], penalty), tol=1e-8).value  # its error is of second order
    moved = divergence(Problem(SqEuclidean(x, x[order] + 0.05), 0.02, a, a[order], penalty)).value
    assert abs(float(same)) <= 1e-13 and float(moved) > 1e-4


@pytest.mark.parametrize(
    "share, kind, penalty, backend",
    pairwise([1.0, 0.1, 0.01, 0.001], [SqEuclidean, Euclidean, Dot], [KL(), KL(0.5), TV(0.3)], ["dense", "chunked"]),
    ids=str,
)
def test_self_terms_take_a_dozen_sweeps(backend, share, kind, penalty):
    """Whatever eps: a contraction by 1/2 at worst, and mixing makes it less. The same fixed point as the ordinary loop's."""
    x, _, a, _ = measures(80, 1, 3)
    cost, eps = kind(x, x), share * float(kind(x, x).scale("std"))
    found = self_term(cost, eps, a, penalty, tol=1e-6, backend=backend)
    assert found.status.name == "converged" and found.n_iter <= 14
    if share >= 0.1:
        truth = solve(Problem(cost, eps, a, a, penalty), tol=1e-9)
        torch.testing.assert_close(found.value, truth.value, rtol=1e-8, atol=1e-10 * float(a.sum()))


def test_self_terms_of_costs_that_are_no_kernel():
    """Nothing bounds the contraction here, and staying is dearer than swapping: still the right value, and a status."""
    M = rand(30, 30)
    M = M + M.mT + 2 * torch.eye(30, dtype=torch.float64)
    found = self_term(M, 0.1, tol=1e-8)
    assert found.status.name == "converged"
    torch.testing.assert_close(found.value, solve(Problem(M, 0.1), tol=1e-10).value, rtol=1e-9, atol=1e-11)


def test_a_side_that_stays_is_not_solved_again():
    x, y, a, b = measures()
    a, b = fitting(a, b, KL())
    y.requires_grad_()
    first = divergence(Problem(SqEuclidean(x, y), 0.1, a, b))
    x.requires_grad_()
    again = divergence(Problem(SqEuclidean(x, y), 0.1, a, b), self_b=first.self_b.detach())
    fresh = divergence(Problem(SqEuclidean(x, y), 0.1, a, b))
    assert again.self_b.f.data_ptr() == first.self_b.f.data_ptr() and not again.self_b.value.requires_grad
    torch.testing.assert_close(again.value, fresh.value)
    torch.testing.assert_close(*(torch.autograd.grad(z.value, x)[0] for z in (again, fresh)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("penalty", PENALTIES[:3], ids=str)
def test_batches_are_their_problems_and_empty_atoms_are_absent(backend, penalty):
    parts = [measures(9, 8, seed=s) for s in range(3)]
    for k, (_, _, a, b) in enumerate(parts):
        a[:k], b[: 2 * k] = 0, 0
        b *= a.sum() / b.sum()
    x, y, a, b = (torch.stack(z) for z in zip(*parts, strict=True))
    together = divergence(Problem(SqEuclidean(x, y), 0.05, a, b, penalty), tol=1e-9, backend=backend)
    assert together.value.shape == together.converged.shape == (3,)
    for k, (x, y, a, b) in enumerate(parts):
        alone = divergence(Problem(SqEuclidean(x[k:], y[2 * k :]), 0.05, a[k:], b[2 * k :], penalty), tol=1e-9, backend=backend)
        torch.testing.assert_close(together.value[k], alone.value, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(together.f[k, k:], alone.f, rtol=1e-5, atol=1e-6)


PLACES = [(0.0, 1.0), (1e4, 1.0), (0.0, 1e-8), (0.0, 1e8), (3e3, 1e-6)]


@pytest.mark.parametrize("place, penalty, backend", pairwise(PLACES, [1.0, math.inf], ["dense", "chunked"]), ids=str)
def test_float32(place, penalty, backend):
    """Clouds off centre, in tiny and in huge units: against float64 at the same, rounded points, by the rounding of the costs."""
    far, unit = place
    x, y, a, b = measures(60, 50)
    x, y = (((z + far) * unit).float() for z in (x, y))
    a, b = (a / a.sum()).float(), (b / b.sum()).float()
    values, grads = [], []
    for dtype in (torch.float32, torch.float64):
        p = x.to(dtype).requires_grad_()
        held = KL(0.5 * unit**2 * penalty)
        found = divergence(Problem(SqEuclidean(p, y.to(dtype)), 0.02 * unit**2, a.to(dtype), b.to(dtype), held), tol=1e-5, backend=backend)
        assert found.value.dtype == dtype and {found.status.name} <= {"converged", "stalled"}
        values.append(found.value.detach().double() / unit**2)
        grads.append(torch.autograd.grad(found.value, p)[0].double() / unit)
    assert abs(float(values[0] - values[1])) <= 2e-6
    assert (grads[0] - grads[1]).norm() <= 2e-4 * grads[1].norm()


def test_potentials_are_the_derivatives_in_the_weights():
    """For hard marginals, up to a constant: what geomloss returns for potentials=True."""
    x, y, a, b = measures(20, 15)
    a, b = (z.requires_grad_() for z in (a / a.sum(), b / b.sum()))
    found = divergence(Problem(SqEuclidean(x, y), 0.05, a, b), tol=1e-10)
    for grad, potential in zip(torch.autograd.grad(found.value, (a, b)), (found.f, found.g), strict=True):
        torch.testing.assert_close(grad - grad.mean(), potential - potential.mean(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("penalty", [KL(), KL(0.4)], ids=str)
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_implicit_second_derivatives(backend, penalty):
    """Hessian-vector products in all inputs together against differences of envelope gradients; potentials against differences."""

    def solved(x, y, a, b, grad="implicit"):
        a, b = fitting(a, b, penalty)
        if penalty == KL():
            a, b = a / a.sum(), b / b.sum()
        return divergence(Problem(SqEuclidean(x, y), 0.1, a, b, penalty), grad=grad, tol=1e-12, backend=backend)

    inputs = measures()
    along = [randn(*z.shape, seed=3 + k) for k, z in enumerate(inputs)]
    at = list(zip(inputs, along, strict=True))

    def weighted(*z):
        s = solved(*z)
        return sum((v * (h - h.mean())).sum() for v, h in zip(along[2:], (s.f, s.g), strict=True))  # f + c and g - c must cancel

    slopes = differences(lambda z: [*first(lambda *w: solved(*w, "envelope").value, z), weighted(*z)], at, 1e-3)
    asked = leaves(*inputs)
    grads = torch.autograd.grad(solved(*asked).value, asked, create_graph=True)
    products = torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, along, strict=True)), asked)
    potentials = sum((g * v).sum() for g, v in zip(first(weighted, inputs), along, strict=True))
    for found, truth in zip((*products, potentials), slopes, strict=True):
        assert (found - truth).norm() <= 1e-6 * truth.norm()
