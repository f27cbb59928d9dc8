"""Replaces POT's functions by this package's, for code that calls POT and should not be changed."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from . import arrays, batch, bregman, gromov, lowrank, partial, solvers, unbalanced
from .refusals import Elsewhere

#: POT's module -> ours and the names replaced. `ot.dist` stays: it is no solver, and the rest of POT depends on it.
REPLACED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ot.bregman": (bregman, tuple(bregman.__all__)),
    "ot.unbalanced": (unbalanced, tuple(unbalanced.__all__)),
    "ot.gromov": (gromov, tuple(gromov.__all__)),
    "ot.partial": (partial, tuple(partial.__all__)),
    "ot.lowrank": (lowrank, tuple(lowrank.__all__)),
    "ot.solvers": (solvers, ("solve", "solve_sample")),
    "ot.batch": (batch, ("solve_batch", "solve_sample_batch", "bregman_log_projection_batch", "bregman_projection_batch")),
}

_lock = threading.RLock()
_active: list[patch] = []  # in the order of entering; the last decides the device
_replacements: dict[Callable[..., Any], Callable[..., Any]] = {}  # POT's function -> ours; made once, kept between patches
_losses: dict[Callable[..., Any], Callable[..., Any]] = {}  # the same of geomloss


class patch:
    """`with gpu_ot.patch(): ...`, or `gpu_ot.patch()` until its `undo()`: POT's entropic solvers are this package's.

    Every variable of a module that holds one of POT's functions holds ours instead: in POT (`ot.da`, `ot.gromov`, ...) and in clients
    (`from ot import sinkhorn`). This includes modules imported while the patch is active. Other references (in containers, partials,
    default arguments) stay POT's. A call that POT can answer and this package cannot, such as `ot.solve` without `reg`, runs on POT's
    function.

    device    where numpy arrays and lists are solved, "cuda" for instance: they are copied there, and results back. None is the CPU.
              Tensors stay where they are.
    geomloss  True: `geomloss.SamplesLoss`, too, is this package's. Its kernel norms ("gaussian", "laplacian", "energy", "hausdorff")
              stay geomloss's.

    Patches may be nested: the innermost device counts. They may be entered from several threads: all of them see the patch until the
    last one has left. Raises ImportError when POT, or geomloss where it is asked for, is not installed.
    """

    def __init__(self, device: str | torch.device | None = None, geomloss: bool = False) -> None:
        self.device, self.geomloss = None if device is None else torch.device(device), geomloss
        if self.device is not None:
            torch.empty(0, device=self.device)  # a missing device fails here, not in a client's call
        self._entered = 0
        self._apply()
        self._applied = True  # so the first `with` need not apply it again

    def __enter__(self) -> patch:
        with _lock:
            if not self._applied:
                self._apply()
            self._applied = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave(1)

    def undo(self) -> None:
        """POT as it was, unless another patch is active."""
        self._leave(self._entered)

    def _apply(self) -> None:
        with _lock:
            _active.append(self)
            self._entered += 1
            _settle()

    def _leave(self, times: int) -> None:
        with _lock:
            for _ in range(min(times, self._entered)):
                innermost = _active[::-1].index(self)
                del _active[-1 - innermost]
                self._entered -= 1
            _settle()


def _settle() -> None:
    """Puts ours or POT's functions into all modules, as `_active` says. Called with the lock held."""
    arrays.numpy_device = _active[-1].device if _active else None
    for wanted, collect, replacements in (
        (bool(_active), _collect, _replacements), (any(each.geomloss for each in _active), _collect_losses, _losses),
    ):  # fmt: skip
        if wanted:
            collect()
            _exchange(replacements)
        elif replacements:
            _exchange({ours: theirs for theirs, ours in replacements.items()})


def _collect() -> None:
    for home, (source, names) in REPLACED.items():
        module = importlib.import_module(home)
        for name in names:
            theirs = getattr(module, name, None)  # older versions of POT lack some
            if theirs is not None and theirs not in _replacements and theirs not in _replacements.values():
                _replacements[theirs] = _with_fallback(getattr(source, name), theirs)


def _collect_losses() -> None:
    theirs, ours = importlib.import_module("geomloss").SamplesLoss, sys.modules["gpu_ot"].SamplesLoss
    if theirs in _losses or theirs in _losses.values():
        return

    class SamplesLoss(ours):
        __doc__ = ours.__doc__

        def __new__(cls, loss: str = "sinkhorn", *args: Any, **kwargs: Any) -> Any:
            return theirs(loss, *args, **kwargs) if loss in ours.KERNEL_NORMS else super().__new__(cls)

    _losses[theirs] = SamplesLoss


def _with_fallback(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return ours(*args, **kwargs)
        except Elsewhere:
            return theirs(*args, **kwargs)

    return call


def _exchange(by: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    found = {id(old): new for old, new in by.items()}
    homes = {each.__module__ for each in by if isinstance(each, type)}  # a class finds itself by its name there
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict) or namespace is globals() or name in homes:
            continue
        for name, value in list(namespace.items()):
            if id(value) in found:
                namespace[name] = found[id(value)]
