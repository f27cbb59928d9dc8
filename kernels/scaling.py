"""Both products of an iteration on a stored kernel K, from one read of it: s = K w, and t = K^T (a u) with u made of s on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launches import COUNTS, FUSED, on_device_of

ROW_BYTES = 2**16  # whole rows lie in the registers of one program: 16384 columns in fp32, 8192 in fp64


def both(K: Tensor, w: Tensor, a: Tensor, power: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """s_i = sum_j K_ij w_j  (n,) or (B, n), and t_j = sum_i K_ij a_i u_i  (m,) or (B, m), in the type of K. Deterministic.

    K       (n, m) or (B, n, m), fp32 or fp64, with rows of up to ROW_BYTES
    w, a    (m,), (n,), or with B, in the type of K
    power   None for u_i = 1 / s_i; (p, c) for u_i = s_i^-p exp(c_i), with p (1,) and c (n,) or (B, n) in float64

    n m words are read, and written once for every 8 rows a program has at the least: its column sums, which torch then adds up.
    """
    n, m = K.shape[-2:]
    if not fits(K):
        raise ValueError(f"a row of K is {m} numbers of {K.dtype}, and a program holds fp32 or fp64 rows of up to {ROW_BYTES >> 10} KiB.")
    s, t = parts_of_both(K.contiguous(), w.contiguous(), a.contiguous(), n, power)
    return s.view(a.shape), (t.sum(1) if t.shape[1] > 1 else t).view(w.shape)


def parts_of_both(K: Tensor, w: Tensor, a: Tensor, a_stride: int, power: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """s (B, n), and t as parts (B, parts, m) that are to be summed. All is contiguous, and a is (B, n), or (n,) with a_stride 0."""
    batch, (n, m) = K.shape[:-2].numel(), K.shape[-2:]
    p, c = (a, a) if power is None else (power[0], power[1].contiguous())
    block_n, block_m, warps, ahead = shape(n, m, K.itemsize, 64 if torch.version.hip else 32)
    parts, per_part = split(n, batch, block_n, K.device)
    s = torch.empty(batch, n, dtype=K.dtype, device=K.device)
    t = torch.empty(batch, parts, m, dtype=K.dtype, device=K.device)
    with on_device_of(K):
        both_kernel[(batch * parts,)](
            K, w, a, p, c, s, t, n, m, parts, per_part, a_stride,
            POWER=power is not None, AHEAD=ahead, BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps, **FUSED,
        )  # fmt: skip
    return s, t


def fits(K: Tensor) -> bool:
    """Whether a row of K fits in the registers of one program."""
    return K.dtype in (torch.float32, torch.float64) and K.shape[-1] * K.itemsize <= ROW_BYTES


def shape(n: int, m: int, itemsize: int, lanes: int = 32) -> tuple[int, int, int, bool]:
    """(block_n, block_m, warps, whether the next rows are read while these are worked on), for warps of that many lanes.

    A tile of 16 KiB and the next one under way, in two programs per multiprocessor: 64 KiB in flight, twice what the bandwidth of an H200
    times its latency asks for. Longer rows come alone, and the registers have no room for the next. bench/static.py counts them;
    none of it has been timed.
    """
    block_m = max(128, triton.next_power_of_2(m))
    row = block_m * itemsize
    block_n = max(1, min((2**14 if row >= 2**12 else 2**13) // row, triton.next_power_of_2(n)))
    tile = block_n * row
    warps = tile // 2**11 if tile > 2**14 else min(8, max(1, tile // 2**10))  # 16 fp32 or 8 fp64 entries per thread, half for short rows
    return block_n, block_m, min(warps, 1024 // lanes), tile <= 2**14


def split(n: int, batch: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """(parts, rows per part): two programs per multiprocessor, but at least 8 rows for each, whose column sums are extra traffic."""
    parts = min(max(1, 2 * tuning.processors(device) // batch), max(1, n // 8))
    per_part = triton.cdiv(triton.cdiv(n, parts), block_n) * block_n
    return triton.cdiv(n, per_part), per_part


@triton.jit(do_not_specialize=tuple(name for name in COUNTS if name != "m"))
def both_kernel(
    K, w, a, p, c, s, t, n, m, parts, per_part, a_stride,
    POWER: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program walks down its share of the rows, whole ones: their sums are known while they are still in registers.

    Two multiply-adds per entry, and K is read once: the memory is the limit.
    """
    program = tl.program_id(0)
    part = program % parts
    problem = (program // parts).to(tl.int64)
    cols = tl.arange(0, BLOCK_M)  # [M]
    live = cols < m
    start = part * per_part
    stop = tl.minimum(start + per_part, n)
    K += (problem * n + start) * m  # it walks: no index to overflow
    at = tl.arange(0, BLOCK_N)[:, None] * m + cols[None, :]  # [N, M]
    s += problem * n
    a += problem * a_stride
    c += problem * n
    w += problem * m
    x = tl.load(w + cols, mask=live, other=0.0)  # [M]
    columns = tl.zeros([BLOCK_N, BLOCK_M], x.dtype)
    rows = start + tl.arange(0, BLOCK_N)  # [N]
    tile = tl.load(K + at, mask=(rows < stop)[:, None] & live[None, :], other=0.0)  # [N, M]
    for i in range(start, stop, BLOCK_N):
        rows = i + tl.arange(0, BLOCK_N)  # [N]
        if AHEAD:
            K += BLOCK_N * m
            following = tl.load(K + at, mask=(rows + BLOCK_N < stop)[:, None] & live[None, :], other=0.0)
        else:
            tile = tl.load(K + at, mask=(rows < stop)[:, None] & live[None, :], other=0.0)
            x = tl.load(w + cols, mask=live, other=0.0)  # again, from the cache: no room for it beside a long row
            K += BLOCK_N * m
        total = tl.sum(tile * x[None, :], 1)  # [N]
        weight = tl.load(a + rows, mask=rows < stop, other=0.0).to(x.dtype)  # [N]
        if POWER:
            weight *= powered(total, tl.load(p), tl.load(c + rows, mask=rows < stop, other=0.0))
        else:
            weight /= total
        columns += tile * tl.where(rows < stop, weight, 0.0)[:, None]
        tl.store(s + rows, total, mask=rows < stop)
        if AHEAD:
            tile = following
    tl.store(t + program.to(tl.int64) * m + cols, tl.sum(columns, 0), mask=live)


@triton.jit
def powered(total, p, c):
    """total^-p exp(c), the exponent in float64: it may be in the hundreds, where fp32 has five digits left behind the point."""
    if total.dtype == tl.float64:
        out = tl.exp(c - p * tl.log(total))
    else:
        # Only what lies below 1 is left to the functions of fp32; those of float64 take a hundred instructions. A sum below the normal
        # numbers comes out wrong, and nobody trusts it.
        bits = total.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
        z = c * tl.full([], 1.4426950408889634, tl.float64) - p * exponent.to(tl.float64)
        whole = tl.floor(z)
        out = tl.exp2((z - whole).to(tl.float32) - p.to(tl.float32) * tl.log2(mantissa)) * tl.exp2(whole.to(tl.float32))
    return out
