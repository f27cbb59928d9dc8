"""Blocks of iterations as CUDA graphs, on a pretended device: a replay gives the bits of the launches, or launches it is."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

import gpu_ot
import pretend
from gpu_ot import KL, Problem, SqEuclidean
from gpu_ot.solver import captured
from problems import rand

pytestmark = pytest.mark.interpreted


@pytest.fixture
def device(monkeypatch):
    for name in ("_proven", "_refused"):
        monkeypatch.setattr(captured, name, set())
    with pretend.device() as seen:
        yield seen


def problem(batch=(), penalty=None, eps=0.01):
    x, y = (rand(*batch, n, 3, seed=n, dtype=torch.float32).to("cuda") for n in (12, 15))
    a, b = ((rand(*batch, n, seed=k) + 0.1).to("cuda") for k, n in ((1, 12), (2, 15)))
    return Problem(SqEuclidean(x, y), eps, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), penalty or KL())


def told(solution):
    return [z.cpu() for z in (solution.f, solution.g, solution.value, solution.errors)], solution.n_iter, solution.n_sweeps, solution.status


@pytest.mark.parametrize("way", ["none", "mixing", "auto"])
@pytest.mark.parametrize("batch, penalty", [((), None), ((3,), KL(0.5))])
def test_graphs_change_no_bit(device, monkeypatch, way, batch, penalty):
    settings = dict(backend="triton", accelerate=way, tol=0.0, max_iter=36, check_every=5)
    graphed = told(gpu_ot.solve(problem(batch, penalty), **settings))
    replays = device.names["graph"]
    monkeypatch.setattr(captured, "AFTER", 10**9)
    launched = told(gpu_ot.solve(problem(batch, penalty), **settings))
    assert replays >= 2 and device.names["graph"] == replays
    assert graphed[1:] == launched[1:]
    for z, w in zip(graphed[0], launched[0], strict=True):
        assert torch.equal(z, w)


def test_a_block_is_one_launch(device):
    gpu_ot.solve(problem(), backend="triton", accelerate="mixing", tol=0.0, max_iter=41, check_every=5)
    blocks = 40 // 5 - 1  # the first after a check of one iteration is a beginning
    assert device.names["graph"] == blocks - captured.AFTER + 1  # and one that proved it
    assert sum(device.names[name] for name in ("propose_kernel",)) <= 1 + 5 * (captured.AFTER + 3)


def test_problems_of_a_batch_that_are_done_stay(device, monkeypatch):
    settings = dict(backend="triton", accelerate="mixing", tol=1e-4, check_every=2, max_iter=150)
    found = told(gpu_ot.solve(problem((3,)), **settings))
    assert device.names["graph"] > 1 and found[3].name == "converged"
    monkeypatch.setattr(captured, "AFTER", 10**9)
    launched = told(gpu_ot.solve(problem((3,)), **settings))
    assert found[1:] == launched[1:] and all(torch.equal(z, w) for z, w in zip(found[0], launched[0], strict=True))


def test_what_cannot_be_captured_is_launched(device, monkeypatch):
    def refuse(self, *_, **__):
        raise RuntimeError("CUDA error: no graphs here")

    settings = dict(backend="triton", accelerate="none", tol=0.0, max_iter=31, check_every=5)
    monkeypatch.setattr(pretend.CUDAGraph, "capture_begin", refuse)
    with pytest.warns(UserWarning, match="cannot be captured on cuda:0.*no graphs here"):
        refused = told(gpu_ot.solve(problem(), **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = told(gpu_ot.solve(problem(), **settings))  # said once
    assert all(torch.equal(z, w) for z, w in zip(refused[0], again[0], strict=True))


def test_a_graph_that_differs_from_its_launches_does_not_count(device, monkeypatch):
    settings = dict(backend="triton", accelerate="mixing", tol=0.0, max_iter=31, check_every=5)
    replay = pretend.CUDAGraph.replay

    def wrong(self):
        replay(self)
        self.tape[-1][-1].add_(1e-9)

    monkeypatch.setattr(pretend.CUDAGraph, "replay", wrong)
    with pytest.warns(UserWarning, match="differs from its launches"):
        found = told(gpu_ot.solve(problem(), **settings))
    monkeypatch.setattr(captured, "AFTER", 10**9)
    launched = told(gpu_ot.solve(problem(), **settings))
    assert all(torch.equal(z, w) for z, w in zip(found[0], launched[0], strict=True))
