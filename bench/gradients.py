"""What a gradient of the value costs on a CPU, in sweeps, and the memory it takes: the envelope's backward against one softmin.

    python bench/gradients.py [--out DIR] [--repeats 9] [--sizes 2000 20000]

The bar is 1.2 sweeps for the backward, and for clouds no array of n by m numbers. A sweep is the softmin of the same backend, one half
of an iteration; for "dense", which multiplies with a stored kernel and takes no exponential, also a softmin that does ("softmin") is timed.
The two take turns, each timed after an untimed one of its own; medians, with the smallest and largest. Peaks are taken in a
fresh process each, above what is in use before the backward, beside what an array of n by m numbers would take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from machine import growth_mib, number_from, write
from torch import Tensor

import gpu_ot
from gpu_ot import Problem, Solution, SqEuclidean
from gpu_ot.geometry.protocol import weigh

#: Of the largest cost, and the iterations before the backward: what is timed does not depend on how far they came.
EPS, ITERATIONS, D, BAR = 0.05, 2, 3, 1.2
#: (backend, what the gradient is taken in): of the small size, and of the large one.
SMALL = [("softmin", "M"), ("dense", "M"), ("softmin", "x"), ("dense", "x"), ("chunked", "x")]
LARGE = [("chunked", "x")]


def solved(backend: str, given: str, n: int) -> tuple[Solution, list[Tensor]]:
    """A solution whose value waits for its backward, and the leaves."""
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, D, generator=gen, dtype=torch.float64) for _ in "xy")
    cost: SqEuclidean | Tensor = SqEuclidean(x, y)
    leaves = [x]
    if given == "M":
        cost = cost.dense()
        leaves = [cost]
    for leaf in leaves:
        leaf.requires_grad_()
    return gpu_ot.solve(Problem(cost, EPS * D, None, None), backend=backend, tol=0, max_iter=ITERATIONS, accelerate="none"), leaves


def contestants(backend: str, given: str, n: int) -> dict[str, Callable[[], object]]:
    s, leaves = solved(backend, given, n)
    h = weigh(s.g.detach(), s.problem.b, s.problem.eps)
    return {
        "sweep": lambda: s.geometry.softmin(h, s.problem.eps),
        "backward": lambda: torch.autograd.grad(s.value, leaves, retain_graph=True),
    }


def measure(backend: str, given: str, n: int, repeats: int) -> dict:
    runs = contestants(backend, given, n)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run()
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    sweep, backward = (median(seconds[name]) for name in ("sweep", "backward"))
    return {
        "section": "gradients",
        "solver": f"gpu_ot {backend}",
        "given": given,
        "n": n,
        "d": D,
        "dtype": "fp64",
        "threads": torch.get_num_threads(),
        "time_s": backward,
        "time_min_s": min(seconds["backward"]),
        "time_max_s": max(seconds["backward"]),
        "sweep_s": sweep,
        "sweep_min_s": min(seconds["sweep"]),
        "sweep_max_s": max(seconds["sweep"]),
        "sweeps": backward / sweep,
        "sweeps_of_minima": min(seconds["backward"]) / min(seconds["sweep"]),
        "within_bar": backward <= BAR * sweep,
        "peak_mib": number_from(__file__, "--peak", backend, given, "--sizes", n),
        "n_by_m_mib": 8 * n * n / 2**20,
    }


def print_peak(backend: str, given: str, n: int) -> None:
    contestants(backend, given, 50)["backward"]()
    print(growth_mib(contestants(backend, given, n)["backward"]))


HEADER = f"{'n':>6}  {'solver':<16}{'in':<4}{'backward, s':>26}{'sweep, s':>26}{'sweeps':>8}{'of minima':>11}{'peak MiB':>10}{'n by m':>8}"


def line(row: dict) -> str:
    backward = f"{row['time_s']:.4f} ({row['time_min_s']:.4f} - {row['time_max_s']:.4f})"
    sweep = f"{row['sweep_s']:.4f} ({row['sweep_min_s']:.4f} - {row['sweep_max_s']:.4f})"
    return (
        f"{row['n']:>6}  {row['solver']:<16}{row['given']:<4}{backward:>26}{sweep:>26}{row['sweeps']:>8.2f}"
        f"{row['sweeps_of_minima']:>11.2f}{row['peak_mib']:>10.1f}{row['n_by_m_mib']:>8.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 20_000], help="the small one and the large one")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for gradients.json")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print_peak(*given.peak, given.sizes[0])
        return
    print(f"Backward of the value, in sweeps; the bar is {BAR}. Medians, {torch.get_num_threads()} threads, float64.\n")
    print(HEADER)
    small, *large = given.sizes
    cases = [(*case, small, given.repeats) for case in SMALL]
    cases += [(*case, n, max(3, given.repeats // 2)) for n in large for case in LARGE]
    rows = []
    for case in cases:
        rows.append(measure(*case))
        print(line(rows[-1]), flush=True)
    if given.out:
        print(f"\nwrote {write(given.out, 'gradients', rows)}")


if __name__ == "__main__":
    main()
