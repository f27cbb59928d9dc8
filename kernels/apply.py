"""out_i = sum_j exp((k_i + h_j + <u_i, v_j>) / eps) w_j: the plan times a matrix, streamed over j."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launches import COUNTS, FUSED, on_device_of
from .tiles import RESIDENT, Cloud, cloud, products, row_tile
from .tuning import Tile


def apply(
    u: Tensor | Cloud, v: Tensor | Cloud, k: Tensor, h: Tensor, eps: float, w: Tensor | Cloud, *, precision: str = "fp32",
    rows_used: Tensor | None = None, columns_used: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """out (n, c) or (B, n, c), fp32: out_i = sum_j exp((k_i + h_j + <u_i, v_j>) / eps) w_j.

    u, v    as for softmin
    k, h    (n,), (m,) or (B, n), (B, m): -inf for an empty atom
    w       (m, c) or (B, m, c), or a Cloud stored with weights=True. The gradient of a transport value is w = v: given the same
            Cloud twice, a column tile is read once for both products (not when it is packed, d <= 10, nor in tf32).
    rows_used, columns_used  (B,) int32, both or neither: from row rows_used[b] of problem b on k is -inf, from column columns_used[b] on
            h is. What lies behind costs next to nothing
    tile    instead of the table's
    """
    u, v = (x if isinstance(x, Cloud) else cloud(x, precision) for x in (u, v))
    k, h = k.float().contiguous(), h.float().contiguous()
    batch, n, m = len(u.data), u.n, v.n
    flat = not isinstance(w, Cloud) and w.shape[-1] == 1  # a vector: no tensor product, and w stays in fp32
    if flat:
        w = w.float().contiguous()
    elif not isinstance(w, Cloud):
        w = cloud(w, precision, weights=True)
    assert flat or not w.packed, "a packed Cloud has no columns: pass the points, or cloud(points, weights=True)"
    c, width = (1, 1) if flat else (w.d, w.width)
    same = w is v and v.width <= 128
    widest = max(u.width, min(width, RESIDENT))  # more columns than that only mean more programs
    tile = tile or tuning.tile("vector" if flat else "apply", u.data, u.parts, widest, n)
    chunk = width if same else gcd(width, tile.block_c)
    splits, per_split = tuning.split(n, m, batch * triton.cdiv(width, chunk), tile, u.data)
    ragged = rows_used is not None and columns_used is not None
    assert ragged or (rows_used is None and columns_used is None)
    parts = torch.empty(batch, splits, n, c, dtype=torch.float32, device=h.device)
    with on_device_of(h):
        apply_kernel[(batch * splits * triton.cdiv(n, tile.block_n) * triton.cdiv(width, chunk),)](
            u.data, v.data, w if flat else w.data, u.unit, v.unit, u.unit if flat else w.unit,
            k, h, *((rows_used, columns_used) if ragged else (h, h)), parts,
            n, m, c, u.data.shape[1], v.data.shape[1], m if flat else w.data.shape[1], splits, per_split, eps,
            D=u.width, PARTS=u.parts, Q=u.packed, SPARE=u.spare, WIDTH=width, C=chunk,
            W_PARTS=0 if flat else w.parts, SAME=same, RAGGED=ragged,
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, STAGES=tile.stages, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    # Every part already carries its own exp(k), so a sum joins them.
    out = parts.sum(1) if splits > 1 else parts[:, 0]
    return out if h.dim() == 2 else out[0]


def exponents(k: Tensor, h: Tensor, alpha: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(k, h, factor, rows_used, columns_used) for `apply`, from k and alpha (B, n), h and beta (B, m) in float64: one launch.

    The exponent k_i - alpha_i + h_j - beta_j + <u_i, v_j>, of which k - alpha and h - beta may both be large and cancel. So neither is
    rounded with an offset it need not carry, the largest h. What rounding k still costs is the same for a whole row, and is given back
    by `factor` (B, n), float64; that of h is of the size of the kernel's own.
    """
    (batch, n), m = k.shape, h.shape[-1]
    near_k = torch.empty(batch, n, dtype=torch.float32, device=k.device)
    near_h = torch.empty(batch, m, dtype=torch.float32, device=k.device)
    factor = torch.empty(batch, n, dtype=torch.float64, device=k.device)
    rows_used, columns_used = (torch.empty(batch, dtype=torch.int32, device=k.device) for _ in range(2))
    block = min(1024, max(64, triton.next_power_of_2(max(n, m))))
    with on_device_of(k):
        exponents_kernel[(batch,)](
            k, h, alpha, beta, near_k, near_h, factor, rows_used, columns_used, n, m, float(eps),
            BLOCK=block, num_warps=max(1, block // 128), **FUSED,
        )  # fmt: skip
    return near_k, near_h, factor, rows_used, columns_used


@triton.jit(do_not_specialize=COUNTS)
def exponents_kernel(
    k, h, alpha, beta, near_k, near_h, factor, rows_used, columns_used, n, m, eps: tl.float64, BLOCK: tl.constexpr
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    nothing = -float("inf")
    top = tl.full([], nothing, tl.float64)
    used = tl.full([], 0, tl.int32)
    for j in range(0, m, BLOCK):
        at = j + tl.arange(0, BLOCK)
        z = tl.load(h + problem * m + at, mask=at < m, other=nothing) - tl.load(beta + problem * m + at, mask=at < m, other=0.0)
        top = tl.maximum(top, tl.max(z, 0))
        used = tl.maximum(used, tl.max(tl.where((at < m) & (z != nothing), at + 1, 0), 0))  # NaN is no empty atom
    top = tl.where(top > nothing, top, 0.0)  # only empty atoms
    tl.store(columns_used + problem, used)
    for j in range(0, m, BLOCK):
        at = j + tl.arange(0, BLOCK)
        z = tl.load(h + problem * m + at, mask=at < m, other=0.0) - tl.load(beta + problem * m + at, mask=at < m, other=0.0)
        tl.store(near_h + problem * m + at, (z - top).to(tl.float32), mask=at < m)
    used = tl.full([], 0, tl.int32)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        z = tl.load(k + problem * n + at, mask=at < n, other=nothing) - tl.load(alpha + problem * n + at, mask=at < n, other=0.0) + top
        near = z.to(tl.float32)
        lost = z - near.to(tl.float64)
        lost = tl.where(lost == lost, lost, 0.0)  # an empty atom: -inf - -inf
        tl.store(near_k + problem * n + at, near, mask=at < n)
        tl.store(factor + problem * n + at, tl.exp(lost / eps), mask=at < n)
        used = tl.maximum(used, tl.max(tl.where((at < n) & (z != nothing), at + 1, 0), 0))
    tl.store(rows_used + problem, used)


# The plan is scaled row by row to at most 2^LIFT: just inside the range of a half, so that its low half stays in range too.
LIFT = tl.constexpr(15.0)


@triton.jit(do_not_specialize=(*COUNTS, "c"))
def apply_kernel(
    u, v, w, unit_u, unit_v, unit_w, k, h, rows_used, columns_used, out, n, m, c, u_rows, v_rows, w_rows, splits, per_split, eps,
    D: tl.constexpr, PARTS: tl.constexpr, Q: tl.constexpr, SPARE: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    W_PARTS: tl.constexpr, SAME: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N rows and C columns of the result, and streams its share of the points once.

    Traffic n (d + c) + (n / BLOCK_N) m (d + c + 1) words; SAME spares the c. The plan exists one tile at a time, relative to
    the running maximum of its row and scaled to at most 2^15: there a pair of halves holds it as well as fp32 does (or one
    half as well as tf32 does), and the second product needs no exchange between threads, as it would in tf32.
    State per row: top, and C sums relative to it.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    pieces: tl.constexpr = (WIDTH + C - 1) // C
    program = tl.program_id(0)
    block = program % blocks
    first = program // blocks % pieces * C
    split = program // (blocks * pieces) % splits
    batch = (program // (blocks * pieces * splits)).to(tl.int64)
    scale = 1.4426950408889634 / eps
    unit = tl.load(unit_u + batch) * tl.load(unit_v + batch)
    row = u + (batch * u_rows + block * BLOCK_N) * (D * PARTS)
    start = split * per_split
    h += batch * m
    seek = start
    if RAGGED:
        # Nothing left to do is one tile without weight: a path around the loop costs registers, and spills.
        m = tl.load(columns_used + batch)
        seek = tl.where(start < m, start, 0)  # a tile that is there
        empty = (start >= m) | (block * BLOCK_N >= tl.load(rows_used + batch))
    stop = tl.minimum(start + per_split, m)
    if RAGGED:
        stop = tl.where(empty, start + 1, stop)
    col = v + (batch * v_rows + seek) * (D * PARTS)
    tl.assume(start < stop)  # without it ptxas sees a path around the loop and serialises the tensor instructions
    u_hi, u_lo = row_tile(row, tl.zeros([BLOCK_N], tl.float32), D, PARTS, Q, SPARE, BLOCK_N)
    if W_PARTS == 0:
        w += batch * w_rows
        acc = tl.zeros([BLOCK_N], tl.float32)
    else:
        w += (batch * w_rows + seek) * (WIDTH * W_PARTS) + first
        acc = tl.zeros([BLOCK_N, C], tl.float32)
    top = tl.full([BLOCK_N], -1e38, tl.float32)
    for j in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        cols = j + tl.arange(0, BLOCK_M)  # [M]
        weight = tl.load(h + cols, mask=cols < m, other=-float("inf"))  # [M]
        s, v_hi, v_lo = products(u_hi, u_lo, row, col, D, PARTS, BLOCK_N, BLOCK_M)
        col += BLOCK_M * D * PARTS
        t = s * unit + weight[None, :]  # [N, M]
        higher = tl.maximum(top, tl.max(t, 1) * scale - LIFT)
        fade = tl.exp2(top - higher)
        top = higher
        p = tl.exp2(t * scale - top[:, None])  # [N, M], at most 2^LIFT
        if W_PARTS == 0:
            acc = acc * fade + tl.sum(p * tl.load(w + cols, mask=cols < m, other=0.0)[None, :], 1)
        else:
            acc = acc * fade[:, None]
            if SAME:
                w_hi = tl.trans(v_hi)
                w_lo = tl.trans(v_lo)
            else:
                w_at = w + tl.arange(0, BLOCK_M)[:, None] * (WIDTH * W_PARTS) + tl.arange(0, C)[None, :]
                w_hi = tl.load(w_at)  # [M, C]
                w_lo = w_hi
                if W_PARTS == 2:
                    w_lo = tl.load(w_at + WIDTH)  # [M, C]
                w += BLOCK_M * WIDTH * W_PARTS
            if W_PARTS == 2:
                # Cut to the eleven bits of a half, not rounded: what remains is then exact, and one instruction less.
                coarse = (p.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
                acc = tl.dot((p - coarse).to(w_hi.dtype), w_hi, acc)
                p = coarse
                acc = tl.dot(p.to(w_hi.dtype), w_lo, acc)
            acc = tl.dot(p.to(w_hi.dtype), w_hi, acc)  # [N, C]
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    # k + top cancels; per row, doubles cost nothing and spare the plan the rounding of both.
    lift = tl.load(k + batch * n + rows, mask=rows < n, other=0.0).to(tl.float64) * scale + top
    # A row that met only h = -inf has an empty plan, whatever its k: not inf - inf.
    factor = tl.where(top > -1e37, tl.exp2(lift.to(tl.float32)), 0.0)
    at = (batch * splits + split) * n + rows
    if W_PARTS == 0:
        tl.store(out + at, factor * acc, mask=rows < n)
    else:
        factor *= tl.load(unit_w + batch)
        features = first + tl.arange(0, C)  # [C]
        tl.store(out + at[:, None] * c + features[None, :], acc * factor[:, None], mask=(rows < n)[:, None] & (features < c)[None, :])
