"""What it costs to move a unit of mass from x_i to y_j.

Costs of the form C_ij = alpha_i + beta_j - <u_i, v_j> *fold*: a matmul-shaped kernel needs nothing else, and a weighted
sum of such costs is again one of them, on concatenated features scaled by sqrt(weight).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from ..communicator import ALONE, Alone


class Folded(NamedTuple):
    """C_ij = alpha_i + beta_j - <u_i, v_j>."""

    alpha: Tensor  # (*batch, n)
    beta: Tensor  # (*batch, m)
    u: Tensor  # (*batch, n, d)
    v: Tensor  # (*batch, m, d)


#: What `scale` knows.
SCALES = ("std", "mean", "median", "max")
#: Numbers of a block (32 MiB in float64), and of the entries that a median is taken over.
BLOCK, SORTED = 2**22, 2**24
#: Features from which squared distances of float32 points on a CPU are products in float64, and numbers of a slab of those (4 MiB).
WIDE, SLAB = 16, 2**19

#: Rows or columns: a slice, or int64 indices (k,), or (*batch, k) for a choice of each problem's own.
Index = slice | Tensor
#: Points (*batch, n, d), or one such tensor for each term of a sum.
Points = Tensor | tuple[Tensor, ...]


class Cost:
    """A cost bound to its two sides. `shape` is (*batch, n, m); `dense()` is that array, differentiable in the inputs.

    A new kind of cost says what it is with `inputs`, `shape`, `dense` and `of`, and how to cut it with `part`.
    """

    @property
    def ranks(self) -> Alone:
        """Who holds its points."""
        return ALONE

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors the cost is made of, by the name the user knows them by."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    @property
    def points(self) -> tuple[Points, Points]:
        """The points of the two sides, (x, y); for a sum over several clouds, two tuples with one tensor a term."""
        raise _pointless(self)

    @property
    def depth(self) -> int:
        """Numbers formed per pair: a formula may hold all coordinates of every difference, torch's own distances do not."""
        return 1

    def dense(self) -> Tensor:
        raise NotImplementedError

    def dearest(self) -> Tensor | None:
        """(*batch,): the largest finite cost of a pair, where some pairs are forbidden; None for a cost that forbids none."""
        return None

    def fold(self) -> Folded | None:
        """The folded form, or None when the cost has none."""
        return None

    def of(self, inputs: Iterable[Tensor]) -> Cost:
        """The same cost of other tensors, which come in the order of `inputs`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is bound to other tensors: it has no of().")

    def part(self, rows: Index, cols: Index) -> Cost:
        """The same cost between some of its rows and some of its columns: slices, or indices (k,) or (*batch, k)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to take rows and columns of it: it has no part().")

    def at(self, x: Points | None = None, y: Points | None = None) -> Cost:
        """The same cost between other points, (*batch, n, d) and (*batch, m, d), of any number; None keeps a side as it is. Points
        without batch axes are shared by the problems of a batch.

        A sum over several clouds takes a tuple, one tensor a term. Raises ProblemError for a matrix, which knows no points.
        """
        raise _pointless(self)

    def to(self, dtype: torch.dtype) -> Cost:
        return self.of(z.to(dtype) for z in self.inputs.values())

    def strips(self, dim: int = -2) -> Iterator[tuple[slice, Cost]]:
        """(rows, the part of the cost between those rows and all columns), each of about BLOCK numbers or a single row; or columns and
        all rows, for dim = -1."""
        size, across = self.shape[dim], self.shape[-3 - dim]
        step = max(1, BLOCK // (max(1, self.shape[:-2].numel()) * across * self.depth))
        if step >= size:
            yield slice(0, size), self
            return
        for i in range(0, size, step):
            window = slice(i, min(i + step, size))
            yield window, self.part(window, slice(None)) if dim == -2 else self.part(slice(None), window)

    def sample(self, limit: int = 256, problems: int = 4) -> Tensor:
        """(*batch', n', m'): the costs between at most `limit` evenly strided rows and columns, detached; of a batch, its axes made one
        and at most `problems` evenly strided ones."""
        rows, cols = (_every(size, limit) for size in self.shape[-2:])
        with torch.no_grad():
            try:
                return self._some(problems).part(rows, cols).dense()
            except NotImplementedError:  # a cost of the user's own that cannot be cut, which only ever is a whole array
                C = self.dense()
                C = C if C.ndim == 2 else C.flatten(0, -3)[_every(self.shape[:-2].numel(), problems)]
                return C[..., rows, cols]

    def scale(self, kind: str) -> Tensor:
        """The "std", "mean", "median" or "max" of all finite entries of all problems together: 0-d, float64, detached; NaN without any.

        The standard deviation (divided by the count) and mean of a cost that folds are exact, from O((n + m) d^2) operations on its
        clouds; everything else takes one pass over blocks of at most 2^22 numbers. The median is the lower of the middle two, exact
        for up to 2^24 entries and otherwise that of an evenly strided sample of about as many. Raises ProblemError for another kind.
        """
        if kind not in SCALES:
            raise errors.unknown("kind", kind, SCALES)
        with torch.no_grad():
            if kind == "median":
                return self._median()
            if kind in ("std", "mean") and (folded := self._folded_in_short()) is not None:
                mean, variance = _moments(folded)
            elif kind == "max":
                top = torch.stack([torch.where(C.isfinite(), C, -math.inf).amax() for C in self._blocks()]).amax()
                return torch.where(top.isfinite(), top, math.nan).to(_wide(top))
            else:
                mean, variance = _pooled(self._blocks())
            return mean if kind == "mean" else variance.sqrt()

    def _median(self) -> Tensor:
        if self.shape.numel() <= SORTED:
            sample = torch.cat([C.flatten() for C in self._blocks()])
        else:
            side = math.isqrt(SORTED // self.depth) if len(self.shape) == 2 else 1024
            size = self.depth * math.prod(min(k, side) for k in self.shape[-2:])
            sample = self.sample(side, max(1, SORTED // size))
        sample = sample[sample.isfinite()]
        return sample.median().to(_wide(sample)) if len(sample) else torch.full_like(sample.sum(), math.nan, dtype=_wide(sample))

    def _folded_in_short(self) -> Folded | None:
        """The folded form in float64, where its d^2 is less work than the n m pairs."""
        (n, m), folded = self.shape[-2:], self.fold()
        if folded is None or folded.u.shape[-1] * (n + m) > n * m:
            return None
        return self.to(_wide(folded.u)).fold()

    def _blocks(self) -> Iterator[Tensor]:
        """All entries, in pieces of about BLOCK numbers."""
        (n, m), depth = self.shape[-2:], self.depth
        batch = max(1, self.shape[:-2].numel())
        cols = max(1, min(m, BLOCK // (batch * depth)))
        rows = max(1, min(n, BLOCK // (batch * depth * cols)))
        if rows >= n and cols >= m:
            yield self.dense()
            return
        for i in range(0, n, rows):
            for j in range(0, m, cols):
                yield self.part(slice(i, i + rows), slice(j, j + cols)).dense()

    def _some(self, problems: int) -> Cost:
        """At most `problems` of a batch, as a batch with one axis; a single problem stays as it is."""
        batch = self.shape[:-2]
        if not batch:
            return self
        return self.of(z.flatten(0, len(batch) - 1)[_every(batch.numel(), problems)] for z in self.inputs.values())

    def __add__(self, other: Cost) -> Cost:
        return Sum(((1.0, self), (1.0, other)))

    def __rmul__(self, weight: float) -> Cost:
        return Sum(((weight, self),))

    __mul__ = __rmul__


def _pointless(cost: Cost) -> errors.ProblemError:
    return errors.ProblemError(
        f"a cost of kind {type(cost).__name__} has no points, so what moving or adding some would cost is not known. "
        "Write it as a cost between clouds: SqEuclidean(x, y), or Formula(function, x, y)."
    )


def _every(size: int, limit: int) -> slice:
    """At most `limit` of `size`, evenly strided."""
    return slice(None, None, -(-size // limit))


def _wide(z: Tensor) -> torch.dtype:
    return torch.float32 if z.device.type == "mps" else torch.float64


def _take(z: Tensor, index: Index, dim: int) -> Tensor:
    """Some rows (dim = -2) or columns (-1) of z, whose last two axes these are."""
    if isinstance(index, slice):
        return z[..., index, :] if dim == -2 else z[..., index]
    if index.ndim == 1:
        return z.index_select(dim, index)
    batch = torch.broadcast_shapes(z.shape[:-2], index.shape[:-1])
    return z.expand(*batch, *z.shape[-2:]).take_along_dim(index.unsqueeze(-1 if dim == -2 else -2), dim)


def _moments(folded: Folded) -> tuple[Tensor, Tensor]:
    """Mean and variance over all pairs of all problems.

    With u = u~ + u', u' the mean, and likewise v:  C_ij = (alpha_i - <u~_i, v'>) + (beta_j - <u', v~_j>) - <u', v'> - <u~_i, v~_j>,
    four terms without covariance, of which the last has the variance tr(S_u S_v) for the second moments S.
    """
    alpha, beta, u, v = folded
    mean_u, mean_v = u.mean(-2, keepdim=True), v.mean(-2, keepdim=True)
    u, v = u - mean_u, v - mean_v
    rows, columns = alpha - (u * mean_v).sum(-1), beta - (v * mean_u).sum(-1)
    S_u, S_v = u.mT @ u / u.shape[-2], v.mT @ v / v.shape[-2]
    means = rows.mean(-1) + columns.mean(-1) - (mean_u * mean_v).sum((-1, -2))
    variances = rows.var(-1, correction=0) + columns.var(-1, correction=0) + (S_u * S_v).sum((-1, -2))
    return means.mean(), variances.mean() + means.var(correction=0)


def _pooled(blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the finite entries of all blocks, merged as they come. Chan, Golub and LeVeque 1983, equation (2.1)."""
    count = mean = total = None
    for block in blocks:
        z = block[block.isfinite()]
        z = z.to(_wide(z))
        k = torch.full_like(z.sum(), z.numel())
        centre = z.sum() / k.clamp(min=1)
        spread = (z - centre).square().sum()
        if count is None or mean is None or total is None:
            count, mean, total = k, centre, spread
            continue
        both, gap = (count + k).clamp(min=1), centre - mean
        total = total + spread + gap.square() * count * k / both
        mean, count = mean + gap * k / both, count + k
    assert count is not None and mean is not None and total is not None
    return torch.where(count > 0, mean, math.nan), torch.where(count > 0, total / count, math.nan)


@dataclass(frozen=True, eq=False)
class Matrix(Cost):
    """A cost the user has already computed: M (*batch, n, m). +inf forbids a pair."""

    M: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"M": self.M}

    @property
    def shape(self) -> torch.Size:
        return self.M.shape

    def dense(self) -> Tensor:
        return self.M

    def dearest(self) -> Tensor | None:
        M = self.M.detach()
        return torch.where(M.isposinf(), -math.inf, M).amax((-2, -1))

    def of(self, inputs: Iterable[Tensor]) -> Matrix:
        return Matrix(*inputs)

    def part(self, rows: Index, cols: Index) -> Matrix:
        return Matrix(_take(_take(self.M, rows, -2), cols, -1))


class _Pointed(Cost):
    """A cost between points x and y."""

    x: Tensor
    y: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.y.shape[-2]))

    @property
    def points(self) -> tuple[Points, Points]:
        return self.x, self.y

    def part(self, rows: Index, cols: Index) -> Cost:
        x, y = _take(self.x, rows, -2), _take(self.y, cols, -2)
        return self._paired(x, y)

    def at(self, x: Points | None = None, y: Points | None = None) -> Cost:
        pair = []
        for name, new, old in (("x", x, self.x), ("y", y, self.y)):
            z = old if new is None else new[0] if isinstance(new, tuple) and len(new) == 1 else new
            if isinstance(z, tuple):
                raise errors.ProblemError(f"{name} holds the points of {len(z)} terms, and this cost has one: pass a tensor.")
            if z.ndim < 2 or z.shape[-1] != old.shape[-1]:
                raise errors.wrong_shape(name, z.shape, f"(*batch, k, {old.shape[-1]}), points like those of the cost")
            pair.append(z.to(old.dtype))
        return self._paired(*pair)

    def _paired(self, x: Tensor, y: Tensor) -> Cost:
        """The same cost of these points; either side may lack batch axes that the other has."""
        try:
            batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except RuntimeError:
            raise errors.wrong_shape("y", y.shape, f"(*batch, m, d) to match x with shape {errors.shape(x.shape)}") from None
        return self.of((x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])))


@dataclass(frozen=True, eq=False)
class _Clouds(_Pointed):
    """A cost between two clouds, x (*batch, n, d) and y (*batch, m, d)."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
            raise errors.wrong_shape("y", y.shape, f"(*batch, m, d) to match x with shape {errors.shape(x.shape)}")

    def of(self, inputs: Iterable[Tensor]) -> Cost:
        return type(self)(*inputs)


class _Distances(torch.autograd.Function):
    """|x_i - y_j| or its square, (*batch, n, m). torch's own has no second derivative, and of the square it could not have the right one
    where points coincide."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, squared: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if squared and x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-1] >= WIDE:
            return _squares(x, y)
        # Differences first: |x|^2 + |y|^2 - 2<x, y> has no digits left for clouds far from the origin.
        D = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return D.square() if squared else D

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.squared = inputs
        ctx.save_for_backward(x, y, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (G,), (x, y, C) = grad_outputs, ctx.saved_tensors
        need_x, need_y, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            D = C.sqrt() if ctx.squared else C
            G = 2 * D * G if ctx.squared else G
            back = torch.ops.aten._cdist_backward
            grad_x = back(G.contiguous(), x, y, 2.0, D) if need_x else None
            return grad_x, back(G.mT.contiguous(), y, x, 2.0, D.mT.contiguous()) if need_y else None, None
        # The derivatives again are products, about a common centre.
        W = 2 * G if ctx.squared else torch.where(C > 0, G / torch.where(C > 0, C, 1.0), 0.0)
        centre = torch.cat((x, y), -2).mean(-2, keepdim=True).detach()
        x, y = x - centre, y - centre
        return W.sum(-1, keepdim=True) * x - W @ y, W.sum(-2).unsqueeze(-1) * y - W.mT @ x, None


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 of float32 points by products in float64 about a common centre: 16 digits of |x|^2 leave more of a distance than
    differences in float32 do, and from WIDE features on it is the faster way, 9 times at 64."""
    centre = torch.cat((x, y), -2).mean(-2, keepdim=True)
    u, v = (x - centre).double(), (y - centre).double()
    left = torch.cat((u, u.square().sum(-1, keepdim=True), torch.ones_like(u[..., :1])), -1)
    right = torch.cat((-2 * v, torch.ones_like(v[..., :1]), v.square().sum(-1, keepdim=True)), -1).mT.contiguous()
    C = (x[..., :1, :1] + y[..., :1, :1]).new_empty(*x.shape[:-1], y.shape[-2])  # under torch.vmap, of as many as either
    step = max(1, SLAB // max(1, y.shape[-2] * x.shape[:-2].numel()))
    for i in range(0, x.shape[-2], step):
        C[..., i : i + step, :] = (left[..., i : i + step, :] @ right).clamp(min=0)
    return C


class SqEuclidean(_Clouds):
    """C_ij = |x_i - y_j|^2."""

    def dense(self) -> Tensor:
        return _Distances.apply(self.x, self.y, True)

    def fold(self) -> Folded:
        # A common centre changes no distance and keeps the digits of clouds far from the origin.
        centre = torch.cat((self.x, self.y), -2).mean(-2, keepdim=True).detach()
        x, y = self.x - centre, self.y - centre
        root = 2**0.5  # u and v share the factor 2 evenly
        return Folded(x.square().sum(-1), y.square().sum(-1), root * x, root * y)


class Euclidean(_Clouds):
    """C_ij = |x_i - y_j|; its gradient is 0 where the points coincide."""

    def dense(self) -> Tensor:
        return _Distances.apply(self.x, self.y, False)


class Dot(_Clouds):
    """C_ij = -<x_i, y_j>."""

    def dense(self) -> Tensor:
        return -(self.x @ self.y.mT)

    def fold(self) -> Folded:
        return Folded(self.x.new_zeros(self.x.shape[:-1]), self.y.new_zeros(self.y.shape[:-1]), self.x, self.y)


class Cosine(_Clouds):
    """C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|); a point at the origin is at cost 1 from everything."""

    def dense(self) -> Tensor:
        _, _, u, v = self.fold()
        return 1 - u @ v.mT

    def fold(self) -> Folded:
        u, v = (torch.nn.functional.normalize(z, dim=-1) for z in (self.x, self.y))
        return Folded(u.new_ones(u.shape[:-1]), v.new_zeros(v.shape[:-1]), u, v)


@dataclass(frozen=True, eq=False)
class Formula(_Pointed):
    """Any cost written once for arrays that broadcast: `function(x_i, y_j)` receives (*batch, n, 1, d) and
    (*batch, 1, m, d) and returns (*batch, n, m), from tensors and from lazy tensors alike.

    >>> manhattan = Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x, y)
    """

    function: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor

    @property
    def depth(self) -> int:
        return self.x.shape[-1] + 1

    def dense(self) -> Tensor:
        return self.function(self.x.unsqueeze(-2), self.y.unsqueeze(-3))

    def of(self, inputs: Iterable[Tensor]) -> Formula:
        return Formula(self.function, *inputs)


@dataclass(frozen=True, eq=False)
class Lazy(Cost):
    """The user's own LazyTensor of pykeops.torch: C (n, m), one number per pair, which stays a formula.

    `inputs` are the tensors behind it, those that hold parameters too; gradients reach the ones that ask for them.

    >>> x_i, y_j = LazyTensor(x[:, None, :]), LazyTensor(y[None, :, :])
    >>> cost = Lazy(((x_i - y_j).abs() * w).sum(-1))

    Raises ProblemError for a LazyTensor of numpy arrays, with batch axes, with several numbers per pair, complex, symbolic, reduced,
    with `ranges`, or with constants that are not finite.
    """

    C: Any

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

    def dense(self) -> Tensor:
        """C as a tensor, in strips: for small problems, and the parts of large ones. One more formula to compile."""
        strips = [strip for _, strip in self.strips()]
        if len(strips) > 1:
            return torch.cat([strip.dense() for strip in strips])
        return _Entries.apply(self, *self.inputs.values())

    def entries(self) -> Tensor:
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
        return Lazy(self._over((z if axis == 2 else _take(z, index[axis], -2) for z, axis in self._tensors.values()), *sizes))

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
        """The LazyTensor of other tensors. KeOps knows them by their ids until it compiles, so each is an object of its own."""
        fresh = {id(z): new.contiguous().view(new.shape) for (z, _), new in zip(self._tensors.values(), inputs, strict=True)}
        C = copy.copy(self.C)
        C.formula = re.sub(r"(?<=\bVar\()\d+", lambda name: str(id(fresh[int(name[0])])) if int(name[0]) in fresh else name[0], C.formula)
        C.variables = tuple(fresh.get(id(z), z) for z in C.variables)
        C.ni, C.nj, C._dtype = n, m, str(next(iter(fresh.values())).dtype).removeprefix("torch.")
        return C


class _Entries(torch.autograd.Function):
    """C of a LazyTensor, formed again for its gradient: KeOps would keep the coordinates of every pair until then, and it looks at what
    it saved several times, which torch's checkpoints forbid."""

    @staticmethod
    def forward(ctx: Any, cost: Lazy, *inputs: Tensor) -> Tensor:
        ctx.cost = cost
        ctx.save_for_backward(*inputs)
        return cost.of(inputs).entries()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, again = ctx.saved_tensors, torch.is_grad_enabled()
        wanted = [z for z, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.cost.of(inputs).entries(), wanted, grad_outputs[0], create_graph=again))
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


@dataclass(frozen=True, eq=False)
class Sum(Cost):
    """sum_k weight_k * cost_k, all over the same pairs. Written `0.01 * SqEuclidean(z_s, z_t) + 0.05 * SqEuclidean(l_s, l_t)`."""

    terms: tuple[tuple[float, Cost], ...]

    def __post_init__(self) -> None:
        flat: list[tuple[float, Cost]] = []
        for weight, cost in self.terms:
            flat += [(weight * w, c) for w, c in cost.terms] if isinstance(cost, Sum) else [(weight, cost)]
        object.__setattr__(self, "terms", tuple(flat))
        for _, cost in flat[1:]:
            if cost.shape != self.shape:
                raise errors.wrong_shape("a term of the cost", cost.shape, f"{errors.shape(self.shape)} like its first term")

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {f"{name} of term {k}": z for k, (_, cost) in enumerate(self.terms) for name, z in cost.inputs.items()}

    @property
    def shape(self) -> torch.Size:
        return self.terms[0][1].shape

    def dense(self) -> Tensor:
        first, *rest = (weight * cost.dense() for weight, cost in self.terms)
        return sum(rest, start=first)

    def fold(self) -> Folded | None:
        folded = [(weight, cost.fold()) for weight, cost in self.terms]
        if any(part is None or weight < 0 for weight, part in folded):
            return None
        parts = [(weight, part) for weight, part in folded if part is not None]
        first, *rest = (weight * part.alpha for weight, part in parts)
        alpha = sum(rest, start=first)
        first, *rest = (weight * part.beta for weight, part in parts)
        beta = sum(rest, start=first)
        u = torch.cat([weight**0.5 * part.u for weight, part in parts], -1)
        v = torch.cat([weight**0.5 * part.v for weight, part in parts], -1)
        return Folded(alpha, beta, u, v)

    def of(self, inputs: Iterable[Tensor]) -> Sum:
        left = iter(inputs)
        return Sum(tuple((weight, cost.of([next(left) for _ in cost.inputs])) for weight, cost in self.terms))

    def to(self, dtype: torch.dtype) -> Sum:
        return Sum(tuple((weight, cost.to(dtype)) for weight, cost in self.terms))

    def part(self, rows: Index, cols: Index) -> Sum:
        return Sum(tuple((weight, cost.part(rows, cols)) for weight, cost in self.terms))

    @property
    def points(self) -> tuple[Points, Points]:
        sides = zip(*(cost.points for _, cost in self.terms), strict=True)
        x, y = (_one(tuple(z for z in side if isinstance(z, Tensor))) for side in sides)
        return x, y

    @property
    def depth(self) -> int:
        return max(cost.depth for _, cost in self.terms)

    def at(self, x: Points | None = None, y: Points | None = None) -> Sum:
        given = [self._spread(name, new, old) for name, new, old in zip("xy", (x, y), self.points, strict=True)]
        return Sum(tuple((weight, cost.at(*pair)) for (weight, cost), *pair in zip(self.terms, *given, strict=True)))

    def _spread(self, name: str, new: Points | None, old: Points) -> Sequence[Tensor | None]:
        """New points of one side, one for each term."""
        count = len(self.terms)
        if isinstance(new, tuple):
            if len(new) != count:
                raise errors.ProblemError(f"{name} holds the points of {len(new)} terms, and this cost is a sum of {count}.")
            return new
        if new is not None and isinstance(old, tuple):
            raise errors.ProblemError(
                f"this cost is a sum over {count} clouds of different points: pass {name} as a tuple, one tensor a term."
            )
        return [new] * count


def _one(points: tuple[Tensor, ...]) -> Points:
    """The points that all terms share, or each term's own."""
    first, *others = points
    return first if all(z is first or (z.shape == first.shape and torch.equal(z, first)) for z in others) else points
