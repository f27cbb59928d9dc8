"""`gpu-ot compile`: machine code for a CPU now, rather than at the first call that needs it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

import gpu_ot

from . import compiled
from .errors import BackendError
from .vectors import PIECE

TYPES = ("float64", "float32")


def describe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "numba compiles whole solves when they are first needed, which takes most of a minute, and keeps the result on disk. This "
        "command does it now, for both types at once. Nothing else changes."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if why := compiled.refused():
        raise BackendError(f"nothing to compile: {why}")
    start = time.perf_counter()
    command = [sys.executable, "-c", "import sys, gpu_ot.warm; gpu_ot.warm.everything(sys.argv[1])"]
    running = [subprocess.Popen([*command, dtype]) for dtype in TYPES]
    print(f"compiling for {' and '.join(TYPES)}, about a minute", file=sys.stderr)
    for done, each in enumerate(running, 1):
        if each.wait():
            raise BackendError(f"the compiler ended with status {each.returncode}, see above")
        args.progress(done, len(running), time.perf_counter() - start, "types")
    for dtype in TYPES:  # one index lists what there is of a function, and of two writers at once one is lost
        if status := subprocess.call([*command, dtype]):
            raise BackendError(f"the compiler ended with status {status}, see above")
    print(f"compiled in {time.perf_counter() - start:.0f} s")


def everything(dtype: str) -> None:
    """Calls that need each of the compiled functions, for sweeps in one type."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 40, 2, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    M, w = torch.cdist(x[0], y[0]).square(), torch.full((40,), 1 / 40, dtype=x.dtype)
    gpu_ot.sinkhorn(w, w, M, 0.1)
    gpu_ot.sinkhorn_unbalanced(w, w, M, 0.1, 1.0)
    gpu_ot.solve_batch(M[None], 0.1, w, w)
    gpu_ot.sinkhorn2(w, w, M.requires_grad_(), 0.1).backward()
    gpu_ot.solve(gpu_ot.Problem(gpu_ot.SqEuclidean(x, y), 0.01))
    many = torch.rand(PIECE + 1, 2, generator=generator).to(x.dtype)  # whose vectors are taken by compiled functions
    for backend in ("mesh", "multiscale"):
        gpu_ot.solve(gpu_ot.Problem(gpu_ot.SqEuclidean(many, 0.5 * many), 0.01), backend=backend, tol=1e-3).transport()
    C = torch.cdist(x[0], x[0])
    gpu_ot.gromov(C, torch.cdist(y[0], y[0]), 0.05)
    gpu_ot.free_barycenter(x.detach(), 0.05, y[0])
    gpu_ot.soft_sort(torch.rand(2000, generator=generator).to(x.dtype))
    gpu_ot.SamplesLoss()(x[0].requires_grad_(), y[0]).backward()
