"""Every backend against the formulas as they are written: one suite for all, see conformance.py."""

import importlib.util

import pytest
import torch

import gpu_ot
from conformance import COSTS, Conformance, iterations
from gpu_ot import KL, TV, Problem, compiled
from gpu_ot.geometry import chunked, keops
from problems import rand, weights

FOLDING = ("squared", "dot", "cosine", "folding sum")
POINTS = tuple(name for name in COSTS if name != "matrix")

no_compiler = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or keops.compiler() is None, reason="KeOps needs pykeops and a C++ compiler"
)


class TestSoftmin(Conformance):
    backend = "softmin"


class TestDense(Conformance):
    backend = "dense"


class Streamed(Conformance):
    """The n-by-m array is forbidden: `dense()` may be called on blocks, never on the whole."""

    costs = POINTS

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        """So small that the sizes here have several blocks both ways, the last of them uneven."""
        monkeypatch.setattr(chunked, "CPU_ENTRIES", 700)

        def guarded(dense):
            def call(self):
                assert self.shape[-2:].numel() <= 4 * chunked.CPU_ENTRIES, f"formed an array of shape {tuple(self.shape)}"
                return dense(self)

            return call

        for kind in (gpu_ot.SqEuclidean, gpu_ot.Euclidean, gpu_ot.Dot, gpu_ot.Cosine, gpu_ot.Formula):
            monkeypatch.setattr(kind, "dense", guarded(kind.dense))


class TestChunked(Streamed):
    backend = "chunked"


@no_compiler
class TestKeops(Streamed):
    """One formula: KeOps compiles each for some seconds."""

    backend = "keops"
    costs, sizes, batches = ("squared",), ((63, 257, 3),), ()


@pytest.mark.slow
class TestKeopsFormulas(TestKeops):
    costs = POINTS


@pytest.mark.slow
class TestKeopsSizes(TestKeops):
    sizes = ((1, 1, 1), (128, 100, 17))


@pytest.mark.skipif(bool(compiled.refused()), reason="needs numba")
class TestMultiscale(Conformance):
    """Without a tolerance it leaves out what no digit shows. It keeps the potentials of one problem; sums are in float64 throughout."""

    backend = "multiscale"
    costs, sizes, batches = ("squared", "dot"), ((1, 1, 1), (63, 257, 3), (128, 100, 2)), ()


class TestSharded(Conformance):
    """One rank alone: what the layouts add to the backend of a share. Several ranks: test_sharded.py."""

    layout = "replicated"
    costs = ("squared", "euclidean", "mixed sum")

    def build(self, problem):
        return gpu_ot.geometry.select.bind(self.shared(problem), self.backend)

    def solve(self, problem, **options):
        return gpu_ot.solve(self.shared(problem), backend=self.backend, **options)

    def shared(self, problem):
        return Problem(gpu_ot.Sharded(problem.cost, layout=self.layout), problem.eps, problem.a, problem.b, problem.penalties)

    backend = "dense"


class TestRing(TestSharded):
    layout, backend = "ring", "chunked"


class Kernels(Conformance):
    """In float32: on the GPU where there is one, else in Triton's interpreter."""

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.float32,)
    iterations = 11, 5

    @pytest.fixture(autouse=True)
    def triton(self, poisoned):
        pytest.importorskip("triton")


on_a_gpu = [] if torch.cuda.is_available() else [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


class TestResident(Kernels):
    pytestmark = on_a_gpu
    backend = "resident"
    costs = ("squared", "euclidean", "matrix")  # it forms the matrix of any
    sizes = ((1, 1, 1), (1, 7, 2), (7, 1, 2), (63, 40, 3), (40, 131, 3))
    penalties = (KL(), KL(0.3), (KL(0.05), KL(2.0)), (KL(), KL(1e-3)), (KL(10.0), KL()))

    @pytest.mark.parametrize("penalty", [KL(), (KL(0.3), KL(2.0))], ids=str)
    @pytest.mark.parametrize("decades", [0.0, 12.0])
    @pytest.mark.parametrize("eps", [1e-3, 0.1])
    def test_digits_beyond_float32(self, eps, decades, penalty):
        """Potentials of 1e4 eps and more: what fp32 would keep of them is three digits of the plan. And weights of 1e-12."""
        C = 10 + rand(30, 45, dtype=torch.float32).to(self.device)
        a, b = (weights(k, decades=decades, dtype=torch.float32).to(self.device) for k in C.shape)
        problem = Problem(C, eps, a, b, penalty)
        geometry, g = self.build(problem), torch.linspace(-40, 60, 45, dtype=torch.float64, device=self.device)  # far from any solution
        self.compare(geometry, problem, C.double(), C, g, eps, 1)
        g = iterations(C.double(), problem, torch.full_like(g, 123.456), eps, 200)[2]  # near the end
        for k in (1, 7):
            g = self.compare(geometry, problem, C.double(), C, g, eps, k)

    def test_as_many_columns_as_fit(self):
        C = rand(3, 1024, dtype=torch.float32).to(self.device)
        problem = Problem(C, 0.05)
        self.compare(self.build(problem), problem, C.double(), C, torch.zeros_like(problem.b), 0.05, 2)


class TestTriton(Kernels):
    pytestmark = on_a_gpu
    backend = "triton"
    costs = FOLDING
    penalties = (KL(), (KL(0.3), TV(0.3)))  # it leaves them to torch
    batches = (((3,), (3,)), ((), (4,)), ((2, 1), (2, 3)))
    sizes = ((1, 1, 1), (63, 70, 3), (40, 33, 17), (20, 30, 16), (10, 12, 300))
    folds = True
