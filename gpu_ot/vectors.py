"""log, exp and expm1 of O(n) vectors, on one core of a CPU.

torch hands these three to all cores from 2048 entries on, whose threads then spin for some milliseconds, where the threads of
the products want to run: one such call every ten iterations costs a dense solve a third of its speed (measured,
n = 3000 on 2 cores: 3.4 for 2.5 ms an iteration). Pieces of 2048 wake nobody.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 2048


def log(z: Tensor) -> Tensor:
    return _in_pieces(torch.log, z)


def exp(z: Tensor) -> Tensor:
    return _in_pieces(torch.exp, z)


def expm1(z: Tensor) -> Tensor:
    return _in_pieces(torch.expm1, z)


def _in_pieces(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    if z.device.type != "cpu" or z.numel() <= PIECE:
        return function(z)
    return torch.cat([function(piece) for piece in z.reshape(-1).split(PIECE)]).view(z.shape)
