"""Partial transport: the mass and the bounds, POT's plans where POT converges, derivatives, and POT's names."""

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, Problem, ProblemError, SqEuclidean, solve
from gpu_ot.penalties import filled
from gpu_ot.solve import find
from gpu_ot.solver.criterion import Marginal
from problems import close, gradcheck, leaves, measures, numbers, rand, random_problem

FRACTIONS = [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0]


def partial_problem(n=13, m=17, eps=0.05, fraction=0.5, *, ratio=1.0, **options):
    a, b, M = random_problem(n, m)
    b = ratio * b
    return Problem(M, eps, a, b, mass=fraction * torch.minimum(a.sum(), b.sum()), **options)


def pot(problem, mass, iterations=1500):
    """POT's plan; its entropy has no weights in it, so they go into the costs."""
    a, b, eps = problem.a, problem.b, problem.eps
    C = problem.cost.dense() - eps * (a.log().unsqueeze(-1) + b.log())
    return ot.partial.entropic_partial_wasserstein_logscale(a.numpy(), b.numpy(), C.numpy(), eps, mass, numItermax=iterations)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("ratio", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("accelerate", ["auto", "none"])
def test_the_mass_moves_within_the_bounds(fraction, ratio, accelerate):
    problem = partial_problem(fraction=fraction, ratio=ratio)
    solution = solve(problem, tol=1e-11, accelerate=accelerate)
    P = solution.plan.to_dense()
    assert solution.converged and P.isfinite().all() and (P >= 0).all()
    assert float(P.sum()) == pytest.approx(float(problem.mass), rel=1e-12, abs=1e-15)
    assert (P.sum(-1) <= problem.a + 1e-15).all() and (P.sum(-2) <= problem.b + 1e-10).all()


@pytest.mark.parametrize("fraction, ratio", [(1e-3, 1.0), (0.5, 0.5), (0.8, 1.0)])
def test_it_is_pots_plan(fraction, ratio):
    problem = partial_problem(fraction=fraction, ratio=ratio)
    close(solve(problem, tol=1e-12).plan.to_dense(), pot(problem, float(problem.mass)), rtol=0, atol=1e-9)


def test_all_of_equal_masses_is_balanced_transport():
    a, b, M = random_problem(9, 7)
    whole, balanced = solve(Problem(M, 0.05, a, b, mass=a.sum()), tol=1e-12), solve(Problem(M, 0.05, a, b), tol=1e-12)
    close(whole.plan.to_dense(), balanced.plan.to_dense(), rtol=0, atol=1e-11)
    close(whole.value, balanced.value, rtol=1e-11)


def test_the_value_is_the_objective():
    problem = partial_problem(ratio=2.0)
    solution = solve(problem, tol=1e-12)
    P, prior = solution.plan.to_dense(), problem.a.unsqueeze(-1) * problem.b
    close(solution.value, (P * problem.cost.dense()).sum() + 0.05 * ((P * (P / prior).log()).sum() - P.sum() + prior.sum()), rtol=1e-9)


def test_derivatives_of_value_and_plan():
    inputs = [*leaves(*measures(5, 4)), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)]
    weights = rand(5, 4)

    def solved(grad, x, y, a, b, mass):
        return solve(Problem(SqEuclidean(x, y), 0.1, a, b, mass=mass), tol=1e-12, grad=grad)

    assert gradcheck(lambda *z: solved("envelope", *z).value, inputs)
    (eps,), (x, y, a, b, mass) = numbers(0.1), inputs
    assert gradcheck(lambda eps: solve(Problem(SqEuclidean(x, y), eps, a, b, mass=mass), tol=1e-12).value, [eps])
    assert gradcheck(lambda *z: (weights * solved("unroll", *z).plan.to_dense()).sum(), inputs)


@pytest.mark.parametrize("fraction", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_implicit_derivatives_of_plan_and_potentials(fraction, order):
    """At small masses and large, where some points give all they have and others do not; unequal weights; the costs too."""
    weights, v, w = rand(5, 4), rand(5, seed=3), rand(4, seed=4)
    x, y, a, b = leaves(*measures(5, 4))
    mass = (fraction * torch.minimum(a.sum(), b.sum())).detach().requires_grad_()

    def moments(x, y, a, b, mass):
        found = find(
            Problem(SqEuclidean(x, y), 0.1, a, b, mass=mass), criterion=Marginal(1e-13), grad="implicit", order=order, max_iter=20_000
        )  # fmt: skip
        P = found.plan
        return torch.stack(((weights * P.to_dense()).sum(), (v * (P @ w)).sum(), (v * found.f).sum() + (w * found.g).sum(), found.value))

    assert gradcheck(moments, (x, y, a, b, mass))


def test_implicit_derivatives_are_those_of_every_iteration():
    x, y, a, b = measures(9, 11)
    a[:2], b[3] = 0, 0
    masses = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64) * torch.minimum(a.sum(), b.sum())
    found = []
    for grad in ("implicit", "unroll"):
        inputs = leaves(x, y, a, b, masses)
        problem = Problem(SqEuclidean(*inputs[:2]), 0.2, *inputs[2:4], mass=inputs[4])
        solution = solve(problem, tol=1e-14, grad=grad, max_iter=3000, accelerate="none")
        moment = (rand(9, 11) * solution.plan.to_dense()).sum() + solution.sharp_cost.sum()
        found.append(torch.autograd.grad(moment, inputs))
    for ours, truth in zip(*found, strict=True):
        assert ours.isfinite().all()
        close(ours, truth, rtol=1e-6, atol=1e-8)


def test_implicit_derivatives_of_what_has_not_converged_are_announced():
    problem = partial_problem(40, 40, eps=1e-2, fraction=0.95)
    C = problem.cost.dense().clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match="exact at convergence"):
        solve(Problem(C, 1e-2, problem.a, problem.b, mass=problem.mass), grad="implicit", max_iter=3)


def a_way_for_three_tenths(unit, mass):
    """Four of five points reach one other alone, of mass .1: no more than .1 + .2 moves."""
    C = rand(5, 4)
    C[:4, 1:] = torch.inf
    return Problem(unit * C, unit * 0.05, b=torch.tensor([0.1, 0.3, 0.3, 0.3], dtype=torch.float64), mass=mass)


def assert_infeasible(found):
    assert found.status.name == "infeasible" and not found.converged and "move less" in found.status.explanation


BACKENDS = pytest.mark.parametrize("backend", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "softmin"))])
UNITS = pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])


@BACKENDS
@UNITS
def test_mass_without_a_way_is_infeasible(backend, unit):
    for mass in (0.1, 0.29, 0.3):
        assert solve(a_way_for_three_tenths(unit, mass), tol=1e-8, backend=backend).status.name == "converged"
    for mass in (0.32, 0.5, 1.0):
        found = solve(a_way_for_three_tenths(unit, mass), tol=1e-8, backend=backend)
        assert_infeasible(found)
        assert found.n_iter < 1000


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "dense", "softmin"])
@UNITS
def test_hardly_more_mass_than_has_a_way_is_infeasible(backend, unit):
    """The dual grows slowly."""
    assert_infeasible(solve(a_way_for_three_tenths(unit, 0.31), tol=1e-8, backend=backend))


def test_masses_of_a_batch():
    a, b, M = random_problem(8, 6)
    masses = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    together = solve(Problem(M, 0.05, a, b, mass=masses), tol=1e-11)
    for k, mass in enumerate(masses):
        alone = solve(Problem(M, 0.05, a, b, mass=mass), tol=1e-11)
        close(together.plan.to_dense()[k], alone.plan.to_dense(), rtol=0, atol=1e-10)
        close(together.value[k], alone.value, rtol=1e-9)


@pytest.mark.parametrize("backend", ["dense", "chunked", "softmin"])
@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_backends_and_units(backend, unit):
    x, y, a, b = measures(9, 11)
    a[:2] = 0
    truth = solve(Problem(SqEuclidean(x, y), 0.01, a, b, mass=2.0), tol=1e-11)
    scaled = solve(Problem(SqEuclidean(unit**0.5 * x, unit**0.5 * y), unit * 0.01, a, b, mass=2.0), tol=1e-11, backend=backend)
    assert scaled.converged
    close(scaled.plan.to_dense(), truth.plan.to_dense(), rtol=0, atol=1e-9)
    close(scaled.value / unit, truth.value, rtol=1e-9)


def test_float32():
    problem = partial_problem(60, 50, eps=0.01)
    single = Problem(problem.cost.dense().float(), 0.01, problem.a, problem.b, mass=problem.mass)
    close(solve(single, tol=1e-6).plan.to_dense(), solve(problem, tol=1e-9).plan.to_dense(), rtol=0, atol=2e-6)


def test_sharp_plans_leave_outliers_out():
    x, y, _, _ = measures(20, 20, shift=0.0)
    y = x.flip(0) + 0.01
    y[:5] += 100
    P = solve(Problem(SqEuclidean(x, y), 1e-3, mass=0.75), tol=1e-9).plan.to_dense()
    assert float(P[:, :5].sum()) == 0 and float(P.sum()) == pytest.approx(0.75)


def test_running_out_is_a_status():
    solution = solve(partial_problem(40, 40, eps=1e-3, fraction=0.95), tol=1e-12, max_iter=3)
    assert solution.status.name == "max_iter" and not solution.converged and solution.plan.to_dense().isfinite().all()


def test_a_start_saves_iterations():
    problem = partial_problem(40, 50, eps=0.003, fraction=0.9)
    cold = solve(problem, tol=1e-10)
    warm = solve(problem, tol=1e-10, start=cold)
    assert warm.converged and warm.n_iter < cold.n_iter / 4
    close(warm.plan.to_dense(), cold.plan.to_dense(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(mass=-0.1), "mass must be between 0 and"),
        (dict(mass=1.1), "found 1.1: more than there is"),
        (dict(mass=float("nan")), "mass must be between 0 and"),
        (dict(mass=torch.ones(3)), "batches that broadcast"),
        (dict(mass=0.5, penalties=KL(1.0)), "leave one of them out"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ProblemError) as refusal:
        Problem(torch.rand(2, 5, 4), 0.1, **options)
    assert words in str(refusal.value)


def test_what_is_not_known_is_refused():
    x, y, _, _ = measures()
    with pytest.raises(ProblemError, match="no divergence"):
        gpu_ot.divergence(Problem(SqEuclidean(x, y), 0.1, mass=0.5))
    (eps,) = numbers(0.1)
    with pytest.raises(ProblemError, match="eps"):
        solve(Problem(rand(5, 4), eps, mass=0.5), grad="implicit")


def test_annealing_gets_there_sooner():
    """Costs of up to 10^4 eps: of eps annealed, and at one eps."""
    x, y, _, _ = measures(60, 60, shift=0.0)
    x[:15], y[:15] = x[:15] + 3, y[:15] - 3
    problem = Problem(SqEuclidean(x, y), 5e-3, mass=0.5)
    annealed, level = (solve(problem, tol=1e-8, max_iter=300, accelerate=accelerate) for accelerate in ("auto", "mixing"))
    assert annealed.converged and not level.converged
    close(annealed.value, level.value, rtol=1e-6)


@pytest.mark.parametrize("mass", [0.0, 0.2, 0.999, 1.0])
def test_levels_give_the_mass(mass):
    s, a = rand(4, 9, seed=1) * 3 - 1, rand(4, 9, seed=2)
    a[:, 3], s[:, 5] = 0, s[:, 6]  # an empty atom, and a tie
    a = a / a.sum(-1, keepdim=True)
    wanted = torch.full((4, 1), mass, dtype=torch.float64)
    lam = filled(s, a, wanted, 0.1)
    close((a * ((lam - s) / 0.1).exp().clamp(max=1)).sum(-1), wanted[:, 0], rtol=1e-12)
    if 0 < mass < 1:
        assert gradcheck(lambda s, a, wanted: filled(s, a, wanted, 0.1), leaves(s, a + 0.01, wanted))


# POT's names.


@pytest.mark.parametrize("name", ["entropic_partial_wasserstein", "entropic_partial_wasserstein_logscale"])
@pytest.mark.parametrize("m", [None, 0.1, 0.5])
def test_pots_names_find_pots_plans(arrays, name, m):
    a, b, M = arrays(12, 15)
    theirs = ot.partial.entropic_partial_wasserstein_logscale(*map(np.asarray, (a, b, M)), 0.1, m, numItermax=1000, log=True)
    ours = getattr(gpu_ot.pot.partial, name)(a, b, M, 0.1, m, log=True)
    assert type(ours[0]) is type(M) and ours[1].keys() >= theirs[1].keys()
    close(ours[0], theirs[0], rtol=0, atol=1e-8)
    close(ours[1]["partial_w_dist"], theirs[1]["partial_w_dist"], rtol=1e-6)
    assert ours[1]["status"].name in ("converged", "stalled")


def test_where_pot_finds_nan():
    """POT's issue 723: at small reg its kernel underflows."""
    a, b, M = (z.numpy() for z in random_problem(10, 10))
    with np.errstate(all="ignore"):
        assert np.isnan(ot.partial.entropic_partial_wasserstein(a, b, 1000 * M, 0.1, 0.5)).any()
    P = gpu_ot.pot.partial.entropic_partial_wasserstein(a, b, 1000 * M, 0.1, 0.5)
    exact = ot.partial.partial_wasserstein(a, b, 1000 * M, 0.5)
    assert P.sum() == pytest.approx(0.5) and (P * M).sum() == pytest.approx((exact * M).sum(), rel=1e-3)


def test_a_mass_of_zero_and_empty_atoms_by_pots_names():
    a, b, M = (z.numpy() for z in random_problem(6, 5))
    a[0] = 0
    assert not gpu_ot.pot.partial.entropic_partial_wasserstein(a, b, M, 0.1, 0.0).any()
    P = gpu_ot.pot.partial.entropic_partial_wasserstein(a, b, M, 0.1, 0.4)
    assert P.sum() == pytest.approx(0.4) and not P[0].any()


def test_gradients_by_pots_names():
    a, b, M = leaves(*random_problem(5, 4))
    inputs = a, b, M

    def cost(a, b, M):
        return (gpu_ot.pot.partial.entropic_partial_wasserstein(a, b, M, 0.2, 0.6) * M).sum()

    assert gradcheck(cost, inputs)


def test_bad_input_by_pots_names_is_named():
    a, b, M = random_problem(4, 3)
    call = gpu_ot.pot.partial.entropic_partial_wasserstein
    for m, words in ((-1.0, "greater than 0"), (2.0, "lower or equal than min")):
        with pytest.raises(ValueError, match=words):
            call(a, b, M, 0.1, m)
    with pytest.raises(ValueError, match="Unknown method"):
        call(a, b, M, 0.1, 0.5, method="other")
    with pytest.raises(ProblemError, match="takes one histogram"):
        call(a, b.unsqueeze(-1).expand(3, 2), M, 0.1, 0.5)
