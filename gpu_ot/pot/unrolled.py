"""The plan of `direct.balanced` as a differentiable function, through the iterations that were run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import transforms
from ..geometry.absorbed import range_of
from .direct import TENSORS, Found

#: Numbers of the vectors of all iterations that a backward pass keeps at most, 256 MB.
RECORDED = 2**24


def required(*given: Any) -> bool:
    """Whether any of these is a tensor whose gradient is asked for."""
    return torch.is_grad_enabled() and any(type(z) in TENSORS and z.requires_grad for z in given)


def plan(a: Any, b: Any, M: Tensor, found: Found, again: Callable[..., Tensor]) -> Tensor:
    """found.P with derivatives in a, b and M. `again` makes it of (a, b, M) by torch's operations: second derivatives need that."""
    weights = (z if isinstance(z, Tensor) else None for z in (a, b))
    return _Plan.apply(*weights, M, found, again)


class _Plan(transforms.Function):
    """The plan of a balanced problem as a function of a, b and M, through the iterations that were run."""

    opaque = True

    @staticmethod
    def forward(a: Tensor | None, b: Tensor | None, M: Tensor, found: Found, again: Callable[..., Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.from_numpy(found.P)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, M, ctx.found, ctx.again = inputs
        ctx.save_for_backward(a, b, M)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given, needed, grad = ctx.saved_tensors, ctx.needs_input_grad[:3], grad_outputs[0]
        pulled = None if torch.is_grad_enabled() else _pull(ctx.found, given, needed, grad)
        if pulled is None:  # second derivatives, or a kernel that had to be rebuilt
            pulled = _pull_by_torch(ctx.again, given, needed, grad)
        return *pulled, None, None


def _pull(found: Found, given: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor) -> list[Tensor | None] | None:
    from ..compiled import adjoint

    _, b, M = given
    assert M is not None
    (n, m), k, eps = M.shape, int(found.counts[0]), found.eps
    if k * (n + m) > RECORDED:
        return None
    K, u, w, s, t, exact = adjoint.record(_wide(M), found.a, found.b, eps, found.start, k, *range_of(8))
    if not exact:
        return None
    G = _wide(grad)
    ga, gb, gs, gt = adjoint.pull(K, found.a, found.b, u, w, s, t, G)
    out: list[Any] = [None, None, None]
    # b was given the mass of a.
    mass = 1.0 if b is None else float(b.detach().double().sum())
    along = gb @ found.b
    out[0] = ga + along / found.a.sum()
    out[1] = (gb * found.a.sum() - along) / mass
    if needed[2]:
        fall = gs.T @ w + u[:-1].T @ gt
        adjoint.on_costs(K, u[-1], w[-1], G, fall, eps)
        out[2] = fall
    return [torch.from_numpy(z).to(x.dtype) if want and x is not None else None for z, x, want in zip(out, given, needed, strict=True)]


def _wide(z: Tensor) -> np.ndarray:
    """In float64 and in rows, of its own memory where numpy may not write to it."""
    return np.require(z.detach().numpy(), np.float64, ["C", "W"])


def _pull_by_torch(
    again: Callable[..., Tensor], given: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The same from torch's own iterations, which it may differentiate again."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [z if twice or z is None else z.detach().requires_grad_(want) for z, want in zip(given, needed, strict=True)]
        wanted = [z for z, want in zip(inputs, needed, strict=True) if want and z is not None]
        found = iter(torch.autograd.grad(again(*inputs), wanted, grad, create_graph=twice, allow_unused=True))
    return [next(found) if want else None for want in needed]
