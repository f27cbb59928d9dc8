"""The absorbed kernel K_ij = exp((f_i + g_j - C_ij) / eps) of costs in fp32, without a float64 operation for each pair.

Potentials of 1e4 eps leave fp32 three digits of the exponent. So they come as two numbers each, and the sums of three keep what rounding
takes from them (Knuth's two-sum): on chips whose float64 is 64 times slower that is a tenth of the work, and on every chip two reads of
C where torch's operations make eight passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of

BLOCK = 1024


def absorb(C: Tensor, g: Tensor, eps: float, dropped: float, f: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(K, f): K (B, n, m) in fp32, and the row potentials f (B, n) that it was made with.

    C        (B, n, m) in fp32, contiguous
    g, f     (B, m) and (B, n) in float64; for f None that of the cheapest pair of each row, whose entry is then 1
    dropped  exponents up to here are 0 in K
    """
    batch, n, m = C.shape
    K = torch.empty_like(C)
    out = torch.empty(batch, n, dtype=torch.float64, device=C.device) if f is None else f
    f_high, f_low = (out, out) if f is None else halves(f)
    block = min(BLOCK, max(64, triton.next_power_of_2(m)))
    with on_device_of(C):
        absorb_kernel[(batch * n,)](
            C, *halves(g), f_high, f_low, K, out, n, m, 1 / eps, dropped, GIVEN=f is not None, BLOCK=block, num_warps=4, **FUSED
        )
    return K, out


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers in fp32 whose sum has 48 bits of z."""
    high = z.float()
    return high, (z - high).float()


@triton.jit
def two_sum(x, y):
    """x + y as it is rounded, and what was lost."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


@triton.jit(do_not_specialize=COUNTS)
def absorb_kernel(C, g_high, g_low, f_high, f_low, K, f_out, n, m, scale, dropped, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """One row per program, which is read again where its smallest entry is looked for first."""
    row = tl.program_id(0).to(tl.int64)
    problem = row // n
    C += row * m
    K += row * m
    g_high += problem * m
    g_low += problem * m
    if GIVEN:
        f = tl.load(f_high + row)
        rest = tl.load(f_low + row)
    else:
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        for j in range(0, m, BLOCK):
            cols = j + tl.arange(0, BLOCK)
            z = tl.load(C + cols, mask=cols < m, other=float("inf")) - tl.load(g_high + cols, mask=cols < m, other=0.0)
            lowest = tl.minimum(lowest, z)
        f = tl.min(lowest, 0)
        rest = 0.0
        tl.store(f_out + row, f.to(tl.float64))
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        cost = tl.load(C + cols, mask=cols < m, other=float("inf"))
        gap, lost = two_sum(tl.load(g_high + cols, mask=cols < m, other=0.0), -cost)
        total, more = two_sum(gap, f)
        z = (total + ((lost + more) + (tl.load(g_low + cols, mask=cols < m, other=0.0) + rest))) * scale
        kept = (z > dropped) & (cost < float("inf"))  # NaN is 0 as well
        tl.store(K + cols, tl.where(kept, tl.exp(z), 0.0), mask=cols < m)
