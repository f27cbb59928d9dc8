"""Costs between the nodes of a regular grid: one product per axis, against the matrix of all pairs."""

import math

import pytest
import torch

import gpu_ot
from gpu_ot import KL, Grid, Matrix, Problem, ProblemError, solve
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.grid import OnGrid
from problems import INF, leaves, pairwise, rand, randn

SHAPES = ((1,), (40,), (12, 17), (5, 6, 7), (1, 9))


def bumps(count, shape, seed=0):
    """(count, n): images of mass 1, a fifth of whose pixels are 0."""
    z = rand(count, math.prod(shape), seed=seed)
    z = torch.where(z < 0.2, 0.0, z**4)
    return z / z.sum(-1, keepdim=True)


def entry(grid, i, j):
    """C_ij as the docstring has it."""
    total = 0.0
    for k, (x, y) in enumerate(zip(*(torch.unravel_index(torch.tensor(z), grid.nodes) for z in (i, j)), strict=True)):
        steps = abs(int(x) - int(y))
        steps = min(steps, grid.nodes[k] - steps) if grid.periodic[k] else steps
        total += (float(grid.spacing[k]) * steps) ** grid.p
    return total


@pytest.mark.parametrize("shape, p, periodic", pairwise(SHAPES, (1.0, 2.0, 1.5), (False, True)))
def test_the_cost_is_the_one_of_the_docstring(shape, p, periodic):
    grid = Grid(shape, torch.linspace(0.1, 0.3, len(shape), dtype=torch.float64), p, periodic)
    n = grid.shape[0]
    C = torch.tensor([[entry(grid, i, j) for j in range(min(n, 25))] for i in range(min(n, 25))], dtype=torch.float64)
    torch.testing.assert_close(grid.dense()[:25, :25], C, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grid.part(slice(0, 25), torch.arange(min(n, 25))).dense(), C, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grid.T.dense().mT, grid.dense())
    for kind in ("std", "mean", "max"):
        torch.testing.assert_close(grid.scale(kind), Matrix(grid.dense()).scale(kind))


@pytest.mark.parametrize("shape, p, periodic, eps", pairwise(SHAPES, (1.0, 2.0, 0.5), (False, True), (1.0, 0.01, 1e-5, 1e-9)))
def test_both_verbs_are_those_of_the_matrix(shape, p, periodic, eps):
    """At any eps, for potentials of any size, with empty atoms and signs."""
    grid = Grid(shape, p=p, periodic=periodic)
    problem, dense, n = Problem(grid, eps), Dense(grid.dense()), grid.shape[0]
    geometry = OnGrid(problem)
    h = randn(2, n) * 3
    if n > 1:
        h[0, n // 2] = h[1, 0] = -INF
    k, v = dense.softmin(h, eps), randn(2, n, 3, seed=1)
    rounding = 1e-15 * (1 + float(h[h.isfinite()].abs().max() + grid.dense().max()))  # of an exponent, in units of the cost
    assert float((geometry.softmin(h, eps) - k).abs().max()) <= 10 * rounding
    P = dense.plan(k, h, eps)
    assert float((geometry.apply(k, h, eps, v) - P @ v).abs().max()) <= 1e-10 + 10 * rounding / eps
    torch.testing.assert_close(geometry.plan(k, h, eps), P, rtol=0, atol=1e-12 + 10 * rounding / eps)


def test_empty_rows():
    problem = Problem(Grid((4, 5)), 0.1)
    nothing = torch.full((20,), -INF, dtype=torch.float64)
    assert (OnGrid(problem).softmin(nothing, 0.1) == INF).all()
    assert (OnGrid(problem).apply(nothing * 0 + 1, nothing, 0.1, randn(20, 2)) == 0).all()


@pytest.mark.parametrize("penalty", [KL(), KL(0.3), (KL(), KL(0.05))], ids=str)
@pytest.mark.parametrize("shape", [(24, 20), (9, 8, 7)])
def test_solves_and_gradients_are_those_of_the_matrix(shape, penalty):
    """Value, potentials and the gradients in both weights and in the spacing; three problems over one grid."""
    a, b = bumps(3, shape), bumps(3, shape, seed=1)

    def run(backend):
        spacing = torch.full((len(shape),), 0.11, dtype=torch.float64)
        asked = leaves(a, b, spacing)
        grid = Grid(shape, asked[2])
        problem = Problem(grid if backend is None else Matrix(grid.dense()), 0.02, *asked[:2], penalty)
        s = solve(problem, tol=0.0, max_iter=40, accelerate="none", backend=backend or "auto")
        return s, (s.value, s.f, s.g, *torch.autograd.grad((s.value * torch.arange(1, 4)).sum(), asked))

    solution, ours = run(None)
    assert type(solution.geometry) is OnGrid
    for mine, right in zip(ours, run("softmin")[1], strict=True):
        live = right.isfinite()
        torch.testing.assert_close(mine[live], right[live], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 128), (64, 64, 64)])
def test_large_images(shape):
    """Against exact sums at some of the nodes."""
    a, b = bumps(2, shape)
    problem = Problem(Grid(shape), 0.003, a, b)
    geometry, h = OnGrid(problem), torch.where(b > 0, 0.1 * randn(len(b)) + 0.003 * b.log(), -INF)
    rows = torch.arange(0, len(a), len(a) // 37)
    C = problem.cost.part(rows, slice(None)).dense()
    truth = -0.003 * ((h - C) / 0.003).logsumexp(-1)
    assert float((geometry.softmin(h, 0.003)[rows] - truth).abs().max()) <= 1e-10


def test_auto_takes_it_and_divergences_know_it():
    a, b = bumps(2, (20, 20))
    problem = Problem(Grid((20, 20)), 0.01, a, b)
    assert 'auto takes "grid"' in gpu_ot.explain(problem)
    found = gpu_ot.divergence(problem)
    truth = gpu_ot.divergence(Problem(Grid((20, 20)).dense(), 0.01, a, b), cost_aa=Grid((20, 20)).dense(), cost_bb=Grid((20, 20)).dense())
    assert abs(float(found.value - truth.value)) <= 1e-4 * float(truth.value)
    assert float(gpu_ot.divergence(Problem(Grid((20, 20)), 0.01, a, a)).value) == pytest.approx(0.0, abs=1e-9)


def test_a_circle_has_no_ends():
    """On a periodic axis everything turns: so do potentials."""
    a, b = bumps(2, (30,))
    f, turned = (solve(Problem(Grid((30,), periodic=True), 0.01, *pair), tol=1e-10).f for pair in ((a, b), (a.roll(7), b.roll(7))))
    difference = turned - f.roll(7)
    live = difference.isfinite()
    assert float((difference[live] - difference[live].mean()).abs().max()) <= 1e-8


@pytest.mark.parametrize(
    "arguments, said",
    [
        (((2, 3, 4, 5),), "shape must be the nodes of 1 to 3 axes"),
        (((0, 3),), "each at least 1"),
        (((3, 3), 0.1, 0), "p must be a power > 0"),
        (((3, 3), (0.1, 0.2, 0.3)), "spacing"),
        (((3, 3), -1.0), "spacing must be a length > 0"),
        (((3, 3), 1.0, 2, (True,)), "periodic must be one flag or 2"),
    ],
)
def test_refusals_name_the_argument(arguments, said):
    with pytest.raises(ProblemError, match=said):
        Grid(*arguments)


def test_another_cost_is_no_grid():
    with pytest.raises(gpu_ot.BackendError, match=r"gpu_ot\.Grid"):
        solve(Problem(torch.rand(3, 3), 0.1), backend="grid")


@pytest.mark.parametrize("shape, p, batch", [((40,), 1.5, ()), ((9, 7), 2.0, (2,)), ((5, 6, 4), 1.0, ())])
def test_the_sharp_cost_is_a_sum_over_axes(monkeypatch, shape, p, batch):
    """As of the stored matrix, with derivatives in the weights and the spacing; and no pair is ever formed."""
    a, b = bumps(2, shape) if batch else bumps(1, shape)[0], bumps(1, shape, seed=1)[0]

    def run(dense, grad, asked):
        grid = Grid(shape, spacing=asked[0], p=p, periodic=(True, *[False] * (len(shape) - 1)))
        s = solve(
            Problem(Matrix(grid.dense()) if dense else grid, 0.02, *asked[1:]), tol=1e-10, grad=grad, backend="softmin" if dense else "grid"
        )
        return s.sharp_cost

    spacing = torch.full((len(shape),), 0.13, dtype=torch.float64)
    truth = [run(True, "implicit", right := leaves(spacing, a, b))]
    truth += torch.autograd.grad(truth[0].sum(), right)
    monkeypatch.setattr(Grid, "strips", None)
    torch.testing.assert_close(run(False, "envelope", (spacing, a, b)), truth[0].detach(), rtol=1e-9, atol=1e-12)
    found = [run(False, "implicit", asked := leaves(spacing, a, b))]
    found += torch.autograd.grad(found[0].sum(), asked)
    for mine, right, w in zip(found, truth, (None, None, a, b), strict=True):
        if w is not None:  # a constant in a gradient in weights means nothing
            mine, right = (
                torch.where(w > 0, z - torch.where(w > 0, z, 0.0).sum(-1, keepdim=True) / (w > 0).sum(-1, keepdim=True), 0.0)
                for z in (mine, right)
            )
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-8)
