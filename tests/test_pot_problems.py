"""POT's names for problems made of problems, beyond their plans: what `log` holds, and the functions that are more than one solve."""

import numpy as np
import ot
import pytest
import torch

import gpu_ot.pot
from problems import close, randn


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
