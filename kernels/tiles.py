"""Point clouds in the layout the tensor cores read, and the tile of products that every kernel is made of.

Precision is decided here, once per cloud, not once per pair. "fp32" stores a coordinate as halves, x = unit * (hi + lo):
11 bits each and the sign of `lo` hold 23 to 24 bits of x, as "tf32x3" does, and the three half-precision products
hi hi + hi lo + lo hi cost half of it on the tensor cores, half its shared memory, and none of its splitting inside the
loop. Few coordinates leave room for a third half, the last bit, and for every product that fp32 can see. `unit` is a power of
two that brings the largest coordinate near 2^15, so that `lo` stays in the range of a half: what is lost is at most 2^-39
of the largest coordinate. Centre clouds before storing them.

Both sides of a transpose see the same rounded points. So the lower precisions solve a slightly different problem, but
solve it exactly: their marginals still converge.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of

ROWS = 128  # clouds are padded with zero rows to a multiple of this, and no kernel masks a tile of points
PACKED = {2: 16, 5: 32, 10: 64}  # up to Q coordinates, six runs of Q fit this many features
RESIDENT = 256  # up to this many features the row tile stays on chip while the columns stream
CHUNK = tl.constexpr(64)  # beyond it, both sides are visited in pieces of this many features

_STORED = {"fp32": torch.float16, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cloud:
    """n points of d features per batch element, ready for the tensor cores: build one per cloud, use it in every sweep.

    data    (B, rows, parts * width): zero-padded points, in units of `unit`
    unit    (B,) fp32
    parts   2 for pairs [hi | lo], else 1
    packed  Q when a row is [last hi lo hi lo hi], Q features each, else 0
    spare   tf32 only: the last two features of a row are 1 and carry one more number per row through the dot product
    """

    data: Tensor
    unit: Tensor
    n: int
    d: int
    precision: str
    parts: int = 1
    packed: int = 0
    spare: bool = False

    @property
    def width(self) -> int:
        return self.data.shape[-1] // self.parts


def cloud(x: Tensor, precision: str = "fp32", *, weights: bool = False) -> Cloud:
    """The points x (n, d) or (B, n, d) rounded to `precision`: "fp32" (faithful), "tf32", "bf16" or "fp16".

    weights   lay x out to be summed over its points (the `w` of apply) rather than over its features.

    O(n d) work and memory, and no synchronisation with the device.
    """
    x = x if x.dim() == 3 else x[None]
    batch, n, d = x.shape
    if precision == "fp32":
        runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
        return (split if runs else split_by_torch)(x, weights)
    unit = x.new_ones(batch, dtype=torch.float32)
    if weights and precision == "tf32":
        # A half has the eleven bits of tf32, and tensor cores take it with either index running first.
        precision = "fp16"
    if _STORED[precision] is torch.float16:
        exponent = torch.frexp(x.abs().amax((1, 2)).float()).exponent
        unit = torch.ldexp(unit, exponent - 15)
        x = x / unit[:, None, None]
    if precision == "tf32":
        # Round to nearest here: the tensor cores truncate, and a truncated cloud is a shifted cloud.
        data = _padded([_tf32(x.float())], _width(d + 2 if d <= 16 else d))
        spare = d + 2 <= data.shape[-1] <= RESIDENT
        if spare:
            data[..., -2:] = 1
        return Cloud(data, unit, n, d, precision, spare=spare)
    return Cloud(_padded([x.to(_STORED[precision])], _width(d)), unit, n, d, precision)


def split_by_torch(x: Tensor, weights: bool) -> Cloud:
    """The points as halves, x = unit (hi + lo), and a third for what is left where there is room; the twin of `split`."""
    batch, n, d = x.shape
    exponent = torch.frexp(x.abs().amax((1, 2)).float()).exponent
    unit = torch.ldexp(x.new_ones(batch, dtype=torch.float32), exponent - 15)
    x = x / unit[:, None, None]
    hi = x.half()
    lo = (x - hi).half()
    if not (q := _run(d, weights)):
        return Cloud(_padded([hi, lo], _width(d)), unit, n, d, "fp32", parts=2)
    last = (x - hi - lo.to(x.dtype)).half()
    data = x.new_zeros(batch, _rows(n), PACKED[q], dtype=torch.float16)
    for k, part in enumerate((last, hi, lo, hi, lo, hi)):
        data[:, :n, k * q : k * q + d] = part
    return Cloud(data, unit, n, d, "fp32", packed=q)


def _run(d: int, weights: bool) -> int:
    """Features of one of six runs that a row is packed into, 0 for none."""
    return min(q for q in PACKED if q >= d) if d <= max(PACKED) and not weights else 0


def split(x: Tensor, weights: bool) -> Cloud:
    """`split_by_torch` by one launch for the largest coordinate, and one for everything else."""
    batch, n, d = x.shape
    q = _run(d, weights)
    width, parts = (PACKED[q], 1) if q else (_width(d), 2)
    top = torch.linalg.vector_norm(x, float("inf"), (1, 2))
    data = torch.empty(batch, _rows(n), parts * width, dtype=torch.float16, device=x.device)
    unit = torch.empty(batch, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        split_kernel[(_rows(n) // 32, triton.cdiv(parts * width, CHUNK.value), batch)](
            x, top, data, unit, n, d, *x.stride(), parts * width, width, Q=q, ROWS=32, COLUMNS=min(CHUNK.value, parts * width), **FUSED
        )
    return Cloud(data, unit, n, d, "fp32", parts, packed=q)


@triton.jit(do_not_specialize=COUNTS)
def split_kernel(
    x, top, data, unit, n, d, batch_stride, row_stride, stride, columns, width, Q: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """[hi | lo], or [last hi lo hi lo hi] of Q features each: x = unit (hi + lo + last), in units of a power of two."""
    problem = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [N, 1]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, K]
    # 2^15 above the largest coordinate, whose exponent is read from its bits; 0 has none.
    bits = tl.load(top + problem).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = tl.where(bits == 0, 0, ((bits >> 23) & 255) - 126)
    exponent = tl.minimum(tl.maximum(exponent - 15, -126), 127)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    if Q > 0:
        part = column // Q
        feature = column % Q
    else:
        part = column // width
        feature = column % width
    at = x + problem * batch_stride + rows.to(tl.int64) * row_stride + feature * stride
    z = tl.load(at, mask=(rows < n) & (feature < d) & (column < columns), other=0.0) / scale  # [N, K]
    hi = z.to(tl.float32).to(tl.float16)
    rest = z - hi.to(z.dtype)
    lo = rest.to(tl.float32).to(tl.float16)
    if Q > 0:
        last = (rest - lo.to(z.dtype)).to(tl.float32).to(tl.float16)
        out = tl.where(part > 5, 0.0, tl.where(part == 0, last, tl.where(part % 2 == 1, hi, lo)))
    else:
        out = tl.where(part == 0, hi, lo)
    tl.store(data + (problem * tl.num_programs(0) * ROWS + rows) * columns + column, out.to(tl.float16), mask=column < columns)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(unit + problem, scale)


def _tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _width(d: int) -> int:
    return max(16, triton.next_power_of_2(d)) if d <= RESIDENT else triton.cdiv(d, CHUNK.value) * CHUNK.value


def _rows(n: int) -> int:
    return triton.cdiv(n, ROWS) * ROWS


def _padded(parts: list[Tensor], width: int) -> Tensor:
    batch, n, d = parts[0].shape
    data = parts[0].new_zeros(batch, _rows(n), len(parts), width)
    for k, part in enumerate(parts):
        data[:, :n, k, :d] = part
    return data.flatten(2)


@triton.jit
def row_tile(row, lift, D: tl.constexpr, PARTS: tl.constexpr, Q: tl.constexpr, SPARE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The resident side of the product, hi and lo. `row` points at its first row; `lift` (N,) rides in the spare features."""
    if D > 256:
        hi = lift  # too wide to stay: `products` reads both sides
        lo = lift
    else:
        feature = tl.arange(0, D)[None, :]
        stored = feature
        if Q > 0:
            # A packed column is [last hi lo hi lo hi]: this row, [hi last lo lo hi hi], makes every product that counts, the
            # small ones first. One permuted read per row tile, so that one layout serves both sides of the transpose.
            run = feature // Q
            run = tl.where(run < 2, 1 - run, tl.where(run < 4, 2, tl.where(run < 6, 1, run)))
            stored = feature % Q + run * Q
        at = row + tl.arange(0, BLOCK_N)[:, None] * (D * PARTS) + stored
        hi = tl.load(at)  # [N, D]
        lo = hi
        if PARTS == 2:
            lo = tl.load(at + D)  # [N, D]
        if SPARE:
            # Two tf32 numbers hold 24 bits of `lift`: its mantissa cut at 11 bits, and the rest.
            coarse = (lift.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            hi = tl.where(feature == D - 2, coarse[:, None], hi)
            hi = tl.where(feature == D - 1, (lift - coarse)[:, None], hi)
    return hi, lo


@triton.jit
def products(u_hi, u_lo, row, col, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """<u_i, v_j> of one tile, in units of both clouds, small terms first; and the column tile, for whoever needs it again."""
    if D > 256:
        # Too wide to stay on chip: a plain blocked matrix product, both sides read again for every tile.
        feature = tl.arange(0, CHUNK)
        u_at = row + tl.arange(0, BLOCK_N)[:, None] * (D * PARTS) + feature[None, :]
        v_at = col + tl.arange(0, BLOCK_M)[None, :] * (D * PARTS) + feature[:, None]
        v_hi = u_hi
        v_lo = u_lo
        s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in range(0, D, CHUNK):
            near = tl.load(v_at + k)  # [K, M]
            here = tl.load(u_at + k)  # [N, K]
            if PARTS == 2:
                s = tl.dot(tl.load(u_at + (k + D)), near, s)
                s = tl.dot(here, tl.load(v_at + (k + D)), s)
            s = tl.dot(here, near, s, input_precision="tf32")
    else:
        v_at = col + tl.arange(0, BLOCK_M)[None, :] * (D * PARTS) + tl.arange(0, D)[:, None]
        v_hi = tl.load(v_at)  # [D, M]
        v_lo = v_hi
        if PARTS == 2:
            v_lo = tl.load(v_at + D)  # [D, M]
            s = tl.dot(u_lo, v_hi)
            s = tl.dot(u_hi, v_lo, s)
            s = tl.dot(u_hi, v_hi, s)
        else:
            s = tl.dot(u_hi, v_hi, input_precision="tf32")  # [N, M]
    return s, v_hi, v_lo
