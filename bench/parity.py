"""Every kernel and precision against float64 torch on the device: its error beside torch's own in float32."""

from __future__ import annotations

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
from ours import dense_loop, iterations, randn_clouds, solver
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
    """At most twice torch's error plus `slack` of the result's size."""
    live = truth.isfinite()
    size = max(1.0, truth[live].abs().max().item()) if bool(live.any()) else 1.0
    same = bool((ours[~live].double() == truth[~live]).all())
    worst, torchs = ((z.double() - truth)[live].abs().max().item() if bool(live.any()) else 0.0 for z in (ours, peer))
    passed = same and worst <= 2 * torchs + slack * size  # False for NaN
    report.add(section="parity", check=what, passed=passed, error=worst, torch_error=torchs, size=size, **details)


def tasks() -> list[tuple[Any, ...]]:
    """What the workers of the parity section share out: checks, then the kernels that the timings will want compiled."""
    sizes = [(1, 1, 1), (63, 257, 3), (129, 70, 8), (33, 50, 64), (20, 140, 130), (10, 30, 300)]
    if DRY:
        sizes = sizes[1::2]
    else:
        sizes += [(4097, 3001, 3), (1000, 1001, 17), (129, 40_001, 16), (3000, 2501, 64), (2000, 2049, 130), (1500, 1111, 700)]
        sizes += [(20_011, 30_013, 3), (20_011, 10_007, 64)]
    # The interpreter multiplies the bits of a bf16.
    precisions = [p for p in PRECISIONS if not (DRY and p == "bf16")]
    found: list[tuple[Any, ...]] = [("parity_of_kernels", *size, precision) for size in sizes for precision in precisions]
    found += [("parity_of_resident",), ("parity_of_geometry",), ("parity_of_batches",)]
    if not DRY:
        found += [("warm", n, d) for n, d in CASES]
    return found


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
            outcome = {"skipped": "failed"} if name == "warm" else {"passed": False}
            report.add(section="parity", check=name, error=reason(error), **outcome, **details)
    return 0


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
    check(report, "softmin", plain, peer, truth, slack, **details)
    check(report, "softmin with its shift", softmin(at, to, h, eps, shift=plain), peer, truth, slack, **details)
    bad = plain + torch.tensor([0.0, 500 * eps, -500 * eps, INF, math.nan], device=h.device).repeat(len(plain))[: len(plain)]
    check(report, "softmin with a bad shift", softmin(at, to, h, eps, shift=bad), peer, truth, slack, **details)
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
        check(report, f"apply to {name}", ours, torchs, right, slack + rough, **details)


def parity_of_batches(report: Any) -> None:
    from gpu_ot.kernels.apply import apply
    from gpu_ot.kernels.softmin import softmin

    torch.manual_seed(5)
    u, v, h = torch.randn(5, 70, 6, device=DEVICE), torch.randn(5, 333, 6, device=DEVICE), torch.randn(5, 333, device=DEVICE)
    v[2] *= 100
    h[1] = -INF
    truth, peer = dense_softmin(u.double(), v.double(), h.double(), 0.5), dense_softmin(u, v, h, 0.5)
    for b in range(5):
        check(report, "softmin of a batch", softmin(u, v, h, 0.5)[b], peer[b], truth[b], 1e-6, batch=b)
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
        check(report, "softmin of a ragged batch", s[b], torchs[0][b], truth[b], 1e-6, batch=b)
        check(report, "apply of a ragged batch", plan[b], torchs[1][b], right[b], 1e-6, batch=b)


def parity_of_resident(report: Any) -> None:
    from gpu_ot.kernels.resident import sinkhorn

    torch.manual_seed(0)
    for n, m in [(5, 7), (63, 40)] + ([] if DRY else [(64, 64), (256, 256), (1000, 200)]):
        for eps in (0.01, 1.0):
            C, a, b = torch.rand(3, n, m, device=DEVICE), torch.rand(3, n, device=DEVICE) + 0.1, torch.rand(3, m, device=DEVICE) + 0.1
            a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
            f, g, steps, _ = sinkhorn(C, a, b, eps, tol=0.0, max_iter=20)
            truth, peer = dense_loop(C.double(), a.double(), b.double(), eps, 20), dense_loop(C, a, b, eps, 20)
            for name, *three in zip(("f", "g"), (f, g), peer, truth, strict=True):
                check(report, f"resident {name}", *three, 2e-6, n=n, m=m, eps=eps, steps=int(steps.min()))


def parity_of_geometry(report: Any) -> None:
    """The backend as `solve` uses it: a softmin, and the gradient of a value in the points. Far from the origin, too."""
    from gpu_ot import Problem, SqEuclidean, gradients
    from gpu_ot.geometry.dense import Dense
    from gpu_ot.geometry.triton import Streaming

    for d, centre in ((3, 0.0), (3, 1e3), (17, 0.0), (64, 0.0), (128, 0.0)):
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
            check(report, f"backend {name}", *three, 1e-6, n=n, m=m, d=d, centre=centre)


WORK: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (parity_of_kernels, parity_of_resident, parity_of_geometry, parity_of_batches, warm)
}
