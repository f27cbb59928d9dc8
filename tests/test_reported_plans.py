"""What users of other packages reported about plans, limits and words: doors x situations, each against the right value."""

import warnings

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, TV, Problem, ProblemError, SamplesLoss, SinkhornLoss, SqEuclidean
from gpu_ot.pot import patching
from problems import close, generator, leaves, rand, random_problem

INF = float("inf")


@pytest.fixture(autouse=True)
def no_other_warnings():
    """A warning that a test does not ask for is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        yield


# Relaxed marginals and costs so far above the price of letting mass go that the right plan is 0.

FAR = 2000.0


def far(n=3, m=4, dtype=torch.float64):
    """Costs around FAR."""
    return (FAR + rand(n, m)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_far_plans_are_zero_at_pots_doors(dtype, method, log, kind):
    M = far(dtype=dtype)
    M = M.numpy() if kind == "numpy" else M
    found = gpu_ot.sinkhorn_unbalanced([], [], M, 0.05, 1.0, method=method, numItermax=5000, log=log)
    P, log = found if log else (found, None)
    close(P, np.zeros((3, 4)), rtol=0, atol=0)
    if log:
        assert log["status"].name == "converged"
        close(log["total_cost"], 0.05 + 2.0, rtol=1e-6)  # reg KL(0 | c) and twice KL(0 | a)


def one(number):
    return number.reshape(-1)[0]


#: Door -> the value of far costs M, of mass 1 on both sides, with tau 1 and eps 0.05.
FAR_DOORS = {
    "solve": lambda M: gpu_ot.pot.solve(M, reg=0.05, unbalanced=1.0, max_iter=5000).value,
    "solve envelope": lambda M: gpu_ot.pot.solve(M, reg=0.05, unbalanced=1.0, grad="envelope", max_iter=5000).value,
    "unbalanced2": lambda M: gpu_ot.sinkhorn_unbalanced2([], [], M, 0.05, 1.0, returnCost="total", numItermax=5000),
    "Problem": lambda M: gpu_ot.solve(Problem(M, 0.05, penalties=KL(1.0))).value,
    "Problem, softmin": lambda M: gpu_ot.solve(Problem(M, 0.05, penalties=KL(1.0)), backend="softmin").value,
    "Problem, dense": lambda M: gpu_ot.solve(Problem(M, 0.05, penalties=KL(1.0)), backend="dense").value,
    "Problem, implicit": lambda M: gpu_ot.solve(Problem(M, 0.05, penalties=KL(1.0)), grad="implicit").value,
    "Problem, TV": lambda M: gpu_ot.solve(Problem(M, 0.05, penalties=TV(1.0))).value,
    "Problem, plain": lambda M: gpu_ot.solve(Problem(M, 0.05, penalties=KL(1.0)), accelerate="none").value,
    "SinkhornLoss": lambda M: SinkhornLoss(0.05, tau=1.0)(M),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("door", FAR_DOORS)
def test_far_values_are_the_price_of_letting_go(door, dtype):
    M = far(dtype=dtype).requires_grad_()
    value = FAR_DOORS[door](M)
    close(value, 2.05, rtol=1e-6)
    (grad,) = torch.autograd.grad(value, M)
    close(grad, torch.zeros(3, 4), rtol=0, atol=0)


CLOUDS = {
    "SamplesLoss": lambda x, y, b: SamplesLoss(blur=0.05, reach=0.1)(x, y),
    "one number": lambda x, y, b: SamplesLoss(blur=0.05, reach=0.1)(x[:1], y[:1]),
    "without debiasing": lambda x, y, b: SamplesLoss(blur=0.05, reach=0.1, debias=False)(x, y),
    "implicit": lambda x, y, b: SamplesLoss(blur=0.05, reach=0.1, grad="implicit")(x, y),
    "batch": lambda x, y, b: SamplesLoss(blur=0.05, reach=0.1)(torch.stack((x, x)), torch.stack((y, y - 3))).sum(),
    "lazy": lambda x, y, b: gpu_ot.solve_sample(x, y, reg=0.05, unbalanced=0.01, lazy=True).value,
    "chunked": lambda x, y, b: gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.005, penalties=KL(0.02)), backend="chunked").value,
    "Euclidean": lambda x, y, b: SamplesLoss(p=1, blur=0.05, reach=0.1)(x, y),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("door", CLOUDS)
def test_far_clouds_cost_the_price_of_letting_go(door, dtype):
    """As the readable form does in float64."""
    x, y = (0.05 * rand(4, 2, seed=1)).to(dtype).requires_grad_(), (3 + 0.05 * rand(5, 2, seed=2)).to(dtype)
    value = CLOUDS[door](x, y, None)
    (grad,) = torch.autograd.grad(value, x)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:  # by torch's operations in float64
        patched.setattr(gpu_ot.compiled, "refused", lambda: "not here")
        leaf = x.detach().double().requires_grad_()
        truth = CLOUDS[door](leaf, y.double(), None)
        (right,) = torch.autograd.grad(truth, leaf)
    close(value, truth, rtol=2e-5, atol=1e-6)
    close(grad, right, rtol=1e-3, atol=1e-5)
    if door == "one number":
        close(value, 0.0225, rtol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "dense", "softmin"])
def test_one_far_problem_in_a_batch_and_a_hard_side(backend):
    M = torch.stack((rand(4, 5), FAR + rand(4, 5)))
    found = gpu_ot.solve(Problem(M, 0.05, penalties=KL(1.0)), backend=backend, tol=1e-9)
    assert found.converged.all()
    alone = gpu_ot.solve(Problem(M[0], 0.05, penalties=KL(1.0)), backend="softmin", tol=1e-9)
    close(found.value[0], alone.value, rtol=1e-8)
    close(found.value[1], 2.05, rtol=1e-12)
    close(found.plan.to_dense()[1], torch.zeros(4, 5), rtol=0, atol=0)
    semi = gpu_ot.solve(Problem(M[1], 0.05, penalties=(KL(), KL(1.0))), backend=backend, tol=1e-9)  # rows must travel
    truth = gpu_ot.solve(Problem(M[1], 0.05, penalties=(KL(), KL(1.0))), backend="softmin", tol=1e-9, accelerate="none", max_iter=100_000)
    assert semi.status.name == "converged"
    close(semi.value, truth.value, rtol=1e-9)
    close(semi.plan.marginals[0], torch.full((4,), 0.25), rtol=1e-9)


def test_flow_matching_between_wide_points_under_patch():
    """3072 coordinates: squared distances of 6000 against reg 0.05 and reg_m 1."""
    gen = generator()
    x, y = torch.randn(16, 3072, generator=gen), torch.randn(16, 3072, generator=gen)
    M = (torch.cdist(x, y) ** 2).numpy()
    with patching.patch():
        P = ot.unbalanced.sinkhorn_knopp_unbalanced(ot.unif(16), ot.unif(16), M, reg=0.05, reg_m=1)
    assert not np.asarray(P).any()


# reg so small that the type does not resolve it beside the costs.


def unresolved():
    t = np.linspace(0, 3e7, 20)
    w = np.full(20, 0.05)
    return {
        "large costs": (w, (t[:, None] - (t[None] * 0.8 + 1e5)) ** 2, 0.1),
        "small costs": (w, rand(20, 20).numpy(), 1e-20),
        "near the edge": (w, rand(20, 20).numpy(), 3e-17),
    }


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "greenkhorn"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("case", unresolved())
def test_a_plan_that_the_type_cannot_resolve_says_so(case, kind, method):
    w, M, reg = unresolved()[case]
    given = [torch.from_numpy(z) if kind == "torch" else z for z in (w, w, M)]
    with pytest.warns(UserWarning, match="unresolved.*off by .* of the mass.*reg = .* is below what") as said:
        P, log = gpu_ot.sinkhorn(*given, reg, method=method, log=True)
    assert log["status"].name == "unresolved" and not bool(log["converged"]) and len(said) == 1
    close(np.asarray(P).sum(1), w, rtol=1e-9)  # the mass it should have
    if method != "greenkhorn":
        with pytest.warns(UserWarning, match="unresolved"):
            assert float(gpu_ot.sinkhorn2(*given, reg, method=method, warn=True)) == pytest.approx(float((P * given[2]).sum()), rel=1e-6)


@pytest.mark.parametrize("case", ["large costs", "small costs"])
@pytest.mark.parametrize("backend", ["auto", "dense", "softmin"])
def test_solve_says_so_too(case, backend):
    w, M, reg = unresolved()[case]
    problem = Problem(torch.from_numpy(M), reg, torch.from_numpy(w), torch.from_numpy(w))
    with pytest.warns(RuntimeWarning, match="unresolved: .*eps = .* is below what") as said:
        found = gpu_ot.solve(problem, backend=backend, accelerate="none")
    assert found.status.name == "unresolved" and not found.converged
    assert said[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="unresolved") as said:
        SinkhornLoss(reg)(torch.from_numpy(M), a=problem.a, b=problem.b)
    assert len(said) == 1


def test_relaxed_and_batched_doors_say_so():
    w, M, reg = unresolved()["large costs"]
    with pytest.warns(UserWarning, match="unresolved"):
        gpu_ot.sinkhorn_unbalanced(w, w, M, reg, 1e15)
    with pytest.warns(UserWarning, match="unresolved|max_iter"):
        gpu_ot.solve_batch(M[None], reg, max_iter=2000)
    with pytest.warns(UserWarning, match="unresolved|max_iter"):
        gpu_ot.pot.solve(M, reg=reg)


def test_what_the_type_resolves_is_silent():
    """float32 costs with a tolerance that they cannot hold."""
    a, b, M = random_problem(30, 20, dtype=torch.float32)
    P, log = gpu_ot.sinkhorn(a, b, M, 0.1, stopThr=1e-12, log=True)
    assert log["status"].name == "stalled"
    close(P.sum(0), b, rtol=1e-5)


# Limits that the caller set.


@pytest.mark.parametrize("numItermax", [1, 3, 10, 100])
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
@pytest.mark.parametrize("kind", ["numpy", "torch", "gradient"])
def test_a_tolerance_of_zero_runs_to_the_limit(kind, method, numItermax):
    a, b, M = random_problem(12, 9)
    given = leaves(a, b, M) if kind == "gradient" else [a, b, M] if kind == "torch" else [z.numpy() for z in (a, b, M)]
    options = dict(method=method, numItermax=numItermax, stopThr=0)
    ours, log = gpu_ot.sinkhorn(*given, 0.05, log=True, warn=False, **options)
    theirs, their_log = ot.sinkhorn(*(z.numpy() for z in (a, b, M)), 0.05, log=True, warn=False, **options)
    close(ours, theirs, rtol=0, atol=1e-10)
    assert log["n_iter"] == numItermax - 1 and len(log["err"]) == len(their_log["err"])
    close([float(z) for z in log["err"]], [float(z) for z in their_log["err"]], rtol=0, atol=1e-10)
    assert log["status"].name == "max_iter"
    with pytest.warns(UserWarning, match="numItermax"):
        gpu_ot.sinkhorn(*given, 0.05, **options)


@pytest.mark.parametrize("numItermax", [1, 3, 10, 100, 300])
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_stabilized"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_tolerance_of_zero_runs_to_the_limit_relaxed(kind, method, numItermax):
    a, b, M = random_problem(12, 9)
    given = [a, b, M] if kind == "torch" else [z.numpy() for z in (a, b, M)]
    options = dict(method=method, numItermax=numItermax, stopThr=0, log=True, **({"tau": INF} if "stab" in method else {}))
    with pytest.warns(UserWarning, match="did not converge"):
        ours, log = gpu_ot.sinkhorn_unbalanced(*given, 0.05, 1.0, **options)
        alone = gpu_ot.sinkhorn_unbalanced(*given, 0.05, 1.0, **(options | {"log": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(*(z.numpy() for z in (a, b, M)), 0.05, 1.0, **options)
    close(ours, theirs, rtol=0, atol=1e-10)
    close(alone, theirs, rtol=0, atol=1e-10)
    assert log["n_iter"] == numItermax - 1 and len(log["err"]) == len(their_log["err"])


LIMITED = {
    "Problem": lambda x, y, k: gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.5), tol=0, max_iter=k).n_iter,
    "Problem, plain": lambda x, y, k: gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.5), tol=0, max_iter=k, accelerate="none").n_iter,
    "Problem, relaxed": lambda x, y, k: gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.5, penalties=KL(1.0)), tol=0, max_iter=k).n_iter,
    "Problem, dense": lambda x, y, k: gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.5), tol=0, max_iter=k, backend="dense").n_iter,
    "Problem, chunked": lambda x, y, k: gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.5), tol=0, max_iter=k, backend="chunked").n_iter,
    "batch": lambda x, y, k: gpu_ot.solve_sample_batch(x[None], y[None], 0.5, tol=0, max_iter=k).n_iter + 1,
    "empirical": lambda x, y, k: gpu_ot.empirical_sinkhorn(x, y, 0.5, stopThr=0, numIterMax=k, log=True)[1]["n_iter"] + 1,
    "lazy": lambda x, y, k: gpu_ot.solve_sample(x, y, reg=0.5, tol=0, max_iter=k, lazy=True).n_iter + 1,
    "sample": lambda x, y, k: gpu_ot.solve_sample(x, y, reg=0.5, tol=0, max_iter=k).n_iter + 1,
    "sample, relaxed": lambda x, y, k: gpu_ot.solve_sample(x, y, reg=0.5, tol=0, max_iter=k, unbalanced=1.0).n_iter + 1,
    "screenkhorn": lambda x, y, k: gpu_ot.screenkhorn([], [], gpu_ot.dist(x, y), 0.5, pgtol=0, maxiter=k, log=True)[1]["n_iter"] + 1,
    "greenkhorn": lambda x, y, k: gpu_ot.greenkhorn([], [], gpu_ot.dist(x, y), 0.5, stopThr=0, numItermax=k, log=True)[1]["n_iter"] + 1,
}


@pytest.mark.parametrize("limit", [1, 40, 150])
@pytest.mark.parametrize("door", LIMITED)
def test_every_door_runs_to_its_limit(door, limit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert LIMITED[door](rand(8, 2, seed=1), rand(7, 2, seed=2), limit) == limit


def test_a_positive_tolerance_below_the_type_stalls():
    assert gpu_ot.solve(Problem(rand(8, 7), 0.5), tol=1e-300).status.name == "stalled"


def test_epsilon_scaling_keeps_to_its_limit():
    a, b, M = (z.numpy() for z in random_problem(20, 15))
    truth = gpu_ot.sinkhorn(a, b, M, 0.005, stopThr=1e-11, numItermax=100_000)
    found = {}
    for limit in (1, 5, 100):
        P, log = gpu_ot.sinkhorn_epsilon_scaling(a, b, M, 0.005, numItermax=limit, numInnerItermax=40, log=True, warn=False)
        found[limit] = log["n_iter"] + 1
        assert found[limit] <= 40 * limit
    assert found[1] == 40 and found[5] == 200
    close(P, truth, rtol=0, atol=1e-8)
    with pytest.warns(UserWarning, match="numItermax"):
        gpu_ot.sinkhorn_epsilon_scaling(a, b, M, 0.005, numItermax=1)


# Unconverged and silent.


HARD = rand(12, 12).numpy()
SHORT = {
    "solve_batch": ("max_iter", lambda: gpu_ot.solve_batch(HARD[None], 1e-3, max_iter=3)),
    "solve_sample_batch": ("max_iter", lambda: gpu_ot.solve_sample_batch(HARD[None], HARD[None, ::2], 1e-3, max_iter=3)),
    "sinkhorn": ("numItermax", lambda: gpu_ot.sinkhorn([], [], HARD, 1e-3, numItermax=3)),
    "sinkhorn, log": ("numItermax", lambda: gpu_ot.sinkhorn([], [], HARD, 1e-3, numItermax=3, log=True)),
    "unbalanced": ("numItermax", lambda: gpu_ot.sinkhorn_unbalanced([], [], HARD, 1e-3, 1.0, numItermax=3)),
    "unbalanced, log": ("numItermax", lambda: gpu_ot.sinkhorn_unbalanced([], [], HARD, 1e-3, 1.0, numItermax=3, log=True)),
    "unbalanced2": ("numItermax", lambda: gpu_ot.sinkhorn_unbalanced2([], [], HARD, 1e-3, 1.0, numItermax=3)),
    "knopp": ("numItermax", lambda: gpu_ot.sinkhorn_knopp_unbalanced([], [], HARD, 1e-3, 1.0, numItermax=3)),
    "translated": ("numItermax", lambda: gpu_ot.sinkhorn_unbalanced_translation_invariant([], [], HARD, 1e-3, 1.0, numItermax=3)),
    "stabilized": ("numItermax", lambda: gpu_ot.sinkhorn_stabilized_unbalanced([], [], HARD, 1e-3, 1.0, numItermax=3)),
    "empirical": ("numIterMax", lambda: gpu_ot.empirical_sinkhorn(HARD, HARD[::2], 1e-3, isLazy=True, numIterMax=3)),
    "solve": ("max_iter", lambda: gpu_ot.pot.solve(HARD, reg=1e-3, max_iter=3)),
    "solve, relaxed": ("max_iter", lambda: gpu_ot.pot.solve(HARD, reg=1e-3, unbalanced=1.0, max_iter=3)),
    "solve_sample, lazy": ("max_iter", lambda: gpu_ot.solve_sample(HARD, HARD[::2], reg=1e-3, max_iter=3, lazy=True)),
    "projection": ("max_iter", lambda: gpu_ot.bregman_log_projection_batch(-1e3 * HARD[None], max_iter=3)),
}


@pytest.mark.parametrize("door", SHORT)
def test_whoever_stops_short_says_so_once_in_the_callers_words(door):
    limit, call = SHORT[door]
    with pytest.warns(UserWarning, match=f"did not converge.*raise `{limit}` or `reg`") as said:
        call()
    assert len(said) == 1 and said[0].filename == __file__
    assert "eps" not in str(said[0].message)


def test_verbose_prints_where_pot_prints(capsys):
    a, b, M = (z.numpy() for z in random_problem(10, 8))

    def lines(call, *given, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(*given, verbose=True, **options)
        return [line.split("|")[0] for line in capsys.readouterr().out.splitlines()]

    for method in ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "greenkhorn"):
        for limit in (35, 450):
            settings = dict(method=method, numItermax=limit, stopThr=1e-9)
            assert lines(gpu_ot.sinkhorn, a, b, M, 0.05, **settings) == lines(ot.sinkhorn, a, b, M, 0.05, **settings), settings
    for log in (False, True):
        for method in ("sinkhorn", "sinkhorn_translation_invariant"):
            settings = dict(method=method, numItermax=60, stopThr=0, log=log)
            ours = lines(gpu_ot.sinkhorn_unbalanced, a, b, M, 0.05, 1.0, **settings)
            assert ours == lines(ot.unbalanced.sinkhorn_unbalanced, a, b, M, 0.05, 1.0, **settings), settings


# Several histograms with relaxed marginals: POT knows the entropy alone.


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("reg_type", [{}, {"reg_type": "kl"}])
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_stabilized"])
def test_several_relaxed_histograms_are_entropic(kind, reg_type, method):
    a, B, C = np.ones(3) / 3, np.full((2, 2), 0.5), np.arange(6.0).reshape(3, 2) / 6
    given = [torch.from_numpy(z) if kind == "torch" else z for z in (a, B, C)]
    for name in ("sinkhorn_unbalanced", "sinkhorn_unbalanced2"):
        with pytest.warns(UserWarning, match="Reg_type not implemented yet. Use entropy."):
            ours = getattr(gpu_ot, name)(*given, 0.5, 1.0, method=method, stopThr=1e-10, **reg_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(ot.unbalanced, name)(a, B, C, 0.5, 1.0, method=method, stopThr=1e-10, **reg_type)
        close(ours, theirs, rtol=1e-7)
    assert float(ours[0]) == pytest.approx(0.44453026, rel=1e-6)


# Words that POT documents, and those of other packages.


def test_envelope_by_its_other_name():
    M = rand(5, 4).requires_grad_()
    for call in (
        lambda grad: gpu_ot.pot.solve(M, reg=0.1, grad=grad).value,
        lambda grad: gpu_ot.solve_batch(M[None], 0.1, grad=grad).value[0],
    ):
        close(*(torch.autograd.grad(call(name), M)[0] for name in ("implicit", "envelope")), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("metric", ["cityblock", "sqeuclidean", "euclidean", "minkowski"])
def test_weights_of_coordinates(metric, kind):
    from scipy.spatial.distance import cdist

    x, y, w = rand(4, 3, seed=1), rand(5, 3, seed=2), rand(3, seed=3)
    truth = cdist(x, y, metric, w=w.numpy(), **({"p": 3} if metric == "minkowski" else {}))
    given = [z.numpy() if kind == "numpy" else z for z in (x, y, w)]
    close(gpu_ot.dist(*given[:2], metric=metric, p=3, w=given[2]), truth, rtol=1e-12)
    with pytest.raises(ProblemError, match="w is not known"):
        gpu_ot.dist(*given[:2], metric="cosine", w=given[2])


NUMBERS = {
    "array of one": np.array([0.5]),
    "0-d": np.array(0.5),
    "float32": np.float32(0.5),
    "tensor of one": torch.tensor([0.5]),
    "0-d tensor": torch.tensor(0.5),
    "int": 1,
}


@pytest.mark.parametrize("number", NUMBERS)
def test_reg_is_what_numpy_takes_for_a_number(number):
    a, b, M = (z.numpy() for z in random_problem(5, 4))
    reg = NUMBERS[number]
    plain = np.asarray(reg).item()
    close(gpu_ot.sinkhorn(a, b, M, reg), gpu_ot.sinkhorn(a, b, M, plain), rtol=1e-12)
    close(gpu_ot.pot.solve(M, reg=reg).plan, gpu_ot.pot.solve(M, reg=plain).plan, rtol=1e-12)
    close(gpu_ot.sinkhorn_unbalanced(a, b, M, reg, 1.0), gpu_ot.sinkhorn_unbalanced(a, b, M, plain, 1.0), rtol=1e-12)
    close(gpu_ot.solve_batch(M[None], reg).plan, gpu_ot.solve_batch(M[None], plain).plan, rtol=1e-12)


@pytest.mark.parametrize("reg", [None, "0.1", [0.1, 0.2], np.array([0.1, 0.2]), torch.tensor([0.1, 0.2])], ids=str)
def test_what_is_no_number_is_refused_by_name(reg):
    a, b, M = (z.numpy() for z in random_problem(5, 4))
    for call in (gpu_ot.sinkhorn, gpu_ot.sinkhorn2, lambda *z: gpu_ot.sinkhorn_unbalanced(*z, 1.0), gpu_ot.sinkhorn_epsilon_scaling):
        with pytest.raises(ProblemError, match="reg must be a number"):
            call(a, b, M, reg)


class Frame:
    """As much of a table of pandas as matters: numbers, and no __dlpack__."""

    def __init__(self, z):
        self.z, self.shape, self.ndim, self.columns = z, z.shape, z.ndim, range(z.shape[-1])

    def to_numpy(self):
        return self.z


def test_frames_are_taken_as_numpy_takes_them():
    a, b, M = (z.numpy() for z in random_problem(5, 4))
    for found in (gpu_ot.sinkhorn(Frame(a), b, Frame(M), 0.1), gpu_ot.sinkhorn(a, Frame(b), M, 0.1)):
        assert isinstance(found, np.ndarray)
        close(found, gpu_ot.sinkhorn(a, b, M, 0.1), rtol=1e-12)
    close(gpu_ot.pot.solve(Frame(M), reg=0.1).plan, gpu_ot.pot.solve(M, reg=0.1).plan, rtol=1e-12)
    close(gpu_ot.solve_sample(Frame(M), Frame(M[:3]), reg=0.1).plan, gpu_ot.solve_sample(M, M[:3], reg=0.1).plan, rtol=1e-12)


FOREIGN = ("half_cost", "eps", "n_iters", "threshold", "reach_x", "allow_tf32")


@pytest.mark.parametrize("name", FOREIGN)
def test_other_packages_settings_are_named_in_the_error(name):
    with pytest.raises(ProblemError, match=f"SamplesLoss has no {name}. {name} is .*'s: "):
        SamplesLoss(**{name: 1})
    if name != "eps":
        with pytest.raises(ProblemError, match=f"SinkhornLoss has no {name}"):
            SinkhornLoss(0.1, **{name: 1})
    with pytest.raises(ProblemError, match="foo is not known"):
        SamplesLoss(foo=1)


# The costs' type decides.


@pytest.mark.parametrize("costs", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_weights_of_another_type_leave_the_costs_theirs(costs, weights, kind):
    a, b, M = random_problem(6, 5)
    given = [a.to(weights), b.to(weights), M.to(costs)]
    truth = gpu_ot.sinkhorn(*(z.double() for z in given), 0.1, warn=False)
    given = [z.numpy() if kind == "numpy" else z for z in given]
    coarse = torch.finfo(min((costs, weights), key=lambda z: z.itemsize)).eps
    for call in (
        lambda: gpu_ot.sinkhorn(*given, 0.1),
        lambda: gpu_ot.sinkhorn(*given, 0.1, log=True)[0],
        lambda: gpu_ot.sinkhorn_unbalanced(*given, 0.1, INF),
        lambda: gpu_ot.pot.solve(given[2], *given[:2], reg=0.1).plan,
        lambda: gpu_ot.solve_batch(given[2][None], 0.1, *given[:2], tol=1e-9).plan[0],
    ):
        P = call()
        assert P.dtype == given[2].dtype
        close(np.asarray(P, np.float64), truth, rtol=0, atol=4 * coarse + 1e-6)


def test_the_problem_of_float64_weights_and_float32_costs_is_float32():
    a, b, M = random_problem(6, 5)
    done = gpu_ot.pot.balanced.solve_balanced(a, b, M.float(), 0.1, gpu_ot.pot.balanced.METHODS["sinkhorn"], 100, 1e-6, False, True, None)
    assert done.solution.problem.dtype == torch.float32
    relaxed = gpu_ot.pot.relaxed.run(a, b, M.float(), 0.1, 1.0)
    assert relaxed.solution.problem.dtype == torch.float32
    integers = (10 * M).long()
    assert gpu_ot.sinkhorn(a.float(), b.float(), integers, 1.0).dtype == torch.float32
    assert gpu_ot.sinkhorn([], [], integers, 1.0).dtype == torch.float64


# value_linear of a batch under "envelope".


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("grad", ["envelope", "implicit", "autodiff"])
def test_value_linear_has_the_derivative_that_differences_have(grad, reg_type):
    M, a, b = rand(2, 4, 5), rand(2, 4, seed=1) + 0.2, rand(2, 5, seed=2) + 0.2
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    options = dict(reg_type=reg_type, tol=1e-13, max_iter=100_000)
    D, (d, e) = rand(2, 4, 5, seed=3), (z - z.mean(-1, keepdim=True) for z in (rand(2, 4, seed=4), rand(2, 5, seed=5)))
    asked = leaves(M, a, b)
    total = gpu_ot.solve_batch(asked[0], 0.1, *asked[1:], grad=grad, **options).value_linear.sum()
    slope = sum((g * z).sum() for g, z in zip(torch.autograd.grad(total, asked), (D, d, e), strict=True))
    step = 1e-5
    with torch.no_grad():
        up, down = (gpu_ot.solve_batch(M + s * D, 0.1, a + s * d, b + s * e, **options).value_linear.sum() for s in (step, -step))
    close(slope, (up - down) / (2 * step), rtol=1e-6)


# Sweeps to a tolerance: an absorbed kernel is built in the visit that uses it.


@pytest.mark.parametrize("seed", range(3))
def test_absorbing_takes_no_sweeps_of_its_own_on_the_way(seed):
    """The cube, eps 1 % of the standard deviation: as many sweeps as in the log domain, and a few where kernels were outlived."""
    x, y = rand(600, 3, seed=2 * seed), rand(600, 3, seed=2 * seed + 1)
    problem = Problem(SqEuclidean(x, y), ("std", 0.01))
    ours, plain = (gpu_ot.solve(problem, backend=backend, tol=1e-3) for backend in ("auto", "softmin"))
    assert ours.status.name == "converged" and ours.n_sweeps <= plain.n_sweeps + 3
    close(ours.f, plain.f, rtol=0, atol=1e-9)
