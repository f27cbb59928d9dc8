"""The fixed point of any differentiable map, as a function of what the map is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import NotConverged

#: Adjoint iterations at most, and the relative size of the last one, where sweeps run in float64 and where they do not.
LIMIT, TOL, TOL_SINGLE = 5000, 1e-12, 1e-5


def fixed_point(step: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], at: tuple[Tensor, ...], tol: float = TOL) -> tuple[Tensor, ...]:
    """`at`, for which step(at) = at, with the derivatives of the fixed point in whatever `step` depends on.

    With J the derivative of step, the cotangent w of the point becomes (1 + J^T + J^T^2 + ...) w, summed until nothing is added. It
    takes as many products as the iterations take to the same precision. Parts of w that J^T keeps for ever must be 0: the gauge is
    one, and what depends on the plan alone has none. First derivatives. Raises NotConverged in the backward where the sum does not
    settle.
    """
    held = tuple(z.detach().requires_grad_() for z in at)
    with torch.enable_grad():
        moved = step(held)  # its graph to `held` gives J^T, and its graph to everything else the first factor
    return _FixedPoint.apply(tol, held, moved, *moved)


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tol: float, held: tuple[Tensor, ...], moved: tuple[Tensor, ...], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.tol, ctx.held, ctx.moved = tol, held, moved
        ctx.set_materialize_grads(False)
        return tuple(z.detach().clone() for z in held)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = tuple(torch.zeros_like(z) if grad is None else grad for z, grad in zip(ctx.held, grads, strict=True))
        term, size, largest = total, 0.0, 0.0
        for _ in range(LIMIT):
            found = torch.autograd.grad(ctx.moved, ctx.held, term, retain_graph=True, allow_unused=True)
            term = tuple(torch.zeros_like(z) if grad is None else grad for z, grad in zip(ctx.held, found, strict=True))
            size = float(sum(z.abs().sum() for z in term))
            total = tuple(z + more for z, more in zip(total, term, strict=True))
            largest = max(largest, float(sum(z.abs().sum() for z in total)))
            if size <= ctx.tol * largest:
                return None, None, None, *total
        raise NotConverged(
            f"an implicit derivative is not settled: after {LIMIT} adjoint iterations the last adds {size / largest:.2g} of the whole, "
            f'above {ctx.tol:.2g}. The iterations themselves are as slow there: raise eps, or use grad="unroll".'
        )
