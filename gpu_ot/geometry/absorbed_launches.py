"""Iterations and softmins on an absorbed kernel, by Triton's kernels: what `Absorbed` does by torch, in a few launches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..penalties import KL
from ..problem import Problem
from . import graphs
from .products import Power, flatten, serves_vectors, vectors

if TYPE_CHECKING:
    from .absorbed import Absorbed


def serve(absorbed: Absorbed, problem: Problem, g: Tensor) -> bool:
    """Whether `iterate` serves: a kernel that Triton can read, a problem for each of its matrices, penalties it knows."""
    products = absorbed.kernel.products
    if products is None or not products.whole_rows or g.shape != problem.b.shape or g.shape[:-1] != absorbed.C.shape[:-2]:
        return False
    return serves_vectors(g) and all(isinstance(penalty, KL) for penalty in problem.penalties)


def build(absorbed: Absorbed, f0: Tensor | None, g0: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """(K, f0) of `Absorbed._build`, in one launch and no float64 for pairs; None where it does not serve."""
    C = absorbed.C
    if C.dtype != torch.float32 or not C.is_contiguous() or not serves_vectors(g0) or g0.shape[:-1] != C.shape[:-2]:
        return None
    from ..kernels.absorb import absorb  # pyright: ignore[reportMissingImports]

    given = None if f0 is None else flatten(f0)
    K, f = absorb(C.view(-1, *C.shape[-2:]), flatten(g0), eps, absorbed.log_dropped, given)
    return K.view(C.shape), f.view(*C.shape[:-1])


def iterate(
    absorbed: Absorbed, problem: Problem, g: Tensor, eps: float, k: int, hold: bool = False, inexact: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Absorbed._multiply` in 2 k + 2 launches; with `hold`, what nobody waits for: see gpu_ot.kernels.absorbed."""
    from ..kernels.absorbed import Side, iterate  # pyright: ignore[reportMissingImports]

    kernel, products = absorbed.kernel, absorbed.kernel.products
    assert products is not None
    if kernel.launched is None or kernel.launched[0] is not problem:
        sides = []
        for weights, offset, penalty in zip((problem.a, problem.b), (kernel.f0, kernel.g0), problem.penalties, strict=True):
            tau = penalty.tau if isinstance(penalty, KL) else math.inf
            power = None if penalty.balanced else Power.damped(flatten(offset), tau, eps)
            sides.append(Side(vectors(weights), flatten(offset), 1 + eps / tau, None if power is None else (power.p, power.c)))
        kernel.launched = problem, *sides
    _, rows, columns = kernel.launched
    K = products.K.reshape(-1, *products.K.shape[-2:])

    def work(g: Tensor) -> tuple[Tensor, ...]:
        return iterate(K, rows, columns, g, eps, k, absorbed.safe, hold=hold, inexact=inexact)

    # A held iteration is a part of a block, which may be a graph itself.
    again = k > 1 and not hold
    f, g_out, g_next, exact = absorbed.plain((graphs.Same(products, problem), k), work, flatten(g)) if again else work(flatten(g))
    return f.view(problem.a.shape), g_out.view(g.shape), g_next.view(g.shape), exact


def softmin(absorbed: Absorbed, g: Tensor, b: Tensor, eps: float) -> Tensor | None:
    """`Absorbed.update` (*batch, n) from a kernel at eps, with one read; None where kernels do not serve or a sum is not exact."""
    kernel, products = absorbed.kernel, absorbed.kernel.products
    if products is None or not products.whole_rows or not serves_vectors(g, b) or not g.shape == b.shape == kernel.g0.shape:
        return None
    from ..kernels.absorbed import softmin  # pyright: ignore[reportMissingImports]

    flat = (flatten(z) for z in (kernel.f0, kernel.g0, g))
    s, exact = softmin(products.K.reshape(-1, *products.K.shape[-2:]), vectors(b), *flat, eps, absorbed.safe)
    good = bool((exact if len(exact) == 1 else exact.all()).item())
    return s.view(kernel.f0.shape) if good else None
