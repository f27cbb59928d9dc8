"""Clouds of points as POT's callers pass them, and the costs between them under POT's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..costs import Cosine, Cost, Euclidean, Formula, SqEuclidean
from ..problem import float_type
from .arrays import take
from .refusals import elsewhere

METRICS = ("sqeuclidean", "euclidean", "cityblock", "minkowski", "cosine", "correlation")


def take_points(ndim: int = 2, **named: Any) -> tuple[list[Tensor], Callable[[Tensor], Any]]:
    """Clouds (n, d), for ndim = 3 (B, n, d), as tensors, and the way back to the caller's kind of array."""
    clouds, back = take(**named)
    for name, z in zip(named, clouds, strict=True):
        if z is None or z.ndim != ndim:
            raise errors.wrong_shape(name, (0,) if z is None else z.shape, "(n, d), one row a point" if ndim == 2 else "(B, n, d)")
    return clouds, back


def between(x: Tensor, y: Tensor, metric: Any = "sqeuclidean", p: float = 2, w: Tensor | None = None) -> Cost:
    """The cost between x (*batch, n, d) and y (*batch, m, d) that POT calls `metric`; integers become float64."""
    dtype = float_type(x, y)
    x, y = x.to(dtype), y.to(dtype)
    if not isinstance(metric, str) or metric.lower() not in METRICS:
        found = f"metric = {metric!r}" if isinstance(metric, str) else "a metric that is a function"
        raise elsewhere(
            f"{found} (of {', '.join(METRICS)}, or any gpu_ot.Formula)", "ot.dist(x1, x2, metric) and pass the matrix that it returns"
        )
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        raise errors.wrong_shape("x2", y.shape, f"(m, d) to match x1 with shape {errors.shape(x.shape)}")
    match metric.lower():
        case "sqeuclidean":
            return SqEuclidean(x, y)
        case "euclidean":
            return Euclidean(x, y)
        case "cosine":
            return Cosine(x, y)
        case "correlation":
            return Cosine(x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True))
        case "cityblock":
            return Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x, y)
    if w is not None:  # sum w |x - y|^p is the same cost between stretched clouds
        stretch = w.to(dtype) ** (1 / p)
        x, y = x * stretch, y * stretch
    return Formula(lambda x_i, y_j: _root(((x_i - y_j).abs() ** p).sum(-1), p), x, y)


def _root(z: Any, p: float) -> Any:
    """z^(1/p), with derivative 0 at 0, where the points coincide. z may be lazy."""
    if not isinstance(z, Tensor):
        return z ** (1 / p)
    positive = z > 0
    return torch.where(positive, torch.where(positive, z, 1.0) ** (1 / p), 0.0)
