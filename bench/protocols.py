"""The protocols: which problems, which contestants, what is reported beside the time."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import ours
import peers
import torch
from machine import CASES, DEVICE, DRY, EPS, PRECISIONS, empty_cache, floor_ms, synchronize
from ours import dense_loop, randn_clouds
from parity import parity
from rows import Clock, Report, at_most, compare, peak, quiet, reason


def iterations(report: Report, clock: Clock) -> None:
    """Theirs: eps 0.1, 10 iterations, randn clouds. Ten iterations of two half-iterations; times per iteration."""
    steps = 10
    for n, d in CASES:
        x, y = randn_clouds(n, d)
        contestants: dict[str, Callable[[], Any]] = {
            f"gpu_ot kernels {p}": ours.iterations(x, y, p, steps) for p in PRECISIONS if not (DRY and p == "bf16")
        }
        contestants["gpu_ot solve fp32"] = ours.solver(x, y, steps, False)
        contestants["gpu_ot iterate fp32"] = ours.iterate(x, y, steps)
        for form in ("alternating", "symmetric"):
            for tf32 in (True, False) if n == 10_000 else (True,):
                contestants[f"flash-sinkhorn {form} {'tf32' if tf32 else 'fp32'}"] = peers.flash(x, y, steps, False, tf32, form)
        contestants["GeomLoss online fp32"] = peers.geomloss_online(x, y, steps, False)
        if not DRY:
            contestants["KeOps logsumexp fp32"] = peers.keops_iterations(x, y, steps)
        if n <= 10_000:
            contestants["torch dense fp32"] = ours.torch_iterations(x, y, steps)
        contestants["OTT-JAX fp32"] = peers.ott(x, y, EPS, steps)

        def floor(precision: str, n: int = n, d: int = d) -> float | None:
            return floor_ms(n, n, d, precision, 2)

        compare(
            report, clock, "iterations", f"forward, n = m = {n}, d = {d}, per iteration", contestants, per=steps, floor=floor, seconds=8
        )
        if n == 1_000 or (n == 50_000 and d == 3):
            continue
        contestants = {"gpu_ot solve fp32": ours.solver(x, y, steps, True)}
        for tf32 in (True, False):
            contestants[f"flash-sinkhorn symmetric {'tf32' if tf32 else 'fp32'}"] = peers.flash(x, y, steps, True, tf32, "symmetric")
        contestants["GeomLoss online fp32"] = peers.geomloss_online(x, y, steps, True)
        compare(report, clock, "iterations", f"forward and backward, n = m = {n}, d = {d}, {steps} iterations", contestants, seconds=8)


def graphs(report: Report, clock: Clock) -> None:
    """A long run, whose blocks of ten iterations are launched one by one or as a graph."""
    steps, sizes = (40, (20,)) if DRY else (300, (1_000, 4_000, 10_000))
    for n in sizes:
        for backend, accelerate in itertools.product(("triton", "dense"), ("mixing", "none")):
            run = ours.blocks(*randn_clouds(n, 3), 10, steps, accelerate, backend)
            contestants: dict[str, Callable[[], Any]] = {"gpu_ot graphs": run, "gpu_ot launches": ours.without_graphs(run)}
            case = f"{backend}, accelerate={accelerate}, n = m = {n}, per iteration"
            compare(report, clock, "graphs", case, contestants, per=steps, seconds=2)


def dense(report: Report, clock: Clock) -> None:
    """The user's own matrix: gpu_ot.sinkhorn and POT's on the same CUDA tensors, 100 iterations."""
    import gpu_ot

    steps, reg = 100, 4e-3
    options: dict[str, Any] = dict(numItermax=steps, stopThr=0.0, warn=False)

    def pot(method: str, M: torch.Tensor, a: torch.Tensor) -> Callable[[], Any]:
        def run() -> Any:
            import ot

            return ot.sinkhorn(a, a, M, reg, method=method, **options)

        return run

    for n in (30, 50) if DRY else (8_192, 2_048, 512, 16_384):
        x, y = (z.sigmoid() for z in randn_clouds(n, 3))
        M = torch.cdist(x, y).square()
        M /= M.max()
        a = torch.full((n,), 1 / n, device=DEVICE)
        contestants: dict[str, Callable[[], Any]] = {
            "gpu_ot.sinkhorn fp32": lambda M=M, a=a: gpu_ot.sinkhorn(a, a, M, reg, **options),
            "POT sinkhorn fp32": pot("sinkhorn", M, a),
        }
        if n <= 8_192:
            wide = M.double(), a.double()
            contestants["gpu_ot.sinkhorn fp64"] = lambda M=wide[0], a=wide[1]: gpu_ot.sinkhorn(a, a, M, reg, **options)
            contestants["POT sinkhorn fp64"] = pot("sinkhorn", *wide)
            contestants["POT sinkhorn_log fp32"] = pot("sinkhorn_log", M, a)
        truth = None
        if n <= 2_048:
            f, g = dense_loop(M.double(), a.double()[None], a.double()[None], reg, steps, columns_first=True)
            truth = (a[:, None] * a * ((f[0][:, None] + g[0] - M.double()) / reg).exp()).double()

        def describe(name: str, P: torch.Tensor, truth: torch.Tensor | None = truth) -> dict[str, Any]:
            return {} if truth is None else {"plan_error": ((P.double() - truth).abs().max() / truth.max()).item()}

        # One read of the fp32 matrix per iteration at 4.3 TB/s, an H200's measured copy.
        floor = None if DRY else 1e3 * steps * 4 * n * n / 4.3e12
        compare(
            report,
            clock,
            "dense",
            f"drop-in, n = m = {n}, {steps} iterations",
            contestants,
            floor=lambda precision, floor=floor: floor and floor * (2 if precision == "fp64" else 1),
            repeats=7,
            seconds=8,
            describe=describe,
        )
        empty_cache()


def batched(report: Report, clock: Clock) -> None:
    """Many small problems, 100 iterations each: one launch against loops of launches."""
    from gpu_ot import Problem, solve

    steps, eps = (3, 0.05) if DRY else (100, 0.05)
    for B, n in ((3, 8), (2, 20)) if DRY else ((1024, 64), (64, 256)):
        gen = torch.Generator().manual_seed(0)
        C = torch.rand(B, n, n, generator=gen).to(DEVICE)
        a = torch.full((B, n), 1 / n, device=DEVICE)

        def pot(batch: bool, C: torch.Tensor = C, a: torch.Tensor = a) -> Any:
            import ot

            if batch:
                return ot.batch.solve_batch(C, reg=eps, max_iter=steps, tol=0.0)
            return [ot.sinkhorn(w, w, M, eps, numItermax=steps, stopThr=0.0, warn=False) for w, M in zip(a[:8], C[:8], strict=False)]

        contestants: dict[str, Callable[[], Any]] = {
            f"gpu_ot {name} fp32": lambda C=C, backend=backend: (
                solve(Problem(C, eps), backend=backend, tol=0.0, max_iter=steps, check_every=steps, accelerate="none").f
            )
            for name, backend in (("resident", "resident"), ("solve dense", "dense"))
        }
        contestants |= {
            "torch logsumexp fp32": lambda C=C, a=a: dense_loop(C, a, a, eps, steps),
            "POT solve_batch fp32": lambda: pot(True),
            "POT sinkhorn, 8 of them": lambda: pot(False),
        }
        # One exp2 per entry and iteration; the matrices live in the L1 caches.
        floor = floor_ms(n, n, 1, "fp16", B * steps)
        compare(
            report,
            clock,
            "batched",
            f"B = {B}, n = m = {n}, {steps} iterations",
            contestants,
            floor=lambda _, floor=floor: floor,
            seconds=6,
        )


def tolerance(report: Report, clock: Clock) -> None:
    """Ours: time to an L1 marginal error of 1e-3, eps relative to std(C)."""
    from gpu_ot import Problem, SqEuclidean, solve

    limit = 50 if DRY else 2_000
    for n, d, relative in ((30, 3, 0.1),) if DRY else ((10_000, 3, 0.1), (10_000, 64, 0.1), (10_000, 64, 0.01), (10_000, 3, 0.01)):
        x, y = randn_clouds(n, d)
        eps = relative * torch.cdist(x[:2000], y[:2000]).square().std().item()

        def mine(backend: str, x: torch.Tensor = x, y: torch.Tensor = y, eps: float = eps) -> Any:
            return solve(Problem(SqEuclidean(x, y), eps), backend=backend, tol=1e-3, max_iter=limit)

        def pot(x: torch.Tensor = x, y: torch.Tensor = y, eps: float = eps) -> Any:
            from ot import sinkhorn

            w = torch.full((len(x),), 1 / len(x), device=x.device)
            # Its error is Euclidean: within 1e-3 / sqrt(n) the L1 error is surely within 1e-3.
            return sinkhorn(w, w, torch.cdist(x, y).square(), eps, stopThr=1e-3 / len(x) ** 0.5, numItermax=limit, warn=False, log=True)[1]

        def describe(name: str, result: Any) -> dict[str, Any]:
            if name.startswith("gpu_ot"):
                last = float(result.errors[-1].max())
                return {"iterations": result.n_iter, "status": result.status.name, "l1_error": last}
            if name.startswith("POT"):
                return {"iterations": int(result["niter"]) + 1}
            seen = [float(e) for e in result.errors if float(e) > 0]
            return {"iterations": 10 * len(seen), "l1_error": seen[-1] if seen else None, "converged": bool(result.converged)}

        contestants: dict[str, Callable[[], Any]] = {
            "gpu_ot solve triton fp32": lambda: mine("triton"),
            "gpu_ot solve dense fp32": lambda: mine("dense"),
            "POT sinkhorn fp32": pot,
            "OTT-JAX fp32": peers.ott(x, y, eps, limit, 1e-3),
        }
        case = f"L1 1e-3, n = m = {n}, d = {d}, eps = {relative} std(C)"
        compare(report, clock, "tolerance", case, contestants, repeats=3, seconds=8, describe=describe)
        empty_cache()


def few_features(report: Report, clock: Clock) -> None:
    """Many points in three dimensions, in the unit cube: time to an L1 marginal error without taking all pairs, and with."""
    from gpu_ot import Problem, SqEuclidean, solve

    three = ("mesh", "multiscale", "triton")
    cases = (
        (100_000, 0.05, 1e-3, ("mesh", "triton")), (1_000_000, 0.05, 1e-3, ("mesh",)),
        (100_000, 0.02, 1e-2, three), (1_000_000, 0.01, 1e-2, ("mesh", "multiscale")),
    )  # fmt: skip
    for n, blur, tol, backends in ((300, 0.2, 1e-2, three),) if DRY else cases:
        torch.manual_seed(0)
        x, y = (torch.rand(n, 3, device=DEVICE) for _ in range(2))

        def run(backend: str, x: torch.Tensor = x, y: torch.Tensor = y, eps: float = 2 * blur**2, tol: float = tol) -> Any:
            return solve(Problem(SqEuclidean(x, y), eps), backend=backend, tol=tol, max_iter=500)

        def describe(_: str, result: Any) -> dict[str, Any]:
            measured = result.measure()
            return {"iterations": result.n_iter, "status": result.status.name, "l1_error": measured.error, "l1_bound": measured.bound}

        contestants = {f"gpu_ot solve {name}": functools.partial(run, name) for name in backends}
        case = f"L1 {tol:g}, n = m = {n}, d = 3, blur {blur:g}"
        compare(report, clock, "few features", case, contestants, repeats=3, seconds=8, describe=describe)
        empty_cache()


def giant(report: Report, clock: Clock) -> None:
    """A known answer at a size nobody can store: a cloud against itself at small eps is coupled by the identity."""
    from gpu_ot import Problem, SqEuclidean, solve

    n, d = (50, 300) if DRY else (100_000, 3072)
    case = f"identity coupling, n = m = {n}, d = {d}, eps = .032 std(C)"
    needed = 14 * 8 * n * d / 2**30  # GiB: both clouds, in float64 while they are folded, and as they are stored
    if not DRY and torch.cuda.mem_get_info()[0] / 2**30 < needed:
        report.add(section="giant", case=case, solver="gpu_ot solve triton fp32", skipped=f"needs {needed:.0f} GiB free")
        return
    if clock.left() < (0 if DRY else 20):
        report.add(section="giant", case=case, solver="gpu_ot solve triton fp32", skipped="no time left")
        return
    torch.manual_seed(0)
    x = torch.randn(n, d, device=DEVICE)
    eps = 0.032 * torch.cdist(x[:1000], x[1000:2000] if n > 2000 else x).square().std().item()

    def run() -> Any:
        return solve(Problem(SqEuclidean(x, x.clone()), eps), backend="triton", tol=1e-3, max_iter=5)

    try:
        with at_most(max(clock.left(), 5)), quiet():
            start = time.perf_counter()
            solution, mib = peak(run)
            synchronize()
            elapsed = 1e3 * (time.perf_counter() - start)  # one cold run: there is no time for a second
        # C_ii = 0 here, so the diagonal needs no pass.
        diagonal = ((solution.f + solution.g) / eps - 2 * math.log(n)).exp().sum().item()
        floor = floor_ms(n, n, d, "fp32", 2 * solution.n_iter + 2)
        times = {"time_ms": elapsed, "time_min_ms": elapsed, "time_max_ms": elapsed, "peak_mib": mib, "floor_ms": floor}
        found = {"iterations": solution.n_iter, "status": solution.status.name, "mass_on_diagonal": diagonal, "repeats": 1}
        report.add(section="giant", case=case, solver="gpu_ot solve triton fp32", **times, **found)
        off = abs(diagonal - 1)
        report.add(section="parity", check="identity coupling", passed=off < 1e-2, error=off, n=n, d=d, kernel="triton")
    except Exception as error:
        report.add(section="giant", case=case, solver="gpu_ot solve triton fp32", error=reason(error))


SECTIONS: dict[str, Callable[[Report, Clock], None]] = {
    "parity": parity,
    "iterations": iterations,
    "graphs": graphs,
    "batched": batched,
    "dense": dense,
    "tolerance": tolerance,
    "few features": few_features,
    "giant": giant,
}
