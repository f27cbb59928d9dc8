"""torch.func, and what surrounds a loss in training: the same numbers as torch.autograd gives, for every mode, machine and output."""

import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint

from conformance import COSTS
from gpu_ot import KL, Problem, ProblemError, SqEuclidean, divergence
from gpu_ot import solve as front_door
from gpu_ot.losses.samples import SamplesLoss
from gpu_ot.losses.sinkhorn import SinkhornLoss
from gpu_ot.penalties import BALANCED
from gpu_ot.solve import solve
from problems import A, B, X, Y, first, leaves, outputs, pairwise, rand, second

N, M, D = 6, 5, 2

#: What can be differentiated any number of times, and what once.
TWICE = [("matrix", "softmin"), ("matrix", "dense"), ("squared", "dense"), ("squared", "softmin"), ("squared", "chunked"),
         ("folding sum", "chunked"), ("euclidean", "dense"), ("formula", "dense")]  # fmt: skip
ONCE = [("euclidean", "chunked"), ("formula", "chunked")]


def solution(cost, backend, x, y, a, b, grad, penalty=BALANCED, eps=0.1):
    problem = Problem(COSTS[cost][0](x, y), eps, a / a.sum(), b / b.sum(), penalty)
    return solve(problem, backend=backend, grad=grad, tol=1e-13, max_iter=30 if grad == "unroll" else 300)


def close(found, expected, rtol=1e-9):
    for g, e in zip(found, expected, strict=True):
        assert (g - e).norm() <= rtol * e.norm() + 1e-14


EVERYTHING = tuple(range(4))


@pytest.mark.parametrize("machine, grad, penalty", pairwise(TWICE + ONCE, ["envelope", "implicit", "unroll"], [KL(), KL(0.4)]), ids=str)
def test_gradients_of_the_value(machine, grad, penalty):
    def value(*z):
        return solution(*machine, *z, grad, penalty).value

    tensors = (X, Y, A, B)
    expected = first(value, tensors)
    close(torch.func.grad(value, argnums=EVERYTHING)(*tensors), expected)
    found, output = torch.func.grad_and_value(value)(*tensors)
    close([found], expected[:1])
    torch.testing.assert_close(output, value(*tensors))
    # The rows of a Jacobian are a vmap over what comes back.
    two = torch.func.jacrev(lambda *z: torch.stack([value(*z), -2 * value(*z)]), argnums=EVERYTHING)(*tensors)
    close([z[1] for z in two], [-2 * z for z in expected])


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
@pytest.mark.parametrize("cost, backend", [("matrix", "dense"), ("squared", "dense"), ("squared", "chunked")])
def test_gradients_of_every_output(cost, backend, grad):
    def numbers(*z):
        return torch.stack([*outputs(solution(cost, backend, *z, grad)).values()])

    asked = leaves(X, Y, A, B)
    rows = [torch.autograd.grad(number, asked, retain_graph=True) for number in numbers(*asked)]
    for found, expected in zip(torch.func.jacrev(numbers, argnums=EVERYTHING)(X, Y, A, B), zip(*rows, strict=True), strict=True):
        close(found, expected)


@pytest.mark.parametrize("cost, backend", TWICE)
@pytest.mark.parametrize("output", ["value", "plan @ v"])
def test_second_derivatives(output, cost, backend):
    """The gradient of a gradient, in one input and across two; the Hessian; and its product with a vector, vjp of grad."""

    def number(*z):
        return outputs(solution(cost, backend, *z, "implicit", KL(0.4)))[output]

    v, tensors = rand(N, D, seed=9) - 0.5, (X, Y, A, B)
    expected = second(number, tensors, v)
    found = torch.func.grad(lambda *z: (torch.func.grad(number)(*z) * v).sum(), argnums=EVERYTHING)(*tensors)
    close(found, expected)
    _, pull = torch.func.vjp(lambda x: torch.func.grad(number)(x, *tensors[1:]), X)
    close(pull(v), expected[:1])
    H = torch.func.jacrev(torch.func.jacrev(number))(*tensors)
    close([torch.einsum("ijkl,kl->ij", H, v)], expected[:1])


def test_unrolled_second_derivatives():
    def value(x):
        return solution("squared", "chunked", x, Y, A, B, "unroll").value

    v = rand(N, D, seed=9)
    close([torch.func.grad(lambda x: (torch.func.grad(value)(x) * v).sum())(X)], second(value, (X,), v))


def test_a_level_that_does_not_ask_hides_nothing_from_one_that_does():
    """Differentiated in y inside and in x outside: what the inner transform sees of x asks for nothing there."""

    def value(x, y):
        return solution("squared", "chunked", x, y, A, B, "implicit").value

    def inner(x, y):
        return torch.func.grad(value, argnums=1)(x, y).square().sum() + value(x, y)

    x, y = leaves(X, Y)
    output = value(x, y)
    (slope,) = torch.autograd.grad(output, y, create_graph=True)
    close([torch.func.grad(inner)(X, Y)], torch.autograd.grad(slope.square().sum() + output, x))


@pytest.mark.parametrize(
    "output", [lambda s: s.plan.to_dense().square().sum(), lambda s: s.sharp_cost, lambda s: (s.plan @ rand(M)).sin().sum()]
)
@pytest.mark.parametrize("grad", ["implicit", "unroll"])
def test_nor_what_a_solution_offers(output, grad):
    """Inside a transform that has no part in the problem its potentials still carry what the outer one asks for."""

    def function(x):
        return output(solution("squared", "chunked", x, Y, A, B, grad))

    scaled = torch.func.grad(lambda x: torch.func.grad(lambda t: t * function(x))(torch.tensor(3.0)))
    close([scaled(X)], first(function, (X,)))


@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_divergences(grad):
    def value(x, y, a, b):
        return divergence(Problem(SqEuclidean(x, y), 0.1, a / a.sum(), b / b.sum()), grad=grad, tol=1e-13).value

    close(torch.func.grad(value, argnums=EVERYTHING)(X, Y, A, B), first(value, (X, Y, A, B)))
    if grad == "implicit":
        v = rand(N, D, seed=9)
        found = torch.func.grad(lambda x: (torch.func.grad(value)(x, Y, A, B) * v).sum())(X)
        close([found], second(lambda x: value(x, Y, A, B), (X,), v))


@pytest.mark.parametrize("settings", [{}, dict(grad="implicit"), dict(detach_plan=True), dict(tau=0.3)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_sinkhorn_loss(settings, batch):
    loss = SinkhornLoss(0.1, tol=1e-13, **settings)
    x, y = rand(*batch, N, D, seed=1), rand(*batch, M, D, seed=2)
    close(torch.func.grad(loss, argnums=(0, 1))(x, y), first(loss, (x, y)))
    C = SqEuclidean(x, y).dense()
    close([torch.func.grad(loss)(C)], first(loss, (C,)))
    jacobian = torch.func.jacrev(SinkhornLoss(0.1, tol=1e-13, reduction="none", **settings))(x, y)
    close([jacobian.sum(0) / 3 if batch else jacobian], first(loss, (x, y))[:1])
    if settings.get("grad") or settings.get("detach_plan"):
        v = rand(*batch, N, D, seed=9)
        found = torch.func.grad(lambda x, y: (torch.func.grad(loss)(x, y) * v).sum(), argnums=(0, 1))(x, y)
        close(found, second(loss, (x, y), v))


def test_what_has_no_second_derivative_says_so():
    def twice(function):
        return torch.func.grad(lambda x: torch.func.grad(function)(x).sum())(X)

    with pytest.raises(NotImplementedError, match=r'second derivatives of a value.*grad="implicit"'):
        twice(lambda x: SinkhornLoss(0.1)(x, Y))
    with pytest.raises(NotImplementedError, match='backend="dense"'):
        twice(lambda x: solution("formula", "chunked", x, Y, A, B, "implicit").value)


def test_vmap_is_told_how_batches_are_posed():
    x, y = rand(3, N, D), rand(3, M, D)
    for function in (
        SinkhornLoss(0.1),
        torch.func.grad(SinkhornLoss(0.1)),
        lambda x, y: solve(Problem(SqEuclidean(x, y), 0.1)).value,
        lambda x, y: divergence(Problem(SqEuclidean(x, y), 0.1)).value,
    ):
        with pytest.raises(ProblemError, match=r"pass the batch itself.*\(\*batch, n, d\)"):
            torch.vmap(function)(x, y)
    alike = SinkhornLoss(0.1, reduction="none")(x, y)
    torch.testing.assert_close(torch.stack([SinkhornLoss(0.1)(*z) for z in zip(x, y, strict=True)]), alike, rtol=1e-4, atol=0)
    assert torch.vmap(lambda t: t * SinkhornLoss(0.1)(x[0], y[0]))(torch.ones(2)).shape == (2,)  # what is not one of many may be looked at


def test_a_solve_inside_a_transform_is_the_solve_outside():
    """On the numbers themselves, and with what is not differentiated left as it is."""
    seen = []

    def value(x):
        s = solve(Problem(SqEuclidean(x, Y), 0.05), tol=1e-9)
        seen.append((s.n_iter, s.status.name, s.f))
        return s.value

    torch.func.grad(value)(X)
    value(X)
    assert seen[0][:2] == seen[1][:2]
    torch.testing.assert_close(seen[0][2], seen[1][2], rtol=0, atol=0)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(seen[0][2])


LOSSES = {
    "samples": lambda: SamplesLoss(blur=0.3, tol=1e-9),
    "samples, reach": lambda: SamplesLoss(blur=0.3, reach=1.0, tol=1e-9),
    "sinkhorn": lambda: SinkhornLoss(0.1, tol=1e-9),
    "sinkhorn, implicit": lambda: SinkhornLoss(0.1, tol=1e-9, grad="implicit"),
    "plan held": lambda: SinkhornLoss(0.1, tol=1e-9, detach_plan=True),
}
LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.Tanh(), torch.nn.Linear(8, D)).to(dtype)


def gradients_of(net):
    return [p.grad.clone() for p in net.parameters()]


def checkpointed(reentrant):
    """The solve is run again in the backward, and comes out the same."""
    return lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant)


def saved_elsewhere(f, x):
    """What is saved for the backward goes through hooks, as to the CPU and back: others of the same value come out."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return f(x)


@LOSS
def test_gradients_through_what_surrounds_a_loss(loss):
    grads = []
    for through in (lambda f, x: f(x), checkpointed(False), checkpointed(True), saved_elsewhere):
        net = model()
        through(lambda x, net=net: loss()(net(x), Y), X.clone().requires_grad_()).backward()
        grads.append(gradients_of(net))
    for other in grads[1:]:
        close(other, grads[0])


@LOSS
def test_deterministic_algorithms(loss):
    torch.use_deterministic_algorithms(True)
    try:
        nets = [model(), model()]
        for net in nets:
            loss()(net(X), Y).backward()
        assert all(torch.equal(*pair) for pair in zip(*map(gradients_of, nets), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@LOSS
def test_autocast(loss):
    """The layers run in bfloat16, the loss in float32; the value is that of the rounded points, and comes back as they were."""
    net, y = model(torch.float32), Y.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = loss()(X.float(), y)
    torch.testing.assert_close(whole, loss()(X.float(), y), rtol=0, atol=0)  # a product of float32 would have been rounded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        points = net(X.float())
        value = loss()(points, y.bfloat16())
    assert points.dtype == value.dtype == torch.bfloat16
    exact = loss()(points.detach().double(), y.bfloat16().double())
    assert abs(value.double() - exact) <= torch.finfo(torch.bfloat16).eps * exact
    value.backward()
    peer = points.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(loss()(peer, y.bfloat16().float()), peer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        points = net(X.float())
        (found,) = torch.autograd.grad(loss()(points, y.bfloat16()), points)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def _train(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, loss in LOSSES.items():
        net = torch.nn.parallel.DistributedDataParallel(model())
        loss()(net(_shard(rank)), Y).backward()
        if rank == 0:
            torch.save(gradients_of(net), f"{folder}/{name}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _shard(rank):
    return rand(7, D, seed=30 + rank)


def test_distributed_data_parallel(tmp_path):
    """Two processes with a batch each: DDP's mean of their gradients is the gradient of the mean of their losses."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    subprocess.run([sys.executable, __file__, str(port), str(tmp_path)], check=True, timeout=600)
    for name, loss in LOSSES.items():
        net = model()
        (sum(loss()(net(_shard(rank)), Y) for rank in range(2)) / 2).backward()
        close(torch.load(tmp_path / f"{name}.pt"), gradients_of(net))


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.grad(SinkhornLoss(0.1))(X, Y)
        SamplesLoss()(X, Y)
        torch.func.grad(lambda x: front_door(Problem(SqEuclidean(x, Y), 0.1), grad="implicit").value)(X)


if __name__ == "__main__":  # the ranks of test_distributed_data_parallel, of which one is forked: imports are done once
    import torch._dynamo

    other = os.fork()
    _train(int(other == 0), int(sys.argv[1]), sys.argv[2])
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
