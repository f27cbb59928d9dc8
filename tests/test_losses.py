"""SamplesLoss against geomloss and against differences, SinkhornLoss against the plan, and what surrounds a loss in training."""

import contextlib
import io
import math

import pytest
import torch

from problems import first, leaves, measures, rand, randn, second

with contextlib.redirect_stdout(io.StringIO()):  # greets on stdout through KeOps
    import geomloss

from gpu_ot import KL, Cosine, Formula, Problem, ProblemError, SqEuclidean
from gpu_ot.losses import samples as losses_room
from gpu_ot.losses.samples import SamplesLoss
from gpu_ot.losses.sinkhorn import SinkhornLoss
from gpu_ot.solve import solve


def samples(n=30, m=25, d=3, batch=(), dtype=torch.float64):
    """(a, x, b, y): clouds in overlapping unit cubes, weights of mass 1."""
    x, y, a, b = measures(n, m, d, batch, shift=0.2)
    return [z.to(dtype) for z in (a / a.sum(-1, keepdim=True), x, b / b.sum(-1, keepdim=True), y)]


def centred(grad):
    return grad - grad.mean(-1, keepdim=True)


def distances(x, y):
    """geomloss's own |x - y|, which is never below 1e-4: its p=1 is not quite a distance."""
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).clamp(min=1e-8).sqrt()


# geomloss ends where its schedule does, with an error that falls like 1 - scaling: for 1e-4 in the gradients it takes .999 and a wide blur.
SCHEDULE = dict(scaling=0.999)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_balanced_values_and_gradients_are_geomlosss(p, debias, batch):
    tensors = leaves(*samples(batch=batch))
    ground = dict(cost=distances) if p == 1 else {}
    theirs = geomloss.SamplesLoss(p=p, blur=0.5, debias=debias, **SCHEDULE)(*tensors)
    ours = SamplesLoss(p=p, blur=0.5, debias=debias, tol=1e-7, **ground)(*tensors)
    assert ours.shape == theirs.shape == batch
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for k, (g, e) in enumerate(zip(*(torch.autograd.grad(z.sum(), tensors) for z in (ours, theirs)), strict=True)):
        g, e = (g, e) if k % 2 else (centred(g), centred(e))  # in the weights up to a constant
        assert (g - e).norm() <= 1e-4 * e.norm(), "axby"[k]


def test_default_arguments_and_potentials_are_geomlosss():
    a, x, b, y = samples()
    for arguments in ((x, y), (a, x, b, y), (a[:, None], x, b[:, None], y)):
        theirs, ours = (library(blur=0.5, potentials=True, **SCHEDULE)(*arguments) for library in (geomloss.SamplesLoss, SamplesLoss))
        for z, w in zip(ours, theirs, strict=True):
            assert z.shape == (z.numel(),)  # geomloss leaves its own batch axis in front
            torch.testing.assert_close(centred(z), centred(w.view_as(z)), rtol=0, atol=1e-4)
    theirs, ours = (library(blur=0.3)(x, y) for library in (geomloss.SamplesLoss, SamplesLoss))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_reach(p, debias):
    """Values are geomloss's, to what its schedule leaves: there they are not stationary in the potentials. Gradients are the derivatives
    of the value, which geomloss's are not (0.80 of them, measured), so they are held to central differences and not to
    geomloss's. Masses of 1: for others, without debiasing, eps KL(P | a⊗b) counts a mass that geomloss leaves out."""
    tensors = samples(5, 4, 2)
    ground = dict(cost=distances) if p == 1 else {}
    settings = dict(p=p, blur=0.4, reach=0.7, debias=debias)
    theirs = geomloss.SamplesLoss(**settings, scaling=0.9995)(*tensors)
    torch.testing.assert_close(SamplesLoss(**settings, **ground)(*tensors), theirs, rtol=5e-5, atol=0)
    loss = SamplesLoss(**settings, tol=1e-11)
    assert torch.autograd.gradcheck(loss, leaves(*tensors), atol=1e-8, rtol=1e-6, nondet_tol=1e-10)


def test_unequal_masses_and_empty_atoms():
    a, x, b, y = samples(12, 10, 2)
    a[:3] = 0
    loss = SamplesLoss(blur=0.2, reach=0.5, tol=1e-10)
    torch.testing.assert_close(loss(a, x, 2 * b, y), loss(a[3:], x[3:], 2 * b, y))
    theirs = geomloss.SamplesLoss(blur=0.2, reach=0.5, scaling=0.999)(a[3:], x[3:], 2 * b, y)
    torch.testing.assert_close(loss(a, x, 2 * b, y), theirs, rtol=1e-4, atol=0)
    balanced = SamplesLoss(blur=0.2)
    with pytest.raises(ProblemError, match="Normalise"):
        balanced(a, x, 2 * b, y)
    scaled = balanced(5 * a, x, 5 * a.sum() * b, y)  # masses of 5, as long as they are the same
    assert float(scaled) > 0
    grads = torch.autograd.grad(loss(*(tensors := leaves(a, x, 2 * b, y))), tensors)
    assert all(g.isfinite().all() for g in grads) and (grads[1][:3] == 0).all()


@pytest.mark.parametrize("backend", ["auto", "tensorized", "online", "multiscale", "dense", "chunked"])
@pytest.mark.parametrize("p", [1, 2])
def test_backends_go_by_geomlosss_names(backend, p):
    truth, found = (SamplesLoss(p=p, blur=0.1, tol=1e-9, backend=name) for name in ("softmin", backend))
    torch.testing.assert_close(found(*samples()), truth(*samples()), rtol=1e-9, atol=0)
    torch.testing.assert_close(first(found, samples()), first(truth, samples()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_costs_of_ones_own(batch):
    """A function of both clouds, with the batch axis that geomloss gives it; and a kind of Cost, by itself or from a function."""
    tensors, seen = samples(batch=batch), []

    def half_squares(x, y):
        seen.append(x.ndim)
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) / 2

    for costs in ((half_squares, None), (lambda x, y: 0.5 * SqEuclidean(x, y), None), (lambda x, y: Cosine(x, y), Cosine)):
        found, truth = (SamplesLoss(blur=0.3, cost=cost, backend="online", tol=1e-9) for cost in costs)
        torch.testing.assert_close(found(*tensors), truth(*tensors), rtol=1e-9, atol=0)
        grads = (first(lambda *z, loss=loss: loss(*z).sum(), tensors) for loss in (found, truth))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
    assert set(seen) == {3}


def test_the_plan_comes_along():
    a, x, b, y = samples()
    value, plan = SamplesLoss(blur=0.2, plan=True)(a, x, b, y)
    F, G, same = SamplesLoss(blur=0.2, plan=True, potentials=True)(a, x, b, y)
    assert value.ndim == 0 and F.shape == a.shape and G.shape == b.shape
    torch.testing.assert_close(plan.marginals[0], a, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(plan.to_dense(), same.to_dense())


@pytest.mark.parametrize("how", ["lengths", "mask"])
@pytest.mark.parametrize("weighted", [True, False])
def test_ragged_batches(how, weighted):
    """Each problem as if alone, whatever lies in the padding, and far off centre; no gradient for the padding."""
    a, x, b, y = samples(8, 6, 2, batch=(3,), dtype=torch.float32)
    x, y = x + 1000, y + 1000
    counts = torch.tensor([8, 3, 1]), torch.tensor([2, 6, 5])
    flags = [torch.arange(z.shape[1]) < count[:, None] for z, count in zip((x, y), counts, strict=True)]
    a, b = ((w := torch.where(flag, z, 0)) / w.sum(-1, keepdim=True) for z, flag in zip((a, b), flags, strict=True))
    given = [torch.where(flag, z, torch.nan).requires_grad_() for z, flag in ((a, flags[0]), (b, flags[1]))]
    points = [torch.where(flag[..., None], z, torch.nan).requires_grad_() for z, flag in zip((x, y), flags, strict=True)]
    arguments = (given[0], points[0], given[1], points[1]) if weighted else points
    loss = SamplesLoss(blur=0.3, tol=1e-6)
    value = loss(*arguments, **{how: counts if how == "lengths" else flags})
    grads = torch.autograd.grad(value.sum(), points)
    for k, (n, m) in enumerate(zip(*counts, strict=True)):
        alone = [z.requires_grad_() for z in (x[k, :n].clone(), y[k, :m].clone())]
        one = loss(a[k, :n], alone[0], b[k, :m], alone[1]) if weighted else loss(*alone)
        torch.testing.assert_close(value[k], one, rtol=1e-4, atol=1e-6)
        for g, e, size in zip(grads, torch.autograd.grad(one, alone), (n, m), strict=True):
            torch.testing.assert_close(g[k, :size], e, rtol=1e-3, atol=1e-5)
            assert (g[k, size:] == 0).all()


def test_a_static_target_is_solved_once(monkeypatch):
    a, x, b, y = samples()
    loss, plain = SamplesLoss(blur=0.1, static_y=True), SamplesLoss(blur=0.1)
    reused, calls, divergence = [], [], losses_room.divergence
    monkeypatch.setattr(losses_room, "divergence", lambda *z, **k: calls.append(k["self_b"]) or divergence(*z, **k))
    for step in range(3):
        p = (x + 0.1 * step).requires_grad_()
        calls.clear()
        values = [loss(a, p, b, y)]
        reused += calls
        values.append(plain(a, p, b, y))
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(*(torch.autograd.grad(v, p)[0] for v in values))
    assert [z is None for z in reused] == [True, False, False]
    y += 0.5  # in place: another target
    torch.testing.assert_close(loss(a, x, b, y), plain(a, x, b, y))
    loss.blur = plain.blur = 0.2
    torch.testing.assert_close(loss(a, x, b, y), plain(a, x, b, y))
    with torch.inference_mode():
        torch.testing.assert_close(loss(a, x, b, y.clone()), plain(a, x, b, y))
    with pytest.raises(ProblemError, match="static_y"):
        loss(a, x, b, y.clone().requires_grad_())


@pytest.mark.parametrize("p, scale", [(1, 2.0**-40), (2, 2.0**-40), (2, 2.0**50), (2, 1e-15), (1, 1e12)])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_units(p, scale, reach):
    """In float32, where squares of such lengths leave the range: the loss scales like a length to the power p, its gradient likewise."""
    a, x, b, y = samples(dtype=torch.float32)
    values, grads = [], []
    for unit in (1.0, scale):
        z = (x * unit).requires_grad_()
        loss = SamplesLoss(p=p, blur=0.1 * unit, reach=reach and reach * unit, precision=None)(a, z, b, y * unit)
        (grad,) = torch.autograd.grad(loss * scale**-p if unit == scale else loss, z)
        values.append(loss.double() / unit**p)
        grads.append(grad.double() * (unit if unit == scale else 1))
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[0].norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    tensors = leaves(*(z.to(dtype) for z in samples()))
    truth = leaves(*(z.detach().double() for z in tensors))
    truth[2] = (truth[2] * (truth[0].sum() / truth[2].sum())).detach().requires_grad_()  # equal masses, but for the rounding of halves
    ours, exact = SamplesLoss(blur=0.1)(*tensors), SamplesLoss(blur=0.1)(*truth)
    assert ours.dtype == dtype
    assert abs(ours.detach().double() - exact.detach()) <= 2 * torch.finfo(dtype).eps * exact.detach()
    for k in (1, 3):
        (g,), (e,) = (torch.autograd.grad(z, w[k], retain_graph=True) for z, w in ((ours, tensors), (exact, truth)))
        assert g.dtype == dtype and (g.double() - e).norm() <= 3 * torch.finfo(dtype).eps * e.norm()


def test_precision():
    tensors = samples(dtype=torch.float32)
    exact = SamplesLoss(blur=0.05, tol=1e-9)(*(z.double() for z in tensors))
    tensors[2] = tensors[2] * (tensors[0].sum() / tensors[2].sum())
    found = SamplesLoss(blur=0.05, tol=1e-9, precision=torch.float64)(*tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_not_converging_is_said(capsys):
    a, x, b, y = samples()
    with pytest.warns(RuntimeWarning, match=r"SamplesLoss.*max_iter") as first:
        SamplesLoss(blur=0.01, max_iter=1)(a, x, b, y)
    with pytest.warns(RuntimeWarning, match=r"SinkhornLoss.*max_iter") as second:
        SinkhornLoss(1e-4, max_iter=1)(x, y)
    assert first[0].filename == second[0].filename == __file__  # where the loss was called
    SamplesLoss(blur=0.1, verbose=True)(a, x, b, y)
    assert "converged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        *((dict(loss="gaussian"), 'geomloss.SamplesLoss("gaussian")'), (dict(loss="energy"), "not optimal transport")),
        *((dict(loss="hausdorff"), "geomloss"), (dict(loss="sinkhorn2"), "sinkhorn2")),
        (dict(p=3), "p must be 1 or 2, found 3"),
        (dict(blur=0), "blur must be a length"),
        (dict(reach=-1.0), "reach must be a length"),
        (dict(cost="SqDist(X,Y)"), "not callable"),
    ],
)
def test_arguments_without_meaning_raise(arguments, says):
    with pytest.raises(ValueError) as raised:
        SamplesLoss(**arguments)
    assert says in str(raised.value)


def test_calls_without_meaning_raise():
    a, x, b, y = samples()
    loss, labels = SamplesLoss(), torch.zeros(30, dtype=torch.long)
    for arguments, named, says in [
        ((labels, a, x, labels, b, y), {}, "nothing is clustered"),
        ((a, x, y), {}, "found 3 arguments"),
        ((x, y[None]), {}, "y has shape"),
        ((x, y[:, :2]), {}, "y has shape"),
        ((x[0], y[0]), {}, "x has shape"),
        ((x.numpy(), y), {}, "x must be a tensor"),
        ((b, x, b, y), {}, "weights of x"),
        ((x, y), dict(lengths=(torch.tensor(3), None), mask=(None, None)), "`lengths` or `mask`"),
        ((x, y), dict(mask=(torch.ones(30), None)), "mask of x"),
        ((x, y), dict(lengths=(torch.tensor([3]), None)), "lengths of x"),
    ]:
        with pytest.raises(ValueError) as raised:
            loss(*arguments, **named)
        assert says in str(raised.value)
    with pytest.raises(ValueError, match="cost"):
        SamplesLoss(cost=lambda x, y: None)(x, y)


class TestTransforms:
    """torch.func and torch.compile see one opaque operation and its first derivative."""

    @pytest.fixture
    def case(self):
        _, x, _, y = samples(12, 9, 2, batch=(4,))
        loss = SamplesLoss(blur=0.2, reach=1.0, tol=1e-9)
        x.requires_grad_()
        value = loss(x, y)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return loss, x.detach(), y, value.detach(), grad

    def test_vmap_and_grad(self, case):
        loss, x, y, value, grad = case
        torch.testing.assert_close(torch.vmap(loss)(x, y), value)
        torch.testing.assert_close(torch.func.grad(lambda z: loss(z, y).sum())(x), grad)
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x, y), grad)
        one_side = torch.vmap(loss, in_dims=(0, None))(x, y[0])
        torch.testing.assert_close(one_side, torch.stack([loss(z, y[0]) for z in x]))
        twice = torch.vmap(loss)(x.unflatten(0, (2, 2)), y.unflatten(0, (2, 2)))
        torch.testing.assert_close(twice.flatten(), value)
        jacobian = torch.func.jacrev(loss)(x, y)
        torch.testing.assert_close(jacobian[range(4), range(4)], grad)

    def test_gradients_in_the_weights(self, case):
        loss, x, y, *_ = case
        tensors = rand(12) + 0.1, x[0], rand(9) + 0.1, y[0]
        torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors), first(loss, tensors))

    @pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("debias", [True, False])
    def test_compile(self, case, compiler, debias):
        loss, x, y, *_ = case
        loss.debias = debias
        x.requires_grad_()
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, y: loss(2 * x, y).square().sum(), fullgraph=True, backend=compiler)
        value, truth = compiled(x, y), loss(2 * x, y).square().sum()
        torch.testing.assert_close(value, truth)
        torch.testing.assert_close(*(torch.autograd.grad(z, x)[0] for z in (value, truth)))

    def test_what_they_cannot_do_they_say(self, case):
        loss, x, y, *_ = case
        with pytest.raises(NotImplementedError, match="first derivatives"):
            torch.func.grad(lambda z: torch.func.grad(loss)(z, y[0]).sum())(x[0])
        with pytest.raises(ProblemError, match=r"torch\.compile"):
            torch.vmap(SamplesLoss(plan=True))(x, y)
        with pytest.raises(ProblemError, match="implicit"):
            torch.func.grad(SamplesLoss(grad="implicit"))(x[0], y[0])


@pytest.mark.parametrize("debias", [True, False])
def test_implicit_gradients(debias):
    """Second derivatives, to differences."""
    _, x, _, y = samples(6, 5, 2)
    for loss in (SamplesLoss(blur=0.3, debias=debias, grad="implicit", tol=1e-12), SinkhornLoss(0.1, grad="implicit", tol=1e-12)):
        assert torch.autograd.gradgradcheck(lambda x: loss(x, y), leaves(x), atol=1e-7, nondet_tol=1e-9, fast_mode=True)  # noqa: B023


@pytest.mark.parametrize("tau", [None, 0.5, (math.inf, 0.2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sinkhorn_loss(tau, reduction):
    a, x, b, y = samples(batch=(3,))
    pair = tau if isinstance(tau, tuple) else (tau or math.inf,) * 2
    truth = solve(Problem(SqEuclidean(x, y), 0.1, a, b, tuple(KL(t) for t in pair))).value
    loss = SinkhornLoss(0.1, tau, reduction=reduction)
    for arguments in ((x, y), (SqEuclidean(x, y),), (SqEuclidean(x, y).dense(),)):
        found = loss(*arguments, a=a, b=b)
        torch.testing.assert_close(found, truth if reduction == "none" else getattr(truth, reduction)())


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("tau", [None, 0.3])
def test_with_the_plan_held(backend, tau):
    """sum_ij P_ij C_ij, P constant: its gradient in the costs is the plan, and in the points that of the costs under it."""
    a, x, b, y = samples(batch=(2,))
    loss = SinkhornLoss(0.05, tau, reduction="none", detach_plan=True, backend=backend)
    P = solve(Problem(SqEuclidean(x, y), 0.05, a, b, KL(tau or math.inf))).plan.to_dense()

    def truth(x, y):
        return (P * SqEuclidean(x, y).dense()).sum((-1, -2))

    torch.testing.assert_close(loss(x, y, a, b), truth(x, y), rtol=1e-9, atol=1e-12)
    grads = (first(lambda *z, f=f: f(*z).sum(), (x, y)) for f in (lambda *z: loss(*z, a, b), truth))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    if backend == "auto":
        torch.testing.assert_close(first(lambda M: loss(M, a=a, b=b).sum(), [SqEuclidean(x, y).dense()])[0], P)


def test_sinkhorn_loss_refuses():
    x, y = rand(2, 3, 2)
    for says, call in (
        ("reduction", lambda: SinkhornLoss(0.1, reduction="max")),
        ("eps", lambda: SinkhornLoss(0.0)(rand(3, 3))),
        ("leave y out", lambda: SinkhornLoss(0.1)(SqEuclidean(x, y), y)),
        ("x must be a tensor", lambda: SinkhornLoss(0.1)(x.numpy(), y)),
    ):
        with pytest.raises(ProblemError, match=says):
            call()
    loss = SinkhornLoss(0.1, cost=lambda x, y: Formula(lambda x, y: (x - y).abs().sum(-1), x, y), detach_plan=True, backend="chunked")
    with pytest.raises(NotImplementedError, match="second derivatives"):
        second(loss, (x, y), x)


@pytest.mark.parametrize("cost", [SqEuclidean, lambda x, y: 0.5 * SqEuclidean(x, y) + Cosine(x, y)])
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_second_derivatives_with_the_plan_held(backend, cost):
    """Those of sum_ij P_ij C_ij with P constant, which the points have where the cost folds; and of a function of the loss."""
    a, x, b, y = samples(6, 5, 2)
    P = solve(Problem(cost(x, y), 0.1, a, b), backend=backend).plan.to_dense()
    loss = SinkhornLoss(0.1, cost=cost, detach_plan=True, backend=backend)
    both = (lambda x, y: loss(x, y, a, b).sin()), (lambda x, y: (P * cost(x, y).dense()).sum().sin())
    torch.testing.assert_close(*(second(f, (x, y), randn(*x.shape)) for f in both), rtol=1e-8, atol=1e-11)
    M, loss = SqEuclidean(x, y).dense(), SinkhornLoss(0.1, detach_plan=True)
    P = solve(Problem(M, 0.1, a, b)).plan.to_dense()
    both = (lambda M: loss(M, a=a, b=b).sin()), (lambda M: (P * M).sum().sin())
    torch.testing.assert_close(*(second(f, (M,), P) for f in both), rtol=1e-9, atol=1e-12)
