"""Clouds of points in POT's terms: lazily and not, their plans as operators, and screening."""

import warnings

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot.pot import bregman, empirical
from gpu_ot.pot.clouds import METRICS
from gpu_ot.pot.refusals import Elsewhere
from gpu_ot.pot.solvers import dist
from problems import close, gradcheck, leaves, measures, pairwise, rand


@pytest.fixture(params=["numpy", "torch"])
def clouds(request):
    """make(n, m) -> (X_s, X_t, a, b)."""

    def make(n=20, m=15):
        x, y, a, b = measures(n, m, 3, shift=0.0)
        z = x, y, a / a.sum(), b / b.sum()
        return tuple(t.numpy() for t in z) if request.param == "numpy" else z

    return make


@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_pots(clouds, metric):
    x, y, *_ = clouds()
    close(dist(x, y, metric), ot.dist(x, y, metric), rtol=0, atol=1e-13)
    close(dist(x, metric=metric), ot.dist(x, x, metric), rtol=0, atol=1e-13)
    assert type(dist(x, y, metric)) is type(x)
    weights = x[0] + 0.1
    if metric == "minkowski":
        close(dist(x, y, metric, p=3, w=weights), ot.dist(x, y, metric, p=3, w=weights), rtol=0, atol=1e-13)


def test_distances_far_from_the_origin_keep_their_digits():
    x = rand(30, 5, dtype=torch.float32) + 1000
    exact = torch.cdist(x.double(), x.double()).square()
    assert (dist(x, x).double() - exact).abs().max() <= 1e-6 * exact.max() < 0.1 * (ot.dist(x, x).double() - exact).abs().max()


@pytest.mark.parametrize("metric", ["euclidean", "minkowski", "sqeuclidean"])
def test_coincident_points_have_gradient_0(metric):
    x = torch.rand(5, 2, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(dist(x, x.detach(), metric).diagonal().sum(), x)
    assert (grad == 0).all()


def test_unknown_metrics_name_pots_function(clouds):
    x, y, *_ = clouds()
    for metric in ("hamming", lambda x, y: 0.0):
        with pytest.raises(Elsewhere, match=r"ot\.dist"):
            dist(x, y, metric)
    assert (dist([[0.0], [1.0]], [[1.0]]) == [[1.0], [0.0]]).all()
    assert dist(np.arange(3)[:, None]).dtype == np.float64


@pytest.mark.parametrize("iterations", [1, 3, 10, 100])
def test_truncated_lazy_runs_show_the_same_iterate(clouds, iterations):
    """f, then g: columns exact, where `ot.sinkhorn` has the rows."""
    x, y, a, b = clouds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(isLazy=True, numIterMax=iterations, stopThr=0)
        ours, theirs = (library.empirical_sinkhorn(x, y, 0.1, a, b, **options) for library in (empirical, ot.bregman))
    for z, w in zip(ours, theirs, strict=True):
        close(z, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_lazy_runs_are_pots_where_it_converges(clouds, metric):
    x, y, a, b = clouds()
    f, g, log = empirical.empirical_sinkhorn(x, y, 0.1, a, b, metric=metric, isLazy=True, log=True)
    F, G, their_log = ot.bregman.empirical_sinkhorn(x, y, 0.1, a, b, metric=metric, isLazy=True, log=True)
    close(f, F, rtol=0, atol=1e-7)
    close(g, G, rtol=0, atol=1e-7)
    assert set(their_log) <= set(log) and log["status"].name == "converged" and type(f) is type(F)
    close(log["lazy_plan"][:], their_log["lazy_plan"][:], rtol=0, atol=1e-10)
    loss = empirical.empirical_sinkhorn2(x, y, 0.1, a, b, metric=metric, isLazy=True)
    close(loss, ot.bregman.empirical_sinkhorn2(x, y, 0.1, a, b, metric=metric, isLazy=True), rtol=1e-8)
    assert np.ndim(loss) == 0 and isinstance(loss, torch.Tensor) == isinstance(x, torch.Tensor)


def test_warm_starts_of_lazy_runs(clouds):
    x, y, a, b = clouds()
    f, g, log = empirical.empirical_sinkhorn(x, y, 0.1, a, b, isLazy=True, log=True)
    *_, again = empirical.empirical_sinkhorn(x, y, 0.1, a, b, isLazy=True, log=True, warmstart=(f, g), stopThr=1e-7)
    assert log["niter"] > 0 and again["niter"] == 0


def test_dense_runs_are_pots(clouds):
    x, y, a, b = clouds()
    close(empirical.empirical_sinkhorn(x, y, 0.1, a, b), ot.bregman.empirical_sinkhorn(x, y, 0.1, a, b), rtol=0, atol=1e-10)
    ours, log = empirical.empirical_sinkhorn2(x, y, 0.1, log=True)
    theirs, their_log = ot.bregman.empirical_sinkhorn2(x, y, 0.1, log=True)
    close(ours, theirs, rtol=1e-9)
    assert set(their_log) <= set(log)


def test_divergences(clouds):
    x, y, a, b = clouds()
    ours, log = empirical.empirical_sinkhorn_divergence(x, y, 0.1, a, b, log=True)
    theirs, their_log = ot.bregman.empirical_sinkhorn_divergence(x, y, 0.1, a, b, log=True)
    close(ours, theirs, rtol=1e-7)
    assert np.shape(ours) == np.shape(theirs) and type(ours) is type(theirs) and set(log) == set(their_log)
    assert float(empirical.empirical_sinkhorn_divergence(x, x, 0.1)) == 0


def test_lazy_runs_hold_no_matrix(monkeypatch):
    """In blocks far smaller than n by m; the largest tensor made is one of them."""
    for name in ("geometry.select.DENSE_BYTES", "geometry.chunked.CPU_ENTRIES", "costs.base.BLOCK", "solution.plan.BLOCK"):
        monkeypatch.setattr(f"gpu_ot.{name}", 2**11)
    n = 150
    x, y = rand(2, n, 2)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(z.numel() for z in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(z, torch.Tensor))
            return out

    with Watch():
        x.requires_grad_()
        loss, log = empirical.empirical_sinkhorn2(x, y, 0.3, isLazy=True, log=True)
        loss.backward()
        plan = log["lazy_plan"]
        plan.sum(0), plan @ y, plan.diagonal(), plan.sample(10)
    assert log["converged"] and max(sizes) < n * n / 4
    close(loss.detach(), ot.bregman.empirical_sinkhorn2(x.detach(), y, 0.3), rtol=1e-7)


def test_lazy_plans_are_operators(clouds):
    """Read like POT's, in kind; their products and sums: test_solution.py."""
    x, y, a, b = clouds()
    ours, theirs = (z.empirical_sinkhorn(x, y, 0.1, a, b, isLazy=True, log=True)[2]["lazy_plan"] for z in (empirical, ot.bregman))
    P = ours[:]
    assert ours.shape == P.shape == (20, 15) and ours.ndim == 2 and type(P) is type(x)
    for key in [(1, 2), 3, slice(2, 5), (slice(None), -1), (slice(0, 4), slice(3, 9)), slice(None)]:
        if key != (slice(None), -1):  # POT's slice(-1, 0) is empty
            assert ours[key].shape == theirs[key].shape
        rows, columns = (*key, slice(None))[:2] if isinstance(key, tuple) else (key, slice(None))
        expected = P[[rows] if isinstance(rows, int) else rows][:, [columns] if isinstance(columns, int) else columns]
        close(ours[key], expected, rtol=1e-12)
    for found, right in ((ours.to_dense(), P), (ours.T[:], P.T), (ours @ y, P @ y), (ours.sum(1), P.sum(1))):
        close(found, right, rtol=1e-12)
    close(ours.diagonal(), np.diagonal(P), rtol=1e-12)
    close(ot.utils.reduce_lazytensor(ours, lambda z, axis: z.sum(axis), axis=0), b, rtol=1e-9)  # POT's own code reads it
    with pytest.raises(IndexError):
        ours[20, 0]


def test_samples_come_in_kind(clouds):
    """Where they fall: test_solution.py."""
    x, y, a, b = clouds()
    plan = empirical.empirical_sinkhorn(x, y, 0.3, a, b, isLazy=True, log=True)[-1]["lazy_plan"]
    rows = np.zeros(50, dtype=int)
    for found in (*plan.sample(50), plan.sample_columns(rows if isinstance(x, np.ndarray) else torch.from_numpy(rows))):
        assert type(found) is type(x) and found.shape == (50,)
    assert plan.sample_columns().shape == (20,)


def test_costs_make_lazy_plans(clouds):
    x, y, a, b = (torch.as_tensor(z) for z in clouds())
    cost = gpu_ot.SqEuclidean(x, y)
    P, log = bregman.sinkhorn(a, b, cost, 0.1, log=True)
    theirs, their_log = ot.sinkhorn(a, b, cost.dense(), 0.1, log=True)
    close(P.to_dense(), theirs, rtol=0, atol=1e-10)
    assert set(their_log) <= set(log)
    close(log["u"], their_log["u"], rtol=1e-8)
    close(bregman.sinkhorn2(a, b, cost, 0.1), ot.sinkhorn2(a, b, cost.dense(), 0.1), rtol=1e-9)
    for refused in (lambda: bregman.sinkhorn(a, b, cost, 0), lambda: bregman.sinkhorn(a, torch.stack((b, b), 1), cost, 0.1)):
        with pytest.raises(gpu_ot.ProblemError, match=r"M\.dense\(\)"):
            refused()


@pytest.mark.parametrize("metric, lazy", pairwise(METRICS, [False, True]))
def test_gradients_reach_points_and_weights(metric, lazy):
    def loss(x, y, a, b):
        a, b = a / a.sum(), b / b.sum()
        return empirical.empirical_sinkhorn2(x, y, 0.3, a, b, metric=metric, isLazy=lazy, numIterMax=20, stopThr=0.0, warn=False)

    assert gradcheck(loss, leaves(*(rand(*size, seed=7) + 0.1 for size in ((5, 3), (4, 3), (5,), (4,)))))


def test_gradients_of_the_divergence_are_pots():
    inputs = leaves(*rand(2, 6, 2))
    ours, theirs = (z.empirical_sinkhorn_divergence(*inputs, 0.3, stopThr=1e-13).sum() for z in (empirical, ot.bregman))
    torch.testing.assert_close(*(torch.autograd.grad(z, inputs) for z in (ours, theirs)), rtol=1e-7, atol=1e-10)


def test_zero_weights_lazily(clouds):
    x, y, a, b = clouds()
    a[:3], b[-2:] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    f, g, log = empirical.empirical_sinkhorn(x, y, 0.1, a, b, isLazy=True, log=True)
    close(log["lazy_plan"][:], ot.bregman.sinkhorn_log(a, b, dist(x, y), 0.1), rtol=0, atol=1e-9)
    assert (np.asarray(f)[:3] == -np.inf).all() and np.isfinite(np.asarray(g)[:-2]).all()


def test_lazy_warnings_and_refusals(clouds, capsys):
    x, y, a, _ = clouds()
    with pytest.warns(UserWarning, match="Sinkhorn did not converge") as seen:
        empirical.empirical_sinkhorn(x, y, 0.01, isLazy=True, numIterMax=5)
    assert seen[0].filename == __file__
    with pytest.raises(ValueError, match="Batch size must be in integer or a tuple of two integers"):
        empirical.empirical_sinkhorn(x, y, 0.1, isLazy=True, batchSize=0.5)
    with pytest.raises(ValueError, match=r"warmstart\[1\]"):
        empirical.empirical_sinkhorn(x, y, 0.1, isLazy=True, warmstart=(a, a))
    empirical.empirical_sinkhorn(x, y, 0.1, isLazy=True, verbose=True)
    assert not capsys.readouterr().out  # as in POT, which prints every 100 iterations
    empirical.empirical_sinkhorn(x, y, 0.1, isLazy=True, verbose=True, stopThr=0, numIterMax=250, warn=False)
    assert capsys.readouterr().out.count("Error in marginal at iteration") == 2


def test_screening_keeps_everything(clouds):
    """POT's screened plan misses its marginals, ours is the plan itself."""
    x, y, a, b = clouds(n=30, m=30)
    M = dist(x, y)
    P, log = bregman.screenkhorn(a, b, M, 0.1, log=True)
    close(P, ot.bregman.sinkhorn_log(a, b, M, 0.1), rtol=0, atol=1e-9)
    u, v = np.asarray(log["u"]), np.asarray(log["v"])
    close(u[:, None] * np.exp(-np.asarray(M) / 0.1) * v, P, rtol=1e-9)
    assert np.asarray(log["Isel"]).all() and np.asarray(log["Jsel"]).dtype == bool
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ot.bregman.screenkhorn(a, b, M, 0.1)
    assert np.abs(np.asarray(theirs).sum(1) - np.asarray(a)).max() > 1e-3
