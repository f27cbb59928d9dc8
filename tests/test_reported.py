"""What users of other packages reported about torch's modes, types and batches, and about neighbours: doors x situations."""

import contextlib
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import gpu_ot
from gpu_ot import KL, Problem, SamplesLoss, SinkhornLoss, SqEuclidean
from gpu_ot.geometry import keops
from gpu_ot.pot import patching
from problems import close, leaves, rand

#: (x (n, d), y (m, d)) -> a result. What is differentiable is so in x and y.
DOORS = {
    "sinkhorn": lambda x, y: gpu_ot.sinkhorn([], [], SqEuclidean(x, y).dense(), 1.0),
    "sinkhorn2": lambda x, y: gpu_ot.sinkhorn2([], [], SqEuclidean(x, y).dense(), 1.0),
    "sinkhorn, log": lambda x, y: gpu_ot.sinkhorn([], [], SqEuclidean(x, y).dense(), 1.0, method="sinkhorn_log", log=True)[1]["log_u"],
    "sinkhorn_unbalanced": lambda x, y: gpu_ot.sinkhorn_unbalanced([], [], SqEuclidean(x, y).dense(), 1.0, 1.0),
    "sinkhorn_unbalanced2": lambda x, y: gpu_ot.sinkhorn_unbalanced2([], [], SqEuclidean(x, y).dense(), 1.0, 1.0, returnCost="total"),
    "solve": lambda x, y: gpu_ot.pot.solve(SqEuclidean(x, y).dense(), reg=1.0).value,
    "solve_sample": lambda x, y: gpu_ot.solve_sample(x, y, reg=1.0).value,
    "solve_sample, envelope": lambda x, y: gpu_ot.solve_sample(x, y, reg=1.0, grad="envelope").value,
    "solve_sample, relaxed": lambda x, y: gpu_ot.solve_sample(x, y, reg=1.0, unbalanced=1.0, grad="envelope").value,
    "solve_sample, lazy": lambda x, y: gpu_ot.solve_sample(x, y, reg=1.0, lazy=True).value_linear,
    "solve_sample, cosine": lambda x, y: gpu_ot.solve_sample(x, y, reg=0.1, metric="cosine").value,
    "solve_sample, debiased": lambda x, y: gpu_ot.solve_sample(x, y, reg=1.0, debias=True).value,
    "empirical_sinkhorn": lambda x, y: gpu_ot.empirical_sinkhorn(x, y, 1.0),
    "empirical_sinkhorn2": lambda x, y: gpu_ot.empirical_sinkhorn2(x, y, 1.0),
    "empirical_sinkhorn2, lazy": lambda x, y: gpu_ot.empirical_sinkhorn2(x, y, 1.0, isLazy=True),
    "empirical_sinkhorn_divergence": lambda x, y: gpu_ot.empirical_sinkhorn_divergence(x, y, 1.0),
    "solve_sample_batch": lambda x, y: gpu_ot.solve_sample_batch(x[None], y[None], 1.0).value,
    "solve_sample_batch, linear": lambda x, y: gpu_ot.solve_sample_batch(x[None], y[None], 1.0).value_linear,
    "dist": lambda x, y: gpu_ot.dist(x, y),
    "dist, euclidean": lambda x, y: gpu_ot.dist(x, y, metric="euclidean"),
    "dist, cityblock": lambda x, y: gpu_ot.dist(x, y, metric="cityblock"),
    "dist, cosine": lambda x, y: gpu_ot.dist(x, y, metric="cosine"),
    "dist_batch": lambda x, y: gpu_ot.dist_batch(x[None], y[None]),
    "dist_batch, kl": lambda x, y: gpu_ot.dist_batch(x[None].abs() + 0.1, y[None].abs() + 0.1, metric="kl"),
    "Problem": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 1.0)).value,
    "Problem, chunked": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 1.0), backend="chunked").value,
    "Problem, cosine": lambda x, y: gpu_ot.solve(Problem(gpu_ot.Cosine(x, y), 0.1)).value,
    "Problem, implicit": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 1.0), grad="implicit", tol=1e-7).sharp_cost,
    "Problem, unroll": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 1.0), grad="unroll", accelerate="none").plan.to_dense(),
    "Problem, held": lambda x, y: gpu_ot.solve(Problem(gpu_ot.Cosine(x, y), 0.1)).held_cost,
    "plan @ v": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 1.0)).plan @ torch.ones(len(y), 2),
    "plan rows": lambda x, y: gpu_ot.solve(Problem(gpu_ot.Cosine(x, y), 0.1)).plan[:2],
    "plan diagonal": lambda x, y: gpu_ot.solve(Problem(gpu_ot.Cosine(x, y), 0.1)).plan.diagonal(),
    "transport": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 1.0)).transport(),
    "transport of others": lambda x, y: gpu_ot.solve(Problem(gpu_ot.Cosine(x, y), 0.1)).transport(x),
    "potential_a": lambda x, y: gpu_ot.solve(Problem(gpu_ot.Cosine(x, y), 0.1)).potential_a(x),
    "SamplesLoss": lambda x, y: SamplesLoss(blur=0.5)(x, y),
    "SamplesLoss, batch": lambda x, y: SamplesLoss(blur=0.5)(x[None], y[None]),
    "SamplesLoss, cosine": lambda x, y: SamplesLoss(blur=0.3, cost=gpu_ot.Cosine)(x, y),
    "SinkhornLoss": lambda x, y: SinkhornLoss(1.0)(x, y),
    "SinkhornLoss, held": lambda x, y: SinkhornLoss(1.0, detach_plan=True)(x, y),
    "self_term": lambda x, y: gpu_ot.self_term(gpu_ot.Cosine(x, x), 0.1).value,
}


def points(dtype=torch.float32, n=12, m=9, d=5):
    return rand(n, d, seed=1).to(dtype), (rand(m, d, seed=2) + 0.3).to(dtype)


def with_gradients(door, x, y):
    """The result, and the derivatives of a number made of it."""
    asked = leaves(x, y)
    out = door(*asked)
    if not out.requires_grad:
        return [out]
    return [out.detach(), *(g for g in torch.autograd.grad(out.double().square().sum(), asked, allow_unused=True) if g is not None)]


@pytest.mark.parametrize("door", DOORS)
def test_autocast_reaches_no_door_forward_or_backward(door):
    """Bit for bit what they are without, `backward` within as well."""
    x, y = points()
    apart = with_gradients(DOORS[door], x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = with_gradients(DOORS[door], x, y)
    for one, other in zip(within, apart, strict=True):
        assert one.dtype == other.dtype
        close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_halves_are_solved_in_float32_at_every_door(door, dtype):
    """Results have the type of the points, or of float64 potentials, and are the truth for these points, rounded once."""
    x, y = points(dtype)
    ours = with_gradients(DOORS[door], x, y)
    truth = with_gradients(DOORS[door], x.double(), y.double())
    rough = "SqEuclidean(x, y).dense()" in door or door in (
        "sinkhorn",
        "sinkhorn2",
        "sinkhorn, log",
        "sinkhorn_unbalanced",
        "sinkhorn_unbalanced2",
        "solve",
    )
    digit = torch.finfo(dtype).eps * (8 if rough else 1)  # there the costs themselves are halves
    assert ours[0].dtype in (dtype, torch.float64)
    for one, other in zip(ours, truth, strict=True):
        scale = float(other.abs().max())
        close(one.double(), other.double(), rtol=0, atol=4 * digit * max(scale, 1e-3) + 2e-3 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_beside_half_points(dtype):
    x, y = points(dtype)
    a, b = (rand(k, seed=k) + 0.2 for k in (len(x), len(y)))
    a, b = ((w / w.sum()).to(dtype) for w in (a, b))  # of masses that differ by the rounding of halves
    for call in (
        lambda x, y, a, b: gpu_ot.solve_sample(x, y, a, b, reg=1.0).value_linear,
        lambda x, y, a, b: gpu_ot.empirical_sinkhorn2(x, y, 1.0, a, b),
        lambda x, y, a, b: gpu_ot.solve_sample_batch(x[None], y[None], 1.0, a[None], b[None]).value_linear,
    ):
        wide = b.double() * (a.double().sum() / b.double().sum())
        close(call(x, y, a, b).double(), call(x.double(), y.double(), a.double(), wide), rtol=3 * torch.finfo(dtype).eps)


# torch.compile.

MODES = {
    "train": contextlib.nullcontext,
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
COMPILED = {
    "SamplesLoss": (SamplesLoss(blur=0.3), True),
    "SamplesLoss, not debiased": (SamplesLoss(blur=0.3, debias=False), True),
    "SamplesLoss, potentials": (SamplesLoss(blur=0.3, potentials=True), True),
    "SinkhornLoss": (SinkhornLoss(0.1), False),
    "SinkhornLoss, held": (SinkhornLoss(0.1, detach_plan=True), False),
    "solve": (lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1)).value, False),
    "solve, plan": (lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1)).plan.to_dense(), False),
    "divergence": (lambda x, y: gpu_ot.divergence(Problem(SqEuclidean(x, y), 0.1)).value, False),
    "sinkhorn": (lambda x, y: gpu_ot.sinkhorn([], [], torch.cdist(x, y), 0.1), False),
    "sinkhorn2": (lambda x, y: gpu_ot.sinkhorn2([], [], SqEuclidean(x, y).dense(), 0.1), False),
    "sinkhorn_unbalanced": (lambda x, y: gpu_ot.sinkhorn_unbalanced([], [], torch.cdist(x, y), 0.1, 1.0), False),
    "solve_sample": (lambda x, y: gpu_ot.solve_sample(x, y, reg=0.1).value, False),
    "solve_sample_batch": (lambda x, y: gpu_ot.solve_sample_batch(x[None], y[None], 0.1).value, False),
}
#: One for each way of asking which derivatives are wanted; the others share one of these.
EVERY_MODE = ("SamplesLoss", "solve", "sinkhorn2")
#: What is traced for a second each goes through the same as "solve" and "sinkhorn2".
LONG = ("solve, plan", "divergence", "solve_sample", "sinkhorn")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "door, mode",
    [
        pytest.param(door, mode, marks=[pytest.mark.slow] if mode != "train" or door in LONG else [])
        for door in COMPILED
        for mode in MODES
        if door in EVERY_MODE or mode in ("train", "no_grad")
    ],
)
def test_compiled_doors_train_and_validate(door, mode):
    function, whole = COMPILED[door]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=whole)
    x, y = points(n=40, m=30, d=3)
    x = x.requires_grad_(mode == "train")
    found = []
    for call in (compiled, function):
        with MODES[mode]():
            out = call(x, y)
        outs = out if isinstance(out, tuple) else (out,)
        slope = torch.autograd.grad(outs[0].square().sum(), x)[0] if outs[0].requires_grad else torch.zeros(1)
        found.append([*(z.detach() for z in outs), slope])
    for one, other in zip(*found, strict=True):
        close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_a_training_loop_validates_between_its_steps():
    """One compiled loss through train, no_grad, train again."""
    torch._dynamo.reset()
    loss, (x, y) = torch.compile(SamplesLoss(blur=0.3), backend="eager", fullgraph=True), points(n=20, m=15)
    right = SamplesLoss(blur=0.3)(x, y)
    for _ in range(2):
        asked = x.clone().requires_grad_()
        value = loss(asked, y)
        assert torch.autograd.grad(value, asked)[0].abs().sum() > 0
        with torch.no_grad():
            close(loss(x, y), right, rtol=1e-6)
        with torch.inference_mode():
            close(loss(x, y), right, rtol=1e-6)
    close(torch.compile(torch.func.vmap(lambda z: loss(z, y)), backend="eager")(torch.stack((x, x)))[1], right, rtol=1e-6)


# A batch of no problems.

NONE = {
    "Problem": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1)).value,
    "Problem, matrix": lambda x, y: gpu_ot.solve(Problem(x @ y.mT, 0.1)).value,
    "Problem, relaxed": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1, penalties=KL(1.0))).value,
    "Problem, f": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1), grad="implicit").f.sum(-1),
    "Problem, unroll": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1), grad="unroll").plan.to_dense().sum((-1, -2)),
    "Problem, weights": lambda x, y: gpu_ot.solve(Problem(SqEuclidean(x, y), ("std", 0.1), x.new_ones(4) / 4)).value,
    "divergence": lambda x, y: gpu_ot.divergence(Problem(SqEuclidean(x, y), 0.1)).value,
    "SamplesLoss": lambda x, y: SamplesLoss()(x, y),
    "SamplesLoss, not debiased": lambda x, y: SamplesLoss(debias=False)(x, y),
    "SamplesLoss, relaxed": lambda x, y: SamplesLoss(reach=1.0)(x, y),
    "SamplesLoss, cost": lambda x, y: SamplesLoss(cost=gpu_ot.Cosine)(x, y),
    "SinkhornLoss, none": lambda x, y: SinkhornLoss(0.1, reduction="none")(x, y),
    "solve_batch": lambda x, y: gpu_ot.solve_batch(x @ y.mT, 0.1).value,
    "solve_batch, linear": lambda x, y: gpu_ot.solve_batch(x @ y.mT, 0.1).value_linear,
    "solve_batch, unrolled": lambda x, y: gpu_ot.solve_batch(x @ y.mT, 0.1, grad="autodiff").plan.sum((-1, -2)),
    "solve_sample_batch": lambda x, y: gpu_ot.solve_sample_batch(x, y, 0.1).value,
    "dist_batch": lambda x, y: gpu_ot.dist_batch(x, y).sum((-1, -2)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("door", NONE)
def test_a_batch_of_no_problems_has_an_empty_result_and_a_gradient(door, dtype):
    x, y = (torch.zeros(0, n, 3, dtype=dtype, requires_grad=True) for n in (4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = NONE[door](x, y)
    assert out.shape == (0,)
    for grad in torch.autograd.grad(out.sum(), (x, y), allow_unused=True):
        assert grad is None or grad.shape in ((0, 4, 3), (0, 5, 3))
    assert out.requires_grad


def test_no_problems_in_other_shapes():
    x, y = torch.zeros(0, 4, 3, requires_grad=True), torch.zeros(0, 5, 3)
    for reduction in ("mean", "sum"):
        out = SinkhornLoss(0.1, reduction=reduction)(x, y)
        assert out == 0 and torch.autograd.grad(out, x)[0].shape == x.shape
    found = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.1))
    assert found.f.shape == (0, 4) and found.g.shape == (0, 5) and found.converged.shape == (0,)
    assert found.plan.to_dense().shape == (0, 4, 5) and found.plan.marginals[0].shape == (0, 4) and found.transport().shape == (0, 4, 3)
    shared = torch.full((4,), 0.25, requires_grad=True)
    value = gpu_ot.solve(Problem(torch.zeros(0, 4, 5), 0.1, shared)).value
    close(torch.autograd.grad(value.sum(), shared)[0], torch.zeros(4), rtol=0, atol=0)
    empty = gpu_ot.solve_batch(np.zeros((0, 4, 5)), 0.1)
    assert empty.plan.shape == (0, 4, 5) and empty.value.shape == (0,) and isinstance(empty.plan, np.ndarray)
    assert gpu_ot.bregman_log_projection_batch(np.zeros((0, 4, 5)))["T"].shape == (0, 4, 5)
    assert gpu_ot.pot.batch.entropy_batch(np.zeros((0, 4, 5))).shape == (0,)
    for call in (
        lambda: gpu_ot.sinkhorn([], [], np.zeros((0, 4)), 0.1),
        lambda: gpu_ot.solve_batch(np.zeros((2, 0, 4)), 0.1),
        lambda: gpu_ot.solve_sample(np.zeros((0, 2)), np.zeros((3, 2)), reg=0.1),
        lambda: SamplesLoss()(torch.zeros(0, 2), torch.zeros(3, 2)),
    ):
        with pytest.raises(gpu_ot.ProblemError, match="at least one point"):
            call()


# Tensors of inference mode in later training.


@contextlib.contextmanager
def kept():
    """What a validation step leaves behind, by names."""
    with torch.inference_mode():
        x, y = rand(6, 2, seed=1), rand(5, 2, seed=2)
        M, a = torch.cdist(x, y), torch.full((6,), 1 / 6, dtype=torch.float64)
        problem = Problem(M, 0.1, a)
        found = types.SimpleNamespace(
            x=x, y=y, M=M, a=a, f=rand(6, seed=3), scalings=(rand(6, seed=4), rand(5, seed=5)), problem=problem, c=torch.ones_like(M) / 30,
            solution=gpu_ot.solve(problem), term=gpu_ot.self_term(SqEuclidean(y, y), 0.1), plan=gpu_ot.sinkhorn(a, [], M, 0.1),
        )  # fmt: skip
    yield found


TRAINED = {
    **{
        f"cost, {grad}": lambda k, x, a, grad=grad: gpu_ot.solve(Problem(k.M, 0.1, a), grad=grad, accelerate="none").value
        for grad in ("envelope", "implicit", "unroll")
    },
    **{
        f"start, {grad}": lambda k, x, a, grad=grad: gpu_ot.solve(
            Problem(SqEuclidean(x, k.y), 0.1, k.a), grad=grad, start=k.f, accelerate="none"
        ).f.sum()
        for grad in ("implicit", "unroll")
    },
    "solution as a start": lambda k, x, a: (
        gpu_ot.solve(Problem(SqEuclidean(x, k.y), 0.1), grad="unroll", start=k.solution, accelerate="none").f
    ),
    "problem": lambda k, x, a: gpu_ot.solve(k.problem.restricted(k.problem.cost, a, k.problem.b)).value,
    "term": lambda k, x, a: gpu_ot.divergence(Problem(SqEuclidean(x, k.y), 0.1), self_b=k.term).value,
    "term, implicit": lambda k, x, a: gpu_ot.divergence(Problem(SqEuclidean(x, k.y), 0.1), self_b=k.term, grad="implicit").f,
    "SamplesLoss": lambda k, x, a: SamplesLoss(blur=0.3)(x, k.y),
    "SamplesLoss, implicit": lambda k, x, a: SamplesLoss(blur=0.3, grad="implicit")(x, k.y),
    "SamplesLoss, weights": lambda k, x, a: SamplesLoss(blur=0.3)(a, x, torch.full_like(k.y[:, 0], 0.2), k.y),
    "SinkhornLoss": lambda k, x, a: SinkhornLoss(0.1)(x, k.y),
    "SinkhornLoss, held": lambda k, x, a: SinkhornLoss(0.1, detach_plan=True)(x, k.y),
    "sinkhorn": lambda k, x, a: gpu_ot.sinkhorn(a, [], k.M, 0.1),
    "sinkhorn, warm": lambda k, x, a: gpu_ot.sinkhorn(a, [], k.M, 0.1, warmstart=k.scalings),
    "sinkhorn_unbalanced": lambda k, x, a: gpu_ot.sinkhorn_unbalanced(a, [], k.M, 0.1, 1.0, warmstart=k.scalings),
    "sinkhorn_unbalanced, c": lambda k, x, a: gpu_ot.sinkhorn_unbalanced(a, [], k.M, 0.1, 1.0, c=k.c),
    "solve_batch": lambda k, x, a: gpu_ot.solve_batch(k.M[None], 0.1, a=a).value,
    "solve_batch, unrolled": lambda k, x, a: gpu_ot.solve_batch(k.M[None], 0.1, a=a, grad="autodiff").plan[0, 0],
    "solve_sample": lambda k, x, a: gpu_ot.solve_sample(x, k.y, reg=0.1).value,
    "solve_sample, lazy": lambda k, x, a: gpu_ot.solve_sample(x, k.y, reg=0.1, lazy=True).value_linear,
    "held plan": lambda k, x, a: gpu_ot.loss_linear_batch(SqEuclidean(x, k.y.clone()).dense()[None], k.plan[None]),
    "map": lambda k, x, a: gpu_ot.solve(Problem(SqEuclidean(x, k.y), 0.1), grad="implicit").transport().sum(-1),
}


@pytest.mark.parametrize("door", TRAINED)
def test_what_a_validation_step_left_serves_training(door):
    """With the derivatives that the same tensors have outside of inference mode."""
    slopes = []
    for copied in (False, True):
        with kept() as k:
            if copied:
                tensors = {name: z.clone() for name, z in vars(k).items() if isinstance(z, torch.Tensor)}
                vars(k).update(tensors, scalings=tuple(z.clone() for z in k.scalings), problem=Problem(tensors["M"], 0.1, tensors["a"]))
        asked = leaves(rand(6, 2, seed=9), torch.full((6,), 1 / 6, dtype=torch.float64))
        found = torch.autograd.grad(TRAINED[door](k, *asked).sum(), asked, allow_unused=True)
        assert any(grad is not None for grad in found)
        slopes.append([grad for grad in found if grad is not None])
    for one, other in zip(*slopes, strict=True):
        close(one, other, rtol=1e-9, atol=1e-12)


def test_the_kept_term_of_a_static_target_serves_training():
    x, y = points()
    loss = SamplesLoss(blur=0.3, static_y=True)
    with torch.inference_mode():
        loss(x, y)
    asked = x.clone().requires_grad_()
    close(
        torch.autograd.grad(loss(asked, y), asked)[0], torch.autograd.grad(SamplesLoss(blur=0.3)(asked, y), asked)[0], rtol=1e-4, atol=1e-7
    )


# geomloss's place.


def test_patch_replaces_samples_loss_in_clients_too():
    geomloss = pytest.importorskip("geomloss")
    theirs = geomloss.SamplesLoss
    client = types.ModuleType("a_client_of_geomloss")
    client.SamplesLoss = theirs
    sys.modules[client.__name__] = client
    x, y = points(torch.float64)
    try:
        with patching.patch():
            assert client.SamplesLoss is geomloss.SamplesLoss is theirs
            with patching.patch(geomloss=True):
                assert client.SamplesLoss is geomloss.SamplesLoss and issubclass(client.SamplesLoss, SamplesLoss)
                close(client.SamplesLoss("sinkhorn", blur=0.5)(x, y), SamplesLoss(blur=0.5)(x, y), rtol=0, atol=0)
                assert isinstance(client.SamplesLoss("gaussian", blur=0.5), theirs)  # what is not transport stays theirs
                assert isinstance(client.SamplesLoss(loss="energy"), theirs)
            assert client.SamplesLoss is theirs
            sys.modules[client.__name__] = client
        assert client.SamplesLoss is geomloss.SamplesLoss is theirs
    finally:
        del sys.modules[client.__name__]


def test_the_runner_puts_ours_in_geomloss_place(tmp_path, capsys):
    pytest.importorskip("geomloss")
    from gpu_ot import patch

    assert callable(patch)
    script = tmp_path / "script.py"
    script.write_text("import geomloss\nprint([c.__module__.split('.')[0] for c in geomloss.SamplesLoss.__mro__[:1]])\n")
    runner, path, argv = __import__("gpu_ot.patch", fromlist=["main"]), list(sys.path), list(sys.argv)
    try:
        for options, home in (([], "geomloss"), (["--geomloss"], "gpu_ot")):
            runner.main([*options, str(script)])
            assert capsys.readouterr().out.strip() == f"['{home}']"
    finally:
        sys.path[:], sys.argv[:] = path, argv


# A KeOps cache that was left half-written.


@pytest.fixture
def half_written(monkeypatch, tmp_path):
    library = tmp_path / "keops2" / "pykeops_cpp_ab.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setenv("KEOPS_CACHE_FOLDER", str(tmp_path))
    keops.broken.cache_clear()
    yield library
    keops.broken.cache_clear()


@pytest.mark.parametrize(
    "failure", [lambda path: ImportError(f"{path}: file too short", path=str(path)), lambda path: EOFError("Ran out of input")]
)
def test_a_half_written_keops_cache_is_named_and_passed_over(half_written, monkeypatch, failure):
    def fail():
        raise failure(half_written)

    if keops.compiler() is None:
        pytest.skip("no compiler here")
    pytest.importorskip("pykeops")
    monkeypatch.setattr(keops, "_pykeops", fail)
    x, y = points()
    for cost in (SqEuclidean(x, y), gpu_ot.Euclidean(x, y)):
        problem = Problem(cost, 0.1)
        said = gpu_ot.explain(problem)
        assert str(half_written) in said and "delete" in said
        with pytest.raises(gpu_ot.BackendError, match=r"half-written: delete .*pykeops_cpp_ab\.so"):
            gpu_ot.solve(problem, backend="keops")
        assert gpu_ot.solve(problem).status.name == "converged"
        assert gpu_ot.solve(problem, backend="chunked").status.name == "converged"


def test_a_half_written_formula_is_named_when_it_is_first_needed(half_written, monkeypatch):
    class Unreadable:
        def __init__(self, *_): ...

        def __getattr__(self, name):
            raise ImportError(f"{half_written}: file too short", path=str(half_written))

    geometry = keops.Keops.__new__(keops.Keops)
    monkeypatch.setattr(keops.Keops, "_centred", lambda self, h, eps: Unreadable().z)
    with pytest.raises(gpu_ot.BackendError, match=r"half-written: delete .*pykeops_cpp_ab\.so"):
        geometry.softmin(torch.zeros(3), 0.1)
