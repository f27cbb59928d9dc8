"""The unbalanced drop-in against POT: iterates, costs, reference measures; and where it is right on purpose."""

import functools
import math
import warnings

import numpy as np
import ot
import pytest
import torch

from gpu_ot import ProblemError
from gpu_ot.pot import solvers, unbalanced
from gpu_ot.pot.refusals import Elsewhere
from gpu_ot.pot.relaxed import run
from problems import close, gradcheck, leaves, numbers, pairwise, rand, random_problem

METHODS = ["sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant"]
TAUS = [0.3, 1, (0.5, 2.0), (math.inf, 0.7), (0.7, math.inf), [5.0]]
PLAIN = dict(accelerate=False)  # POT's iterations to the end
#: What POT's stabilised iteration absorbs into its kernel it damps wrongly afterwards, so it must not absorb.
NEVER_ABSORB = dict(tau=1e300)
#: It also adds 1e-16 to every sum, which small sums feel.
GUARD = {"sinkhorn_stabilized": 1e-8}

pytestmark = pytest.mark.filterwarnings("ignore:If reg_type = entropy", "ignore:Reg_type not implemented yet")


@pytest.fixture
def arrays(arrays):
    """Of masses 1 and 1.3."""
    return functools.partial(arrays, mass=1.3)


def settled(log):
    return all(np.isfinite(np.asarray(log[key])).all() for key in ("logu", "logv", "cost", "total_cost"))


def truth(a, b, M, reg, reg_m, **options):
    """POT's plain iteration in float64, run until nothing moves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ot.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, reg, reg_m, numItermax=200_000, stopThr=1e-15, **options)


@pytest.mark.parametrize("method, reg_m, reg_type", pairwise(METHODS, TAUS, ["kl", "entropy"]), ids=str)
def test_plans_and_logs_are_pots_where_pot_converges(arrays, method, reg_type, reg_m):
    if method == METHODS[2] and reg_m == (0.5, 2.0):
        pytest.skip("POT's translation has another fixed point for two different reg_m; see test_two_prices")
    a, b, M = arrays(20, 15)
    options = dict(method=method, reg_type=reg_type, stopThr=1e-9, numItermax=3000, log=True, **NEVER_ABSORB)
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, reg_m, **options, **PLAIN)
    theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, reg_m, **options)
    close(ours, theirs, rtol=0, atol=GUARD.get(method, 1e-12))
    assert set(their_log) | {"status", "converged", "n_iter", "errors"} == set(log)
    for key in ("logu", "logv", "cost"):
        close(log[key], their_log[key], rtol=0, atol=100 * GUARD.get(method, 1e-12))
        assert type(log[key]) is type(their_log[key])
    assert len(log["err"]) == len(their_log["err"]) and log["status"].name == "converged"
    close(log["err"], their_log["err"], rtol=1e-5, atol=1e-13)
    alone = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, reg_m, **options | dict(log=False), **PLAIN)  # strides, not single steps
    close(alone, theirs, rtol=0, atol=GUARD.get(method, 1e-12))
    assert type(alone) is type(M) and alone.dtype == M.dtype


@pytest.mark.parametrize("iterations, reg_m, method", pairwise([1, 2, 3, 10, 100], TAUS, METHODS), ids=str)
def test_truncated_runs_show_the_same_iterate(arrays, method, reg_m, iterations):
    """Clients stop on purpose after a few iterations: u first, then v. No acceleration until they could have."""
    if method == METHODS[2] and reg_m == (0.5, 2.0):
        pytest.skip("see test_two_prices")
    a, b, M = arrays(30, 20)
    options = dict(method=method, numItermax=iterations, stopThr=0, log=True, **NEVER_ABSORB)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of not having converged
        ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, reg_m, **options)
        theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, reg_m, **options)
    close(ours, theirs, rtol=0, atol=GUARD.get(method, 1e-10))
    close(log["logu"], their_log["logu"], rtol=0, atol=100 * GUARD.get(method, 1e-12))
    if method != METHODS[1] or iterations == 1:
        assert len(log["err"]) == iterations or log["status"].name == "stalled"


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_two_prices(arrays, reg_type):
    """With reg_m of two different values POT's translation-invariant iteration ends elsewhere: 1e-4 off its own plain one."""
    a, b, M = arrays(20, 15)
    exact = truth(a, b, M, 0.05, (0.5, 2.0), reg_type=reg_type)
    options = dict(reg_type=reg_type, stopThr=1e-12)
    close(unbalanced.sinkhorn_unbalanced_translation_invariant(a, b, M, 0.05, (0.5, 2.0), **options), exact, rtol=0, atol=1e-12)
    theirs = ot.unbalanced.sinkhorn_unbalanced_translation_invariant(a, b, M, 0.05, (0.5, 2.0), **options)
    assert np.abs(np.asarray(theirs) - np.asarray(exact)).max() > 1e-4


@pytest.mark.parametrize("method, accelerate, factor", pairwise(METHODS, [True, None], [10, 100]), ids=str)
def test_five_times_fewer_iterations_to_the_same_marginals(problem, method, accelerate, factor):
    """The plain iteration gains its mass in steps of reg / reg_m; translated, asked for or by itself, it needs no more steps than a
    balanced problem. After five times as many iterations, counted in its own log, POT's marginals are further off."""
    a, b, M = problem(30, 20)
    given = a, 1.3 * b, M, 0.1 * float(M.std()), factor * float(M.std())
    exact = truth(*given)

    def residual(P):
        return sum(float((P.sum(axis) - exact.sum(axis)).abs().sum()) for axis in (0, 1))

    P, log = unbalanced.sinkhorn_unbalanced(*given, method=method, log=True, accelerate=accelerate, stopThr=1e-10)
    assert log["converged"] and residual(P) <= 1e-7
    theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(*given, log=True, numItermax=5 * (log["n_iter"] + 1), stopThr=0)
    assert len(their_log["err"]) == 5 * (log["n_iter"] + 1)  # it did not stop by itself
    assert residual(theirs) > residual(P)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default = ot.unbalanced.sinkhorn_unbalanced(*given)  # stops after 1000 iterations without a word
    close(unbalanced.sinkhorn_unbalanced(*given, accelerate=False), default, rtol=0, atol=1e-12)
    assert factor == 10 or residual(default) > 1e-3


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_total_cost_is_the_objective(arrays, reg_type):
    """With the mass terms of the generalised KL; POT's `total_cost` here is 0 at every optimum. Its value: test_pot_solvers.py."""
    a, b, M = arrays(12, 9)
    options = dict(reg_type=reg_type, stopThr=1e-12)
    total, log = unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, (0.5, 0.8), returnCost="total", log=True, **options)
    linear = unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, (0.5, 0.8), **options)
    close(total, log["total_cost"], rtol=1e-13)
    close(linear, log["cost"], rtol=1e-13)
    found = solvers.solve(M, a, b, reg=0.1, unbalanced=(0.5, 0.8), reg_type=reg_type, tol=1e-12)
    close(total, found.value, rtol=0, atol=1e-11)
    close(linear, found.value_linear, rtol=0, atol=1e-9)
    assert np.ndim(linear) == 0


def reference(n, m, like, *holes):
    """Random, of mass 1, 0 in `holes`."""
    c = rand(n, m)
    c[c < 0.1] = 0
    for hole in holes:
        c[hole] = 0
    c /= c.sum()
    return c.numpy() if isinstance(like, np.ndarray) else c


@pytest.mark.parametrize("method", METHODS)
def test_reference_measures(arrays, method):
    a, b, M = arrays(12, 10)
    c = reference(12, 10, M)
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.7, method=method, c=c, stopThr=1e-10, log=True, **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.7, c=c, stopThr=1e-15, numItermax=20_000, log=True)
    close(ours, theirs, rtol=0, atol=1e-9)
    close(log["logu"], their_log["logu"], rtol=0, atol=1e-7)
    assert (np.asarray(ours)[np.asarray(c) == 0] == 0).all()


def test_rows_without_support_stay_where_they_are(arrays):
    """Their mass moves nowhere, and pays: the total is that of the smaller problem plus reg_m times the mass left."""
    a, b, M = arrays(12, 10)
    c = reference(12, 10, M, 3, (slice(None), 4), (5, 5))
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, (0.5, 0.7), c=c, stopThr=1e-13, log=True)
    assert settled(log)
    rows, columns = [i for i in range(12) if i != 3], [j for j in range(10) if j != 4]
    assert (np.asarray(ours)[3] == 0).all() and (np.asarray(ours)[:, 4] == 0).all()
    small = (a[rows], b[columns], M[rows][:, columns], 0.05, (0.5, 0.7))
    exact = truth(*small, c=c[rows][:, columns])
    close(np.asarray(ours)[np.ix_(rows, columns)], exact, rtol=0, atol=1e-10)
    _, small_log = unbalanced.sinkhorn_unbalanced(*small, c=c[rows][:, columns], stopThr=1e-13, log=True)
    close(log["total_cost"], small_log["total_cost"] + 0.5 * a[3] + 0.7 * b[4], rtol=1e-10)
    with pytest.raises(ProblemError, match="mass may go nowhere"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, (math.inf, 0.7), c=c)


@pytest.mark.parametrize("method, reg_type", pairwise(METHODS, ["kl", "entropy"]))
def test_zero_weights_are_empty_atoms(arrays, method, reg_type):
    """POT's default returns its initial guess here."""
    a, b, M = arrays(12, 10)
    a[:3], b[-2:] = 0, 0
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.7, method=method, reg_type=reg_type, stopThr=1e-12, log=True)
    exact = truth(a[3:], b[:-2], M[3:, :-2], 0.05, 0.7, reg_type=reg_type)
    close(ours[3:, :-2], exact, rtol=0, atol=1e-10)
    assert float(ours.sum()) == pytest.approx(float(exact.sum()), rel=1e-12)
    assert settled(log)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_several_histograms(arrays, method, reg_type):
    """Each as if alone, with the entropy, which is all that POT knows here, whatever reg_type says."""
    a, b, M = arrays(12, 10)
    stack = np.stack if isinstance(b, np.ndarray) else torch.stack
    B = stack([b, b[[*range(9, -1, -1)]], b * 0 + 0.1], 1)
    options = dict(method=method, stopThr=1e-11, numItermax=3000)
    ours, log = unbalanced.sinkhorn_unbalanced(a, B, M, 0.05, 0.7, reg_type=reg_type, log=True, **options)
    alone = [unbalanced.sinkhorn_unbalanced2(a, B[:, k], M, 0.05, 0.7, reg_type="entropy", **options) for k in range(3)]
    close(ours, [float(z) for z in alone], rtol=0, atol=1e-10)
    theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(a, B, M, 0.05, 0.7, reg_type="entropy", log=True, **options)
    close(ours, theirs, rtol=0, atol=1e-9)
    close(unbalanced.sinkhorn_unbalanced2(a, B, M, 0.05, 0.7, reg_type=reg_type, **options), theirs, rtol=0, atol=1e-9)
    assert set(their_log) <= set(log) and log["logu"].shape == their_log["logu"].shape and type(ours) is type(theirs)


def test_a_converged_warm_start_stops_at_the_first_look(arrays):
    a, b, M = arrays(20, 15)
    for method in METHODS:
        _, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.7, method=method, log=True, stopThr=1e-10)
        warm = (log["logu"], log["logv"])
        _, again = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.7, method=method, log=True, warmstart=warm, stopThr=1e-7)
        assert log["n_iter"] > 0 and again["n_iter"] == 0


@pytest.mark.parametrize(
    "reg_m", [1, 1.0, np.float32(1), torch.tensor(1.0), [1], (1.0, 1.0), np.ones(2), torch.ones(1), np.array(1.0)], ids=repr
)
def test_reg_m_in_whatever_holds_it(problem, reg_m):
    a, b, M = problem(8, 7)
    close(unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, reg_m), unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, 1.0), rtol=0, atol=0)


def test_none_is_a_hard_constraint(arrays):
    a, b, M = arrays(8, 7)
    close(unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, (None, 1.0), stopThr=1e-12).sum(1), a, rtol=1e-9)
    b = b / 1.3
    balanced = unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, None, stopThr=1e-12)
    close(balanced, ot.bregman.sinkhorn_log(a, b, M, 0.1, stopThr=1e-13), rtol=0, atol=1e-10)


def test_both_marginals_hard_and_unequal(arrays):
    """Columns are exact, as POT's are, where POT's scalings drift until they overflow."""
    a, b, M = arrays(8, 7)
    with pytest.warns(UserWarning, match="columns b and rows proportional to a"):
        P, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, math.inf, log=True, stopThr=1e-12)
    close(P.sum(0), b, rtol=1e-10)
    log_c = np.log(np.asarray(a))[:, None] + np.log(np.asarray(b))
    close(np.exp(log_c + np.asarray(log["logu"])[:, None] + np.asarray(log["logv"]) - np.asarray(M) / 0.1), P, rtol=1e-9)


def test_lists_float32_and_weights_left_out(problem):
    found = unbalanced.sinkhorn_unbalanced([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1, 1)
    close(found, [[0.3220536, 0.1184769], [0.1184769, 0.3220536]], atol=1e-6)
    a, b, M = (z.float() for z in problem(20, 15))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.01, 1.0, stopThr=1e-12, log=True)  # POT: beyond float32 from reg 0.011
    assert P.dtype == torch.float32 and log["status"].name == "stalled"
    close(P, truth(*(z.double() for z in (a, b, M)), 0.01, 1.0), rtol=0, atol=1e-6)
    for empty in ([], None):
        P = unbalanced.sinkhorn_unbalanced(empty, empty, M.double(), 0.5, 1.0, stopThr=1e-12)
        close(P, ot.unbalanced.sinkhorn_unbalanced([], [], M.double(), 0.5, 1.0, stopThr=1e-12), rtol=0, atol=1e-10)


def test_forbidden_pairs(arrays):
    a, b, M = arrays(8, 6)
    M[0, 1:] = math.inf
    ours = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.5, stopThr=1e-12)
    close(ours, truth(a, b, M, 0.05, 0.5), rtol=0, atol=1e-11)
    M[2] = math.inf
    assert float(unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.5)[2].sum()) == 0


@pytest.mark.parametrize(
    "error, says, change",
    [
        (ValueError, r"Unknown method 'lbfgsb'.*ot\.unbalanced\.lbfgsb_unbalanced", lambda a, b, M: dict(method="lbfgsb")),
        (Elsewhere, r"ot\.unbalanced\.mm_unbalanced", lambda a, b, M: dict(reg=0)),
        (Elsewhere, r"reg_type = 'l2'.*ot\.unbalanced\.lbfgsb_unbalanced", lambda a, b, M: dict(reg_type="l2")),
        (ValueError, "indexable object of length 1 or 2", lambda a, b, M: dict(reg_m=[1.0, 1.0, 1.0])),
        (ProblemError, "reg_m must be > 0", lambda a, b, M: dict(reg_m=-1.0)),
        (ProblemError, r"b has shape \(5,\), expected \(6,\)", lambda a, b, M: dict(b=b[:5])),
        (ProblemError, "a must hold finite weights", lambda a, b, M: dict(a=-a)),
        (ProblemError, "c must hold finite numbers", lambda a, b, M: dict(c=-M - 1)),
    ],
)
def test_refusals_name_the_way_out(arrays, error, says, change):
    a, b, M = arrays(8, 6)
    with pytest.raises(error, match=says):
        unbalanced.sinkhorn_unbalanced(**dict(a=a, b=b, M=M, reg=0.1, reg_m=1.0) | change(a, b, M))
    with pytest.raises(ValueError, match="Unknown returnCost = all"):
        unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0, returnCost="all")


def test_warnings(arrays, capsys):
    a, b, M = arrays(8, 6)
    with pytest.warns(UserWarning, match="Stabilized Unbalanced Sinkhorn did not converge") as seen:
        unbalanced.sinkhorn_stabilized_unbalanced(a, b, M, 0.01, 10.0, numItermax=3)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="Using classic Sinkhorn-Knopp"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, method="sinkhorn_reg_scaling")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.01, 10.0, numItermax=3, foo=3, warn=False)
    with pytest.warns(UserWarning, match="raise `numItermax`"):  # POT says nothing
        unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.01, 10.0, numItermax=3)
    unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.1, 1.0, verbose=True, numItermax=4, stopThr=0, warn=False)
    assert not capsys.readouterr().out  # as POT without log
    unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.1, 1.0, verbose=True, numItermax=4, stopThr=0, warn=False, log=True)
    assert [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines()] == ["It.", "-" * 19, "0", "1", "2", "3"]


@pytest.mark.parametrize("method, reg_type, cost", pairwise(METHODS, ["kl", "entropy"], ["linear", "total"]))
def test_gradients_of_the_costs(method, reg_type, cost):
    options = dict(method=method, reg_type=reg_type, returnCost=cost, numItermax=20, stopThr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gradcheck(lambda *z: unbalanced.sinkhorn_unbalanced2(*z, 0.1, (0.5, 0.8), **options), leaves(*random_problem(6, 5)))


@pytest.mark.parametrize("iterations", [1, 4, 110])
def test_gradients_of_everything_in_everything(iterations):
    """Of what was computed, converged or not; 110 is past where acceleration sets in."""

    def function(a, b, M, reg, *taus):
        done = run(a, b, M, reg, taus, numItermax=iterations, stopThr=0.0)
        return done.linear(), done.objective(), done.plan().square()

    assert gradcheck(function, (*leaves(*random_problem(4, 3)), *numbers(0.1, 0.5, 0.8)))


def test_gradients_in_the_reference():
    hole = torch.zeros(6, 5, dtype=torch.bool)
    hole[2, 3] = hole[4] = True

    def function(a, b, M, c):
        c = c.masked_fill(hole, 0.0)
        return unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, 0.5, c=c, returnCost="total", numItermax=20, stopThr=0.0, warn=False)

    assert gradcheck(function, leaves(*random_problem(6, 5), rand(6, 5) + 0.2))


def test_gradients_of_several_histograms():
    a, b, M = random_problem(6, 5)
    inputs = leaves(a, torch.stack((b, b.flip(0)), 1), M)
    assert gradcheck(lambda a, B, M: unbalanced.sinkhorn_unbalanced(a, B, M, 0.1, 0.5, numItermax=20, stopThr=0.0, warn=False), inputs)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_gradients_are_pots_at_convergence(reg_type):
    grads = []
    for library, more in ((unbalanced, PLAIN), (ot.unbalanced, {})):
        inputs = leaves(*random_problem(6, 5))
        loss = library.sinkhorn_unbalanced2(*inputs, 0.05, 0.5, reg_type=reg_type, stopThr=1e-13, numItermax=3000, **more)
        grads.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_zero_weights_have_finite_gradients(reg_type):
    a, b, M = random_problem(6, 5)
    a[:2], b[-1] = 0, 0
    inputs = leaves(a, b, M)
    loss = unbalanced.sinkhorn_unbalanced2(*inputs, 0.1, 0.5, reg_type=reg_type, returnCost="total")
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))
