"""Block shapes, from a table: nothing is tuned while a program runs, so nothing stalls and every run does the same.

A row is found by kernel, architecture, storage of the points, features and rows. The source of every row is bench/static.py:
of a handful of shapes that compile for that architecture without spills, one with few instructions per pair and, where it can be
had, two blocks per multiprocessor. These are static counts, not timings: no row has been measured on a GPU yet.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

BUCKETS = (16, 32, 64, 128, 256, 0)  # stored features, the wider of both products; 0 is beyond 256
THIN = 64  # rows of a problem that would leave half of a block of 128 idle


@dataclass(frozen=True)
class Tile:
    """One program's share: block_n rows, block_m columns at a time, and for apply at most block_c columns of the result."""

    block_n: int
    block_m: int
    warps: int
    stages: int
    block_c: int = 128


# Square tiles keep the instructions per pair down: a thread that owns more rows reads each column's h fewer times. Beyond 64
# features the tensor cores are the limit, and two blocks per multiprocessor matter more: one multiplies while the other
# exponentiates. One stage (no prefetch) is the price where two would leave a single block.
_A, _B, _E = Tile(128, 128, 4, 2), Tile(64, 128, 4, 2), Tile(64, 64, 4, 2)
_B1, _E1, _F1 = Tile(64, 128, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)
_WIDE, _WIDE_W = Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, block_c=64)

# (kernel, storage) -> one tile per bucket: 16, 32, 64, 128, 256, wider.
_HOPPER = {
    ("softmin", "pair"): (_A, _A, _A, _B1, _E, _WIDE),
    ("softmin", "half"): (_A, _A, _A, _A, _B1, _WIDE),
    ("softmin", "tf32"): (_A, _A, _A, _B1, _E, _WIDE),
    ("apply", "pair"): (_A, _B, _B, _E, Tile(64, 32, 4, 1, 64), _WIDE_W),
    ("apply", "half"): (_A, _B, _B, _B, _B1, _WIDE_W),
    ("apply", "tf32"): (_B, _B, _B, _B1, _E, _WIDE_W),
    ("vector", "pair"): (_A, _A, _A, _B1, _E, _WIDE),
    ("vector", "half"): (_A, _A, _A, _A, _B1, _WIDE),
    ("vector", "tf32"): (_A, _A, _A, _B1, _E, _WIDE),
}
# mma.sync keeps the row tile in registers, so tiles are smaller.
_AMPERE = {
    ("softmin", "pair"): (_A, _B, _B, _E1, _F1, _WIDE),
    ("softmin", "half"): (_A, _A, _A, _E1, _E1, _WIDE),
    ("softmin", "tf32"): (_A, _B1, _E1, _E1, _E1, _WIDE),
    ("apply", "pair"): (_B, _E, _E, _F1, Tile(64, 16, 4, 1, 64), Tile(64, 32, 4, 1, 64)),
    ("apply", "half"): (_B, _B, _B, _E1, _E1, _WIDE_W),
    ("apply", "tf32"): (_B, _B, _B, _E1, _E, _WIDE_W),
    ("vector", "pair"): (_B, _B, _B, _E1, _F1, _WIDE),
    ("vector", "half"): (_B, _B, _B, _E1, _E1, _WIDE),
    ("vector", "tf32"): (_B, _B, _E1, _E1, _E1, _WIDE),
}
# 64 KiB of shared memory, 512 registers.
_CDNA3 = {
    ("softmin", "pair"): (_B, _B, _B, _B1, _E1, _E1),
    ("softmin", "half"): (_B, _B, _B, _B, _B1, _E1),
    ("softmin", "tf32"): (_B, _B, _B, _B1, _E1, _E1),
    ("apply", "pair"): (_B, _E, _E, _E1, _F1, Tile(64, 32, 4, 1, 64)),
    ("apply", "half"): (_B, _B, _B, _E1, _E1, Tile(64, 32, 4, 1, 64)),
    ("apply", "tf32"): (_B, _B, _B, _E1, _F1, Tile(64, 32, 4, 1, 64)),
    ("vector", "pair"): (_B, _B, _B, _B1, _E1, _E1),
    ("vector", "half"): (_B, _B, _B, _B, _B1, _E1),
    ("vector", "tf32"): (_B, _B, _B, _B1, _E1, _E1),
}
TABLE: dict[tuple[str, str, str], tuple[Tile, ...]] = {
    (kernel, arch, storage): tiles
    for arch, rows in (("sm_80", _AMPERE), ("sm_90", _HOPPER), ("sm_100", _HOPPER), ("gfx942", _CDNA3))
    for (kernel, storage), tiles in rows.items()
}


def tile(kernel: str, x: Tensor, parts: int, width: int, n: int) -> Tile:
    """The row for `kernel` ("softmin", "apply", or "vector" for apply with one column) on points stored as x."""
    storage = "pair" if parts == 2 else "tf32" if x.dtype == torch.float32 else "half"
    return row(kernel, architecture(x), storage, next((b for b in BUCKETS if width <= b), 0), n <= THIN)


def row(kernel: str, arch: str, storage: str, bucket: int, thin: bool) -> Tile:
    found = TABLE[kernel, arch, storage][BUCKETS.index(bucket)]
    return replace(found, block_n=min(found.block_n, THIN)) if thin else found


def split(n: int, m: int, batch: int, tile: Tile, x: Tensor) -> tuple[int, int]:
    """(splits, columns per split): more than one when the rows alone would leave multiprocessors idle.

    Two programs per multiprocessor hide each other's waiting; a split of fewer than four tiles is mostly prologue.
    """
    tiles = triton.cdiv(m, tile.block_m)
    programs = batch * triton.cdiv(n, tile.block_n)
    wanted = min(2 * processors(x.device) // programs, tiles // 4)
    per_split = triton.cdiv(tiles, max(wanted, 1)) * tile.block_m
    return triton.cdiv(m, per_split), per_split


def architecture(x: Tensor) -> str:
    """The nearest architecture of the table; without a GPU (Triton's interpreter) any row will do."""
    if not x.is_cuda:
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(x.device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
