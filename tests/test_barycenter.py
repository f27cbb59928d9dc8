"""Barycentres against POT in float64, their derivatives against differences, and POT's names."""

import functools
import warnings

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, Matrix, ProblemError, SqEuclidean, barycenter, free_barycenter
from gpu_ot.geometry.dense import Dense
from gpu_ot.pot.barycenters import Image
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


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(clouds=[]), "clouds is empty"),
        (dict(clouds=[torch.rand(3, 5)]), "clouds[0] has shape (3, 5)"),
        (dict(a=[torch.ones(2)]), "a holds the weights of 1 clouds"),
        (dict(a=[torch.ones(2), torch.ones(3)]), "a[0] has shape (2,)"),
        (dict(weights=torch.ones(1)), "weights has shape (1,)"),
        (dict(start=torch.rand(3)), "start has shape (3,)"),
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
    cost = Image(*(torch.linspace(0, 1, k, dtype=torch.float64) for k in sides))
    h = randn(3, 40)
    h[0, 1:], h[1, ::2] = -torch.inf, -torch.inf
    close(cost.geometry(None, None).softmin(h, eps), Dense(Matrix(cost.dense())).softmin(h, eps), rtol=1e-12, atol=1e-12)


def test_gradients_by_pots_names():
    A, w = pictures()[:, :3, 5:8].softmax(-1), torch.tensor([0.4, 0.6], dtype=torch.float64)
    inputs = leaves(A / A.sum((-1, -2), keepdim=True), w)
    v = rand(3, 3)

    def moment(A, w):
        A = A / A.sum((-1, -2), keepdim=True)
        return (v * gpu_ot.pot.bregman.convolutional_barycenter2d(A, 0.2, w, numItermax=20, stopThr=0, warn=False)).sum()

    assert gradcheck(moment, inputs, fast_mode=True)
