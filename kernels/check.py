"""A check of the iterates in at most three launches: the error of each problem, the best state so far, and the flags the host reads.

The twin of `Marginal.measure` in gpu_ot.solver.criterion and of what `Monitor.check` does with it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of
from .step import expm1

NORMS = ("l1", "l1_absolute", "l2", "l2_joint")


def check(
    b: Tensor, f: Tensor, g: Tensor, g_next: Tensor, slope: float, tol: float, sums: float, differences: float, far: float, norm: str, *,
    last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, plain: bool = False, inexact: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(f, g, error, done, flags): the best state so far, (B, n) and (B, m); its error (B,) and whether that meets tol (B,); and 4 numbers.

    b            (B, m), or (m,) shared by the batch; f (B, n), g and g_next (B, m), float64
    slope        the gap is slope (g - g_next); sums + differences max |g| is the relative error that rounding alone makes
    far          the largest gap that counts as such
    last         (f, g, error, done) of the check before. A state that is no better is not kept; a problem that is done stays
    plain        the iterations were plain ones, which only improve: the new state is kept whatever its error
    inexact      0-d bool: this state is void

    flags are 1 or 0 for: all are done; all are done or at the floor of rounding; then the largest error in floors, and 0.
    """
    batch, m = g.shape
    n, joint = f.shape[-1], norm == "l2_joint"
    new_f, new_g = torch.empty_like(f), torch.empty_like(g)
    error = torch.empty(batch, dtype=torch.float64, device=g.device)
    done = torch.empty(batch, dtype=torch.bool, device=g.device)
    sizes = torch.empty(2 * batch, 3, dtype=torch.float64, device=g.device)
    flags = torch.empty(4, dtype=torch.float64, device=g.device)
    old_f, old_g, old_error, old_done = last or (f, g, error, done)
    block = min(1024, max(64, triton.next_power_of_2(max(n, m))))
    numbers = float(slope), float(tol), float(sums), float(differences), float(far)
    stride = m if b.ndim > 1 else 0
    with on_device_of(g):
        if joint:
            size_kernel[(batch,)](
                b, g, g_next, sizes, m, stride, *numbers[:1], *numbers[2:], SQUARE=True, BLOCK=block, num_warps=8, **FUSED
            )
        check_kernel[(batch,)](
            b, f, g, g_next, old_f, old_g, old_error, old_done, done if inexact is None else inexact, new_f, new_g, error, done, sizes,
            flags, batch, n, m, stride, *numbers, NORM=NORMS.index(norm), LAST=last is not None, PLAIN=plain,
            INEXACT=inexact is not None, ALONE=batch == 1, BLOCK=block, num_warps=8, **FUSED,
        )  # fmt: skip
        if batch > 1:
            flags_kernel[(1,)](sizes, flags, batch, BLOCK=min(1024, triton.next_power_of_2(batch)), **FUSED)
    return new_f, new_g, error, done, flags


@triton.jit(do_not_specialize=COUNTS)
def size_kernel(
    b, g, g_next, sizes, m, b_stride, slope: tl.float64, sums: tl.float64, differences: tl.float64, far: tl.float64,
    SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    off, floor, unit = measure(
        b + problem * b_stride, g + problem * m, g_next + problem * m, m, slope, sums, differences, far, SQUARE, BLOCK
    )
    tl.store(sizes + problem * 3, off)
    tl.store(sizes + problem * 3 + 1, floor)
    tl.store(sizes + problem * 3 + 2, unit)


@triton.jit(do_not_specialize=COUNTS)
def check_kernel(
    b, f, g, g_next, old_f, old_g, old_error, old_done, inexact, new_f, new_g, error, done, sizes, flags, batch, n, m, b_stride,
    slope: tl.float64, tol: tl.float64, sums: tl.float64, differences: tl.float64, far: tl.float64,
    NORM: tl.constexpr, LAST: tl.constexpr, PLAIN: tl.constexpr, INEXACT: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per problem. `sizes` (2 B, 3) holds what `measure` found where the norm is that of the whole batch, and behind it
    receives done, settled and the error in floors."""
    problem = tl.program_id(0).to(tl.int64)
    f += problem * n
    g += problem * m
    if NORM == 3:
        off = tl.full([], 0.0, tl.float64)
        floor = off
        unit = off
        for i in range(0, batch, BLOCK):
            each = i + tl.arange(0, BLOCK)
            off += tl.sum(tl.load(sizes + each * 3, mask=each < batch, other=0.0), 0)
            floor += tl.sum(tl.load(sizes + each * 3 + 1, mask=each < batch, other=0.0), 0)
            unit += tl.sum(tl.load(sizes + each * 3 + 2, mask=each < batch, other=0.0), 0)
    else:
        off, floor, unit = measure(b + problem * b_stride, g, g_next + problem * m, m, slope, sums, differences, far, NORM == 2, BLOCK)
    if NORM == 0:
        off /= unit
        floor /= unit
        unit /= unit
    if NORM >= 2:
        off = tl.sqrt(off)
        floor = tl.sqrt(floor)
        unit = tl.sqrt(unit)
    # Exponents rounded to more than a thousandth: no sum over them means anything, however small it comes out.
    now = tl.where((floor > 1e-3 * unit) & (off < floor), floor, off)
    worse = tl.full([], 0, tl.int32)
    if LAST:
        last = tl.load(old_error + problem)
        worse = (tl.load(old_done + problem) != 0).to(tl.int32)
        if not PLAIN:
            worse |= ((now < last) == 0).to(tl.int32)  # NaN is worse
        if INEXACT:
            worse |= (tl.load(inexact) != 0).to(tl.int32)
        now = tl.where(worse != 0, last, now)
    for i in range(0, n, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        x = tl.load(f + rows, mask=rows < n, other=0.0)
        if LAST:
            x = tl.where(worse != 0, tl.load(old_f + problem * n + rows, mask=rows < n, other=0.0), x)
        tl.store(new_f + problem * n + rows, x, mask=rows < n)
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        x = tl.load(g + cols, mask=cols < m, other=0.0)
        if LAST:
            x = tl.where(worse != 0, tl.load(old_g + problem * m + cols, mask=cols < m, other=0.0), x)
        tl.store(new_g + problem * m + cols, x, mask=cols < m)
    met = now <= tol
    settled = met | (now <= floor)
    tl.store(error + problem, now)
    tl.store(done + problem, met)
    if ALONE:
        tl.store(flags, met.to(tl.float64))
        tl.store(flags + 1, settled.to(tl.float64))
        tl.store(flags + 2, now / floor)
        tl.store(flags + 3, 0.0)
    else:
        found = sizes + (batch + problem) * 3  # other programs still read the sizes
        tl.store(found, met.to(tl.float64))
        tl.store(found + 1, settled.to(tl.float64))
        tl.store(found + 2, now / floor)


@triton.jit
def measure(b, g, g_next, m, slope, sums, differences, far, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    """How far the columns are off, what rounding alone makes, and the weights themselves: sums of numbers, or of their squares."""
    zero = tl.full([], 0.0, tl.float64)
    off = zero
    unit = zero
    largest = zero
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        w = tl.load(b + cols, mask=cols < m, other=0.0)
        here = tl.load(g + cols, mask=w > 0, other=0.0)
        gap = slope * (here - tl.load(g_next + cols, mask=w > 0, other=0.0))
        gap = tl.where(gap > far, far, gap)  # NaN stays
        excess = tl.where(w > 0, w * expm1(gap), 0.0)
        off += tl.sum(excess * excess if SQUARE else tl.abs(excess), 0)
        unit += tl.sum(w * w if SQUARE else w, 0)
        # What is not a number is seen in the error as well.
        largest = tl.maximum(largest, tl.max(tl.where(w > 0, tl.abs(here), 0.0), 0))
    part = sums + differences * largest
    return off, (part * part if SQUARE else part) * unit, unit


@triton.jit(do_not_specialize=COUNTS)
def flags_kernel(sizes, flags, batch, BLOCK: tl.constexpr):
    """All done, all settled, the largest error in floors (NaN if one is), 0."""
    sizes += batch * 3  # not a view: its address would be a multiple of 16 for every other batch only
    waiting = tl.full([], 0, tl.int32)
    moving = waiting
    broken = waiting
    worst = tl.full([], 0.0, tl.float64)
    for i in range(0, batch, BLOCK):
        each = i + tl.arange(0, BLOCK)
        waiting += tl.sum((tl.load(sizes + each * 3, mask=each < batch, other=1.0) == 0).to(tl.int32), 0)
        moving += tl.sum((tl.load(sizes + each * 3 + 1, mask=each < batch, other=1.0) == 0).to(tl.int32), 0)
        ratio = tl.load(sizes + each * 3 + 2, mask=each < batch, other=0.0)
        broken += tl.sum((ratio != ratio).to(tl.int32), 0)
        worst = tl.maximum(worst, tl.max(tl.where(ratio == ratio, ratio, 0.0), 0))
    tl.store(flags, (waiting == 0).to(tl.float64))
    tl.store(flags + 1, (moving == 0).to(tl.float64))
    tl.store(flags + 2, tl.where(broken > 0, float("nan"), worst))
    tl.store(flags + 3, 0.0)
