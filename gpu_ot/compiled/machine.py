"""How the functions of this room become machine code: by numba, kept on disk, and none of it before somebody needs it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba  # pyright: ignore[reportMissingImports]
from llvmlite import ir  # pyright: ignore[reportMissingImports]
from numba.core import config  # pyright: ignore[reportMissingImports]
from numba.core.compiler import Compiler  # pyright: ignore[reportMissingImports]
from numba.extending import intrinsic  # pyright: ignore[reportMissingImports]

#: Machine code of files that have changed since is removed after so many days.
KEPT_DAYS = 7
#: Sums may be taken in any order, as every vector unit and every BLAS does. NaN and inf keep their meaning.
ANY_ORDER = {"reassoc", "contract", "nsz"}


class _Apart(Compiler):
    """Tells LLVM that no two arrays of the arguments overlap."""

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any) -> None:
        flags = flags.copy()
        flags.noalias = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


def _made(function: Callable[..., Any], *, counted: bool = True, **options: Any) -> Any:
    """counted: whether it is counted who holds which array, which whoever makes or returns one needs."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=counted, **options)(function)  # pyright: ignore[reportCallIssue]


def compiled(function: Callable[..., Any]) -> Any:
    """Machine code at the first call, which lets other threads run. Sums in any order."""
    with _cache_directory() as cache:
        return _made(function, cache=cache, fastmath=ANY_ORDER)


def borrowing(function: Callable[..., Any]) -> Any:
    """The same for what makes no array, returns none and is called from this room alone: nobody counts who holds each view of a row, which
    would be four fifths of an iteration between 16 points."""
    return _made(function, fastmath=ANY_ORDER, counted=False)


def apart(function: Callable[..., Any]) -> Any:
    """As `borrowing`, for arguments of which none that is written to overlaps another. Otherwise every loop begins by asking whether they
    do, which is half of an iteration between 16 points."""
    return _made(function, fastmath=ANY_ORDER, counted=False, pipeline_class=_Apart)


def inlined(function: Callable[..., Any]) -> Any:
    """As `borrowing`, and a part of whoever calls it: a call hands over each number of each array, a hundred and more."""
    return _made(function, fastmath=ANY_ORDER, counted=False, forceinline=True)


def extreme(function: Callable[..., Any]) -> Any:
    """As `apart`, for a largest or smallest number by `greater` or `lesser`, which come in vectors only where the compiler may take it that
    there is no NaN."""
    return _made(function, fastmath=ANY_ORDER | {"nnan"}, counted=False, pipeline_class=_Apart)


def in_order(function: Callable[..., Any]) -> Any:
    """The same for arithmetic whose order matters."""
    return _made(function, fastmath={"contract"}, counted=False)


def _intrinsic(name: str) -> Any:
    """One of LLVM's functions of two numbers of a type."""

    @intrinsic
    def call(typing_context: Any, x: Any, y: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = arguments[0].type
            return builder.call(builder.module.declare_intrinsic(name, [kind], ir.FunctionType(kind, [kind, kind])), arguments)

        return x(x, x), code

    return call


#: The larger and the smaller of two numbers of one type, and that one of them which is not NaN. Loops over a comparison stay loops over
#: single numbers, which take 13 times as long.
greater, lesser = _intrinsic("llvm.maxnum"), _intrinsic("llvm.minnum")


@contextlib.contextmanager
def _cache_directory() -> Iterator[bool]:
    """Whether there is a place to keep machine code.

    numba keeps a function as long as its own file stays the same, not the functions that it calls. So the place has a name that changes
    with any file of this room.
    """
    kept, place = config.CACHE_DIR, PLACE  # pyright: ignore[reportAttributeAccessIssue]
    if place is None:
        yield False
        return
    config.CACHE_DIR = str(place)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield True
    finally:
        config.CACHE_DIR = kept  # pyright: ignore[reportAttributeAccessIssue]


def _place() -> Path | None:
    """Beside this file, or where the user's caches are; None where nothing can be written."""
    room = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted(room.glob("*.py")):
        digest.update(source.read_bytes())
    name = digest.hexdigest()[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for parent in (room / "__pycache__", caches / "gpu_ot"):
        with contextlib.suppress(OSError):
            (parent / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=parent / name):
                pass
            (parent / name).touch()
            for old in parent.iterdir():
                # Not that of another process, which may be running still.
                if len(old.name) == len(name) and old.is_dir() and old.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                    shutil.rmtree(old, ignore_errors=True)
            return parent / name
    return None


PLACE = _place()


def say_if_cold() -> None:
    """A line for whoever watches, where nothing has been compiled on this machine yet."""
    watched = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    if watched and (PLACE is None or not any(PLACE.iterdir())):
        print("gpu_ot compiles for this CPU, once: about half a minute for each kind of problem.", file=sys.stderr, flush=True)
