"""POT's callers hold arrays of several kinds: numpy in, numpy out; torch in, torch out; others through `__dlpack__`.

A list becomes an array of the same kind and type as the first array given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors, transforms
from ..costs import Cost, Lazy
from ..errors import ProblemError
from ..problem import float_type
from .refusals import Elsewhere

#: numpy arrays and lists are solved on this device. `gpu_ot.patch(device=...)` sets it.
numpy_device: torch.device | None = None


def take(**named: Any) -> tuple[list[Any], Callable[[Tensor], Any]]:
    """The arguments as tensors, in order, and a function that converts results to the caller's kind of array.

    None and empty vectors become None. A Cost stays one, and a LazyTensor of KeOps becomes one; without any array beside it, results
    are tensors. Raises ProblemError for a mixture of kinds, as POT does: nothing crosses devices in silence.
    """
    first = kind = None
    named = {name: unframed(z) for name, z in named.items()}
    for z in named.values():
        own = _kind(z)
        if first is None and own is not None:
            first, kind = z, own
        elif own is not None and own is not kind:
            found = [str(type(z)) for z in named.values()]
            raise ProblemError(
                f"All array should be from the same type/backend. Current types are : {found}. Convert with torch.from_numpy or .numpy()."
            )
    taken = [_tensor(name, z, first, kind) for name, z in named.items()]
    if kind is Tensor or (kind is None and any(isinstance(z, Cost) for z in taken)):
        return taken, tensors
    return taken, to_numpy if kind in (None, np.ndarray) else _from_dlpack(first)


def take_problem(a: Any, b: Any, M: Any, **others: Any) -> tuple[list[Any], Callable[[Tensor], Any]]:
    """`take` of [a (n,), b (m,) or (m, n_hists), M (n, m), *others], checked against each other. b comes back as (m,) or (n_hists, m)."""
    (ta, tb, found, *rest), back = take(a=a, b=b, M=M, **others)
    if found is None or len(found.shape) != 2:
        raise errors.wrong_shape("M", () if found is None else found.shape, "(n, m), one row for each weight of a")
    n, m = found.shape
    if n == 0 or m == 0:
        raise errors.empty_problem(n, m)
    if ta is not None and ta.shape != (n,):
        raise errors.wrong_shape("a", ta.shape, f"({n},) to match M with shape ({n}, {m})")
    if tb is not None and tb.shape[:1] + tb.shape[2:] != (m,):
        raise errors.wrong_shape("b", tb.shape, f"({m},) or ({m}, n_hists) to match M with shape ({n}, {m})")
    if isinstance(found, Tensor) and not (found.is_complex() or found.is_floating_point()):  # integers have the type of the weights
        found = found.to(float_type(*(z for z in (ta, tb) if z is not None)))
    return [ta, tb if tb is None or tb.ndim == 1 else tb.mT, found, *rest], back


def take_start(warmstart: Any, k: int, like: Tensor) -> Tensor:
    """warmstart[k], (n,) or (n, n_hists), as a detached tensor of the shape and type of `like` (*batch, n)."""
    (z,), _ = take(warmstart=warmstart[k])
    n = like.shape[-1]
    z = z.mT if z is not None and z.ndim == 2 else z
    if z is None or z.shape[-1:] != (n,):
        found = () if z is None else z.mT.shape if z.ndim == 2 else z.shape
        raise errors.wrong_shape(f"warmstart[{k}]", found, f"({n},), or ({n}, n_hists) for several histograms")
    return z.detach().to(like).expand_as(like)


def lazily(M: Any) -> Any:
    """A LazyTensor of KeOps as a Cost; anything else unchanged."""
    return Lazy(M) if hasattr(M, "__GenericLazyTensor__") else M


def number(z: Any, name: str = "reg") -> float:
    """A setting as a float, without its gradient. An array may hold it alone."""
    if type(z) is float:
        return z
    try:
        if isinstance(z, str):
            raise ValueError
        return float(z.detach() if isinstance(z, Tensor) else z.item() if hasattr(z, "item") else z)
    except (TypeError, ValueError, RuntimeError):
        found = f"an array of shape {errors.shape(z.shape)}" if hasattr(z, "shape") else repr(z)  # pyright: ignore[reportAttributeAccessIssue]
        raise ProblemError(f"{name} must be a number, found {found}.") from None


def is_array(z: Any) -> bool:
    return _kind(z) is not None


def _kind(z: Any) -> type | None:
    """np.ndarray, Tensor, or the type of an array of another library (CuPy, JAX, ...), which DLPack shares without a copy; else None."""
    if isinstance(z, np.ndarray):
        return np.ndarray
    if isinstance(z, Tensor):
        return Tensor
    foreign = hasattr(z, "__dlpack__") and hasattr(z, "__dlpack_device__") and not isinstance(z, np.generic)
    return type(z) if foreign else None


def unframed(z: Any) -> Any:
    """Tables and columns of pandas and polars as numpy's arrays; whatever else as it is."""
    return z.to_numpy() if not isinstance(z, (np.ndarray, Tensor)) and hasattr(z, "to_numpy") and not hasattr(z, "__dlpack__") else z


def _tensor(name: str, z: Any, like: Any, kind: type | None) -> Tensor | Cost | None:
    if z is None or isinstance(z, Cost):
        return z
    if kind is not None and kind is type(z) and kind is not np.ndarray and kind is not Tensor:
        z = torch.from_dlpack(z)
    elif hasattr(z, "__GenericLazyTensor__"):
        return Lazy(z)
    elif isinstance(z, (list, tuple)):
        if len(z) == 0:
            return None
        if isinstance(like, Tensor):
            return torch.as_tensor(z, dtype=like.dtype if like.is_floating_point() else None, device=like.device)
        if like is not None and not isinstance(like, np.ndarray):
            like = torch.from_dlpack(like)
            return torch.as_tensor(z, dtype=like.dtype if like.is_floating_point() else torch.float64, device=like.device)
        z = np.asarray(z, dtype=like.dtype if like is not None and like.dtype.kind == "f" else np.float64)
    if isinstance(z, np.ndarray):
        if z.dtype.kind not in "fiubc":
            raise ProblemError(f"{name} holds {z.dtype} values, expected numbers.")
        if z.dtype.kind == "f" and z.dtype.itemsize > 8:
            z = z.astype(np.float64)
        z = z if z.dtype.isnative else z.astype(z.dtype.newbyteorder("="))
        z = torch.from_numpy(np.require(z, requirements=["C", "W"]))
        z = z if numpy_device is None else z.to(numpy_device)
    if not isinstance(z, Tensor):
        message = f"{name} must be an array, a tensor or a list of numbers, found {type(z).__name__}."
        raise Elsewhere(f"{message} Arrays without __dlpack__ are POT's alone.") if hasattr(z, "shape") else ProblemError(message)
    return None if z.ndim == 1 and not len(z) else transforms.kept(z)


def tensors(z: Tensor) -> Tensor:
    """Results for callers who hold tensors."""
    return z


def to_numpy(z: Tensor) -> Any:
    return z.detach().cpu().numpy()[()]  # [()] turns a 0-d array into a scalar, as numpy's own reductions return


def _from_dlpack(like: Any) -> Callable[[Tensor], Any]:
    """Converts results to the kind of `like`, by the `from_dlpack` of its array-API namespace (JAX) or of its package (CuPy)."""
    package = type(like).__module__.partition(".")[0]
    namespaces = [like.__array_namespace__()] if hasattr(like, "__array_namespace__") else []
    namespaces += [sys.modules[name] for name in (type(like).__module__, package, f"{package}.dlpack") if name in sys.modules]
    namespaces.append(type(like))
    read = next((namespace.from_dlpack for namespace in namespaces if hasattr(namespace, "from_dlpack")), None)
    if read is None:
        raise ProblemError(
            f"{type(like).__name__} hands its arrays over through __dlpack__, but {package} has no from_dlpack to take results back. "
            "Pass torch.from_dlpack(z), and get tensors."
        )
    return lambda z: read(z.detach().contiguous())
