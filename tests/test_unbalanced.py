"""The unbalanced drop-in against POT: iterates, costs, reference measures; and where it is right on purpose."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import ot
import pytest
import torch

from gpu_ot import ProblemError
from gpu_ot.penalties import KL, TV
from gpu_ot.pot import unbalanced
from gpu_ot.pot.refusals import Elsewhere
from gpu_ot.pot.relaxed import run

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


def close(ours, theirs, **tolerance):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), **tolerance)


def truth(a, b, M, reg, reg_m, **options):
    """POT's plain iteration in float64, run until nothing moves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ot.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, reg, reg_m, numItermax=200_000, stopThr=1e-15, **options)


@pytest.mark.parametrize("reg_m", TAUS, ids=str)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("iterations", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("reg_m", [0.3, (0.5, 2.0), (math.inf, 0.7), 5.0], ids=str)
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [10, 100])
def test_large_reg_m_needs_few_iterations(problem, factor, method):
    """The plain iteration gains its mass in steps of reg / reg_m; translated it needs no more steps than a balanced problem."""
    a, b, M = problem(30, 20)
    reg, reg_m = 0.1 * float(M.std()), factor * float(M.std())
    exact = truth(a, 1.3 * b, M, reg, reg_m)
    P, log = unbalanced.sinkhorn_unbalanced(a, 1.3 * b, M, reg, reg_m, method=method, log=True, accelerate=True, stopThr=1e-8)
    residual = float((P - exact).abs().sum())
    assert log["converged"] and residual <= 1e-6
    slow = ot.unbalanced.sinkhorn_knopp_unbalanced(a, 1.3 * b, M, reg, reg_m, numItermax=5 * (log["n_iter"] + 1), stopThr=0)
    assert float((slow - exact).abs().sum()) > residual


@pytest.mark.parametrize("accelerate", [True, None])
@pytest.mark.parametrize("factor", [10, 100])
def test_five_times_fewer_iterations_to_the_same_marginals(problem, factor, accelerate):
    """Asked for or by itself. After five times as many iterations, counted in its own log, POT's marginals are further off."""
    a, b, M = problem(30, 20)
    b = 1.3 * b
    reg, reg_m = 0.1 * float(M.std()), factor * float(M.std())
    exact = truth(a, b, M, reg, reg_m)

    def residual(P):
        return sum(float((P.sum(axis) - exact.sum(axis)).abs().sum()) for axis in (0, 1))

    P, log = unbalanced.sinkhorn_unbalanced(a, b, M, reg, reg_m, log=True, accelerate=accelerate, stopThr=1e-10)
    assert log["converged"] and residual(P) <= 1e-7
    theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(a, b, M, reg, reg_m, log=True, numItermax=5 * (log["n_iter"] + 1), stopThr=0)
    assert len(their_log["err"]) == 5 * (log["n_iter"] + 1)  # it did not stop by itself
    assert residual(theirs) > residual(P)


def test_large_reg_m_ends_right_by_itself(arrays):
    """POT's default stops after 1000 iterations, 1 % off and without a word; ours is plain for 100 and translated after that."""
    a, b, M = arrays(20, 15)
    exact = truth(a, b, M, 0.05, 50.0)
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 50.0, log=True)
    assert log["status"].name == "converged" and log["n_iter"] < 200
    close(ours, exact, rtol=0, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 50.0)
    assert np.abs(np.asarray(theirs - exact)).sum() > 1e-2
    plain = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 50.0, accelerate=False)
    close(plain, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_total_cost_is_the_objective(problem, reg_type):
    """With the mass terms of the generalised KL, as POT's own L-BFGS-B has them; POT's `total_cost` here is 0 at every optimum."""
    a, b, M = (z.numpy() for z in problem(12, 9))
    b = 1.3 * b
    ours, log = unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, (0.5, 0.8), reg_type=reg_type, returnCost="total", log=True, stopThr=1e-12)
    _, their_log = ot.unbalanced.lbfgsb_unbalanced(a, b, M, 0.1, (0.5, 0.8), reg_div=reg_type, log=True, numItermax=20_000, stopThr=1e-16)
    assert ours == pytest.approx(their_log["total_cost"], abs=1e-9) and ours == log["total_cost"]
    linear = unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, (0.5, 0.8), reg_type=reg_type, stopThr=1e-12)
    assert linear == pytest.approx(log["cost"], rel=1e-14)  # this run leaps over ten iterations where the other records each
    assert linear == pytest.approx(their_log["cost"], abs=1e-5) and np.ndim(linear) == 0


def test_total_variation_is_no_worse_than_pots(problem):
    """L-BFGS-B stops at the kinks of the distance, so POT's plan costs more than ours; and no plan may cost less than the dual."""
    a, b, M = (z.numpy() for z in problem(12, 9))
    done = run(a, 1.3 * b, M, 0.1, 0.3, penalty=TV, stopThr=1e-12)
    _, log = ot.unbalanced.lbfgsb_unbalanced(
        a, 1.3 * b, M, 0.1, 0.3, reg_div="kl", regm_div="tv", log=True, numItermax=20_000, stopThr=1e-16
    )
    assert float(done.objective()) == pytest.approx(float(done.optimum()), abs=1e-9)  # primal and dual meet
    assert float(done.objective()) <= log["total_cost"] + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_reference_measures(arrays, method):
    a, b, M = arrays(12, 10)
    c = np.random.default_rng(0).random((12, 10))
    c[c < 0.3] = 0
    c = c / c.sum() if isinstance(M, np.ndarray) else torch.from_numpy(c / c.sum())
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
    c = np.random.default_rng(0).random((12, 10))
    c[3], c[:, 4], c[5, 5] = 0, 0, 0
    c = c if isinstance(M, np.ndarray) else torch.from_numpy(c)
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, (0.5, 0.7), c=c, stopThr=1e-13, log=True)
    assert all(np.isfinite(np.asarray(log[key])).all() for key in ("logu", "logv", "cost", "total_cost"))
    rows, columns = [i for i in range(12) if i != 3], [j for j in range(10) if j != 4]
    assert (np.asarray(ours)[3] == 0).all() and (np.asarray(ours)[:, 4] == 0).all()
    small = (a[rows], b[columns], M[rows][:, columns], 0.05, (0.5, 0.7))
    exact = truth(*small, c=c[rows][:, columns])
    close(np.asarray(ours)[np.ix_(rows, columns)], exact, rtol=0, atol=1e-10)
    _, small_log = unbalanced.sinkhorn_unbalanced(*small, c=c[rows][:, columns], stopThr=1e-13, log=True)
    close(log["total_cost"], small_log["total_cost"] + 0.5 * a[3] + 0.7 * b[4], rtol=1e-10)
    with pytest.raises(ProblemError, match="mass may go nowhere"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, (math.inf, 0.7), c=c)


def test_the_identity_as_reference(problem):
    """As in robot learning: c = eye / n, with two prices."""
    a, b, M = problem(15, 15)
    c = torch.eye(15, dtype=torch.float64) / 15
    options = dict(c=c, stopThr=1e-12)
    ours = unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.05, (0.5, 0.7), **options)
    close(ours, ot.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.05, (0.5, 0.7), **options), rtol=0, atol=1e-12)
    assert (ours[~torch.eye(15, dtype=torch.bool)] == 0).all()


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_are_empty_atoms(arrays, method, reg_type):
    """POT's default returns its initial guess here."""
    a, b, M = arrays(12, 10)
    a[:3], b[-2:] = 0, 0
    ours, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.7, method=method, reg_type=reg_type, stopThr=1e-12, log=True)
    exact = truth(a[3:], b[:-2], M[3:, :-2], 0.05, 0.7, reg_type=reg_type)
    close(ours[3:, :-2], exact, rtol=0, atol=1e-10)
    assert float(ours.sum()) == pytest.approx(float(exact.sum()), rel=1e-12)
    assert all(np.isfinite(np.asarray(log[key])).all() for key in ("logu", "logv", "cost", "total_cost"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_several_histograms(arrays, method, reg_type):
    """Each as if alone. POT knows only the entropy here, whatever reg_type says."""
    a, b, M = arrays(12, 10)
    stack = np.stack if isinstance(b, np.ndarray) else torch.stack
    B = stack([b, b[[*range(9, -1, -1)]], b * 0 + 0.1], 1)
    options = dict(method=method, stopThr=1e-11, numItermax=3000)
    ours, log = unbalanced.sinkhorn_unbalanced(a, B, M, 0.05, 0.7, reg_type=reg_type, log=True, **options)
    alone = [unbalanced.sinkhorn_unbalanced2(a, B[:, k], M, 0.05, 0.7, reg_type=reg_type, **options) for k in range(3)]
    close(ours, [float(z) for z in alone], rtol=0, atol=1e-10)
    theirs, their_log = ot.unbalanced.sinkhorn_unbalanced(a, B, M, 0.05, 0.7, reg_type="entropy", log=True, **options)
    if reg_type == "entropy":
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


@pytest.mark.parametrize("empty", [[], None])
def test_weights_left_out_are_uniform(arrays, empty):
    _, _, M = arrays(8, 5)
    P = unbalanced.sinkhorn_unbalanced(empty, empty, M, 0.5, 1.0, stopThr=1e-12)
    close(P, ot.unbalanced.sinkhorn_unbalanced([], [], M, 0.5, 1.0, stopThr=1e-12), rtol=0, atol=1e-10)


def test_lists_and_float32(problem):
    found = unbalanced.sinkhorn_unbalanced([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1, 1)
    close(found, [[0.3220536, 0.1184769], [0.1184769, 0.3220536]], atol=1e-6)
    a, b, M = (z.float() for z in problem(20, 15))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P, log = unbalanced.sinkhorn_unbalanced(a, b, M, 0.01, 1.0, stopThr=1e-12, log=True)  # POT: beyond float32 from reg 0.011
    assert P.dtype == torch.float32 and log["status"].name == "stalled"
    close(P, truth(*(z.double() for z in (a, b, M)), 0.01, 1.0), rtol=0, atol=1e-6)


def test_forbidden_pairs(arrays):
    a, b, M = arrays(8, 6)
    M[0, 1:] = math.inf
    ours = unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.5, stopThr=1e-12)
    close(ours, truth(a, b, M, 0.05, 0.5), rtol=0, atol=1e-11)
    M[2] = math.inf
    assert float(unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, 0.5)[2].sum()) == 0


def test_refusals_name_the_way_out(arrays):
    a, b, M = arrays(8, 6)
    with pytest.raises(ValueError, match=r"Unknown method 'lbfgsb'.*ot\.unbalanced\.lbfgsb_unbalanced"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, method="lbfgsb")
    with pytest.raises(ValueError, match="Unknown returnCost = all"):
        unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0, returnCost="all")
    with pytest.raises(Elsewhere, match=r"ot\.unbalanced\.mm_unbalanced"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0, 1.0)
    with pytest.raises(Elsewhere, match=r"reg_type = 'l2'.*ot\.unbalanced\.lbfgsb_unbalanced"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, reg_type="l2")
    with pytest.raises(ValueError, match="indexable object of length 1 or 2"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, [1.0, 1.0, 1.0])
    with pytest.raises(ProblemError, match="reg_m must be > 0"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, -1.0)
    with pytest.raises(ProblemError, match=r"b has shape \(5,\), expected \(6,\)"):
        unbalanced.sinkhorn_unbalanced(a, b[:5], M, 0.1, 1.0)
    with pytest.raises(ProblemError, match="a must hold finite weights"):
        unbalanced.sinkhorn_unbalanced(-a, b, M, 0.1, 1.0)
    with pytest.raises(ProblemError, match="c must hold finite numbers"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, c=-M - 1)


def test_warnings(arrays, capsys):
    a, b, M = arrays(8, 6)
    with pytest.warns(UserWarning, match="Stabilized Unbalanced Sinkhorn did not converge") as seen:
        unbalanced.sinkhorn_stabilized_unbalanced(a, b, M, 0.01, 10.0, numItermax=3)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="Using classic Sinkhorn-Knopp"):
        unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, method="sinkhorn_reg_scaling")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.01, 10.0, numItermax=3, foo=3)
    unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.1, 1.0, verbose=True, numItermax=4, stopThr=0)
    assert [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines()] == ["It.", "-" * 19, "0", "1", "2", "3"]


def leaves(problem):
    return [z.clone().requires_grad_() for z in problem(6, 5)]


def gradcheck(function, inputs):
    return torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("cost", ["linear", "total"])
def test_gradients_of_the_costs(problem, method, reg_type, cost):
    options = dict(method=method, reg_type=reg_type, returnCost=cost, numItermax=60, stopThr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gradcheck(lambda a, b, M: unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, (0.5, 0.8), **options), leaves(problem))


def test_gradients_in_reg_and_reg_m(problem):
    a, b, M = problem(6, 5)
    settings = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in (0.1, 0.5, 0.8)]

    def function(reg, tau_a, tau_b):
        done = run(a, b, M, reg, (tau_a, tau_b), numItermax=60, stopThr=0.0)
        return done.linear(), done.objective(), done.plan()

    assert gradcheck(function, settings)


@pytest.mark.parametrize("iterations", [1, 4, 130])
def test_gradients_of_the_plan(problem, iterations):
    """Of what was computed, converged or not; 130 is past where acceleration sets in."""
    options = dict(numItermax=iterations, stopThr=0.0)
    assert gradcheck(lambda a, b, M: unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, (0.5, 0.8), **options), leaves(problem))


def test_gradients_in_the_reference(problem):
    a, b, M = leaves(problem)
    c = (torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2).requires_grad_()
    hole = torch.zeros(6, 5, dtype=torch.bool)
    hole[2, 3] = hole[4] = True

    def function(a, b, M, c):
        c = c.masked_fill(hole, 0.0)
        return unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, 0.5, c=c, returnCost="total", numItermax=80, stopThr=0.0)

    assert gradcheck(function, (a, b, M, c))


def test_gradients_of_several_histograms(problem):
    a, b, M = leaves(problem)
    B = torch.stack((b.detach(), b.detach().flip(0)), 1).requires_grad_()
    assert gradcheck(lambda a, B, M: unbalanced.sinkhorn_unbalanced(a, B, M, 0.1, 0.5, numItermax=60, stopThr=0.0), (a, B, M))


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_gradients_are_pots_at_convergence(problem, reg_type):
    grads = []
    for library, more in ((unbalanced, PLAIN), (ot.unbalanced, {})):
        inputs = leaves(problem)
        loss = library.sinkhorn_unbalanced2(*inputs, 0.05, 0.5, reg_type=reg_type, stopThr=1e-13, numItermax=3000, **more)
        grads.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("penalty", [KL, TV])
def test_the_envelope_is_the_derivative_of_the_optimum(problem, penalty, reg_type):
    a, b, M = leaves(problem)
    settings = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in (0.1, 0.4, 0.7)]

    def function(a, b, M, reg, tau_a, tau_b):
        # 1.3: with equal masses total variation has a kink
        done = run(a, 1.3 * b, M, reg, (tau_a, tau_b), penalty=penalty, reg_type=reg_type, numItermax=400, stopThr=0.0, unroll=False)
        return done.optimum()

    assert gradcheck(function, (a, b, M, *settings))


def test_zero_weights_have_finite_gradients(problem):
    a, b, M = leaves(problem)
    with torch.no_grad():
        a[:2], b[-1] = 0, 0
    for reg_type in ("kl", "entropy"):
        loss = unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, 0.5, reg_type=reg_type, returnCost="total")
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (a, b, M)))


def test_looks_are_all_that_waits(problem, monkeypatch):
    """Between strides of ten iterations nothing is copied to the host but the absorbed kernel's own check."""
    counts = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda z: counts.append(1) or item(z))
    lists = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda z: counts.append(1) or lists(z))
    a, b, M = problem(20, 15)
    waits = []
    for iterations in (100, 200):
        counts.clear()
        unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.01, 50.0, numItermax=iterations, stopThr=1e-15, accelerate=False)
        waits.append(len(counts))
    assert waits[1] - waits[0] <= 3 * 10
