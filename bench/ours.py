"""What the contests time of gpu_ot, and the plain torch beside it. Each returns a call that takes no arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from machine import DEVICE, EPS


def randn_clouds(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=gen).to(DEVICE), torch.randn(n, d, generator=gen).to(DEVICE)


def iterations(x: torch.Tensor, y: torch.Tensor, precision: str, iterations: int) -> Callable[[], Any]:
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


def solver(x: torch.Tensor, y: torch.Tensor, iterations: int, backward: bool, backend: str = "triton") -> Callable[[], Any]:
    """The package's own path: validation, binding, float64 potentials, the loop; `backward` adds the value's gradient in both clouds."""
    from gpu_ot import Problem, SqEuclidean, solve

    def run() -> Any:
        points = [z.detach().requires_grad_(backward) for z in (x, y)]
        solution = solve(Problem(SqEuclidean(*points), EPS), backend=backend, tol=0.0, max_iter=iterations, check_every=iterations)
        return torch.autograd.grad(solution.value, points) if backward else solution.f

    return run


@contextlib.contextmanager
def graphs_after(blocks: int) -> Iterator[None]:
    """So many equal blocks of iterations are launched before they are graphs."""
    from gpu_ot.geometry import graphs

    before, graphs.AFTER = graphs.AFTER, blocks
    try:
        yield
    finally:
        graphs.AFTER = before


def blocks(x: torch.Tensor, y: torch.Tensor, every: int, iterations: int, accelerate: str, backend: str = "triton") -> Callable[[], Any]:
    """A solve that is checked every so many iterations, as those of users are."""
    from gpu_ot import Problem, SqEuclidean, solve

    cost: Any = SqEuclidean(x, y)
    cost = cost if backend == "triton" else cost.dense()

    def run() -> Any:
        settings: dict[str, Any] = dict(backend=backend, accelerate=accelerate, tol=0.0, max_iter=iterations, check_every=every)
        solution = solve(Problem(cost, EPS), **settings)
        return solution.f, solution.g

    return run


def without_graphs(run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with graphs_after(10**9):
            return run()

    return call


def iterate(x: torch.Tensor, y: torch.Tensor, iterations: int) -> Callable[[], Any]:
    """Plain iterations on a bound problem: what `solve` repeats between two checks of the error."""
    from gpu_ot import Problem, SqEuclidean
    from gpu_ot.geometry.triton import Streaming

    problem = Problem(SqEuclidean(x, y), EPS)
    geometry, start = Streaming(problem), [torch.zeros_like(problem.b)]

    def run() -> Any:
        with torch.no_grad():
            f, g, start[0] = geometry.iterate(problem, start[0], EPS, iterations)
        return f, g, start[0]

    return run


def dense_loop(
    C: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float, iterations: int, columns_first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(f, g) as the paper has it, batched, in the type of C; from g = 0, or with `columns_first` from f = 0 as POT does."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(iterations):
        g = -eps * torch.logsumexp((f + eps * a.log()).unsqueeze(-1) / eps - C / eps, -2) if i or columns_first else g
        f = -eps * torch.logsumexp((g + eps * b.log()).unsqueeze(-2) / eps - C / eps, -1)
    return f, g


def torch_iterations(x: torch.Tensor, y: torch.Tensor, iterations: int) -> Callable[[], Any]:
    def run() -> Any:
        C = torch.cdist(x, y).square()
        w = torch.full((len(x),), 1 / len(x), device=x.device)
        return dense_loop(C, w, w, EPS, iterations)

    return run
