"""Clouds of points as POT's callers pass them, and the costs between them under POT's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..costs import Cosine, Cost, Euclidean, Formula, SqEuclidean
from ..problem import float_type
from ..vectors import in_full_precision
from .arrays import take
from .refusals import elsewhere
from .result import OTResult

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
    if w is not None:  # sum w |x - y|^p is the same cost between stretched clouds
        power = {"sqeuclidean": 2.0, "euclidean": 2.0, "cityblock": 1.0, "minkowski": p}.get(metric.lower())
        if power is None:
            raise errors.ProblemError(f'w is not known to metric = "{metric}": it weighs the coordinates of differences.')
        stretch = w.to(dtype) ** (1 / power)
        x, y = x * stretch, y * stretch
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
    return Formula(lambda x_i, y_j: _root(((x_i - y_j).abs() ** p).sum(-1), p), x, y)


@in_full_precision
def matrix(cost: Cost) -> Tensor:
    """The costs as an array; those of halves in float32, in which they are solved."""
    return (cost.to(torch.float32) if float_type(*cost.inputs.values()).itemsize < 4 else cost).dense()


def narrowed(result: Any, cost: Cost) -> Any:
    """A result from `matrix(cost)` in the type of the points, where these are halves."""
    dtype = float_type(*cost.inputs.values())
    return _cast(result, dtype) if dtype.itemsize < 4 else result


def _cast(z: Any, dtype: torch.dtype) -> Any:
    if isinstance(z, Tensor):
        return z.to(dtype) if z.is_floating_point() else z
    if isinstance(z, (np.ndarray, np.generic)):
        return z.astype(str(dtype).removeprefix("torch.")) if z.dtype.kind == "f" else z
    if isinstance(z, dict):
        return {key: _cast(value, dtype) for key, value in z.items()}
    if isinstance(z, (tuple, list)):
        return type(z)(_cast(value, dtype) for value in z)
    if isinstance(z, OTResult):
        return replace(z, **{field.name: _cast(getattr(z, field.name), dtype) for field in fields(z)})
    return z


def _root(z: Any, p: float) -> Any:
    """z^(1/p), with derivative 0 at 0, where the points coincide. z may be lazy."""
    if not isinstance(z, Tensor):
        return z ** (1 / p)
    positive = z > 0
    return torch.where(positive, torch.where(positive, z, 1.0) ** (1 / p), 0.0)
