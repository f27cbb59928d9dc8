"""Anderson mixing of the outer iteration: the next slope out of the last few, by what they led to."""

from __future__ import annotations

import torch
from torch import Tensor

from .spaces import Factored

#: Differences that are remembered.
MEMORY = 3
#: Slopes are mixed where the iteration has come near its end: from a change of GATE times eps on, once it has fallen STEADY times in a row.
#: Before that it may still be leaving a saddle, which mixing would lead back to. A change WORSE times the last is a new beginning.
GATE, STEADY, WORSE = 0.03, 3, 2.0
#: What is added to the squares, as a part of their sum: differences that say the same count once.
RIDGE = 1e-12
#: Entries of a slope up to which what is remembered is worth its memory and its reading.
MOST = 2**18


class Mixing:
    """The problems of a batch, each on its own: Walker and Ni 2011, SIAM J. Numer. Anal. 49, type II. Vectors are (B, N)."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        self.place = 0

    def following(self, slope: Tensor | Factored, found: Tensor | Factored, change: Tensor) -> Tensor | Factored:
        """The slope to try after `slope` has led to `found`, and its costs have moved by `change` (*batch,), in units of eps."""
        if isinstance(found, Tensor) and found.shape[-2] * found.shape[-1] > MOST:
            return found
        x, y = (_flat(z, change.shape) for z in (slope, found))
        r, size = y - x, change.reshape(-1)
        if self.last is None:
            self.steady, self.size = torch.zeros_like(size), torch.full_like(size, torch.inf)
            self.moves, self.changes = (x.new_zeros(len(x), MEMORY, x.shape[-1]) for _ in range(2))
        self.steady = torch.where(size < self.size, self.steady + 1, 0)
        anew, self.size = size > WORSE * self.size, size
        if self.last is not None:
            self.moves[:, self.place], self.changes[:, self.place] = x - self.last[0], r - self.last[1]
            rising = (self.moves[:, self.place] * self.changes[:, self.place]).sum(-1) >= 0
            self.steady[rising] = 0
            anew |= rising
            self.place = (self.place + 1) % MEMORY
        if bool(anew.any()):
            self.moves[anew], self.changes[anew] = 0, 0
        self.last = x, r
        mixed = (size < GATE) & (self.steady >= STEADY)
        if not bool(mixed.any()):
            return found
        changes = self.changes.double()  # of float32 the ridge would be below rounding
        gram = changes @ changes.mT
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        ridge = RIDGE * diagonal.sum(-1, keepdim=True) + (diagonal == 0)
        part = torch.linalg.solve_ex(gram + torch.diag_embed(ridge), changes @ r.double().unsqueeze(-1))[0].to(r.dtype)
        part = torch.where(mixed.view(-1, 1, 1) & part.isfinite(), part, 0.0)
        return _shaped(y - ((self.moves + self.changes).mT @ part).squeeze(-1), found, change.shape)

    def part(self, index: Tensor) -> None:
        """Only some of the problems go on, (B,) bool."""
        if self.last is not None:
            self.last = self.last[0][index], self.last[1][index]
            self.steady, self.size, self.moves, self.changes = (z[index] for z in (self.steady, self.size, self.moves, self.changes))


def _flat(slope: Tensor | Factored, batch: torch.Size) -> Tensor:
    """(B, N) numbers of which the costs are an affine function."""
    if isinstance(slope, Tensor):
        return slope.expand(*batch, *slope.shape[-2:]).reshape(batch.numel(), -1)
    alpha, beta, u, _ = slope.parts
    parts = alpha, beta, u.flatten(-2)
    return torch.cat([z.expand(*batch, z.shape[-1]).reshape(batch.numel(), -1) for z in parts], -1)


def _shaped(numbers: Tensor, like: Tensor | Factored, batch: torch.Size) -> Tensor | Factored:
    if isinstance(like, Tensor):
        return numbers.view(*batch, *like.shape[-2:])
    alpha, beta, u, v = like.parts
    n, m = alpha.shape[-1], beta.shape[-1]
    numbers = numbers.view(*batch, -1)
    return Factored(numbers[..., :n], numbers[..., n : n + m], numbers[..., n + m :].view(*batch, *u.shape[-2:]), v)
