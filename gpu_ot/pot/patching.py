"""Puts this package's functions into POT, for code that calls POT and cannot or should not be changed."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from . import arrays, batch, bregman, solvers, unbalanced
from .refusals import Elsewhere

#: POT's module -> ours and the names replaced. `ot.dist` is left alone: it is no solver, and the rest of POT lives on it.
REPLACED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ot.bregman": (bregman, tuple(bregman.__all__)),
    "ot.unbalanced": (unbalanced, tuple(unbalanced.__all__)),
    "ot.solvers": (solvers, ("solve", "solve_sample")),
    "ot.batch": (batch, ("solve_batch", "solve_sample_batch", "bregman_log_projection_batch", "bregman_projection_batch")),
}

_lock = threading.RLock()
_active: list[patch] = []  # in the order of entering; the last decides the device
_replacements: dict[Callable[..., Any], Callable[..., Any]] = {}  # POT's function -> ours; made once, kept between patches


class patch:
    """`with gpu_ot.patch(): ...`, or `gpu_ot.patch()` until its `undo()`: POT's entropic solvers are this package's.

    Every module that holds one of POT's functions, under whatever name, holds ours instead: POT's own (`ot.da`, `ot.gromov`, ...) and
    clients' (`from ot import sinkhorn`); what is imported meanwhile gets ours, too, and undoing finds it. References elsewhere (in
    containers, partials, default arguments) stay POT's. A call that POT answers and this package does not, such as `ot.solve` without
    `reg`, runs on POT's function.

    device   where numpy arrays and lists are solved, "cuda" for instance: they go there and results come back. Tensors stay where
             they are. None solves them on the CPU.

    May be nested, the innermost device counts, and entered from several threads: all of them see the patch until the last has left.
    Raises ImportError when POT is not installed.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        if self.device is not None:
            torch.empty(0, device=self.device)  # a device that does not exist fails here, not in a client's call
        self._entered = 0
        self._apply()
        self._fresh = True  # `with patch():` enters what the call has already applied

    def __enter__(self) -> patch:
        with _lock:
            if self._fresh:
                self._fresh = False
            else:
                self._apply()
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
                _active.reverse()  # the innermost of this patch's entries
                _active.remove(self)
                _active.reverse()
                self._entered -= 1
            _settle()


def _settle() -> None:
    """Makes the modules agree with `_active`. Called with the lock held."""
    arrays.numpy_device = _active[-1].device if _active else None
    if _active:
        _collect()
        _exchange(_replacements)
    else:
        _exchange({ours: theirs for theirs, ours in _replacements.items()})


def _collect() -> None:
    for home, (source, names) in REPLACED.items():
        module = importlib.import_module(home)
        for name in names:
            theirs = getattr(module, name, None)  # older versions of POT lack some
            if theirs is not None and theirs not in _replacements and theirs not in _replacements.values():
                _replacements[theirs] = _standing_in(getattr(source, name), theirs)


def _standing_in(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return ours(*args, **kwargs)
        except Elsewhere:
            return theirs(*args, **kwargs)

    return call


def _exchange(by: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    found = {id(old): new for old, new in by.items()}
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict) or namespace is globals():
            continue
        for name, value in list(namespace.items()):
            if id(value) in found:
                namespace[name] = found[id(value)]
