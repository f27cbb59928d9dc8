"""The drop-in against POT: plans, iterates, logs, warnings, kinds of array; and where it is better on purpose."""

import math
import warnings

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from problems import close, pairwise

METHODS = ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling"]


def _log(z):
    return z.log() if isinstance(z, torch.Tensor) else np.log(z)


@pytest.mark.parametrize("reg, size", pairwise([1.0, 0.1, 0.03], [(1, 1), (1, 6), (20, 30), (101, 64)]), ids=str)
def test_plans_are_pots_where_pot_converges(arrays, size, reg):
    a, b, M = arrays(*size)
    ours, log = gpu_ot.sinkhorn(a, b, M, reg, log=True)
    theirs, their_log = ot.sinkhorn(a, b, M, reg, log=True)
    close(ours, theirs, rtol=0, atol=1e-9)
    assert log["niter"] == their_log["niter"] and type(ours) is type(theirs) and ours.dtype == theirs.dtype
    close(log["err"], their_log["err"], rtol=1e-6, atol=1e-13)
    close(log["u"], their_log["u"], rtol=1e-8)
    close(log["v"], their_log["v"], rtol=1e-8)


@pytest.mark.parametrize("method, iterations", pairwise(METHODS[:3], [1, 2, 3, 10, 100]))
def test_truncated_runs_show_the_same_iterate(arrays, method, iterations):
    """Clients stop on purpose after a few iterations, so the order of updates is part of the contract."""
    a, b, M = arrays(30, 20)
    options = dict(method=method, numItermax=iterations, warn=False, stopThr=0)
    close(gpu_ot.sinkhorn(a, b, M, 0.02, **options), ot.sinkhorn(a, b, M, 0.02, **options), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [*METHODS, "greenkhorn"])
def test_logs_hold_what_pots_hold(arrays, method):
    a, b, M = arrays(15, 12)
    ours, log = gpu_ot.sinkhorn(a, b, M, 0.1, method=method.upper(), log=True)
    theirs, their_log = ot.sinkhorn(a, b, M, 0.1, method=method, log=True)
    assert set(their_log) | {"status", "converged", "n_iter", "errors"} == set(log)
    close(ours, theirs, rtol=0, atol=1e-8)
    for key in set(their_log) - {"err", "niter", "n_iter", "warmstart"}:
        mine, other = np.asarray(log[key]), np.asarray(their_log[key])
        if key in ("u", "v"):
            mine, other = np.log(mine), np.log(other)
        close(mine - mine.mean(), other - other.mean(), atol=1e-6, err_msg=key)
        assert type(log[key]) is type(their_log[key])
    assert log["converged"] and log["status"].name == "converged"


@pytest.mark.parametrize("method", METHODS[:3])
def test_several_histograms_return_their_losses(arrays, method):
    a, b, M = arrays(20, 15)
    stack = np.stack if isinstance(b, np.ndarray) else torch.stack
    B = stack([b, b[[*range(14, -1, -1)]], b * 0 + 1 / 15], 1)
    ours, log = gpu_ot.sinkhorn(a, B, M, 0.05, method=method, log=True, stopThr=1e-11)
    theirs, their_log = ot.sinkhorn(a, B, M, 0.05, method=method, log=True, stopThr=1e-11)
    close(ours, theirs, rtol=1e-7)
    close(gpu_ot.sinkhorn2(a, B, M, 0.05, method=method), theirs, rtol=1e-6)
    alone = gpu_ot.sinkhorn2(a, b, M, 0.05, method=method)
    close(alone, ot.sinkhorn2(a, b, M, 0.05, method=method), rtol=1e-9)
    assert np.ndim(alone) == 0 and isinstance(alone, torch.Tensor) == isinstance(M, torch.Tensor)
    assert set(their_log) <= set(log) and ("err" in log) == ("err" in their_log)
    key = "u" if method == "sinkhorn" else "logu" if method == "sinkhorn_stabilized" else "log_u"
    assert log[key].shape == their_log[key].shape == (20, 3)


@pytest.mark.parametrize("method", [*METHODS, "greenkhorn"])
def test_a_converged_warm_start_stops_at_the_first_look(arrays, method):
    a, b, M = arrays(25, 20)
    _, log = gpu_ot.sinkhorn(a, b, M, 0.05, method=method, log=True)
    scalings = log.get("warmstart") or (_log(log["u"]), _log(log["v"]))
    _, again = gpu_ot.sinkhorn(a, b, M, 0.05, method=method, log=True, warmstart=scalings, stopThr=1e-8)
    assert log["n_iter"] > 0 and again["n_iter"] == 0


def test_warm_starts_of_several_histograms(arrays):
    a, b, M = arrays(12, 10)
    B = (np.stack if isinstance(b, np.ndarray) else torch.stack)([b, b * 0 + 0.1], 1)
    _, log = gpu_ot.sinkhorn(a, B, M, 0.1, log=True)
    _, again = gpu_ot.sinkhorn(a, B, M, 0.1, log=True, warmstart=(_log(log["u"]), _log(log["v"])), stopThr=1e-8)
    assert again["niter"] == 0
    _, log = gpu_ot.sinkhorn(a, B, M, 0.1, method="sinkhorn_log", log=True)
    pairs = [(log["log_u"][:, k], log["log_v"][:, k]) for k in range(2)]
    _, again = gpu_ot.sinkhorn(a, B, M, 0.1, method="sinkhorn_log", log=True, warmstart=pairs, stopThr=1e-8)
    assert again["n_iter"] == 0


@pytest.mark.parametrize("empty", [[], None, "array"])
def test_weights_left_out_are_uniform(arrays, empty):
    _, _, M = arrays(8, 5)
    nothing = M[:0, 0] if isinstance(empty, str) else empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P = gpu_ot.sinkhorn(nothing, nothing, M, 0.5)
    close(P, ot.sinkhorn([], [], M, 0.5), rtol=0, atol=1e-9)


def test_lists_integers_and_mixed_types(problem):
    assert gpu_ot.sinkhorn2([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1) == pytest.approx(0.26894142136999516)
    a, b, M = problem(6, 7)
    whole = (100 * M).round().long()
    truth = ot.sinkhorn(a, b, whole.double(), 10.0)
    close(gpu_ot.sinkhorn(a, b, whole, 10.0), truth, atol=1e-9)  # POT: RuntimeError
    close(gpu_ot.sinkhorn(a.numpy(), b.numpy(), whole.numpy(), 10), truth, atol=1e-9)
    mixed = gpu_ot.sinkhorn(a, b, M.float(), 0.1)  # POT: RuntimeError
    assert mixed.dtype == torch.float32  # the costs' type decides
    close(mixed, ot.sinkhorn(a, b, M.float().double(), 0.1), atol=1e-7)
    assert gpu_ot.sinkhorn(a.float(), b.float(), M.float(), 0.1).dtype == torch.float32
    assert gpu_ot.sinkhorn(a.half(), b.half(), M.half(), 0.1).dtype == torch.float16


def test_arrays_as_they_come(problem):
    """Transposed, strided, read-only, big-endian: numpy takes them, and so does the drop-in, without writing to them."""
    a, b, M = (z.numpy() for z in problem(6, 7))
    truth = gpu_ot.sinkhorn(a, b, M, 0.1)
    frozen = M.copy()
    frozen.setflags(write=False)
    for view in (np.asfortranarray(M), np.repeat(M, 2, 0)[::2], M[::-1][::-1], frozen, M.astype(">f8")):
        before = view.copy()
        close(gpu_ot.sinkhorn(a, b, view, 0.1), truth, atol=1e-15)
        assert (view == before).all()
    tensors = problem(6, 7)
    gpu_ot.sinkhorn(*tensors, 0.1)
    assert all(torch.equal(*z) for z in zip(tensors, problem(6, 7), strict=True))


def test_warnings_say_why(arrays):
    a, b, M = arrays(30, 30)
    with pytest.warns(UserWarning, match="Sinkhorn did not converge") as seen:
        gpu_ot.sinkhorn(a, b, M, 1e-3, numItermax=5)
    assert "max_iter" in str(seen[0].message) and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu_ot.sinkhorn(a, b, M, 1e-3, numItermax=5, warn=False)
        gpu_ot.sinkhorn2(a, b, M, 1e-3, numItermax=5)


def test_float32_stops_at_its_floor_and_does_not_complain(arrays):
    """POT runs all 1000 iterations for a tolerance that float32 cannot reach, and then warns."""
    a, b, M = arrays(30, 30, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P, log = gpu_ot.sinkhorn(a, b, M, 0.1, log=True, stopThr=1e-12)
    assert log["status"].name in ("stalled", "converged") and log["niter"] < 200
    assert P.dtype == M.dtype


def test_unequal_masses_keep_pots_plan_and_burn_no_iterations(arrays):
    """POT's rows are exact whatever the masses, while its scalings drift by the ratio in each iteration until they overflow."""
    a, b, M = arrays(20, 25)
    with pytest.warns(UserWarning, match=r"rows a and columns proportional to b.*sum\(b\) = 1.1"):
        ours, log = gpu_ot.sinkhorn(a, 1.1 * b, M, 0.1, log=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ot.sinkhorn(a, 1.1 * b, M, 0.1)
    close(ours, theirs, rtol=0, atol=1e-9)
    assert log["niter"] < 200
    with pytest.warns(UserWarning, match="proportional to b"):
        close(gpu_ot.sinkhorn(a, 3 * b, M, 0.1), ours, rtol=0, atol=1e-9)  # POT: zeros


def test_reg_zero_is_the_sharpest_plan_not_zeros(arrays):
    a, b, M = arrays(10, 10)
    with pytest.warns(UserWarning, match="numerical errors at iteration 0"):
        P = np.asarray(gpu_ot.sinkhorn(a, b, M, 0, numItermax=5000, warn=False))
    close(P.sum(1), a, rtol=1e-6)
    exact = ot.emd2(np.asarray(a), np.asarray(b), np.asarray(M))
    assert (P * np.asarray(M)).sum() <= exact + 0.02 * np.asarray(M).mean()


@pytest.mark.parametrize("method, side", pairwise(METHODS, ["a", "b", "both"]))
def test_zero_weights_are_empty_atoms(arrays, method, side):
    a, b, M = arrays(10, 12)
    for name, w in (("a", a), ("b", b)):
        if side in (name, "both"):
            w[::3] = 0
            w /= w.sum()
    ours = gpu_ot.sinkhorn(a, b, M, 0.05, method=method)
    close(ours, ot.bregman.sinkhorn_log(a, b, M, 0.05), rtol=0, atol=1e-9)


def test_forbidden_pairs(arrays):
    a, b, M = arrays(6, 6)
    M[0, 1:] = math.inf
    a[0] = 0.5 * b[0]
    a[1:] *= (1 - a[0]) / a[1:].sum()
    ours = gpu_ot.sinkhorn(a, b, M, 0.05)
    close(ours, ot.bregman.sinkhorn_log(a, b, M, 0.05), rtol=0, atol=1e-9)
    assert np.isfinite(np.asarray(gpu_ot.sinkhorn2(a, b, M, 0.05)))


def test_verbose_prints_pots_table(problem, capsys):
    a, b, M = (z.numpy() for z in problem(10, 10))
    gpu_ot.sinkhorn(a, b, M, 0.1, verbose=True)
    ours = capsys.readouterr().out
    ot.sinkhorn(a, b, M, 0.1, verbose=True)
    theirs = capsys.readouterr().out
    seen, expected = ([line.split("|")[0] for line in text.splitlines()] for text in (ours, theirs))
    assert seen[: len(expected)] == expected  # POT leaves out the look at which it stops


def test_unknown_methods_and_unknown_options(problem):
    a, b, M = problem(4, 4)
    with pytest.raises(ValueError, match="Unknown method 'foo'"):
        gpu_ot.sinkhorn(a, b, M, 1.0, method="foo")
    with pytest.raises(ValueError, match="Unknown method 'sinkhorn_epsilon_scaling'"):
        gpu_ot.sinkhorn2(a, b, M, 1.0, method="sinkhorn_epsilon_scaling")  # as in POT
    assert gpu_ot.sinkhorn(a, b, M, 1.0, foo=3, loss=True).shape == (4, 4)  # POT swallows what it does not know


@pytest.mark.parametrize("weights", [np.float32, np.float64])
def test_flow_matching_gets_a_plan(weights):
    """Eight Gaussians on a circle and two moons, float32 costs: POT returns almost no mass; ours is the float64 log-domain plan."""
    gen = torch.Generator().manual_seed(0)
    angle = torch.randint(8, (256,), generator=gen) * math.pi / 4
    x = 5 * torch.stack((angle.cos(), angle.sin()), 1) + 0.1**0.5 * torch.randn(256, 2, generator=gen)
    t, upper = math.pi * torch.rand(256, generator=gen), torch.arange(256) < 128
    moons = torch.stack((torch.where(upper, t.cos(), 1 - t.cos()), torch.where(upper, t.sin(), 0.5 - t.sin())), 1)
    M, a = torch.cdist(x, 3 * (moons + 0.2 * torch.randn(256, 2, generator=gen)) - 1).square().numpy(), ot.unif(256).astype(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = ot.sinkhorn(a, a, M, 0.05), gpu_ot.sinkhorn(a, a, M, 0.05)
        truth = ot.bregman.sinkhorn_log(ot.unif(256), ot.unif(256), M.astype(np.float64), 0.05)
    assert theirs.sum() < 0.01
    assert ours.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(ours - truth).sum() <= 1e-3  # total variation, of plans with mass 1
