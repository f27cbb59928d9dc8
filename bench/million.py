"""A million points in three dimensions on a CPU: the mesh and the multiscale backend, and GeomLoss' multiscale beside them.

    python bench/million.py [--out DIR] [--largest 1000000] [--peer-seconds 600]
    python bench/million.py --draw bench/results

Weights are uniform, eps = 2 blur^2 of |x - y|^2, points in the unit box. Errors are mean |marginal / weight - 1| by exact sums at 256
points of each side, the same for all. GeomLoss runs as its users run it (scaling .5, float32), each size in a process of its own, within
`peer-seconds` in all. What either compiles is compiled before anything is timed. `--draw` makes the picture of how time grows from the rows
that are there, and runs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import write
from torch import Tensor

from gpu_ot import Problem, SqEuclidean, solve
from gpu_ot.solution.measured import measure

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def cube(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3), torch.rand(n, 3)


def surfaces(n: int) -> tuple[Tensor, Tensor]:
    """A sphere and a torus."""
    z = torch.randn(n, 3)
    s, t = 2 * math.pi * torch.rand(2, n)
    ring = 0.33 + 0.13 * t.cos()
    return 0.5 + 0.35 * z / z.norm(dim=1, keepdim=True), 0.5 + torch.stack((ring * s.cos(), ring * s.sin(), 0.13 * t.sin()), 1)


def clusters(n: int) -> tuple[Tensor, Tensor]:
    """Twenty Gaussians on each side."""
    centres = 0.1 + 0.8 * torch.rand(2, 20, 3)
    x, y = (c[torch.randint(20, (n,))] + 0.03 * torch.randn(n, 3) for c in centres)
    return x, y


CLOUDS = {"cube": cube, "surfaces": surfaces, "clusters": clusters}


def pose(kind: str, n: int, blur: float) -> Problem:
    torch.manual_seed(0)
    return Problem(SqEuclidean(*CLOUDS[kind](n)), 2 * blur**2)


def ours(kind: str, n: int, blur: float, tol: float, backend: str) -> dict[str, Any]:
    problem = pose(kind, n, blur)
    wall, busy = time.perf_counter(), time.process_time()
    s = solve(problem, tol=tol, backend=backend)
    row: dict[str, Any] = dict(time_s=time.perf_counter() - wall, cpu_s=time.process_time() - busy)
    found = s.measured or s.measure()
    row |= dict(status=s.status.name, iterations=s.n_iter, rows_error=found.rows, columns_error=found.columns, bound=found.bound)
    return row | dict(per=getattr(s.geometry, "per", None), peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def peer(n: int, blur: float) -> dict[str, Any]:
    """GeomLoss' multiscale, in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        from geomloss import SamplesLoss

        problem = pose("cube", n, blur)
        x, y = (z.contiguous() for z in problem.cost.inputs.values())
        loss = SamplesLoss("sinkhorn", p=2, blur=blur, debias=False, potentials=True, backend="multiscale")
        loss(x[:2000], y[:2000])
        wall, busy = time.perf_counter(), time.process_time()
        f, g = loss(x, y)
        row = dict(time_s=time.perf_counter() - wall, cpu_s=time.process_time() - busy)
    found = measure(problem, 2 * f.double().reshape(-1), 2 * g.double().reshape(-1))
    return row | dict(rows_error=found.rows, columns_error=found.columns, bound=found.bound)


def apart(arguments: list[str], seconds: float | None = None) -> dict[str, Any]:
    """A row from a process of its own, whose memory is then its own, too."""
    command = [sys.executable, __file__, "--case", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return dict(status=f"unfinished after {seconds:.0f} s")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else dict(status="failed", said=done.stderr[-300:])


#: What a line of the picture is: its name, which rows are on it, and its colour and marker.
LINES: list[tuple[str, Callable[[dict[str, Any]], bool], str, str]] = [
    ("mesh, blur .05 to 1e-3", lambda row: row["solver"] == "mesh" and row["tol"] == 1e-3, "#0072B2", "o"),
    ("mesh, blur = spacing to 1e-2", lambda row: row["solver"] == "mesh" and row["tol"] == 1e-2, "#56B4E9", "s"),
    ("multiscale, blur .05 to 1e-3", lambda row: row["solver"] == "multiscale" and row["tol"] == 1e-3, "#CC79A7", "D"),
    ("chunked, blur .05 to 1e-3", lambda row: row["solver"] == "chunked", "#000000", "^"),
    ("GeomLoss multiscale, blur .05", lambda row: row["solver"] == "GeomLoss multiscale", "#009E73", "v"),
]


def growth(rows: list[dict[str, Any]]) -> Any:
    """Core-seconds against n on cubes, logarithmic both ways, and how fast each line grows from its first point to its last."""
    from charts import DPI, STYLE, WIDTH, matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        for name, chosen, colour, marker in LINES:
            timed = [row for row in rows if row["clouds"] == "cube" and "cpu_s" in row and chosen({"tol": None} | row)]
            points = sorted((row["n"], row["cpu_s"]) for row in timed)
            if not points:
                continue
            (first, fast), (last, slow) = points[0], points[-1]
            power = f": n^{math.log(slow / fast) / math.log(last / first):.2f}" if last > first else ""
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.6, markersize=5, label=name + power)
        sizes, start = (10_000, 1_000_000), 0.25
        ax.plot(sizes, [start * (n / sizes[0]) ** 1.15 for n in sizes], color="#777777", linestyle=":", label="n^1.15")
        ax.set(xscale="log", yscale="log", xlabel="n = m [points]", ylabel="time of one core [s]", title="Uniform points in the unit cube")
        ax.legend(fontsize=7.5)
    return figure


def draw(folder: Path) -> str:
    """The picture beside million.json; what to do where that is missing."""
    path = folder / "million.json"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: run bench/million.py --out {folder} first, or name the folder that has it.")
    growth(json.loads(path.read_text())["rows"]).savefig(folder / "million-growth.png")
    return f"wrote {folder / 'million-growth.png'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for million.json")
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--peer-seconds", type=float, default=600.0)
    parser.add_argument("--case", nargs="+", help="one row, as JSON: kind n blur tol backend")
    parser.add_argument("--draw", type=Path, help="a folder that has million.json: draw how time grows, and run nothing")
    options = parser.parse_args()
    if options.draw:
        print(draw(options.draw))
        return 0
    if options.case:
        kind, n, blur, tol, backend = options.case
        if backend == "GeomLoss multiscale":
            row = peer(int(n), float(blur))
        else:
            ours(kind, 1000, float(blur) * (int(n) / 1000) ** (1 / 3), float(tol), backend)  # compiles
            row = ours(kind, int(n), float(blur), float(tol), backend)
        print(json.dumps(row))
        return 0

    n, rows = options.largest, []
    cases: list[tuple[str, int, float, float, str]] = [
        ("cube", n, 0.05, 1e-3, "mesh"), ("surfaces", n, 0.05, 1e-3, "mesh"), ("clusters", n, 0.05, 1e-3, "mesh"),
        ("cube", n, n ** (-1 / 3), 1e-2, "mesh"), ("cube", n, n ** (-1 / 3), 1e-2, "multiscale"),
    ]  # fmt: skip
    for size in (z for z in SIZES if z < n):
        cases += [("cube", size, 0.05, 1e-3, "mesh"), ("cube", size, size ** (-1 / 3), 1e-2, "mesh")]
    cases += [("cube", size, 0.05, 1e-3, backend) for size in (20_000, 40_000) for backend in ("mesh", "multiscale", "chunked")]
    cases += [("cube", 10_000, 0.05, 1e-3, "chunked")]
    for kind, size, blur, tol, backend in cases:
        row = dict(section="million", clouds=kind, n=size, blur=blur, tol=tol, solver=backend, threads=torch.get_num_threads())
        row["load_before"] = os.getloadavg()[0]
        row |= apart([kind, str(size), str(blur), str(tol), backend], 900.0)
        rows.append(row)
        print(row, flush=True)
        if options.out:
            write(options.out, "million", rows)
    left = options.peer_seconds
    for size in (20_000, 40_000, 100_000):
        begun = time.perf_counter()
        row = dict(section="million", clouds="cube", n=size, blur=0.05, solver="GeomLoss multiscale", threads=torch.get_num_threads())
        row |= apart(["cube", str(size), "0.05", "0", "GeomLoss multiscale"], left)
        left -= time.perf_counter() - begun
        rows.append(row)
        print(row, flush=True)
        if options.out:
            write(options.out, "million", rows)
        if left < 1:
            break
    if options.out:
        print(draw(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
