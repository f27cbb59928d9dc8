"""The resident geometry against the default iteration in float64, in Triton's interpreter. Budgets are torch's own error in float32.

Triton decides once, when it is imported, whether it interprets: the first test runs this module again in a process of its own.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import gpu_ot
from gpu_ot import KL, TV, Euclidean, Problem, SqEuclidean, errors, solve
from gpu_ot.geometry import select as backends
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.resident import Resident, resident_iterate
from gpu_ot.geometry.select import bind
from gpu_ot.solver import loop
from gpu_ot.solver.annealing import Constant

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: run by test_in_the_interpreter")
# A first iteration may overflow, which is noticed; the interpreter says so, a GPU does not.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]

ROOT = pathlib.Path(__file__).parents[1]
SIZES = [(1, 1), (1, 7), (7, 1), (5, 7), (63, 40), (40, 131)]
PENALTIES = [KL(), KL(0.3), (KL(0.05), KL(2.0)), (KL(), KL(1e-3)), (KL(10.0), KL())]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", __file__]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def matrices(n, m, *batch, seed=0):
    gen = torch.Generator().manual_seed(seed + n + m)
    return torch.rand(*batch, n, m, generator=gen)


def weights(n, *batch, empty=0, spread=0.0, seed=1):
    """Of mass 1, the first `empty` of them zero, spanning 10^-spread ... 1."""
    gen = torch.Generator().manual_seed(seed + n)
    w = torch.rand(*batch, n, generator=gen) + 0.1
    if spread:
        w = 10 ** (-spread * torch.rand(*batch, n, generator=gen))
    if n > empty:
        w[..., :empty] = 0
    return w / w.sum(-1, keepdim=True)


def compare(problem, g, eps, k, what=""):
    """All three potentials against the truth, in units of eps. The peer keeps its vectors in float64, which is more than float32 torch
    would do; to twice its error come four roundings of a float32 number of the size of the kernel's exponents: how
    far the potentials moved, how far damping moves them, and the logarithms of the weights."""
    C = problem.cost.dense()
    ours = Resident(C).advance(problem, g, eps, k)
    truth = Dense(C.double()).advance(problem, g, eps, k)
    peer = Dense(C).advance(problem, g, eps, k)
    first = Dense(C.double()).advance(problem, g, eps, 1)[0]
    size = 2.0
    for w in (problem.a, problem.b):
        size = max(size, -w[w > 0].log().min().item())
    for right, since, tau in zip(truth, (first, g, g), [problem.penalties[i].tau for i in (0, 1, 1)], strict=True):
        moved = (right - since)[right.isfinite() & since.isfinite()].abs().max().item() / eps
        size = max(size, moved, right[right.isfinite()].abs().max().item() / tau)
    for name, mine, torchs, right in zip(("f", "g", "fresh"), ours, peer, truth, strict=True):
        live = right.isfinite()
        assert mine.shape == right.shape and mine.dtype == torch.float64
        assert torch.equal(mine[~live], right[~live]), f"{name}: {mine[~live]} for {right[~live]}"
        worst, budget = ((z - right)[live].abs().max().item() / eps for z in (mine, torchs))
        print(f"{what} {name} off by {worst:.2e} eps, torch by {budget:.2e}, exponents of {size:.1e}")
        assert worst <= 2 * budget + 2**-21 * size, f"{what} {name} off by {worst:.2e} eps, torch by {budget:.2e}, exponents of {size:.1e}"
    return ours


@interpreted
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("n, m", SIZES)
def test_advance_is_the_default(n, m, eps, penalty):
    """k iterations from zero and from where they led, with empty atoms on both sides."""
    a, b = weights(n, empty=1), weights(m, empty=2)
    problem = Problem(matrices(n, m), eps, a, b, penalty)
    g = torch.zeros(m, dtype=torch.float64)
    for k in (1, 3, 10):
        g = compare(problem, g, eps, k, f"k = {k}")[2]


@interpreted
@pytest.mark.parametrize("penalty", [KL(), (KL(0.3), KL(2.0))], ids=str)
@pytest.mark.parametrize("spread", [0.0, 12.0])
@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_digits_beyond_float32(eps, spread, penalty):
    """Potentials of 1e4 eps and more: what fp32 would keep of them is three digits of the plan. And weights of 1e-12."""
    n, m = 30, 45
    a, b = weights(n, spread=spread), weights(m, spread=spread, seed=2)
    problem = Problem(10 + matrices(n, m), eps, a, b, penalty)
    g = torch.linspace(-40, 60, m, dtype=torch.float64)  # far from any solution
    compare(problem, g, eps, 1, "far off")
    offset = torch.full((m,), 123.456, dtype=torch.float64)
    g = Dense(problem.cost.dense().double()).advance(problem, offset, eps, 200)[2]
    for k in (1, 7):
        g = compare(problem, g, eps, k, "near the end")[2]


@interpreted
@pytest.mark.parametrize("eps", [0.01, 1.0])
def test_forbidden_pairs(eps):
    """+inf among the costs, an empty row and an empty column that may use empty atoms only, and then potentials of inf."""
    n, m = 12, 9
    C = matrices(n, m)
    C[torch.rand(n, m, generator=torch.Generator().manual_seed(3)) < 0.3] = torch.inf
    C[:, 4] = 0.5
    C[2] = 0.25
    a, b = weights(n, empty=2), weights(m, empty=1)
    C[0, 1:] = torch.inf
    C[2:, 0] = torch.inf
    C[0, 0] = C[1, 0] = 0.5
    problem = Problem(C, eps, a, b)
    g = torch.zeros(m, dtype=torch.float64)
    for k in (1, 5, 5):
        f, g, fresh = compare(problem, g, eps, k)
        assert f[0] == torch.inf and fresh[0] == torch.inf, "who reaches no mass has potential inf, in every iteration"
        g = fresh


@interpreted
@pytest.mark.parametrize("cost, weight", [((3,), (3,)), ((2, 2), (2, 2)), ((), (4,)), ((1,), (3,)), ((2, 1), (2, 3)), ((3,), ())], ids=str)
def test_batches_are_independent(cost, weight):
    """Of matrices, of weights over one matrix, and of both; each problem on its own scale."""
    n, m = 11, 18
    C = matrices(n, m, *cost)
    C *= torch.arange(1, 1 + C[..., 0, 0].numel()).view(*cost, 1, 1)
    problem = Problem(C, 0.05, weights(n, *weight, empty=1), weights(m, *weight), (KL(2.0), KL(0.5)))
    g = torch.randn(*problem.b.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    compare(problem, g, 0.05, 4)
    more = torch.stack((g, -g))
    for mine, right in zip(Resident(C).advance(problem, more, 0.05, 2), Dense(C).advance(problem, more, 0.05, 2), strict=True):
        torch.testing.assert_close(mine, right)


@interpreted
@pytest.mark.parametrize("form", ["transposed", "strided"])
def test_matrices_in_any_layout(form):
    C = matrices(20, 30).mT if form == "transposed" else matrices(60, 40)[::2, ::2]
    compare(Problem(C, 0.1), torch.zeros(C.shape[1], dtype=torch.float64), 0.1, 3)


@interpreted
def test_as_many_columns_as_fit():
    compare(Problem(matrices(3, 1024), 0.05), torch.zeros(1024, dtype=torch.float64), 0.05, 2)


@interpreted
@pytest.mark.parametrize("tau", [float("inf"), 1.0])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_whole_solve(batch, tau):
    """Value, potentials, plan and gradients in the points and the weights, for clouds; converged to what float32 sweeps can reach."""
    gen = torch.Generator().manual_seed(5)
    x, y = (torch.rand(*batch, k, 3, generator=gen).requires_grad_() for k in (14, 17))
    a, b = (w.requires_grad_() for w in (weights(14, *batch, empty=1), weights(17, *batch)))

    def run(x, y, backend):
        solution = solve(Problem(SqEuclidean(x, y), 0.05, a, b, KL(tau)), backend=backend, tol=0.0, max_iter=41, check_every=20)
        grads = torch.autograd.grad(solution.value.sum(), (x, y, a, b))
        return [t.double() for t in (solution.value, solution.f, solution.g, solution.plan.to_dense(), *grads)]

    ours, peer, truth = run(x, y, "resident"), run(x, y, "softmin"), run(x.double(), y.double(), "softmin")
    for name, mine, torchs, right in zip(("value", "f", "g", "plan", "dx", "dy", "da", "db"), ours, peer, truth, strict=True):
        size = max(1.0, right.abs().max().item())
        worst, budget = ((z - right).abs().max().item() for z in (mine, torchs))
        assert worst <= 2 * budget + 1e-6 * size, f"{name} off by {worst:.2e}, torch by {budget:.2e}"


@interpreted
def test_the_loop_converges_and_says_so():
    """To 1e-6 of the mass at eps = 1e-3 of the largest cost, where f / eps is 1e3, in as many iterations as in float64."""
    problem = Problem(matrices(25, 25), 1e-3, weights(25), weights(25, seed=7))
    counts = []
    for geometry in (Resident(problem.cost.dense()), Dense(problem.cost.dense().double())):
        done = loop.iterate(geometry, problem, Constant(1e-3), torch.zeros(25, dtype=torch.float64), loop.Stop(1e-6), 3000, 20)
        assert done.status == loop.CONVERGED, done.status
        counts.append(done.n_iter)
    assert abs(counts[0] - counts[1]) <= 20


@interpreted
def test_the_operator_is_fit_for_torch_compile():
    C, a, b = matrices(6, 5, 2), weights(6, 2).double(), weights(5, 2).double()
    given = C, a, b, torch.zeros(2, 5, dtype=torch.float64), 0.1, float("inf"), 1.0, 2
    torch.library.opcheck(resident_iterate, given, test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_what_it_refuses_and_why():
    C = matrices(4, 5)
    assert Resident.refuse(Problem(C, 0.1)) is None
    assert Resident.refuse(Problem(C, 0.1, penalties=(KL(), KL(1.0)))) is None
    assert Resident.refuse(Problem(Euclidean(torch.rand(4, 2), torch.rand(5, 2)), 0.1)) is None, "any cost that can be formed"
    for problem, why in (
        (Problem(C.double(), 0.1), "float64"),
        (Problem(C, 0.1, penalties=(KL(), TV(1.0))), "KL penalties"),
        (Problem(matrices(2, 1025), 0.1), "up to 1024 columns"),
    ):
        reason = Resident.refuse(problem)
        assert reason is not None and why in reason, reason
        with pytest.raises(errors.BackendError, match=why):
            bind(problem, "resident")


@interpreted
def test_auto_takes_it_for_small_problems_on_a_gpu_only(monkeypatch):
    def taken(problem):
        said = gpu_ot.explain(problem)
        assert f'auto takes "{backends._choose(problem)[0].backend}"' in said
        return backends._choose(problem)[0].backend

    small = Problem(matrices(10, 256, 3), 0.1)
    assert taken(small) == "dense" and "on a GPU" in gpu_ot.explain(small)
    monkeypatch.setattr(backends, "_on", lambda problem, device: device == "cuda")
    assert taken(small) == "resident" and taken(Problem(matrices(256, 256), 0.1)) == "resident"
    assert taken(Problem(SqEuclidean(torch.rand(9, 2), torch.rand(8, 2)), 0.1)) == "resident"
    assert taken(Problem(matrices(10, 257), 0.1)) == "dense"
    double = Problem(matrices(10, 20).double(), 0.1)
    assert taken(double) == "dense" and 'instead of "resident", which was refused' in gpu_ot.explain(double)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_a_cpu_is_refused():
    reason = Resident.refuse(Problem(matrices(4, 5), 0.1))
    assert reason is not None and "GPU" in reason
