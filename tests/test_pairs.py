"""Tiles of points whose pairs matter: the list against what it leaves out, Triton's kernel and its twin by torch against all pairs."""

import functools
import math

import pytest
import torch

import gpu_ot
from gpu_ot import KL, Problem, SqEuclidean, solve
from gpu_ot.geometry import mesh, multiscale, tilepairs
from gpu_ot.geometry.chunked import Chunked
from gpu_ot.geometry.pairs import Pairs
from gpu_ot.geometry.products import kernels_refused
from gpu_ot.geometry.protocol import weigh
from problems import INF, leaves, pairwise, rand, randn, weights

pytestmark = pytest.mark.interpreted


@pytest.fixture(params=["kernel", "torch"])
def form(request, monkeypatch):
    """By Triton's kernel in its interpreter, and by operations of torch."""
    if request.param == "torch":
        monkeypatch.setattr(tilepairs, "kernels_refused", lambda device: "hidden from this test")
        monkeypatch.setattr("gpu_ot.geometry.pairs.kernels_refused", lambda device: "hidden from this test")
    elif kernels_refused(torch.device("cpu")):
        pytest.skip("needs triton")
    return request.param


def cubes(n, m, d):
    return rand(n, d), rand(m, d, seed=1)


def clusters(n, m, d):
    """Tight clusters, points many times, and some far from all others."""
    centres = rand(5, d, seed=3)
    x, y = (centres[torch.arange(k) % 5] + 0.02 * randn(k, d, seed=k) for k in (n, m))
    x[: n // 10] = x[0]
    y[-1] += 2.0
    return x, y


def pose(kind=cubes, n=150, m=201, d=3, blur=0.05, unit=1.0, offset=0.0, **options):
    x, y = (unit * z + offset for z in kind(n, m, d))
    a, b = (weights(k, empty=min(5, k - 1), seed=seed) for seed, k in enumerate((n, m)))
    return Problem(SqEuclidean(x, y), 2 * (unit * blur) ** 2, a, b, **options)


@pytest.mark.parametrize("kind, d, blur, part", pairwise((cubes, clusters), (1, 2, 3), (1.0, 0.05, 0.004), (1e-13, 1e-4)))
def test_what_is_left_out_of_a_sum_is_less_than_allowed(form, kind, d, blur, part):
    """The budget of the kernel is what torch loses to points that are float32 in the same unit, a blur, four times, since the distance of
    two tiles is rounded, too; and a few digits of the largest exponent and of the levels."""
    problem = pose(kind, d=d, blur=blur)
    geometry, eps, every = Pairs(problem, part), problem.eps, Chunked(problem.cost)
    C = problem.cost.dense() / eps

    x, y = problem.cost.inputs.values()
    z, w = (((p - x.mean(0)) / eps**0.5).float() for p in (x, y))
    rounded = (z.unsqueeze(1) - w.unsqueeze(0)).square().sum(-1)

    def slack(h, C, rounded):
        largest = C.gather(1, (h / eps - C).argmax(1, keepdim=True)).squeeze(1)
        size = float(h[h > -INF].abs().max() / eps)
        if form == "torch":
            return 1e-14 * (1 + largest + size + float(C.max()))
        exact, torchs = torch.logsumexp(h / eps - C, 1), torch.logsumexp((h / eps).float() - rounded, 1)
        return 4 * float((exact - torchs).abs().max()) + 1e-6 * (1 + largest + size)

    for seed, size in enumerate((0.0, 1.0, 300.0)):
        h = weigh(size * eps * randn(len(problem.b), seed=seed), problem.b, eps)
        s, truth, off = geometry.softmin(h, eps), every.softmin(h, eps), slack(h, C, rounded)
        assert max((truth - s).max() / eps - off.max(), ((s - truth) / eps - off).max()) <= 1.01 * part
        assert geometry.omitted <= part
        v = randn(len(h), 20, seed=5)
        assert (geometry.apply(s, h, eps, v) - every.apply(truth, h, eps, v)).abs().max() <= 30 * (part + float(off.max()))
        k = weigh(s, problem.a, eps)
        error = ((geometry.T.softmin(k, eps) - every.T.softmin(k, eps)) / eps).abs()
        assert (error - slack(k, C.mT, rounded.mT)).max() <= 1.01 * part


def test_odd_sizes_and_nothing_at_all(form):
    for n, m in ((1, 1), (1, 90), (90, 1), (64, 65), (63, 128)):
        problem = pose(n=n, m=m)
        geometry, h = Pairs(problem, 1e-6), weigh(torch.zeros(m, dtype=torch.float64), problem.b, problem.eps)
        assert float((geometry.softmin(h, problem.eps) - Chunked(problem.cost).softmin(h, problem.eps)).abs().max() / problem.eps) <= 1e-4
        empty = torch.full_like(h, -INF)
        assert (geometry.softmin(empty, problem.eps) == INF).all()
        assert (geometry.apply(torch.zeros_like(problem.a), empty, problem.eps, h.unsqueeze(-1)) == 0).all()


def test_few_pairs_are_left_where_a_blur_reaches_few_points(monkeypatch):
    monkeypatch.setattr(tilepairs, "kernels_refused", lambda device: "hidden from this test")
    problem = pose(n=20_000, m=20_000, d=2, blur=0.004)
    geometry = Pairs(problem, 1e-4)
    geometry.softmin(problem.eps * problem.log_b, problem.eps)
    assert geometry.pairs < 0.1 * 20_000**2


@functools.cache
def value(penalty):
    """That of a problem in the unit 1."""
    return float(solve(pose(blur=0.08, penalties=(penalty, penalty)), backend="softmin", tol=1e-7).value)


PLACES = ((1.0, 0.0), (1.0, 1e4), (1e-8, 0.0), (1e12, 0.0))


@pytest.mark.parametrize("form, place, penalty", pairwise(("kernel", "torch"), PLACES, (KL(), KL(0.1))), indirect=["form"])
def test_solves_in_any_unit(form, place, penalty):
    unit, offset = place
    scaled = KL(penalty.tau * unit**2)
    problem = pose(blur=0.08, unit=unit, offset=offset, penalties=(scaled, scaled))
    s = solve(problem, backend="multiscale", tol=1e-3) if form == "kernel" else _by(problem, 1e-3)
    assert s.converged and float(s.value) / unit**2 == pytest.approx(value(penalty), rel=1e-3)


def _by(problem, tol):
    """A solve whose multiscale backend takes tiles by torch, whether or not there is machine code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mesh, "by_torch", lambda problem: True)
        s = solve(problem, backend="multiscale", tol=tol)
    assert isinstance(s.geometry, Pairs)
    return s


@pytest.mark.slow
def test_gradients_and_maps(form):
    x, y = cubes(120, 130, 3)
    a, b = weights(120, empty=3), weights(130, seed=2)

    def run(solved, tol):
        asked = leaves(x, y, a, b)
        s = solved(Problem(SqEuclidean(*asked[:2]), 0.01, *asked[2:]), tol)
        return *torch.autograd.grad(s.value, asked), s.transport().detach()

    ours, truth = run(_by, 1e-5), run(lambda problem, tol: solve(problem, backend="softmin", tol=tol), 1e-9)
    for mine, right, w in zip(ours, truth, (a, b, a, b, a), strict=True):
        mine, right = (z[w > 0] - z[w > 0].mean() if z.ndim == 1 else z[w > 0] for z in (mine, right))
        assert float((mine - right).norm() / right.norm()) <= 1e-3


def test_the_way_to_the_target_takes_tiles_for_points(monkeypatch):
    """Where eps is large they are no wider than a part of a deviation, and the softmin is right to that part."""
    monkeypatch.setattr(tilepairs, "kernels_refused", lambda device: "hidden from this test")
    problem = pose(n=3000, m=3100, blur=0.01)
    geometry, eps = Pairs(problem, 1e-6), 20_000 * problem.eps
    h = weigh(torch.zeros_like(problem.b), problem.b, eps)
    assert float((geometry.softmin(h, eps) - Chunked(problem.cost).softmin(h, eps)).abs().max() / eps) <= 0.02
    assert geometry.pairs < 0.1 * 3000 * 3100


def test_without_machine_code_multiscale_is_there_still(monkeypatch):
    monkeypatch.setattr(gpu_ot.compiled, "refused", lambda: "hidden from this test")
    monkeypatch.setattr(tilepairs, "kernels_refused", lambda device: "hidden from this test")
    problem = Problem(SqEuclidean(rand(300, 3), rand(310, 3, seed=1)), 0.01)
    s = solve(problem, backend="multiscale", tol=1e-3)
    assert s.converged and isinstance(s.geometry, Pairs)
    assert float(s.value) == pytest.approx(float(solve(problem, backend="softmin", tol=1e-7).value), rel=1e-4)
    far = Problem(SqEuclidean(*(torch.rand(20_000, 3) for _ in range(2))), 1e-6)
    assert 'auto takes "multiscale"' in gpu_ot.explain(far) and math.isfinite(multiscale.memory(far))
