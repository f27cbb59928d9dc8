"""POT's names for problems made of problems, beyond their plans: what `log` holds, and the functions that are more than one solve."""

import numpy as np
import ot
import pytest
import torch

import gpu_ot.pot
from problems import close, gradcheck, leaves, randn, refused, weights


def bumps(n=25, k=2):
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    A = torch.stack([torch.exp(-((t - c) ** 2) / 0.02) + 1e-3 for c in np.linspace(0.25, 0.7, k)], 1)
    return (A / A.sum(0)).numpy(), (t.unsqueeze(-1) - t).square().numpy()


@pytest.mark.parametrize("debiased", [False, True])
def test_logs_hold_the_scalings_of_a_barycentre(debiased):
    """diag(u) K diag(v) has the measures as rows' marginals and the barycentre as columns'. Each pair (u, v) is known up to a factor."""
    A, M = bumps(36, 3)
    reg, images = 0.02, A.T.reshape(3, 6, 6)
    t = np.linspace(0, 1, 6)
    C = ((t[:, None, None, None] - t[:, None]) ** 2 + (t[:, None, None] - t) ** 2).reshape(36, 36)
    name = "convolutional_barycenter2d" + "_debiased" * debiased
    options = dict(stopThr=1e-10, numItermax=5000, log=True)
    beta, log = getattr(gpu_ot.pot.bregman, name)(images, reg, **options)
    _, theirs = getattr(ot.bregman, name)(images, reg, **options)
    for U, V, a, theirs_U in zip(log["U"], log["V"], images, theirs["U"], strict=True):
        P = U.ravel()[:, None] * np.exp(-C / reg) * V.ravel()
        close(P.sum(1), a.ravel(), rtol=1e-8)
        close(P.sum(0), beta.ravel(), rtol=1e-6)
        ratio = theirs_U / U
        close(ratio / ratio.mean(), np.ones((6, 6)), rtol=1e-6)
    assert "U" not in getattr(gpu_ot.pot.bregman, name)(images, reg, method="sinkhorn_log", log=True)[1]
    if not debiased:
        beta, log = gpu_ot.pot.bregman.barycenter(A, M, reg, method="sinkhorn_stabilized", **options)
        for u, v, a in zip(np.exp(log["logu"].T), np.exp(log["logv"].T), A.T, strict=True):
            P = u[:, None] * np.exp(-M / reg) * v
            close(P.sum(1), a, rtol=1e-8)
            close(P.sum(0), beta, rtol=1e-6)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_stabilized"])
def test_logs_hold_the_scalings_of_a_relaxed_barycentre(method):
    A, M = bumps(20, 3)
    A = A * [1, 2, 0.5]
    A[:3, 1] = 0
    options = dict(stopThr=1e-13, numItermax=5000, log=True, method=method)
    beta, log = gpu_ot.pot.unbalanced.barycenter_unbalanced(A, M, 0.05, 0.3, **options)
    theirs, pots = ot.unbalanced.barycenter_unbalanced(A, M, 0.05, 0.3, **options)
    close(beta, theirs, rtol=1e-6)
    at = A > 0
    close(log["logu"][at], pots["logu"][at], atol=1e-5)
    close(log["logv"], pots["logv"], atol=1e-5)


@pytest.mark.parametrize("partial", [False, True])
def test_distances_have_zeros_under_the_kl_loss_too(partial):
    x, y = randn(7, 2, seed=1), randn(6, 3, seed=2)
    C1, C2 = ((z / z.max()).numpy() for z in (torch.cdist(x, x).square(), torch.cdist(y, y).square()))
    if partial:
        given = dict(reg=5.0, m=0.6, loss_fun="kl_loss")
        ours, theirs = (z.gromov.entropic_partial_gromov_wasserstein(C1, C2, **given) for z in (gpu_ot.pot, ot))
    else:
        given = dict(epsilon=0.5, loss_fun="kl_loss", max_iter=5000)
        ours, theirs = (z.gromov.entropic_gromov_wasserstein(C1, C2, **given) for z in (gpu_ot.pot, ot))
    close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("options", [dict(reg=0.0), dict(reg=0.1), dict(reg=5.0, rescale_cost=False)], ids=str)
def test_low_rank_is_feasible_and_no_worse_than_pots(kind, options):
    x, y = randn(50, 3, seed=1), 0.5 + randn(41, 3, seed=2)
    a, b = weights(50), weights(41)
    given = (x, y, a, b) if kind == "torch" else tuple(z.numpy() for z in (x, y, a, b))
    Q, R, g, log = gpu_ot.pot.lowrank_sinkhorn(*given, rank=6, log=True, **options)
    *_, theirs = ot.lowrank_sinkhorn(*(z.numpy() for z in (x, y, a, b)), rank=6, log=True, warn=False, **options)
    assert (
        type(Q) is type(given[0]) and theirs.keys() <= log.keys() and float(log["value"]) <= theirs["value"] + 1e-7
    )  # both stop near one optimum
    P = (Q / g) @ R.T
    for z, w in ((P.sum(1), a), (P.sum(0), b), (Q.sum(1), a), (R.sum(1), b), (Q.sum(0), g), (R.sum(0), g)):
        close(z, w, rtol=0, atol=1e-9)
    close(log["lazy_plan"][:], P, rtol=1e-10, atol=1e-16)
    close(log["lazy_plan"][3:9], P[3:9], rtol=1e-10, atol=1e-16)
    C = torch.cdist(x, y).square().numpy()
    if "rescale_cost" not in options:
        largest = [
            np.hstack((np.square(z).sum(1, keepdims=True), np.ones((len(z), 1)), s * z)).max() for s, z in ((-2, x.numpy()), (1, y.numpy()))
        ]
        C = C / np.sqrt(largest[0] * largest[1])
    close(log["value_linear"], (C * np.asarray(P)).sum(), rtol=1e-9)
    entropy = sum((np.asarray(z) * np.log(np.asarray(z) + 1e-300)).sum() for z in (Q, R, g))
    close(log["value"], (C * np.asarray(P)).sum() + options["reg"] * entropy, rtol=1e-9)


def test_low_rank_by_pots_name_has_derivatives_and_refuses():
    x, y, a, b = leaves(randn(12, 2, seed=1), 0.5 + randn(10, 2, seed=2), weights(12), weights(10))

    def value(x, y, a, b):
        return gpu_ot.pot.lowrank_sinkhorn(x, y, a / a.sum(), b / b.sum(), reg=0.5, rank=2, log=True)[3]["value"]

    assert gradcheck(value, (x, y, a, b), atol=1e-4, fast_mode=True)
    for options, words in (
        (dict(init="other"), "init = 'other'"),
        (dict(gamma_init="other"), "Not implemented gamma_init"),
        (dict(rank=0), "rank must be at least 1"),
        (dict(rank=3, alpha=0.5), "alpha"),
    ):
        refused(words, gpu_ot.pot.lowrank_sinkhorn, x, y, **options)
    with pytest.warns(UserWarning, match="Dykstra did not converge"):
        gpu_ot.pot.lowrank_sinkhorn(x, y, reg=0.1, numItermax=1)
