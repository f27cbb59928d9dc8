"""The loop alone, on stub geometries: its bugs and a backend's cannot mask each other."""

import math

import pytest
import torch

from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.protocol import Geometry
from gpu_ot.problem import Problem
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.annealing import Anneal
from gpu_ot.solver.criterion import Marginal
from gpu_ot.solver.loop import sinkhorn
from gpu_ot.solver.step import Alternating, Start


class Halving(Geometry):
    """Not transport: each iteration halves the distance of g to zero, down to a rounding floor."""

    dtype = torch.float64
    inputs = ()

    def __init__(self, floor: float = 0.0):
        self.floor, self.calls = floor, []

    @property
    def T(self):
        return self

    def softmin(self, h, eps):
        return torch.ones_like(h)

    def apply(self, k, h, eps, v):
        raise NotImplementedError

    plan = pull_back = apply

    def iterate(self, problem, g, eps, k):
        self.calls.append((eps, k))
        for _ in range(k):
            g, last = (g / 2).clamp(min=self.floor), g
        return last, last, g


@pytest.fixture
def square():
    return Problem(torch.zeros(4, 4, dtype=torch.float64), 1.0)


def run(geometry, problem, tol=1e-6, norm="l1", max_iter=1000, accelerator=None, **settings):
    step = Alternating(problem, problem.eps, *([accelerator] if accelerator else []))
    start = Start(torch.zeros_like(problem.a), torch.ones_like(problem.a))
    return sinkhorn(geometry, step, Marginal(tol, norm), start, max_iter=max_iter, **settings)


def test_looks_after_1_11_21(square):
    geometry = Halving()
    outcome = run(geometry, square, tol=1e-6)
    assert [k for _, k in geometry.calls] == [1, 10, 10] and outcome.n_iter == 21
    assert outcome.status.name == "converged" and outcome.converged.all()
    assert float(outcome.errors[-1]) <= 1e-6 < float(outcome.errors[-2])


@pytest.mark.parametrize("max_iter", [1, 2, 11, 15])
def test_runs_exactly_as_long_as_it_may(square, max_iter):
    geometry = Halving()
    outcome = run(geometry, square, tol=0.0, max_iter=max_iter)
    assert outcome.n_iter == sum(k for _, k in geometry.calls) == max_iter
    assert outcome.status.name == "max_iter" and not outcome.converged.any()


def test_a_tolerance_below_rounding_ends_as_stalled(square):
    outcome = run(Halving(), square, tol=1e-300)
    assert outcome.status.name == "stalled" and outcome.n_iter < 100


def test_a_tolerance_of_zero_runs_to_the_limit(square):
    """Past rounding, and past an error of exactly 0."""
    outcome = run(Halving(), square, tol=0.0, max_iter=2000)
    assert outcome.status.name == "max_iter" and outcome.n_iter == 2000 and not outcome.converged.any()
    assert float(outcome.errors[-1]) == 0


class OneLaunch(Halving):
    """Like a kernel that runs a block in one launch: it asks the accelerator once a block."""

    single_launch = True

    def run(self, step, state, k):
        return step.advance(self, state, k)


@pytest.mark.parametrize("accelerator", [None, Anderson(gauge=False)], ids=["plain", "mixing"])
def test_a_backend_is_asked_for_blocks(square, accelerator):
    """1, 10, 10, ... whatever the accelerator, where one launch runs a block; and the host proposes every g where none does."""
    for kind, asked in ((OneLaunch, [1, 10, 4]), (Halving, [1, 10, 4] if accelerator is None else [1] * 15)):
        geometry = kind()
        outcome = run(geometry, square, tol=0.0, max_iter=15, accelerator=accelerator)
        assert [k for _, k in geometry.calls] == asked[: len(geometry.calls)]
        assert outcome.n_iter == sum(k for _, k in geometry.calls) and len(geometry.calls) >= 2


class Moving(Halving):
    """Each update of g adds to it what `move` says of the number of the call."""

    def __init__(self, move):
        super().__init__()
        self.move = move

    def iterate(self, problem, g, eps, k):
        self.calls.append((eps, k))
        return g, g, g + self.move(len(self.calls))


@pytest.mark.parametrize("status, move", [("stalled", lambda k: 1e-13 * (1.5 + math.sin(7 * k))), ("diverged", lambda k: math.nan)])
def test_noise_near_the_floor_and_nan_end_the_loop_in_words(square, status, move):
    outcome = run(Moving(move), square, tol=1e-300)
    assert outcome.status.name == status and (status == "stalled" or outcome.n_iter == 1)


def test_the_schedule_comes_first_one_iteration_each(square):
    geometry = Halving()
    run(geometry, square, schedule=Anneal(8.0, 1.0))
    assert geometry.calls[:4] == [(8.0, 1), (4.0, 1), (2.0, 1), (1.0, 1)]


def test_the_error_is_the_marginal_error(problem):
    """b expm1((g - g_next) / eps) is the excess of the column marginal: the stopping test needs no sweep over the costs."""
    a, b, M = problem(8, 9)
    bound = Problem(M, 0.05, a, b)
    geometry = Dense(M)
    for norm, size in (("l1", lambda z: z.abs().sum()), ("l2", lambda z: z.norm())):
        outcome = run(geometry, bound, tol=0.0, max_iter=5, norm=norm)
        k, h = outcome.f + 0.05 * a.log(), outcome.g + 0.05 * b.log()
        P = geometry.plan(k, h, 0.05)
        torch.testing.assert_close(P.sum(1), a)
        torch.testing.assert_close(outcome.errors[-1], size(P.sum(0) - b), rtol=1e-8, atol=0)


def test_plain_sinkhorn_never_raises_the_l1_error(problem):
    a, b, M = problem(12, 9)
    outcome = run(Dense(M), Problem(M, 0.01, a, b), tol=0.0, max_iter=300, check_every=1)
    errors = torch.stack(outcome.errors)
    assert (errors.diff() <= 1e-15).all()
