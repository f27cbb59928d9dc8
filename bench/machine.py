"""The machine a benchmark runs on, and what the chip needs at least. Importing it settles the environment: before Triton, once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # of peers' kernels: the default flips in Triton 3.10 and changes numerics
if "--out" in sys.argv[:-1]:  # what one run compiled, the next need not
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(sys.argv[sys.argv.index("--out") + 1]) / "triton_cache"))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes three quarters of the memory
DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it decides once
START = time.monotonic()  # importing torch takes seconds

import torch  # noqa: E402

if DRY:  # a device that is not there, for as long as this process runs: the branches of a GPU, the numbers of the interpreter
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import pretend

    PRETENCE = pretend.device()
    PRETENCE.__enter__()
DEVICE = torch.device("cuda")
EPS = 0.1
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
#: (n = m, d) of the timings per iteration, the most telling first.
CASES = [(10_000, 64), (50_000, 64), (1_000, 64), (10_000, 3), (50_000, 3), (1_000, 3), (10_000, 512)]
if DRY:
    CASES = [(40, 3), (40, 16)]
PACKAGES = ("torch", "triton", "gpu_ot", "pot", "geomloss", "pykeops", "flash-sinkhorn", "ott-jax", "jax", "numpy")


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def empty_cache() -> None:
    if not DRY:
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def growth_mib(run: Callable[[], object]) -> float:
    """MiB of memory that `run` takes at its peak, above what this process uses before it."""

    def resident(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is in use now
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def number_from(script: str, *arguments: object) -> float:
    """The number that a script prints last, run in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Rows and where they were measured, as folder/name.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    return path


def environment() -> dict[str, Any]:
    def version(name: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
        return None

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    found: dict[str, Any] = {name: version(name) for name in PACKAGES}
    found |= {"commit": commit, "python": platform.python_version(), "dry": DRY, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found["cpu"] = next((line.split(":")[1].strip() for line in names.splitlines() if line.startswith("model name")), platform.machine())
    found["cores"] = os.cpu_count()
    if not DRY and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "processors": gpu.multi_processor_count,
            "clock_ghz": clock_hz(gpu) / 1e9,
            "memory_mib": gpu.total_memory // 2**20,
            "cuda": torch.version.cuda,
        }
    return found


def clock_hz(gpu: Any) -> float:
    return 1e3 * getattr(gpu, "clock_rate", 1.98e6)  # older torch does not tell: an H200's


#: Floating operations of a half-precision tensor instruction per clock and multiprocessor; tf32 runs at half of it.
HALF_FLOPS = {8: 2048, 9: 4096, 10: 8192}


def floor_ms(n: int, m: int, d: int, precision: str, sweeps: float = 1.0) -> float | None:
    """The longest of three: 16 exp2 a clock and multiprocessor, 5 fp32 instructions a pair of 128, and the products.

    "fp32" makes three half-precision products of a pair, and one of up to 64 packed features when d <= 10.
    """
    if DRY:
        return None
    gpu = torch.cuda.get_device_properties(0)
    per_clock = gpu.multi_processor_count * clock_hz(gpu)
    width = max(16, 1 << (d - 1).bit_length())
    halves = {"fp32": 2 * (16 if d <= 2 else 32 if d <= 5 else 64) if d <= 10 else 6 * width, "tf32": 4 * width}.get(precision, 2 * width)
    tensor = halves / HALF_FLOPS.get(gpu.major, 4096)
    return 1e3 * sweeps * n * m * max(1 / 16, 5 / 128, tensor) / per_clock
