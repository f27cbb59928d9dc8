"""Transport with a known answer in 3072 dimensions: pictures and their blurred, shuffled copies. In one process or on many ranks.

    python bench/giant.py [--points 1000] [--eps 0.032] [--blur 8] [--out DIR]
    torchrun --nproc-per-node 8 bench/giant.py --points 100000 [--layout ring]

x are n random pictures of 32 x 32 pixels in 3 colours with a natural spectrum (amplitude 1 / frequency), y the same pictures blurred by a
Gaussian, in another order: which belongs to which is known. eps counts in standard deviations of the cost, squared Euclidean. Each rank
makes its own share, from seeds of blocks of pictures. Reported are iterations, seconds, the rate of the products that form the costs, and
the mass that the plan puts on the true pairs, with the best that any coupling has, 1. GPUs are used where there are some, over NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import write
from torch import Tensor

import gpu_ot
from gpu_ot import Problem, Sharded, SqEuclidean
from gpu_ot.communicator import ROWS
from gpu_ot.distributed.group import even_sizes

SIDE, COLOURS, BLOCK = 32, 3, 500
D = SIDE * SIDE * COLOURS


def pictures(index: Tensor, blur: float, device: torch.device) -> Tensor:
    """(k, 3072) float32: the pictures with these numbers, blurred by a Gaussian of `blur` pixels; of unit variance where sharp."""
    along = torch.fft.fftfreq(SIDE) * SIDE
    radius = (along[:, None].square() + along.square()).sqrt()
    amplitude = torch.where(radius > 0, 1 / radius.clamp(min=1), 0.0)
    amplitude *= SIDE / amplitude.square().sum().sqrt()  # unit variance
    transfer = (amplitude * torch.exp(-0.5 * (2 * torch.pi * radius * blur / SIDE).square()))[:, : SIDE // 2 + 1]
    out = torch.empty(len(index), D, device=device)
    for block in torch.unique(index // BLOCK).tolist():
        gen = torch.Generator().manual_seed(block)
        white = torch.randn(BLOCK, COLOURS, SIDE, SIDE, generator=gen)
        made = torch.fft.irfft2(torch.fft.rfft2(white) * transfer, s=(SIDE, SIDE)).reshape(BLOCK, D)
        mine = index // BLOCK == block
        out[mine.to(device)] = made[index[mine] % BLOCK].to(device)
    return out


def mass_on_true_pairs(solution: gpu_ot.Solution, x: Tensor, partner: Tensor, mine: slice, place: Tensor) -> float:
    """sum_i P_(i, place_i) over this rank's rows, whose partners' points are `partner`."""
    problem = solution.problem
    C = (x.double() - partner.double()).square().sum(-1)
    exponent = (solution.f[mine] + solution.g[place] - C) / problem.eps
    return float((problem.a[mine] * problem.b[place] * exponent.exp()).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--eps", type=float, default=0.032, help="in standard deviations of the cost")
    parser.add_argument("--blur", type=float, default=8.0, help="pixels")
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, help="a folder for giant.json, to which the row is added")
    arguments = parser.parse_args()
    n, size, rank = arguments.points, int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))  # y_j is the picture order_j
    place = torch.empty_like(order).scatter_(0, order, torch.arange(n))
    sizes = even_sizes(n, size)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    own = torch.arange(mine.start, mine.stop)
    x, y = pictures(own, 0.0, device), pictures(order[mine], arguments.blur, device)
    cost = Sharded(SqEuclidean(x, y), layout=arguments.layout)
    problem = Problem(cost, ("std", arguments.eps))
    assert cost.ranks.slice(ROWS) == mine
    if rank == 0:
        print(gpu_ot.explain(problem).split("\n")[0], flush=True)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if size > 1:
            dist.barrier()

    synchronize()
    begun = time.perf_counter()
    solution = gpu_ot.solve(problem, tol=arguments.tol, backend=arguments.backend)
    synchronize()
    seconds = time.perf_counter() - begun
    partner = pictures(own, arguments.blur, device)
    found = mass_on_true_pairs(solution, x, partner, mine, place[mine].to(device))
    mass = float(cost.ranks.sum(torch.tensor(found, dtype=torch.float64, device=device)))
    backend = type(getattr(solution.geometry, "local", None) or solution.geometry).__name__
    row: dict[str, Any] = dict(
        section="giant", solver=f"gpu_ot {cost.layout}",
        backend=backend, ranks=size, n=n, m=n, d=D, eps_std=arguments.eps, blur=arguments.blur,
        tol=arguments.tol, dtype="fp32", time_s=seconds, iterations=solution.n_iter, passes=solution.n_sweeps,
        status=solution.status.name, true_pair_mass=mass, threads=torch.get_num_threads(),
    )  # fmt: skip
    if backend != "Absorbed":  # which forms the costs once, and keeps them
        products = solution.n_iter * (1 if backend == "Chunked" else 2)
        row["tflops"] = 2 * n * n * D * products / seconds / 1e12
    if rank == 0:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        if arguments.out:
            file = arguments.out / "giant.json"
            rows = json.loads(file.read_text())["rows"] if file.exists() else []
            same = ("ranks", "n", "eps_std", "blur", "solver", "backend")
            write(arguments.out, "giant", [old for old in rows if any(old[key] != row[key] for key in same)] + [row])
    if size > 1:
        dist.destroy_process_group()
    return 0 if solution.converged else 1


if __name__ == "__main__":
    raise SystemExit(main())
