"""SamplesLoss as one opaque operation, for torch.compile, torch.func and vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..problem import vector_dtype
from ..solve import solve
from .divergence import at_potentials, divergence
from .measures import backend_for, between_samples, report


@torch.library.custom_op("gpu_ot::samples_loss", mutates_args=())
def _samples_loss(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, p: float, blur: float, reach: float, debias: bool, backend: str, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value, f, g, f_aa, g_bb). The derivative needs the potentials alone, O(n + m) memory, and one more sweep a term."""

    def work() -> tuple[Tensor, ...]:
        problem, unit = between_samples(a.detach(), x.detach(), b.detach(), y.detach(), p, blur, reach)
        settings: dict[str, Any] = dict(backend=backend_for(backend, problem), tol=tol, max_iter=max_iter)
        if debias:
            found = divergence(problem, **settings)
            own = found.self_a.f, found.self_b.f
        else:
            found = solve(problem, **settings)
            own = torch.zeros_like(found.f), torch.zeros_like(found.g)
        report(found.status, found.n_sweeps, verbose=False)
        return (unit * found.value).to(x.dtype), *((unit * z).contiguous() for z in (found.f, found.g, *own))

    value, f, g, f_aa, g_bb = transforms.outside(work, x)
    return value, f, g, f_aa, g_bb


@torch.library.custom_op("gpu_ot::samples_loss_backward", mutates_args=())
def _samples_loss_backward(
    grad: Tensor, a: Tensor, x: Tensor, b: Tensor, y: Tensor, f: Tensor, g: Tensor, f_aa: Tensor, g_bb: Tensor,
    p: float, blur: float, reach: float, debias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def work() -> tuple[Tensor, ...]:
        leaves = [z.detach().requires_grad_() for z in (a, x, b, y)]
        problem, unit = between_samples(leaves[0], leaves[1], leaves[2], leaves[3], p, blur, reach)
        own = (f_aa / unit, g_bb / unit) if debias else None
        value = at_potentials(problem, (f + f_aa) / unit, (g + g_bb) / unit, own, backend_for(backend, problem))
        return torch.autograd.grad(unit * value, leaves, grad.to(value.dtype))

    da, dx, db, dy = (z.contiguous() for z in transforms.outside(work, x))
    return da, dx, db, dy


@_samples_loss.register_fake
def _(a: Tensor, x: Tensor, b: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    wide = vector_dtype(x.device)
    f, g = a.new_empty(x.shape[:-1], dtype=wide), b.new_empty(y.shape[:-1], dtype=wide)
    return x.new_empty(x.shape[:-2]), f, g, torch.empty_like(f), torch.empty_like(g)


@_samples_loss_backward.register_fake
def _(grad: Tensor, a: Tensor, x: Tensor, b: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return a.new_empty(a.shape), x.new_empty(x.shape), b.new_empty(b.shape), y.new_empty(y.shape)


class Transformable(transforms.Function):
    """The operation with its derivative, in the form that torch.func and torch.compile accept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _samples_loss(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.settings = inputs[4:9]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The compiler does not trace a Function within a Function, and torch.func takes no operation without one.
        derivative = _samples_loss_backward if torch.compiler.is_compiling() else _Derivative.apply
        return (*derivative(grad_outputs[0], *ctx.saved_tensors, *ctx.settings), *[None] * 7)


class _Derivative(transforms.Function):
    """The first derivative. It refuses the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _samples_loss_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("SamplesLoss has first derivatives under torch.func and torch.compile: its potentials are held still.")


def samples_loss(*inputs: Any) -> tuple[Tensor, ...]:
    """The operation as a function of (a, x, b, y) and its settings. The compiler wants no Function where there is nothing to
    differentiate."""
    wanted = torch.is_grad_enabled() and any(z.requires_grad for z in inputs[:4])
    if torch.compiler.is_compiling() and not wanted:
        return _samples_loss(*inputs)
    return Transformable.apply(*inputs)


def _by_batch(op: Any) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    """The rule for vmap: one more batch axis in front, which the solver takes anyway."""

    def mapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        moved = [
            z if not isinstance(z, Tensor) else z.expand(info.batch_size, *z.shape) if dim is None else z.movedim(dim, 0)
            for z, dim in zip(args, in_dims, strict=True)
        ]
        out = op(*moved)
        return out, (0,) * len(out)

    return mapped


_samples_loss.register_vmap(_by_batch(_samples_loss))
_samples_loss_backward.register_vmap(_by_batch(_samples_loss_backward))
