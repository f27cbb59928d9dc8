"""Weighted samples as tensors without padding, and the transport problem between them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..communicator import ALONE
from ..costs import Euclidean, SqEuclidean
from ..distributed.costs import Sharded
from ..errors import ProblemError
from ..geometry import mesh, multiscale
from ..geometry.select import BACKENDS
from ..penalties import KL
from ..problem import Problem
from ..solver.status import CONVERGED, STALLED, Status

#: One entry for each side.
Sides = tuple[Tensor | None, Tensor | None]


def measures(args: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    if len(args) == 6:
        raise ProblemError(
            "labels (l_x, a, x, l_y, b, y) tell geomloss's multiscale backend its clusters; here nothing is clustered: pass (a, x, b, y)."
        )
    if len(args) not in (2, 4):
        raise ProblemError(f"SamplesLoss takes (x, y) or (a, x, b, y), found {len(args)} arguments.")
    a, x, b, y = (None, args[0], None, args[1]) if len(args) == 2 else args
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor):
            raise errors.not_a_tensor(name, z)
        if z.ndim not in (2, 3) or z.ndim != x.ndim or z.shape[-1] != x.shape[-1]:
            raise errors.wrong_shape(name, z.shape, "points (N, D) or (B, N, D), the other cloud alike")
    return a, x, b, y


def flags(x: Tensor, y: Tensor, lengths: Sides | None, mask: Sides | None) -> Sides:
    """Which points are real, bool (*batch, n), for each side; None for all."""
    if lengths is not None and mask is not None:
        raise ProblemError("pass `lengths` or `mask`: either says which points are real.")
    if mask is not None:
        for name, z, flag in zip("xy", (x, y), mask, strict=True):
            if flag is not None and (flag.dtype != torch.bool or flag.shape != z.shape[:-1]):
                raise errors.wrong_shape(f"the mask of {name} ({flag.dtype})", flag.shape, f"bool {errors.shape(z.shape[:-1])}")
        return mask
    found: list[Tensor | None] = [None, None]
    for side, (name, z, count) in enumerate(zip("xy", (x, y), lengths or (None, None), strict=True)):
        if count is not None:
            if count.is_floating_point() or count.shape != z.shape[:-2]:
                raise errors.wrong_shape(f"the lengths of {name} ({count.dtype})", count.shape, f"integers {errors.shape(z.shape[:-2])}")
            found[side] = torch.arange(z.shape[-2], device=z.device) < count.to(z.device).unsqueeze(-1)
    return found[0], found[1]


def real(name: str, w: Tensor | None, z: Tensor, flags: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights, points) in `dtype`. Padding gets weight 0 and is moved onto the first real point: no NaN, and no point far away."""
    z = z.to(dtype)
    if w is None:
        real = z.new_ones(z.shape[:-1]) if flags is None else flags.to(dtype)
        w = real / real.sum(-1, keepdim=True)
    else:
        if w.shape == (*z.shape[:-1], 1):
            w = w.squeeze(-1)
        if w.ndim == 0 or w.shape[-1] != z.shape[-2] or w.ndim > z.ndim - 1:
            raise errors.wrong_shape(f"the weights of {name}", w.shape, errors.shape(z.shape[:-1]))
        w = w.to(dtype).expand(z.shape[:-1])
    if flags is not None:
        first = flags.int().argmax(-1, keepdim=True).unsqueeze(-1)
        w = torch.where(flags, w, 0.0)
        z = torch.where(flags.unsqueeze(-1), z, z.detach().take_along_dim(first, -2))
    return w, z


def between_samples(
    a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor, p: float, blur: float, reach: float, group: Any = None
) -> tuple[Problem, float]:
    """The problem with C = |x - y|^p / p, p = 1 or 2, in units of its own, and the size of one such unit."""
    # Lengths in units of about blur: no power of them leaves the range of float32. Division by a power of 2 is exact.
    grain = 2.0 ** math.floor(math.log2(blur))
    x, y, blur, reach = x / grain, y / grain, blur / grain, reach / grain
    kind, half = (Euclidean, 1.0) if p == 1 else (SqEuclidean, 0.5)  # the half of |x - y|^2 / 2 is part of the unit
    cost = kind(x, y) if group is None else Sharded(kind(x, y), group)
    return Problem(cost, blur**p / half, a, b, KL(reach**p / half)), half * grain**p


def backend_for(name: str, problem: Problem) -> str:
    """Our name for geomloss's: the first backend of that kind that serves the problem. A stored matrix is not streamed."""
    if name not in ("tensorized", "online", "multiscale"):
        return name
    serves = name == "multiscale" and problem.cost.ranks is ALONE and BACKENDS[name].refuse(problem) is None
    if serves and (not mesh.by_torch(problem) or multiscale.pays(problem)):  # tiles are no faster, unless few pairs are left
        return name
    problem = problem.cost.ranks.largest(problem)
    streaming = ("triton", "keops") if problem.a.is_cuda else ()
    serving = [one for one in (*streaming, "chunked") if BACKENDS[one].refuse(problem) is None]
    return serving[0] if serving and name != "tensorized" else "dense"


def report(status: Status, n_sweeps: int, verbose: bool) -> None:
    message = f"SamplesLoss, {n_sweeps} sweeps over the pairs, {status}"
    if verbose:
        print(message)
    if status not in (CONVERGED, STALLED):  # stalled is as good as the type allows
        warnings.warn(message, RuntimeWarning, stacklevel=5)
