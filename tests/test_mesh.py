"""Clouds in one to three dimensions by way of a mesh, and from the pairs that matter: against the sums over all pairs."""

import math
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpu_ot
from gpu_ot import KL, TV, Cosine, Dot, Euclidean, Problem, SamplesLoss, SqEuclidean, compiled, solve
from gpu_ot.geometry import mesh, multiscale, nodes, select, tiles
from gpu_ot.geometry.chunked import Chunked
from gpu_ot.geometry.protocol import Geometry, weigh
from gpu_ot.geometry.select import bind
from gpu_ot.solution.measured import measure
from gpu_ot.solver import fused
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.criterion import Marginal
from gpu_ot.solver.loop import sinkhorn
from gpu_ot.solver.step import Alternating, Start
from gpu_ot.vectors import PIECE
from problems import INF, leaves, pairwise, rand, randn, weights

machine_code = pytest.mark.skipif(bool(compiled.refused()), reason="needs numba")


def made_of(form, monkeypatch):
    """The mesh by machine code, or by operations of torch."""
    if form == "torch":
        monkeypatch.setattr(mesh, "by_torch", lambda problem: True)
    elif compiled.refused():
        pytest.skip("needs numba")


@pytest.fixture(params=["machine code", "torch"])
def form(request, monkeypatch):
    made_of(request.param, monkeypatch)


@pytest.fixture(params=["mesh", "mesh, torch", "multiscale"])
def backend(request, monkeypatch):
    name, _, form = request.param.partition(", ")
    if name == "mesh":
        made_of(form, monkeypatch)
    return name


def sphere_and_torus(n, m, d=3):
    """Two surfaces of unit size, whose points must move by a tenth of it and more."""
    z = randn(n, 3)
    x = 0.5 + 0.35 * z / z.norm(dim=-1, keepdim=True)
    s, t = (2 * math.pi * rand(m, seed=seed) for seed in (1, 2))
    ring = 0.33 + 0.13 * t.cos()
    return x[:, :d], 0.5 + torch.stack((ring * s.cos(), ring * s.sin(), 0.13 * t.sin()), -1)[:, :d]


def cubes(n, m, d=3):
    return rand(n, d), rand(m, d, seed=1)


def clusters(n, m, d=3):
    """Few tight clusters and points far from all of them, some points many times."""
    centres = rand(12, d, seed=3)
    x, y = (centres[torch.arange(k) % 12] + 0.02 * randn(k, d, seed=k) for k in (n, m))
    x[: n // 20] = x[0]
    y[:3] += 2.0
    return x, y


CLOUDS = {"cubes": cubes, "surfaces": sphere_and_torus, "clusters": clusters}


def pose(kind="cubes", n=700, m=833, d=3, blur=0.05, **options):
    x, y = CLOUDS[kind](n, m, d)
    a, b = (weights(k, empty=7, seed=seed) for seed, k in enumerate((n, m)))
    return Problem(SqEuclidean(x, y), 2 * blur**2, a, b, **options)


def shape_of(f, a):
    """f up to a constant, where it matters."""
    return torch.where(a > 0, f - (a * f).sum() / a.sum(), 0.0)


def exact(problem):
    return Chunked(problem.cost)


class OfNoPoints(SqEuclidean):
    """A cost that keeps its sides to itself."""

    sides = None


# The pairs that matter: exact to a part of each sum, whatever the points and potentials.


@machine_code
@pytest.mark.parametrize("kind, d, blur, part", pairwise(tuple(CLOUDS), (1, 2, 3), (1.0, 0.05, 0.002), (1e-13, 1e-4)))
def test_what_is_left_out_of_a_sum_is_less_than_allowed(kind, d, blur, part):
    problem = pose(kind, d=d, blur=blur)
    geometry, eps = multiscale.Multiscale(problem, part), problem.eps
    for seed, size in enumerate((0.0, 1.0, 300.0)):
        h = weigh(size * eps * randn(len(problem.b), seed=seed), problem.b, eps)
        s, truth = geometry.softmin(h, eps), exact(problem).softmin(h, eps)
        slack = 1e-14 * (1 + float((truth.abs().max() + problem.cost.dense().max()) / eps))
        assert (s >= truth - slack * eps).all() and ((s - truth) / eps).max() <= 1.01 * part + slack
        assert geometry.omitted <= part
        v = randn(len(h), 2, seed=5)
        worst = (geometry.apply(s, h, eps, v) - exact(problem).apply(truth, h, eps, v)).abs().max()
        assert worst <= 30 * (part + slack)
        k = weigh(s, problem.a, eps)
        assert ((geometry.T.softmin(k, eps) - exact(problem).T.softmin(k, eps)) / eps).abs().max() <= 1.01 * part + slack


@machine_code
def test_few_pairs_are_left_where_a_blur_reaches_few_points():
    problem = pose("cubes", 20_000, 20_000, blur=0.005)
    geometry = multiscale.Multiscale(problem, 1e-4)
    geometry.softmin(problem.eps * problem.log_b, problem.eps)
    assert geometry.pairs < 0.1 * 20_000**2


def test_one_point_and_points_in_one_place(backend):
    for n, m in ((1, 1), (1, 90), (90, 1)):
        x, y = torch.zeros(n, 3, dtype=torch.float64), torch.ones(m, 3, dtype=torch.float64)
        s = solve(Problem(SqEuclidean(x, y), 0.1), backend=backend, tol=1e-4)
        assert s.converged and float(s.sharp_cost) == pytest.approx(3.0, rel=1e-4)
        assert float((s.f + s.g[0] - 3.0).abs().max()) <= 1e-3


# The mesh: an error that falls with its step, and is known.


@pytest.mark.parametrize(
    "kind, d, allowed", [("cubes", 3, 1e-3), ("cubes", 2, 2e-3), ("cubes", 1, 4e-3), ("surfaces", 3, 4e-3), ("clusters", 2, 4e-3)]
)
def test_a_finer_mesh_is_more_exact(form, kind, d, allowed):
    """At the solution, after a sweep each way that finds the tilts: mean error in eps, 30 times smaller with a third of the step."""
    problem = pose(kind, d=d)
    eps, s = problem.eps, solve(problem, backend="dense", tol=1e-8)
    k, h = s.levels
    found = []
    for per in (2.0, 6.0):
        geometry = mesh.Mesh(problem, per)
        for _ in range(2):
            rows, columns = geometry.softmin(h, eps), geometry.T.softmin(k, eps)
        errors = [((z - e) / eps).abs() for z, e in ((rows, exact(problem).softmin(h, eps)), (columns, exact(problem).T.softmin(k, eps)))]
        found.append(max(float((w * e).sum()) for w, e in zip((problem.a, problem.b), errors, strict=True)))
    assert found[0] <= allowed and found[1] <= max(found[0] / 30, 1e-6), found


@machine_code
@pytest.mark.parametrize("kind, d, per", [("cubes", 3, 1.7), ("surfaces", 2, 3.0), ("cubes", 1, 2.0), ("surfaces", 3, 2.3)])
def test_torch_makes_the_same_sums(monkeypatch, kind, d, per):
    """To rounding, where groups are cells; with tilts that were learnt, handed down and turned."""
    monkeypatch.setattr(nodes, "SMALLEST", 1024)
    monkeypatch.setattr(nodes, "LARGEST", 1024)
    problem, both = pose(kind, 400, 501, d=d), []
    for Pair in (mesh.Pair, nodes.Pair):
        pair, (f, g), found = Pair(problem, per), (torch.zeros_like(z) for z in (problem.a, problem.b)), []
        for eps in (4 * problem.eps, problem.eps):
            for _ in range(3):
                f = pair.updated(g, problem.log_b, eps, 1.1, False)
                g = pair.updated(f, problem.log_a, eps, 1.0, True)
            for v, turned in ((randn(501, seed=2), False), (randn(400, seed=3), True)):
                v[::5] = 0
                logs, sign = pair.sums(f if turned else g, v, eps, turned)
                found += [logs, sign]
        both.append([f, g, *found])
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_products_and_signs_on_the_mesh(form):
    problem = pose("surfaces")
    s = solve(problem, backend="dense", tol=1e-6)
    k, h = s.levels
    geometry = mesh.Mesh(problem, 5.0)
    geometry.softmin(h, problem.eps), geometry.T.softmin(k, problem.eps)
    v = randn(len(h), 3, seed=4)
    v[::3] = 0
    assert float((geometry.apply(k, h, problem.eps, v) - exact(problem).apply(k, h, problem.eps, v)).abs().mean()) <= 2e-6
    empty = torch.full_like(h, -INF)
    assert (geometry.softmin(empty, problem.eps) == INF).all()
    assert (geometry.apply(k, empty, problem.eps, v) == 0).all()


# Whole solves.


@pytest.mark.parametrize(
    "kind, penalty, d, tol", pairwise(tuple(CLOUDS), (KL(), KL(0.1), (KL(), KL(0.02)), (KL(1.0), TV(0.1))), (1, 2, 3), (1e-2, 2e-3))
)
def test_solves_are_as_exact_as_asked(backend, kind, penalty, d, tol):
    """Or say that they are not. Exact marginals of all points, in the order of the points as they were given."""
    problem = pose(kind, d=d, blur=0.08, penalties=penalty)
    s = solve(problem, backend=backend, tol=tol)
    assert s.status.name == "converged", s.status
    everything = measure(problem, s.f, s.g, samples=10**6)
    # Errors of one update make themselves felt where the other side has been relaxed: those of the loop are within tol.
    assert everything.columns <= 1.1 * tol and everything.rows <= 1.1 * tol
    truth = solve(problem, backend="dense", tol=1e-9)
    assert float(s.value) == pytest.approx(float(truth.value), rel=3 * tol, abs=tol * problem.eps)


def test_a_tolerance_that_cannot_be_met_is_a_status(monkeypatch):
    monkeypatch.setattr(mesh, "FINEST", mesh.COARSEST)
    s = solve(pose("surfaces"), backend="mesh", tol=2e-4)
    assert s.status.name == "inexact" and not s.converged and "multiscale" in str(s.status)
    assert s.measured.bound > 2e-4


def test_a_mesh_is_refined_until_it_is_exact_enough(monkeypatch):
    monkeypatch.setattr(mesh, "ERROR", 1e-9)  # an estimate that is far too good
    s = solve(pose("surfaces"), backend="mesh", tol=1e-3)
    assert s.converged and s.geometry.per > mesh.COARSEST and s.measured.bound <= 1e-3


@pytest.mark.slow
def test_the_bound_holds(form):
    """In 198 of 200 random problems and more: the error of all points is within the bound of the sample."""
    held = 0
    for seed in range(200):
        n, m, d = 300 + 7 * seed, 2000 - 5 * seed, 1 + seed % 3
        a = rand(n, seed=seed) ** 2
        problem = Problem(SqEuclidean(rand(n, d, seed=seed), rand(m, d, seed=seed + 1) ** 2), 0.002 + 0.0001 * seed, a / a.sum())
        s = solve(problem, backend="mesh", tol=1e-2)
        everything = measure(problem, s.f, s.g, samples=10**6)
        held += everything.rows <= s.measured.rows_bound and everything.columns <= s.measured.columns_bound
    assert held >= 198


def test_far_from_the_origin_and_in_any_unit(backend):
    x, y = sphere_and_torus(600, 500)
    truth = solve(Problem(SqEuclidean(x, y), 0.02), backend="dense", tol=1e-6)
    for unit, offset in ((1.0, 1e4), (1e-8, 0.0), (1e12, 0.0)):
        s = solve(Problem(SqEuclidean(unit * x + offset, unit * y + offset), 0.02 * unit**2), backend=backend, tol=3e-4)
        assert s.converged, s.status
        assert float(s.value) / unit**2 == pytest.approx(float(truth.value), rel=1e-4)


def test_float32_points_keep_their_digits(backend):
    x, y = (z.float() + 100 for z in cubes(500, 500))
    ours = solve(Problem(SqEuclidean(x, y), 0.02), backend=backend, tol=3e-4)
    truth = solve(Problem(SqEuclidean(x.double(), y.double()), 0.02), backend="dense", tol=1e-5)
    assert float(ours.value) == pytest.approx(float(truth.value), rel=1e-4) and ours.value.dtype == torch.float32


@machine_code
@pytest.mark.slow
def test_points_far_outside_the_other_cloud():
    """A tenth of the mass a hundred blurs away, and one point ten times as far: the pairs that matter are exact, and the mesh says that
    it is not."""
    x, y = cubes(500, 600)
    x[:50] += 5.0
    x[50] += 50.0
    problem = Problem(SqEuclidean(x, y), 2 * 0.05**2)
    s, truth = solve(problem, backend="multiscale", tol=1e-3), solve(problem, backend="dense", tol=1e-5)
    assert s.converged and float(s.value) == pytest.approx(float(truth.value), rel=1e-3)
    assert solve(problem, backend="mesh", tol=1e-3, max_iter=200).status.name in ("inexact", "max_iter")


def test_the_value_has_the_gradients_of_its_envelope(backend):
    """In the points and in both weights, against those of the dense solution."""
    x, y = sphere_and_torus(400, 500)
    a, b = weights(400, empty=3), weights(500, seed=2)

    def run(backend, tol):
        asked = leaves(x, y, a, b)
        s = solve(Problem(SqEuclidean(*asked[:2]), 0.01, *asked[2:]), backend=backend, tol=tol)
        return torch.autograd.grad(s.value, asked)

    for mine, right, w in zip(run(backend, 1e-4), run("dense", 1e-9), (a, b, a, b), strict=True):
        live = w > 0
        mine, right = (z - z.mean() if z.ndim == 1 else z for z in (mine[live], right[live]))  # a constant in a weight means nothing
        assert float((mine - right).norm() / right.norm()) <= 2e-3


def test_where_the_plan_sends_points(backend):
    problem = pose("surfaces")
    s, truth = solve(problem, backend=backend, tol=1e-4), solve(problem, backend="dense", tol=1e-8)
    assert float((s.transport() - truth.transport())[7:].norm(dim=-1).mean()) <= 1e-4
    assert float(s.sharp_cost) == pytest.approx(float(truth.sharp_cost), rel=1e-3)


def test_a_cost_of_three_features_that_folds_will_do(form):
    x, y = sphere_and_torus(300, 400)
    for cost in (Dot(x, y), 0.5 * SqEuclidean(x, y), 2.0 * SqEuclidean(x[:, :2], y[:, :2]) + SqEuclidean(x[:, 2:], y[:, 2:])):
        problem = Problem(cost, 0.01)
        ours, truth = solve(problem, backend="mesh", tol=1e-4), solve(problem, backend="dense", tol=1e-6)
        assert ours.converged and float(ours.value) == pytest.approx(float(truth.value), abs=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_batches_are_solved_one_by_one(backend, shared):
    """Values, marginals, gradients and maps of each problem, of clouds of its own or of weights of its own."""
    x, y = sphere_and_torus(300, 260)
    clouds = (x, y) if shared else (torch.stack((x, 0.9 * x, x)), torch.stack((y, y, y + 0.05)))
    a = torch.stack([weights(300, empty=7, seed=k) for k in range(3)])

    def run(backend, tol):
        asked = leaves(*clouds, a)
        s = solve(Problem(SqEuclidean(*asked[:2]), 0.01, asked[2]), backend=backend, tol=tol)
        return s, s.value, *torch.autograd.grad(s.value.sum(), asked), s.transport().detach()[..., 7:, :], s.sharp_cost

    (s, value, *others), (_, right, *truths) = run(backend, 2e-4), run("dense", 1e-8)
    assert s.converged.all() and s.converged.shape == (3,) and s.measure().bound <= 2e-4
    torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-6)
    for mine, truth, live in zip(others, truths, (True, True, a > 0, True, True), strict=True):
        mine, truth = mine.detach(), truth.detach()
        if live is not True:  # a constant in the gradient of a weight means nothing
            mine, truth = (torch.where(live, z - z.sum(-1, keepdim=True) / live.sum(-1, keepdim=True), 0.0) for z in (mine, truth))
        assert float((mine - truth).norm() / truth.norm()) <= 2e-3


@machine_code
@pytest.mark.parametrize("penalty", [KL(), KL(0.1)])
def test_long_vectors_are_taken_off_torch_and_nothing_changes(monkeypatch, penalty):
    """The same iterations by compiled vectors and by torch's, in the mesh's own update and in the protocol's."""
    problem = pose("surfaces", 2500, 2600, penalties=(penalty, penalty))
    ours = solve(problem, backend="mesh", tol=1e-4)
    monkeypatch.setattr(fused, "on_one_core", lambda *z: False)
    monkeypatch.setattr(mesh.Mesh, "iterate", Geometry.iterate)
    theirs = solve(problem, backend="mesh", tol=1e-4)
    assert ours.n_iter == theirs.n_iter
    torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-5, atol=1e-11)
    torch.testing.assert_close(ours.f, theirs.f, rtol=1e-8, atol=1e-10)


#: Operations that touch no number.
VIEWS = ("alias", "detach", "empty", "expand", "lift_fresh", "reshape", "unbind", "view")


@machine_code
def test_no_iteration_wakes_torchs_threads(monkeypatch):
    """Between two sweeps there is no operation of torch on a long vector, which would be shared out to all cores."""
    problem = pose("surfaces", 4000, 4100)
    geometry, seen = mesh.Mesh(problem, 2.0), []

    class Long(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            size = max((z.numel() for z in tree_leaves((args, out)) if isinstance(z, torch.Tensor)), default=0)
            if size > PIECE and func.overloadpacket.__name__ not in VIEWS:
                seen.append(func.overloadpacket.__name__)
            return out

    def run(k):
        step = Alternating(problem, problem.eps, Anderson(gauge=True))
        sinkhorn(geometry, step, Marginal(1e-9), Start(torch.zeros_like(problem.a), problem.a), max_iter=k, check_every=1)

    counts = []
    with torch.no_grad():
        run(1)  # logarithms of the weights are taken once
        for k in (5, 15):
            seen.clear()
            with Long():
                run(k)
            counts.append(sorted(seen))
    assert counts[0] == counts[1]


# Which backend is taken, and what is refused.


@pytest.mark.parametrize(
    "cost, said",
    [
        (Euclidean(rand(9, 3), rand(8, 3)), "no squared distance"),
        (Cosine(rand(9, 4), rand(8, 4)), "4 features"),
        (OfNoPoints(rand(2, 9, 3), rand(2, 8, 3)), "where the points"),
        (torch.rand(4, 4), "a matrix"),
    ],
    ids=lambda z: z if isinstance(z, str) else "",
)
def test_refusals_say_why(backend, cost, said):
    with pytest.raises(gpu_ot.BackendError, match=said):
        solve(Problem(cost, 0.1), backend=backend)


@machine_code
def test_auto_chooses_by_size_dimension_and_eps():
    def taken(n, d, eps, tol=1e-3):
        said = gpu_ot.explain(Problem(SqEuclidean(rand(n, d), rand(n, d, seed=1)), eps), tol)
        return said.split('auto takes "')[1].split('"')[0]

    assert taken(2000, 3, 0.005) == "compiled"
    assert taken(30_000, 3, 0.005) == "mesh"
    assert taken(30_000, 4, 0.005) == "chunked"
    assert taken(30_000, 3, 1e-6) == "multiscale"
    assert taken(30_000, 3, 1e-6, tol=None) == "multiscale"
    assert taken(30_000, 3, 0.05, tol=None) == "chunked"


@machine_code
def test_auto_goes_on_exactly_where_the_mesh_cannot_meet_the_tolerance(monkeypatch):
    monkeypatch.setattr(mesh, "FINEST", mesh.COARSEST)
    monkeypatch.setattr(select, "_rules", lambda problem, tol: iter([select.Rule("mesh", "this is a test")]))
    problem = pose("surfaces")
    s = solve(problem, tol=2e-4)
    assert s.converged and isinstance(s.geometry, multiscale.Multiscale)
    assert measure(problem, s.f, s.g, samples=10**6).error <= 2e-4


def test_measured_errors_are_those_of_all_points():
    problem = pose("surfaces", 300, 400)
    s = solve(problem, backend="dense", tol=1e-2)
    sampled, everything = s.measure(200), s.measure(10**6)
    assert everything.rows <= 1e-9 and everything.columns == pytest.approx(float(s.errors[-1]), rel=1e-6)
    assert sampled.columns == pytest.approx(everything.columns, rel=0.3) and sampled.bound >= everything.error
    turned = solve(problem.T, backend="dense", tol=1e-2).measure()
    assert turned.T.rows == turned.columns
    batch = solve(Problem(rand(2, 5, 6), 0.1), backend="softmin", tol=1e-2)
    assert batch.measure().columns == pytest.approx(float(batch.errors[-1].max()), rel=1e-6)
    with pytest.raises(gpu_ot.ProblemError, match="sum `plan`"):
        solve(Problem(OfNoPoints(rand(2, 9, 3), rand(2, 8, 3)), 0.1), backend="softmin").measure()


def test_samples_loss_multiscale():
    x, y = (z.float() for z in sphere_and_torus(700, 600))
    ours, right = leaves(x, y), leaves(x, y)
    S = SamplesLoss(blur=0.05, backend="multiscale", tol=1e-4)(*ours)
    truth = SamplesLoss(blur=0.05, backend="dense", tol=1e-6)(*right)
    assert S.item() == pytest.approx(truth.item(), rel=1e-3)
    for mine, theirs in zip(torch.autograd.grad(S, ours), torch.autograd.grad(truth, right), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) <= 1e-2


def test_helpers_that_come_late_are_sent_away(monkeypatch):
    """A helper that has taken a part and lost its core: after a few of these the caller works alone, and every part is done once."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tiles._helpers, "late", 0.0)
    monkeypatch.setattr(tiles._helpers, "calls_alone", 0)
    caller, done, helpers = threading.get_ident(), [], []

    def work(low, high):
        if threading.get_ident() != caller:
            helpers.append(low)
            time.sleep(0.02)
        else:
            time.sleep(1e-4)
        done.append((low, high))

    for _ in range(40):
        tiles.each(tiles.shares(64), work)
    assert len(done) == 40 * 16 and sorted(set(done)) == tiles.shares(64)
    assert tiles._helpers.calls_alone > 0 and 5 <= len(helpers) <= 20


@machine_code
def test_mesh_sums_do_not_change_with_threads(monkeypatch):
    problem = pose("clusters")
    h = weigh(torch.zeros_like(problem.b), problem.b, problem.eps)
    one = mesh.Mesh(problem, 3.0).softmin(h, problem.eps)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    three = mesh.Mesh(problem, 3.0).softmin(h, problem.eps)
    assert float((one - three).abs().max()) <= 1e-12 and type(bind(problem, "mesh")) is mesh.Mesh


@pytest.mark.parametrize("backend", ["auto", "mesh", "multiscale"])
def test_batches_of_no_problems(backend):
    nothing = Problem(SqEuclidean(torch.zeros(0, 4, 3), torch.zeros(0, 5, 3)), 0.1)
    assert solve(nothing, backend=backend).value.shape == (0,) and "0 problems" in str(gpu_ot.explain(nothing))
