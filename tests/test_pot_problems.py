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


def mixed(n=30, k=3, seed=0):
    """(a, D, M, M0, h0) of POT's unmix."""
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    D = torch.stack([torch.exp(-((t - c) ** 2) / 0.01) + 1e-3 for c in np.linspace(0.2, 0.8, k)], 1)
    D = D / D.sum(0)
    h = weights(k)
    atoms = torch.linspace(0, 1, k, dtype=torch.float64)
    return D @ h, D, (t.unsqueeze(-1) - t).square(), (atoms.unsqueeze(-1) - atoms).square(), torch.full((k,), 1 / k, dtype=torch.float64)


@pytest.mark.parametrize("reg, reg0, alpha", [(0.01, 1.0, 0.01), (0.1, 0.1, 0.5), (0.05, 0.3, 0.0), (0.05, 0.3, 1.0)])
def test_unmixing_is_pots(reg, reg0, alpha):
    given = [z.numpy() for z in mixed()]
    options = dict(numItermax=2000, stopThr=1e-10, log=True)
    theirs, pots = ot.bregman.unmix(*given, reg, reg0, alpha, **options)
    ours, log = gpu_ot.pot.bregman.unmix(*given, reg, reg0, alpha, **options)
    close(ours, theirs, rtol=0, atol=1e-9)
    assert pots.keys() <= log.keys() and log["niter"] == pots["niter"] and isinstance(ours, np.ndarray)
    close(np.array(log["err"]), np.array(pots["err"]), rtol=1e-5, atol=1e-9)
    tensors = gpu_ot.pot.bregman.unmix(*mixed(), reg, reg0, alpha, numItermax=2000, stopThr=1e-10)
    close(tensors, ours, rtol=1e-12)


def test_unmixing_where_pots_kernel_underflows():
    """POT finds NaN, and where an atom is the measure itself, it has the largest weight here."""
    a, D, M, M0, h0 = mixed()
    options = dict(numItermax=200, warn=False)
    with np.errstate(all="ignore"):  # of costs that are all at least 1
        assert np.isnan(ot.bregman.unmix(*(z.numpy() for z in (D[:, 1], D, M + 1, M0, h0)), 1e-3, 1.0, 1e-6, **options)).all()
    h, same = (gpu_ot.pot.bregman.unmix(D[:, 1], D, M + shift, M0, h0, 1e-3, 1.0, 1e-6, **options) for shift in (0, 1))
    close(h, same, rtol=1e-6)
    assert float(h.sum()) == pytest.approx(1, abs=1e-3) and int(h.argmax()) == 1
    D = torch.cat((D[:-3], 0 * D[:3]))
    h = gpu_ot.pot.bregman.unmix(a, D / D.sum(0), M, M0, h0, 0.01, 1.0, 0.1, warn=False)
    assert bool(h.isfinite().all()) and float(h.sum()) == pytest.approx(1, abs=1e-3)


def test_unmixing_has_derivatives_and_refuses():
    a, D, M, M0, h0 = mixed(8)

    def moment(a, D, M, M0, h0):
        options = dict(numItermax=15, stopThr=0, warn=False)
        h = gpu_ot.pot.bregman.unmix(a / a.sum(), D / D.sum(0), M, M0, h0 / h0.sum(), 0.1, 0.5, 0.3, **options)
        return (h * torch.tensor([1.0, -2.0, 0.5], dtype=h.dtype)).sum()

    assert gradcheck(moment, leaves(a, D, M, M0, h0), fast_mode=True)
    given = dict(a=a, D=D, M=M, M0=M0, h0=h0, reg=0.1, reg0=0.1, alpha=0.5)
    for wrong, words in (
        (dict(a=a[:3]), "a has shape (3,)"),
        (dict(M=M0), "M has shape (3, 3)"),
        (dict(M0=M), "M0 has shape (8, 8)"),
        (dict(D=a), "D has shape (8,)"),
        (dict(alpha=1.5), "alpha must be in [0, 1]"),
        (dict(reg=0.0), "reg must be a finite number > 0"),
    ):
        refused([words], gpu_ot.pot.bregman.unmix, **{**given, **wrong})
    with pytest.warns(UserWarning, match="Unmixing did not converge"):
        gpu_ot.pot.bregman.unmix(**given, numItermax=1)


def sources(n=20, seed=0, least=(0, 0)):
    """(Xs, Ys, Xt) of three classes in other shares each; the shares of the target are .2, .3 and .5."""
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    sizes = ((n // 2, n // 4, n // 4), (n // 5, n // 5, n - 2 * (n // 5)), (4, 6, 10))
    labels = [torch.cat([torch.full((s,), c) for c, s in enumerate(each)]) for each in sizes]
    clouds = [centres[y] + 0.1 * randn(len(y), 2, seed=seed + k) for k, y in enumerate(labels)]
    return clouds[:2], [y + shift for y, shift in zip(labels, least, strict=False)], clouds[2]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("least", [(0, 0), (3, 1)])
def test_shares_of_classes_are_pots(kind, least):
    Xs, Ys, Xt = sources(least=least)
    options = dict(reg=0.1, numItermax=5000, stopThr=1e-10, log=True, warn=False)
    arrays = [z.numpy() for z in Xs], [y.numpy().astype(float) for y in Ys], Xt.numpy()
    theirs, pots = ot.bregman.jcpot_barycenter(arrays[0], [y.copy() for y in arrays[1]], arrays[2], **options)
    ours, log = gpu_ot.pot.bregman.jcpot_barycenter(*(arrays if kind == "numpy" else (Xs, Ys, Xt)), **options)
    close(ours, theirs, rtol=0, atol=1e-9)
    close(ours, [0.2, 0.3, 0.5], atol=0.02, rtol=0)
    assert type(ours) is type(Xt if kind == "torch" else arrays[2]) and pots.keys() <= log.keys() and log["niter"] == pots["niter"]
    for key in ("M", "D1", "D2", "gamma"):
        for mine, other in zip(log[key], pots[key], strict=True):
            close(mine, other, rtol=1e-7, atol=1e-9)
    assert float(arrays[1][0].min()) == least[0]  # the caller's labels


def test_shares_of_classes_at_small_reg_and_refusals():
    Xs, Ys, Xt = sources()
    shares = gpu_ot.pot.bregman.jcpot_barycenter(Xs, Ys, Xt, reg=1e-3, numItermax=3000)
    close(shares, [0.2, 0.3, 0.5], atol=1e-3, rtol=0)
    function = gpu_ot.pot.bregman.jcpot_barycenter
    refused(["as many arrays"], function, Xs, Ys[:1], Xt, 0.1)
    refused(["Ys[0] has shape (3,)"], function, Xs, [Ys[0][:3], Ys[1]], Xt, 0.1)
    refused(["number them 0, 1"], function, Xs, [Ys[0], 2 * Ys[1]], Xt, 0.1)
    refused(["reg must be"], function, Xs, Ys, Xt, -1.0)
    with pytest.warns(UserWarning, match="shares of the classes did not converge"):
        function(Xs, Ys, Xt, 0.1, numItermax=1)
    assert gradcheck(
        lambda x, y: function([x, Xs[1]], Ys, y, 0.5, numItermax=10, stopThr=0, warn=False)[0], leaves(Xs[0], Xt), fast_mode=True
    )


def spaces(*sizes):
    """(Cs, Ys, ps): squared distances with largest entry 1, features, and weights."""
    points = [randn(n, 2, seed=n) for n in sizes]
    Cs = [torch.cdist(z, z).square() for z in points]
    return [C / C.max() for C in Cs], [randn(n, 3, seed=20 + n) for n in sizes], [weights(n) for n in sizes]


def numpys(*lists):
    return [[z.numpy() for z in each] for each in lists]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("loss, epsilon", [pytest.param("square_loss", 0.02, marks=pytest.mark.slow), ("kl_loss", 0.5)])
@pytest.mark.parametrize("criterion", ["barycenter", "loss"])
def test_barycentres_of_spaces_are_pots(kind, loss, epsilon, criterion):
    Cs, _, ps = spaces(9, 12, 7)
    arrays = numpys(Cs, ps)
    options = dict(lambdas=[0.2, 0.5, 0.3], loss_fun=loss, epsilon=epsilon, max_iter=300, tol=1e-7, stop_criterion=criterion)
    options |= dict(warmstartT=True, random_state=3, log=True)
    theirs, pots = ot.gromov.entropic_gromov_barycenters(5, *arrays, **options)
    ours, log = gpu_ot.pot.gromov.entropic_gromov_barycenters(5, *(arrays if kind == "numpy" else (Cs, ps)), **options)
    assert type(ours) is type((arrays[0] if kind == "numpy" else Cs)[0]) and pots.keys() <= log.keys() and log["status"].name == "converged"
    close(ours, theirs, rtol=0, atol=2e-6)
    for mine, other in zip(log["T"], pots["T"], strict=True):
        close(mine, other, rtol=0, atol=2e-6)


def test_fused_barycentres_of_spaces_are_pots():
    """By the losses, where POT's turns go on; POT returns the features that it began with."""
    Cs, Ys, ps = spaces(9, 12)
    arrays = numpys(Ys, Cs, ps)
    options = dict(epsilon=0.05, alpha=0.6, max_iter=300, tol=1e-9, warmstartT=True, random_state=3, log=True)
    _, theirs, pots = ot.gromov.entropic_fused_gromov_barycenters(4, *arrays, stop_criterion="loss", **options)
    Y, C, log = gpu_ot.pot.gromov.entropic_fused_gromov_barycenters(4, *arrays, stop_criterion="loss", **options)
    assert pots.keys() <= log.keys()
    close(C, theirs, rtol=0, atol=1e-5)
    close(log["loss"][-1], pots["loss"][-1], rtol=1e-5)
    for mine, other in zip(log["T"] + log["Ms"], pots["T"] + pots["Ms"], strict=True):
        close(mine, other, rtol=0, atol=1e-4)
    close(Y, 4 * sum(0.5 * T @ y for T, y in zip(log["T"], arrays[0], strict=True)), rtol=1e-9)
    Y2, C2, log = gpu_ot.pot.gromov.entropic_fused_gromov_barycenters(4, Ys, Cs, ps, **options)
    assert {"err_feature", "err_structure", "Ts_iter"} <= log.keys() and log["status"].name == "converged" and len(log["Ts_iter"]) > 3
    close(C2, C, rtol=0, atol=1e-6)
    close(Y2, Y, rtol=0, atol=1e-5)


def test_parts_of_a_barycentre_stay_fixed():
    Cs, Ys, _ = spaces(8, 6)
    C, Y = Cs[0][:3, :3].contiguous(), Ys[0][:3]
    function = gpu_ot.pot.gromov.entropic_fused_gromov_barycenters
    options = dict(epsilon=0.1, max_iter=50, tol=1e-6, warmstartT=True)
    kept, moved = function(3, Ys, Cs, init_C=C, init_Y=Y, fixed_features=True, **options)
    assert torch.equal(kept, Y) and not torch.allclose(moved, C)
    moved, kept = function(3, Ys, Cs, init_C=C, init_Y=Y, fixed_structure=True, **options)
    assert torch.equal(kept, C) and not torch.allclose(moved, Y)
    with pytest.warns(UserWarning, match="did not converge"):
        function(3, Ys, Cs, init_C=C, epsilon=0.1, max_iter=1)
    for given, words in (
        (dict(fixed_structure=True), "init_C"),
        (dict(loss_fun="other"), "Unknown `loss_fun"),
        (dict(stop_criterion="other"), "Unknown `stop_criterion"),
        (dict(init_C=C[:2]), "init_C has shape (2, 3)"),
        (dict(p=torch.ones(2)), "p has shape (2,)"),
        (dict(lambdas=[1.0]), "lambdas has shape (1,)"),
        (dict(ps=[torch.ones(8)]), "ps must be a list"),
        (dict(ps=[torch.ones(8), torch.ones(5)]), "ps[1] has shape (5,)"),
        (dict(Cs=[Cs[0], Cs[1][:2]]), "Cs[1] has shape (2, 6)"),
    ):
        refused([words], function, 3, **{"Ys": Ys, "Cs": Cs, **given})
    with pytest.raises(NotImplementedError, match="PPA"):
        function(3, Ys, Cs, solver="PPA")


def test_shares_of_a_class_that_a_source_has_no_point_of():
    Xs, Xt = [randn(9, 2).numpy(), randn(6, 2, seed=1).numpy()], randn(10, 2, seed=2).numpy()
    Ys = [np.array([0, 1, 2] * 3), np.array([0, 1, 1, 0, 1, 0])]
    ours, theirs = (z.bregman.jcpot_barycenter(Xs, Ys, Xt, 0.5) for z in (gpu_ot.pot, ot))
    close(ours, theirs, rtol=0, atol=1e-9)
