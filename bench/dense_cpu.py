"""The drop-in against POT on a CPU: seconds for 100 iterations of the same problem, plan by plan, and peak memory.

    python bench/dense_cpu.py [--out DIR] [--repeats 9] [--sizes 500 1000 3000]

All in one process, each contestant's timed call directly after an untimed one of its own (so that it finds its own threads
awake and the others' asleep), contestants interleaved; medians, with the smallest and largest beside them. Peak memory
is measured in a fresh process for each contestant, above what its inputs take.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from machine import growth_mib, number_from, write
from tqdm import tqdm

import gpu_ot

with contextlib.redirect_stdout(io.StringIO()):  # packages that POT imports when they are there greet on stdout
    import ot

#: Sharp enough that neither float type reaches its rounding floor within the 100 iterations: all of them are run.
REG, ITERATIONS = 4e-3, 100
CONTESTANTS = {
    "POT sinkhorn fp64": (ot.sinkhorn, np.float64, "sinkhorn"),
    "POT sinkhorn_log fp64": (ot.sinkhorn, np.float64, "sinkhorn_log"),
    "gpu_ot fp64": (gpu_ot.sinkhorn, np.float64, "sinkhorn"),
    "gpu_ot fp32": (gpu_ot.sinkhorn, np.float32, "sinkhorn"),
}
SLOW = "POT sinkhorn_log fp64"


def problem(n: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """(weights, squared distances in the unit cube divided by their largest)."""
    rng = np.random.default_rng(0)
    M = ot.dist(rng.random((n, 3)), rng.random((n, 3)))
    return np.full(n, 1 / n, dtype), (M / M.max()).astype(dtype)


def call(name: str, a: np.ndarray, M: np.ndarray):
    solver, _, method = CONTESTANTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = solver(a, a, M, REG, method=method, numItermax=ITERATIONS, stopThr=0, log=True)
    assert log["niter"] == ITERATIONS - 1, f"{name} stopped after {log['niter'] + 1} iterations"
    return plan


def measure(n: int, repeats: int) -> list[dict]:
    inputs = {name: problem(n, dtype) for name, (_, dtype, _) in CONTESTANTS.items()}
    truth = call(SLOW, *inputs[SLOW])
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    errors = {}
    for repeat in tqdm(range(repeats), desc=f"n = {n}", file=sys.stderr):
        for name, given in inputs.items():
            if name == SLOW and (repeat > 2 or (n > 1000 and repeat > 0)):
                continue  # it takes 20-70 times as long and varies little
            if name != SLOW:
                time.sleep(0.3)  # the last contestant's threads stop waiting for work
                call(name, *given)
            start = time.perf_counter()
            plan = call(name, *given)
            seconds[name].append(time.perf_counter() - start)
            errors[name] = float(np.abs(plan - truth).max() / truth.max())
    reference = float(np.median(seconds["POT sinkhorn fp64"]))
    return [
        {
            "n": n,
            "solver": name,
            "iterations": ITERATIONS,
            "time_s": float(np.median(times)),
            "time_min_s": min(times),
            "time_max_s": max(times),
            "speedup_over_pot_sinkhorn": reference / float(np.median(times)),
            "plan_error": errors[name],
            "peak_mib": number_from(__file__, "--peak", name, "--sizes", n),
        }
        for name, times in seconds.items()
    ]


def print_peak(name: str, n: int) -> None:
    call(name, *problem(50, CONTESTANTS[name][1]))
    given = problem(n, CONTESTANTS[name][1])
    print(growth_mib(lambda: call(name, *given)))


def table(rows: list[dict]) -> str:
    lines = [f"{'n':>5}  {'solver':<22}{'seconds (min - max)':>26}{'vs POT':>9}{'plan error':>12}{'peak MiB':>10}"]
    for row in rows:
        spread = f"{row['time_s']:.4f} ({row['time_min_s']:.4f} - {row['time_max_s']:.4f})"
        faster = f"{row['speedup_over_pot_sinkhorn']:.2f}x"
        lines.append(f"{row['n']:>5}  {row['solver']:<22}{spread:>26}{faster:>9}{row['plan_error']:>12.1e}{row['peak_mib']:>10.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 3000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="folder for dense_cpu.json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.sizes[0])
        return
    rows = [row for n in args.sizes for row in measure(n, args.repeats)]
    print(f"{ITERATIONS} iterations at reg = {REG} of the largest cost, {os.cpu_count()} cores; medians.")
    print("plan error: largest difference from POT's sinkhorn_log in float64, relative to its largest entry; peak: above the inputs.\n")
    print(table(rows))
    if args.out:
        print(f"\nwrote {write(Path(args.out), 'dense_cpu', rows)}")


if __name__ == "__main__":
    main()
