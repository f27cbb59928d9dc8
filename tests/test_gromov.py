"""Gromov-Wasserstein against POT in float64, points against matrices, derivatives against differences, and POT's names."""

import importlib

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, ProblemError, SqEuclidean, gromov
from gpu_ot.gromov.spaces import Matrices
from problems import close, gradcheck, leaves, rand, randn, weights

N, M_ = 17, 14
A, B = weights(N), weights(M_)


def spaces(n=N, m=M_, batch=()):
    """Distance matrices with largest entry 1."""
    x, y = randn(*batch, n, 3, seed=1), randn(*batch, m, 2, seed=2)
    return [z / z.amax((-1, -2), keepdim=True) for z in (torch.cdist(x, x).square(), torch.cdist(y, y).square())]


def arrays(*tensors):
    return [z.numpy() for z in tensors]


@pytest.mark.parametrize("loss", ["square", "kl"])
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_pots_plan(loss, fused):
    Cx, Cy = (C + 0.1 if loss == "kl" else C for C in spaces())
    M = rand(N, M_)
    options = dict(loss_fun=f"{loss}_loss", epsilon=0.02, max_iter=3000, tol=1e-9, log=True)
    if fused:
        theirs, log = ot.gromov.entropic_fused_gromov_wasserstein(*arrays(M, Cx, Cy, A, B), alpha=0.6, **options)
    else:
        theirs, log = ot.gromov.entropic_gromov_wasserstein(*arrays(Cx, Cy, A, B), **options)
    more = dict(features=M, alpha=0.6) if fused else {}
    found = gromov(Cx, Cy, 0.02, A, B, loss=loss, tol=1e-9, max_iter=3000, **more)
    assert found.converged and found.status.name == "converged"
    close(found.plan.to_dense(), theirs, rtol=0, atol=1e-7)
    if not fused:
        close(found.distortion, log["gw_dist"], rtol=1e-6)


def test_matrices_that_are_not_symmetric():
    Cx, Cy = (C + 0.3 * rand(*C.shape, seed=5) for C in spaces())
    theirs = ot.gromov.entropic_gromov_wasserstein(*arrays(Cx, Cy, A, B), epsilon=0.1, max_iter=3000, tol=1e-11)
    close(gromov(Cx, Cy, 0.1, A, B, tol=1e-9).plan.to_dense(), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_points_are_their_matrices(backend):
    x, y, M = randn(N, 3, seed=1) + 5, randn(M_, 2, seed=2), rand(N, M_)
    points = SqEuclidean(x, x), SqEuclidean(y, y)
    found = gromov(*points, 1.0, A, B, tol=1e-9, max_iter=3000, backend=backend)
    truth = gromov(*(C.dense() for C in points), 1.0, A, B, tol=1e-9, max_iter=3000)
    assert found.converged
    close(found.plan.to_dense(), truth.plan.to_dense(), rtol=0, atol=1e-9)
    close(found.value, truth.value, rtol=1e-10)
    close(found.distortion, truth.distortion, rtol=1e-10)
    fused, dense = (gromov(*z, 1.0, A, B, features=M, alpha=0.3, tol=1e-8) for z in (points, [C.dense() for C in points]))
    close(fused.value, dense.value, rtol=1e-9)


def test_the_value_is_the_objective():
    Cx, Cy = spaces()
    M = rand(N, M_)
    found = gromov(Cx, Cy, 0.05, A, B, features=M, alpha=0.4, tol=1e-10)
    P, prior = found.plan.to_dense(), A.unsqueeze(-1) * B
    L = (Cx[:, None, :, None] - Cy[None, :, None, :]).square()
    pairs = torch.einsum("ijkl,ij,kl->", L, P, P)
    close(found.distortion, pairs, rtol=1e-9)
    close(found.value, 0.6 * (M * P).sum() + 0.4 * pairs + 0.05 * (P * (P / prior).log()).sum(), rtol=1e-8)


@pytest.mark.parametrize("thin_x, thin_y", [(True, True), (True, False), (False, True)])
def test_matrices_of_low_rank_are_multiplied_by_their_factors(thin_x, thin_y):
    """Squared distances have d + 2 factors, distances have many."""
    x, y = randn(200, 3, seed=1), randn(210, 2, seed=2)
    Cx, Cy = (torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist") ** (1 + few) for z, few in ((x, thin_x), (y, thin_y)))
    spaces = Matrices(Cx, Cy, "square")
    assert (spaces.thin_x is not None, spaces.thin_y is not None) == (thin_x, thin_y)
    at = spaces.moments(rand(200, 210) / 42_000)
    with torch.no_grad():
        found, spaces.thin_x, spaces.thin_y = spaces.slope(at), None, None
        truth = spaces.slope(at)
    close(found, truth, rtol=0, atol=1e-11 * float(truth.abs().max()))


def test_an_isometry_is_found():
    x = randn(20, 3)
    turned = (x @ torch.linalg.qr(randn(3, 3, seed=3))[0])[torch.arange(20).roll(7)]
    found = gromov(SqEuclidean(x, x), SqEuclidean(turned, turned), 0.3, tol=1e-6)
    assert (found.plan.to_dense().argmax(0) == torch.arange(20).roll(7)).all()


def test_graphs_of_a_batch_and_several_starts():
    Cx, Cy = spaces(9, 8, (3,))
    together = gromov(Cx, Cy, 0.05, tol=1e-9)
    assert together.value.shape == together.converged.shape == (3,) and together.converged.all()
    for k in range(3):
        close(together.value[k], gromov(Cx[k], Cy[k], 0.05, tol=1e-9).value, rtol=1e-8)
    starts = rand(4, 9, 8, seed=7)
    starts = starts / starts.sum((-1, -2), keepdim=True)
    several = gromov(Cx[0], Cy[0], 0.05, start=starts, tol=1e-8)
    assert several.value.shape == (4,)
    close(several.value[2], gromov(Cx[0], Cy[0], 0.05, start=starts[2], tol=1e-8).value, rtol=1e-7)


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_problems_that_have_settled_are_left_out(backend):
    """Of eight graphs some settle after 15 iterations and one after 60: each ends as it does alone, features and weights included."""
    Cx, Cy = spaces(11, 9, (8,))
    M, a = rand(8, 11, 9), weights(11, (8,))
    options = dict(alpha=0.97, tol=1e-8, backend=backend)
    together = gromov(Cx, Cy, 0.03, a, features=M, **options)
    moved = (together.errors > 1e-8).sum(0)
    assert together.converged.all() and int(moved.min()) < int(moved.max()) / 2
    for k in range(8):
        alone = gromov(Cx[k], Cy[k], 0.03, a[k], features=M[k], **options)
        close(together.plan.to_dense()[k], alone.plan.to_dense(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", ["plain", "kl", "fused", "relaxed", "starts", "empty", "float32"])
def test_machine_code_is_the_loop(case):
    """The same plans from the loop of torch operations, where mixing stops at another place within the tolerance."""
    Cx, Cy = spaces(13, 11, (3,))
    options: dict = dict(tol=1e-9, max_iter=3000)
    eps, a, b, atol = 0.05, weights(13, (3,)), weights(11), 1e-8
    if case == "kl":
        Cx, Cy, options["loss"] = Cx + 0.1, Cy + 0.1, "kl"
    elif case == "fused":
        options |= dict(features=rand(13, 11), alpha=0.6)
    elif case == "relaxed":
        options["penalties"] = KL(0.5), KL(0.8)
    elif case == "starts":
        start = rand(4, 13, 11, seed=7)
        Cx, Cy, a, options["start"] = Cx[0], Cy[0], a[0], start / start.sum((-1, -2), keepdim=True)
    elif case == "empty":
        a = a.clone()
        a[:, :3] = 0
        a = a / a.sum(-1, keepdim=True)
    elif case == "float32":
        Cx, Cy, options["tol"], atol = Cx.float(), Cy.float(), 1e-4, 1e-5
    found, truth = (gromov(Cx, Cy, eps, a, b, backend=z, **options) for z in ("auto", "dense"))
    assert found.converged.all() and truth.converged.all() and found.errors.shape[1:] == found.value.shape
    close(found.plan.to_dense(), truth.plan.to_dense(), rtol=0, atol=atol)
    close(found.value, truth.value, rtol=2e-5 if case == "float32" else 1e-9)  # tol * eps is 5e-6, of values around .1


def test_mixing_leads_to_no_saddle(monkeypatch):
    """Slopes that are mixed while the iteration leaves a saddle lead back to it: two of these 64 pairs then end up to 8e-4 higher."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(64, 50, d)) for d in (3, 2))
    Cx, Cy = (torch.from_numpy(np.square(z[:, :, None] - z[:, None]).sum(-1)) for z in (x, y))
    Cx, Cy = (C / C.amax((-1, -2), keepdim=True) for C in (Cx, Cy))
    mixed = gromov(Cx, Cy, 0.05, tol=1e-6)
    monkeypatch.setattr(importlib.import_module("gpu_ot.gromov.machine"), "GATE", 0.0)
    plain = gromov(Cx, Cy, 0.05, tol=1e-6)
    close(mixed.distortion, plain.distortion, rtol=0, atol=1e-6)
    outer = [int((z.errors > 1e-6).sum()) for z in (mixed, plain)]
    assert outer[0] < 0.6 * outer[1]


@pytest.mark.slow
def test_a_part_of_the_mass():
    x = randn(12, 2)
    far = torch.cat((x[:9], 10 * x[9:] + 30))
    found = gromov(SqEuclidean(x, x), SqEuclidean(far, far), 0.02, mass=0.75, tol=1e-6, max_iter=300)
    P = found.plan.to_dense()
    assert float(P.sum()) == pytest.approx(0.75) and float(P[:, 9:].sum()) < 1e-6


def test_prices_of_marginals():
    relaxed = gromov(*spaces(), 0.05, A, 2 * B, penalties=KL(0.5), tol=1e-7)
    assert relaxed.converged and 0.2 < float(relaxed.plan.sum()) < 2


@pytest.mark.parametrize("tau, eps", [(0.5, 0.05), (0.1, 0.02), (10.0, 0.05)])
@pytest.mark.parametrize("fused", [False, True])
def test_prices_of_pairs_are_pots(tau, eps, fused):
    """Masses 1 and 1.5. POT weighs the distortion by 1 and the features by alpha."""
    Cx, Cy = spaces()
    M, b, alpha = rand(N, M_), 1.5 * B, 0.6 if fused else 1.0
    more = dict(features=M, alpha=alpha) if fused else {}
    found = gromov(Cx, Cy, eps, A, b, tau=tau, tol=1e-9, max_iter=3000, **more)
    theirs = dict(alpha=(1 - alpha) / alpha, M=M.numpy()) if fused else {}
    options = dict(divergence="kl", unbalanced_solver="sinkhorn_log", max_iter=3000, tol=1e-12, max_iter_ot=5000, tol_ot=1e-12)
    P, _ = ot.gromov.fused_unbalanced_gromov_wasserstein(
        *arrays(Cx, Cy, A, b), reg_marginals=tau / alpha, epsilon=eps / alpha, **options, **theirs
    )
    assert found.converged and found.status.name == "converged"
    close(found.plan, P, rtol=0, atol=1e-8)

    def kl(p, q):
        p, q = (torch.outer(z.flatten(), z.flatten()) for z in (p, q))
        return (p * (p / q).log() - p + q).sum()

    P = found.plan
    L = (Cx[:, None, :, None] - Cy[None, :, None, :]).square()
    close(found.distortion, torch.einsum("ijkl,ij,kl->", L, P, P), rtol=1e-9)
    value = alpha * found.distortion + (1 - alpha) * (P * M).sum() + tau * (kl(P.sum(1), A) + kl(P.sum(0), b)) + eps * kl(P, A.outer(b))
    close(found.value, value, rtol=1e-9)


def test_prices_of_pairs_of_batches_points_and_atoms_without_weight():
    x, y = randn(3, N, 3, seed=1) + 10, randn(M_, 2, seed=2)
    a = A.clone()
    a[:3] = 0
    options = dict(tau=7.0, tol=1e-8, max_iter=3000)
    Cx, Cy = torch.cdist(x, x).square(), torch.cdist(y, y).square()
    together = gromov(Cx, Cy, 5.0, a, B, **options)
    assert together.converged.all() and together.value.shape == (3,) and (together.plan[:, :3] == 0).all()
    for k in range(3):
        points = gromov(SqEuclidean(x[k], x[k]), SqEuclidean(y, y), 5.0, a, B, **options)
        close(points.plan, together.plan[k], rtol=0, atol=1e-8)
        part = gromov(Cx[k, 3:, 3:].contiguous(), Cy, 5.0, a[3:], B, **options)
        close(part.plan, together.plan[k, 3:], rtol=0, atol=1e-8)
    for unit in (1e-3, 1e3):
        scaled = gromov(unit * Cx[0], unit * Cy, unit**2 * 5.0, a, B, **{**options, "tau": unit**2 * 7.0})
        close(scaled.plan, together.plan[0], rtol=0, atol=1e-7)


def test_derivatives_at_a_price_of_pairs():
    S, R, a, b, M = leaves(rand(4, 4, seed=3), rand(3, 3, seed=4), rand(4) + 0.5, rand(3) + 0.5, rand(4, 3))

    def value(S, R, a, b, M):
        return gromov(S, R, 0.5, a, b, features=M, tau=0.8, tol=1e-11).value

    assert gradcheck(value, (S, R, a, b, M))
    with pytest.raises(ProblemError, match="leave out"):
        gromov(S, R, 0.5, tau=0.8, penalties=KL(1.0))
    with pytest.raises(ProblemError, match="tau must be a price > 0"):
        gromov(S, R, 0.5, tau=-1.0)


def test_derivatives_of_the_value():
    x, y, a, b, M = leaves(randn(4, 2, seed=1), randn(3, 3, seed=2), rand(4) + 0.5, rand(3) + 0.5, rand(4, 3))
    S, R = leaves(rand(4, 4, seed=3), rand(3, 3, seed=4))

    def of_points(x, y, a, b, M):
        return gromov(SqEuclidean(x, x), SqEuclidean(y, y), 4.0, a / a.sum(), b / b.sum(), features=M, tol=1e-11).value

    def of_matrices(S, R, a, b, M):
        return gromov(S, R, 0.5, a / a.sum(), b / b.sum(), features=M, tol=1e-11).value

    assert gradcheck(of_points, (x, y, a, b, M), fast_mode=True)
    assert gradcheck(of_matrices, (S, R, a, b, M), fast_mode=True)


@pytest.mark.slow
def test_derivatives_of_the_plan():
    x, y, a, b = leaves(randn(4, 2, seed=1), randn(3, 3, seed=2), rand(4) + 0.5, rand(3) + 0.5)
    v = rand(4, 3)

    def moment(x, y, a, b):
        found = gromov(SqEuclidean(x, x), SqEuclidean(y, y), 6.0, a / a.sum(), b / b.sum(), tol=1e-11, grad="implicit")
        return (v * found.plan).sum() + found.distortion

    assert gradcheck(moment, (x, y, a, b), fast_mode=True)


def test_float32_and_units():
    Cx, Cy = spaces()
    truth = gromov(Cx, Cy, 0.05, A, B, tol=1e-9).plan.to_dense()
    close(gromov(Cx.float(), Cy.float(), 0.05, A, B, tol=1e-4).plan.to_dense(), truth, rtol=0, atol=1e-5)
    for unit in (1e-6, 1e6):
        close(gromov(unit * Cx, unit * Cy, unit**2 * 0.05, A, B, tol=1e-8).plan.to_dense(), truth, rtol=0, atol=1e-7)


def test_empty_atoms():
    Cx, Cy = spaces()
    a = A.clone()
    a[:3] = 0
    found = gromov(Cx, Cy, 0.05, a / a.sum(), B, tol=1e-8)
    part = gromov(Cx[3:, 3:].contiguous(), Cy, 0.05, a[3:] / a.sum(), B, tol=1e-8)
    close(found.plan.to_dense()[3:], part.plan.to_dense(), rtol=0, atol=1e-7)


def test_running_out_is_a_status():
    found = gromov(*spaces(), 0.001, A, B, max_iter=2)
    assert found.status.name == "max_iter" and not found.converged and found.plan.to_dense().isfinite().all()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(cost_x=[[0.0]]), "cost_x must be a tensor"),
        (dict(cost_x=torch.rand(3, 4)), "cost_x has shape (3, 4)"),
        (dict(cost_y=torch.tensor([[torch.nan]])), "cost_y holds NaN"),
        (dict(loss="cubic"), "loss = 'cubic' is not known"),
        (dict(loss="kl"), "entries > 0"),
        (dict(alpha=0.5), "1 without features"),
        (dict(alpha=1.5, features=torch.rand(4, 3)), "alpha must be in [0, 1]"),
        (dict(features=torch.rand(3, 3)), "features has shape (3, 3)"),
        (dict(start=torch.rand(3, 3)), "start has shape (3, 3)"),
        (dict(start=-torch.rand(4, 3)), "start must hold finite masses"),
        (dict(eps=-1.0), "eps must be a finite number > 0"),
        (dict(eps=("std", 0.1)), "eps must be a number here"),
        (dict(grad="unroll"), "grad = 'unroll' is not known"),
        (dict(max_iter=0), "must be at least 1"),
        (dict(a=torch.ones(3)), "a has shape (3,)"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ProblemError) as refusal:
        gromov(**{"cost_x": torch.zeros(4, 4), "cost_y": torch.zeros(3, 3), "eps": 0.1, **options})
    assert words in str(refusal.value)


# POT's names.


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", [n for n in gpu_ot.pot.gromov.__all__ if "partial" not in n and "barycenters" not in n])
def test_pots_names(kind, name):
    Cx, Cy = spaces()
    given = ([rand(N, M_)] if "fused" in name else []) + [Cx, Cy, A, B]
    options = dict(epsilon=0.05, max_iter=2000, log=True)
    theirs, log = getattr(ot.gromov, name)(*arrays(*given), **options)
    ours, report = getattr(gpu_ot.pot.gromov, name)(*(given if kind == "torch" else arrays(*given)), **options)
    assert report.keys() >= log.keys() and isinstance(ours, torch.Tensor if kind == "torch" else (np.ndarray, np.floating))
    close(ours, theirs, rtol=0, atol=1e-7)
    key = "fgw_dist" if "fused" in name else "gw_dist"
    close(report[key], log[key], rtol=1e-6)


@pytest.mark.parametrize("m", [None, 0.4])
def test_pots_names_of_a_part_of_the_mass(m):
    Cx, Cy = spaces(9, 8)
    a, b = weights(9), weights(8)
    options = dict(reg=0.1, m=m, log=True)
    theirs, log = ot.gromov.entropic_partial_gromov_wasserstein(*arrays(Cx, Cy, a, b), tol=1e-10, **options)
    ours, report = gpu_ot.pot.gromov.entropic_partial_gromov_wasserstein(Cx, Cy, a, b, **options)
    close(ours, theirs, rtol=0, atol=1e-6)
    close(report["partial_gw_dist"], log["partial_gw_dist"], rtol=1e-5)
    value, second = gpu_ot.pot.gromov.entropic_partial_gromov_wasserstein2(*arrays(Cx, Cy, a, b), **options)
    close(value, report["partial_gw_dist"], rtol=1e-12)
    assert second["T"].shape == (9, 8)
    with pytest.raises(ValueError, match="lower or equal than min"):
        gpu_ot.pot.gromov.entropic_partial_gromov_wasserstein(Cx, Cy, a, b, m=3.0)


def test_gradients_by_pots_names():
    C1, C2 = leaves(rand(4, 4, seed=1), rand(3, 3, seed=2))
    assert gradcheck(lambda *z: gpu_ot.pot.gromov.entropic_gromov_wasserstein2(*z, epsilon=0.5), (C1, C2), fast_mode=True)


def test_what_pot_alone_solves_runs_on_pot():
    Cx, Cy = arrays(*spaces(6, 5))
    with pytest.raises(NotImplementedError, match="PPA"):
        gpu_ot.pot.gromov.entropic_gromov_wasserstein(Cx, Cy, solver="PPA")
    with pytest.raises(ValueError, match="Unknown solver"):
        gpu_ot.pot.gromov.entropic_gromov_wasserstein(Cx, Cy, solver="other")
    with pytest.raises(ValueError, match="Unknown `loss_fun"):
        gpu_ot.pot.gromov.entropic_gromov_wasserstein(Cx, Cy, loss_fun="other")


def test_mixing_of_float32_slopes_that_are_all_parallel():
    """Plans between two points and two have one degree of freedom."""
    Cx, Cy = (torch.cdist(z, z) for z in (rand(6, 2, 2, seed=seed, dtype=torch.float32) for seed in (1, 2)))
    for backend in ("auto", "dense"):
        found = gromov(Cx, Cy, 0.05, backend=backend)
        assert found.converged.all() and found.value.isfinite().all()
    with pytest.raises(ProblemError, match="a batch of no spaces"):
        gromov(Cx[:0], Cy[:0], 0.05)
