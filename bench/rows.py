"""Rows of results: how they are timed, kept and printed. Contestants take turns; a kill loses nothing that was measured."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import DRY, START, empty_cache, environment, synchronize

PEERS = {"flash-sinkhorn": "flash_sinkhorn", "GeomLoss": "geomloss", "KeOps": "pykeops", "POT": "ot", "OTT-JAX": "ott"}
#: Of the minutes, which section may use how much; what one leaves, the next ones may use.
SHARES = {
    **{"parity": 0.25, "iterations": 0.21, "graphs": 0.04, "batched": 0.07, "dense": 0.13, "tolerance": 0.14},
    **{"few features": 0.08, "giant": 0.08},
}
#: What of gpu_ot a contestant runs, by the beginning of its name: its times count while none of this has failed a check.
NEEDS = {
    "gpu_ot kernels": ("softmin",),
    "gpu_ot iterate": ("softmin", "triton"),
    "gpu_ot solve triton": ("softmin", "apply", "step", "triton"),
    "gpu_ot solve dense": ("step", "dense"),
    "gpu_ot resident": ("resident", "step"),
    "gpu_ot.sinkhorn": ("step", "dense"),
    "gpu_ot solve mesh": ("mesh",),
    "gpu_ot solve multiscale": ("multiscale",),
    "gpu_ot graphs": ("softmin", "step", "triton", "graphs"),
    "gpu_ot launches": ("softmin", "step", "triton"),
    "gpu_ot solve": ("softmin", "apply", "step", "triton"),
}


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
            print("  " + "  ".join(f"{key}={short(value)}" for key, value in row.items() if key != "section"), flush=True)
            self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        failed = self.failed()
        rows = [{**row, "on_red_tests": True} if red(row, failed) else row for row in self.rows]
        partial.write_text(json.dumps({"environment": self.environment, "rows": rows}, indent=1))
        partial.replace(self.path)

    def failed(self) -> set[str]:
        """The kernels and backends that failed a check."""
        return {row.get("kernel", "") for row in self.rows if row.get("passed") is False}

    def finish(self) -> int:
        with self.lock:
            checks = [row for row in self.rows if "passed" in row]
            failed = [row for row in checks if not row["passed"]]
            left_out = sum(row["section"] == "parity" and "skipped" in row for row in self.rows)
            print(f"\n{len(checks) - len(failed)} of {len(checks)} checks passed, {left_out} groups were left out.")
            for row in failed:
                print("  FAILED " + "  ".join(f"{key}={short(value)}" for key, value in row.items() if key not in ("section", "passed")))
            if checks:
                self.table()
            else:
                print("\nTimings without a check: not reported.")
            self.write()
            if self.path:
                print(f"\nwrote {self.path}")
            broken = [row for row in self.rows if row.get("case") in ("the section itself", "cut off")]
            return 1 if failed or broken or not checks else 0

    def table(self) -> None:
        title, failed = "", self.failed()
        for row in self.rows:
            if row["section"] == "parity":
                continue
            if "time_ms" in row and red(row, failed):
                row = {key: row[key] for key in ("section", "case", "solver") if key in row} | {"on_red_tests": "not reported"}
            if (what := f"{row['section']}: {row.get('case', '')}") != title:
                title = what
                print(f"\n{title}\n  {'':<34}{'ms':>10}  {'min - max':>21}{'floor':>10}{'peak MiB':>10}  notes")
            notes = " ".join(f"{key}={short(value)}" for key, value in row.items() if key not in _SHOWN)
            if "time_ms" not in row:
                print(f"  {row.get('solver', ''):<34}{'-':>10}  {'':>21}{'':>10}{'':>10}  {notes}"[:180])
                continue
            spread = f"{row['time_min_ms']:.4g} - {row['time_max_ms']:.4g}"
            least = f"{row['floor_ms']:.4g}" if row.get("floor_ms") else "-"
            peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            print(f"  {row['solver']:<34}{row['time_ms']:>10.4g}  {spread:>21}{least:>10}{peak:>10}  {notes}")


_SHOWN = {"section", "case", "solver", "time_ms", "time_min_ms", "time_max_ms", "peak_mib", "floor_ms", "passed"}


def red(row: dict[str, Any], failed: set[str]) -> bool:
    """Whether a row is a time of something that failed a check; a failure that names no kernel is everybody's."""
    solver = str(row.get("solver", ""))
    if "time_ms" not in row or not solver.startswith("gpu_ot"):
        return False
    needs = next((parts for name, parts in NEEDS.items() if solver.startswith(name)), ())
    own = {f"{part} {solver.split()[-1]}" for part in needs} | set(needs)
    return "" in failed or bool(own & failed)


def short(value: Any) -> str:
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
                once[name] = timed(alive[name], wall(name))
            with quiet():
                notes[name] = {"peak_mib": None if wall(name) else mib, **describe(name, result)}
            del result
        except Exception as error:
            report.add(**common, solver=name, error=reason(error))
            alive.pop(name)
            empty_cache()
    budget = 1e3 * min(seconds, max(clock.left() - 1, 0))
    rounds = max(1, min(repeats, int(budget / max(sum(once[name] for name in alive), 1e-3)))) if alive else 0
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name in list(alive):
            try:
                with at_most(max(clock.left() + 5, 5)), quiet():
                    times[name].append(timed(alive[name], wall(name)) / per)
            except Exception as error:
                report.add(**common, solver=name, error=reason(error))
                alive.pop(name)
    for name in alive:
        spread = times[name]
        figures = {"time_ms": statistics.median(spread), "time_min_ms": min(spread), "time_max_ms": max(spread)}
        least = floor(name.split()[-1])
        figures |= {} if least is None else {"floor_ms": least}
        report.add(**common, solver=name, **figures, repeats=len(spread), **notes[name])


def wall(name: str) -> bool:
    return name.startswith(("OTT", "JAX"))  # not torch's streams


def reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    return text[:200]


@contextlib.contextmanager
def quiet():
    """Without words, and with gradients on: GeomLoss, when it fails, leaves them off for whoever comes next."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield
