"""What is launched again and again as CUDA graphs, on a pretended device: the bits of the launches, or the launches."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

import gpu_ot
import pretend
from gpu_ot import KL, Problem, SqEuclidean
from gpu_ot.geometry import graphs
from problems import rand

pytestmark = pytest.mark.interpreted


@pytest.fixture
def device(monkeypatch):
    for name in ("_proven", "_refused"):
        monkeypatch.setattr(graphs, name, set())
    with pretend.device() as seen:
        yield seen


@pytest.fixture
def both(device, monkeypatch):
    """both(run) -> replays; what `run` gives is, bit by bit, what it gives by launches alone."""

    def check(run):
        before = device.names["graph"]
        found = run()
        replays = device.names["graph"] - before
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "AFTER", 10**9)
            launched = run()
        assert device.names["graph"] - before == replays
        assert found[1:] == launched[1:]
        for z, w in zip(found[0], launched[0], strict=True):
            assert torch.equal(z, w)
        return replays

    return check


def problem(batch=(), penalty=None, eps=0.01, backend="triton"):
    x, y = (rand(*batch, n, 3, seed=n, dtype=torch.float32).to("cuda") for n in (12, 15))
    a, b = ((rand(*batch, n, seed=k) + 0.1).to("cuda") for k, n in ((1, 12), (2, 15)))
    cost = SqEuclidean(x, y)
    weights = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return Problem(cost if backend == "triton" else cost.dense(), eps, *weights, penalty or KL())


def told(solution):
    return [z.cpu() for z in (solution.f, solution.g, solution.value, solution.errors)], solution.n_iter, solution.n_sweeps, solution.status


RUNS = [("none", (3,), KL(0.5)), ("mixing", (), None)]
RUNS += [pytest.param(*run, marks=pytest.mark.slow) for run in (("mixing", (3,), KL(0.5)), ("auto", (), None), ("none", (), KL(0.5)))]


@pytest.mark.parametrize("way, batch, penalty", RUNS)
@pytest.mark.parametrize("backend", ["triton", "dense"])
def test_graphs_change_no_bit(both, backend, way, batch, penalty):
    iterations = 17 if backend == "triton" else 33  # a stored kernel is trusted after 16
    settings = dict(backend=backend, accelerate=way, tol=0.0, max_iter=iterations + 2, check_every=2)
    assert both(lambda: told(gpu_ot.solve(problem(batch, penalty, backend=backend), **settings))) >= 2


def test_a_kernel_that_is_absorbed_anew_is_another_graph(both):
    """At an eps so small that potentials leave the range of the first kernel."""
    settings = dict(backend="dense", tol=0.0, max_iter=61, check_every=2)
    assert both(lambda: told(gpu_ot.solve(problem(eps=5e-4, backend="dense"), accelerate="none", **settings))) >= 2


def test_the_drop_in(both):
    M, a, b = (z.to("cuda") for z in (rand(5, 1100, dtype=torch.float32), torch.full((5,), 1 / 5), torch.full((1100,), 1 / 1100)))
    assert both(lambda: ([gpu_ot.sinkhorn(a, b, M, 0.02, numItermax=100, stopThr=0.0, warn=False).cpu()],)) >= 2


def test_a_block_is_a_few_launches(device):
    gpu_ot.solve(problem(), backend="triton", accelerate="mixing", tol=0.0, max_iter=17, check_every=2)
    blocks = 16 // 2 - 1  # the first after a check of one iteration is a beginning
    assert device.names["graph"] == blocks - graphs.AFTER  # of which one proved the first
    assert device.names["propose_kernel"] <= 1 + 2 * (graphs.AFTER + 3)  # one is captured, one proves it
    short = device.launches
    gpu_ot.solve(problem(), backend="triton", accelerate="mixing", tol=0.0, max_iter=37, check_every=2)
    assert device.launches - 2 * short <= 10 * (5 + 1)  # copies in and out by type, the graph; and the check


def test_problems_of_a_batch_that_are_done_stay(both):
    settings = dict(backend="triton", accelerate="mixing", tol=1e-4, check_every=2, max_iter=40)
    assert both(lambda: told(gpu_ot.solve(problem((3,), eps=0.05), **settings))) >= 1


def test_what_cannot_be_captured_is_launched(device, monkeypatch):
    def refuse(self, *_, **__):
        raise RuntimeError("CUDA error: no graphs here")

    settings = dict(backend="triton", accelerate="none", tol=0.0, max_iter=13, check_every=2)
    monkeypatch.setattr(pretend.CUDAGraph, "capture_begin", refuse)
    with pytest.warns(UserWarning, match="cannot be captured: .*no graphs here.*one by one"):
        refused = told(gpu_ot.solve(problem(), **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = told(gpu_ot.solve(problem(), **settings))  # said once
    assert all(torch.equal(z, w) for z, w in zip(refused[0], again[0], strict=True))


def test_a_graph_that_differs_from_its_launches_does_not_count(both, monkeypatch):
    settings = dict(backend="triton", accelerate="mixing", tol=0.0, max_iter=13, check_every=2)
    replay = pretend.CUDAGraph.replay

    def wrong(self):
        replay(self)
        next(out for *_, out in reversed(self.tape) if isinstance(out, torch.Tensor)).add_(1e-9)

    monkeypatch.setattr(pretend.CUDAGraph, "replay", wrong)
    with pytest.warns(UserWarning, match="give other numbers"):
        assert both(lambda: told(gpu_ot.solve(problem(), **settings))) == 1
