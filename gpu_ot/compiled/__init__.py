"""Whole solves on a CPU as machine code: steps, checks and products of small problems and of batches, in one call.

numba compiles these functions when somebody first needs them and keeps the result. Nothing here is imported before that. Each is
the twin of torch operations elsewhere, which say why they do what they do; tests hold the two together.
"""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def refused() -> str | None:
    """Why there is no machine code, or None."""
    try:
        found = importlib.util.find_spec("numba") is not None
    except ValueError:  # hidden on purpose
        found = False
    if not found:
        return "numba is not installed (pip install numba)"
    try:
        from . import batch as _  # noqa: F401
        from .machine import say_if_cold
    except ImportError as missing:
        return f"its functions cannot be compiled: {missing}"
    say_if_cold()
    return None
