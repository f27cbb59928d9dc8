"""Barycentres against POT in float64, their derivatives against differences, and POT's names."""

import functools
import warnings

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, Grid, Matrix, Problem, ProblemError, SqEuclidean, barycenter, free_barycenter
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.select import bind
from problems import close, gradcheck, leaves, rand, randn

EPS = 2e-3


def bumps(n=30, K=3, dtype=torch.float64):
    """(K, n) measures of mass 1 on the line, its points (n, 1) and squared distances (n, n)."""
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    A = (-((x - torch.linspace(0.2, 0.8, K, dtype=torch.float64).unsqueeze(-1)) ** 2) / 0.005).exp() + 1e-3
    return (A / A.sum(-1, keepdim=True)).to(dtype), x.unsqueeze(-1).to(dtype), ((x - x.unsqueeze(-1)) ** 2).to(dtype)


def pots(function, A, M, *args, weights=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = None if weights is None else weights.numpy()
        return function(A.mT.contiguous().numpy(), M.numpy(), *args, weights=weights, numItermax=5000, stopThr=1e-11, **options)


W = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, W])
def test_it_is_pots_barycentre(weights):
    A, _, M = bumps()
    found = barycenter(M, EPS, A, weights, tol=1e-11)
    assert found.converged and found.status.name == "converged" and float(found.weights.sum()) == pytest.approx(1)
    close(found.weights, pots(ot.bregman.barycenter, A, M, EPS, weights=weights, method="sinkhorn_log"), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_debiased_it_is_pots():
    A, _, M = bumps(30)
    found = barycenter(M, 1e-3, A, W, tol=1e-9, debiased=True)
    assert found.converged
    close(found.weights, pots(ot.bregman.barycenter_debiased, A, M, 1e-3, weights=W, method="sinkhorn_log"), rtol=0, atol=1e-6)


def test_the_debiased_barycentre_of_one_measure_is_that_measure():
    A, _, M = bumps(20, 1)
    biased, debiased = (barycenter(M, 3e-3, A, tol=1e-6, debiased=z, max_iter=1000).weights for z in (False, True))
    assert float((debiased - A[0]).abs().max()) < 0.1 * float((biased - A[0]).abs().max())


def test_relaxed_it_is_pots():
    A, _, M = bumps()
    A = A * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).unsqueeze(-1)
    prior = EPS * (A.log() - torch.tensor(30.0).log()).unsqueeze(-1)  # POT's reference measure is 1
    found = barycenter(M + prior, EPS, A, W, penalty=KL(0.1), tol=1e-11)
    assert found.converged
    close(found.weights, pots(ot.unbalanced.barycenter_unbalanced, A, M, EPS, 0.1, weights=W), rtol=1e-7, atol=1e-10)


def test_clouds_are_their_matrix_and_sets_of_weights_are_solved_at_once():
    A, x, M = bumps()
    weights = rand(4, 3, seed=5) + 0.1
    together = barycenter(SqEuclidean(x, x), EPS, A, weights, tol=1e-10)
    assert together.weights.shape == (4, 30) and together.converged.shape == (4,) and together.converged.all()
    for w, found in zip(weights, together.weights, strict=True):
        close(found, barycenter(M, EPS, A, w, tol=1e-10).weights, rtol=0, atol=1e-9)


def test_supports_may_differ():
    """From 30 points to 7, and a cost of each measure's own."""
    A, x, _ = bumps()
    y = torch.linspace(0, 1, 7, dtype=torch.float64).unsqueeze(-1)
    found = barycenter(SqEuclidean(x, y), 0.01, A)
    own = barycenter(SqEuclidean(x, y).dense().expand(3, 30, 7).contiguous(), 0.01, A)
    assert found.weights.shape == (7,)
    close(found.weights, own.weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_units_and_empty_atoms(unit):
    A, _, M = bumps()
    A[:, :5], A[0, 10:] = 0, 0
    A = A / A.sum(-1, keepdim=True)
    truth, scaled = barycenter(M, EPS, A, tol=1e-9), barycenter(unit * M, unit * EPS, A, tol=1e-9)
    assert scaled.converged and scaled.weights.isfinite().all()
    close(scaled.weights, truth.weights, rtol=0, atol=1e-9)


def test_float32_and_weights_of_zero():
    A, _, M = bumps(dtype=torch.float32)
    found = barycenter(M, EPS, A, torch.tensor([1.0, 0.0, 0.0]), tol=1e-5)
    assert found.weights.dtype == torch.float32
    exact = barycenter(M.double(), EPS, A[:1].double(), tol=1e-9)
    close(found.weights, exact.weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "grad, debiased",
    [("implicit", False), ("unroll", False), ("unroll", True), pytest.param("implicit", True, marks=pytest.mark.slow)],
)
def test_derivatives(grad, debiased):
    x = 3 * torch.linspace(0, 1, 5, dtype=torch.float64)
    inputs = leaves(rand(3, 5) + 0.1, (x - x.unsqueeze(-1)).square(), W)
    v, iterations = rand(5, seed=7), 500 if grad == "implicit" else 15

    def moment(A, M, w):
        own = (M + M.mT) / 2 if debiased else None
        found = barycenter(
            M, 0.2, A / A.sum(-1, keepdim=True), w, tol=1e-12, grad=grad, debiased=debiased, cost_bb=own, max_iter=iterations
        )
        return (v * found.weights).sum()

    assert gradcheck(moment, inputs, fast_mode=True)


def test_derivatives_in_points_and_of_relaxed_marginals():
    x, A = leaves(rand(5, 2, seed=3), rand(2, 5) + 0.1)
    v = rand(4, seed=7)

    def moment(x, A):
        return (v * barycenter(SqEuclidean(x, x[:4]), 0.3, A, penalty=KL(0.5), tol=1e-13).weights).sum()

    assert gradcheck(moment, (x, A), fast_mode=True)


def test_running_out_is_a_status():
    A, _, M = bumps()
    found = barycenter(M, 1e-4, A, max_iter=2)
    assert found.status.name == "max_iter" and not found.converged and found.weights.isfinite().all()


def test_a_start_saves_iterations():
    A, _, M = bumps()
    cold = barycenter(M, EPS, A, tol=1e-9)
    warm = barycenter(M, EPS, A, tol=1e-9, start=cold.f)
    assert warm.n_iter < cold.n_iter / 4


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(a=torch.ones(5)), "a has shape (5,)"),
        (dict(a=[[1.0]]), "a must be a tensor"),
        (dict(a=torch.tensor([[0.5] * 4, [1.0] * 4])), "sum(a) = 2 and sum(b) = 4"),
        (dict(a=-torch.ones(2, 4)), "a must hold finite weights >= 0"),
        (dict(weights=torch.ones(3)), "weights has shape (3,)"),
        (dict(weights=torch.tensor([1.0, -1.0])), "weights must hold finite weights >= 0, found 1 negative"),
        (dict(weights=torch.zeros(2)), "weights sums to 0"),
        (dict(eps=0.0), "eps must be a finite number > 0"),
        (dict(grad="envelope"), "grad = 'envelope' is not known"),
        (dict(max_iter=0), "max_iter must be at least 1"),
        (dict(cost=torch.rand(4, 3), debiased=True), "pass cost_bb (m, m)"),
        (dict(debiased=True, cost_bb=torch.rand(3, 3)), "cost_bb has shape (3, 3)"),
        (dict(debiased=True, penalty=KL(1.0), cost=torch.zeros(4, 4)), "leave out `penalty`"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ProblemError) as refusal:
        barycenter(**{"cost": torch.rand(4, 4), "eps": 0.1, "a": torch.ones(2, 4), **options})
    assert words in str(refusal.value)


# Points that move.


def groups(sizes=(30, 20, 25)):
    return [randn(n, 2, seed=k) / 5 + torch.tensor([float(k), 0.0], dtype=torch.float64) for k, n in enumerate(sizes)]


def test_points_move_as_pots():
    clouds, start = groups(), randn(10, 2, seed=9)
    masses = [torch.full((len(z),), 1 / len(z), dtype=torch.float64) for z in clouds]
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    found = free_barycenter(clouds, 0.1, start, weights=weights, max_iter=5, inner_tol=1e-11)
    arrays = [z.numpy() for z in clouds], [z.numpy() for z in masses], start.numpy(), 0.1
    truth = ot.bregman.free_support_sinkhorn_barycenter(*arrays, weights=weights.numpy(), numItermax=5, stopThr=0, method="sinkhorn_log")
    close(found.points, truth, rtol=0, atol=1e-7)
    assert found.status.name == "max_iter" and found.n_iter == 5
    ours = gpu_ot.pot.bregman.free_support_sinkhorn_barycenter(*arrays, weights=weights.numpy(), numItermax=5, stopThr=1e-30, log=True)
    close(ours[0], truth, rtol=0, atol=1e-7)
    assert len(ours[1]["displacement_square_norms"]) == 5


def test_points_settle_in_the_middle():
    found = free_barycenter(torch.stack(groups((12, 12, 12))), 0.05, randn(8, 2), max_iter=1000)
    assert found.converged and float(found.errors[-1]) <= 1e-7
    means = torch.stack([z.mean(0) for z in groups((12, 12, 12))])
    close(found.points.mean(0), means.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "far", "empty", "one", "units", "float32", pytest.param("sharp", marks=pytest.mark.slow)])
def test_machine_code_moves_points_as_the_loop_does(case):
    """The truth is the same move by torch operations between arrays; points without weight move, too."""
    clouds, eps, m, atol = groups((9, 12, 7)), 0.1, 8, 1e-9
    b = torch.full((m,), 1 / m, dtype=torch.float64)
    if case == "far":
        clouds, atol = [z + 1e5 for z in clouds], 1e-7
    elif case == "empty":
        b = torch.cat((torch.zeros(2), torch.ones(m - 2) / (m - 2))).double()
    elif case == "one":
        clouds, b, m = [z[:1] for z in clouds], torch.ones(1, dtype=torch.float64), 1
    elif case == "units":
        clouds, eps, atol = [1e6 * z for z in clouds], 1e11, 1e-3
    elif case == "sharp":
        eps, atol = 1e-3, 1e-6
    elif case == "float32":
        clouds, atol = [z.float() for z in clouds], 2e-5
    start = torch.stack([clouds[0].mean(0)] * m) + randn(m, 2).to(clouds[0]) * (1e6 if case == "units" else 1)
    options = dict(b=b, max_iter=6, inner_tol=1e-5 if case == "float32" else 1e-11, inner_iter=5000)
    found, truth = (free_barycenter(clouds, eps, start, backend=z, **options) for z in ("auto", "dense"))
    close(found.points, truth.points, rtol=0, atol=atol)
    close(found.errors, truth.errors, rtol=1e-3 if case == "float32" else 1e-6, atol=atol**2)
    assert found.points.dtype == clouds[0].dtype and found.f.shape == truth.f.shape and found.g.shape == truth.g.shape
    assert (found.weights == b.to(found.weights)).all()


EPS_FREE = 0.02


def test_weights_move_to_the_barycentre_on_the_points():
    clouds, start = groups((9, 12, 7)), randn(6, 2)
    w = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    options = dict(weights=w, tol=1e-20, max_iter=3000, inner_tol=1e-10, inner_iter=10_000)
    found = free_barycenter(clouds, EPS_FREE, start, free_weights=True, **options)
    assert found.converged and found.f.shape == (3, 12) and found.g.shape == (3, 6)
    assert float(found.weights.sum()) == pytest.approx(1) and float((found.weights - 1 / 6).abs().max()) > 1e-3

    def objective(x, b=None):
        """sum_k w_k of the least over plans with one common marginal, or with the marginal b; the entropy is relative to a uniform one."""
        total = 0.0
        for z, weight in zip(clouds, w, strict=True):
            marginal = at(x).weights if b is None else b
            C = torch.cdist(z, x).square()
            P = gpu_ot.solve(gpu_ot.Problem(C, EPS_FREE, b=marginal), tol=1e-11).plan.to_dense()
            total += weight * ((P * C).sum() + EPS_FREE * (P * (P * len(z) * len(x)).log()).sum())
        return total

    def at(x):
        K, most = len(clouds), max(map(len, clouds))
        y = torch.stack([torch.cat((z, z[:1].expand(most - len(z), -1))) for z in clouds])
        a = torch.stack([(torch.arange(most) < len(z)).double() / len(z) for z in clouds])
        return barycenter(SqEuclidean(y, x.expand(K, *x.shape)), EPS_FREE, a, w, tol=1e-11)

    close(at(found.points).weights, found.weights, rtol=0, atol=1e-8)
    least, uniform = objective(found.points), free_barycenter(clouds, EPS_FREE, start, **options)
    assert least < objective(uniform.points, uniform.weights)
    x = found.points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective_held(clouds, x, found, w), x)
    close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)
    for k in range(3):
        assert least <= objective(found.points + 0.05 * randn(6, 2, seed=k)) + 1e-9


def objective_held(clouds, x, found, w):
    """<P, C> at the plans that were found, as a function of the points."""
    total = 0.0
    for k, z in enumerate(clouds):
        C = torch.cdist(z, x).square()
        P = ((found.f[k, : len(z), None] + found.g[k] - C.detach()) / EPS_FREE).exp() / len(z) / len(x)
        total = total + w[k] * (P * C).sum()
    return total


@pytest.mark.parametrize("free", [False, True])
def test_derivatives_of_points_that_move(free):
    clouds, a, b, w = leaves(randn(2, 5, 2, seed=1), rand(2, 5, seed=2) + 0.5, rand(3, seed=3) + 0.5, torch.tensor([0.6, 0.4]).double())
    start = randn(3, 2, seed=4)

    def moments(clouds, a, b, w):
        options = {} if free else dict(b=b / b.sum())
        a = a / a.sum(-1, keepdim=True)
        found = free_barycenter(
            clouds, 2.0, start, a=a, weights=w, free_weights=free, tol=1e-24, max_iter=2000, inner_tol=1e-12, **options
        )  # fmt: skip
        assert found.converged
        return torch.cat((found.points.flatten(), found.weights if free else found.weights[:0]))

    assert gradcheck(moments, (clouds, a, b, w), fast_mode=True)
    with torch.no_grad():
        assert not free_barycenter(clouds, 2.0, start).points.requires_grad


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(clouds=[]), "clouds is empty"),
        (dict(clouds=[torch.rand(3, 5)]), "clouds[0] has shape (3, 5)"),
        (dict(a=[torch.ones(2)]), "a holds the weights of 1 clouds"),
        (dict(a=[torch.ones(2), torch.ones(3)]), "a[0] has shape (2,)"),
        (dict(weights=torch.ones(1)), "weights has shape (1,)"),
        (dict(start=torch.rand(3)), "start has shape (3,)"),
        (dict(free_weights=True, b=torch.ones(4) / 4), "leave one of the two out"),
        (dict(max_iter=0), "max_iter and inner_iter must be at least 1"),
    ],
)
def test_bad_clouds_are_named(options, words):
    with pytest.raises(ProblemError) as refusal:
        free_barycenter(**{"clouds": [torch.rand(3, 2), torch.rand(3, 2)], "eps": 0.1, "start": torch.rand(4, 2), **options})
    assert words in str(refusal.value)


# POT's names.


@functools.cache
def theirs(debiased):
    A, _, M = bumps(25)
    function = ot.bregman.barycenter_debiased if debiased else ot.bregman.barycenter
    return pots(function, A, M, EPS, weights=W, method="sinkhorn_log")


@pytest.mark.parametrize(
    "name", ["barycenter", "barycenter_sinkhorn", "barycenter_stabilized", pytest.param("barycenter_debiased", marks=pytest.mark.slow)]
)
def test_pots_names(name):
    A, _, M = bumps(25)
    ours, log = getattr(gpu_ot.pot.bregman, name)(
        A.mT.numpy(), M.numpy(), EPS, weights=W.numpy(), stopThr=1e-9, numItermax=5000, log=True, warn=False
    )
    assert isinstance(ours, np.ndarray) and {"err", "niter", "status"} <= log.keys()
    close(ours, theirs("debiased" in name), rtol=0, atol=2e-6 if "debiased" in name else 1e-8)


def test_pots_names_of_relaxed_marginals():
    A, _, M = bumps(30)
    A[1] *= 2
    ours = gpu_ot.pot.unbalanced.barycenter_unbalanced(A.mT.numpy(), M.numpy(), EPS, 0.2, stopThr=1e-10, numItermax=5000)
    close(ours, pots(ot.unbalanced.barycenter_unbalanced, A, M, EPS, 0.2), rtol=1e-6, atol=1e-9)


def pictures():
    A = rand(2, 9, 12) ** 6 + 1e-6
    A[0, :4], A[1, :, :5] = 0, 0
    return A / A.sum((-1, -2), keepdim=True)


@pytest.mark.parametrize(
    "name, reg",
    [
        ("convolutional_barycenter2d", 8e-3),
        ("convolutional_barycenter2d", 8e-2),
        pytest.param("convolutional_barycenter2d_debiased", 4e-3, marks=pytest.mark.slow),  # of a larger reg neither library converges
    ],
)
def test_pots_names_of_images(name, reg):
    A = pictures().numpy()
    deb = "debiased" in name
    options = dict(stopThr=1e-9, numItermax=3000, warn=False)
    theirs = getattr(ot.bregman, name)(A, reg, method="sinkhorn_log", **options)
    ours = getattr(gpu_ot.pot.bregman, name)(A, reg, **options)
    assert ours.shape == (9, 12)
    close(ours, theirs, rtol=0, atol=1e-5 if deb else 1e-7)


@pytest.mark.parametrize("sides", [(40,), (5, 8), (4, 2, 5)])
@pytest.mark.parametrize("eps", [1e-4, 4e-3, 1.0])
def test_softmins_of_images_are_those_of_their_matrix(eps, sides):
    """At eps = 1e-4 the kernel between far pixels is exp(-10^4), and products underflow."""
    cost = Grid(sides, torch.tensor([1 / (k - 1) for k in sides], dtype=torch.float64))
    h = randn(3, 40)
    h[0, 1:], h[1, ::2] = -torch.inf, -torch.inf
    close(bind(Problem(cost, eps)).softmin(h, eps), Dense(Matrix(cost.dense())).softmin(h, eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sides, periodic", [pytest.param((30,), False, marks=pytest.mark.slow), ((5, 6), (True, False)), ((4, 2, 4), False)]
)
@pytest.mark.parametrize("kind", ["plain", "debiased", "relaxed"])
def test_grids_have_the_barycentres_of_their_matrices(sides, periodic, kind):
    """In one to three dimensions, for several weights, and with the derivatives in measures, weights and spacing."""
    n, eps = torch.Size(sides).numel(), 0.05
    spacing = torch.linspace(0.2, 0.3, len(sides), dtype=torch.float64)
    v, found = rand(n, seed=9), []
    options = dict(debiased=dict(debiased=True), relaxed=dict(penalty=KL(0.5))).get(kind, {})
    for dense in (False, True):
        s, A, w = leaves(spacing, rand(2, n) + 0.1, rand(3, 2) + 0.1)
        cost = Grid(sides, s, periodic=periodic)
        if dense:
            cost = cost.dense()
            options |= dict(cost_bb=cost) if kind == "debiased" else {}
        result = barycenter(cost, eps, A / A.sum(-1, keepdim=True), w, tol=1e-11, **options)
        assert result.converged.all()
        found.append((result.weights, *torch.autograd.grad((result.weights * v).sum(), (s, A, w))))
    for ours, truth in zip(*found, strict=True):
        close(ours, truth, rtol=1e-6, atol=1e-9)


def test_gradients_by_pots_names():
    A, w = pictures()[:, :3, 5:8].softmax(-1), torch.tensor([0.4, 0.6], dtype=torch.float64)
    inputs = leaves(A / A.sum((-1, -2), keepdim=True), w)
    v = rand(3, 3)

    def moment(A, w):
        A = A / A.sum((-1, -2), keepdim=True)
        return (v * gpu_ot.pot.bregman.convolutional_barycenter2d(A, 0.2, w, numItermax=20, stopThr=0, warn=False)).sum()

    assert gradcheck(moment, inputs, fast_mode=True)


def test_points_that_move_may_be_halves():
    clouds, start = rand(3, 8, 2), rand(5, 2, seed=1)
    exact = free_barycenter(clouds.bfloat16().double(), 0.1, start.bfloat16().double())
    found = free_barycenter(clouds.bfloat16(), 0.1, start.bfloat16())
    assert found.points.dtype == torch.bfloat16
    close(found.points.double(), exact.points, rtol=0, atol=2e-2)
