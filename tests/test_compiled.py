"""The machine code of the CPU against its torch twin: whole solves, and its parts.

`agree` solves a problem by both, and compares what they return. In float64 they differ by rounding; in float32 torch's own error in that
type, measured against float64, is the budget.
"""

import math

import numpy as np
import pytest
import torch

import gpu_ot
from gpu_ot import KL, Anneal, Constant, Problem, SqEuclidean
from gpu_ot.geometry import absorbed
from gpu_ot.solve import find
from gpu_ot.solver import compiled as stretches
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.criterion import NORMS, Change, Marginal
from gpu_ot.solver.step import Alternating, Start, State
from problems import clouds, pairwise, rand, randn, random_problem, weights

pytestmark = pytest.mark.skipif(gpu_ot.compiled.refused() is not None, reason=f"no machine code: {gpu_ot.compiled.refused()}")

SIZES = [(1, 1), (1, 7), (5, 3), (17, 64), (65, 33)]
WAYS = ["none", "mixing", "auto"]
SIDES = {"hard": KL(), "relaxed": KL(0.3), "relaxed rows": (KL(0.3), KL()), "relaxed columns": (KL(), KL(0.3)), "nearly hard": KL(1e3)}
DTYPES = [torch.float64, torch.float32]


def posed(n=33, m=40, eps=0.02, penalties=None, *, empty=0, unit=1.0, dtype=torch.float64, seed=0):
    """A problem whose largest cost is `unit`, eps as a part of it, the first atoms of a and the last of b empty."""
    a, b, M = random_problem(n, m, seed=seed, dtype=dtype)
    if empty:
        a, b = torch.cat((torch.zeros(empty), a[empty:])), torch.cat((b[:-empty], torch.zeros(empty)))
        a, b = ((w / w.sum()).to(dtype) for w in (a, b))
    return Problem(unit * M, unit * eps, a, b, KL() if penalties is None else penalties)


def batch(size=6, n=17, m=20, eps=0.02, penalties=None, dtype=torch.float64, one_cost=False):
    """Problems that take unlike many iterations: their costs are 0.1 to 3 times as large; or histograms over one cost."""
    a, b, M = (torch.stack(z) for z in zip(*(random_problem(n, m, seed=k, dtype=dtype) for k in range(size)), strict=True))
    M = M[0] if one_cost else M * torch.logspace(-1, 0.5, size, dtype=dtype)[:, None, None]
    return Problem(M, eps, a, b, KL() if penalties is None else penalties)


def within(n=30, eps=0.05, penalties=None, *, unit=1.0, a=None, size=(), dtype=torch.float64):
    """A measure moved onto itself."""
    x = rand(n, 2)
    C = unit * torch.cdist(x, x).square()
    scale = torch.logspace(-1, 0.5, size[0], dtype=torch.float64)[:, None, None] if size else 1.0
    a = a if a is None else a.to(dtype)
    return Problem((C * scale).to(dtype), unit * eps, a, a, KL() if penalties is None else penalties)


@pytest.fixture
def engines(monkeypatch):
    """What `solver.compiled.engine` made of each run: None where torch operations ran it."""
    made, make = [], stretches.engine
    monkeypatch.setattr(stretches, "engine", lambda *given: (made.append(make(*given)), made[-1])[1])
    return made


@pytest.fixture
def solve_both(engines):
    """(by machine code, by torch) of the same problem; the first was machine code indeed, unless `serves` is False."""

    def solve(problem, solver=gpu_ot.solve, serves=True, **settings):
        engines.clear()
        both = tuple(solver(problem, backend=backend, **settings) for backend in ("compiled", "dense"))
        assert [each is not None for each in engines] == [serves, False]
        return both

    return solve


@pytest.fixture
def agree(solve_both):
    def check(problem, solver=gpu_ot.solve, rounding=1e-9, history=True, **settings):
        """`rounding` in units of eps for potentials, and of the largest entry for plans. (by machine code, by torch)."""
        ours, theirs = solve_both(problem, solver, **settings)
        assert (ours.n_iter, ours.status.name) == (theirs.n_iter, theirs.status.name)
        assert ours.converged.tolist() == theirs.converged.tolist()
        if history:
            torch.testing.assert_close(ours.errors, theirs.errors, rtol=rounding, atol=rounding * float(problem.a.sum(-1).max()))
        size = max(float(theirs.f.abs().max()), float(theirs.g.abs().max())) * torch.finfo(torch.float64).eps
        for z, w in ((ours.f, theirs.f), (ours.g, theirs.g)):
            torch.testing.assert_close(z, w, rtol=0, atol=rounding * problem.eps + 64 * size)
        P, Q = ours.plan.to_dense(), theirs.plan.to_dense()
        torch.testing.assert_close(P, Q, rtol=0, atol=(rounding + 64 * size / problem.eps) * float(Q.max()))
        return ours, theirs

    return check


def sweeps(solution):
    """Beyond the start and two an iteration: kernels that were built, and iterations in the log domain."""
    return solution.n_sweeps - 2 * solution.n_iter


# Whole solves.


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_odd_sizes(agree, n, m, way, eps):
    agree(posed(n, m, eps), accelerate=way, tol=1e-6, max_iter=300)


@pytest.mark.parametrize("way, sides, norm", pairwise(WAYS, SIDES, NORMS))
def test_relaxed_and_hard_sides_in_every_norm(agree, way, sides, norm):
    agree(posed(penalties=SIDES[sides]), accelerate=way, norm=norm, tol=1e-6, max_iter=300)


@pytest.mark.parametrize("way, sides", pairwise(WAYS, SIDES))
def test_empty_atoms(agree, way, sides):
    ours, _ = agree(posed(penalties=SIDES[sides], empty=3), accelerate=way, tol=1e-6, max_iter=300)
    P = ours.plan.to_dense()
    assert (P[:3] == 0).all() and (P[:, -3:] == 0).all() and ours.f.isfinite().all() and ours.g.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_clouds_far_off_centre(agree, way):
    agree(Problem(SqEuclidean(*clouds(40, 33, offset=1e6)), 0.1), accelerate=way, max_iter=300)
    agree(Problem(1e4 + torch.cdist(*clouds(40, 33)).square(), 0.1), accelerate=way, max_iter=300, rounding=1e-7)


@pytest.mark.parametrize("way, unit, sides", pairwise(WAYS, [1e-12, 1e12], ["hard", "relaxed"]))
def test_any_unit_of_cost(agree, way, unit, sides):
    penalties = KL(unit * SIDES[sides].tau)
    agree(posed(unit=unit, penalties=penalties), accelerate=way, tol=1e-6, max_iter=300)


@pytest.mark.parametrize("eps, sides", pairwise([1e-4, 1e-5, 1e-7], ["hard", "relaxed"]))
def test_plain_iterations_at_eps_so_small_that_kernels_are_built_anew(agree, eps, sides):
    ours, _ = agree(posed(eps=eps, penalties=SIDES[sides]), accelerate="none", max_iter=300)
    assert sweeps(ours) > 4, "one kernel was enough: a sharper problem is needed here"


@pytest.mark.parametrize("way", ["mixing", "auto"])
@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_small_eps_is_solved_as_well_with_acceleration(solve_both, way, eps):
    """Rounding decides which steps are tried, after hundreds of them: the solution is the same, the way to it is not."""
    ours, theirs = solve_both(posed(eps=eps), accelerate=way, tol=1e-9, max_iter=3000)
    assert ours.converged and theirs.converged and ours.n_iter < 2 * theirs.n_iter
    torch.testing.assert_close(ours.plan.to_dense(), theirs.plan.to_dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [2.0, 0.05], ids=["every iteration", "some iterations"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sides", ["hard", "relaxed"])
def test_iterations_fall_back_to_the_log_domain(agree, monkeypatch, exact, way, sides):
    """With a bar for exact sums that no sum, or not every sum, can reach."""
    monkeypatch.setattr(absorbed, "range_of", lambda itemsize: (-650.0, exact))
    for problem in (posed(17, 20, penalties=SIDES[sides]), batch(3, penalties=SIDES[sides])):
        ours, _ = agree(problem, accelerate=way, tol=1e-6, max_iter=100)
        assert sweeps(ours) > ours.n_iter or exact < 1
    agree(within(eps=0.01, penalties=SIDES[sides]), find, order="symmetric", criterion=Marginal(1e-8), max_iter=100)


@pytest.mark.parametrize("way, every, max_iter", pairwise(WAYS, [1, 7, 10], [1, 6, 15, 25]))
def test_checks_and_runs_exactly_as_long_as_it_may(agree, way, every, max_iter):
    for problem in (posed(eps=0.01), batch()):
        ours, _ = agree(problem, accelerate=way, tol=1e-9, check_every=every, max_iter=max_iter)
        assert ours.n_iter == max_iter and ours.status.name == "max_iter"


@pytest.mark.parametrize("way, sides", pairwise(WAYS, SIDES))
@pytest.mark.parametrize("schedule", [Constant(0.02), Anneal(1.0, 0.02), Anneal(1.0, 0.02, 0.7)], ids=["constant", "halving", "slower"])
def test_schedules(agree, way, sides, schedule):
    agree(posed(penalties=SIDES[sides]), accelerate=way, tol=1e-6, max_iter=300, schedule=schedule)
    agree(batch(3), accelerate=way, tol=1e-6, max_iter=300, schedule=schedule)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("far", [0.1, 10.0])
def test_any_start(agree, way, far):
    agree(posed(), accelerate=way, tol=1e-6, start=far * randn(33))
    agree(batch(), accelerate=way, tol=1e-6, start=far * randn(6, 17))
    ours, _ = agree(posed(eps=0.01), accelerate=way, tol=1e-4)
    assert agree(posed(eps=0.01), accelerate=way, tol=1e-4, start=ours)[0].n_iter <= 2


@pytest.mark.parametrize("way", WAYS)
def test_a_tolerance_below_rounding_ends_as_stalled(agree, way):
    ours, theirs = (gpu_ot.solve(posed(eps=0.3), backend=b, accelerate=way, tol=1e-300, max_iter=500) for b in ("compiled", "dense"))
    assert ours.status.name == theirs.status.name == "stalled"
    assert ours.n_iter < 200
    torch.testing.assert_close(ours.f, theirs.f)


@pytest.mark.parametrize("tol", [0.0, -1.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_tolerance_of_zero_ends_with_the_iterations(way, tol):
    ours, theirs = (gpu_ot.solve(posed(eps=0.3), backend=b, accelerate=way, tol=tol, max_iter=500) for b in ("compiled", "dense"))
    assert ours.status.name == theirs.status.name == "max_iter" and ours.n_iter == theirs.n_iter == 500
    torch.testing.assert_close(ours.f, theirs.f)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("way, sides, eps", pairwise(WAYS, SIDES, [0.1, 0.02]))
def test_float32_is_as_accurate_as_torch(solve_both, dtype, way, sides, eps):
    problem = posed(eps=eps, penalties=SIDES[sides], dtype=dtype)
    exact = gpu_ot.solve(Problem(problem.cost.dense().double(), eps, problem.a, problem.b, problem.penalties), tol=1e-12).plan.to_dense()
    ours, theirs = solve_both(problem, accelerate=way, tol=1e-6, max_iter=1000)
    assert ours.plan.dtype == dtype and ours.status.name == theirs.status.name and abs(ours.n_iter - theirs.n_iter) <= 10
    wrong, allowed = ((s.plan.to_dense().double() - exact).abs().max() / exact.max() for s in (ours, theirs))
    assert wrong <= 2 * allowed + 2e-5, f"off by {wrong:.1e}, torch by {allowed:.1e}"


@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("sides", SIDES)
def test_iterates_of_float32_are_as_accurate_as_torch(solve_both, n, m, sides):
    """50 plain iterations against 50 in float64."""
    single = posed(n, m, penalties=SIDES[sides], dtype=torch.float32)
    wide = Problem(single.cost.dense().double(), single.eps, single.a, single.b, single.penalties)
    settings = dict(accelerate="none", tol=0.0, max_iter=50, check_every=50)
    exact = gpu_ot.solve(wide, backend="dense", **settings).f
    ours, theirs = ((s.f - exact).abs().max() for s in solve_both(single, **settings))
    assert ours <= 2 * theirs + 1e-6, f"off by {ours:.1e}, torch by {theirs:.1e}"


# Other orders and rules.


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize("translate, relative", [(math.inf, math.inf), (5, math.inf), (5, 5)])
@pytest.mark.parametrize("sides, every, max_iter", pairwise(["relaxed", "nearly hard", "relaxed columns"], [1, 10], [15, 300]))
def test_rules_of_pot_for_relaxed_marginals(agree, order, both_sides, translate, relative, sides, every, max_iter):
    rule = Change(1e-6, both_sides, translate, relative)
    problem = posed(20, 17, penalties=SIDES[sides])
    agree(problem, find, order=order, criterion=rule, check_every=every, max_iter=max_iter, accelerate="none")


def test_leaps_end_where_they_do_in_torch(agree):
    settings = dict(order="columns", criterion=Change(1e-6), check_every=1, max_iter=500, accelerate="none", leap=True)
    agree(posed(20, 17, penalties=KL(0.3)), find, history=False, **settings)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule, sides", [(Marginal(1e-6, "l2"), "hard"), (Marginal(1e-6), "relaxed"), (Change(1e-6), "relaxed")])
def test_columns_last(agree, way, rule, sides):
    agree(posed(40, 37, penalties=SIDES[sides]), find, order="columns", criterion=rule, max_iter=300, accelerate=way)


@pytest.mark.parametrize("after, every", [(7, 3), (20, 10), (500, 10)])
def test_acceleration_sets_in_later(agree, after, every):
    agree(posed(), find, criterion=Marginal(1e-9), max_iter=300, accelerate="mixing", after=after, check_every=every)


@pytest.mark.parametrize("sides", ["hard", "relaxed", "nearly hard"])
@pytest.mark.parametrize("eps", [0.1, 0.01, 1e-4, 1e-6])
def test_a_measure_onto_itself(agree, sides, eps):
    settings = dict(order="symmetric", criterion=Marginal(1e-9), check_every=1, max_iter=200)
    for a in (None, weights(30, empty=2), weights(30, (3,))):
        agree(within(eps=eps, penalties=SIDES[sides], a=a), find, **settings)
    agree(within(eps=eps, penalties=SIDES[sides], a=weights(30, (3,)), size=(3,)), find, **settings)
    agree(within(unit=1e12, eps=eps), find, start=Start(1e11 * randn(30), torch.ones(30, dtype=torch.float64)), **settings)


# Batches.


@pytest.mark.parametrize("way, sides, norm", pairwise(WAYS, SIDES, NORMS))
def test_each_problem_of_a_batch_ends_on_its_own(agree, solve_both, way, sides, norm):
    problem = batch(penalties=SIDES[sides])
    settings = dict(accelerate=way, norm=norm, tol=1e-6, max_iter=200)
    together, _ = agree(problem, serves=norm != "l2_joint", **settings)  # a joint error is not a problem's own
    if way == "mixing" and norm != "l2_joint":
        each = zip(problem.cost.dense(), problem.a, problem.b, strict=True)
        alone = [gpu_ot.solve(Problem(C, 0.02, a, b, SIDES[sides]), **settings) for C, a, b in each]
        assert len({s.n_iter for s in alone}) > 1 and together.n_iter == max(s.n_iter for s in alone)
        torch.testing.assert_close(together.f, torch.stack([s.f for s in alone]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("way, sides, norm", pairwise(WAYS, SIDES, NORMS))
def test_histograms_over_one_cost(agree, way, sides, norm):
    agree(batch(penalties=SIDES[sides], one_cost=True), accelerate=way, norm=norm, tol=1e-6, max_iter=200)


@pytest.mark.parametrize("way", WAYS)
def test_batches_of_two_axes(agree, way):
    found = batch()
    shaped = [z.reshape(2, 3, *z.shape[1:]) for z in (found.cost.dense(), found.a, found.b)]
    agree(Problem(shaped[0], 0.02, *shaped[1:]), accelerate=way, tol=1e-6, max_iter=200)
    agree(Problem(shaped[0][:1], 0.02, *shaped[1:]), serves=False, accelerate=way, tol=1e-6, max_iter=200)  # one axis shares costs


@pytest.mark.parametrize("way", ["none", "mixing"])
@pytest.mark.parametrize("one_cost", [False, True])
@pytest.mark.parametrize("where", [0, 1, 5])
def test_a_problem_that_diverges_does_not_go_unnoticed(way, one_cost, where):
    problem = batch(one_cost=one_cost)
    rows = torch.zeros_like(problem.a)
    rows[where] = math.nan
    for backend in ("compiled", "dense"):
        s = find(problem, backend=backend, start=Start(rows, problem.a), accelerate=way, criterion=Marginal(1e-6), max_iter=300)
        assert s.status.name == "diverged" and not s.converged[where], f"{backend}: {s.status.name} after {s.n_iter}"
        if backend == "compiled" and not one_cost:  # each ends on its own
            good = torch.arange(6) != where
            assert s.converged[good].all()
            torch.testing.assert_close(s.f[good], find(problem, accelerate=way, criterion=Marginal(1e-6)).f[good], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_problem_that_stalls_leaves_the_others_alone(solve_both, way):
    """Its costs are so large in units of eps that exponents have no digits left."""
    found = batch()
    C = found.cost.dense().clone()
    C[1] *= 1e17
    ours, theirs = solve_both(Problem(C, 0.02, found.a, found.b), accelerate=way, tol=1e-6, max_iter=300)
    good = torch.arange(6) != 1
    assert ours.status.name == theirs.status.name == "unresolved" and ours.converged.tolist() == theirs.converged.tolist() == good.tolist()
    torch.testing.assert_close(ours.f[good], theirs.f[good], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["alternating", "symmetric"])
def test_threads_change_no_bit(dtype, way, kind):
    """32 problems of 40 by 34 are enough entries for two threads."""
    problem = batch(32, 40, 34, dtype=dtype) if kind == "alternating" else within(40, a=weights(40, (32,)), size=(32,), dtype=dtype)
    assert problem.shape.numel() >= 2 * stretches.SHARE
    settings = dict(order="rows" if kind == "alternating" else "symmetric", accelerate=way, criterion=Marginal(1e-6), max_iter=200)
    try:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(find(problem, backend="compiled", **settings))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert torch.equal(found[0].f, other.f) and torch.equal(found[0].g, other.g) and torch.equal(found[0].errors, other.errors)


@pytest.mark.parametrize("way, every", [("none", 1), ("none", 3), ("mixing", 1), ("auto", 1)])
@pytest.mark.parametrize("rule", [Marginal(1e-9), Change(1e-12)])
def test_a_full_buffer_of_errors_only_interrupts(monkeypatch, way, every, rule):
    for problem in (posed(17, 20, 0.01, KL(0.3)), batch(3, eps=0.01)):
        settings = dict(backend="compiled", criterion=rule, accelerate=way, check_every=every, max_iter=250)
        whole = find(problem, **settings)
        with monkeypatch.context() as small:
            small.setattr(stretches, "ERRORS", 1)
            pieces = find(problem, **settings)
        assert pieces.n_iter == whole.n_iter and pieces.status is whole.status
        torch.testing.assert_close(pieces.errors, whole.errors, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(pieces.f, whole.f, rtol=0, atol=1e-9)


# Callers who look on.


@pytest.mark.parametrize("rule", [Marginal(1e-6), Change(1e-6), Change(0.0)], ids=str)
@pytest.mark.parametrize("every, max_iter", [(1, 1), (1, 200), (10, 1), (10, 11), (10, 15), (10, 200)])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_on_check_hears_of_every_check_once(solve_both, rule, every, max_iter, order):
    heard = []
    settings = dict(criterion=rule, order=order, check_every=every, max_iter=max_iter, accelerate="none")
    _, theirs = solve_both(posed(20, 17, penalties=KL(0.3)), find, on_check=lambda k, e: heard.append((k, float(e))), **settings)
    checks = len(theirs.errors)
    mine, other = heard[:-checks], heard[-checks:]
    assert [k for k, _ in mine] == [k for k, _ in other]
    np.testing.assert_allclose([e for _, e in mine], [e for _, e in other], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["rows", "symmetric"])
def test_a_caller_who_looks_on_changes_nothing(way, order):
    """Not even the history of errors, by which annealing is decided."""
    for problem in (within(eps=0.002), within(40, 0.002, a=weights(40, (3,)))):
        settings = dict(backend="compiled", order=order, accelerate=way, criterion=Marginal(1e-6), max_iter=300)
        alone, watched = (find(problem, on_check=on_check, **settings) for on_check in (None, lambda k, e: None))
        assert alone.n_iter == watched.n_iter and alone.n_sweeps == watched.n_sweeps
        torch.testing.assert_close(alone.f, watched.f, rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.errors, watched.errors, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_on_check_of_histograms_and_of_batches(agree, way):
    for one_cost in (True, False):
        heard = []
        settings = dict(accelerate=way, tol=1e-6, max_iter=200, on_check=lambda k, e, heard=heard: heard.append((k, len(e))))
        agree(batch(one_cost=one_cost), serves=one_cost, **settings)
        assert heard[: len(heard) // 2] == heard[len(heard) // 2 :]
        assert {size for _, size in heard} == {6}


def test_a_number_of_any_type_needs_no_code_of_its_own():
    """numba would compile everything again, for 10 s and more, for a tolerance that is the integer 0."""
    for tol in (0, np.float32(1e-3), True):
        rules = [stretches.rule_of(rule, torch.float64) for rule in (Marginal(tol), Change(tol, True, 5, 5))]
        for rule in rules:
            odd = {name: type(z).__name__ for name, z in rule._asdict().items() if type(z) not in (int, float, bool)}
            assert type(rule.tol) is float and not odd, f"tol = {tol!r}: {odd or type(rule.tol)}"


# Its parts.


def test_exp_is_exact_to_the_last_digit_or_two():
    from gpu_ot.compiled import exponential

    for function, cast, lowest, highest, allowed in (
        (exponential.exp64, float, exponential.LOWEST, exponential.HIGHEST, 4e-16),
        (exponential.exp32, np.float32, exponential.LOWEST_32, exponential.HIGHEST_32, 1.2e-7),
    ):
        x = np.concatenate((np.linspace(float(lowest), float(highest), 4001), np.linspace(-2, 2, 2001), [0.0, -1e-300, 1e-300, -0.0]))
        x = x.astype(cast)
        found = np.array([function(cast(z)) for z in x], dtype=np.longdouble)
        exact = np.exp(x.astype(np.longdouble))
        assert np.abs(found / exact - 1).max() < allowed
        assert np.isnan(function(cast("nan")))
        assert 0 <= function(cast("-inf")) == function(cast(lowest)) and function(cast("inf")) == function(cast(highest)) < np.inf


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("p", [0.0, 0.9], ids=["hard", "damped"])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("m", [1, 2, 7, 64, 512, 1025, 2500], ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
def test_both_products_in_one_read(dtype, p, n, m, back):
    """Rows that eight of which fit the first cache, and longer ones."""
    from gpu_ot.compiled import visits

    rng = np.random.default_rng(n + m)
    K, w, a = (rng.random(shape).astype(dtype) for shape in ((n, m), m, n))
    c = rng.standard_normal(n)
    s, u, t = (np.full(size, np.nan, dtype) for size in (n, n, m))
    visits.both(K, w, a, p, c, s, u, t, back)
    rows = K.astype(float) @ w
    scaled = a / rows if p == 0 else a * np.exp(c - p * np.log(rows))
    for found, exact in ((s, rows), (u, scaled), (t, K.T.astype(float) @ scaled)):
        np.testing.assert_allclose(found, exact, rtol=30 * np.finfo(dtype).eps * math.sqrt(max(n, m)))


def straight(rng, m, b):
    """A map whose derivative is self-adjoint in the inner product of b, with every eigenvalue in [0, 1)."""
    Q = np.linalg.qr(rng.standard_normal((m, m)))[0]
    A = np.diag(b**-0.5) @ Q @ np.diag(rng.random(m) ** 0.2) @ Q.T @ np.diag(b**0.5)
    goal = rng.standard_normal(m)
    return lambda g: goal + A @ (g - goal)


def bent(rng, m, b):
    """A map that flattens out, where a straight line leads too far."""
    inner = straight(rng, m, b)
    return lambda g: g + 0.3 * np.tanh(8 * (inner(g) - g)) * (1 + np.minimum(g * g, 4))


def sharp(rng, m, b):
    """Sinkhorn's own, at an eps at which mass moves in stages."""
    eps, C = 0.01, torch.from_numpy(rng.random((2 * m, m)))
    log_b = torch.from_numpy(np.log(b))

    def update(g):
        f = -eps * torch.logsumexp((torch.from_numpy(g) - C) / eps + log_b, 1)
        return (-eps * torch.logsumexp((f[:, None] - C) / eps - math.log(2 * m), 0)).numpy()

    return update


def level(update, share):
    """The map without what it does to constants, which g + c then has with g in common."""

    def levelled(g):
        mean = share @ g
        g_next = update(g - mean)
        return g_next - share @ g_next + mean

    return levelled


def held(memory, m):
    """What torch remembers, in the buffers of machine code."""
    from gpu_ot.compiled import mixing

    kept = mixing.blank(1, m)
    if memory is not None:
        kept.changes[0], kept.moves[0] = memory.changes, memory.moves
        kept.last[0], kept.trial[0] = torch.stack(memory.last), torch.stack(memory.trial[:2])
        kept.numbers[0] = [1, 1, *(float(z) for z in memory.trial[2:])]
    return kept


@pytest.mark.parametrize("kind", [straight, bent, sharp], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("empty", [0, 2])
def test_mixing_proposes_and_remembers_what_torch_does(kind, gauge, empty):
    """Each step of torch's way from far out, where some overshoot, to where updates are small. Both begin each with torch's memory:
    along the way rounding grows."""
    from gpu_ot.compiled import mixing

    m, eps, shortened, proposals = 12, 0.01 if kind is sharp else 1.0, 0, 0
    accelerator, tuning = Anderson(gauge), stretches.tuning(gauge)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        b = rng.random(m) + 0.05
        update = kind(rng, m, b / b.sum())
        b[:empty] = 0
        if gauge:
            update = level(update, b / b.sum())
        step = Alternating(Problem(torch.zeros(1, m, dtype=torch.float64), eps, None, torch.from_numpy(b / b.sum())), eps, accelerator)
        memory, out, g = None, np.empty(m), (0.1 if kind is sharp else 3.0) * rng.standard_normal(m)
        for k in range(40):
            g_next, last, kept = update(g), memory, held(memory, m)
            if (size := np.abs(g_next - g)[b > 0].max()) < 1e-3 * eps:
                break
            proposed, memory = accelerator.next(step, memory, torch.from_numpy(g), torch.from_numpy(g_next))
            mixing.propose(tuning, kept, 0, g, g_next, step.problem.b.numpy(), step.share.numpy(), eps, out)
            here = f"seed {seed}, iteration {k}"
            np.testing.assert_allclose(out, proposed.numpy(), rtol=1e-9, atol=1e-6 * size, err_msg=here)
            for z, w in zip(kept[:-1], held(memory, m)[:-1], strict=True):  # but what is written down on the way
                np.testing.assert_allclose(z, w, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(w[np.isfinite(w)]).max()), err_msg=here)
            g, proposals = proposed.numpy().copy(), proposals + 1
            shortened += last is not None and torch.equal(memory.trial.g, last.trial.g)
    assert proposals > 60 and (shortened or kind is straight), f"{shortened} of {proposals} steps were shortened: too few to tell"


@pytest.mark.parametrize("where", [0, 1, 4], ids=["first", "middle", "last"])
def test_nan_is_not_lost_among_numbers(where):
    """In the change of a potential, and in the error of one of several histograms."""
    from gpu_ot.compiled import watch

    problem = posed(5, 5, penalties=KL(0.3))
    f, g, old_f, old_g = (rand(5, seed=k) for k in range(4))
    g[where] = math.nan
    rule, step = Change(1e-6), Alternating(problem, problem.eps)
    states = (State(f, g, g, n_iter=2), State(old_f, old_g, old_g, n_iter=1))
    exact = rule.measure(step, *states, torch.float64).error
    error, floor = np.empty(1), np.empty(1)
    a, b, f, g, old_f, old_g = (z.numpy()[None].copy() for z in (problem.a, problem.b, f, g, old_f, old_g))
    watch.change(stretches.rule_of(rule, torch.float64), a, b, f, g, old_f, old_g, problem.eps, 2, error, floor, np.empty(5))
    assert math.isnan(exact) and math.isnan(error[0])

    seen, errors = watch.blank(5, 5, 5), np.full(5, 0.1)
    errors[where] = math.nan
    f, g, rule = np.zeros((5, 5)), np.zeros((5, 5)), stretches.rule_of(Marginal(1e-6), torch.float64)
    assert watch.judge(rule, seen, False, f, g, errors, np.full(5, 1e-15), False) == watch.DIVERGED


# Without numba.


@pytest.mark.parametrize("way", WAYS)
def test_without_numba_the_plan_is_the_same_and_explain_says_why(hidden, engines, way):
    problem = posed()
    ours = gpu_ot.solve(problem, accelerate=way, tol=1e-9)
    said = gpu_ot.explain(problem)
    assert 'auto takes "compiled"' in said and "machine code" in said
    with hidden():
        theirs = gpu_ot.solve(problem, accelerate=way, tol=1e-9)
        said = gpu_ot.explain(problem)
        assert 'auto takes "dense"' in said and 'instead of "compiled", which was refused' in said and "refused: hidden by a test" in said
        with pytest.raises(gpu_ot.BackendError, match="hidden by a test"):
            gpu_ot.solve(problem, backend="compiled")
    assert engines[0] is not None and engines[1] is None and len(engines) == 2
    torch.testing.assert_close(ours.plan.to_dense(), theirs.plan.to_dense(), rtol=0, atol=1e-12)
