"""Messages to POT's callers: the error for what POT alone solves, warnings, and POT's table of errors."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import ProblemError
from ..solver.status import CONVERGED, STALLED, Status

NOT_CONVERGED = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` or the regularization parameter `reg`."
)


class Elsewhere(ProblemError, NotImplementedError):
    """POT solves this and gpu_ot does not. Under `gpu_ot.patch()` such a call runs on POT's own function instead."""


def elsewhere(what: str, call: str) -> Elsewhere:
    return Elsewhere(f"{what} is not entropic transport, which is all that gpu_ot solves. POT has it: call {call}.")


def known_method(method: str, among: Iterable[str], elsewhere: dict[str, str] | None = None) -> str:
    """The method in lower case, if it is one of these. `elsewhere` names POT's functions for other methods."""
    name = method.lower()
    if name in among:
        return name
    hint = f" It is another algorithm, POT's {elsewhere[name]}." if elsewhere and name in elsewhere else ""
    raise ProblemError(f"Unknown method '{method}'.{hint} Choose one of {', '.join(among)}.")


def warn(message: str) -> None:
    """A UserWarning at the line outside this package that called it."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gpu_ot."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_unless_converged(found: Any, message: str = NOT_CONVERGED, limit: str = "numItermax", tol: str = "stopThr") -> None:
    """Say why the loop that `found` ended with (`status`, `errors`) stopped short. `limit` and `tol` are the names of its settings."""
    status: Status = found.status
    if status in (CONVERGED, STALLED):
        return
    if status.name == "max_iter":
        error = float(found.errors[-1].max()) if len(found.errors) else float("nan")
        why = f"The iterations ran out at an error of {error:.3g}: raise `{limit}` or `reg`, or loosen `{tol}`."
    else:
        why = _OURS.sub(lambda word: _POTS[word[0]], status.explanation)
    warn(f"{message} Status {status.name}: {why}")


#: Our names in the explanation of a status, and POT's.
_POTS = {"eps": "reg", "penalties=KL(tau)": "sinkhorn_unbalanced"}
_OURS = re.compile(r"\beps\b|penalties=KL\(tau\)")


def print_error(iteration: int, error: Tensor, every: int, header_every: int = 200) -> None:
    """A line of POT's table every so many iterations, and its header."""
    if iteration % header_every == 0:
        print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
    if iteration % every == 0:
        print(f"{iteration:5d}|{error.amax().item():8e}|")
