"""The peers, asked for the same work as gpu_ot. Each is imported when it is called: one that is missing or fails is a row that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from machine import DRY, EPS


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
