"""Starting potentials: exact where the theory says so, and worth starting from."""

import ot
import pytest
import torch

import gpu_ot
from gpu_ot import Formula, Problem, ProblemError, SqEuclidean
from gpu_ot.initial import gaussian_potentials, sorted_potentials
from problems import rand, randn, weights


def on_the_line(n=40, m=57, seed=0):
    """Unsorted points and unequal weights of mass 1, some of them 0, and points that coincide."""
    x, y = randn(n, seed=seed), 2 * rand(m, seed=seed + 50) + 1
    a, b = weights(n, empty=n // 7, seed=seed), weights(m, empty=m // 5, seed=seed + 50)
    x[n // 2 :: 9], y[m // 2 :: 9] = x[0], y[0]
    return x, y, a, b


def dual(f, C, a, b):
    """The dual value at f and the best g that it allows."""
    g = (C - f.unsqueeze(-1)).amin(-2)
    return (a * f).sum(-1) + (b * g).sum(-1)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("n, m", [(40, 57), (57, 40), (1, 9), (9, 1), (2, 2)])
def test_sorted_potentials_reach_the_exact_cost(p, n, m):
    for seed in range(5):
        x, y, a, b = on_the_line(n, m, seed)
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
    x, y = (randn(3, k, 4, seed=k) for k in (30, 20))
    together = gaussian_potentials(x, y)
    for k in range(3):
        torch.testing.assert_close(together[k], gaussian_potentials(x[k], y[k]))


def iterations(problem, start, **options):
    return gpu_ot.solve(problem, start=start, tol=1e-3, accelerate="none", check_every=1, max_iter=50_000, **options).n_iter


@pytest.mark.parametrize("weighted, p, eps, share", [(False, 2, 0.003, 0.5), (True, 2, 0.003, 0.5), (True, 1, 0.01, 1.0)])
def test_sorting_saves_iterations_on_the_line(weighted, p, eps, share):
    x, y, *held = on_the_line(200, 250)
    held = held if weighted else (None, None)
    cost = Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1) ** p, x.unsqueeze(-1), y.unsqueeze(-1))
    problem = Problem(cost, eps * float(cost.scale("std")), *held)
    assert iterations(problem, sorted_potentials(x, y, *held, p=p)) < share * iterations(problem, None)


def gaussian_clouds(n=400, m=500, d=10):
    return randn(n, d) @ randn(d, d, seed=2) / d**0.5, randn(m, d, seed=1) @ randn(d, d, seed=3) / d**0.5 + 1


def test_moments_save_iterations_on_gaussian_clouds():
    x, y = gaussian_clouds()
    cost = SqEuclidean(x, y)
    problem = Problem(cost, 0.03 * float(cost.scale("std")))
    assert iterations(problem, gaussian_potentials(x, y)) < 0.75 * iterations(problem, None)


@pytest.mark.parametrize("weighted", [False, True])
def test_gaussian_potentials_are_exact_for_affine_maps(weighted):
    """y = A x + t with A symmetric and positive is the optimal map of x, so f reaches the exact cost sum a |x - y|^2."""
    x, _ = gaussian_clouds(60, 1, 4)
    root = randn(4, 4, seed=1)
    y = x @ (root @ root.T) + torch.tensor([100.0, 0.0, -3.0, 1.0], dtype=torch.float64)
    a = weights(60, empty=3) if weighted else torch.ones(60, dtype=torch.float64)
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
    for says, call in (
        (r"x has shape \(7, 10\), expected points on a line", lambda: sorted_potentials(x, y)),
        ("p must be >= 1", lambda: sorted_potentials(x[:, 0], y[:, 0], p=0.5)),
        (r"a has shape \(8,\), expected \(\*batch, 7\)", lambda: gaussian_potentials(x, y, torch.ones(8))),
        (r"y has shape \(8, 3\)", lambda: gaussian_potentials(x, y[:, :3])),
    ):
        with pytest.raises(ProblemError, match=says):
            call()
