"""Streamed tiles on a GPU: costs C_ij = alpha_i + beta_j - <u_i, v_j> whose n-by-m array exists one tile at a time, on chip.

The kernels know only products and two vectors. What folds into the vectors is folded here, in the type of the potentials:

    softmin(h)_i   = alpha_i + kernel softmin of (h_j - beta_j)
    exp((k_i + h_j - C_ij) / eps)  has the exponent  (k_i - alpha_i) + (h_j - beta_j) + <u_i, v_j>

O((n + m) d) memory. One sweep is one launch, two when few rows are split over many processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import errors, transforms
from ..penalties import BALANCED, KL, TV, Penalty
from ..problem import Problem
from ..vectors import log
from . import graphs
from .products import kernels_refused, serves_vectors, vectors
from .protocol import Geometry, needed

if TYPE_CHECKING:  # Triton is imported with the first cloud, so that without it the reason can still be given
    from ..kernels.streamed import Side  # pyright: ignore[reportMissingImports]
    from ..kernels.tiles import Cloud  # pyright: ignore[reportMissingImports]


class Streaming(Geometry):
    """A cost that folds, bound to two clouds stored once in the layout of the tensor cores.

    problem     must not be refused by `refuse`; weights that carry batch axes of their own repeat the clouds along them.
    precision   "fp32" keeps what float32 can see of the points. "tf32", "bf16" and "fp16" round them once and solve
                that slightly different problem exactly; `plan` is then of the rounded points too.
    """

    dtype = torch.float32

    def __init__(self, problem: Problem, precision: str = "fp32") -> None:
        from ..kernels.tiles import cloud  # pyright: ignore[reportMissingImports]

        # Folded in float64: |x|^2 of float32 points is then exact, and what a sweep loses it loses within the kernel. O((n + m) d).
        folded = problem.cost.to(torch.float64).fold()
        if folded is None:
            raise errors.backend_refused("triton", _NO_FOLD)
        self.batch = problem.shape[:-2]
        self.inputs = alpha, beta, u, v = (
            folded.alpha.expand(*self.batch, -1),
            folded.beta.expand(*self.batch, -1),
            folded.u.expand(*self.batch, -1, -1),
            folded.v.expand(*self.batch, -1, -1),
        )
        self.precision, self.repeated = precision, graphs.Repeated()
        self._exact = (lambda: Streaming(problem)) if precision != "fp32" else (lambda: self)
        sides = []
        for offset, points in ((alpha, u), (beta, v)):
            points = points.detach().reshape(-1, *points.shape[-2:])
            sides.append(_Side(offset.detach().reshape(-1, offset.shape[-1]).contiguous(), points, cloud(points, precision)))
        self.rows, self.columns = sides

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, or None. Reads no numbers, and waits for no device."""
        if why := kernels_refused(problem.a.device):
            return why
        if problem.dtype == torch.float64:
            return "its numbers are float64 and the kernels are float32. Pass float32 points if six digits are enough."
        if any(0 in z.shape for z in problem.cost.inputs.values()):
            return "its points have no coordinates."
        with torch.no_grad():
            return None if problem.cost.folds else _NO_FOLD

    @property
    def exact(self) -> Geometry:
        return self._exact()

    @property
    def T(self) -> Streaming:
        other = object.__new__(Streaming)  # both clouds are stored already; copy.copy would break torch 2.7's graph
        other.batch, other.precision, other.repeated = self.batch, self.precision, graphs.Repeated()
        other.rows, other.columns = self.columns, self.rows
        alpha, beta, u, v = self.inputs
        other.inputs = beta, alpha, v, u
        other._exact = lambda: self._exact().T
        return other

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        if h.ndim > len(self.batch) + 1:  # more potentials than clouds: one sweep each
            return torch.stack([self.softmin(each, eps) for each in h])
        rows, columns = self.rows, self.columns
        near, top = self._centred(h)
        # A guess of the running maximum: the last potential of this side. The kernel corrects a bad guess, which only takes time.
        shift = (rows.last + top).float() if rows.last is not None and rows.eps == eps else None
        s = streamed_softmin(*rows.stored, *columns.stored, rows.form, self.precision, rows.n, near, shift, _used(near), eps)
        last = s.to(top.dtype) - top
        rows.eps, rows.last = eps, last
        return (rows.offset + last).view(*self.batch, rows.n).to(h.dtype)

    def run(self, step: Any, state: Any, k: int) -> Any:
        sides = self.rows, self.columns
        usual = serves_vectors(state.f, state.g) and all(side.last is not None and side.eps == step.eps for side in sides)
        if not usual or step.one_sided:
            return super().run(step, state, k)
        return graphs.block(self.repeated, None, super().run, step, state, k, sides)

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """A launch a sweep, two where columns are split, and one before: weights, offsets, damping and types are the sweeps' business."""
        if not serves_vectors(g, problem.b) or g.shape != problem.b.shape or not all(isinstance(z, (KL, TV)) for z in problem.penalties):
            return super().iterate(problem, g, eps, k)
        from ..kernels.streamed import iterate  # pyright: ignore[reportMissingImports]

        sides = [
            side.bound(vectors(logs), penalty, eps)
            for side, logs, penalty in zip((self.rows, self.columns), (problem.log_a, problem.log_b), problem.penalties, strict=True)
        ]
        f, g_now, g_next = iterate(*sides, self._flat(g, 1).contiguous(), eps, k)
        for side, bound in zip((self.rows, self.columns), sides, strict=True):
            side.eps, side.last = eps, bound.last
        return f.view(problem.a.shape), g_now.view(g.shape), g_next.view(g.shape)

    def update(self, g: Tensor, b: Tensor, eps: float) -> Tensor:
        if not serves_vectors(g, b) or transforms.active() or g.ndim != len(self.batch) + 1:
            return super().update(g, b, eps)
        from ..kernels.streamed import update  # pyright: ignore[reportMissingImports]

        rows, columns = self.rows.bound(None, BALANCED, eps), self.columns.bound(log(vectors(b)), BALANCED, eps)
        f = update(rows, columns, self._flat(g, 1).contiguous(), eps)
        self.rows.eps, self.rows.last = eps, rows.last
        return f.view(*self.batch, -1)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], v.shape[:-2])
        if len(lead) > len(self.batch):
            each = zip(*(z.expand(*lead, *z.shape[z.ndim - tail :]) for z, tail in ((k, 1), (h, 1), (v, 2))), strict=True)
            return torch.stack([self.apply(one, other, eps, matrix) for one, other, matrix in each])
        # One unit serves a whole stored matrix: columns of one size keep all their digits whatever their units were.
        size = v.abs().amax(-2, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        return self._apply(k, h, eps, v / size) * size

    def _apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor | None) -> Tensor:
        """The plan times v, or times the points of the columns where they can be multiplied as they are stored."""
        rows, columns = self.rows, self.columns
        w = None if v is None else self._flat(v, 2).float()
        if serves_vectors(k, h) and not transforms.active() and not torch.compiler.is_compiling():
            from ..kernels.apply import exponents  # pyright: ignore[reportMissingImports]

            flat = (self._flat(z, 1).contiguous() for z in (k, h))
            narrow, near, factor, *used = exponents(*flat, rows.offset, columns.offset, eps)
            ends = used if len(narrow) > 1 else (None, None)
            out = streamed_apply(*rows.stored, *columns.stored, rows.form, self.precision, rows.n, narrow, near, w, *ends, eps)
            out = out * factor.unsqueeze(-1)
            return out.view(*self.batch, *out.shape[1:])
        near, top = self._centred(h)
        wide = self._flat(k, 1) - rows.offset + top
        # k - alpha and h - beta may both be large and cancel, so neither is rounded with an offset it need not carry. What rounding k still
        # costs is the same for a whole row, and is given back below; that of h is of the size of the kernel's own.
        narrow = wide.float()
        lost = (wide - narrow).nan_to_num(nan=0.0)  # an empty atom: -inf - -inf
        out = streamed_apply(
            *rows.stored, *columns.stored, rows.form, self.precision, rows.n, narrow, near, w, _used(narrow), _used(near), eps
        )
        out = out.to(wide.dtype) * (lost / eps).exp().unsqueeze(-1)
        return out.view(*self.batch, *out.shape[1:]).to(h.dtype)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        (alpha, u), (beta, v) = ((side.offset.view(*self.batch, -1), side.seen(self.batch)) for side in (self.rows, self.columns))
        k, h = k - alpha, h - beta
        n, m = k.shape[-1], h.shape[-1]
        batch = torch.broadcast_shapes(k.shape[:-1], h.shape[:-1])
        P = torch.empty(*batch, n, m, dtype=self.dtype, device=h.device)
        block = max(1, 2**26 // (m * max(1, batch.numel())))  # the wide temporaries stay small beside the array
        for i in range(0, n, block):
            part = slice(i, i + block)
            z = u[..., part, :] @ v.mT  # float64: no digits to lose, and no setting that lets torch round them
            P[..., part, :] = ((z + h.unsqueeze(-2) + k[..., part].unsqueeze(-1)) / eps).to(self.dtype).exp_()
        return P

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """dL/dC_ij = w_i p_ij gives w (P 1), P^T w, -w (P v) and -P^T (w u): two to four sweeps, half of them for one cloud."""
        wanted = needed(self.inputs)
        nothing = self.inputs[0].new_zeros(())  # for those that autograd drops
        alpha, beta, u, v = (nothing.expand(z.shape) for z in self.inputs)
        columns = w.unsqueeze(-1)
        if wanted[0] or wanted[2]:
            sums, points = self._with_points(k, h, eps)
            alpha, u = w * sums, -columns * points
        if wanted[1] or wanted[3]:
            transposed, side = self.T, self.rows.seen(self.batch)
            if self._room:
                both = transposed.apply(h, k, eps, torch.cat((columns * side, columns), -1))
                beta, v = both[..., -1], -both[..., :-1]
            else:
                beta, v = transposed.apply(h, k, eps, columns).squeeze(-1), -transposed.apply(h, k, eps, columns * side)
        return tuple(grad.sum_to_size(z.shape) for grad, z in zip((alpha, beta, u, v), self.inputs, strict=True))

    def _with_points(self, k: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The plan's row sums, and the plan times the points of the columns."""
        points = self.columns.seen(self.batch)
        ones = torch.ones_like(points[..., :1])
        if self._room:
            both = self.apply(k, h, eps, torch.cat((points, ones), -1))
            return both[..., -1], both[..., :-1]
        sums = self.apply(k, h, eps, ones).squeeze(-1)
        as_stored = self.precision != "tf32" and not self.columns.cloud.packed and h.ndim == k.ndim == len(self.batch) + 1
        return sums, self._apply(k, h, eps, None) if as_stored else self.apply(k, h, eps, points)

    @property
    def _room(self) -> bool:
        """Whether one more column fits in the padding of d: then it costs nothing, and a sweep is saved."""
        d = self.rows.cloud.d
        return d < 16 or d & (d - 1) != 0

    def _centred(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h - beta in float32 (B, m) without its largest entry, which (B, 1) stays wide: an offset costs the others no digits."""
        wide = self._flat(h, 1) - self.columns.offset
        top = wide.amax(-1, keepdim=True)
        top = torch.where(top > -math.inf, top, 0.0)  # only empty atoms
        return (wide - top).float(), top

    def _flat(self, z: Tensor, tail: int) -> Tensor:
        """(*batch, ...) -> (B, ...) in the type of the folded vectors, for the last `tail` axes of z."""
        last = z.shape[z.ndim - tail :]
        return z.expand(*self.batch, *last).reshape(-1, *last).to(self.rows.offset.dtype)


def _used(h: Tensor) -> Tensor | None:
    """(B,) int32: the number of atoms up to the last that is not empty. None for a single problem.

    A batch of ragged problems is padded with empty atoms, h = -inf, and a sweep ends where they begin. Read off h, on the device, and
    not off the weights: the potentials of empty atoms are defined, and gradients may sum over them.
    """
    if h.shape[0] == 1:
        return None
    ends = torch.arange(1, h.shape[-1] + 1, dtype=torch.int32, device=h.device)
    return torch.where(h != -math.inf, ends, 0).amax(-1)  # NaN is no empty atom


_NO_FOLD = (
    "its cost is not alpha_i + beta_j - <u_i, v_j>, as squared Euclidean, cosine and dot costs and their sums with weights >= 0 are. "
    "Where |x - y|^2 serves as well as the cost at hand, use SqEuclidean."
)


@dataclass
class _Side:
    """One of the two clouds, and the last potential found for it, which stays with it under transposition."""

    offset: Tensor  # (B, n) alpha or beta
    points: Tensor  # (B, n, d)
    cloud: Cloud
    last: Tensor | None = None  # (B, n) without the offset
    eps: float = math.nan

    @property
    def n(self) -> int:
        return self.cloud.n

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        return self.cloud.data, self.cloud.unit

    @property
    def form(self) -> list[int]:
        return [self.cloud.d, self.cloud.parts, self.cloud.packed, int(self.cloud.spare)]

    def bound(self, logs: Tensor | None, penalty: Penalty, eps: float) -> Side:
        """The side as kernels take it, with logarithms of weights where they are needed."""
        from ..kernels.streamed import Side  # pyright: ignore[reportMissingImports]

        damping = 1 + eps / penalty.tau if isinstance(penalty, KL) else 1.0
        limit = penalty.tau if isinstance(penalty, TV) else math.inf
        last = self.last if self.eps == eps else None
        return Side(self.cloud, self.offset, self.offset if logs is None else logs, damping, limit, last)

    def seen(self, batch: Sequence[int]) -> Tensor:
        """(*batch, n, d): the points as the kernels see them."""
        points, cloud = self.points, self.cloud
        if cloud.precision != "fp32":
            points = cloud.data[:, : cloud.n, : cloud.d].to(points.dtype) * cloud.unit[:, None, None]
        return points.reshape(*batch, *points.shape[1:])


# As operators, so that torch.compile passes over the launches instead of breaking its graph at them. A cloud crosses as its
# two tensors and `form` = [d, parts, packed, spare]; gradients are attached above, see gradients.py.
_CLOUDS = "Tensor u, Tensor unit_u, Tensor v, Tensor unit_v, int[] form, str precision, int n"


@torch.library.custom_op(
    "gpu_ot::softmin", mutates_args=(), schema=f"({_CLOUDS}, Tensor h, Tensor? shift, Tensor? columns_used, float eps) -> Tensor"
)
def streamed_softmin(
    u: Tensor, unit_u: Tensor, v: Tensor, unit_v: Tensor, form: Sequence[int], precision: str, n: int,
    h: Tensor, shift: Tensor | None, columns_used: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """(B, n) float64 from h (B, m): gpu_ot.kernels.softmin on stored clouds."""
    from ..kernels.softmin import softmin  # pyright: ignore[reportMissingImports]

    rows, columns = _cloud(u, unit_u, n, form, precision), _cloud(v, unit_v, h.shape[-1], form, precision)
    return softmin(rows, columns, h, eps, shift=shift, columns_used=columns_used, wide=True)


@streamed_softmin.register_fake
def _(u, unit_u, v, unit_v, form, precision, n, h, shift, columns_used, eps):  # type: ignore[no-untyped-def]
    return h.new_empty((u.shape[0], n), dtype=torch.float64)


@torch.library.custom_op(
    "gpu_ot::apply",
    mutates_args=(),
    schema=f"({_CLOUDS}, Tensor k, Tensor h, Tensor? w, Tensor? rows_used, Tensor? columns_used, float eps) -> Tensor",
)
def streamed_apply(
    u: Tensor, unit_u: Tensor, v: Tensor, unit_v: Tensor, form: Sequence[int], precision: str, n: int,
    k: Tensor, h: Tensor, w: Tensor | None, rows_used: Tensor | None, columns_used: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """(B, n, c) float32 from k (B, n), h (B, m) and w (B, m, c), or the points of v where w is None: gpu_ot.kernels.apply."""
    from ..kernels.apply import apply  # pyright: ignore[reportMissingImports]

    columns = _cloud(v, unit_v, h.shape[-1], form, precision)
    rows, w = _cloud(u, unit_u, n, form, precision), columns if w is None else w
    return apply(rows, columns, k, h, eps, w, precision=precision, rows_used=rows_used, columns_used=columns_used)


@streamed_apply.register_fake
def _(u, unit_u, v, unit_v, form, precision, n, k, h, w, rows_used, columns_used, eps):  # type: ignore[no-untyped-def]
    return h.new_empty((u.shape[0], n, form[0] if w is None else w.shape[-1]), dtype=torch.float32)


def _cloud(data: Tensor, unit: Tensor, n: int, form: Sequence[int], precision: str) -> Cloud:
    from ..kernels.tiles import Cloud  # pyright: ignore[reportMissingImports]

    d, parts, packed, spare = form
    return Cloud(data, unit, n, d, precision, parts, packed, bool(spare))
