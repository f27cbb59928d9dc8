"""Block shapes, from a table: nothing is tuned while a program runs, so nothing stalls and every run does the same.

A row is found by kernel, architecture, storage of the points, features and rows. The source of every row is bench/static.py:
of a handful of shapes that compile for that architecture without spills, one with few instructions per pair and, where it can be
had, two blocks per multiprocessor. These are static counts, not timings: no row has been measured on a GPU yet.

`gpu-ot tune` measures on request, and keeps what was faster in a file (see `cache_file`). Its rows come before the table's on a GPU
of the same name and architecture, with the same Triton, for sizes near those that were timed.
"""

import json
import os
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

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
_A1, _B1, _E1, _F1 = Tile(128, 128, 4, 1), Tile(64, 128, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)
_WIDE, _WIDE_W = Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, block_c=64)

# (kernel, storage) -> one tile per bucket: 16, 32, 64, 128, 256, wider.
_HOPPER = {
    ("softmin", "pair"): (_A, _A, _A, _B1, _E, _WIDE),
    ("softmin", "half"): (_A, _A, _A, _A, _B1, _WIDE),
    ("softmin", "tf32"): (_A, _A, _A, _B1, _E, _WIDE),
    # 32: three blocks fit with and without prefetching; without, they issue a tenth less and have each other to wait for.
    ("apply", "pair"): (_A, _B1, _B, _E, Tile(64, 32, 4, 1, 64), _WIDE_W),
    ("apply", "half"): (_A, _B, _B, _B, _B1, _WIDE_W),
    ("apply", "tf32"): (_B, _B, _B, _B1, _E, _WIDE_W),
    ("vector", "pair"): (_A, _A, _A, _B1, _E, _WIDE),
    ("vector", "half"): (_A, _A, _A, _A, _B1, _WIDE),
    ("vector", "tf32"): (_A, _A, _A, _B1, _E, _WIDE),
}
# Beyond 256 features tf32 spills with a prefetch, however short.
_BLACKWELL = _HOPPER | {("softmin", "tf32"): (_A, _A, _A, _B1, _E, _E1)}
# mma.sync keeps the row tile in registers, so tiles are smaller.
_AMPERE = {
    ("softmin", "pair"): (_A, _B, _B, _E1, _F1, _E),
    ("softmin", "half"): (_A, _A, _A1, _E1, _E1, _WIDE),
    ("softmin", "tf32"): (_A, _B1, _E, _E1, _E1, _WIDE),
    ("apply", "pair"): (_B, _E, _E, _F1, Tile(64, 16, 4, 1, 64), Tile(64, 32, 4, 1, 64)),
    ("apply", "half"): (_B, _B, _B, _E1, _E1, _WIDE_W),
    ("apply", "tf32"): (_B, _B, _B, _E1, _E, _WIDE_W),
    ("vector", "pair"): (_B, _B, _B, _E1, _F1, _E),
    ("vector", "half"): (_B, _B, _B, _E1, _E1, _WIDE),
    ("vector", "tf32"): (_B, _B, _E1, _E1, _E1, _WIDE),
}
# RTX 30, 40 and 50: the same instructions, and 99 KiB of shared memory in place of 163.
_RTX = _AMPERE | {
    ("softmin", "pair"): (_A, _B, _B, _E1, Tile(64, 16, 4, 1), _E),
    ("softmin", "half"): (_A, _A, _B, _E1, _E1, _WIDE),
    ("softmin", "tf32"): (_A, _B1, _E, _E1, _F1, _WIDE),
    ("apply", "pair"): (_B, _E, Tile(64, 32, 4, 2), _F1, Tile(64, 16, 4, 1, 64), Tile(64, 32, 4, 2, 64)),
    ("apply", "half"): (_B, _B, _E, _E1, _E1, _WIDE_W),
    ("apply", "tf32"): (_B, _B, _B, _E1, _F1, _WIDE_W),
    ("vector", "pair"): (_B, _B, _B, _E1, _F1, Tile(64, 32, 4, 2)),
    ("vector", "tf32"): (_B, _B, _E1, _E1, _F1, _WIDE),
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
    for arch, rows in (
        *(("sm_80", _AMPERE), ("sm_86", _RTX), ("sm_90", _HOPPER), ("sm_100", _BLACKWELL), ("sm_120", _RTX)),
        ("gfx942", _CDNA3),
    )
    for (kernel, storage), tiles in rows.items()
}
#: Bytes of shared memory that one block may use, with the rows of each architecture chosen for it.
SHARED = {name: size << 10 for name, size in dict(sm_80=163, sm_86=99, sm_90=227, sm_100=227, sm_120=99, gfx942=64).items()}


#: Softmins whose loop leaves no register to what follows it: a launch of its own damps their result. (architecture, storage, bucket,
#: rows of a block), counted by bench/static.py.
FULL = {(arch, *row) for arch in ("sm_80", "sm_86", "sm_120") for row in (("pair", 128, 64), ("half", 64, 128), ("half", 64, 64))}
FULL |= {
    ("sm_86", "pair", 16, 64),
    ("sm_86", "half", 32, 64),
    ("sm_86", "tf32", 16, 64),
    ("sm_100", "tf32", 0, 64),
    ("sm_120", "tf32", 16, 64),
}


def full(x: Tensor, parts: int, width: int, tile: Tile) -> bool:
    """Whether the softmin on points stored as x is one of those."""
    return (architecture(x), *_stored(x, parts, width), tile.block_n) in FULL


def _stored(x: Tensor, parts: int, width: int) -> tuple[str, int]:
    storage = "pair" if parts == 2 else "tf32" if x.dtype == torch.float32 else "half"
    return storage, next((b for b in BUCKETS if width <= b), 0)


def tile(kernel: str, x: Tensor, parts: int, width: int, n: int) -> Tile:
    """The row for `kernel` ("softmin", "apply", or "vector" for apply with one column) on points stored as x."""
    storage, bucket = _stored(x, parts, width)
    if x.is_cuda and (rows := timed().get(machine(x.device), {}).get((kernel, storage, bucket))):
        near = min(rows, key=lambda size: max(size / n, n / size))
        if max(near / n, n / near) <= NEAR:
            return rows[near]
    return row(kernel, architecture(x), storage, bucket, n <= THIN)


def row(kernel: str, arch: str, storage: str, bucket: int, thin: bool) -> Tile:
    found = TABLE[kernel, arch, storage][BUCKETS.index(bucket)]
    return replace(found, block_n=min(found.block_n, THIN)) if thin else found


#: What a program costs beside its tiles, and what joining splits costs, in tiles of one program; and the most splits that are joined.
#: Estimates from counts, not timed.
PROLOGUE, JOIN, MOST_SPLITS = 2, 3, 64


def split(n: int, m: int, batch: int, tile: Tile, x: Tensor) -> tuple[int, int]:
    """(splits, columns per split): so many that programs fill whole waves of two on each multiprocessor, which hide each other's waiting.

    157 programs on 132 multiprocessors leave two slots in five idle; five splits each fill three waves. A split of fewer than four tiles
    is mostly prologue.
    """
    tiles = triton.cdiv(m, tile.block_m)
    per_split = triton.cdiv(tiles, _splits(batch * triton.cdiv(n, tile.block_n), tiles, 2 * processors(x.device))) * tile.block_m
    return triton.cdiv(m, per_split), per_split


@lru_cache(maxsize=4096)
def _splits(programs: int, tiles: int, slots: int) -> int:
    def length(splits: int) -> int:
        return triton.cdiv(programs * splits, slots) * (triton.cdiv(tiles, splits) + PROLOGUE) + (JOIN if splits > 1 else 0)

    return min(range(1, max(2, min(tiles // 4, MOST_SPLITS) + 1)), key=length)


def architecture(x: Tensor) -> str:
    """The nearest architecture of the table; without a GPU (Triton's interpreter) any row will do."""
    return _architecture(x.device) if x.is_cuda else "sm_90"


@cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    (major, minor), room = torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    name = "sm_120" if major >= 12 else "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_86" if minor in (6, 9) else "sm_80"
    return name if SHARED[name] <= room else "sm_86"  # a chip nobody here has heard of: the rows that need least


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ------------------------------------------------------------------------------------------------ tiles that were timed

ENVIRONMENT = "GPU_OT_TUNING"  # names the file; empty: none is read
FORMAT = "gpu_ot tiles, 1"
NEAR = 4  # a timed row answers for sizes up to so many times smaller or larger
LARGEST_FILE = 2**20  # bytes
#: What a file may hold. Clouds are padded to multiples of ROWS = 128 (see tiles.py): a block must divide that.
LEGAL = dict(
    block_n=(16, 32, 64, 128), block_m=(16, 32, 64, 128), warps=(1, 2, 4, 8), stages=(1, 2, 3, 4, 5), block_c=(16, 32, 64, 128, 256)
)
Rows = dict[tuple[str, str, int], dict[int, Tile]]  # (kernel, storage, bucket) -> rows of the problem that was timed -> tile


def candidates(kernel: str, arch: str, storage: str, bucket: int, thin: bool) -> list[Tile]:
    """What `gpu-ot tune` tries: the table's row first, then every square-ish tile. Many will not fit; they are passed over."""
    found = [row(kernel, arch, storage, bucket, thin)]
    pieces = (64, 128) if kernel == "apply" and (bucket == 0 or bucket > 64) else (128,)
    for block_n, block_m, warps, stages, block_c in product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3), pieces):
        if not (thin and block_n > THIN):
            found.append(Tile(block_n, block_m, warps, stages, block_c))
    return list(dict.fromkeys(found))


def cache_file() -> Path | None:
    """$GPU_OT_TUNING, else gpu_ot/tuning.json in the user's cache folder by the XDG convention. None if the variable is empty."""
    named = os.environ.get(ENVIRONMENT)
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gpu_ot" / "tuning.json"


@cache
def machine(device: torch.device) -> str:
    """What a timing holds for: architecture, device, and the Triton that compiled the kernels."""
    x = torch.empty(0, device=device)
    return f"{architecture(x)} | {torch.cuda.get_device_name(device)} | triton {triton.__version__}"


@cache
def timed() -> dict[str, Rows]:
    """The rows of the file, by machine; read once. A file that is broken or foreign is ignored with a warning, never believed in part."""
    path = None
    try:
        path = cache_file()
        if path is None or not (path.exists() or os.environ.get(ENVIRONMENT)):
            return {}
        return {name: rows for name, (rows, _) in read(path).items()}
    except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: no home
        why = problem.strerror if isinstance(problem, OSError) else problem
        remedy = f"Delete it (rm {path}), or write it anew with gpu-ot tune" if path and path.exists() else "Write it with gpu-ot tune"
        warnings.warn(f"the file of timed tiles {path} is ignored: {why}. {remedy}; until then the table serves.", stacklevel=2)
        return {}


def read(path: Path) -> dict[str, tuple[Rows, list[dict]]]:
    """machine -> (its rows, the same as they stand in the file). ValueError says what is wrong with the file."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"it is not JSON ({problem})") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("machines"), dict):
        raise ValueError(f'it does not begin with "format": "{FORMAT}" and "machines"')
    found: dict[str, tuple[Rows, list[dict]]] = {}
    for name, rows in held["machines"].items():
        if not isinstance(rows, list):
            raise ValueError(f"the rows of {name} are no list")
        tiles: Rows = {}
        for entry in rows:
            key, n, tile = _checked(entry)
            tiles.setdefault(key, {})[n] = tile
        found[name] = tiles, rows
    return found


def _checked(entry: object) -> tuple[tuple[str, str, int], int, Tile]:
    """A row of the file, or ValueError: nothing reaches a launcher that the table could not hold."""
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r:.80} is no row")
    kernel, storage, bucket, n, shape = (entry.get(key) for key in ("kernel", "storage", "bucket", "n", "tile"))
    if (
        not (isinstance(kernel, str) and isinstance(storage, str) and (kernel, "sm_90", storage) in TABLE)
        or type(bucket) is not int
        or bucket not in BUCKETS
    ):
        raise ValueError(f"no kernel is known by kernel = {kernel!r:.40}, storage = {storage!r:.40}, bucket = {bucket!r:.40}")
    if type(n) is not int or n < 1:
        raise ValueError(f"n = {n!r:.40} is no number of rows")
    if not isinstance(shape, dict) or set(shape) != set(LEGAL):
        raise ValueError(f"{shape!r:.80} is no tile: one has {', '.join(LEGAL)}")
    for key, allowed in LEGAL.items():
        if type(shape[key]) is not int or shape[key] not in allowed:
            raise ValueError(f"{key} = {shape[key]!r:.40} is none of {allowed}")
    return (kernel, storage, bucket), n, Tile(**shape)


def write(path: Path, name: str, rows: list[dict]) -> None:
    """Adds `rows` of the machine `name` to the file, over older ones of the same problem; all of it or, if that fails, nothing.

    A row: kernel, storage, bucket, n, tile (a Tile), time_ms and table_ms. ValueError if the file there is not one of ours.
    """
    machines = {key: kept for key, (_, kept) in read(path).items()} if path.exists() else {}
    fresh = [entry | {"tile": asdict(entry["tile"])} for entry in rows]
    replaced = {_checked(entry)[:2] for entry in fresh}
    machines[name] = [entry for entry in machines.get(name, []) if _checked(entry)[:2] not in replaced] + fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"format": FORMAT, "machines": machines}, indent=1), encoding="utf-8")
    partial.replace(path)
    timed.cache_clear()
