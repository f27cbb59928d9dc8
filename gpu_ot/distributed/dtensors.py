"""DTensors sharded by points, as this rank's shards."""

from __future__ import annotations

import sys
from typing import Any

from .. import errors
from ..costs import Cost


def is_dtensor(z: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(z, module.DTensor)


def local(name: str, z: Any, dim: int = -2) -> Any:
    """This rank's shard of a DTensor that is sharded along `dim`; anything else as it is."""
    if not is_dtensor(z):
        return z
    placement = z.placements[0]
    if len(z.placements) != 1 or not placement.is_shard() or placement.dim % z.ndim != dim % z.ndim:
        raise errors.ProblemError(
            f"{name} is a DTensor placed as {z.placements}, and points are shared one dimension of a mesh along axis {dim % z.ndim}: "
            f"redistribute it to (Shard({dim % z.ndim}),)."
        )
    return z.to_local()


def mesh_of(cost: Cost) -> Any:
    """The mesh of the first input that is a DTensor, or None."""
    return next((z.device_mesh for z in cost.inputs.values() if is_dtensor(z)), None)  # type: ignore[attr-defined]


def local_cost(cost: Cost) -> Cost:
    """The cost of this rank's shards."""
    return cost if mesh_of(cost) is None else cost.of(local(name, z) for name, z in cost.inputs.items())
