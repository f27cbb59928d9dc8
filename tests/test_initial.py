"""Starting potentials: exact where the theory says so, and worth starting from."""

from __future__ import annotations

import ot
import pytest
import torch

import gpu_ot
from gpu_ot import Formula, Problem, ProblemError, SqEuclidean
from gpu_ot.initial import gaussian_potentials, sorted_potentials


def on_the_line(n=40, m=57, seed=0):
    """Unsorted points and unequal weights of mass 1, some of them 0, and points that coincide."""
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, generator=gen, dtype=torch.float64), 2 * torch.rand(m, generator=gen, dtype=torch.float64) + 1
    a, b = torch.rand(n, generator=gen, dtype=torch.float64), torch.rand(m, generator=gen, dtype=torch.float64)
    a[::7] = b[::5] = 0.0
    x[3], y[4] = x[4], y[8]
    return x, y, a / a.sum(), b / b.sum()


def dual(f, C, a, b):
    """The dual value at f and the best g that it allows."""
    g = (C - f.unsqueeze(-1)).amin(-2)
    return (a * f).sum(-1) + (b * g).sum(-1)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("n, m", [(40, 57), (57, 40), (1, 9), (9, 1), (2, 2)])
def test_sorted_potentials_reach_the_exact_cost(p, n, m):
    for seed in range(5):
        if min(n, m) > 8:
            x, y, a, b = on_the_line(n, m, seed)
        else:
            gen = torch.Generator().manual_seed(seed)
            x, y, a, b = (torch.rand(k, generator=gen, dtype=torch.float64) for k in (n, m, n, m))
            a, b = a / a.sum(), b / b.sum()
        f = sorted_potentials(x, y, a, b, p)
        C = (x[:, None] - y).abs() ** p
        exact = ot.emd2_1d(x.numpy(), y.numpy(), a.numpy(), b.numpy(), metric="minkowski", p=p)
        assert float(dual(f, C, a, b)) == pytest.approx(exact, rel=1e-10)


def test_equal_weights_step_down_in_the_middle():
    """With n = m each step may be taken at two columns. Both are optimal, and so is their mean."""
    x, y, _, _ = on_the_line(50, 50)
    uniform = torch.full((50,), 0.02, dtype=torch.float64)
    f = sorted_potentials(x, y)
    exact = float((x.sort()[0] - y.sort()[0]).square().mean())
    assert float(dual(f, (x[:, None] - y).square(), uniform, uniform)) == pytest.approx(exact, rel=1e-12)
    mirrored = sorted_potentials(-x, -y)  # the mean has no preferred side
    torch.testing.assert_close(f - f.mean(), mirrored - mirrored.mean(), rtol=0, atol=1e-10)


def test_batches_are_solved_each_on_its_own():
    problems = [on_the_line(seed=k) for k in range(3)]
    x, y, a, b = (torch.stack(parts) for parts in zip(*problems, strict=True))
    together = sorted_potentials(x.unsqueeze(-1), y.unsqueeze(-1), a, b)
    for k, problem in enumerate(problems):
        torch.testing.assert_close(together[k], sorted_potentials(*problem))
    x, y = (torch.randn(3, k, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (30, 20))
    together = gaussian_potentials(x, y)
    for k in range(3):
        torch.testing.assert_close(together[k], gaussian_potentials(x[k], y[k]))


def iterations(problem, start, **options):
    return gpu_ot.solve(problem, start=start, tol=1e-3, accelerate="none", check_every=1, max_iter=50_000, **options).n_iter


@pytest.mark.parametrize("uniform", [True, False])
def test_sorting_saves_iterations_on_the_line(uniform):
    x, y, a, b = on_the_line(200, 250)
    if uniform:
        a = b = None
    cost = SqEuclidean(x.unsqueeze(-1), y.unsqueeze(-1))
    problem = Problem(cost, 0.003 * float(cost.scale("std")), a, b)
    assert iterations(problem, sorted_potentials(x, y, a, b)) < 0.5 * iterations(problem, None)


def test_sorting_saves_iterations_for_distances_too():
    x, y, a, b = on_the_line(100, 120)
    cost = Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x.unsqueeze(-1), y.unsqueeze(-1))
    problem = Problem(cost, 0.01 * float(cost.scale("std")), a, b)
    assert iterations(problem, sorted_potentials(x, y, a, b, p=1)) < iterations(problem, None)


def gaussian_clouds(n=400, m=500, d=10):
    gen = torch.Generator().manual_seed(0)
    L, R = (torch.randn(d, d, generator=gen, dtype=torch.float64) / d**0.5 for _ in range(2))
    x, y = torch.randn(n, d, generator=gen, dtype=torch.float64) @ L, torch.randn(m, d, generator=gen, dtype=torch.float64) @ R + 1
    return x, y


def test_moments_save_iterations_on_gaussian_clouds():
    x, y = gaussian_clouds()
    cost = SqEuclidean(x, y)
    problem = Problem(cost, 0.03 * float(cost.scale("std")))
    assert iterations(problem, gaussian_potentials(x, y)) < 0.75 * iterations(problem, None)


@pytest.mark.parametrize("weighted", [False, True])
def test_gaussian_potentials_are_exact_for_affine_maps(weighted):
    """y = A x + t with A symmetric and positive is the optimal map of x, so f reaches the exact cost sum a |x - y|^2."""
    x, _ = gaussian_clouds(60, 1, 4)
    gen = torch.Generator().manual_seed(1)
    root = torch.randn(4, 4, generator=gen, dtype=torch.float64)
    y = x @ (root @ root.T) + torch.tensor([100.0, 0.0, -3.0, 1.0], dtype=torch.float64)
    a = torch.rand(60, generator=gen, dtype=torch.float64) if weighted else torch.ones(60, dtype=torch.float64)
    a[5] = 0.0 if weighted else 1.0
    f = gaussian_potentials(x, y, a, 3 * a)
    exact = (a * (x - y).square().sum(-1)).sum()
    torch.testing.assert_close(dual(f, torch.cdist(x, y).square(), a, a), exact, rtol=1e-9, atol=0)


def test_flat_clouds_are_legal():
    """Fewer points than coordinates: the covariance has no inverse, and the map needs none across the cloud."""
    x, _ = gaussian_clouds(6, 1, 10)
    y = 2 * x + 1
    f = gaussian_potentials(x, y)
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    exact = (x - y).square().sum(-1).mean()
    torch.testing.assert_close(dual(f, torch.cdist(x, y).square(), uniform, uniform), exact, rtol=1e-9, atol=0)
    assert gaussian_potentials(x[:1], y).isfinite().all()


def test_far_from_the_origin_the_digits_stay():
    x, y = gaussian_clouds(50, 60)
    near, far = gaussian_potentials(x, y), gaussian_potentials(x + 1e4, y + 1e4)
    torch.testing.assert_close(near - near.mean(), far - far.mean(), rtol=0, atol=1e-9)


def test_starts_are_detached_and_wide():
    x, y = (z.float().requires_grad_() for z in gaussian_clouds(7, 8))
    for f in (gaussian_potentials(x, y), sorted_potentials(x[:, 0], y[:, 0])):
        assert f.dtype == torch.float64 and not f.requires_grad


def test_misuse_is_refused():
    x, y = gaussian_clouds(7, 8)
    with pytest.raises(ProblemError, match=r"x has shape \(7, 10\), expected points on a line"):
        sorted_potentials(x, y)
    with pytest.raises(ProblemError, match="p must be >= 1"):
        sorted_potentials(x[:, 0], y[:, 0], p=0.5)
    with pytest.raises(ProblemError, match=r"a has shape \(8,\), expected \(\*batch, 7\)"):
        gaussian_potentials(x, y, torch.ones(8))
    with pytest.raises(ProblemError, match=r"y has shape \(8, 3\)"):
        gaussian_potentials(x, y[:, :3])
