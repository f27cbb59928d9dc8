"""What torch.func makes of tensors: stand-ins that remember who differentiates them, and the numbers inside.

A solve reads numbers, so it runs on the tensors inside, beyond the reach of every transform. Its results are attached to the stand-ins
afterwards, by functions that torch.func can differentiate. torch.vmap hides the values of the single problems.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

T = TypeVar("T")

#: Whether this runs inside a transform of torch.func.
active: Callable[[], bool] = torch._C._are_functorch_transforms_active


class Function(torch.autograd.Function):
    """An autograd function whose arguments are positional. torch reads the signature of `forward` in every call, which takes longer than
    most of our forwards. Its derivative is computed outside of torch.autocast, even where somebody calls `backward` within."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "backward" in vars(cls):
            cls.backward = staticmethod(_without_autocast(cls.backward))  # type: ignore[method-assign]

    #: Whether torch.compile must not look into it: its arguments are no tensors and numbers alone.
    opaque = False

    @classmethod
    def apply(cls, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if active() or torch.compiler.is_compiling():
            return _applied(cls, *args) if cls.opaque else super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


def eagerly(function: Callable[..., T]) -> Callable[..., T]:
    """The function, over which torch.compile passes: it reads numbers and decides by them."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # pyright: ignore[reportReturnType]
        return function(*args, **kwargs)

    return call


@eagerly
def _applied(cls: type[Function], *args: Any) -> Any:
    return super(Function, cls).apply(*args)


def _without_autocast(backward: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(backward)
    def call(*args: Any) -> T:
        if not torch.compiler.is_compiling():
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return call(*args)
        return backward(*args)

    return call


def batched(z: Tensor) -> bool:
    """Whether z stands for one of many, under torch.vmap."""
    return any(_functorch.is_batchedtensor(each) for each in _layers(z))


def requires_grad(*tensors: Tensor) -> bool:
    """Whether autograd, or any transform around, differentiates with respect to one of the tensors."""
    return any(map(attrgetter("requires_grad"), tensors)) or (active() and any(map(_any_requires_grad, tensors)))


def unkept(z: Tensor) -> bool:
    """Whether autograd refuses to keep z for a backward pass: it was made under torch.inference_mode, which has ended."""
    return z.is_inference() and not torch.is_inference_mode_enabled()


def kept(z: Tensor) -> Tensor:
    """z, or a copy that autograd may keep."""
    return z.clone() if unkept(z) else z


def numbers(z: Tensor) -> Tensor:
    """What is inside of z; z itself where no transform has a part in it."""
    while _functorch.is_functorch_wrapped_tensor(z):
        z = _functorch.get_unwrapped(z)
    return z


def unwrapped(z: Tensor) -> Tensor:
    """The numbers of z as a tensor of its own, which requires a gradient if z does. To be called `outside`."""
    return numbers(z).detach().requires_grad_(_any_requires_grad(z))


def outside(work: Callable[[], T], near: Tensor) -> T:
    """`work` on a thread of its own, on the stream of `near`: transforms, autocast and grad mode are states of the thread that calls."""
    out: list[T] = []
    failed: list[BaseException] = []
    stream = torch.cuda.current_stream(near.device) if near.is_cuda else None

    def run() -> None:
        try:
            with torch.cuda.stream(stream):
                out.append(work())
        except BaseException as failure:
            failed.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return out[0]


def _any_requires_grad(z: Tensor) -> bool:
    return any(each.requires_grad for each in _layers(z))


def _layers(z: Tensor) -> list[Tensor]:
    """z and what it stands for, down to the numbers."""
    found = [z]
    while _functorch.is_functorch_wrapped_tensor(found[-1]):
        found.append(_functorch.get_unwrapped(found[-1]))
    return found
