"""Clouds too large for a matrix, on a CPU: our streaming solve against GeomLoss with KeOps, to equal accuracy.

    python bench/clouds_cpu.py [--out DIR] [--n 20000] [--d 3] [--eps 0.05] [--scaling 0.7] [--repeats 3]

GeomLoss has no tolerance: it runs its schedule first, the L1 marginal error that its potentials leave is measured, and ours get
that error as their tolerance. Uniform points in the unit cube, eps relative to the standard deviation of the squared distances,
float32 points, the same potentials wanted from both. Interleaved, one untimed run of each before; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import write
from torch import Tensor
from tqdm import tqdm

import gpu_ot
from gpu_ot import Problem, SqEuclidean


def marginal_error(x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: float) -> float:
    """Of the plan a b exp((f + g - |x - y|^2) / eps) between uniform weights, whichever side is worse, in float64."""
    solved = gpu_ot.solve(Problem(SqEuclidean(x.double(), y.double()), eps), backend="chunked", max_iter=1, tol=math.inf)
    n, m = solved.plan.shape
    rows = solved.geometry.softmin(g.double() - eps * math.log(m), eps)
    columns = solved.geometry.T.softmin(f.double() - eps * math.log(n), eps)
    return max(float(((z - s) / eps).expm1().abs().mean()) for z, s in ((f.double(), rows), (g.double(), columns)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for clouds_cpu.json")
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--d", type=int, default=3)
    parser.add_argument("--eps", type=float, default=0.05, help="of the standard deviation of the cost")
    parser.add_argument("--scaling", type=float, default=0.7, help="GeomLoss' ratio of successive blurs")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        from geomloss import SamplesLoss

    gen = torch.Generator().manual_seed(0)
    x, y = (torch.rand(arguments.n, arguments.d, generator=gen) for _ in "xy")
    cost = SqEuclidean(x, y)
    eps = arguments.eps * float(cost.scale("std"))
    loss = SamplesLoss("sinkhorn", p=2, blur=math.sqrt(eps / 2), scaling=arguments.scaling, debias=False, potentials=True, backend="online")

    def theirs() -> tuple[Tensor, Tensor]:
        f, g = loss(x, y)
        return 2 * f.reshape(-1), 2 * g.reshape(-1)  # of |x - y|^2 / 2

    tol = marginal_error(x, y, *theirs(), eps)
    passes = 0

    def ours(**how: Any) -> tuple[Tensor, Tensor]:
        nonlocal passes
        done = gpu_ot.solve(Problem(cost, eps), tol=tol, **how)
        passes = done.n_sweeps
        assert done.converged
        return done.f, done.g

    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "GeomLoss online (KeOps)": theirs,
        "gpu_ot chunked": lambda: ours(backend="chunked"),
        "gpu_ot keops": lambda: ours(backend="keops"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors, swept = {}, {}
    for repeat in tqdm(range(arguments.repeats + 1), desc="rounds", leave=False):
        for name, run in runs.items():
            begun = time.perf_counter()
            found = run()
            if repeat:
                seconds[name].append(time.perf_counter() - begun)
            else:
                errors[name], swept[name] = marginal_error(x, y, *found, eps), passes
    rows = [
        dict(
            section="clouds",
            solver=name,
            n=arguments.n,
            d=arguments.d,
            eps_std=arguments.eps,
            dtype="fp32",
            time_s=statistics.median(taken),
            time_min_s=min(taken),
            time_max_s=max(taken),
            marginal_error=errors[name],
            passes=swept[name] or None,
            threads=torch.get_num_threads(),
        )
        for name, taken in seconds.items()
    ]
    if arguments.out:
        write(arguments.out, "clouds_cpu", rows)
    peer = rows[0]["time_s"]
    print(f"n = m = {arguments.n}, d = {arguments.d}, eps = {arguments.eps} std(C): to an L1 marginal error of {tol:.2g}")
    for row in rows:
        print(
            f"  {row['solver']:<26}{row['time_s']:8.2f} s ({row['time_min_s']:.2f} - {row['time_max_s']:.2f}) "
            f"{peer / row['time_s']:6.1f}x   error {row['marginal_error']:.2g}"
        )
    return int(min(row["time_s"] for row in rows[1:]) > peer)


if __name__ == "__main__":
    sys.exit(main())
