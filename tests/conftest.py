"""Problems that tests share. Nothing here is imported by the package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import runpy
from pathlib import Path

import pytest
import torch

with contextlib.redirect_stdout(io.StringIO()):  # geomloss, which POT imports, greets on stdout through KeOps
    pytest.importorskip("ot")

# Small problems, and maybe other work on the machine: a second thread would mostly wait for its turn.
torch.set_num_threads(1)


def random_problem(n: int, m: int, d: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64):
    """(a, b, M): random weights of mass 1 and squared distances with largest entry 1."""
    gen = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, d, generator=gen, dtype=torch.float64), torch.rand(m, d, generator=gen, dtype=torch.float64) + 0.2
    a, b = torch.rand(n, generator=gen, dtype=torch.float64) + 0.1, torch.rand(m, generator=gen, dtype=torch.float64) + 0.1
    M = torch.cdist(x, y).square()
    return (a / a.sum()).to(dtype), (b / b.sum()).to(dtype), (M / M.max()).to(dtype)


@pytest.fixture
def problem():
    """The factory above, as a fixture: tests are imported by path and cannot import each other."""
    return random_problem


@pytest.fixture
def poisoned(monkeypatch):
    """An output that a kernel forgets to write cannot pass for a right one."""
    empty = torch.empty

    def full_of_poison(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -(10**9))

    monkeypatch.setattr(torch, "empty", full_of_poison)


@pytest.fixture(params=["numpy", "torch"])
def arrays(request, problem):
    """make(n, m, ...) -> (a, b, M) as numpy arrays or as tensors, b of mass `mass`."""

    def make(n, m, dtype=torch.float64, seed=0, mass=1.0):
        a, b, M = (z.to(dtype) for z in problem(n, m, seed=seed))
        z = a, mass * b, M
        return tuple(t.numpy() for t in z) if request.param == "numpy" else z

    return make


@pytest.fixture(scope="session")
def lerobot():
    """LeRobot, without a network, here and in the processes that a test starts."""
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("LeRobot is not installed here: make lerobot")
    site = Path(__file__).parent / "lerobot_site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        kept = runpy.run_path(str(site / "sitecustomize.py"))  # operators go when their library does
        yield
        kept.clear()
