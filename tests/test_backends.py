"""Every machine against the stored matrix in float64: one suite for all, and how one of them is chosen."""

from __future__ import annotations

import importlib.util
import itertools
import math
import subprocess
import sys

import pytest
import torch

import gpu_ot
from gpu_ot import BackendError, Cosine, Dot, Euclidean, Formula, Matrix, ProblemError, SqEuclidean
from gpu_ot.geometry import chunked, keops
from gpu_ot.geometry.chunked import Chunked
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.keops import Keops
from gpu_ot.geometry.select import BACKENDS, bind
from gpu_ot.problem import Problem


def manhattan(x, y):
    return Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x, y)


COSTS = {
    "squared": SqEuclidean,
    "euclidean": Euclidean,
    "dot": Dot,
    "cosine": Cosine,
    "formula": manhattan,
    "folding sum": lambda x, y: 0.3 * SqEuclidean(x, y) + 2.0 * Cosine(x, y),
    "mixed sum": lambda x, y: 0.3 * SqEuclidean(x, y) + 0.5 * Euclidean(x, y) + 0.1 * Dot(x, y) + 0.2 * Cosine(x, y),
}
SIZES = [(1, 1, 1), (63, 257, 3), (128, 100, 17)]

no_compiler = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or keops.compiler() is None, reason="KeOps needs pykeops and a C++ compiler"
)


# KeOps compiles a formula for every cost and dimension, for some seconds each: only one of them is tested each time.
def cases(quick, *of):
    """`of` (tuples of) parameters for both machines; for KeOps all but `quick` are slow."""
    for backend in ("chunked", "keops"):
        for values in itertools.product(*of):
            marks = [no_compiler] if backend == "keops" else []
            if backend == "keops" and values != quick:
                marks.append(pytest.mark.slow)
            yield pytest.param(backend, *values, id="-".join([backend, *(str(value).replace(" ", "") for value in values)]), marks=marks)


EVERY_COST = list(cases(("squared",), COSTS))
EVERY_SIZE = list(cases(("squared", (63, 257, 3)), COSTS, SIZES))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So small that every size here has several blocks both ways, the last of them uneven."""
    monkeypatch.setattr(chunked, "CPU_ENTRIES", 700)


@pytest.fixture
def no_matrix(monkeypatch):
    """Forbids the n-by-m array: `dense()` may be called on blocks, never on the whole."""

    def guarded(dense):
        def call(self):
            assert self.shape[-2:].numel() <= 2 * chunked.CPU_ENTRIES, f"formed an array of shape {tuple(self.shape)}"
            return dense(self)

        return call

    for kind in (SqEuclidean, Euclidean, Dot, Cosine, Formula):
        monkeypatch.setattr(kind, "dense", guarded(kind.dense))


def clouds(n, m, d, batch=(), dtype=torch.float64, offset=0.0, seed=0):
    gen = torch.Generator().manual_seed(seed + n + m + d)
    x, y = (torch.randn(*batch, k, d, generator=gen, dtype=torch.float64) + offset for k in (n, m))
    return x.to(dtype), y.to(dtype)


def largest(cost):
    """The cost's unit; a lone pair of parallel points has cosine cost 0."""
    return float(cost.dense().detach().abs().max()) or 1.0


def machine(backend, cost):
    return Chunked(cost) if backend == "chunked" else Keops(cost)


def potentials(cost, eps, seed=1, empty=True):
    """Row and column vectors as the loop makes them: of the cost's size, some atoms empty, the first among them."""
    gen = torch.Generator().manual_seed(seed)
    *batch, _, m = cost.shape
    h = 0.3 * cost.dense().double().abs().amax() * torch.randn(*batch, m, generator=gen, dtype=torch.float64)
    if empty and m > 2:
        h[..., 0] = h[..., m // 2] = -math.inf
    return Dense(cost.dense().double()).softmin(h, eps), h


@pytest.mark.parametrize("sharpness", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("backend, name, size", EVERY_SIZE)
def test_both_verbs_both_ways(backend, name, size, sharpness):
    cost = COSTS[name](*clouds(*size))
    geometry, truth = machine(backend, cost), Dense(cost.dense())
    eps = sharpness * largest(cost)
    k, h = potentials(cost, eps)
    n, m, d = size
    v = torch.randn(m, 1 + d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scale = largest(cost)
    torch.testing.assert_close(geometry.softmin(h, eps), truth.softmin(h, eps), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(geometry.T.softmin(k, eps), truth.T.softmin(k, eps), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(geometry.T.T.softmin(h, eps), truth.softmin(h, eps), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(geometry.apply(k, h, eps, v), truth.apply(k, h, eps, v), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        geometry.T.apply(h, k, eps, v.new_ones(n, 1)), truth.T.apply(h, k, eps, v.new_ones(n, 1)), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(geometry.plan(k, h, eps), truth.plan(k, h, eps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("backend, name, size", EVERY_SIZE)
def test_pull_back_is_the_gradient_of_the_matrix(backend, name, size, transposed):
    x, y = (z.requires_grad_() for z in clouds(*size))
    cost = COSTS[name](x, y)
    eps = 0.1 * largest(cost)
    (k, h), C, geometry = potentials(cost, eps), cost.dense(), machine(backend, cost)
    if transposed:
        k, h, C, geometry = h, k, C.mT, geometry.T
    w = torch.randn(k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(C, (x, y), Dense(C.detach()).pull_back(k, h, eps, w)[0], retain_graph=True)
    reached = [(z, grad) for z, grad in zip(geometry.inputs, geometry.pull_back(k, h, eps, w), strict=True) if z.requires_grad]
    found = torch.autograd.grad([z for z, _ in reached], (x, y), [grad for _, grad in reached])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend, name", EVERY_COST)
def test_whole_solves(backend, name, no_matrix):
    """Value, potentials, gradients in the points and the weights, and never the n-by-m array."""
    given = clouds(63, 57, 3)
    gen = torch.Generator().manual_seed(4)
    weights = [torch.rand(k, generator=gen, dtype=torch.float64) for k in (63, 57)]
    weights[0][0] = weights[1][:3] = 0

    def run(backend, cost):
        x, y, a, b = leaves = [z.clone().requires_grad_() for z in (*given, *(w / w.sum() for w in weights))]
        bound = Matrix(torch.cat([COSTS[name](x[i : i + 9], y).dense() for i in range(0, 63, 9)])) if cost is None else cost(x, y)
        solution = gpu_ot.solve(Problem(bound, 0.05, a, b, gpu_ot.KL(1.0)), backend=backend, tol=0.0, max_iter=40)
        return solution, torch.autograd.grad(solution.value, leaves)

    (truth, expected), (ours, found) = run("softmin", None), run(backend, COSTS[name])
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((ours.f, ours.g), (truth.f, truth.g), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    ones = torch.ones(57, 4, dtype=torch.float64)
    torch.testing.assert_close(ours.plan @ ones, truth.plan @ ones, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharpness", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("backend, name, size", EVERY_SIZE)
def test_float32_points_are_as_accurate_as_torch(backend, name, size, sharpness):
    """The budget is torch's own error in the same type, measured against float64."""
    exact = COSTS[name](*clouds(*size, dtype=torch.float32)).to(torch.float64)
    eps = sharpness * largest(exact)
    _, h = potentials(exact, eps)
    truth = Dense(exact.dense()).softmin(h, eps)
    cost = exact.to(torch.float32)
    torchs = -eps * torch.logsumexp((h.float() - cost.dense()) / eps, -1)
    ours = machine(backend, cost).softmin(h, eps)
    allowed = 2 * float((torchs.double() - truth).abs().max()) + 1e-6
    assert ours.dtype == torch.float64 and float((ours - truth).abs().max()) <= allowed


@pytest.mark.parametrize("backend", ["chunked", pytest.param("keops", marks=no_compiler)])
def test_clouds_far_off_centre(backend):
    x, y = clouds(40, 50, 3, offset=1e4, dtype=torch.float32)
    near = [z.double() - 1e4 for z in (x, y)]
    truth = gpu_ot.solve(Problem(SqEuclidean(*near), 0.1), tol=1e-10, max_iter=3000).plan.to_dense()
    ours = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1), backend=backend, tol=1e-7, max_iter=3000)
    assert ours.converged and (ours.plan.to_dense() - truth).abs().max() <= 1e-4 * truth.max()


@pytest.mark.parametrize("backend", ["chunked", pytest.param("keops", marks=no_compiler)])
def test_rows_that_meet_only_empty_atoms(backend):
    geometry = machine(backend, SqEuclidean(*clouds(4, 6, 3)))
    nothing = torch.full((6,), -math.inf, dtype=torch.float64)
    assert (geometry.softmin(nothing, 0.1) == math.inf).all()
    k, one = torch.zeros(4, dtype=torch.float64), torch.ones(6, 4, dtype=torch.float64)
    assert (geometry.apply(k, nothing, 0.1, one) == 0).all()
    assert (geometry.T.apply(nothing, k - math.inf, 0.1, one[:4]) == 0).all()


@pytest.mark.parametrize("batch, weights", [((3,), (3,)), ((2, 3), (2, 3)), ((), (4,)), ((3,), (2, 3))], ids=str)
@pytest.mark.parametrize("name", ["squared", "euclidean", "formula", "mixed sum"])
def test_batches(name, batch, weights):
    """Of clouds, of weights over the same clouds, and of both."""
    x, y = (z.requires_grad_() for z in clouds(9, 14, 3, batch=batch))
    b = torch.rand(*weights, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1
    found, expected = (
        gpu_ot.solve(Problem(COSTS[name](x, y), 0.3, None, b / b.sum(-1, keepdim=True)), backend=backend, tol=0.0, max_iter=20)
        for backend in ("chunked", "softmin")
    )
    torch.testing.assert_close((found.value, found.f, found.g), (expected.value, expected.f, expected.g))
    torch.testing.assert_close(found.plan.to_dense(), expected.plan.to_dense())
    grads = [torch.autograd.grad(s.value.square().sum(), (x, y)) for s in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("penalty", [gpu_ot.KL(), gpu_ot.KL(0.5), (gpu_ot.KL(), gpu_ot.TV(0.3))], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.05, 2e-3])
@pytest.mark.parametrize("name", ["squared", "euclidean"])
def test_one_exponential_for_both_half_steps(name, eps, penalty):
    """The chunked iteration against the one every geometry inherits, from a start so far off that the first guess must fail."""
    cost = COSTS[name](*clouds(33, 41, 2))
    gen = torch.Generator().manual_seed(6)
    a, b = torch.rand(33, generator=gen, dtype=torch.float64), torch.rand(41, generator=gen, dtype=torch.float64)
    a[0] = b[0] = 0
    problem = Problem(cost, eps, a / a.sum(), b / b.sum(), penalty)
    start = 50 * torch.randn(41, generator=gen, dtype=torch.float64)
    geometry, plain = Chunked(cost), Dense(cost.dense())
    for k in (1, 2, 15):
        torch.testing.assert_close(geometry.advance(problem, start, eps, k), plain.advance(problem, start, eps, k), rtol=1e-9, atol=1e-9)


def test_the_second_iteration_needs_no_maximum(monkeypatch):
    cost = SqEuclidean(*clouds(33, 41, 2))
    problem, geometry = Problem(cost, 0.5), Chunked(cost)
    g = geometry.advance(problem, torch.zeros(41, dtype=torch.float64), 0.5, 1)[2]
    monkeypatch.setattr(Chunked, "softmin", None)
    geometry.advance(problem, g, 0.5, 3)


def test_a_stored_matrix_stays_whole():
    M = torch.rand(5, 6)
    assert "matrix that is already in memory" in gpu_ot.explain(Problem(M, 0.1))
    for backend in ("chunked", "keops"):
        with pytest.raises(BackendError, match="matrix"):
            bind(Problem(M, 0.1), backend)


def test_auto_keeps_arrays_while_they_are_small_and_says_so(monkeypatch):
    x, y = clouds(200, 300, 3)
    problem = Problem(SqEuclidean(x, y), 0.1)
    said = gpu_ot.explain(problem)
    assert type(bind(problem)).__name__ == "Absorbed"
    assert '"dense"' in said.split("\n")[0] and "fit in 256 MiB" in said and "960 kB" in said
    for name in BACKENDS:
        assert f"\n  {name} " in said
    monkeypatch.setattr(gpu_ot.geometry.select, "DENSE_BYTES", 10_000)
    said = gpu_ot.explain(problem)
    assert isinstance(bind(problem), Chunked) and '"chunked"' in said.split("\n")[0]


@pytest.mark.parametrize("cost, kind", [(SqEuclidean, "folds"), (Euclidean, "does not fold")])
def test_auto_streams_large_clouds(cost, kind):
    x, y = clouds(20_000, 20_000, 3)
    problem = Problem(cost(x, y), 0.1)
    assert isinstance(bind(problem), Chunked)
    said = gpu_ot.explain(problem)
    assert f"a cost that {kind}" in said and "6.4 GB" in said and "passed over" in said and "refused" in said


def test_auto_compiles_large_formulas_where_it_can(monkeypatch):
    problem = Problem(manhattan(*clouds(20_000, 20_000, 3)), 0.1)
    if importlib.util.find_spec("pykeops") is not None and keops.compiler() is not None:
        assert isinstance(bind(problem), Keops)
    monkeypatch.setattr(keops, "compiler", lambda: None)
    said = gpu_ot.explain(problem)
    assert isinstance(bind(problem), Chunked) and 'instead of "keops", which was refused' in said and "no C++ compiler" in said


def test_refusals_give_the_reason(monkeypatch):
    x, y = clouds(5, 6, 2)
    with pytest.raises(ProblemError, match=r"'auto', 'dense', .*'chunked', 'keops'"):
        bind(Problem(SqEuclidean(x, y), 0.1), "cuda")
    with pytest.raises(BackendError, match=r'backend "keops" cannot serve this problem: .*a batch'):
        bind(Problem(SqEuclidean(x.expand(2, -1, -1), y.expand(2, -1, -1)), 0.1), "keops")
    monkeypatch.setenv("CXX", "a-compiler-nobody-has")
    with pytest.raises(BackendError, match=r"pykeops is not installed|no C\+\+ compiler"):
        bind(Problem(SqEuclidean(x, y), 0.1), "keops")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r'"triton".*(not installed|cpu|cannot be imported)'):
        bind(Problem(SqEuclidean(x.float(), y.float()), 0.1), "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("triton", "pykeops"):
        assert f"{name} is not installed" in gpu_ot.explain(Problem(SqEuclidean(x, y), 0.1))


@no_compiler
def test_formulas_that_only_torch_understands_are_refused_by_keops():
    x, y = clouds(5, 6, 2)
    problem = Problem(Formula(lambda x_i, y_j: torch.linalg.vector_norm(x_i - y_j, dim=-1), x, y), 0.1)
    with pytest.raises(BackendError, match="lazy tensors"):
        bind(problem, "keops")
    assert gpu_ot.solve(problem, backend="chunked").converged


@no_compiler
def test_binding_keops_prints_nothing():
    code = """if True:
        import torch, gpu_ot
        cost = gpu_ot.SqEuclidean(torch.rand(5, 2), torch.rand(6, 2))
        gpu_ot.geometry.select.bind(gpu_ot.Problem(cost, 0.1), "keops")
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_twenty_thousand_points_in_half_a_gigabyte():
    """Interpreter, torch, solve and gradient together; two arrays of the cost alone would be 3.2 GB in float32."""
    code = """if True:
        import torch, gpu_ot
        x, y = torch.rand(20_000, 3, requires_grad=True), torch.rand(20_000, 3)
        solution = gpu_ot.solve(gpu_ot.Problem(gpu_ot.SqEuclidean(x, y), 0.05), tol=1e-3)
        solution.value.backward()
        assert solution.converged and x.grad.isfinite().all()
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500_000, f"{int(done.stdout) / 1000:.0f} MB"
