"""Everything that a GPU would be asked to do, on a pretended one: no mixed device, no read that is not declared, events that are right.

Tensors are on cuda:1 while cuda:0 is current, so that whatever forgets the tensors' own device is found out. Kernels are interpreted,
and KeOps' lazy tensors are torch's. The truth is torch's own operations on the CPU.
"""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gpu_ot.kernels import tuning
from gpu_ot.kernels.softmin import softmin as launch

import gpu_ot
import pretend
from gpu_ot import KL, Cosine, Problem, SqEuclidean
from gpu_ot.geometry import graphs, keops, products
from gpu_ot.lerobot import OTLossConfig, compute_ot_loss_for_policy
from gpu_ot.lerobot.attach import CoTraining
from gpu_ot.losses.measures import backend_for
from gpu_ot.vectors import to_host
from problems import generator, pairwise, rand

pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def seen(monkeypatch):
    """What is counted on the device of this test, whose graphs have proved themselves, which takes a read, in an earlier solve."""
    monkeypatch.setattr(graphs, "_proven", {torch.device("cuda", k) for k in range(2)})
    with pretend.device() as found:
        yield found


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A context in which kernels are nobody's and machine code is hidden: torch operations alone."""
    monkeypatch.setattr(gpu_ot.compiled, "refused", lambda: "hidden from these tests")

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patched:
            patched.delenv("TRITON_INTERPRET")
            products._run_on.cache_clear()
            yield
        products._run_on.cache_clear()

    return context


# ------------------------------------------------------------------------------------------------ what the pretence sees


def test_what_cuda_refuses_is_refused(seen):
    here, there, host = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"), torch.ones(3)
    for other in (there, host):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    h = torch.zeros(4, device="cuda:1")
    x = torch.ones(4, 3, device="cuda:1")
    assert launch(x, x, h, 1.0).device == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="launched on cuda:0"):  # as without the guard around it
        tuning_kernel = launch.__globals__["softmin_kernel"]
        tuning_kernel[(1,)](x)


def test_what_waits_is_counted(seen):
    z = torch.ones(3, 4).to("cuda")
    before = seen.reads
    _ = z.tolist(), z.sum().item(), bool(z.all()), z.cpu(), z[z > 0], z.nonzero(), float(z[0, 0])
    assert seen.reads - before == 7, seen.names
    before = seen.launches, seen.copies
    _ = (z + 1).exp_().T[0].sum(), z.view(-1), torch.empty(3, device="cuda"), z.double()
    assert seen.launches - before[0] == 4 and seen.copies == before[1]
    torch.tensor([1.0], device="cuda"), torch.ones(2).cuda()
    assert seen.copies - before[1] == 2


def test_a_copy_arrives_with_its_event(seen):
    z = torch.zeros(3, device="cuda:1")
    assert to_host(z)() == [0, 0, 0]
    host = torch.empty(3, pin_memory=True)
    host.copy_(z, non_blocking=True)
    wrong = torch.cuda.Event()
    wrong.record()  # on the stream of cuda:0, which knows nothing of the copy
    wrong.synchronize()
    assert host.tolist() == [1, 1, 1]
    right = torch.cuda.Event()
    right.record(torch.cuda.current_stream(1))
    right.synchronize()
    assert host.tolist() == [0, 0, 0]


def test_nan_of_a_step_is_seen_on_its_own_device(seen):
    """The training adapter looks at flags of cuda:1, behind an event of cuda:1, while cuda:0 is current."""
    steps = SimpleNamespace(_pending=[])
    CoTraining._watch(steps, ["pose"], torch.ones(1, dtype=torch.bool, device="cuda:1"))
    before = seen.reads
    with pytest.raises(gpu_ot.ProblemError, match="pose"):
        CoTraining._watch(steps, ["pose"], torch.zeros(1, dtype=torch.bool, device="cuda:1"))
    assert seen.reads == before


def test_gradients_cross_devices(seen):
    x = torch.ones(3, requires_grad=True)
    (x.to("cuda:1") * 2).to("cuda:0").cpu().sum().backward()
    assert x.grad.tolist() == [2, 2, 2] and not x.grad.is_cuda


# ------------------------------------------------------------------------------------------------ every backend


def lazily():
    """A stand-in for pykeops.torch: reductions keep their axis, and a product with | is one of vectors."""

    class LazyTensor:
        __GenericLazyTensor__ = True

        def __init__(self, z):
            self.z = z

        def sum(self, dim):
            found = self.z.sum(dim, keepdim=dim == -1)
            return LazyTensor(found) if dim == -1 else found

        def logsumexp(self, dim):
            return self.z.logsumexp(dim)

        def __getattr__(self, name):
            return lambda *z: LazyTensor(getattr(self.z, name)(*map(plain, z)))

    def plain(z):
        return z.z if isinstance(z, LazyTensor) else z

    for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "pow"):
        setattr(
            LazyTensor,
            f"__{name}__",
            lambda self, *z, name=name: LazyTensor(getattr(torch.Tensor, f"__{name}__")(self.z, *map(plain, z))),
        )
    LazyTensor.__or__ = lambda self, other: LazyTensor((self.z * plain(other)).sum(-1, keepdim=True))
    return LazyTensor


@pytest.fixture
def lazy(monkeypatch):
    class Module:
        LazyTensor = lazily()

    monkeypatch.setattr(keops, "_pykeops", lambda: Module)
    monkeypatch.setattr(keops, "compiler", lambda: "no compiler is called")
    find = keops.importlib.util.find_spec
    monkeypatch.setattr(keops.importlib.util, "find_spec", lambda name: name if name == "pykeops" else find(name))


BACKENDS = ("dense", "softmin", "resident", "triton", "chunked", "keops", "auto")


def points(batch, device="cpu"):
    x, y = (rand(*batch, n, 3, seed=n, dtype=torch.float32) for n in (12, 15))
    a, b = (rand(*batch, n, seed=n + 1) + 0.1 for n in (12, 15))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [z.to(device, torch.float32 if device == "mps" else None) for z in (x, y, a, b)]


def solved(device, backend, accelerate, grad, batch, penalty, cost):
    x, y, a, b = points(batch, device)
    x.requires_grad_()
    done = gpu_ot.solve(
        Problem(cost(x, y), 0.1, a, b, penalty), backend=backend, accelerate=accelerate, grad=grad, check_every=10,
        tol=0.0 if grad == "unroll" else 1e-5, max_iter=8 if grad == "unroll" else 50,
    )  # fmt: skip
    out = done.value.sum() + ((done.f * done.f).sum() if grad != "envelope" else 0.0)
    return done, [done.value, done.f, done.g, *torch.autograd.grad(out, x)]


def near(ours, truth, rtol=1e-4, atol=1e-5):
    """The same numbers, from the device that was asked."""
    for mine, theirs in zip(ours, truth, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.device == torch.device("cuda", 1), mine.device
            mine = mine.detach().cpu()
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs).detach(), rtol=rtol, atol=atol, check_dtype=False)


CASES = pairwise(BACKENDS, ("none", "auto"), ("envelope", "implicit", "unroll"), ((), (3,)), (KL(), KL(0.5)), (SqEuclidean, Cosine))


@pytest.mark.parametrize("backend, accelerate, grad, batch, penalty, cost", CASES, ids=str)
def test_solve(seen, on_the_cpu, lazy, backend, accelerate, grad, batch, penalty, cost):
    """As on the CPU; all it gives is on the device; and the host waits no more often than is declared."""
    if backend == "keops" and batch:
        pytest.skip("keops takes one problem at a time")
    accelerate = "none" if grad == "unroll" else accelerate
    with on_the_cpu():
        truth, numbers = solved("cpu", "softmin", accelerate, grad, batch, penalty, cost)
    before = seen.reads, seen.copies
    moved = len(points(batch))
    done, found = solved("cuda:1", backend, accelerate, grad, batch, penalty, cost)
    reads, copies = seen.reads - before[0], seen.copies - before[1] - moved
    near(found, numbers)
    assert done.status == truth.status and all(z.is_cuda for z in (done.converged, done.errors, done.plan.to_dense()))
    assert reads <= declared(done, backend, grad) and not copies, seen.names


def declared(done, backend, grad):
    """How often the host waits: for `Problem`; for two linear systems behind a backward; and where sums tell afterwards whether they were
    exact, for strides of iterations, the first ones short, of which none is longer than a block, and for the value and its gradient. A run
    that did not converge is asked whether its eps was resolved."""
    strides = 10 + len(done.errors) if backend in ("dense", "chunked") else 0
    unrolled = 8 * done.n_iter if backend == "dense" and grad == "unroll" else 0  # each softmin, forward and backward, is asked for itself
    resolved = int(done.status.name != "converged")
    return 1 + resolved + strides + unrolled + (6 if grad == "implicit" else 0) + (4 if backend == "dense" else 0)


@pytest.mark.parametrize("batch, penalty", [((), KL(0.5)), ((2,), KL())], ids=str)
def test_multiscale(seen, on_the_cpu, batch, penalty):
    """Tiles, their list and the kernel on the device: as on the CPU, with a read for each sweep's list."""
    with on_the_cpu():
        _, numbers = solved("cpu", "softmin", "auto", "envelope", batch, penalty, SqEuclidean)
    done, found = solved("cuda:1", "multiscale", "auto", "envelope", batch, penalty, SqEuclidean)
    if penalty.balanced:  # it begins elsewhere, and (f + c, g - c) is the same plan
        for z in (numbers, found):
            _, f, g, _ = z
            c = f.mean(-1, keepdim=True)
            z[1:3] = f - c, g + c
    near(found, numbers, rtol=2e-4, atol=2e-5)
    assert done.transport().is_cuda and done.sharp_cost.is_cuda and "pairs_kernel" in {name for name, _ in seen.compiled}


@pytest.mark.parametrize("batch, penalty", [((), KL(0.5)), ((2,), KL())], ids=str)
def test_mesh(seen, on_the_cpu, monkeypatch, batch, penalty):
    """What torch makes on a CPU; the host reads what the meshes need once, and nothing from then on."""
    monkeypatch.setattr("gpu_ot.geometry.mesh.by_torch", lambda problem: True)
    with on_the_cpu():
        _, numbers = solved("cpu", "mesh", "auto", "envelope", batch, penalty, SqEuclidean)
    before = seen.reads
    done, found = solved("cuda:1", "mesh", "auto", "envelope", batch, penalty, SqEuclidean)
    near(found, numbers)
    assert done.transport().is_cuda and done.f.is_cuda
    first, (k, h) = seen.reads - before, done.levels
    before = seen.reads
    with torch.no_grad():
        for _ in range(3):
            done.geometry.softmin(h, done.problem.eps), done.geometry.T.softmin(k, done.problem.eps)
    assert seen.reads == before, (first, seen.names)


def test_auto_takes_a_mesh_for_many_points_on_a_gpu(seen, monkeypatch):
    x, y = (torch.rand(40_000, 3, device="cuda") for _ in range(2))
    problem = Problem(SqEuclidean(x, y), 1e-2)
    assert 'auto takes "triton"' in gpu_ot.explain(problem, 1e-3)
    monkeypatch.setattr("gpu_ot.geometry.select.GPU_PAIR_S", 2e-11)  # as if there were five times as many of both
    assert 'auto takes "mesh"' in gpu_ot.explain(problem, 1e-3)
    assert 'auto takes "triton"' in gpu_ot.explain(problem, None)


def test_auto_takes_few_pairs_on_a_gpu(seen):
    x, y = (torch.rand(40_000, 3, device="cuda") for _ in range(2))
    assert 'auto takes "multiscale"' in gpu_ot.explain(Problem(SqEuclidean(x, y), 1e-5))
    assert 'auto takes "triton"' in gpu_ot.explain(Problem(SqEuclidean(x, y), 1e-2))
    assert backend_for("multiscale", Problem(SqEuclidean(x, y), 1e-5)) == "multiscale"
    assert backend_for("multiscale", Problem(SqEuclidean(x, y), 1e-2)) == "triton"


def test_two_devices_in_turns(seen):
    """What is kept from one solve to the next is kept for its device."""
    found = []
    for backend in ("triton", "dense", "resident"):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            x, y, a, b = points((), device)
            done = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.3, a, b), backend=backend, tol=1e-4)
            assert done.f.device == x.device and done.status.name == "converged"
            found.append(done.value.item())
    assert max(found) - min(found) < 1e-4


def test_annealing_and_many_checks(seen, on_the_cpu):
    """More points than the loop passes over annealing for. The decision is one read."""
    x, y = (rand(70, 3, seed=k, dtype=torch.float32) for k in range(2))
    with on_the_cpu():
        truth = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.01), backend="softmin", tol=1e-4, check_every=10)
    x, y = x.to("cuda:1"), y.to("cuda:1")
    before = seen.reads
    done = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.01), backend="triton", tol=1e-4)
    assert done.status.name == "converged" and seen.reads - before == 2, seen.names
    near([done.value], [truth.value])


# ------------------------------------------------------------------------------------------------ other chips


CHIPS = {
    "A100": ((8, 0), 163, "sm_80"),
    "RTX 3090": ((8, 6), 99, "sm_86"),
    "RTX 4090": ((8, 9), 99, "sm_86"),
    "Orin": ((8, 7), 163, "sm_80"),
    "H100": ((9, 0), 227, "sm_90"),
    "B200": ((10, 0), 227, "sm_100"),
    "B300": ((10, 3), 227, "sm_100"),
    "RTX 5090": ((12, 0), 99, "sm_120"),
    "nobody's": ((11, 0), 99, "sm_86"),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_rows_fit_the_chip(chip):
    (major, minor), kib, row = CHIPS[chip]
    tuning._architecture.cache_clear()
    with pretend.device(major=major, minor=minor, shared_memory_per_block_optin=kib << 10):
        found = tuning.architecture(torch.empty(0, device="cuda"))
    tuning._architecture.cache_clear()
    assert found == row and tuning.SHARED[found] <= kib << 10


def test_splits_fill_waves(monkeypatch):
    """On 132 multiprocessors: how much of the last wave is used, and never less than without splits."""
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    x, tile = torch.empty(0), tuning.Tile(64, 128, 4, 2)
    assert tuning.split(10_000, 10_000, 1, tile, x)[0] == 5
    for n, m, batch in ((10_000, 10_000, 1), (20_000, 20_000, 1), (100, 1_000_000, 1), (1000, 1000, 1), (3000, 5000, 7), (1, 1, 1)):
        splits, per_split = tuning.split(n, m, batch, tile, x)
        assert (splits - 1) * per_split < m <= splits * per_split and per_split % tile.block_m == 0
        programs, slots = batch * -(-n // 64), 264

        used, alone = (programs * k / (slots * -(-programs * k // slots)) for k in (splits, 1))
        assert used >= alone and splits <= tuning.MOST_SPLITS


@pytest.mark.parametrize("backend", ["triton", "dense", "resident"])
def test_sizes_are_no_reason_to_compile_anew(seen, backend):
    """96 points or 97, and a batch of one or of three: multiples of 16 and ones are nothing special to a kernel."""

    def solve(n, batch):
        x, y = (rand(*batch, k, 3, seed=k, dtype=torch.float32).to("cuda") for k in (n, n + 1))
        a, b = ((rand(*batch, k, seed=k) + 0.1).to("cuda") for k in (n, n + 1))
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        x.requires_grad_()
        found = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b, KL(1.0)), backend=backend, tol=0.0, max_iter=3, check_every=2)
        torch.autograd.grad(found.value.sum(), x)

    for batch in ((), (3,)):
        solve(97, batch)
        known = set(seen.compiled)
        solve(95, batch)  # y has 96
        solve(96, batch)
        new = {name for name, _ in seen.compiled - known}
        assert new <= ({"both_kernel"} if backend == "dense" else set()), seen.compiled - known  # whose rows are read 16 bytes at a time


@pytest.mark.parametrize("backend", ["auto", "softmin", "chunked"])
@pytest.mark.parametrize("grad, penalty", [("envelope", KL()), ("implicit", KL(0.5))], ids=str)
def test_a_device_without_float64(seen, on_the_cpu, backend, grad, penalty):
    """Apple's: potentials are float32 there, and nothing asks for more."""
    with on_the_cpu():
        _, numbers = solved("cpu", "softmin", "auto", grad, (), penalty, SqEuclidean)
        done, found = solved("mps", backend, "auto", grad, (), penalty, SqEuclidean)
    assert done.f.dtype == torch.float32 and all(z.device.type == "mps" for z in found)
    for mine, right in zip(found, numbers, strict=True):
        torch.testing.assert_close(mine.cpu(), right.detach(), rtol=2e-3, atol=2e-4, check_dtype=False)


def test_where_float32_has_no_digits_left_it_says_so(seen, on_the_cpu):
    """Costs a hundred times eps: seven digits less two."""
    x, y, a, b = points((), "mps")
    with on_the_cpu():
        done = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.01, a, b), tol=1e-7, max_iter=1000, check_every=10)
    assert done.status.name == "stalled" and "more digits" in done.status.explanation


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_without_triton(seen, monkeypatch, device):
    """As on Windows and macOS: the reason is told, the other backends serve, and nothing imports it."""
    find = products.importlib.util.find_spec
    monkeypatch.setattr(products.importlib.util, "find_spec", lambda name: None if name in ("triton", "pykeops") else find(name))
    monkeypatch.setattr(gpu_ot.compiled, "refused", lambda: "hidden from these tests")
    products._run_on.cache_clear()
    x, y, a, b = points((), device)
    problem = Problem(SqEuclidean(x, y), 0.05, a, b)
    for backend in ("triton", "resident", "keops"):
        with pytest.raises(gpu_ot.BackendError, match="not installed"):
            gpu_ot.solve(problem, backend=backend)
    launched = len(seen.compiled)
    for backend in ("auto", "dense", "chunked", "multiscale"):
        assert gpu_ot.solve(problem, backend=backend, tol=1e-4).f.device == x.device
    assert len(seen.compiled) == launched and "not installed" in gpu_ot.explain(problem)
    products._run_on.cache_clear()


def test_offsets_of_the_resident_kernel_fit():
    from gpu_ot.kernels.resident import LARGEST, fits

    assert fits(2**20, LARGEST) and fits(2**21 - 200, 1000) and not fits(2**21, 513) and fits(2**21, 512) and not fits(5, LARGEST + 1)


# ------------------------------------------------------------------------------------------------ every door


class Measures:
    """One problem in everything that doors take, float64, on a device."""

    def __init__(self, device):
        x, y, a, b = (z.double() for z in points(()))
        M = torch.cdist(x, y).square()
        self.device = device
        self.x, self.y, self.a, self.b, self.M = (z.to(device) for z in (x, y, a, b, M / M.max()))
        self.xs, self.ys = (torch.stack((z, 0.9 * z)) for z in (self.x, self.y))
        self.Ms = torch.stack((self.M, 0.9 * self.M))

    def weights(self, k=2):
        return torch.stack([self.b] * k, 1)

    def solved(self):
        return gpu_ot.solve(Problem(SqEuclidean(self.x, self.y), 0.5))


def gradient(make, *inputs):
    leaves = [z.detach().clone().requires_grad_() for z in inputs]
    value = make(*leaves)
    return [value, *torch.autograd.grad(value.sum(), leaves)]


class Policy(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(rand(4, 3, seed=4))
            self.layer.bias.zero_()
        self.layer.to(device)

    def encode_feature_for_ot(self, key, x):
        return self.layer(x)


def alignment(z, **changes):
    policy = Policy(z.device)
    feature = dict(src_key="state", use_learned_embed=True, weight_embed=0.5, weight_label=0.2)
    cfg = OTLossConfig.from_dict(dict(features=[feature], reg=0.4, tau_src=0.5, tau_tgt=0.5) | changes)
    loss, metrics = compute_ot_loss_for_policy(policy, {"state": z.x}, {"state": z.y[:12]}, cfg)
    found = [number for name, number in metrics.items() if name not in ("ot_iters", "ot_marginal_error")]
    return [loss, *torch.autograd.grad(loss, list(policy.parameters())), *found]


ot = gpu_ot.pot
DOORS = {
    "sinkhorn": lambda z: gradient(lambda M: ot.sinkhorn(z.a, z.b, M, 0.3), z.M),
    "sinkhorn of histograms": lambda z: [ot.sinkhorn(z.a, z.weights(), z.M, 0.3)],
    "sinkhorn2": lambda z: gradient(lambda M: ot.sinkhorn2(z.a, z.b, M, 0.3), z.M),
    "sinkhorn_log": lambda z: [ot.sinkhorn(z.a, z.b, z.M, 0.3, method="sinkhorn_log")],
    "sinkhorn_epsilon_scaling": lambda z: [ot.sinkhorn(z.a, z.b, z.M, 0.3, method="sinkhorn_epsilon_scaling")],
    "greenkhorn": lambda z: [gpu_ot.greenkhorn(z.a, z.b, z.M, 0.3)],
    "screenkhorn": lambda z: [gpu_ot.screenkhorn(z.a, z.b, z.M, 0.3)],
    "unbalanced": lambda z: gradient(lambda M: gpu_ot.sinkhorn_unbalanced(z.a, 1.3 * z.b, M, 0.3, 0.5), z.M),
    "unbalanced by entropy": lambda z: [gpu_ot.sinkhorn_unbalanced(z.a, 1.3 * z.b, z.M, 0.3, 0.5, reg_type="entropy")],
    "unbalanced to a measure": lambda z: [gpu_ot.sinkhorn_unbalanced(z.a, z.b, z.M, 0.3, 0.5, c=z.a[:, None] * z.b)],
    "unbalanced2": lambda z: [gpu_ot.sinkhorn_unbalanced2(z.a, z.b, z.M, 0.3, 0.5)],
    "one sided": lambda z: [gpu_ot.sinkhorn_unbalanced(z.a, z.b, z.M, 0.3, (0.5, math.inf))],
    "ot.solve": lambda z: (lambda s: [s.plan, s.value, s.value_linear, *s.potentials])(ot.solve(z.M, z.a, z.b, reg=0.3)),
    "ot.solve_sample": lambda z: (lambda s: [s.plan, s.value])(ot.solve_sample(z.x, z.y, z.a, z.b, reg=0.3)),
    "ot.solve_batch": lambda z: (lambda s: [s.plan, s.value])(ot.solve_batch(z.Ms, reg=0.3)),
    "solve_sample_batch": lambda z: (lambda s: [s.plan, s.value])(gpu_ot.solve_sample_batch(z.xs, z.ys, reg=0.3)),
    "empirical": lambda z: [gpu_ot.empirical_sinkhorn(z.x, z.y, 0.3), gpu_ot.empirical_sinkhorn2(z.x, z.y, 0.3)],
    "lazily": lambda z: [gpu_ot.empirical_sinkhorn2(z.x, z.y, 0.3, isLazy=True)],
    "empirical divergence": lambda z: [gpu_ot.empirical_sinkhorn_divergence(z.x, z.y, 0.2, numIterMax=30)],
    "SamplesLoss": lambda z: gradient(lambda x, a: gpu_ot.SamplesLoss(blur=0.5)(a, x, z.b, z.y), z.x, z.a),
    "SamplesLoss of a batch": lambda z: gradient(lambda x: gpu_ot.SamplesLoss(blur=0.5, reach=1.0)(x, z.ys), z.xs),
    "SamplesLoss, p = 1": lambda z: gradient(lambda x: gpu_ot.SamplesLoss(p=1, blur=0.5)(x, z.y), z.x),
    "potentials": lambda z: list(gpu_ot.SamplesLoss(blur=0.5, potentials=True)(z.x, z.y)),
    "online": lambda z: gradient(lambda x: gpu_ot.SamplesLoss(blur=0.5, backend="chunked")(x, z.y), z.x),
    "SinkhornLoss": lambda z: gradient(lambda x: gpu_ot.SinkhornLoss(0.3, tau=0.5)(x, z.y), z.x),
    "SinkhornLoss, plan held": lambda z: gradient(lambda M: gpu_ot.SinkhornLoss(0.3, detach_plan=True)(M), z.M),
    "divergence": lambda z: [gpu_ot.divergence(Problem(SqEuclidean(z.x, z.y), 0.5)).value],
    "relative eps": lambda z: [gpu_ot.solve(Problem(SqEuclidean(z.x, z.y), ("std", 0.5))).value],
    "learnt eps": lambda z: gradient(lambda e: gpu_ot.solve(Problem(z.M, e)).value, 0.5 * z.a.sum()),
    "warm start": lambda z: [gpu_ot.solve(Problem(z.M, 0.3), start=gpu_ot.gaussian_potentials(z.x, z.y), tol=1e-6).value],
    "sorted start": lambda z: [gpu_ot.sorted_potentials(z.x[:, 0], z.y[:, 0])],
    "forbidden pairs": lambda z: [gpu_ot.solve(Problem(z.M.masked_fill(z.M.max() * 0.9 < z.M, math.inf), 0.2)).plan.to_dense()],
    "plan": lambda z: (lambda p: [p @ z.y, p.T @ z.x, *p.marginals, p[2:4], p.sum()])(z.solved().plan),
    "map": lambda z: (lambda s: [s.transport(), s.transport(z.x + 0.1), s.sharp_cost, s.normalized_entropy])(z.solved()),
    "alignment": alignment,
    "alignment to the diagonal": lambda z: alignment(z, reference="diagonal"),
    "alignment, costs averaged": lambda z: alignment(z, cost_scale="mean"),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_doors(seen, on_the_cpu, door):
    """As on the CPU, and what they give is on the device."""
    with on_the_cpu():
        truth = DOORS[door](Measures("cpu"))
    near(DOORS[door](Measures("cuda:1")), truth, rtol=1e-3, atol=1e-5)


def test_pots_functions_on_the_device(seen, on_the_cpu):
    """patch(device=...): numpy in, numpy out, and solved there."""
    theirs = pytest.importorskip("ot")
    a, b, M = (z.numpy() for z in (Measures("cpu").a, Measures("cpu").b, Measures("cpu").M))
    truth = theirs.sinkhorn(a, b, M, 0.05), theirs.sinkhorn_unbalanced(a, b, M, 0.05, 0.5)
    before = seen.launches
    with gpu_ot.patch(device="cuda:1"):
        ours = theirs.sinkhorn(a, b, M, 0.05), theirs.sinkhorn_unbalanced(a, b, M, 0.05, 0.5)
    for mine, right in zip(ours, truth, strict=True):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_allclose(mine, right, rtol=1e-3, atol=1e-6)
    assert seen.launches > before


def test_pairs_are_drawn_on_the_device(seen):
    z = Measures("cuda:1")
    plan = gpu_ot.solve(Problem(z.M, 0.1, z.a, z.b)).plan
    rows, columns = plan.sample(5, generator=generator(1))
    assert rows.device == columns.device == torch.device("cuda", 1) and rows.shape == (5,)
