"""Costs that the user wrote with KeOps."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import errors
from .base import Axis, Cost, Index, take


@dataclass(frozen=True, eq=False)
class Lazy(Cost):
    """The user's own LazyTensor of pykeops.torch: C (n, m), one number per pair, which stays a formula.

    `inputs` are the tensors behind it, those that hold parameters too; gradients reach those that require one.

    >>> x_i, y_j = LazyTensor(x[:, None, :]), LazyTensor(y[None, :, :])
    >>> cost = Lazy(((x_i - y_j).abs() * w).sum(-1))

    Raises ProblemError for a LazyTensor of numpy arrays, with batch axes, with several numbers per pair, complex, symbolic, reduced,
    with `ranges`, or with constants that are not finite.
    """

    C: Any
    backend = "keops"

    def __post_init__(self) -> None:
        if why := _unfit(self.C):
            raise errors.ProblemError(why)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: z for name, (z, _) in self._tensors.items()}

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.C._shape[:2])

    @property
    def depth(self) -> int:
        return 1 + sum(z.shape[-1] for z, axis in self._tensors.values() if axis < 2)

    @property
    def T(self) -> Lazy:
        return Lazy(self.C.t())

    def formula(self, i: Axis, j: Axis) -> Any:
        return self.C if i.axis == 0 else self.C.t()

    def describe(self) -> str:
        return "a LazyTensor"

    def dense(self) -> Tensor:
        """C as a tensor, in strips: for small problems, and the parts of large ones. One more formula to compile."""
        strips = [strip for _, strip in self.strips()]
        if len(strips) > 1:
            return torch.cat([strip.dense() for strip in strips])
        return _Pairwise.apply(self, *self.inputs.values())

    def pairwise(self) -> Tensor:
        """C as KeOps gives it, all at once: a row for each pair, since a product with the identity would be another formula for each m."""
        n, m = self.shape
        places = torch.arange(n * m, device=next(iter(self.inputs.values())).device)
        places = places // m, places % m
        C = self._over([z if axis == 2 else z[places[axis]] for z, axis in self._tensors.values()], n * m, 1)
        C.formula = re.sub(r"\bVar\((\d+),(\d+),1\)", r"Var(\1,\2,0)", C.formula)
        return C.sum(1).flatten().expand(n * m).reshape(n, m)

    def of(self, inputs: Iterable[Tensor]) -> Lazy:
        return Lazy(self._over(inputs, *self.shape))

    def part(self, rows: Index, cols: Index) -> Lazy:
        index = rows, cols
        for given in index:
            if isinstance(given, Tensor) and given.ndim != 1:
                raise errors.wrong_shape("an index", given.shape, "(k,): a LazyTensor is one problem, no batch")
        sizes = [len(range(size)[i]) if isinstance(i, slice) else len(i) for size, i in zip(self.shape, index, strict=True)]
        return Lazy(self._over((z if axis == 2 else take(z, index[axis], -2) for z, axis in self._tensors.values()), *sizes))

    @property
    def _tensors(self) -> dict[str, tuple[Tensor, int]]:
        """The tensors in the formula, each once, and what they are there: of rows 0, of columns 1, parameters 2."""
        axes = {int(name): int(axis) for name, axis in re.findall(r"\bVar\((\d+),\d+,([012])\)", self.C.formula)}
        found: dict[int, tuple[str, tuple[Tensor, int]]] = {}
        for k, z in enumerate(self.C.variables):
            if isinstance(z, Tensor) and id(z) in axes:
                found.setdefault(id(z), (f"C.variables[{k}]", (z, axes[id(z)])))
        return dict(found.values())

    def _over(self, inputs: Iterable[Tensor], n: int, m: int) -> Any:
        """The LazyTensor of other tensors. KeOps tells them apart by id() until it compiles, so each is a new object."""
        fresh = {id(z): new.contiguous().view(new.shape) for (z, _), new in zip(self._tensors.values(), inputs, strict=True)}
        C = copy.copy(self.C)
        C.formula = re.sub(r"(?<=\bVar\()\d+", lambda name: str(id(fresh[int(name[0])])) if int(name[0]) in fresh else name[0], C.formula)
        C.variables = tuple(fresh.get(id(z), z) for z in C.variables)
        C.ni, C.nj, C._dtype = n, m, str(next(iter(fresh.values())).dtype).removeprefix("torch.")
        return C


class _Pairwise(torch.autograd.Function):
    """C of a LazyTensor, formed again for its gradient: KeOps would keep the coordinates of every pair until then. (torch's checkpoints
    do not serve, since KeOps reads its saved tensors several times.)"""

    @staticmethod
    def forward(ctx: Any, cost: Lazy, *inputs: Tensor) -> Tensor:
        ctx.cost = cost
        ctx.save_for_backward(*inputs)
        return cost.of(inputs).pairwise()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, again = ctx.saved_tensors, torch.is_grad_enabled()
        wanted = [z for z, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.cost.of(inputs).pairwise(), wanted, grad_outputs[0], create_graph=again))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _unfit(C: Any) -> str | None:
    """Why this is no cost between two sides, or None."""
    if not hasattr(C, "__GenericLazyTensor__"):
        return f"Lazy takes a LazyTensor of pykeops.torch, found {type(C).__name__}. A tensor is a cost as it is, or Matrix(M)."
    if any(not isinstance(z, (Tensor, list)) for z in C.variables):
        return "C is a LazyTensor of numpy arrays: build it with pykeops.torch.LazyTensor from tensors, torch.from_numpy(x)."
    if C.symbolic_variables:
        return "C has symbolic variables: build the LazyTensor from the tensors themselves."
    if hasattr(C, "reduction_op"):
        return "C is a LazyTensor that waits for a reduction: pass it before .sum(axis, call=False) and the like."
    if C.is_complex:
        return "C is a complex LazyTensor: pass its real part or its modulus, whichever is the cost."
    if C.batchdims is not None:
        return f"C is a LazyTensor of shape {errors.shape(C.shape)} with batch axes, and KeOps takes one problem here: solve them in turn."
    if C.ndim != 1:
        return f"C is a LazyTensor of shape {errors.shape(C.shape)}, {C.ndim} numbers per pair where a cost is one: reduce them, C.sum(-1)."
    if C.ranges is not None:
        return "C is a LazyTensor with `ranges`, which leave pairs out: set C.ranges = None, and give such pairs a large finite cost."
    if not any(isinstance(z, Tensor) for z in C.variables):
        return "C is a LazyTensor of constants alone: it knows no rows and columns."
    if any(not math.isfinite(number) for z in C.variables if isinstance(z, list) for number in z):
        return "C is a LazyTensor with a constant that is not finite: KeOps would make NaN of it. Give pairs to avoid a large finite cost."
    return None
