"""One command for a day with a GPU: are the kernels right on it, and how fast are they beside their peers and the chip's limits?

    python bench/gpu.py [--out DIR] [--minutes 9]     writes DIR/gpu.json after every row, so that a kill loses nothing
    python bench/gpu.py --dry                         everything tiny, on the CPU, in Triton's interpreter: checks this script

First parity: every kernel and precision against float64 torch on the device, its error beside torch's own in float32. A
failure is printed, the exit code is 1, and timings are not reported (they are in the rows, marked as measured on red tests). Then timings:
contestants interleaved, medians and extremes of CUDA events, peak memory of torch's allocator, and the floor: what the chip needs
at least for the exponentials, the arithmetic or the products, whichever is longest. A peer that is not installed or fails is a
row that says so. Every section has its share of the minutes and ends with it; what no time was left for is a row too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default flips in Triton 3.10 and changes numerics
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes three quarters of the memory
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it decides once
START = time.monotonic()  # importing torch takes seconds

import torch  # noqa: E402

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
INF = math.inf
EPS = 0.1
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
BITS = {"fp32": 22, "tf32": 11, "fp16": 11, "bf16": 8}  # what a plan keeps when it is stored for the second product
#: (n = m, d) of the timings per iteration, the most telling first.
CASES = [(10_000, 64), (50_000, 64), (1_000, 64), (10_000, 3), (50_000, 3), (1_000, 3), (10_000, 512)]
if DRY:
    CASES = [(40, 3), (40, 16)]
PEERS = {"flash-sinkhorn": "flash_sinkhorn", "GeomLoss": "geomloss", "KeOps": "pykeops", "POT": "ot", "OTT-JAX": "ott"}
#: Of the minutes, which section may use how much; what one leaves, the next ones may use.
SHARES = {"parity": 0.22, "iterations": 0.26, "dense": 0.16, "batched": 0.10, "tolerance": 0.18, "giant": 0.08}
PACKAGES = ("torch", "triton", "gpu_ot", "pot", "geomloss", "pykeops", "flash-sinkhorn", "ott-jax", "jax", "numpy")


class Report:
    """Rows as they come: a line each, and the whole file written again, so that whatever happens later they are there."""

    def __init__(self, out: str | None) -> None:
        self.path = Path(out) / "gpu.json" if out else None
        self.rows: list[dict[str, Any]] = []
        self.environment = environment()
        self.lock = threading.RLock()

    def add(self, **row: Any) -> None:
        with self.lock:
            self.rows.append(row)
            print("  " + "  ".join(f"{key}={_short(value)}" for key, value in row.items() if key != "section"), flush=True)
            self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        red = any(row.get("passed") is False for row in self.rows)
        rows = [{**row, "on_red_tests": True} if red and row["section"] != "parity" else row for row in self.rows]
        partial.write_text(json.dumps({"environment": self.environment, "rows": rows}, indent=1))
        partial.replace(self.path)

    def finish(self) -> int:
        with self.lock:
            checks = [row for row in self.rows if "passed" in row]
            failed = [row for row in checks if not row["passed"]]
            left_out = sum(row["section"] == "parity" and "skipped" in row for row in self.rows)
            print(f"\n{len(checks) - len(failed)} of {len(checks)} checks passed, {left_out} groups were left out.")
            for row in failed:
                print("  FAILED " + "  ".join(f"{key}={_short(value)}" for key, value in row.items() if key not in ("section", "passed")))
            if failed or not checks:
                print("\nTimings on red tests: not reported.")
            else:
                self.table()
            self.write()
            if self.path:
                print(f"\nwrote {self.path}")
            return 1 if failed or not checks else 0

    def table(self) -> None:
        title = ""
        for row in self.rows:
            if row["section"] == "parity":
                continue
            if (what := f"{row['section']}: {row.get('case', '')}") != title:
                title = what
                print(f"\n{title}\n  {'':<34}{'ms':>10}  {'min - max':>21}{'floor':>10}{'peak MiB':>10}  notes")
            notes = " ".join(f"{key}={_short(value)}" for key, value in row.items() if key not in _SHOWN)
            if "time_ms" not in row:
                print(f"  {row.get('solver', ''):<34}{'-':>10}  {'':>21}{'':>10}{'':>10}  {notes}"[:180])
                continue
            spread = f"{row['time_min_ms']:.4g} - {row['time_max_ms']:.4g}"
            least = f"{row['floor_ms']:.4g}" if row.get("floor_ms") else "-"
            peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            print(f"  {row['solver']:<34}{row['time_ms']:>10.4g}  {spread:>21}{least:>10}{peak:>10}  {notes}")


_SHOWN = {"section", "case", "solver", "time_ms", "time_min_ms", "time_max_ms", "peak_mib", "floor_ms", "passed", "on_red_tests"}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Clock:
    """The minutes, shared out: `left()` of the section that runs now."""

    def __init__(self, minutes: float) -> None:
        self.start, self.total = START, 58 * minutes  # the rest is for the table
        self.end = self.start

    def enter(self, name: str) -> None:
        names = list(SHARES)
        self.end = self.start + self.total * sum(SHARES[each] for each in names[: names.index(name) + 1])

    def left(self) -> float:
        return self.end - time.monotonic()


class OutOfTime(Exception):
    pass


@contextlib.contextmanager
def at_most(seconds: float):
    """Raises OutOfTime in whatever Python runs next; a compiler that a peer waits for is interrupted too."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------- timing


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], wall: bool) -> float:
    """Milliseconds of one call."""
    synchronize()
    if DRY or wall:
        start = time.perf_counter()
        function()
        synchronize()
        return 1e3 * (time.perf_counter() - start)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def peak(function: Callable[[], Any]) -> tuple[Any, float | None]:
    """What a call returns, and MiB of torch's allocator above what was in use before."""
    if DRY:
        return function(), None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(
    report: Report,
    clock: Clock,
    section: str,
    case: str,
    contestants: dict[str, Callable[[], Any]],
    *,
    per: int = 1,
    floor: Callable[[str], float | None] = lambda precision: None,
    repeats: int = 11,
    seconds: float = 15.0,
    describe: Callable[[str, Any], dict[str, Any]] = lambda name, result: {},
) -> None:
    """Warm up each contestant twice, then time them in turns. Times are divided by `per`: iterations in one call.

    Whoever fails is a row with its error and runs no more. `seconds` is what the case may take, warm-ups and compilers aside.
    `floor` gives the least time at a precision, the last word of a contestant's name.
    """
    common = {"section": section, "case": case}
    alive, notes, once = dict(contestants), {}, {}
    for name in contestants:
        if (peer := PEERS.get(name.split()[0])) and importlib.util.find_spec(peer) is None:
            alive.pop(name)
            continue
        if clock.left() < 1:
            report.add(**common, solver=name, skipped="no time left")
            alive.pop(name)
            continue
        try:
            with at_most(min(clock.left(), 60.0)), quiet():
                alive[name]()  # compiles
                result, mib = peak(alive[name])
                once[name] = timed(alive[name], _wall(name))
            with quiet():
                notes[name] = {"peak_mib": None if _wall(name) else mib, **describe(name, result)}
            del result
        except Exception as error:
            report.add(**common, solver=name, error=_reason(error))
            alive.pop(name)
            _empty_cache()
    budget = 1e3 * min(seconds, max(clock.left() - 1, 0))
    rounds = max(1, min(repeats, int(budget / max(sum(once[name] for name in alive), 1e-3)))) if alive else 0
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name in list(alive):
            try:
                with at_most(max(clock.left() + 5, 5)), quiet():
                    times[name].append(timed(alive[name], _wall(name)) / per)
            except Exception as error:
                report.add(**common, solver=name, error=_reason(error))
                alive.pop(name)
    for name in alive:
        spread = times[name]
        figures = {"time_ms": statistics.median(spread), "time_min_ms": min(spread), "time_max_ms": max(spread)}
        least = floor(name.split()[-1])
        figures |= {} if least is None else {"floor_ms": least}
        report.add(**common, solver=name, **figures, repeats=len(spread), **notes[name])


def _wall(name: str) -> bool:
    return name.startswith(("OTT", "JAX"))  # not torch's streams


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    return text[:200]


def _empty_cache() -> None:
    if not DRY:
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def environment() -> dict[str, Any]:
    def version(name: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
        return None

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    found: dict[str, Any] = {name: version(name) for name in PACKAGES}
    found |= {"commit": commit, "python": platform.python_version(), "dry": DRY, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if not DRY:
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "processors": gpu.multi_processor_count,
            "clock_ghz": _clock_hz(gpu) / 1e9,
            "memory_mib": gpu.total_memory // 2**20,
            "cuda": torch.version.cuda,
        }
    return found


def _clock_hz(gpu: Any) -> float:
    return 1e3 * getattr(gpu, "clock_rate", 1.98e6)  # older torch does not tell: an H200's


#: Floating operations of a half-precision tensor instruction per clock and multiprocessor; tf32 runs at half of it.
HALF_FLOPS = {8: 2048, 9: 4096, 10: 8192}


def floor_ms(n: int, m: int, d: int, precision: str, sweeps: float = 1.0) -> float | None:
    """The longest of three: 16 exp2 a clock and multiprocessor, 5 fp32 instructions a pair of 128, and the products.

    "fp32" makes three half-precision products of a pair, and one of up to 64 packed features when d <= 10.
    """
    if DRY:
        return None
    gpu = torch.cuda.get_device_properties(0)
    per_clock = gpu.multi_processor_count * _clock_hz(gpu)
    width = max(16, 1 << (d - 1).bit_length())
    halves = {"fp32": 2 * (16 if d <= 2 else 32 if d <= 5 else 64) if d <= 10 else 6 * width, "tf32": 4 * width}.get(precision, 2 * width)
    tensor = halves / HALF_FLOPS.get(gpu.major, 4096)
    return 1e3 * sweeps * n * m * max(1 / 16, 5 / 128, tensor) / per_clock


# ---------------------------------------------------------------------------------------------------------------- parity


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
    found += [("parity_of_resident",), ("parity_of_geometry",), ("parity_of_batches",), ("parity_of_advance",)]
    if not DRY:
        found += [("warm", n, d) for n, d in CASES]
    return found


def parity(report: Report, clock: Clock) -> None:
    """Several processes at once: a check takes milliseconds, and compiling its kernels seconds of one core, once."""
    count = 1 if DRY else max(1, min(8, (os.cpu_count() or 2) // 2))
    command = [sys.executable, __file__, "--seconds", str(clock.left() - 5), *(["--dry"] if DRY else [])]
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
            report.add(section="parity", check=name, error=_reason(error), **outcome, **details)
    return 0


def warm(report: Any, n: int, d: int) -> None:
    """Compiles, into Triton's cache on the disk, what the section after this one times."""
    x, y = randn_clouds(n, d)
    for precision in PRECISIONS:
        our_iterations(x, y, precision, 2)()
    our_solver(x, y, 2, True)()


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
    from gpu_ot.kernels.softmin import softmin

    torch.manual_seed(5)
    u, v, h = torch.randn(5, 70, 6, device=DEVICE), torch.randn(5, 333, 6, device=DEVICE), torch.randn(5, 333, device=DEVICE)
    v[2] *= 100
    h[1] = -INF
    truth, peer = dense_softmin(u.double(), v.double(), h.double(), 0.5), dense_softmin(u, v, h, 0.5)
    for b in range(5):
        check(report, "softmin of a batch", softmin(u, v, h, 0.5)[b], peer[b], truth[b], 1e-6, batch=b)


def dense_loop(
    C: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float, iterations: int, columns_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(f, g) as the paper has it, batched, in the type of C; from g = 0, or with `columns_first` from f = 0 as POT does."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(iterations):
        g = -eps * torch.logsumexp((f + eps * a.log()).unsqueeze(-1) / eps - C / eps, -2) if i or columns_first else g
        f = -eps * torch.logsumexp((g + eps * b.log()).unsqueeze(-2) / eps - C / eps, -1)
    return f, g


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


def parity_of_advance(report: Any) -> None:
    """Stretches of the loop as CUDA graphs against the default."""
    for n, d in ((30, 3),) if DRY else ((1000, 3), (1111, 64)):
        x, y = randn_clouds(n, d)
        default, captured = our_advance(x, y, 5, False), our_advance(x, y, 5, True)
        for _ in range(4):
            one, other = default(), captured()
        for name, mine, theirs in zip(("f", "g", "fresh"), other, one, strict=True):
            check(report, f"captured advance, {name}", mine, theirs, theirs, 1e-6, n=n, d=d)


def parity_of_geometry(report: Any) -> None:
    """The backend as `solve` uses it: a softmin, and the gradient of a value in the points. Far from the origin, too."""
    from gpu_ot import Problem, SqEuclidean, gradients
    from gpu_ot.backends.dense import Dense
    from gpu_ot.backends.triton import Streaming

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


# ---------------------------------------------------------------------------------------------------------- the contests


def randn_clouds(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=gen).to(DEVICE), torch.randn(n, d, generator=gen).to(DEVICE)


def our_iterations(x: torch.Tensor, y: torch.Tensor, precision: str, iterations: int) -> Callable[[], Any]:
    """The kernels alone, alternating, clouds prepared in the call as a user's would be."""
    from gpu_ot.kernels.softmin import softmin
    from gpu_ot.kernels.tiles import cloud

    def run() -> torch.Tensor:
        beta = y.square().sum(-1)
        u, v = cloud(2**0.5 * x, precision), cloud(2**0.5 * y, precision)
        log_a, log_b = (-EPS * math.log(len(z)) for z in (x, y))
        s, t = None, None
        g = torch.zeros_like(beta)
        for _ in range(iterations):
            s = softmin(u, v, g + log_b - beta, EPS, shift=s)
            t = softmin(v, u, s + log_a, EPS, shift=t)  # f - alpha is s
            g = beta + t
        return g

    return run


def our_solver(x: torch.Tensor, y: torch.Tensor, iterations: int, backward: bool, backend: str = "triton") -> Callable[[], Any]:
    """The package's own path: validation, binding, float64 potentials, the loop; `backward` adds the value's gradient in both clouds."""
    from gpu_ot import Problem, SqEuclidean, solve

    def run() -> Any:
        points = [z.detach().requires_grad_(backward) for z in (x, y)]
        solution = solve(Problem(SqEuclidean(*points), EPS), backend=backend, tol=0.0, max_iter=iterations, check_every=iterations)
        return torch.autograd.grad(solution.value, points) if backward else solution.f

    return run


def our_advance(x: torch.Tensor, y: torch.Tensor, iterations: int, captured: bool) -> Callable[[], Any]:
    """What `solve` repeats between two looks at the error, on a bound problem; `captured` as a CUDA graph, which is off by default."""
    from gpu_ot import Problem, SqEuclidean
    from gpu_ot.backends.triton import Streaming

    problem = Problem(SqEuclidean(x, y), EPS)
    geometry = Streaming(problem)
    geometry.captured_up_to = len(x) if captured else 0
    state = [torch.zeros_like(problem.b)]

    def run() -> Any:
        with torch.no_grad():
            f, g, state[0] = geometry.advance(problem, state[0], EPS, iterations)
        if captured and not geometry.captured_up_to:
            raise RuntimeError("the graph could not be captured")
        return f, g, state[0]

    return run


def flash(x: torch.Tensor, y: torch.Tensor, iterations: int, backward: bool, tf32: bool, form: str) -> Callable[[], Any]:
    def run() -> Any:
        from flash_sinkhorn import SamplesLoss

        loss = SamplesLoss(
            backend=form, use_epsilon_scaling=False, eps=EPS, n_iters=iterations, allow_tf32=tf32, last_extrapolation=backward
        )
        points = [z.detach().requires_grad_(backward) for z in (x, y)]
        value = loss(*points)
        return torch.autograd.grad(value, points) if backward else value

    return run


def geomloss_online(x: torch.Tensor, y: torch.Tensor, iterations: int, backward: bool) -> Callable[[], Any]:
    """An annealing that takes `iterations` passes over both sides, first and last included: GeomLoss cannot be told a number."""

    def run() -> Any:
        from geomloss import SamplesLoss

        blur = EPS**0.5
        loss = SamplesLoss(
            "sinkhorn",
            p=2,
            blur=blur,
            diameter=blur * 2.0 ** (iterations - 4),
            scaling=0.5,
            debias=False,
            backend="tensorized" if DRY else "online",
        )
        points = [z.detach().requires_grad_(backward) for z in (x, y)]
        value = loss(points[0] * 2**0.5, points[1] * 2**0.5)  # its cost is half of ours
        return torch.autograd.grad(value, points) if backward else value

    return run


def keops_iterations(x: torch.Tensor, y: torch.Tensor, iterations: int) -> Callable[[], Any]:
    def run() -> Any:
        from pykeops.torch import LazyTensor

        C = (LazyTensor(x[:, None].contiguous()) - LazyTensor(y[None].contiguous())).square().sum(-1)
        f, g = torch.zeros_like(x[:, :1]), torch.zeros_like(y[:, :1])
        for _ in range(iterations):
            f = -EPS * ((LazyTensor(g[None, :, :] / EPS - math.log(len(y))) - C / EPS).logsumexp(1))
            g = -EPS * ((LazyTensor(f[:, None, :] / EPS - math.log(len(x))) - C / EPS).logsumexp(0))
        return g

    return run


def torch_iterations(x: torch.Tensor, y: torch.Tensor, iterations: int) -> Callable[[], Any]:
    def run() -> Any:
        C = torch.cdist(x, y).square()
        w = torch.full((len(x),), 1 / len(x), device=x.device)
        return dense_loop(C, w, w, EPS, iterations)

    return run


def ott(x: torch.Tensor, y: torch.Tensor, eps: float, iterations: int, threshold: float = -1.0) -> Callable[[], Any]:
    compiled: list[Any] = []

    def run() -> Any:
        import jax
        from ott.geometry import pointcloud
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        if not compiled:
            points = [jax.numpy.asarray(z.cpu().numpy()) for z in (x, y)]
            solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=iterations, inner_iterations=10)
            batch = None if len(x) <= 10_000 else 1024

            def call(p: Any, q: Any) -> Any:
                return solver(linear_problem.LinearProblem(pointcloud.PointCloud(p, q, epsilon=eps, batch_size=batch)))

            compiled.extend((jax.jit(call), points))
        result = compiled[0](*compiled[1])
        jax.block_until_ready(result.f)
        return result

    return run


def iterations(report: Report, clock: Clock) -> None:
    """Theirs: eps 0.1, 10 iterations, randn clouds. Ten iterations of two half-iterations; times per iteration."""
    steps = 10
    for n, d in CASES:
        x, y = randn_clouds(n, d)
        contestants: dict[str, Callable[[], Any]] = {
            f"gpu_ot kernels {p}": our_iterations(x, y, p, steps) for p in PRECISIONS if not (DRY and p == "bf16")
        }
        contestants["gpu_ot solve fp32"] = our_solver(x, y, steps, False)
        contestants["gpu_ot advance fp32"] = our_advance(x, y, steps, False)
        if n <= 10_000:
            contestants["gpu_ot advance, captured, fp32"] = our_advance(x, y, steps, True)
        for form in ("alternating", "symmetric"):
            for tf32 in (True, False) if n == 10_000 else (True,):
                contestants[f"flash-sinkhorn {form} {'tf32' if tf32 else 'fp32'}"] = flash(x, y, steps, False, tf32, form)
        contestants["GeomLoss online fp32"] = geomloss_online(x, y, steps, False)
        if not DRY:
            contestants["KeOps logsumexp fp32"] = keops_iterations(x, y, steps)
        if n <= 10_000:
            contestants["torch dense fp32"] = torch_iterations(x, y, steps)
        contestants["OTT-JAX fp32"] = ott(x, y, EPS, steps)

        def floor(precision: str, n: int = n, d: int = d) -> float | None:
            return floor_ms(n, n, d, precision, 2)

        compare(
            report, clock, "iterations", f"forward, n = m = {n}, d = {d}, per iteration", contestants, per=steps, floor=floor, seconds=8
        )
        if n == 1_000 or (n == 50_000 and d == 3):
            continue
        contestants = {"gpu_ot solve fp32": our_solver(x, y, steps, True)}
        for tf32 in (True, False):
            contestants[f"flash-sinkhorn symmetric {'tf32' if tf32 else 'fp32'}"] = flash(x, y, steps, True, tf32, "symmetric")
        contestants["GeomLoss online fp32"] = geomloss_online(x, y, steps, True)
        compare(report, clock, "iterations", f"forward and backward, n = m = {n}, d = {d}, {steps} iterations", contestants, seconds=8)


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
        _empty_cache()


def batched(report: Report, clock: Clock) -> None:
    """Many small problems, 100 iterations each: one launch against loops of launches."""
    from gpu_ot.kernels.resident import sinkhorn

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
            "gpu_ot resident fp32": lambda C=C, a=a: sinkhorn(C, a, a, eps, tol=0.0, max_iter=steps),
            "gpu_ot solve dense fp32": lambda C=C: solve(Problem(C, eps), backend="dense", tol=0.0, max_iter=steps, check_every=steps).f,
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

        def ours(backend: str, x: torch.Tensor = x, y: torch.Tensor = y, eps: float = eps) -> Any:
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
            "gpu_ot solve triton fp32": lambda: ours("triton"),
            "gpu_ot solve dense fp32": lambda: ours("dense"),
            "POT sinkhorn fp32": pot,
            "OTT-JAX fp32": ott(x, y, eps, limit, 1e-3),
        }
        case = f"L1 1e-3, n = m = {n}, d = {d}, eps = {relative} std(C)"
        compare(report, clock, "tolerance", case, contestants, repeats=3, seconds=8, describe=describe)
        _empty_cache()


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
        report.add(section="parity", check="identity coupling", passed=abs(diagonal - 1) < 1e-2, error=abs(diagonal - 1), n=n, d=d)
    except Exception as error:
        report.add(section="giant", case=case, solver="gpu_ot solve triton fp32", error=_reason(error))


WORK: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (parity_of_kernels, parity_of_resident, parity_of_geometry, parity_of_batches, parity_of_advance, warm)
}
SECTIONS: dict[str, Callable[[Report, Clock], None]] = {
    "parity": parity,
    "iterations": iterations,
    "dense": dense,
    "batched": batched,
    "tolerance": tolerance,
    "giant": giant,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", help="folder for gpu.json")
    parser.add_argument("--dry", action="store_true", help="everything tiny, in Triton's interpreter, without a GPU")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run; timings want parity first"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("bench/gpu.py: no GPU here, nothing measured (--dry checks the script itself).")
        return 0
    if importlib.util.find_spec("triton") is None:
        print("bench/gpu.py: Triton is not installed, nothing measured.")
        return 0
    # float32 means float32: peers and truths alike.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    if DRY:
        torch.set_num_threads(1)  # nothing here is large enough for two
    if args.worker:
        warnings.simplefilter("ignore")  # a bad shift overflows, which is what it is for; the interpreter says so
        return work(args.worker, args.seconds)
    report, clock = Report(args.out), Clock(args.minutes)
    print("  ".join(f"{key}={value}" for key, value in report.environment.items() if value is not None))

    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is None:
            report.add(section="peers", case="absent", solver=name, skipped="not installed")

    def cut_off() -> None:
        """The last resort against a peer that neither ends nor can be interrupted."""
        report.add(section="end", case="cut off", solver="the clock", error=f"not done after {args.minutes} minutes")
        code = report.finish()
        sys.stdout.flush()
        os._exit(code)

    watchdog = threading.Timer(60 * args.minutes - (time.monotonic() - START), cut_off)
    watchdog.daemon = True
    watchdog.start()
    for name, section in SECTIONS.items():
        if name not in args.only:
            continue
        clock.enter(name)
        print(f"\n{name} ({max(clock.left(), 0):.0f} s)", flush=True)
        try:
            section(report, clock)
        except Exception as error:
            # A section that breaks is a defect of this script or of the package, never of a peer: as loud as a failed check.
            report.add(section=name, case="the section itself", solver="gpu_ot", error=_reason(error), passed=False)
            traceback.print_exc(limit=-3)
        _empty_cache()
    watchdog.cancel()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
