"""What POT answers and this package does not: an error that names POT's function, and the warning that points at the caller."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from ..errors import ProblemError


class Elsewhere(ProblemError, NotImplementedError):
    """POT solves this and gpu_ot does not. Under `gpu_ot.patch()` such a call runs on POT's own function instead."""


def elsewhere(what: str, call: str) -> Elsewhere:
    return Elsewhere(f"{what} is not entropic transport, which is all that gpu_ot solves. POT has it: call {call}.")


def unknown_method(method: object, among: Iterable[str], elsewhere: dict[str, str] | None = None) -> ProblemError:
    known = (elsewhere or {}).get(str(method).lower())
    hint = f" It is another algorithm, POT's {known}." if known else ""
    return ProblemError(f"Unknown method '{method}'.{hint} Choose one of {', '.join(among)}.")


def warn(message: str) -> None:
    """A UserWarning that points at the caller's line, however many of our own frames lie between."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gpu_ot."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
