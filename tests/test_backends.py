"""How a backend is chosen, and what it says when it cannot serve."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import gpu_ot
from gpu_ot import BackendError, Euclidean, Formula, ProblemError, SqEuclidean
from gpu_ot.geometry import keops
from gpu_ot.geometry.chunked import Chunked
from gpu_ot.geometry.keops import Keops
from gpu_ot.geometry.select import BACKENDS, bind
from gpu_ot.problem import Problem
from problems import clouds

no_compiler = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or keops.compiler() is None, reason="KeOps needs pykeops and a C++ compiler"
)


def manhattan(x, y):
    return Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x, y)


def test_the_second_iteration_needs_no_maximum(monkeypatch):
    cost = SqEuclidean(*clouds(33, 41, 2))
    problem, geometry = Problem(cost, 0.5), Chunked(cost)
    g = geometry.iterate(problem, torch.zeros(41, dtype=torch.float64), 0.5, 1)[2]
    monkeypatch.setattr(Chunked, "softmin", None)
    geometry.iterate(problem, g, 0.5, 3)


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
    assert type(bind(problem)).__name__ == ("Compiled" if gpu_ot.compiled.refused() is None else "Absorbed")
    assert "960 kB" in said
    with monkeypatch.context() as hidden:
        hidden.setattr(gpu_ot.compiled, "refused", lambda: "numba is not installed")
        said = gpu_ot.explain(problem)
        assert type(bind(problem)).__name__ == "Absorbed" and '"dense"' in said.split("\n")[0] and "fit in 256 MiB" in said
        assert 'instead of "compiled", which was refused' in said and "refused: numba is not installed" in said
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
    with pytest.raises(ProblemError, match=r"'auto', 'compiled', 'dense', .*'chunked', 'keops'"):
        bind(Problem(SqEuclidean(x, y), 0.1), "cuda")
    with pytest.raises(BackendError, match=r'backend "keops" cannot serve this problem: .*a batch'):
        bind(Problem(SqEuclidean(x.expand(2, -1, -1), y.expand(2, -1, -1)), 0.1), "keops")
    monkeypatch.setenv("CXX", "a-compiler-nobody-has")
    with pytest.raises(BackendError, match=r"pykeops is not installed|no C\+\+ compiler"):
        bind(Problem(SqEuclidean(x, y), 0.1), "keops")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r'"triton".*(not installed|cpu|cannot be imported)'):
        bind(Problem(SqEuclidean(x.float(), y.float()), 0.1), "triton")
    with pytest.raises(BackendError, match=r'"resident".*GPU'):
        bind(Problem(torch.rand(4, 5), 0.1), "resident")
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
