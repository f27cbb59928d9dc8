"""Fewer passes and the same answer: acceleration against the plain loop, and inputs that break loops in float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_ot
from gpu_ot import KL, TV, Problem
from gpu_ot.penalties import best_shift
from gpu_ot.solver.acceleration import Anderson
from gpu_ot.solver.step import Alternating
from problems import measures, pairwise, rand, randn, weights

WAYS = ["auto", "mixing"]


def cube(n, m, seed=0):
    return measures(n, m, 3, shift=0.0, seed=seed)[:2]


@st.composite
def small_problems(draw):
    """A cost, weights and eps: random matrices, clouds, lattices and nearly empty ones; mild weights and wild ones."""
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def uniform(*shape):
        return torch.rand(*shape, generator=gen, dtype=torch.float64)

    d, apart = draw(st.sampled_from([(1, 0), (2, 0), (2, 3)]))
    kinds = {
        "clouds": torch.cdist(uniform(n, d), uniform(m, d) + apart) ** 2,
        "lattice": (torch.arange(n)[:, None] - torch.arange(m)).double().abs(),
        "matrix": (C := uniform(n, m)),
        "sparse": (C > 0.8).double(),
        "heavy": (-5 * C).exp(),
    }
    C = kinds[draw(st.sampled_from(sorted(kinds)))]
    a, b = (uniform(k) + 1e-3 for k in (n, m))
    if draw(st.booleans()):
        a, b = a**4, b**4
    spread = float(C.std(correction=0))
    return C, a / a.sum(), b / b.sum(), (spread if spread > 1e-9 else 1.0) * 10 ** draw(st.floats(-2.3, 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(given_problem=small_problems(), tol=st.sampled_from([1e-3, 1e-6]))
def test_the_default_is_never_slower_than_plain(given_problem, tol):
    """Passes at most 1.05 times the plain loop's, to the grain of one iteration (2 passes) in runs of less than 40; and the same plan."""
    C, a, b, eps = given_problem
    problem = Problem(C, eps, a, b)
    how = dict(backend="softmin", tol=tol, check_every=1, max_iter=1500)
    plain, ours = (gpu_ot.solve(problem, accelerate=accelerate, **how) for accelerate in ("none", "auto"))
    if plain.converged:
        assert ours.converged and ours.n_sweeps <= max(1.05 * plain.n_sweeps, plain.n_sweeps + 2)


RELAXED = [KL(), KL(0.5), KL(5.0), (KL(), KL(1.0)), TV(0.2)]


@pytest.mark.parametrize("penalties, accelerate, backend", pairwise(RELAXED, WAYS, ["softmin", "dense", "chunked"]), ids=str)
def test_every_way_ends_at_the_same_plan(accelerate, backend, penalties):
    problem = Problem(gpu_ot.SqEuclidean(*cube(70, 50)), 0.02, weights(70, empty=1), weights(50, empty=2), penalties)
    ours = gpu_ot.solve(problem, accelerate=accelerate, backend=backend, tol=1e-11)
    plain = gpu_ot.solve(problem, accelerate="none", backend="softmin", tol=1e-11, max_iter=100_000)
    assert ours.converged and plain.converged
    torch.testing.assert_close(ours.plan.to_dense(), plain.plan.to_dense(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.value, plain.value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("accelerate, fewer", [("auto", 5.0), ("mixing", 3.0)])
def test_sharp_problems_take_far_fewer_passes(accelerate, fewer):
    problem = Problem(gpu_ot.SqEuclidean(*cube(300, 250)), ("std", 0.01))
    ours, plain = (gpu_ot.solve(problem, accelerate=way, tol=1e-3, check_every=1) for way in (accelerate, "none"))
    assert ours.converged and plain.converged and fewer * ours.n_sweeps <= plain.n_sweeps


def test_problems_of_a_batch_stop_each_on_their_own():
    """A batch gives what each problem gives alone: the easy ones are not touched by the hard ones, and keep what they had."""
    clouds = [cube(60, 50, seed) for seed in range(3)]
    C = torch.stack([scale * gpu_ot.SqEuclidean(x, y).dense() for (x, y), scale in zip(clouds, (0.05, 1.0, 4.0), strict=True)])
    together = gpu_ot.solve(Problem(C, 0.02), accelerate="mixing", backend="softmin", tol=1e-6)
    alone = [gpu_ot.solve(Problem(M, 0.02), accelerate="mixing", backend="softmin", tol=1e-6) for M in C]
    assert len({done.n_iter for done in alone}) == 3 and together.n_iter == max(done.n_iter for done in alone)
    for k, done in enumerate(alone):
        torch.testing.assert_close(together.f[k], done.f, rtol=1e-6, atol=1e-8)
        assert float(together.errors[-1][k]) <= 1e-6


def test_the_errors_reported_are_those_of_the_best_so_far():
    done = gpu_ot.solve(Problem(gpu_ot.SqEuclidean(*cube(200, 200)), 1e-3), tol=1e-9, max_iter=60)
    assert done.status.name == "max_iter" and (done.errors.diff(dim=0) <= 0).all()
    b = torch.full((200,), 1 / 200, dtype=torch.float64)
    torch.testing.assert_close((done.plan.marginals[1] - b).abs().sum(), done.errors[-1], rtol=1e-6, atol=1e-12)


class Mixing:
    """The accelerator alone, on a map of m numbers."""

    def __init__(self, m, eps, memory=3):
        self.step = Alternating(Problem(torch.zeros(m, m, dtype=torch.float64), 1.0), eps)
        self.accelerator, self.memory = Anderson(gauge=True, memory=memory), None

    def next(self, g, g_next):
        g, self.memory = self.accelerator.next(self.step, self.memory, g, g_next)
        return g


class TestMixing:
    """On fixed-point maps whose answers are known."""

    @pytest.mark.parametrize("memory", [3, 6])
    def test_a_linear_self_adjoint_map_takes_as_many_steps_as_it_has_rates(self, memory):
        """A memory of 3 sees as far as all history: five distinct contractions are gone in seven steps."""
        m = 60
        rates = torch.tensor([0.0, 0.5, 0.8, 0.9, 0.95], dtype=torch.float64).repeat_interleave(12)
        basis, _ = torch.linalg.qr(randn(m, m))
        J = basis @ torch.diag(rates) @ basis.T
        end = 1e-3 * randn(m, seed=1)
        end -= end.mean()
        J -= J.mean(0, keepdim=True)  # the gauge is not the accelerator's to find
        J = (J + J.T) / 2
        mixing, g = Mixing(m, 1.0, memory), torch.zeros(m, dtype=torch.float64)
        distances = []
        for _ in range(10):
            g = mixing.next(g, end + J @ (g - end))
            distances.append(float((g - g.mean() - end).norm()))
        assert min(distances) <= 1e-6 * float(end.norm())

    def test_an_overshooting_step_is_shortened(self):
        """An update that hardly changes sends the model far past the top; the slope there says so."""
        mixing = Mixing(2, 0.01)
        target, g, visited = 0.37, torch.zeros(2, dtype=torch.float64), []
        for _ in range(40):
            step = 0.01 * torch.tanh((target - g[0]) / 0.01)
            visited.append(float(g[0]))
            g = mixing.next(g, g + torch.stack([step, -step]))
        assert abs(visited[-1] - target) < 1e-6 and max(abs(z) for z in visited) < 10

    def test_nan_and_infinity_are_steps_too_far(self):
        """A trial that left the range of numbers is taken back, not kept."""
        mixing, g = Mixing(3, 1.0), torch.zeros(3, dtype=torch.float64)
        end = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
        for k in range(30):
            fresh = end + 0.9 * (g - end) if k != 4 else torch.full_like(g, math.nan)
            g = mixing.next(g, fresh)
        assert (g - end).abs().max() < 1e-6


@pytest.mark.parametrize("taus", [(0.5, 2.0), (math.inf, 3.0), (40.0, math.inf)])
def test_the_shift_is_where_the_dual_is_largest(taus):
    a, b, f, g = (rand(k, seed=seed) for seed, k in enumerate((5, 7, 5, 7)))
    a[2] = 0
    f[2] = math.inf  # an empty row without a partner
    rows, columns = (KL(tau) for tau in taus)

    def dual(lam):
        return (torch.where(a > 0, a * rows.reward(f + lam), 0.0)).sum() + (b * columns.reward(g - lam)).sum()

    best = best_shift((rows, columns), a, b, f, g)
    assert isinstance(best, torch.Tensor) and all(dual(best) >= dual(best + step) for step in (-1e-3, 1e-3))
    assert best_shift((KL(), KL()), a, b, f, g) == 0.0


# What breaks loops. Each with its exact answer, or the float64 one.


def transport_error(solution, P):
    """Total variation between plans, as a fraction of the mass."""
    return float((solution.plan.to_dense().double() - P).abs().sum() / P.sum())


ADVERSARIAL = {
    # name: (C, a, b, the plan or None for the float64 one)
    "n = 1": (rand(1, 7, dtype=torch.float32), torch.ones(1), torch.full((7,), 1 / 7), torch.full((1, 7), 1 / 7)),
    "m = 1": (rand(7, 1, dtype=torch.float32), torch.full((7,), 1 / 7), torch.ones(1), torch.full((7, 1), 1 / 7)),
    "all costs equal": (torch.full((5, 4), 3.0), None, None, torch.full((5, 4), 1 / 20)),
    "duplicated points": (torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), None, None, None),
    "clusters far apart": (torch.tensor([[0.0, 1e6], [1e6, 0.0]]), None, None, torch.eye(2) / 2),
    "one forbidden": (torch.tensor([[math.inf, 0.3], [0.2, 0.1]]), None, None, torch.tensor([[0.0, 0.5], [0.5, 0.0]])),
    "only the diagonal": (torch.full((6, 6), math.inf).fill_diagonal_(1.0), None, None, torch.eye(6) / 6),
    "weights over twelve decades": (rand(30, 30, dtype=torch.float32), torch.logspace(-12, 0, 30), torch.logspace(0, -12, 30), None),
    "weights of zero": (rand(9, 8, dtype=torch.float32), weights(9, empty=4).roll(2), weights(8, empty=3).roll(1), None),
}


#: How far plain iterations are from the plan where 2000 of them are not enough.
SLOW = {"one forbidden": 1e-3, "weights over twelve decades": 0.05}
#: Twice the error of the log-domain loop in float32, where that is more than 2e-4.
SINGLE = {"weights over twelve decades": 5e-4}


@pytest.mark.parametrize("accelerate", ["none", *WAYS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(name, eps, dtype, accelerate):
    C, a, b, P = ADVERSARIAL[name]
    a, b = (None if w is None else (w.double() / w.double().sum()) for w in (a, b))
    if name == "clusters far apart" and eps == 1.0:
        eps = 1e3
    if P is None:
        P = gpu_ot.solve(Problem(C.double(), eps, a, b), backend="softmin", tol=1e-12, max_iter=50_000).plan.to_dense()
    solution = gpu_ot.solve(Problem(C.to(dtype), eps, a, b), accelerate=accelerate, tol=1e-6, max_iter=2000)
    assert solution.plan.to_dense().isfinite().all() and solution.value.isfinite()
    # Slow is no defect of plain iterations: of one forbidden pair the only plan is at g = -inf, approached like 1 / k.
    slow = accelerate == "none" and solution.status.name == "max_iter"
    assert slow or solution.status.name in ("converged", "stalled")
    allowed = SLOW[name] if slow else SINGLE.get(name, 2e-4) if dtype == torch.float32 else 1e-4
    assert transport_error(solution, P.double()) <= allowed


@pytest.mark.filterwarnings("ignore:gpu_ot.solve, unresolved")
@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-8, 1e-30, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_at_any_eps(eps, dtype):
    x, y = (z.to(dtype) for z in cube(40, 30))
    solution = gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), eps), max_iter=50)
    assert solution.f.isfinite().all() and solution.g.isfinite().all() and solution.value.isfinite()
    P = solution.plan.to_dense()
    assert P.isfinite().all()
    rows = torch.full((40,), 1 / 40, dtype=torch.float64)
    if eps < 1e-14:  # f / eps has no digit behind the point: no plan can be read off, and the status says so
        assert solution.status.name == "unresolved" and not solution.converged
    else:
        torch.testing.assert_close(P.sum(-1).double(), rows, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accelerate", ["none", "auto"])
def test_mass_without_a_partner_is_named(accelerate):
    """Two islands of unequal mass: no plan exists, and the dual proves it long before the iterations run out."""
    C = torch.full((6, 6), math.inf)
    C[:3, :3], C[3:, 3:] = rand(2, 3, 3).float()
    a = torch.tensor([0.2, 0.2, 0.2, 0.1, 0.1, 0.2])
    found = gpu_ot.solve(Problem(C, 0.1, a), accelerate=accelerate)
    assert found.status.name == "infeasible" and found.n_iter < 1000 and "without a partner" in found.status.explanation
    a = torch.full((6,), 1 / 6)
    assert gpu_ot.solve(Problem(C, 0.1, a), accelerate=accelerate, tol=1e-6).converged


def test_strict_raises_with_the_explanation():
    sharp, blurred = (Problem(gpu_ot.SqEuclidean(*cube(30, 30)), eps) for eps in (1e-3, 10.0))
    for ask in (lambda z: gpu_ot.solve(z, max_iter=5, strict=True), lambda z: gpu_ot.solve(z, max_iter=5).raise_unless_converged()):
        with pytest.raises(gpu_ot.NotConverged, match="raise max_iter"):
            ask(sharp)
        assert ask(blurred).converged


def test_warm_starts_from_other_points_and_another_eps():
    """The potentials of one minibatch, extended to the points of the next."""
    x, y = cube(200, 200)
    x2 = x[:190] + 0.01 * cube(190, 1, seed=5)[0]
    first = gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.02), tol=1e-6)
    for cost, eps in ((gpu_ot.SqEuclidean(x2, y), 0.02), (gpu_ot.SqEuclidean(x, y), 0.015)):
        cold, warm = (gpu_ot.solve(Problem(cost, eps), start=start, tol=1e-4, accelerate="none") for start in (None, first))
        assert warm.n_iter < 0.8 * cold.n_iter


@pytest.mark.parametrize("accelerate", WAYS)
def test_empty_atoms_have_the_potentials_that_plain_iterations_give_them(accelerate):
    """They move no mass, and derivatives in their weights are read off their potentials."""
    problem = Problem(gpu_ot.SqEuclidean(*cube(60, 50)), 0.02, None, weights(50, empty=5))
    ours, plain = (gpu_ot.solve(problem, accelerate=way, tol=1e-11) for way in (accelerate, "none"))
    shifted = ours.g - ours.g[5] + plain.g[5]
    torch.testing.assert_close(shifted, plain.g, rtol=1e-6, atol=1e-7)
