"""Vectors of a problem, O(n): log, exp and expm1 on one core of a CPU, and numbers on their way to the host.

torch hands these three functions to all cores from 2048 entries on, whose threads then spin for some milliseconds, where the threads
of the products want to run: one such call every ten iterations costs a dense solve a third of its speed (measured,
n = 3000 on 2 cores: 3.4 for 2.5 ms an iteration). Pieces of 2048 wake nobody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PIECE = 2048


def vector_dtype(device: torch.device) -> torch.dtype:
    """Potentials and weights are float64 whatever the cost's type: f / eps reaches 1e4 and more, and float32 would keep
    three digits of the plan. They are O(n + m), so this costs nothing. (Apple's GPUs have no float64.)"""
    return torch.float32 if device.type == "mps" else torch.float64


def log(z: Tensor) -> Tensor:
    return torch.log(z) if z.numel() <= PIECE or z.device.type != "cpu" else _in_pieces(torch.log, z)


def exp(z: Tensor) -> Tensor:
    return torch.exp(z) if z.numel() <= PIECE or z.device.type != "cpu" else _in_pieces(torch.exp, z)


def expm1(z: Tensor) -> Tensor:
    return torch.expm1(z) if z.numel() <= PIECE or z.device.type != "cpu" else _in_pieces(torch.expm1, z)


def _in_pieces(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.cat([function(piece) for piece in z.reshape(-1).split(PIECE)]).view(z.shape)


def in_full_precision(function: Callable[..., T]) -> Callable[..., T]:
    """The function, run outside of torch.autocast, which would round its products of float32 to halves."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Starts the copy of a vector to the host. Calling the result waits for the copy, not for what the device was given to do since."""
    if not numbers.is_cuda:
        return numbers.tolist
    stream = torch.cuda.current_stream(numbers.device)
    with torch.cuda.stream(stream):  # the tensor's own device, whichever is current
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(stream)

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read
