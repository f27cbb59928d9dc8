"""`python -m gpu_ot.info`: the versions and devices that a bug report needs, one a line."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__

#: What takes part in a solve, or is compared with; by the names under which they are installed.
PACKAGES = ("numpy", "numba", "triton", "pykeops", "pot", "geomloss", "lerobot", "safetensors", "matplotlib")


def describe() -> str:
    """Versions of this package, Python, torch and what it uses, and the devices, one a line. Imports none of the others."""
    lines = [
        ("gpu_ot", __version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
    ]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("threads", str(torch.get_num_threads())), ("CUDA", torch.version.cuda or "-"), ("ROCm", torch.version.hip or "-")]
    lines += [(f"device {k}", torch.cuda.get_device_name(k)) for k in range(torch.cuda.device_count())]
    return "\n".join(f"{name:<12}{found}" for name, found in lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(describe())
