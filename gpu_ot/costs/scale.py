"""How large costs are: numbers that a relative eps is a multiple of. 0-d, float64; NaN where no entry is finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..vectors import vector_dtype

#: The kinds of `Cost.scale`.
SCALES = ("std", "mean", "median", "max")


def largest(blocks: Iterator[Tensor]) -> Tensor:
    """The largest finite entry of all blocks."""
    top = torch.stack([torch.where(C.isfinite(), C, -math.inf).amax() for C in blocks]).amax()
    return torch.where(top.isfinite(), top, math.nan).to(vector_dtype(top.device))


def median(sample: Tensor) -> Tensor:
    """The lower of the middle two finite entries."""
    sample = sample[sample.isfinite()]
    dtype = vector_dtype(sample.device)
    return sample.median().to(dtype) if len(sample) else torch.full_like(sample.sum(), math.nan, dtype=dtype)


def moments(alpha: Tensor, beta: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all pairs of all problems of C_ij = alpha_i + beta_j - <u_i, v_j>.

    With u = u~ + u', u' the mean, and likewise v:  C_ij = (alpha_i - <u~_i, v'>) + (beta_j - <u', v~_j>) - <u', v'> - <u~_i, v~_j>,
    four terms without covariance, of which the last has the variance tr(S_u S_v) for the second moments S.
    """
    mean_u, mean_v = u.mean(-2, keepdim=True), v.mean(-2, keepdim=True)
    u, v = u - mean_u, v - mean_v
    rows, columns = alpha - (u * mean_v).sum(-1), beta - (v * mean_u).sum(-1)
    S_u, S_v = u.mT @ u / u.shape[-2], v.mT @ v / v.shape[-2]
    means = rows.mean(-1) + columns.mean(-1) - (mean_u * mean_v).sum((-1, -2))
    variances = rows.var(-1, correction=0) + columns.var(-1, correction=0) + (S_u * S_v).sum((-1, -2))
    return means.mean(), variances.mean() + means.var(correction=0)


def pooled(blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the finite entries of all blocks."""

    def moments_of(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = block[block.isfinite()]
        z = z.to(vector_dtype(z.device))
        count = torch.full_like(z.sum(), z.numel())
        mean = z.sum() / count.clamp(min=1)
        return count, mean, (z - mean).square().sum()

    count, mean, total = merged(map(moments_of, blocks))
    return torch.where(count > 0, mean, math.nan), torch.where(count > 0, total / count, math.nan)


def merged(sets: Iterable[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """(count, mean, sum of squared deviations) of all sets together, in numbers or 0-d tensors, merged as they come.

    Chan, Golub and LeVeque 1983, equation (2.1).
    """
    count, mean, total = 0.0, 0.0, 0.0
    for k, centre, spread in sets:
        both, gap = count + k, centre - mean
        share = k / (both + (both == 0))
        count, mean, total = both, mean + gap * share, total + spread + gap * gap * count * share
    return count, mean, total
