"""Gradients: against finite differences in float64, for the plan, the loss and the value; finite where POT's are NaN."""

import json
import math
from pathlib import Path

import ot
import pytest
import torch

import gpu_ot
from conformance import COSTS
from gpu_ot import KL, TV
from gpu_ot.problem import Problem
from problems import differences, gradcheck, leaves, numbers, pairwise, rand, randn, random_problem, weights

#: One iteration count for every perturbation, so that differences see a smooth function.
FIXED = dict(numItermax=30, stopThr=0.0, warn=False)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
def test_loss(method):
    inputs = (*leaves(*random_problem(6, 5)), *numbers(0.1))
    assert gradcheck(lambda a, b, M, reg: gpu_ot.sinkhorn2(a, b, M, reg, method=method, **FIXED), inputs)


@pytest.mark.parametrize("iterations", [1, 4, 30])
def test_any_function_of_the_plan(iterations):
    """Truncated runs give the derivative of what was computed, not of what it would converge to."""

    def function(a, b, M):
        P = gpu_ot.sinkhorn(a, b, M, 0.1, **FIXED | dict(numItermax=iterations))
        return (randn(6, 5) * P).sum() + P.square().sum() + P.sum(0)

    assert gradcheck(function, leaves(*random_problem(6, 5)))


def test_several_histograms():
    a, b, M = random_problem(6, 5)
    assert gradcheck(lambda a, B, M: gpu_ot.sinkhorn(a, B, M, 0.1, **FIXED), leaves(a, torch.stack((b, b.flip(0)), 1), M))


@pytest.mark.parametrize("name", ["M", "a", "b"])
def test_gradients_are_pots_at_convergence(problem, name):
    """In the weights up to a constant: a balanced problem has no derivative in its mass."""
    grads = []
    for library in (gpu_ot, ot):
        given = dict(zip("abM", problem(20, 15), strict=True))
        given[name] = given[name].clone().requires_grad_()
        loss = library.sinkhorn2(**given, reg=0.05, stopThr=1e-13, numItermax=3000)
        (grad,) = torch.autograd.grad(loss, given[name])
        grads.append(grad if name == "M" else grad - grad.mean())
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_zero_weights_have_finite_and_true_gradients(side):
    a, b, M = random_problem(8, 7)
    for w in {"a": [a], "b": [b], "both": [a, b]}[side]:
        w[:2] = 0
        w /= w.sum()
    R, inputs = rand(8, 7, seed=1), leaves(a, b, M)

    def value(a, b, M, library=gpu_ot, **options):
        return (library.sinkhorn(a, b, M, 0.1, **options) * R).sum()

    grads = torch.autograd.grad(value(*inputs, **FIXED), inputs)
    assert all(g.isfinite().all() for g in grads)
    # Mass can only be added to an empty atom, so the difference is one-sided.
    k, added = int(side == "b"), torch.zeros_like(b if side == "b" else a)
    added[0] = 1e-7
    moved = [z + added if i == k else z for i, z in enumerate((a, b, M))]
    assert float(value(*moved, **FIXED) - value(a, b, M, **FIXED)) / 1e-7 == pytest.approx(float(grads[k][0]), rel=1e-4)
    if side == "a":
        assert all(g.isnan().any() for g in torch.autograd.grad(value(*inputs, ot), inputs))


def test_gradients_with_forbidden_pairs():
    a, b, M = leaves(*random_problem(6, 6))
    hole = torch.zeros(6, 6, dtype=torch.bool)
    hole[0, 3:] = hole[4, 0] = True
    loss = gpu_ot.sinkhorn2(a, b, M.masked_fill(hole, torch.inf), 0.1, **FIXED)
    grads = torch.autograd.grad(loss, (a, b, M))
    assert all(g.isfinite().all() for g in grads) and (grads[2][hole] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_back_in_the_inputs_type(problem, dtype):
    a, b, M = (z.to(dtype).requires_grad_() for z in problem(9, 8))
    truth = [z.detach().double().requires_grad_() for z in (a, b, M)]
    ours = torch.autograd.grad(gpu_ot.sinkhorn2(a, b, M, 0.1, warn=False), (a, b, M))
    exact = torch.autograd.grad(gpu_ot.sinkhorn2(*truth, 0.1, warn=False), truth)
    for g, e in zip(ours, exact, strict=True):
        assert g.dtype == dtype
        assert (g.double() - e).norm() <= 10 * torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize("penalty", [KL(), KL(0.4), (KL(), KL(0.2)), TV(0.15)], ids=str)
@pytest.mark.parametrize("mode", ["envelope", "unroll"])
def test_value(penalty, mode):
    """Without any rescaling the envelope is exact for relaxed marginals, too."""

    def value(a, b, M):
        problem = Problem(M, 0.1, a / a.sum(), b / b.sum(), penalty)
        return gpu_ot.solve(problem, grad=mode, tol=0.0, max_iter=50 if mode == "envelope" else 30).value

    assert gradcheck(value, leaves(*random_problem(6, 5)))


def assert_derivatives(value, at, grads, rel=1e-6):
    """Of value(*at) in each number."""
    for k, grad in enumerate(grads):
        (truth,) = differences(lambda z: [float(value(*z))], [(z, z * (i == k)) for i, z in enumerate(at)], 1e-3)
        assert float(grad) * at[k] == pytest.approx(truth, rel=rel)


#: (tau of the rows, tau of the columns, factor of the mass of b)
TAUS = [(None, None, 1.0), (0.4, 0.3, 2.0), (None, 0.3, 1.5), (0.4, 0.4, 1.0)]


def scalars(taus, batch=()):
    """Clouds and weights, and the numbers (eps, *taus that there are) with what makes penalties of them."""
    x, y = (rand(*batch, n, 2, seed=n) for n in (6, 5))
    a, b = (weights(n, batch) for n in (6, 5))
    rows, columns, factor = taus

    def penalties(*given):
        left = iter(given)
        return tuple(KL() if tau is None else KL(next(left)) for tau in (rows, columns))

    return x, y, a, factor * b, [0.1, *(tau for tau in (rows, columns) if tau is not None)], penalties


BACKENDS = [
    *(("matrix", "dense"), ("squared", "dense"), ("squared", "chunked"), ("folding sum", "chunked")),
    *(("euclidean", "softmin"), ("euclidean", "chunked")),
]


@pytest.mark.parametrize("served, taus, batch", pairwise(BACKENDS, TAUS, [(), (3,)]), ids=str)
def test_value_in_eps_and_tau(served, taus, batch):
    """By the envelope: KL(P | a⊗b), and KL of each relaxed marginal."""
    cost, backend = served
    x, y, a, b, at, penalties = scalars(taus, batch)
    R = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64) if batch else 1.0

    def value(eps, *taus):
        problem = Problem(COSTS[cost][0](x, y), eps, a, b, penalties(*taus))
        return (R * gpu_ot.solve(problem, backend=backend, tol=1e-14, max_iter=3000).value).sum()

    given = numbers(*at)
    grads = torch.autograd.grad(value(*given), given)
    assert_derivatives(value, at, grads)
    assert torch.func.grad(value, argnums=0)(*(z.detach() for z in given)) == pytest.approx(float(grads[0]), rel=1e-9)


@pytest.mark.parametrize("taus", TAUS, ids=str)
def test_divergence_in_eps_and_tau(taus):
    x, y, a, b, at, penalties = scalars(taus)

    def value(eps, *taus):
        return gpu_ot.divergence(Problem(gpu_ot.SqEuclidean(x, y), eps, a, b, penalties(*taus)), tol=1e-14, max_iter=3000).value

    given = numbers(*at)
    assert_derivatives(value, at, torch.autograd.grad(value(*given), given))


def test_eps_and_tau_are_learnt_beside_the_points():
    """As parameters of a loss, of another type and with the points: neither takes anything from the other."""
    x, y, a, b, _, _ = scalars(TAUS[1])
    x.requires_grad_()
    eps, tau = (torch.nn.Parameter(torch.tensor([z])) for z in (0.1, 0.4))
    loss = gpu_ot.SinkhornLoss(eps, tau, tol=1e-12)
    assert [id(z) for z in loss.parameters()] == [id(eps), id(tau)]
    found = torch.autograd.grad(loss(x, y, a, b), (eps, tau, x))
    assert found[0].shape == (1,) and found[0].dtype == torch.float32
    fixed = [float(z.detach()) for z in (eps, tau)]
    assert_derivatives(lambda eps, tau: gpu_ot.SinkhornLoss(eps, tau, tol=1e-14)(x.detach(), y, a, b), fixed, found[:2], 1e-5)
    (alone,) = torch.autograd.grad(gpu_ot.SinkhornLoss(*fixed, tol=1e-12)(x, y, a, b), x)
    torch.testing.assert_close(found[2], alone, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert not loss(x, y, a, b).requires_grad


def test_what_is_not_known_in_eps_and_tau_is_refused(problem):
    a, b, M = problem(6, 5)
    number = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    of_eps, of_tau = Problem(M.clone().requires_grad_(), number, a, b), Problem(M.clone().requires_grad_(), 0.1, a, b, KL(number))
    for posed, grad in ((of_eps, "implicit"), (of_tau, "implicit"), (of_eps, "unroll")):
        with pytest.raises(gpu_ot.ProblemError, match="divide the cost"):
            gpu_ot.solve(posed, grad=grad)
    with pytest.raises(gpu_ot.ProblemError, match="tau of TV"):
        gpu_ot.solve(Problem(M, 0.1, a, b, TV(number)))
    value = gpu_ot.solve(Problem(M, number, a, b)).value
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(value, number, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.grad(torch.func.grad(lambda eps: gpu_ot.solve(Problem(M, eps, a, b)).value))(number.detach())
    plain = Problem(M, 0.1, a, b, KL(0.3))
    assert Problem(M, number.detach(), a, b, KL(torch.tensor(0.3, dtype=torch.float64))).penalties == plain.penalties


@pytest.mark.parametrize("penalty, at", [(KL, 0.4), (TV, 0.15)])
def test_tau_through_the_iterations(problem, penalty, at):
    """Of whatever was computed: here after seven iterations."""
    a, b, M = problem(6, 5)

    def value(tau):
        done = gpu_ot.solve(Problem(M, 0.1, a, 1.2 * b, penalty(tau)), grad="unroll", tol=0.0, max_iter=7)
        return (done.value + (randn(6, 5) * done.plan.to_dense()).sum() + done.f.sum()).sum()

    (tau,) = numbers(at)
    assert_derivatives(value, [at], torch.autograd.grad(value(tau), tau))


def test_no_graph_is_kept_when_none_is_asked_for():
    asked = leaves(*random_problem(6, 5))
    with torch.no_grad():
        found = [gpu_ot.sinkhorn(*asked, 0.1), gpu_ot.solve(Problem(asked[2], 0.1, *asked[:2]), grad="implicit").f]
    a, b, M = random_problem(6, 5)
    implicit = gpu_ot.solve(Problem(M, 0.1, a, b), grad="implicit")
    assert not any(z.requires_grad for z in (*found, gpu_ot.sinkhorn(a, b, M, 0.1), implicit.f, implicit.value))


@pytest.mark.parametrize("name", ["M", "a", "b"])
def test_second_derivatives_of_an_envelope_refuse_instead_of_being_wrong(problem, name):
    """Also where only a weight is asked for, in which the envelope is linear and would pass for its own derivative."""
    given = dict(zip("abM", problem(6, 5), strict=True))

    def value(z):
        a, b, M = (given | {name: z}).values()
        return gpu_ot.solve(Problem(M, 0.1, a / a.sum(), b / b.sum())).value

    (asked,) = leaves(given[name])
    with pytest.raises(NotImplementedError, match=r'second derivatives.*grad="implicit"'):
        torch.autograd.grad(value(asked), asked, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'second derivatives.*grad="implicit"'):
        torch.func.grad(lambda z: torch.func.grad(value)(z).square().sum())(given[name])


def test_second_derivatives_of_what_was_computed():
    def function(a, b, M, x, y):
        P = gpu_ot.sinkhorn(a, b, M, 0.2, **FIXED | dict(numItermax=4))
        relaxed = Problem(M, 0.2, a / a.sum(), b / b.sum(), KL(0.3)), "dense"
        streamed = Problem(gpu_ot.SqEuclidean(x, y), 0.2), "chunked"
        done = [gpu_ot.solve(problem, backend=name, grad="unroll", tol=0.0, max_iter=3) for problem, name in (relaxed, streamed)]
        return P.square().sum(), done[0].value, done[1].f

    inputs = leaves(*random_problem(4, 3), rand(4, 2), rand(3, 2, seed=1))
    assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=1e-12)


def test_empty_atoms_far_below_the_rest_leave_no_nan():
    """Between two empty atoms exponents overflow at small eps; times their weights, 0, they are no derivative."""
    M = random_problem(6, 5)[2]
    M[0], M[:, 0] = 3.0, 3.0
    M[0, 0] = 0.0
    a, b, M = leaves(weights(6, empty=1), weights(5, empty=1), M)
    for mode in ("envelope", "implicit"):
        s = gpu_ot.solve(Problem(M, 2e-3, a, b), grad=mode, backend="softmin", tol=1e-12, max_iter=20_000)
        assert float(s.f[0] + s.g[0]) / 2e-3 > 710  # exp overflows
        grads = torch.autograd.grad(s.value, (a, b, M), retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)
    P = gpu_ot.gradients.plan(s.problem, s.geometry, s.f, s.g)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(P.square().sum(), (a, b, M)))


#: Derivatives of the sharp cost and of the plan in the cost, OTT-JAX's: numbers stored by bench/ott_derivatives.py.
STORED = json.loads((Path(__file__).parent / "ott_derivatives.json").read_text())
PROBLEMS = {p["name"]: p for p in STORED["problems"]}
assert {tau is None for p in PROBLEMS.values() for tau in p["tau"]} == {True, False}, "hard marginals and relaxed ones"


def tensor(z):
    return torch.tensor(z, dtype=torch.float64)


def solved(p, C):
    on_a, on_b = (KL(math.inf if tau is None else tau) for tau in p["tau"])
    return gpu_ot.solve(Problem(C, p["eps"], tensor(p["a"]), tensor(p["b"]), (on_a, on_b)), grad="implicit", tol=1e-13, strict=True)


def off(ours, theirs):
    """The largest difference, relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_plans_and_derivatives_are_otts(name):
    p = PROBLEMS[name]
    C = tensor(p["C"]).requires_grad_()
    solution = solved(p, C)
    P = solution.plan.to_dense()
    assert off(P.detach(), tensor(p["plan"])) <= 1e-10
    for output, value in (("sharp_cost", (P * C).sum()), ("sharp_cost", solution.sharp_cost), ("linear", (P * tensor(p["W"])).sum())):
        theirs = p[output]
        assert theirs["off_differences"] <= 1e-8, "not a reference"
        assert float(value.detach()) == pytest.approx(theirs["value"], rel=1e-10)
        (grad,) = torch.autograd.grad(value, C, retain_graph=True)
        assert off(grad, tensor(theirs["grad"])) <= 1e-6
