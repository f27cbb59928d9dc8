"""Gradients: against finite differences in float64, for the plan, the loss and the value; finite where POT's are NaN."""

from __future__ import annotations

import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, TV
from gpu_ot.problem import Problem
from problems import leaves, pairwise, randn, random_problem

#: One iteration count for every perturbation, so that differences see a smooth function.
FIXED = dict(numItermax=30, stopThr=0.0, warn=False)


def gradcheck(function, inputs):
    # BLAS sums in an order that depends on where its arguments lie in memory, so a repeated backward may differ in the last digit.
    return torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
def test_loss(problem, method):
    a, b, M = leaves(*random_problem(6, 5))
    assert gradcheck(lambda a, b, M: gpu_ot.sinkhorn2(a, b, M, 0.1, method=method, **FIXED), (a, b, M))


@pytest.mark.parametrize("iterations", [1, 4, 30])
def test_any_function_of_the_plan(problem, iterations):
    """Truncated runs give the derivative of what was computed, not of what it would converge to."""
    R = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def function(a, b, M):
        P = gpu_ot.sinkhorn(a, b, M, 0.1, **FIXED | dict(numItermax=iterations))
        return (R * P).sum() + P.square().sum() + P.sum(0)

    assert gradcheck(function, leaves(*random_problem(6, 5)))


def test_regularisation_as_a_tensor(problem):
    a, b, M = problem(6, 5)
    reg = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda reg: gpu_ot.sinkhorn2(a, b, M, reg, **FIXED), reg)


def test_several_histograms(problem):
    a, b, M = leaves(*random_problem(6, 5))
    B = torch.stack((b.detach(), b.detach().flip(0)), 1).requires_grad_()
    assert gradcheck(lambda a, B, M: gpu_ot.sinkhorn(a, B, M, 0.1, **FIXED), (a, B, M))


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
def test_zero_weights_have_finite_and_true_gradients(problem, side):
    a, b, M = leaves(*random_problem(8, 7))
    with torch.no_grad():
        for name, w in (("a", a), ("b", b)):
            if side in (name, "both"):
                w[:2] = 0
                w /= w.sum()
    R = torch.rand(8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((gpu_ot.sinkhorn(a, b, M, 0.1, **FIXED) * R).sum(), (a, b, M))
    assert all(g.isfinite().all() for g in grads)

    # Mass can only be added to an empty atom, so the difference is one-sided.
    step, name = 1e-7, "b" if side == "b" else "a"
    w = (b if name == "b" else a).detach().clone()
    w[0] += step
    moved = gpu_ot.sinkhorn(w if name == "a" else a, w if name == "b" else b, M, 0.1, **FIXED)
    still = gpu_ot.sinkhorn(a, b, M, 0.1, **FIXED)
    difference = float(((moved - still) * R).sum() / step)
    assert difference == pytest.approx(float(grads[0 if name == "a" else 1][0]), rel=1e-4)

    if side == "a":
        theirs = torch.autograd.grad((ot.sinkhorn(a, b, M, 0.1) * R).sum(), (a, b, M))
        assert all(g.isnan().any() for g in theirs)


def test_gradients_with_forbidden_pairs(problem):
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
def test_value(problem, penalty, mode):
    """Without any rescaling the envelope is exact for relaxed marginals, too."""
    a, b, M = leaves(*random_problem(6, 5))

    def value(a, b, M):
        a, b = a / a.sum(), b / b.sum()
        return gpu_ot.solve(Problem(M, 0.1, a, b, penalty), grad=mode, tol=0.0, max_iter=300 if mode == "envelope" else 30).value

    assert gradcheck(value, (a, b, M))


def differences(function, at, k):
    """The derivative in the k-th number, by central differences of fourth order."""
    step = 1e-3 * at[k]
    far, near, on, beyond = (float(function(*[z + t * step * (i == k) for i, z in enumerate(at)])) for t in (-2, -1, 1, 2))
    return (far - 8 * near + 8 * on - beyond) / (12 * step)


#: (tau of the rows, tau of the columns, factor of the mass of b)
TAUS = [(None, None, 1.0), (0.4, 0.3, 2.0), (None, 0.3, 1.5), (0.4, 0.4, 1.0)]
KINDS = {
    "matrix": lambda x, y: gpu_ot.SqEuclidean(x, y).dense(),
    "squares": gpu_ot.SqEuclidean,
    "sum": lambda x, y: 0.5 * gpu_ot.SqEuclidean(x, y) + gpu_ot.Cosine(x, y),
    "distances": gpu_ot.Euclidean,
}


def scalars(problem, taus, batch=()):
    """Clouds and weights, and the numbers (eps, *taus that there are) with what makes penalties of them."""
    drawn = [problem(6, 5, seed=s) for s in range(3)]
    gen = torch.Generator().manual_seed(7)
    x, y = (torch.rand(*batch, n, 2, generator=gen, dtype=torch.float64) for n in (6, 5))
    a, b = (torch.stack([z[k] for z in drawn]) if batch else drawn[0][k] for k in (0, 1))
    rows, columns, factor = taus

    def penalties(*given):
        left = iter(given)
        return tuple(KL() if tau is None else KL(next(left)) for tau in (rows, columns))

    return x, y, a, factor * b, [0.1, *(tau for tau in (rows, columns) if tau is not None)], penalties


MACHINES = [
    *(("matrix", "dense"), ("squares", "dense"), ("squares", "chunked"), ("sum", "chunked")),
    *(("distances", "softmin"), ("distances", "chunked")),
]


@pytest.mark.parametrize("machine, taus, batch", pairwise(MACHINES, TAUS, [(), (3,)]), ids=str)
def test_value_in_eps_and_tau(problem, machine, taus, batch):
    """By the envelope: KL(P | a⊗b), and KL of each relaxed marginal."""
    cost, backend = machine
    x, y, a, b, at, penalties = scalars(problem, taus, batch)
    R = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64) if batch else torch.ones((), dtype=torch.float64)

    def value(eps, *taus):
        return (
            R * gpu_ot.solve(Problem(KINDS[cost](x, y), eps, a, b, penalties(*taus)), backend=backend, tol=1e-14, max_iter=3000).value
        ).sum()

    numbers = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in at]
    grads = torch.autograd.grad(value(*numbers), numbers)
    for k, grad in enumerate(grads):
        assert float(grad) == pytest.approx(differences(value, at, k), rel=1e-6)
    assert torch.func.grad(value, argnums=0)(*(z.detach() for z in numbers)) == pytest.approx(float(grads[0]), rel=1e-9)


@pytest.mark.parametrize("taus", TAUS, ids=str)
def test_divergence_in_eps_and_tau(problem, taus):
    x, y, a, b, at, penalties = scalars(problem, taus)

    def value(eps, *taus):
        return gpu_ot.divergence(Problem(gpu_ot.SqEuclidean(x, y), eps, a, b, penalties(*taus)), tol=1e-14, max_iter=3000).value

    numbers = [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in at]
    for k, grad in enumerate(torch.autograd.grad(value(*numbers), numbers)):
        assert float(grad) == pytest.approx(differences(value, at, k), rel=1e-6)


def test_eps_and_tau_are_learnt_beside_the_points(problem):
    """As parameters of a loss, of another type and with the points: neither takes anything from the other."""
    x, y, a, b, _, _ = scalars(problem, TAUS[1])
    x.requires_grad_()
    eps, tau = (torch.nn.Parameter(torch.tensor([z])) for z in (0.1, 0.4))
    loss = gpu_ot.SinkhornLoss(eps, tau, tol=1e-12)
    assert [id(z) for z in loss.parameters()] == [id(eps), id(tau)]
    found = torch.autograd.grad(loss(x, y, a, b), (eps, tau, x))
    assert found[0].shape == (1,) and found[0].dtype == torch.float32
    fixed = [float(z.detach()) for z in (eps, tau)]
    value = lambda eps, tau: gpu_ot.SinkhornLoss(eps, tau, tol=1e-14)(x.detach(), y, a, b)  # noqa: E731
    for k in (0, 1):
        assert float(found[k]) == pytest.approx(differences(value, fixed, k), rel=1e-5)
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

    def outputs(tau):
        done = gpu_ot.solve(Problem(M, 0.1, a, 1.2 * b, penalty(tau)), grad="unroll", tol=0.0, max_iter=7)
        return (done.value + (randn(6, 5) * done.plan.to_dense()).sum() + done.f.sum()).sum()

    tau = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(outputs(tau), tau)
    step = 1e-6
    with torch.no_grad():
        expected = (outputs(tau + step) - outputs(tau - step)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_no_graph_is_kept_when_none_is_asked_for(problem):
    a, b, M = leaves(*random_problem(6, 5))
    with torch.no_grad():
        assert not gpu_ot.sinkhorn(a, b, M, 0.1).requires_grad
    assert not gpu_ot.sinkhorn(*(z.detach() for z in (a, b, M)), 0.1).requires_grad


@pytest.mark.parametrize("name", ["M", "a", "b"])
def test_second_derivatives_of_an_envelope_refuse_instead_of_being_wrong(problem, name):
    """Also where only a weight is asked for, in which the envelope is linear and would pass for its own derivative."""
    a, b, M = problem(6, 5)
    given = dict(a=a, b=b, M=M)
    given[name] = given[name].clone().requires_grad_()
    value = gpu_ot.solve(Problem(given["M"], 0.1, given["a"], given["b"])).value
    with pytest.raises(NotImplementedError, match=r'second derivatives.*grad="implicit"'):
        torch.autograd.grad(value, given[name], create_graph=True)


def test_second_derivatives_of_what_was_computed(problem):
    a, b, M = leaves(*random_problem(4, 3))

    def function(a, b, M):
        P = gpu_ot.sinkhorn(a, b, M, 0.2, **FIXED | dict(numItermax=4))
        return P.square().sum(), gpu_ot.solve(Problem(M, 0.2, a / a.sum(), b / b.sum(), KL(0.3)), grad="unroll", tol=0.0, max_iter=3).value

    assert torch.autograd.gradgradcheck(function, (a, b, M), nondet_tol=1e-12)


def test_second_derivatives_in_the_points_of_unrolled_iterations():
    x, y = (torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (4, 3))

    def f(x, y):
        return gpu_ot.solve(Problem(gpu_ot.SqEuclidean(x, y), 0.2), backend="chunked", grad="unroll", tol=0.0, max_iter=3).f

    assert torch.autograd.gradgradcheck(f, (x, y), nondet_tol=1e-12)


def test_empty_atoms_far_below_the_rest_leave_no_nan(problem):
    """Between two empty atoms exponents overflow at small eps; times their weights, 0, they are no derivative."""
    a, b, M = leaves(*random_problem(6, 5))
    with torch.no_grad():
        a[0], b[0] = 0, 0
        a /= a.sum()
        b /= b.sum()
        M[0], M[:, 0] = 3.0, 3.0
        M[0, 0] = 0.0
    for mode in ("envelope", "implicit"):
        s = gpu_ot.solve(Problem(M, 2e-3, a, b), grad=mode, backend="softmin", tol=1e-12, max_iter=20_000)
        assert float(s.f[0] + s.g[0]) / 2e-3 > 710  # exp overflows
        grads = torch.autograd.grad(s.value, (a, b, M), retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)
    P = gpu_ot.gradients.plan(s.problem, s.geometry, s.f, s.g)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(P.square().sum(), (a, b, M)))
