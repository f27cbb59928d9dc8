"""Every kernel and precision against float64 torch on the device: its error beside torch's own in float32."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import CASES, DEVICE, DRY, EPS, PRECISIONS
from ours import iterations, randn_clouds, solver
from rows import Clock, Report, reason

INF = math.inf
COMMAND = str(Path(__file__).with_name("gpu.py"))
BITS = {"fp32": 22, "tf32": 11, "fp16": 11, "bf16": 8}  # what a plan keeps when it is stored for the second product


def dense_softmin(u: torch.Tensor, v: torch.Tensor, h: torch.Tensor, eps: float) -> torch.Tensor:
    """-eps log sum_j exp((h_j + <u_i, v_j>) / eps) in the type of its inputs, a block of rows at a time."""
    block = max(1, 2**25 // v.shape[-2])
    return torch.cat([-eps * torch.logsumexp((h.unsqueeze(-2) + rows @ v.mT) / eps, -1) for rows in u.split(block, -2)], -1)


def dense_apply(u: torch.Tensor, v: torch.Tensor, k: torch.Tensor, h: torch.Tensor, eps: float, w: torch.Tensor) -> torch.Tensor:
    block = max(1, 2**25 // v.shape[-2])
    parts = zip(u.split(block, -2), k.split(block, -1), strict=True)
    return torch.cat([((near.unsqueeze(-1) + h.unsqueeze(-2) + rows @ v.mT) / eps).exp() @ w for rows, near in parts], -2)


def check(report: Any, what: str, ours: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor, slack: float, **details: Any) -> None:
    """At most twice torch's error plus `slack` of the result's size. `kernel`, among the details, is what a failure is blamed on."""
    live = truth.isfinite()
    size = max(1.0, truth[live].abs().max().item()) if bool(live.any()) else 1.0
    same = bool((ours[~live].double() == truth[~live]).all())
    worst, torchs = ((z.double() - truth)[live].abs().max().item() if bool(live.any()) else 0.0 for z in (ours, peer))
    passed = same and worst <= 2 * torchs + slack * size  # False for NaN
    report.add(section="parity", check=what, passed=passed, error=worst, torch_error=torchs, size=size, **details)


#: (n, m, d) of the checks of softmin and apply. Every d that is new means some six kernels to compile for each precision.
SIZES = {
    "fp32": [
        *((33, 50, 64), (3000, 2501, 64), (20_011, 10_007, 64), (63, 257, 3), (4097, 3001, 3), (1, 1, 1)),
        *((129, 40_001, 16), (2000, 2049, 130), (10, 30, 300)),
    ],
    "tf32": [(3000, 2501, 64), (63, 257, 3), (2000, 2049, 130)],
    "bf16": [(3000, 2501, 64)],
    "fp16": [(3000, 2501, 64), (63, 257, 3)],
}
if DRY:  # the interpreter multiplies the bits of a bf16
    SIZES = {"fp32": [(63, 57, 3), (20, 40, 130)], "tf32": [(33, 50, 64)], "fp16": [(10, 30, 300)]}


def tasks() -> list[tuple[Any, ...]]:
    """What the workers of the parity section share out: a launch of each kernel, checks, then what the timings want compiled."""
    found: list[tuple[Any, ...]] = [("launches", backend) for backend in BACKENDS]
    found += [("parity_of_resident",), ("parity_of_steps",), ("parity_of_batches",)]
    found += [("parity_of_absorbed", dtype) for dtype in ("float32", "float64")]
    found += [("parity_of_kernels", *size, precision) for precision, sizes in SIZES.items() for size in sizes]
    found += [("parity_of_geometry",), ("parity_of_solves",), ("parity_of_graphs",)]
    found += [("parity_of_few_features", name) for name in FEW_FEATURES]
    if not DRY:
        found += [("warm", n, d) for n, d in CASES]
    return found


#: Kernels that each backend launches in a solve and its gradient; kernels of a check of softmin and apply at one width.
BACKENDS = {"triton": 14, "dense": 12, "resident": 6}
FEW_FEATURES = ("mesh", "multiscale")
EACH_WIDTH = 6


def compilations() -> int:
    """About so many kernels are compiled before the timings begin."""
    from gpu_ot.kernels.tiles import cloud

    stored = [cloud(torch.zeros(1, d), precision) for precision, sizes in SIZES.items() for _, _, d in sizes]
    stored += [cloud(torch.zeros(1, d), precision) for precision in PRECISIONS for _, d in ([] if DRY else CASES)]
    return EACH_WIDTH * len({(c.precision, c.width, c.packed) for c in stored}) + sum(BACKENDS.values()) + 20


def parity(report: Report, clock: Clock) -> None:
    """Several processes at once: a check takes milliseconds, and compiling its kernels seconds of one core, once."""
    count = 1 if DRY else max(1, min(8, (os.cpu_count() or 2) // 2))
    command = [sys.executable, COMMAND, "--seconds", str(clock.left() - 5), *(["--dry"] if DRY else [])]
    workers = [
        subprocess.Popen([*command, "--worker", f"{i}/{count}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    noise: dict[int, str] = {}

    def listen(i: int, worker: Any) -> None:
        for line in worker.stdout:
            if line.startswith("ROW "):
                report.add(**json.loads(line[4:]))

    def drain(i: int, worker: Any) -> None:
        noise[i] = worker.stderr.read()[-1500:]

    threads = [threading.Thread(target=each, args=pair, daemon=True) for pair in enumerate(workers) for each in (listen, drain)]
    for thread in threads:
        thread.start()
    for i, worker in enumerate(workers):
        try:
            code = worker.wait(max(clock.left() + 5, 5))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            report.add(section="parity", check=f"worker {i} of {count}", skipped="no time left")
            continue
        if code:
            report.add(section="parity", check=f"worker {i} of {count}", passed=False, error=f"exit code {code}")
    for thread in threads:
        thread.join(5)
    for i, worker in enumerate(workers):
        if worker.returncode > 0:
            print(noise.get(i, ""), file=sys.stderr)


class Pipe:
    """A worker's report: its rows go to the parent."""

    def add(self, **row: Any) -> None:
        print("ROW " + json.dumps(row), flush=True)


def work(part: str, seconds: float) -> int:
    index, count = map(int, part.split("/"))
    report, end = Pipe(), time.monotonic() + seconds
    for name, *given in tasks()[index::count]:
        details = dict(zip("nmd", given, strict=False), task=name)
        if time.monotonic() > end:
            report.add(section="parity", check=name, skipped="no time left", **details)
            continue
        try:
            WORK[name](report, *given)
        except Exception as error:
            traceback.print_exc(limit=-3)
            # Warming up is no check: what fails there fails again, visibly, when it is timed.
            outcome = {"skipped": "failed"} if name == "warm" else {"passed": False, "kernel": blamed(name, given)}
            report.add(section="parity", check=name, error=reason(error), **outcome, **details)
    return 0


def blamed(name: str, given: Any) -> str:
    """What a task that raised says about: a kernel, or a backend."""
    if name == "parity_of_kernels":
        return f"softmin {given[-1]}"
    if name in ("launches", "parity_of_few_features"):
        return str(given[0])
    known = {"parity_of_resident": "resident", "parity_of_steps": "step", "parity_of_absorbed": "dense", "parity_of_graphs": "graphs"}
    return known.get(name, "triton")


def launches(report: Any, backend: str) -> None:
    """One launch of each kernel that a solve and its gradient need, plain and accelerated, alone and in a batch."""
    from gpu_ot import KL, Problem, SqEuclidean, solve

    for batch, penalty in (((), KL()), ((2,), KL(0.5))):
        x, y = (torch.rand(*batch, n, 3, device=DEVICE) for n in (40, 50))
        x.requires_grad_()
        done = solve(Problem(SqEuclidean(x, y), 0.1, penalties=penalty), backend=backend, tol=0.0, max_iter=12, accelerate="mixing")
        (grad,) = torch.autograd.grad(done.value.sum(), x)
        passed = bool(grad.isfinite().all() & done.f.isfinite().all())
        report.add(section="parity", check=f"launches of {backend}", passed=passed, kernel=backend, batch=len(batch))


def warm(report: Any, n: int, d: int) -> None:
    """Compiles, into Triton's cache on the disk, what the section after this one times."""
    x, y = randn_clouds(n, d)
    for precision in PRECISIONS:
        iterations(x, y, precision, 2)()
    solver(x, y, 2, True)()


def parity_of_kernels(report: Any, n: int, m: int, d: int, precision: str) -> None:
    from gpu_ot.kernels.tiles import cloud

    gen = torch.Generator().manual_seed(n + d)
    u, v = (torch.randn(size, d, generator=gen).to(DEVICE) for size in (n, m))
    u, h = u / d**0.5, torch.randn(m, generator=gen).to(DEVICE)
    if m > 2:
        h[m // 2] = -INF
    at, to = cloud(u, precision), cloud(v, precision)
    # A lower precision is to solve the problem of its rounded points, exactly.
    rounded = tuple(c.data[0, : c.n, :d].float() * c.unit for c in (at, to))
    seen = (u, v) if precision == "fp32" else rounded
    for eps in (0.01, 1.0):
        compare_kernels(report, at, to, seen, h, eps, dict(n=n, m=m, d=d, eps=eps, precision=precision))


def compare_kernels(report: Any, at: Any, to: Any, seen: Any, h: torch.Tensor, eps: float, details: dict[str, Any]) -> None:
    from gpu_ot.kernels.apply import apply
    from gpu_ot.kernels.softmin import softmin

    u, v = seen
    wide = [z.double() for z in (u, v, h)]
    precision, m = details["precision"], details["m"]
    truth, peer = dense_softmin(*wide, eps), dense_softmin(u, v, h, eps)
    slack = 1e-6 if precision == "fp32" else 1e-5
    plain = softmin(at, to, h, eps)
    softmins = details | {"kernel": f"softmin {precision}"}
    check(report, "softmin", plain, peer, truth, slack, **softmins)
    check(report, "softmin with its shift", softmin(at, to, h, eps, shift=plain), peer, truth, slack, **softmins)
    bad = plain + torch.tensor([0.0, 500 * eps, -500 * eps, INF, math.nan], device=h.device).repeat(len(plain))[: len(plain)]
    check(report, "softmin with a bad shift", softmin(at, to, h, eps, shift=bad), peer, truth, slack, **softmins)
    k = truth.float()
    gen = torch.Generator().manual_seed(m)
    vector, matrix = (torch.randn(m, c, generator=gen).to(h.device) for c in (1, 5))
    for name, w, given in (("a vector", vector, vector), ("a matrix", matrix, matrix), ("the points", v, v), ("the stored points", v, to)):
        if given is to and (to.packed or precision == "tf32"):
            continue
        right = dense_apply(*wide[:2], k.double(), wide[2], eps, w.double())
        torchs = dense_apply(u, v, k, h, eps, w)
        # Below fp32 the plan itself is rounded for the second product, and so is w: of the size of both.
        rough = 0.0 if precision == "fp32" or w.shape[-1] == 1 else 2.0 ** (1 - BITS[precision]) * w.abs().max().item()
        ours = apply(at, to, k, h, eps, given, precision=precision)
        check(report, f"apply to {name}", ours, torchs, right, slack + rough, kernel=f"apply {precision}", **details)


def parity_of_batches(report: Any) -> None:
    from gpu_ot.kernels.apply import apply
    from gpu_ot.kernels.softmin import softmin

    torch.manual_seed(5)
    u, v, h = torch.randn(5, 70, 6, device=DEVICE), torch.randn(5, 333, 6, device=DEVICE), torch.randn(5, 333, device=DEVICE)
    v[2] *= 100
    h[1] = -INF
    truth, peer = dense_softmin(u.double(), v.double(), h.double(), 0.5), dense_softmin(u, v, h, 0.5)
    for b in range(5):
        check(report, "softmin of a batch", softmin(u, v, h, 0.5)[b], peer[b], truth[b], 1e-6, batch=b, kernel="softmin fp32")
    # Padded: what lies behind the lengths is skipped, and the rest is as before.
    v[2] /= 100
    h = torch.randn(5, 333, device=DEVICE)
    rows, columns = (torch.tensor(z, dtype=torch.int32, device=DEVICE) for z in ([70, 1, 64, 65, 30], [333, 200, 1, 128, 129]))
    for b in range(5):
        h[b, columns[b] :] = -INF
    k, w = dense_softmin(u, v, h, 0.5), torch.randn(5, 333, 3, device=DEVICE)
    wide = [z.double() for z in (u, v, h)]
    truth, s = dense_softmin(*wide, 0.5), softmin(u, v, h, 0.5, shift=k, columns_used=columns, wide=True)
    for b in range(5):
        k[b, rows[b] :] = -INF
    plan, right = (
        apply(u, v, k, h, 0.5, w, rows_used=rows, columns_used=columns),
        dense_apply(*wide[:2], k.double(), wide[2], 0.5, w.double()),
    )
    torchs = dense_softmin(u, v, h, 0.5), dense_apply(u, v, k, h, 0.5, w)
    for b in range(5):
        check(report, "softmin of a ragged batch", s[b], torchs[0][b], truth[b], 1e-6, batch=b, kernel="softmin fp32")
        check(report, "apply of a ragged batch", plan[b], torchs[1][b], right[b], 1e-6, batch=b, kernel="apply fp32")


def parity_of_resident(report: Any) -> None:
    """A block of iterations, and accelerated ones against those of the readable backend."""
    from gpu_ot.kernels.resident import run

    from gpu_ot import Problem, solve

    torch.manual_seed(0)
    for n, m in [(5, 7)] if DRY else [(5, 7), (63, 40), (64, 64), (256, 256), (1000, 200)]:
        for eps in (0.01, 1.0):
            C, a, b = torch.rand(3, n, m, device=DEVICE), torch.rand(3, n, device=DEVICE) + 0.1, torch.rand(3, m, device=DEVICE) + 0.1
            a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
            start, details = torch.zeros(3, m, device=DEVICE, dtype=torch.float64), dict(n=n, m=m, eps=eps, kernel="resident")
            ours = run(C, a, b, None, None, start, eps, 10)
            truth, peer = (
                [z.to(dtype) for z in ten(C.to(dtype), a.to(dtype), b.to(dtype), eps)] for dtype in (torch.float64, torch.float32)
            )
            for name, *three in zip(("f", "g", "g_next"), ours, peer, truth, strict=True):
                check(report, f"resident {name}", *three, 2e-6, **details)
        problem = Problem(C, 0.05, a.double(), b.double())
        mine, theirs = (solve(problem, backend=backend, accelerate="mixing", tol=1e-5).value for backend in ("resident", "softmin"))
        check(report, "resident, accelerated", mine, theirs, theirs.double(), 1e-4, n=n, m=m, kernel="resident")


def ten(C: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(f, g, g_next) after ten iterations from 0, as the paper has it."""
    f, g, g_next = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(b)
    for _ in range(10):
        g = g_next
        f = -eps * torch.logsumexp((g + eps * b.log()).unsqueeze(-2) / eps - C / eps, -1)
        g_next = -eps * torch.logsumexp((f + eps * a.log()).unsqueeze(-1) / eps - C / eps, -2)
    return f, g, g_next


def parity_of_steps(report: Any) -> None:
    """Proposals and checks by kernels and by torch, along a run."""
    from gpu_ot import KL, Problem
    from gpu_ot.geometry.dense import Dense
    from gpu_ot.solver import fused
    from gpu_ot.solver.acceleration import Anderson
    from gpu_ot.solver.criterion import NORMS, Marginal
    from gpu_ot.solver.monitor import Monitor
    from gpu_ot.solver.step import Alternating, Start

    for penalty, batch, m in ((KL(), (), 70), (KL(0.5), (3,), 40), *([] if DRY else [(KL(), (), 5000)])):
        torch.manual_seed(m)
        problem = Problem(torch.rand(*batch, 30, m, device=DEVICE, dtype=torch.float64), 0.02, penalties=penalty)
        step, geometry = Alternating(problem, problem.eps, Anderson(gauge=problem.balanced)), Dense(problem.cost)
        monitors = {norm: Monitor(step, Marginal(1e-9, norm), torch.float64) for norm in NORMS}
        accelerator, worst, torchs = step.accelerator, 0.0, None
        with torch.no_grad():
            state = step.begin(geometry, Start(torch.zeros_like(problem.a), problem.a), None)
            state = step.moved(geometry, state, state.g_next, None, 1)
            for _ in range(3 if DRY else 12):
                found = fused.propose(step, state, accelerator.gauge, accelerator.memory)
                assert found is not None
                target = state.g_next - shift(problem, state)
                right, torchs = accelerator.next(step, torchs, state.g, target)
                worst = max(worst, (found[0] - right).abs().max().item() / right.abs().max().item())
                for monitor in monitors.values():
                    mine, theirs = monitor.criterion.check(monitor, state), monitor._check(state, state)
                    monitor.kept = None
                    assert mine is not None
                    worst = max(worst, *((p.double() - q.double()).abs().max().item() for p, q in zip(mine[2:3], theirs[2:3], strict=True)))
                state = step.moved(geometry, state, *found, 1)
        report.add(section="parity", check="steps and checks", passed=worst < 1e-8, error=worst, m=m, batch=len(batch), kernel="step")


def shift(problem: Any, state: Any) -> Any:
    from gpu_ot.penalties import best_shift

    return best_shift(problem.penalties, problem.a, problem.b, state.f, state.g_next)


def parity_of_absorbed(report: Any, dtype: str) -> None:
    """Iterations on an absorbed kernel, by kernels and by torch."""
    from gpu_ot import KL, Problem
    from gpu_ot.geometry import absorbed_launches
    from gpu_ot.geometry.absorbed import Absorbed

    for penalty, batch, m in ((KL(), (), 70), (KL(0.5), (3,), 40), *([] if DRY else [(KL(), (), 5000)])):
        torch.manual_seed(m)
        C = torch.rand(*batch, 90, m, device=DEVICE, dtype=getattr(torch, dtype))
        problem = Problem(C, 0.05, penalties=penalty)
        geometry = Absorbed(problem.cost)
        with torch.no_grad():
            _, g, _ = geometry.iterate(problem, torch.zeros_like(problem.b), 0.05, 1)
            served = absorbed_launches.serve(geometry, problem, g)
            ours = absorbed_launches.iterate(geometry, problem, g, 0.05, 3)
            assert geometry.kernel.products is not None
            geometry.kernel.products.whole_rows = False  # then torch does it
            theirs = geometry._multiply(problem, g, 0.05, 3)
        worst = max((p - q).abs().max().item() for p, q in zip(ours[:3], theirs[:3], strict=True))
        passed = served and bool(ours[3]) and worst < (1e-12 if dtype == "float64" else 1e-5)
        report.add(section="parity", check=f"absorbed {dtype}", passed=passed, error=worst, m=m, batch=len(batch), kernel="dense")


def parity_of_solves(report: Any) -> None:
    """Whole solves and their gradients against float64 on the CPU, without a kernel."""
    from gpu_ot import KL, Problem, SqEuclidean, solve

    n, m = (20, 30) if DRY else (300, 250)
    for backend in BACKENDS:
        for penalty in (KL(), KL(0.5)):
            torch.manual_seed(1)
            clouds, found = [torch.rand(k, 3) for k in (n, m)], []
            for device, dtype, name in ((DEVICE, torch.float32, backend), (torch.device("cpu"), torch.float64, "chunked")):
                x, y = (z.to(device, dtype) for z in clouds)
                x.requires_grad_()
                value = solve(
                    Problem(SqEuclidean(x, y), 0.05, penalties=penalty), backend=name, tol=1e-6, max_iter=60 if DRY else 2000
                ).value
                found.append([value.detach().cpu().view(1), torch.autograd.grad(value, x)[0].cpu()])
            for name, mine, right in zip(("value", "gradient"), *found, strict=True):
                check(report, f"solve by {backend}: {name}", mine, right.float(), right, 1e-4, kernel=backend)


def parity_of_graphs(report: Any) -> None:
    """Blocks of iterations as CUDA graphs against the same launches, bit by bit; refused graphs are a failure here."""
    import ours

    from gpu_ot.geometry import graphs

    x, y = (torch.rand(k, 3, device=DEVICE) for k in ((12, 15) if DRY else (700, 500)))
    for backend, accelerate in itertools.product(("triton", "dense"), ("none", "mixing")):
        found = []
        for after in (graphs.AFTER, 10**9):
            with ours.graphs_after(after):
                found.append(ours.blocks(x, y, 2, 33, accelerate, backend)())
        passed = not graphs._refused and all(torch.equal(p, q) for p, q in zip(*found, strict=True))
        report.add(section="parity", check=f"graphs of {backend}, accelerate={accelerate}", passed=passed, kernel="graphs")


def parity_of_few_features(report: Any, backend: str) -> None:
    """Solves in one to three dimensions to a tolerance: exact marginals of all points, and the value of a float64 solve on the CPU."""
    from gpu_ot import Problem, SqEuclidean, solve

    tol, n, m = 1e-3, 90 if DRY else 3000, 80 if DRY else 2500
    for d in (1, 2, 3):
        torch.manual_seed(d)
        x, y = torch.rand(n, d), torch.rand(m, d) ** 2
        s = solve(Problem(SqEuclidean(x.to(DEVICE), y.to(DEVICE)), 0.01), backend=backend, tol=tol, max_iter=500)
        truth = solve(Problem(SqEuclidean(x.double(), y.double()), 0.01), backend="chunked", tol=1e-6, max_iter=2000)
        off, error = s.measure(samples=max(n, m)).error, abs(s.value.item() / truth.value.item() - 1)
        common = {"section": "parity", "kernel": backend, "d": d, "n": n, "m": m}
        report.add(**common, check=f"{backend}: marginals", error=off, passed=s.status.name == "converged" and off < 1.1 * tol)
        report.add(**common, check=f"{backend}: value", error=error, passed=error < 3 * tol)


def parity_of_geometry(report: Any) -> None:
    """The backend as `solve` uses it: a softmin, and the gradient of a value in the points. Far from the origin, too."""
    from gpu_ot import Problem, SqEuclidean, gradients
    from gpu_ot.geometry.dense import Dense
    from gpu_ot.geometry.triton import Streaming

    for d, centre in ((3, 0.0), (3, 1e3), (64, 0.0)):
        torch.manual_seed(d)
        n, m = (20, 30) if DRY else (1111, 900)
        x, y = (torch.randn(size, d, device=DEVICE) / d**0.5 + centre for size in (n, m))
        g = torch.randn(m, dtype=torch.float64, device=DEVICE)
        results = []
        for ours, wide in ((True, False), (False, False), (False, True)):
            points = [(z.double() if wide else z).detach().requires_grad_() for z in (x, y)]
            problem = Problem(SqEuclidean(*points), EPS)
            geometry = Streaming(problem) if ours else Dense(problem.cost.dense())
            s = gradients.softmin(geometry, g, problem.b, EPS)
            results.append([s.detach(), *torch.autograd.grad(s.sum(), points)])
        for name, *three in zip(("softmin", "gradient in x", "gradient in y"), *results, strict=True):
            check(report, f"backend {name}", *three, 1e-6, n=n, m=m, d=d, centre=centre, kernel="triton")


WORK: dict[str, Callable[..., None]] = {
    each.__name__: each
    for each in (
        *(launches, parity_of_resident, parity_of_steps, parity_of_absorbed, parity_of_kernels),
        *(parity_of_batches, parity_of_geometry, parity_of_graphs, parity_of_few_features, parity_of_solves, warm),
    )
}
