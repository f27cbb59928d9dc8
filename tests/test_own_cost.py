"""A cost of the user's own, of three sorts: with no more than it must write; one that can be cut; one that folds. Each on every backend
that takes it, against a Matrix of the same numbers."""

import importlib.util

import pytest
import torch

import gpu_ot
from gpu_ot import BackendError, Cost, Matrix, Problem, ProblemError, SamplesLoss, SinkhornLoss, SqEuclidean, divergence, solve
from gpu_ot.costs import Folded, Formula
from gpu_ot.costs.base import take
from gpu_ot.geometry import keops
from gpu_ot.geometry.chunked import Chunked
from gpu_ot.geometry.select import BACKENDS, bind
from problems import clouds, generator, leaves, pairwise


class Minimal(Cost):
    """|x_i - y_j|^2 + w |x_i|_1: what a cost must write."""

    def __init__(self, x, y, w):
        self.x, self.y, self.w = x, y, w

    @property
    def inputs(self):
        return {"x": self.x, "y": self.y, "w": self.w}

    @property
    def shape(self):
        return torch.Size((*self.x.shape[:-1], self.y.shape[-2]))

    def dense(self):
        return (self.x.unsqueeze(-2) - self.y.unsqueeze(-3)).square().sum(-1) + self.w * self.x.abs().sum(-1, keepdim=True)

    def of(self, inputs):
        return type(self)(*inputs)


class Cut(Minimal):
    """Says what belongs to which side, and how KeOps would write it."""

    sides = (0, 1, None)

    def formula(self, i, j):
        x, y = i(self.x), j(self.y)
        return (x - y).square().sum(-1) + self.w * x.abs().sum(-1)


class Copied(Minimal):
    """Cuts itself, into costs of another kind and on copies of its points."""

    def part(self, rows, cols):
        points = take(self.x.clone(), rows, -2), take(self.y.clone(), cols, -2)
        return Formula(lambda x, y: (x - y).square().sum(-1) + self.w * x.abs().sum(-1), *points)


class Folding(Minimal):
    def fold(self):
        beta, root = self.y.square().sum(-1), 2**0.5
        return Folded(self.x.square().sum(-1) + self.w * self.x.abs().sum(-1), beta, root * self.x, root * self.y)


STORED = ("dense", "softmin")
KINDS = {Minimal: STORED, Cut: (*STORED, "chunked"), Copied: (*STORED, "chunked"), Folding: (*STORED, "chunked")}
SERVED = [pytest.param(kind, backend, id=f"{kind.__name__}-{backend}") for kind, backends in KINDS.items() for backend in backends]
EPS = 0.3


def given(batch=(), dtype=torch.float64):
    x, y = clouds(9, 7, batch=batch)
    return leaves(*(z.to(dtype) for z in (x, y, torch.tensor(0.7))))


def stored(x, y, w):
    return Matrix(Minimal(x, y, w).dense())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name in ("geometry.chunked.CPU_ENTRIES", "costs.base.BLOCK"):
        monkeypatch.setattr(f"gpu_ot.{name}", 20)


@pytest.mark.parametrize("kind, backend", SERVED)
@pytest.mark.parametrize("batch, grad", [((), "envelope"), ((), "implicit"), ((2,), "envelope")])
def test_values_and_gradients_are_those_of_the_matrix(kind, backend, batch, grad):
    def run(cost, backend):
        z = given(batch=batch)
        solution = solve(Problem(cost(*z), EPS), backend=backend, grad=grad, tol=1e-12)
        out = solution.value.sum() if grad == "envelope" else solution.value + (solution.f * torch.arange(9)).sum()
        return solution, torch.autograd.grad(out, z)

    (ours, found), (truth, expected) = run(kind, backend), run(stored, "softmin")
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-10, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind, batch", pairwise(KINDS, [(), (2, 3)]))
def test_everything_else_follows(kind, batch):
    with torch.no_grad():
        z = given(batch=batch)
        cost, C = kind(*z), stored(*z)
        torch.testing.assert_close((cost.T.dense(), cost.T.T.dense()), (C.M.mT, C.M))
        torch.testing.assert_close((0.5 * cost.T + Matrix(C.M.mT)).dense(), 1.5 * C.M.mT)
        torch.testing.assert_close(cost.T.entries(slice(2), slice(1, 4)), C.M[..., 1:4, :2].mT)
        torch.testing.assert_close(cost.sample(4, 2), C.sample(4, 2))
        torch.testing.assert_close((2.0 * cost).sample(4, 2), 2 * C.sample(4, 2))
        for scale in gpu_ot.costs.SCALES:
            torch.testing.assert_close((cost.scale(scale), (2.0 * cost).scale(scale)), (C.scale(scale), 2 * C.scale(scale)))
        ours, truth = (solve(Problem(each, ("std", 0.05)), tol=1e-10) for each in (cost, C))
        torch.testing.assert_close(ours.problem.eps, truth.problem.eps, rtol=1e-12, atol=0)
        torch.testing.assert_close((ours.value, ours.sharp_cost), (truth.value, truth.sharp_cost), rtol=1e-8, atol=0)
        v = torch.arange(7, dtype=torch.float64).unsqueeze(-1)
        torch.testing.assert_close(ours.plan @ v.expand(*batch, 7, 1), truth.plan @ v.expand(*batch, 7, 1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.plan.diagonal(), truth.plan.diagonal(), rtol=1e-6, atol=1e-12)
        pairs = (each.plan.sample(50, generator()) for each in (ours, truth))
        assert all(torch.equal(*index) for index in zip(*pairs, strict=True))
        flipped = solve(ours.problem.T, tol=1e-10)
        torch.testing.assert_close(flipped.value, truth.value, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind, batch", pairwise(KINDS, [(), (2,)]))
def test_as_a_loss(kind, batch):
    """Debiased, where it knows its points and where only the function that makes it does; and without."""
    for loss, size in ((SamplesLoss, dict(blur=0.5)), (SinkhornLoss, dict(eps=EPS))):
        results = []
        for cost in (kind, stored):
            x, y, _ = given(batch=batch)
            value = loss(cost=lambda x, y, cost=cost: cost(x, y, x.new_zeros(())), tol=1e-10, **size)(x, y).sum()  # 0: symmetric
            results.append((value, *torch.autograd.grad(value, (x, y))))
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_sides_give_points():
    x, y, w = given()
    solution = solve(Problem(Cut(x, y, w), EPS))
    assert solution.transport().shape == (9, 3) and solution.potential_a(x.detach()[:4] + 1).shape == (4,)
    assert float(divergence(Problem(Cut(x, y, w.detach() * 0), EPS)).value.detach()) > 0
    with pytest.raises(ProblemError, match=r"symmetric, C_ij = C_ji"):
        divergence(Problem(Cut(x, y, w), EPS))
    with pytest.raises(ProblemError, match="a cost of kind Minimal does not know them: pass cost_aa"):
        divergence(Problem(Minimal(x, y, w), EPS))
    with pytest.raises(ProblemError, match="Minimal has no points"):
        Minimal(x, y, w).at(x=x)


def test_costs_that_cannot_be_cut_are_refused_by_name(monkeypatch):
    problem = Problem(0.5 * Minimal(*given()), 0.1)
    with pytest.raises(BackendError, match=r"it has no fold.*Minimal does not say how to take rows and columns"):
        bind(problem, "chunked")
    monkeypatch.setattr(gpu_ot.geometry.select, "DENSE_BYTES", 0)
    if keops.compiler() is not None and importlib.util.find_spec("pykeops") is not None:
        assert "lazy tensors: Minimal has no formula" in gpu_ot.explain(problem)
    monkeypatch.setattr(keops, "compiler", lambda: None)
    said = gpu_ot.explain(problem)
    assert 'auto takes "dense"' in said and 'instead of "chunked"' in said and "no C++ compiler" in said


def test_a_cost_may_name_its_backend_and_bring_its_geometry():
    class Chosen(Cut):
        backend = "chunked"

    class Bound(Cut):
        def geometry(self, problem, bind):
            return Chunked(self)

    for kind in (Chosen, Bound):
        assert isinstance(bind(Problem(kind(*given()), 0.1)), Chunked)
    assert 'the cost is a cost that does not fold, and "chunked" runs it' in gpu_ot.explain(Problem(Chosen(*given()), 0.1))
    Chosen.backend = "magic"
    with pytest.raises(ProblemError, match="backend of the cost = 'magic' is not known"):
        bind(Problem(Chosen(*given()), 0.1))


def test_an_array_of_the_users_own_is_a_matrix():
    """Whoever says `stored` may forbid pairs."""

    class Own(Cost):
        stored = True
        shape = property(lambda self: self.M.shape)
        inputs = property(lambda self: {"M": self.M})

        def __init__(self, M):
            self.M = M

        def dense(self):
            return self.M

        def of(self, inputs):
            return Own(*inputs)

    M = stored(*given()).M.detach()
    M[1, 2] = torch.inf
    ours, truth = (solve(Problem(kind(M), EPS)) for kind in (Own, Matrix))
    torch.testing.assert_close(ours.value, truth.value)
    assert ours.problem.forbids and "a matrix that is already in memory" in gpu_ot.explain(ours.problem)
    M[3] = torch.inf
    with pytest.raises(ProblemError, match="1 row of M with positive weight"):
        Problem(Own(M), EPS)


def test_the_type_is_that_of_the_costs():
    """A weight in another type is no reason to compute, or answer, in that type."""
    x, y, w = (z.detach().float() for z in given())
    a = torch.full((9,), 1 / 9, dtype=torch.float64)
    for cost in (SqEuclidean(x, y), Matrix(torch.cdist(x, y)), Cut(x, y, w)):
        problem = Problem(cost, EPS, a=a)
        assert problem.dtype == problem.given_dtype == solve(problem).value.dtype == torch.float32
        assert problem.a.dtype == problem.b.dtype == torch.float64
    half = Problem(SqEuclidean(x.half(), y.half()), EPS, a=a)
    assert half.dtype == torch.float32 and half.given_dtype == torch.float16


@pytest.mark.slow
@pytest.mark.skipif(keops.compiler() is None or importlib.util.find_spec("pykeops") is None, reason="KeOps needs a C++ compiler")
def test_keops_compiles_its_formula():
    def run(cost, backend):
        z = given()
        value = solve(Problem(cost(*z), EPS), backend=backend, tol=1e-11).value
        return value, *torch.autograd.grad(value, z)

    torch.testing.assert_close(run(Cut, "keops"), run(stored, "softmin"), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(run(lambda *z: Cut(*z).T, "keops"), run(stored, "softmin"), rtol=1e-8, atol=1e-9)


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_streams_what_folds():
    z = given(dtype=torch.float32)
    problem = Problem(Folding(*z), EPS)
    ours, truth = (solve(problem, backend=backend) for backend in ("triton", "softmin"))
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-5, atol=0)
    found, expected = (torch.autograd.grad(each.value, z) for each in (ours, truth))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert BACKENDS["triton"].refuse(Problem(Cut(*z), EPS)) is not None
