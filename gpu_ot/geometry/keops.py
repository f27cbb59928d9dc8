"""Costs between clouds as KeOps formulas: one compiled loop over all pairs, nothing n by m in memory.

The backend for costs that do not fold on a CUDA device, and for users' own formulas: any cost with a `formula`.
The first sweep of every new formula waits 10 to 30 s for a compiler; the result is kept on disk.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..costs import Axis, Cost
from ..errors import backend_refused
from ..problem import Problem, vector_dtype
from .chunked import Chunked
from .protocol import Geometry, needed, pull_folded

#: KeOps unrolls its loops over coordinates; vectors wider than this are multiplied in parts, or compiling takes minutes.
WIDEST = 64


def compiler() -> str | None:
    """The C++ compiler that KeOps would call, or None."""
    chosen = os.environ.get("CXX")
    return shutil.which(chosen) if chosen else shutil.which("g++") or shutil.which("clang++")


def refuse(problem: Problem) -> str | None:
    """Why KeOps cannot serve this problem, or None. Imports pykeops only when no other reason was found."""
    cost = problem.cost
    if cost.stored:
        return f"the cost is {cost.describe()}; a formula needs the points"
    if len(problem.shape) > 2:
        return "it takes one problem at a time, and this is a batch"
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed (pip install pykeops)"
    if compiler() is None:
        return "its formulas are compiled, and no C++ compiler was found (set CXX, or install g++)"
    if problem.a.device.type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, and the tensors are on {problem.a.device.type}"
    if why := broken():
        return why
    if cost.folds:
        return None
    try:
        keops = _pykeops()
        found = cost.formula(Axis(keops.LazyTensor, 0), Axis(keops.LazyTensor, 1))
        if not isinstance(found, keops.LazyTensor):
            raise TypeError(f"its formula is {type(found).__name__}")
    except Exception as why:  # the user's own function met a lazy tensor: anything may happen
        return f"the cost cannot be written with lazy tensors: {why or type(why).__name__}"
    return None


@functools.cache
def broken() -> str | None:
    """Why pykeops cannot be imported, or None."""
    try:
        _pykeops()
    except Exception as why:  # it reads, compiles and loads files while it is imported: anything may happen
        return unreadable(why)
    return None


def unreadable(why: BaseException) -> str:
    """What is wrong with the files that KeOps keeps, and the way out. A run that is killed may leave them half-written."""
    kept = os.environ.get("KEOPS_CACHE_FOLDER") or os.path.expanduser(f"~/.cache/keops{importlib.metadata.version('keopscore')}")
    empty = [str(path) for path in Path(kept).rglob("*") if path.suffix in (".so", ".pkl", ".dylib") and not path.stat().st_size]
    named = getattr(why, "path", None) or next(iter(re.findall(r"(/[^:\s]+\.(?:so|pkl|dylib))", str(why))), None)
    files = [str(named)] if named else empty
    way = f"delete {' and '.join(files)}" if files else f"delete the folder {kept}"
    return (
        f"KeOps cannot read what it has kept on disk, which a run that was killed may have left half-written: {way} and start again ({why})"
    )


def _mended(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, and a BackendError that names the file where KeOps cannot load a library that it has kept."""

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except (ImportError, EOFError, OSError) as why:
            raise backend_refused("keops", unreadable(why)) from why

    return call


class Keops(Geometry):
    """A Cost between two clouds, without batch axes, as a lazy formula. O((n + m) d) memory, n m exponentials a sweep.

    Potentials come and go in float64. Sweeps run in float64 on a CPU, where KeOps takes the same time for both types (measured,
    n = 10k, d = 3, 2 cores: 0.52 s and 0.55 s), and in the cost's own type on a GPU. A cost that is written for
    KeOps, a user's own LazyTensor say, keeps its type on both.
    """

    def __init__(self, cost: Cost, transposed: bool = False) -> None:
        self.cost, self.transposed = cost, transposed
        self.folded = cost.fold()
        self.inputs = tuple(cost.inputs.values() if self.folded is None else self.folded)
        z = self.inputs[0]
        self.dtype = vector_dtype(z.device) if z.device.type == "cpu" and cost.backend != "keops" else z.dtype
        lazy_tensor = _pykeops().LazyTensor
        self._i, self._j = Axis(lazy_tensor, 0), Axis(lazy_tensor, 1)

    @property
    def T(self) -> Keops:
        return Keops(self.cost, not self.transposed)

    @_mended
    def softmin(self, h: Tensor, eps: float) -> Tensor:
        h, offset = self._centred(h, eps)
        with torch.no_grad():
            return self._softmin(h, offset, eps, self._held())

    @_mended
    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        h, offset = self._centred(h, eps)
        with torch.no_grad():
            exponent, outside = self._exponent(h, eps, self._held())
            k = _finite(k / eps + outside.to(k.dtype) + offset, self.dtype)
            weights = (exponent + self._i(k.unsqueeze(-1))).exp()
            parts = [(weights * self._j(part)).sum(1) for part in v.to(self.dtype).split(WIDEST, -1)]
        return torch.cat(parts, -1).to(v.dtype)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        geometry = Chunked(self.cost)
        return (geometry.T if self.transposed else geometry).plan(k, h, eps)

    @_mended
    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        if self.folded is not None:
            # Plan products: one formula to compile, where autograd would take one a gradient.
            def products(right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
                rows = None if right is None else self.apply(k, h, eps, right.mT).mT
                return rows, None if left is None else self.T.apply(h, k, eps, left.mT).mT

            return self._seen(pull_folded(self._seen(self.inputs), w, products))
        # KeOps' own derivative of the softmin s, since exp((k + h - C) / eps) = exp((k - s) / eps) ds / dC.
        h, offset = self._centred(h, eps)
        held = self._held()
        # Every leaf is one more formula to compile: none for inputs that require no gradient, parameters above all.
        leaves = [z.requires_grad_() for z, wanted in zip(held, needed(self.inputs), strict=True) if wanted]
        with torch.enable_grad():
            s = self._softmin(h, offset, eps, held)
            settled = s.detach()
            scale = torch.where(settled.isfinite(), w * ((k - settled) / eps).exp(), 0.0)
            found = iter(torch.autograd.grad(s, leaves, scale, allow_unused=True))
        grads = [next(found) if z.requires_grad else None for z in held]
        return tuple(torch.zeros_like(z) if grad is None else grad.to(z.dtype) for grad, z in zip(grads, self.inputs, strict=True))

    def _softmin(self, h: Tensor, offset: Tensor, eps: float, inputs: tuple[Tensor, ...]) -> Tensor:
        exponent, outside = self._exponent(h, eps, inputs)
        logs = exponent.logsumexp(1).squeeze(-1)
        # A row that meets nothing but empty atoms: any honest exponent is far above this, see _finite.
        logs = torch.where(logs > _nothing(self.dtype) / 2, logs, -torch.inf)
        return -eps * ((logs + outside).to(offset.dtype) + offset)

    def _exponent(self, h: Tensor, eps: float, inputs: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
        """The lazy (h_j - C_ij) / eps for h in units of eps, and what of it depends on the row alone (0 or -alpha / eps)."""
        if self.folded is None:
            sides = (self._j, self._i) if self.transposed else (self._i, self._j)
            C = self.cost.of(inputs).formula(*sides)
            return self._j(h.unsqueeze(-1)) - C * (1 / eps), h.new_zeros(())
        alpha, beta, u, v = self._seen(inputs)
        return (self._i(u / eps) | self._j(v)) + self._j((h - beta / eps).unsqueeze(-1)), -alpha / eps

    def _seen(self, folded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Alpha, beta, u and v from this side; from the other side this turns them back."""
        alpha, beta, u, v = folded
        return (beta, alpha, v, u) if self.transposed else (alpha, beta, u, v)

    def _held(self) -> tuple[Tensor, ...]:
        return tuple(z.detach().to(self.dtype) for z in self.inputs)

    def _centred(self, h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """h / eps without its largest entry, in the type of the sweep, and that entry: what is shared need not be rounded."""
        h = h / eps
        offset = h.amax()
        offset = torch.where(offset > -torch.inf, offset, 0.0)
        return _finite(h - offset, self.dtype), offset


def _nothing(dtype: torch.dtype) -> float:
    """The exponent of an empty atom."""
    return -1e30 if dtype == torch.float32 else -1e290


def _finite(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """KeOps' running maximum forms -inf - -inf = NaN when a row begins with an empty atom, so that -inf becomes -1e30.

    No sum can tell: exponents of atoms with weight are (h_j - C_ij) / eps > -1e29 for any cost below 1e29 eps, so once a row has
    met one, all that an empty atom has left or adds is exp(-1e30 + 1e29) = 0 in either type. 1e30 itself swallows the cost
    it is added to without overflowing, even twice over in k_i + h_j.
    """
    return exponent.clamp(min=_nothing(dtype)).to(dtype)


def _pykeops() -> ModuleType:
    """pykeops.torch, imported when first needed, and without the lines it prints about what it found."""
    with contextlib.redirect_stdout(io.StringIO()):
        import pykeops.torch
    return pykeops.torch
