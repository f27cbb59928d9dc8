"""Implicit derivatives: every output in every input against central differences, first and second, for every kind of marginal."""

import math
import warnings

import pytest
import torch

import gpu_ot
from conformance import COSTS, between
from gpu_ot import KL, TV, SqEuclidean, gradients
from gpu_ot.errors import NotConverged
from gpu_ot.geometry.chunked import Chunked
from gpu_ot.gradients import implicit
from gpu_ot.problem import Problem
from problems import OUTPUTS, A, B, X, Y, differences, leaves, outputs, rand, weights

N, M, D, EPS = 6, 5, 2, 0.1
INPUTS = ("x", "y", "a", "b")


#: (penalties, a, b)
MARGINALS = {
    "balanced": (KL(), A, B),
    "KL": (KL(0.4), A, B),
    "semi": ((KL(), KL(0.2)), A, B),
    "semi, rows": ((KL(0.3), KL()), A, B),
    "TV": (TV(0.2), A, B),
    "KL and TV": ((KL(0.5), TV(0.17)), A, B),
    "mass 3": (KL(), 3 * A, 3 * B),
    "KL, masses 2 and 1/2": (KL(0.4), 2 * A, 0.5 * B),
    "empty atoms": (KL(), weights(N, empty=2), weights(M, empty=1)),
    "KL, empty atoms": (KL(0.4), weights(N, empty=2), weights(M, empty=1)),
}

#: The cost, and a backend that serves it.
SERVED = [("matrix", "softmin"), ("matrix", "dense"), ("squared", "dense"), ("squared", "chunked"), ("formula", "chunked")]


def solution(cost, backend, penalties, x, y, a, b, eps=EPS, **options):
    options = dict(grad="implicit", tol=1e-14, max_iter=5000) | options
    return gpu_ot.solve(Problem(COSTS[cost][0](x, y), eps, a, b, penalties), backend=backend, **options)


def direction(k, z, balanced):
    """Of the k-th input; weights keep their empty atoms, and hard marginals their mass."""
    d = rand(*z.shape, seed=20 + k) - 0.5
    if k >= 2:
        d = torch.where(z > 0, d * z, 0.0)
        d = d - z * (d.sum() / z.sum()) if balanced else d
    return d


@pytest.mark.parametrize("cost, backend", SERVED)
@pytest.mark.parametrize("marginals", MARGINALS)
def test_every_output_in_every_input(marginals, cost, backend):
    penalties, a, b = MARGINALS[marginals]
    inputs = leaves(X, Y, a, b)
    found = outputs(solution(cost, backend, penalties, *inputs))
    grads = {name: torch.autograd.grad(z, inputs, retain_graph=True) for name, z in found.items()}
    for k, given in enumerate(INPUTS):
        d = direction(k, inputs[k].detach(), penalties == KL())
        at = [(z.detach(), d if i == k else torch.zeros_like(z)) for i, z in enumerate(inputs)]
        truth = differences(lambda z: list(outputs(solution(cost, backend, penalties, *z)).values()), at, 1e-3)
        for name, expected in zip(OUTPUTS, truth, strict=True):
            ours = float((grads[name][k] * d).sum())
            # A derivative that happens to be near zero is held to the size of its gradient.
            size = max(abs(float(expected)), 0.1 * float(grads[name][k].norm() * d.norm()))
            assert abs(ours - float(expected)) < 1e-6 * size + 1e-12, f"d {name} / d {given}: {ours} is not {float(expected)}"


def test_the_table_has_kinks_that_are_active():
    s = solution("matrix", "softmin", TV(0.2), X, Y, A, B)
    clamped = torch.cat(((s.f.abs() == 0.2), (s.g.abs() == 0.2)))
    assert clamped.any() and not clamped.all()


@pytest.mark.parametrize("marginals", ["empty atoms", "KL, empty atoms"])
def test_derivatives_in_a_weight_of_zero(marginals):
    """Mass can only be added to an empty atom: one-sided differences of fourth order."""
    penalties, a, b = MARGINALS[marginals]
    inputs = leaves(X, Y, a, b)
    found = outputs(solution("matrix", "softmin", penalties, *inputs))
    for k, i in ((2, 0), (3, 0)):
        d = torch.zeros_like(inputs[k])
        d[i] = 1
        if penalties == KL():
            d -= inputs[k].detach() / inputs[k].detach().sum()
        still = [z.detach() for z in inputs]

        def at(t, k=k, d=d, still=still):
            moved = [z + t * d if j == k else z for j, z in enumerate(still)]
            return list(outputs(solution("matrix", "softmin", penalties, *moved)).values())

        h = 2e-4
        steps = zip(*(at(t * h) for t in range(5)), strict=True)
        truth = [float(-25 * p + 48 * q - 36 * r + 16 * s - 3 * t) / (12 * h) for p, q, r, s, t in steps]
        for name, expected in zip(OUTPUTS, truth, strict=True):
            (grad,) = torch.autograd.grad(found[name], inputs[k], retain_graph=True)
            assert float((grad * d).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9), f"d {name} / d {INPUTS[k]}"


@pytest.mark.parametrize("cost, backend", SERVED[:4])
@pytest.mark.parametrize("marginals", MARGINALS)
def test_second_derivatives(marginals, cost, backend):
    """Hessian-vector products of every output against differences of its gradients."""
    penalties, a, b = MARGINALS[marginals]
    directions = [direction(k, z, penalties == KL()) for k, z in enumerate((X, Y, a, b))]

    def grads(z, create_graph=False):
        inputs = leaves(*z)
        found = outputs(solution(cost, backend, penalties, *inputs)).values()
        return inputs, [torch.autograd.grad(each, inputs, create_graph=create_graph, retain_graph=True) for each in found]

    inputs, firsts = grads((X, Y, a, b), create_graph=True)
    at = list(zip((X, Y, a, b), directions, strict=True))
    truth = differences(lambda z: [part for grad in grads(z)[1] for part in grad], at, 5e-4)
    for k, (name, first) in enumerate(zip(OUTPUTS, firsts, strict=True)):
        moved = sum((part * d).sum() for part, d in zip(first, directions, strict=True))
        for i, second in enumerate(torch.autograd.grad(moved, inputs, retain_graph=True)):
            error = (second - truth[4 * k + i]).norm() / truth[4 * k + i].norm()
            assert error < 1e-6, f"d2 {name} / d {INPUTS[i]}: off by {error:.1e}"


def test_the_third_derivative():
    """Solves of the system and of its transpose take turns, to any order."""

    def slope(t, create_graph=True):
        value = solution("matrix", "softmin", KL(0.4), X + t * (Y[:1] - 0.5), Y, A, B).value
        (first,) = torch.autograd.grad(value, t, create_graph=True)
        return torch.autograd.grad(first, t, create_graph=create_graph)[0]

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (third,) = torch.autograd.grad(slope(t), t)
    (truth,) = differences(lambda z: [slope(z[0].requires_grad_()).detach()], [(t.detach(), 1.0)], 1e-3)
    assert float(third) == pytest.approx(float(truth), rel=1e-6)


def test_the_value_takes_no_linear_solve_for_its_gradient(monkeypatch):
    inputs = leaves(X, Y, A, B)
    s = solution("squared", "chunked", KL(), *inputs)
    monkeypatch.setattr(implicit, "_solve", None)
    torch.autograd.grad(s.value, inputs)


def test_hard_marginals_fix_the_gauge():
    s = solution("matrix", "dense", KL(), X, Y, 2 * A, 2 * B)
    assert float((2 * A * s.f).sum() - (2 * B * s.g).sum()) == pytest.approx(0, abs=1e-14)
    plain = solution("matrix", "dense", KL(), X, Y, 2 * A, 2 * B, grad="envelope")
    torch.testing.assert_close(s.plan.to_dense(), plain.plan.to_dense(), rtol=1e-12, atol=1e-16)


def test_coincident_points():
    """Where the distance has no derivative its square does."""
    x = X.clone().requires_grad_()

    def value(x):
        return solution("squared", "dense", KL(), x, X, A, A).value

    assert torch.autograd.gradgradcheck(value, (x,), nondet_tol=1e-9)


@pytest.mark.parametrize("backend", ["softmin", "dense", "chunked"])
def test_batches_have_the_derivatives_of_their_problems(backend):
    """Problems of unlike difficulty side by side, each to its own tolerance; and twice."""
    scale = torch.tensor([1.0, 3.0, 0.3], dtype=torch.float64).view(3, 1, 1)
    x, y = scale * torch.stack([rand(N, D, seed=s) for s in range(3)]), scale * torch.stack([rand(M, D, seed=9 + s) for s in range(3)])
    a, b = (w.expand(3, -1) for w in (A, B))

    def both(x, y, a, b):
        inputs = leaves(x, y, a, b)
        found = outputs(solution("squared", backend, KL(), *inputs)).values()
        grads = torch.autograd.grad(sum(each.sum() for each in found), inputs, create_graph=True)
        return [*grads, *torch.autograd.grad(grads[0].square().sum(), inputs)]

    together = both(x, y, a, b)
    for k in range(3):
        for whole, alone in zip(together, both(x[k], y[k], a[k], b[k]), strict=True):
            torch.testing.assert_close(whole[k], alone, rtol=1e-7, atol=1e-7 * float(alone.abs().max()))


def test_one_cost_for_many_weights():
    C = between("squared", X, Y).requires_grad_()
    a = torch.stack((A, A.flip(0)))

    def plan_of(C, a):
        s = gpu_ot.solve(Problem(C, EPS, a, B), grad="implicit", tol=1e-14)
        return (gradients.plan(s.problem, s.geometry, s.f, s.g) * rand(N, M, seed=7)).sum()

    (together,) = torch.autograd.grad(plan_of(C, a), C)
    apart = sum(torch.autograd.grad(plan_of(C, w), C)[0] for w in a)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)


def test_forbidden_pairs():
    hole = torch.zeros(N, M, dtype=torch.bool)
    hole[0, 2:] = hole[3, 0] = True
    C = between("squared", X, Y)
    d = rand(N, M, seed=30) - 0.5

    def functions(C):
        s = gpu_ot.solve(Problem(C.masked_fill(hole, math.inf), EPS, A, B), grad="implicit", tol=1e-14, max_iter=5000)
        return outputs(s)

    C.requires_grad_()
    found = functions(C)
    truth = differences(lambda z: list(functions(z[0]).values()), [(C.detach(), d)], 1e-3)
    for (name, each), expected in zip(found.items(), truth, strict=True):
        (grad,) = torch.autograd.grad(each, C, retain_graph=True)
        assert grad.isfinite().all() and (grad[hole] == 0).all()
        assert float((grad * d).sum()) == pytest.approx(float(expected), rel=1e-6), name


def test_no_array_of_all_pairs_for_a_streaming_geometry(monkeypatch):
    def refuse(*args):
        raise AssertionError("an n-by-m array was formed")

    monkeypatch.setattr(Chunked, "plan", refuse)
    monkeypatch.setattr(SqEuclidean, "dense", refuse)
    inputs = leaves(X, Y, A, B)
    found = outputs(solution("squared", "chunked", KL(), *inputs), ("value", "f", "plan @ v", "map", "sharp cost"))
    first = torch.autograd.grad(sum(found.values()), inputs, create_graph=True)
    torch.autograd.grad(first[0].square().sum(), inputs)


def test_a_cost_that_cannot_be_differentiated_twice_says_who_can():
    inputs = leaves(X, Y)
    f = solution("formula", "chunked", KL(), *inputs, A, B).f
    with pytest.raises(NotImplementedError, match='backend="dense"'):
        torch.autograd.grad(f[0], inputs, create_graph=True)


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_what_a_solution_offers_carries_the_same_derivatives(backend, grad):
    inputs = leaves(X, Y, A, B)
    s = solution("squared", backend, KL(0.4), *inputs, grad=grad, tol=1e-13)
    at, v, w = (s.problem, s.geometry, s.f, s.g), rand(M, 2, seed=8), rand(N, seed=9)
    P = gradients.plan(*at)
    pairs = {
        "plan": (s.plan.to_dense(), P),
        "plan @ v": (s.plan @ v, P @ v),
        "plan.T @ w": (s.plan.T @ w, P.mT @ w),
        "plan.T": (s.plan.T.to_dense(), P.mT),
        "marginals": (s.plan.sum(-1), P.sum(-1)),
        "mass": (s.transport_mass, P.sum()),
        "map": (s.transport(), P @ inputs[1] / P.sum(-1, keepdim=True)),
        "sharp cost": (s.sharp_cost, (P * between("squared", *inputs[:2])).sum()),
    }
    for name, (found, expected) in pairs.items():
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=name)
        weight = rand(*found.shape, seed=10)
        ours, truth = (torch.autograd.grad((z * weight).sum(), inputs, retain_graph=True) for z in (found, expected))
        for one, other in zip(ours, truth, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)
    assert not s.normalized_entropy.requires_grad


def test_an_envelope_leaves_the_plan_detached():
    s = solution("squared", "dense", KL(), *leaves(X, Y, A, B), grad="envelope")
    assert not any(z.requires_grad for z in (s.f, s.plan @ rand(M), s.plan.to_dense(), s.transport(), s.sharp_cost))


def test_hessian_vector_products_of_torch():
    def value(x):
        return solution("squared", "chunked", KL(), x, Y, A, B).value

    d = rand(N, D, seed=11)
    H = torch.autograd.functional.hessian(value, X).reshape(N * D, N * D)
    torch.testing.assert_close(H, H.T, rtol=1e-9, atol=1e-11)
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        _, found = product(value, X, d)
        torch.testing.assert_close(found.reshape(-1), H @ d.reshape(-1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("penalties", [KL(), KL(0.4)], ids=str)
def test_a_system_that_is_not_solved_raises(penalties):
    C = between("squared", X, Y).requires_grad_()
    problem = Problem(C, EPS, A, B, penalties)
    s = gpu_ot.solve(problem, tol=1e-12)
    f, _ = implicit.potentials(problem, s.geometry, s.f, s.g, limit=1)
    with pytest.raises(NotConverged, match="conjugate-gradient") as told:
        f.square().sum().backward()
    assert "raise eps" in str(told.value)


def test_a_plan_in_two_parts():
    """Two far halves, whose potentials move freely against each other: f has no derivative, and what the freedom does not change has."""
    x, y = torch.cat((X, X + 5)), torch.cat((X + 0.01, X + 5.02))
    C = SqEuclidean(x, y).dense()
    d = rand(2 * N, 2 * N, seed=30) - 0.5

    def functions(C):
        return outputs(gpu_ot.solve(Problem(C, EPS), grad="implicit", tol=1e-14, max_iter=3000), ("f", "value", "plan", "sharp cost"))

    f, *others = functions(C.requires_grad_()).values()
    with pytest.raises(NotConverged, match="falls into parts"):
        torch.autograd.grad(f, C, retain_graph=True)
    _, *truth = differences(lambda z: list(functions(z[0]).values()), [(C.detach(), d)], 1e-3)
    for each, expected in zip(others, truth, strict=True):
        (grad,) = torch.autograd.grad(each, C, retain_graph=True)
        assert float((grad * d).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_what_does_not_depend_on_anything_has_no_derivative():
    """The mass of the plan between hard marginals: the system's right-hand side is rounding and nothing else."""
    inputs = leaves(X, Y)
    for penalties, cost in ((KL(), "matrix"), (KL(), "squared")):
        s = solution(cost, "dense", penalties, *inputs, A, B)
        mass = gradients.plan(s.problem, s.geometry, s.f, s.g).sum()
        assert all(grad.abs().max() < 1e-13 for grad in torch.autograd.grad(mass, inputs))


def test_adding_to_rows_of_the_cost_adds_to_f():
    """An identity that holds at any eps: what C + t 1^T does is known, so the rows of the gradient sum to the cotangent in the gauge."""
    x, y = rand(30, 2, seed=1), rand(25, 2, seed=2)
    C = SqEuclidean(x, y).dense().requires_grad_()
    F = rand(30, seed=5)
    s = gpu_ot.solve(Problem(C, 3e-3), grad="implicit", tol=1e-12, max_iter=20_000)
    (grad,) = torch.autograd.grad((s.f * F).sum(), C)
    torch.testing.assert_close(grad.sum(1), F - s.problem.a * F.sum() / 2, rtol=1e-6, atol=1e-9)


def test_unconverged_potentials_are_said_to_be():
    C = between("squared", X, Y).requires_grad_()
    s = gpu_ot.solve(Problem(C, 0.01, A, B), grad="implicit", tol=1e-12, max_iter=3)
    with pytest.warns(RuntimeWarning, match=r"exact at convergence.*max_iter"):
        s.f.square().sum().backward()
    converged = gpu_ot.solve(Problem(C, EPS, A, B), grad="implicit", tol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converged.f.square().sum().backward()


@pytest.mark.parametrize("backend", ["softmin", "dense"])
@pytest.mark.parametrize("output", ["value", "f", "plan @ v", "sharp cost"])
def test_single_precision(output, backend):
    """Within 1e-3 of float64 at 1 % of the costs' deviation."""
    x, y = rand(40, 3, seed=1), rand(35, 3, seed=2)
    C = SqEuclidean(x, y).dense()
    eps = 0.01 * float(C.std())
    grads = []
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = C.to(dtype).requires_grad_()
        s = gpu_ot.solve(Problem(given, eps), backend=backend, grad="implicit", tol=tol, max_iter=50_000)
        grads.append(torch.autograd.grad(outputs(s, (output,))[output], given)[0].double())
    assert (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()
