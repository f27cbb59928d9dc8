"""What a rank does in the tests of test_sharded.py, its results in a file. Run by them as a process of its own.

python tests/sharded_worker.py JOB[,JOB] RANK SIZE FOLDER [TIMEOUT]
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import gpu_ot
from gpu_ot import KL, Cosine, Euclidean, Matrix, Problem, Sharded, SqEuclidean
from gpu_ot.distributed import geometry as sharded

#: (rows, columns) of each rank: unequal shares, and empty ones.
SHARES = {
    1: ([37], [29]),
    2: ([30, 7], [0, 29]),
    3: ([20, 0, 17], [9, 20, 0]),
    4: ([5, 12, 0, 20], [7, 0, 21, 1]),
}
KINDS = {
    "squared": lambda x, y: SqEuclidean(x, y),
    "euclidean": lambda x, y: Euclidean(x, y),
    "sum": lambda x, y: 0.5 * SqEuclidean(x, y) + 2.0 * Cosine(x[..., :2], y[..., :2]),
    "matrix": lambda x, y: Matrix(torch.cdist(x, y).square()),
}
PENALTIES = {"balanced": KL(), "relaxed": (KL(2.0), KL(3.0)), "semi": (KL(), KL(1.0))}
#: name: (layout, backend, penalties, kind, grad)
CASES = {
    f"{layout} {backend} {held} {grad}": (layout, backend, held, "squared", grad)
    for layout in ("replicated", "ring")
    for backend in ("dense", "chunked")
    for held in ("balanced", "relaxed")
    for grad in ("envelope", "implicit")
}
CASES |= {
    "euclidean": ("replicated", "chunked", "balanced", "euclidean", "implicit"),
    "euclidean ring": ("ring", "chunked", "semi", "euclidean", "envelope"),
    "sum": ("replicated", "chunked", "relaxed", "sum", "envelope"),
    "sum ring": ("ring", "dense", "balanced", "sum", "implicit"),
    "matrix": ("replicated", "dense", "relaxed", "matrix", "implicit"),
    "matrix envelope": ("replicated", "softmin", "balanced", "matrix", "envelope"),
    "auto": ("auto", "auto", "semi", "squared", "envelope"),
    "unroll": ("replicated", "dense", "balanced", "squared", "unroll"),
}


def inputs(kind="squared", d=3):
    """x, y, a, b of the whole problem; a holds an empty atom."""
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(37, d, generator=gen, dtype=torch.float64), torch.randn(29, d, generator=gen, dtype=torch.float64) + 0.5
    a, b = torch.rand(37, generator=gen, dtype=torch.float64) + 0.1, torch.rand(29, generator=gen, dtype=torch.float64) + 0.1
    a[3] = 0
    return x, y, a / a.sum(), b / b.sum()


def parts(size, rank):
    found = []
    for sizes in SHARES[size]:
        start = sum(sizes[:rank])
        found.append(slice(start, start + sizes[rank]))
    return found


def study(case, size=None, rank=0):
    """Everything that can be asked of a case, as tensors: the whole problem's for size None, else what this rank gets."""
    layout, backend, held, kind, grad = CASES[case]
    x, y, a, b = inputs(kind)
    rows, columns = (slice(None), slice(None)) if size is None else parts(size, rank)
    v, u = torch.sin(torch.arange(29.0 * 2).double()).view(29, 2), torch.cos(torch.arange(37.0).double())
    if kind == "matrix":
        columns = slice(None)
        x = KINDS[kind](x, y).M[rows].clone().requires_grad_()
        leaves = [x]
        cost = Matrix(x)
    else:
        x, y = x[rows].clone().requires_grad_(), y[columns].clone().requires_grad_()
        leaves = [x, y]
        cost = KINDS[kind](x, y)
    a, b = a[rows].clone().requires_grad_(), b[columns].clone().requires_grad_()
    leaves += [a, b]
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
    found |= {f"gradient {i} [share]": grad for i, grad in enumerate(torch.autograd.grad(target, leaves, retain_graph=True))}
    found["plan @ v [share]"] = s.plan @ v[columns]
    found["plan.T @ u [share]"] = s.plan.T @ u[rows]
    if grad == "implicit":
        # The loss of shares is the sum over ranks; its gradients are whole.
        sent = (found["plan @ v [share]"] * torch.cos(torch.arange(2.0).double())).sum()
        found |= {f"sent {i} [share]": grad for i, grad in enumerate(torch.autograd.grad(sent, leaves, retain_graph=True))}
        sharp = s.sharp_cost + (found["value"] * 0)
        found |= {f"sharp {i} [share]": grad for i, grad in enumerate(torch.autograd.grad(sharp, leaves, retain_graph=True))}
    if grad != "unroll":
        found["plan [share]"] = s.plan.to_dense()
        found["marginal"], found["other marginal"] = s.plan.marginals
        found["sharp cost"], found["entropy"] = s.sharp_cost, s.normalized_entropy
    if grad == "envelope" and kind != "matrix":
        found["columns of the plan [share]"] = s.plan.T.to_dense()
        found["mapped [share]"] = s.transport(y=v[columns])
    if kind == "squared":
        found["new points"] = s.transport(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), y=v[columns])
        found["diagonal"] = s.plan.diagonal()
        found["warm"] = s.potential_a(cost.at(x=x.detach() + 0.1, y=y.detach()))
    return {name: z.detach() for name, z in found.items()}


#: What more ranks leave out, for time: all layouts, machines and penalties with envelope gradients, and some of the rest.
BRIEFLY = [case for case, (*_, grad) in CASES.items() if grad == "envelope" or case == "ring chunked relaxed implicit"]
SOME = [*BRIEFLY, "replicated dense balanced implicit", "replicated chunked relaxed implicit", "sum ring", "euclidean", "matrix"]
#: What is done twice, for the same bits.
TWICE = ["replicated dense balanced envelope", "ring chunked relaxed implicit", "replicated chunked relaxed implicit", "sum ring"]


def cases(size):
    return {3: SOME, 4: BRIEFLY}.get(size, list(CASES))


def study_all(rank, size):
    found = {case: study(case, size, rank) for case in cases(size)}
    return found, {case: study(case, size, rank) for case in TWICE if case in found}


def small(size, rank, **kind):
    """A Sharded cost of the points above, and this rank's weights."""
    x, y, a, b = inputs()
    rows, columns = parts(size, rank)
    return Sharded(SqEuclidean(x[rows], y[columns]), **kind), a[rows], b[columns]


def refusals(rank, size):
    """Who is told what where one rank asks for something else: the type and the words of each error, on each rank."""
    x, y, a, b = inputs()
    rows, columns = parts(size, rank)
    x, y, a, b = x[rows].clone(), y[columns].clone(), a[rows].clone(), b[columns].clone()
    odd = rank == 2

    def cost(**options):
        return Sharded(SqEuclidean(x, y), **options)

    def broken():
        return Sharded(SqEuclidean(torch.full_like(x, math.nan) if odd else x, y))

    def solved(**options):
        return gpu_ot.solve(Problem(cost(), 0.5, a, b), **options)

    asked = {
        "nan": lambda: Problem(broken(), 0.5, a, b),
        "nan and a relative eps": lambda: Problem(broken(), ("std", 0.5), a, b),
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
    }
    told = {}
    for name, ask in asked.items():
        try:
            ask()
            told[name] = ("", "")
        except Exception as error:
            told[name] = (type(error).__mro__[0].__name__ if not isinstance(error, gpu_ot.ProblemError) else "ProblemError", str(error))
        if name == "masses":
            told[name] = (type(error_of(ask)).__name__, told[name][1])
    told["and then"] = ("", str(solved(tol=1e-9).status.name))  # nothing that was refused has left the ranks out of step
    changed = Problem(cost(), 0.5, a, b)
    if odd:
        x.fill_(math.nan)
    told["diverges"] = ("", str(error_of(lambda: gpu_ot.solve(changed))))
    return told


def error_of(ask):
    try:
        ask()
    except Exception as error:
        return error


def traffic(rank, size):
    """{layout and looks: (bytes sent by this rank in an iteration, what the model says)}, the collectives themselves counted."""
    sent = [0]
    real = {
        name: getattr(dist, name)
        for name in ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "batch_isend_irecv", "broadcast")
        if hasattr(dist, name)
    }

    def counted(name):
        def call(*args, **options):
            if name.startswith("all_gather"):
                sent[0] += (size - 1) * args[1].numel() * args[1].itemsize
            elif name == "all_to_all_single":
                own = args[3][rank] if len(args) > 3 and args[3] else args[1].shape[0] // size
                sent[0] += (args[1].shape[0] - own) * args[1][:1].numel() * args[1].itemsize
            elif name == "batch_isend_irecv":
                sent[0] += sum(move.tensor.numel() * move.tensor.itemsize for move in args[0] if move.op is dist.isend)
            else:
                raise AssertionError(f"{name} in an iteration")
            return real[name](*args, **options)

        return call

    found = {}
    for layout in ("replicated", "ring"):
        cost, a, b = small(size, rank, layout=layout)
        problem = Problem(cost, 0.5, a, b)
        gpu_ot.solve(problem, max_iter=1, backend="chunked")  # replicates y
        for every in (1, 5):
            counts = []
            for iterations in (1 + every, 1 + 3 * every):
                sent[0] = 0
                for name in real:
                    setattr(dist, name, counted(name))
                solution = gpu_ot.solve(problem, tol=0, max_iter=iterations, check_every=every, accelerate="none", backend="chunked")
                for name, function in real.items():
                    setattr(dist, name, function)
                assert solution.n_iter == iterations
                counts.append(sent[0])
            model = [sharded.traffic(cost, looks=1)] + [sharded.traffic(cost, looks=0 if layout == "replicated" else 1)] * (every - 1)
            found[f"{layout} {every}"] = counts[1] - counts[0], 2 * sum(model)
    return found


def calls(rank, size, folder):
    """The other ways in: DTensors, solve_sample, SamplesLoss, batches, samples, checkpoints."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, y, a, b = inputs()
    rows, columns = parts(size, rank)
    found = {}
    mesh = init_device_mesh("cpu", (size,))
    dx, dy = (distribute_tensor(z, mesh, [Shard(0)]).requires_grad_() for z in (x, y))
    da = distribute_tensor(a, mesh, [Shard(0)])
    solution = gpu_ot.solve(Problem(SqEuclidean(dx, dy), 0.5, da, distribute_tensor(b, mesh, [Shard(0)])), tol=1e-12)
    gradient = torch.autograd.grad(solution.value, dx)[0]
    found["dtensor"] = solution.value.detach(), gradient.full_tensor()
    found["dtensor sample"] = gpu_ot.solve_sample(dx, dy, reg=0.5, tol=1e-12).value.detach()
    found["replicated dtensor"] = str(error_of(lambda: Problem(SqEuclidean(distribute_tensor(x, mesh, [Replicate()]), dy), 0.5)))

    own = x[rows].clone().requires_grad_()
    sampled = gpu_ot.solve_sample(own, y[columns], a[rows], b[columns], reg=0.5, unbalanced=2.0, group=mesh, layout="ring", tol=1e-12)
    found["solve_sample"] = sampled.value.detach(), torch.autograd.grad(sampled.value, own)[0]
    found["solve_sample refuses"] = str(error_of(lambda: gpu_ot.solve_sample(own, y[columns], reg=0.5, group=mesh, debias=True)))
    for name, options in (("loss", {}), ("relaxed loss", {"reach": 1.0, "p": 1}), ("cosine", {"cost": Cosine})):
        loss = gpu_ot.SamplesLoss(blur=0.5, tol=1e-11, group=mesh, **options)
        value = loss(own, y[columns])
        found[name] = value.detach(), torch.autograd.grad(value, own)[0]
    found["weighted loss"] = gpu_ot.SamplesLoss(blur=0.5, tol=1e-11, group=mesh)(a[rows], own, b[columns], y[columns]).detach()

    batch = torch.stack((x, x + 0.3))[:, rows], torch.stack((y, y * 1.1))[:, columns]
    for layout in ("replicated", "ring"):
        many = gpu_ot.solve(Problem(Sharded(SqEuclidean(*batch), layout=layout), 0.5, a[rows], b[columns]), tol=1e-12)
        found[f"batch {layout}"] = many.value, many.f, many.plan @ y[columns]

    for layout in ("replicated", "ring"):
        cost, wa, wb = small(size, rank, layout=layout)
        solution = gpu_ot.solve(Problem(cost, 0.5, wa, wb), tol=1e-9)
        drawn = solution.plan.sample(4000, torch.Generator().manual_seed(rank))
        found[f"sample {layout}"] = drawn
        found[f"sample of columns {layout}"] = solution.plan.T.sample(4000, torch.Generator().manual_seed(rank))
        found[f"float {layout}"] = gpu_ot.solve(
            Problem(Sharded(SqEuclidean(x[rows].float(), y[columns].float()), layout=layout), 0.5)
        ).value
    found["warm"] = torch.tensor(gpu_ot.solve(solution.problem, start=solution, tol=1e-8).n_iter)
    found["moved"] = gpu_ot.solve(Problem(small(size, rank)[0], 0.4, wa, wb), start=solution, tol=1e-12).f

    cost, wa, wb = small(size, rank)
    hard = Problem(cost, 0.02, wa, wb)
    kept = gpu_ot.Checkpoint(folder / "kept.safetensors", minutes=0)

    def interrupt(n_iter, error):
        if n_iter == 200:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        gpu_ot.solve(hard, tol=1e-9, accelerate="mixing", checkpoint=kept, on_check=interrupt)
    found["file"] = str(kept.path)
    found["resumed"] = gpu_ot.solve(hard, tol=1e-9, start=resumed(kept)).f, gpu_ot.solve(hard, tol=1e-9, accelerate="mixing").n_iter
    return found


def resumed(kept):
    """The start, read when it has been written for certain."""
    if dist.is_initialized():
        dist.barrier()
    return kept.start()


def ends(how, rank, size):
    """A solve in which the second rank ends: what the others are told, and after how long."""
    cost, a, b = small(size, rank, layout="ring" if how == "killed" else "replicated")
    problem = Problem(cost, 0.5, a, b)

    def last(n_iter, error):
        if rank == 1 and n_iter == 5:
            if how == "raised":
                raise ValueError("no more of this")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    begun = time.monotonic()
    error = error_of(lambda: gpu_ot.solve(problem, tol=0, max_iter=100_000, accelerate="none", on_check=last, check_every=1))
    return type(error).__name__, str(error), time.monotonic() - begun


def memory(rank, size):
    """(bytes of this rank's points, peak bytes beside them of a solve and a gradient in the ring)."""
    n, d = 512 // size, 2**12
    gen = torch.Generator().manual_seed(rank)
    x, y = torch.randn(n, d, generator=gen, dtype=torch.float64).requires_grad_(), torch.randn(n, d, generator=gen, dtype=torch.float64)

    def status(key):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

    solved(small(size, rank, layout="ring"))  # what threads and buffers take once
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    solution = gpu_ot.solve(Problem(Sharded(SqEuclidean(x, y), layout="ring"), 2.0 * d), max_iter=1, backend="chunked")
    solution.value.backward()
    return x.numel() * 16, status("VmHWM") - before


def solved(case):
    cost, a, b = case
    gpu_ot.solve(Problem(cost, 0.5, a, b), backend="chunked")


def main(jobs, rank, size, folder, timeout=60.0):
    torch.set_num_threads(1)
    if size > 1 or jobs != "study":
        meeting = dict(init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout), **meeting)
    for job in jobs.split(","):
        if job in ("killed", "raised", "stopped"):
            found = ends(job, rank, size)
        else:
            function = {"study": study_all, "refusals": refusals, "traffic": traffic, "calls": calls, "memory": memory}[job]
            found = function(rank, size, folder) if job == "calls" else function(rank, size)
        torch.save(found, folder / f"{job}{rank}.pt")
    os._exit(0)  # a group one of whose ranks is gone cannot be left in order


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *map(float, sys.argv[5:]))
