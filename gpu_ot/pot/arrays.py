"""Arrays as POT's callers hold them: numpy in, numpy out; torch in, torch out; lists follow the first array given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ProblemError


def take(**named: Any) -> tuple[list[Tensor | None], Callable[[Tensor], Any]]:
    """The arguments as tensors, in order (None and empty arrays as None), and the way back to the caller's kind.

    Raises ProblemError for a mixture of numpy and torch, as POT does: nothing crosses devices in silence.
    """
    kinds = {type(z) for z in named.values() if isinstance(z, (np.ndarray, Tensor))}
    if len(kinds) > 1 and any(issubclass(k, np.ndarray) for k in kinds) and any(issubclass(k, Tensor) for k in kinds):
        found = [str(type(z)) for z in named.values()]
        raise ProblemError(
            f"All array should be from the same type/backend. Current types are : {found}. Convert with torch.from_numpy or .numpy()."
        )
    first = next((z for z in named.values() if isinstance(z, (np.ndarray, Tensor))), None)
    tensors = [_tensor(name, z, first) for name, z in named.items()]
    return tensors, (_same if isinstance(first, Tensor) else _to_numpy)


def _tensor(name: str, z: Any, like: np.ndarray | Tensor | None) -> Tensor | None:
    if z is None:
        return None
    if isinstance(z, (list, tuple)):
        if len(z) == 0:
            return None
        if isinstance(like, Tensor):
            return torch.as_tensor(z, dtype=like.dtype if like.is_floating_point() else None, device=like.device)
        z = np.asarray(z, dtype=like.dtype if like is not None and like.dtype.kind == "f" else np.float64)
    if isinstance(z, np.ndarray):
        if z.dtype.kind not in "fiubc":
            raise ProblemError(f"{name} holds {z.dtype} values, expected numbers.")
        if z.dtype.kind == "f" and z.dtype.itemsize > 8:
            z = z.astype(np.float64)
        z = z if z.dtype.isnative else z.astype(z.dtype.newbyteorder("="))
        z = torch.from_numpy(np.require(z, requirements=["C", "W"]))
    if not isinstance(z, Tensor):
        raise ProblemError(f"{name} must be an array, a tensor or a list of numbers, found {type(z).__name__}.")
    return z if z.ndim == 0 or z.shape[0] > 0 else None


def _same(z: Tensor) -> Tensor:
    return z


def _to_numpy(z: Tensor) -> Any:
    return z.detach().numpy()[()]  # [()] turns a 0-d array into a scalar, as numpy's own reductions return
