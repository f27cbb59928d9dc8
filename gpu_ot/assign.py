"""Balanced assignment of samples to prototypes, or of tokens to experts: a fixed number of iterations, made to sit in a training step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def assign(
    logits: Tensor, iterations: int = 3, temperature: float = 0.05, group: ProcessGroup | None = None, capacity: float | None = None
) -> Tensor:
    """Soft assignment of n samples to K prototypes, in which every prototype gets its share: (*batch, n, K), rows sum to 1.

    Sinkhorn's iterations on exp(logits / temperature): `iterations` times the columns are brought to equal sums, and then the rows to 1.
    They are those of SwAV and DINO, in the log domain: nothing overflows, whatever the temperature.

    logits       (*batch, n, K), larger is nearer; -inf forbids a pair. Halves are computed in float32.
    iterations   how many; 0 is softmax(logits / temperature).
    temperature  > 0, in units of the logits.
    group        the torch.distributed group whose ranks share the samples: each passes its own rows, of any number, and gets theirs. An
                 iteration is one all-reduce of K numbers; K maxima before the first make its sums safe. The result is then detached.
    capacity     None: all prototypes get the same. A number >= 1: none gets more than `capacity` times n / K, which experts have room for,
                 and those with less keep what they have. What is left above it after few iterations is settled by more of them.

    The result has the type of the logits and, without a group, derivatives through the iterations. A sample that may go nowhere and a
    prototype that nothing may go to get zeros. `torch.compile` takes it whole.
    Raises ProblemError for settings that make no sense, and on a CPU for NaN and +inf among the logits; elsewhere, where looking would
    make the host wait, these come out as NaN.

    Cuturi 2013, arXiv:1306.0895; Caron et al. 2020, arXiv:2006.09882 (SwAV, three iterations).
    """
    _check(logits, iterations, temperature, capacity)
    with torch.set_grad_enabled(torch.is_grad_enabled() and group is None):
        L = logits.to(torch.float32 if logits.dtype.itemsize < 4 else logits.dtype) / temperature
        empty = L.amax(-1, keepdim=True) == -math.inf  # samples that may go nowhere: they count for nothing
        L, present = torch.where(empty, 0.0, L), (~empty).to(L.dtype)
        v = torch.zeros_like(L[..., 0, :]) if capacity is not None or iterations == 0 else _first(L, present, group)
        for _ in range(iterations if capacity is not None else iterations - 1):
            v = _balanced(v, _total(present, _rows(L, v), group), capacity)
        return torch.where(empty, 0.0, _rows(L, v)).to(logits.dtype)


def _first(L: Tensor, present: Tensor, group: ProcessGroup | None) -> Tensor:
    """v (*batch, K) that brings the columns of exp(L + v) to sums of 1. Relative to each column's largest entry nothing overflows."""
    top = L.detach().amax(-2) if L.shape[-2] else torch.full_like(L[..., :1, :].sum(-2), -math.inf)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    top = torch.where(top == -math.inf, 0.0, top)
    sums = _total(present, (L - top.unsqueeze(-2)).exp(), group)
    return torch.where(sums > 0, -(torch.where(sums > 0, sums, 1.0).log() + top), 0.0)


def _balanced(v: Tensor, sums: Tensor, capacity: float | None) -> Tensor:
    """v (*batch, K) after an iteration, from the columns' sums of a plan whose rows sum to 1: between 1 / K and n once they have been
    balanced, so a sum of plain numbers is safe. Without a capacity the common scale of v is the rows' affair."""
    found = torch.where(sums > 0, sums, 1.0).log()
    if capacity is None:
        return torch.where(sums > 0, v - found, v)
    room = (sums.sum(-1, keepdim=True) * (capacity / sums.shape[-1])).log()
    return torch.where(sums > 0, (v + room - found).clamp(max=0.0), 0.0)


def _rows(L: Tensor, v: Tensor) -> Tensor:
    """softmax(L + v), whose rows sum to 1."""
    return (L + v.unsqueeze(-2)).softmax(-1)


def _total(present: Tensor, Q: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sums of the columns over the samples of all ranks, (*batch, K)."""
    sums = (Q * present if Q.requires_grad else Q.mul_(present)).sum(-2)  # a product of matrices might be rounded to halves
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def _check(logits: Tensor, iterations: int, temperature: float, capacity: float | None) -> None:
    if not isinstance(logits, Tensor):
        raise errors.not_a_tensor("logits", logits)
    if logits.ndim < 2 or not logits.shape[-1]:
        raise errors.wrong_shape("logits", logits.shape, "(*batch, n, K), a row for each sample and a column for each prototype")
    if not logits.is_floating_point():
        raise errors.ProblemError(f"logits must be floating numbers, found {logits.dtype}: pass logits.float().")
    if iterations < 0 or iterations != int(iterations):
        raise errors.ProblemError(f"iterations must be a whole number >= 0, found {iterations}.")
    if not 0 < temperature < math.inf:
        raise errors.ProblemError(f"temperature must be a finite number > 0 in units of the logits, found {temperature}.")
    if capacity is not None and not 1 <= capacity < math.inf:
        raise errors.ProblemError(
            f"capacity must be at least 1, found {capacity}: at 1 every prototype is full, and with less there is no room for all samples."
        )
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or not logits.numel():
        return
    with torch.no_grad():
        top = logits.amax()  # NaN, where there is one
    if not (top < math.inf):
        raise errors.ProblemError("logits hold NaN or +inf. Mend them where they are computed; a forbidden pair is written -inf.")
