"""What the ranks do in the tests of test_sharded.py, which run this script: it forks so many ranks, and each leaves what a job found in a
file JOBrank.pt of the folder.

python tests/sharded_worker.py JOB[,JOB] SIZE FOLDER
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import gpu_ot
from gpu_ot import KL, Cosine, Euclidean, Matrix, Problem, Sharded, SqEuclidean

#: (rows, columns) of each rank: unequal shares, and empty ones.
SHARES = {
    1: ([37], [29]),
    2: ([30, 7], [0, 29]),
    3: ([20, 0, 17], [9, 20, 0]),
    4: ([5, 12, 0, 20], [7, 0, 21, 1]),
}
KINDS = {
    "squared": SqEuclidean,
    "euclidean": Euclidean,
    "matrix": Matrix,
    "sum": lambda x, y: 0.5 * SqEuclidean(x, y) + 2.0 * Cosine(x[..., :2], y[..., :2]),
}
PENALTIES = {"balanced": KL(), "relaxed": (KL(2.0), KL(3.0)), "semi": (KL(), KL(1.0))}
#: name: (layout, backend, penalties, kind, grad). Every pair of layout, backend, penalties and gradient is here.
CASES = {
    " ".join(case): case
    for case in (
        ("ring", "dense", "balanced", "squared", "envelope"),
        ("ring", "chunked", "relaxed", "squared", "implicit"),
        ("replicated", "dense", "relaxed", "squared", "envelope"),
        ("replicated", "chunked", "balanced", "squared", "implicit"),
        ("replicated", "dense", "semi", "euclidean", "implicit"),
        ("ring", "chunked", "semi", "euclidean", "envelope"),
        ("replicated", "chunked", "relaxed", "sum", "envelope"),
        ("ring", "dense", "balanced", "sum", "implicit"),
        ("replicated", "dense", "relaxed", "matrix", "implicit"),
        ("replicated", "softmin", "balanced", "matrix", "envelope"),
        ("auto", "auto", "semi", "squared", "envelope"),
        ("replicated", "dense", "balanced", "squared", "unroll"),
    )
}


def cases(size):
    """One rank has all cases, two and three every other one each, four every fourth."""
    names = list(CASES)
    return {1: names, 2: names[::2], 3: names[1::2], 4: names[::4]}[size]


def inputs(kind="squared", d=3):
    """x, y, a, b of the whole problem; a holds an empty atom."""
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(37, d, generator=gen, dtype=torch.float64), torch.randn(29, d, generator=gen, dtype=torch.float64) + 0.5
    a, b = torch.rand(37, generator=gen, dtype=torch.float64) + 0.1, torch.rand(29, generator=gen, dtype=torch.float64) + 0.1
    a[3] = 0
    return x, y, a / a.sum(), b / b.sum()


def parts(size, rank):
    return [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for sizes in SHARES[size]]


def answers(case, size=None, rank=0):
    """Everything that can be asked of a case, as tensors: the whole problem's for size None, else what this rank gets."""
    layout, backend, held, kind, grad = CASES[case]
    x, y, a, b = inputs(kind)
    rows, columns = (slice(None), slice(None)) if size is None else parts(size, rank)
    v, u = torch.sin(torch.arange(29.0 * 2).double()).view(29, 2), torch.cos(torch.arange(37.0).double())
    if kind == "matrix":
        columns, x, y = slice(None), torch.cdist(x, y).square(), None
    leaves = [z[own].clone().requires_grad_() for z, own in ((x, rows), (y, columns), (a, rows), (b, columns)) if z is not None]
    *points, a, b = leaves
    cost = KINDS[kind](*points)
    if size is not None:
        cost = Sharded(cost, layout=layout)
    problem = Problem(cost, ("std", 0.2), a, b, PENALTIES[held])
    options = dict(tol=1e-4, max_iter=20, accelerate="none") if grad == "unroll" else dict(tol=1e-12)
    s = gpu_ot.solve(problem, backend=backend, grad=grad, **options)
    found = {"value": s.value, "f": s.f, "g": s.g, "errors": s.errors, "n_iter": torch.tensor(s.n_iter)}
    target = s.value
    if grad != "envelope":
        weight = torch.cos(torch.arange(37.0).double()), torch.sin(torch.arange(29.0).double())
        target = 2 * s.value + (weight[0] * s.f * (problem.a > 0)).sum() + (weight[1] * s.g).sum()
    found |= {f"gradient {i} [shard]": grad for i, grad in enumerate(torch.autograd.grad(target, leaves, retain_graph=True))}
    found["plan @ v [shard]"] = s.plan @ v[columns]
    found["plan.T @ u [shard]"] = s.plan.T @ u[rows]
    if grad == "implicit":
        # The loss of shares is the sum over ranks; its gradients are whole.
        sent = (found["plan @ v [shard]"] * torch.cos(torch.arange(2.0).double())).sum()
        found |= {f"sent {i} [shard]": grad for i, grad in enumerate(torch.autograd.grad(sent, leaves, retain_graph=True))}
        sharp = s.sharp_cost + (found["value"] * 0)
        found |= {f"sharp {i} [shard]": grad for i, grad in enumerate(torch.autograd.grad(sharp, leaves, retain_graph=True))}
    if grad != "unroll":
        found["plan [shard]"] = s.plan.to_dense()
        found["marginal"], found["other marginal"] = s.plan.marginals
        found["sharp cost"], found["entropy"] = s.sharp_cost, s.normalized_entropy
    if grad == "envelope" and kind != "matrix":
        found["columns of the plan [shard]"] = s.plan.T.to_dense()
        found["mapped [shard]"] = s.transport(y=v[columns])
    if kind == "squared":
        found["new points"] = s.transport(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), y=v[columns])
        found["diagonal"] = s.plan.diagonal()
        found["warm"] = s.potential_a(cost.at(x=points[0].detach() + 0.1, y=points[1].detach()))
    return {name: z.detach() for name, z in found.items()}


def study(rank, size, folder=None):
    """The answers to every case, and to every other one of them again."""
    return [{case: answers(case, size, rank) for case in which} for which in (cases(size), cases(size)[::2])]


def small(size, rank, **kind):
    """A Sharded cost of the points above, and this rank's weights."""
    x, y, a, b = inputs()
    rows, columns = parts(size, rank)
    return Sharded(SqEuclidean(x[rows], y[columns]), **kind), a[rows], b[columns]


def refusals(rank, size, folder):
    """{question: (type, words)} of the errors on this rank, where one rank of three asks for something else."""
    x, y, a, b = inputs()
    rows, columns = parts(size, rank)
    x, y, a, b = x[rows].clone(), y[columns].clone(), a[rows].clone(), b[columns].clone()
    odd = rank == 2

    def cost(**options):
        return Sharded(SqEuclidean(x, y), **options)

    def broken(eps):
        return Problem(Sharded(SqEuclidean(torch.full_like(x, math.nan) if odd else x, y)), eps, a, b)

    def solved(**options):
        return gpu_ot.solve(Problem(cost(), 0.5, a, b), **options)

    changed = Problem(cost(), 0.5, a, b)

    def diverges():
        if odd:
            x.fill_(math.nan)
        gpu_ot.solve(changed)

    asked = {
        "nan": lambda: broken(0.5),
        "nan and a relative eps": lambda: broken(("std", 0.5)),
        "weight": lambda: Problem(cost(), 0.5, -a if odd else a, b),
        "eps": lambda: Problem(cost(), 0.5 + 0.1 * odd, a, b),
        "penalty": lambda: Problem(cost(), 0.5, a, b, KL(1.0 + odd)),
        "layout": lambda: cost(layout="ring" if odd else "replicated"),
        "dimensions": lambda: Sharded(SqEuclidean(x[:, : 3 - odd], y[:, : 3 - odd])),
        "type": lambda: Sharded(SqEuclidean(x.float(), y.float()) if odd else SqEuclidean(x, y)),
        "kind": lambda: Sharded(Euclidean(x, y) if odd else SqEuclidean(x, y)),
        "length": lambda: Problem(cost(), 0.5, a[1:] if odd else a, b),
        "masses": lambda: Problem(cost(), 0.5, 2 * a, b),
        "tol": lambda: solved(tol=1e-3 if odd else 1e-4),
        "backend": lambda: solved(backend="chunked" if odd else "dense"),
        "start": lambda: solved(start=torch.full((37,), float(odd))),
        "grad": lambda: solved(grad="none"),
        "a gradient": lambda: Sharded(SqEuclidean(x.clone().requires_grad_(odd), y)),
        "and then": lambda: solved(tol=1e-9).raise_unless_converged(),
        "diverges": diverges,
    }
    return {name: error_of(ask) for name, ask in asked.items()}


def error_of(ask):
    """(type, words) of the error that this raises."""
    try:
        ask()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def traffic(rank, size, folder):
    """{layout and iterations between checks: (bytes that this rank sent meanwhile, what the model says)}."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    from sharded import counted
    from sharded import traffic as expected_traffic

    found = {}
    for layout in ("replicated", "ring"):
        cost, a, b = small(size, rank, layout=layout)
        problem = Problem(cost, 0.5, a, b)
        gpu_ot.solve(problem, max_iter=1, backend="chunked")  # replicates y
        for every in (1, 5):
            counts = []
            for iterations in (1 + every, 1 + 3 * every):
                with counted(size, rank) as sent:
                    solution = gpu_ot.solve(problem, tol=0, max_iter=iterations, check_every=every, accelerate="none", backend="chunked")
                assert solution.n_iter == iterations
                counts.append(sent[0])
            unseen = expected_traffic(cost, checks=0 if layout == "replicated" else 1) * (every - 1)
            found[f"{layout} {every}"] = counts[1] - counts[0], 2 * (expected_traffic(cost, checks=1) + unseen)
    return found


def other_ways(size=None, rank=0, mesh=None):
    """What DTensors, solve_sample, SamplesLoss, batches, floats and warm starts find, as tensors; of the whole problem for size None."""
    from torch.distributed.tensor import Shard, distribute_tensor

    found = {}
    x, y, a, b = (z if mesh is None else distribute_tensor(z, mesh, [Shard(0)]) for z in inputs())
    x.requires_grad_()
    solution = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b), tol=1e-12)
    (gradient,) = torch.autograd.grad(solution.value, x)
    found["dtensor"], found["dtensor gradient"] = solution.value, gradient if mesh is None else gradient.full_tensor()
    uniform = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5), tol=1e-12) if mesh is None else gpu_ot.solve_sample(x, y, reg=0.5, tol=1e-12)
    found["dtensor sample"] = uniform.value

    x, y, a, b = inputs()
    rows, columns = (slice(None), slice(None)) if size is None else parts(size, rank)
    x, y, a, b = x[rows].clone().requires_grad_(), y[columns], a[rows], b[columns]
    losses = {"loss": {}, "relaxed loss": {"reach": 1.0, "p": 1}, "cosine loss": {"cost": Cosine}}
    values = {name: gpu_ot.SamplesLoss(blur=0.5, tol=1e-11, group=mesh, **options)(x, y) for name, options in losses.items()}
    values["weighted loss"] = gpu_ot.SamplesLoss(blur=0.5, tol=1e-11, group=mesh)(a, x, b, y)
    if mesh is None:
        values["solve_sample"] = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b, KL(2.0)), tol=1e-12).value
    else:
        options = dict(reg=0.5, unbalanced=2.0, group=mesh, layout="ring", tol=1e-12)
        values["solve_sample"] = gpu_ot.solve_sample(x, y, a, b, **options).value
    for name, value in values.items():
        found[name], found[f"{name}, gradient [shard]"] = value, torch.autograd.grad(value, x)[0]

    for layout in ("replicated", "ring"):

        def problem(x, y, eps=0.5, *weights, layout=layout):
            cost = SqEuclidean(x, y)
            return Problem(cost if size is None else Sharded(cost, layout=layout), eps, *weights)

        many = gpu_ot.solve(problem(torch.stack((x, x + 0.3)), torch.stack((y, y * 1.1)), 0.5, a, b), tol=1e-12)
        found |= {f"batch {layout}": many.value, f"f of the batch {layout}": many.f}
        found[f"products of the batch {layout} [shard]"] = (many.plan @ y).movedim(-2, 0)
        found[f"float {layout}"] = gpu_ot.solve(problem(x.float(), y.float())).value
        near = gpu_ot.solve(problem(x, y, 0.5, a, b), tol=1e-9)
        found[f"iterations from the solution {layout}"] = torch.tensor(gpu_ot.solve(near.problem, start=near, tol=1e-8).n_iter)
        found[f"from another eps {layout}"] = gpu_ot.solve(problem(x, y, 0.4, a, b), start=near, tol=1e-12).f
    return {name: z.detach() for name, z in found.items()}


def calls(rank, size, folder):
    """The other ways in, samples and checkpoints."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    found = {"other ways": other_ways(size, rank, mesh)}
    x, y, *_ = (distribute_tensor(z, mesh, [Replicate()]) for z in inputs())
    found["replicated dtensor"] = error_of(lambda: Problem(SqEuclidean(x, y), 0.5))[1]
    found["debias"] = error_of(lambda: gpu_ot.solve_sample(x, y, reg=0.5, group=mesh, debias=True))[1]
    for layout in ("replicated", "ring"):
        cost, a, b = small(size, rank, layout=layout)
        plan = gpu_ot.solve(Problem(cost, 0.5, a, b), tol=1e-9).plan
        found[f"sample {layout}"] = [P.sample(4000, torch.Generator().manual_seed(rank)) for P in (plan, plan.T)]

    hard = Problem(small(size, rank)[0], 0.02, a, b)
    kept = gpu_ot.Checkpoint(folder / "kept.safetensors", minutes=0)

    def interrupt(n_iter, error):
        if n_iter == 200:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        gpu_ot.solve(hard, tol=1e-9, accelerate="mixing", checkpoint=kept, on_check=interrupt)
    dist.barrier()  # the first rank has written for certain
    found["file"], found["resumed"] = kept.path, gpu_ot.solve(hard, tol=1e-9, start=kept.start()).f
    return found


def killed(rank, size, folder):
    return fails(rank, small(size, rank, layout="ring"), lambda: os.kill(os.getpid(), signal.SIGKILL))


def raised(rank, size, folder):
    def work():
        raise ValueError("no more of this")

    return fails(rank, small(size, rank), work)


def silent(rank, size, folder):
    """The second rank waits until the others have given up on it."""

    def work():
        while not all((folder / f"silent{other}.pt").exists() for other in (0, 2)):
            time.sleep(0.05)

    return fails(rank, small(size, rank, group=dist.new_group(timeout=timedelta(seconds=2))), work)


def fails(rank, case, work):
    """The error on this rank of a solve in which the second rank stops for `work`."""
    cost, a, b = case
    problem = Problem(cost, 0.5, a, b)

    def stop(n_iter, error):
        if rank == 1 and n_iter == 5:
            work()

    return error_of(lambda: gpu_ot.solve(problem, tol=0, max_iter=100_000, accelerate="none", on_check=stop, check_every=1))


def memory(rank, size, folder):
    """(bytes of this rank's points, peak bytes beside them of a solve and a gradient in the ring), where Linux tells."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    n, d = 512 // size, 2**12
    gen = torch.Generator().manual_seed(rank)
    x, y = torch.randn(n, d, generator=gen, dtype=torch.float64).requires_grad_(), torch.randn(n, d, generator=gen, dtype=torch.float64)

    def status(key):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    cost, a, b = small(size, rank, layout="ring")
    gpu_ot.solve(Problem(cost, 0.5, a, b), backend="chunked")  # what threads and buffers take once
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    solution = gpu_ot.solve(Problem(Sharded(SqEuclidean(x, y), layout="ring"), 2.0 * d), max_iter=1, backend="chunked")
    solution.value.backward()
    return x.numel() * 16, status("VmHWM") - before


JOBS = {job.__name__: job for job in (study, refusals, traffic, calls, memory, killed, raised, silent)}


def run(jobs, rank, size, folder):
    try:
        where = dict(init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
        dist.init_process_group("gloo", timeout=timedelta(minutes=10), **where)
        for job in jobs:
            torch.save(JOBS[job](rank, size, folder), folder / f"{job}{rank}.partial")
            os.replace(folder / f"{job}{rank}.partial", folder / f"{job}{rank}.pt")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # a group one of whose ranks is gone cannot be left in order


if __name__ == "__main__":
    import torch._dynamo  # once, not on every rank
    import torch.distributed.tensor

    gpu_ot.compiled.refused()  # imports the machine code
    torch.set_num_threads(1)
    for rank in range(int(sys.argv[2])):
        if os.fork() == 0:
            run(sys.argv[1].split(","), rank, int(sys.argv[2]), Path(sys.argv[3]))
    for _ in range(int(sys.argv[2])):
        os.wait()
