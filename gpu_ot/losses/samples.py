"""Transport between samples as a loss for training: geomloss's SamplesLoss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import at_once, errors, transforms
from ..communicator import ROWS
from ..costs import Cost, Matrix
from ..distributed.costs import Sharded
from ..errors import ProblemError
from ..penalties import KL
from ..problem import MASS_RTOL_HALF, Problem, float_type, matched
from ..solve import solve
from . import foreign
from .compiled import samples_loss
from .divergence import SelfTerm, divergence
from .measures import Sides, backend_for, between_samples, flags, measures, real, report

#: (x, y) -> a Cost, or costs (*batch, n, m).
Ground = Callable[[Tensor, Tensor], Cost | Tensor]


class SamplesLoss(nn.Module):
    """geomloss's `SamplesLoss("sinkhorn")`: the debiased Sinkhorn divergence between weighted samples. Same arguments, same values.

    With C = |x - y|^p / p, eps = blur^p and tau = reach^p:  S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + eps/2 (|a| - |b|)^2.

    p            1 or 2. For another cost pass `cost`; p then only sets the units of blur and reach.
    blur, reach  in the unit of the points. reach=None holds the marginals exactly.
    cost         (x, y) -> (B, N, M) from points (B, N, D) and (B, M, D), or to a gpu_ot.Cost, `gpu_ot.Cosine` say, which can be streamed.
    debias       False for OT(a, b) alone.
    potentials   return (F, G), (N,) and (M,) or (B, N) and (B, M), in place of the value: debiased.
    verbose      print how each solve ended.
    backend      geomloss's "auto", "tensorized", "online", "multiscale", or one of gpu_ot's, see `gpu_ot.explain`.

    Where geomloss stops when its schedule does, this converges:

    tol, max_iter  L1 error of the marginals as a fraction of the mass; iterations at most, beyond which a warning says why.
    plan           return the lazy plan between x and y as well: (value, plan), or (F, G, plan).
    precision      compute in this type whatever the type of the points, torch.float64 say; values come back in that of the points.
    grad           "envelope", or "implicit", with which F and G carry gradients, too, and the value second derivatives (set a small tol).
    static_y       the target is constant: its own term is computed once and reused while y and its weights are the same, unmodified
                   tensors. It carries no gradient.
    group          a process group or DeviceMesh: x, y, a and b are this rank's share of one pair of measures, see `gpu_ot.Sharded`. The
                   loss is the same on every rank. Without weights every point of the group weighs the same. F and G cover all points.

    `diameter`, `scaling`, `truncate` and `cluster_scale` shape geomloss's schedule and its coarse grid, `kernel` its kernel norms.
    Here they are attributes without effect.

    Call it with (x, y), uniform weights, or (a, x, b, y): points (N, D), (M, D) and weights (N,), (M,), giving a scalar, or all with a
    batch axis in front, giving (B,). Weights need not be normalised and may be 0. Gradients flow to x, y, a and b, through both sides of
    every term; they are the derivatives of the value, also with reach. Halves, alone or under autocast, are computed in float32 and
    returned as halves. torch.func.grad, vmap and torch.compile(fullgraph=True) see one opaque operation with a first derivative.
    Raises ProblemError (a ValueError) for arguments without meaning here.

    Feydy et al. 2019, arXiv:1810.08278; Séjourné et al. 2019, arXiv:1910.12958.
    """

    #: geomloss's other losses, which are not transport.
    KERNEL_NORMS = ("gaussian", "laplacian", "energy", "hausdorff")

    def __init__(
        self, loss: str = "sinkhorn", p: float = 2, blur: float = 0.05, reach: float | None = None, diameter: float | None = None,
        scaling: float = 0.5, truncate: float | None = 5, cost: Ground | None = None, kernel: Any = None,
        cluster_scale: float | None = None, debias: bool = True, potentials: bool = False, verbose: bool = False, backend: str = "auto",
        *, tol: float = 1e-4, max_iter: int = 10_000, plan: bool = False, precision: torch.dtype | None = None, grad: str = "envelope",
        static_y: bool = False, group: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        foreign.refuse("SamplesLoss", others)
        if loss in self.KERNEL_NORMS:
            raise ProblemError(f'loss = "{loss}" is a kernel norm, not optimal transport: use geomloss.SamplesLoss("{loss}") for it.')
        if loss != "sinkhorn":
            raise errors.unknown("loss", loss, ["sinkhorn"])
        if cost is not None and not callable(cost):
            raise ProblemError(f"cost = {cost!r} is not callable: pass a function (x, y) -> costs (B, N, M), or a kind of gpu_ot.Cost.")
        if cost is None and p not in (1, 2):
            raise ProblemError(f"p must be 1 or 2, found {p}. For |x - y|^p / p pass cost=lambda x, y: torch.cdist(x, y) ** p / p.")
        for name, length in (("blur", blur), ("reach", reach)):
            if length is not None and not 0 < length < math.inf and not (name == "reach" and length == math.inf):
                raise ProblemError(f"{name} must be a length > 0 in the unit of the points, found {length}.")
        self.loss, self.p, self.blur, self.reach, self.cost = loss, p, blur, reach, cost
        self.diameter, self.scaling, self.truncate, self.kernel, self.cluster_scale = diameter, scaling, truncate, kernel, cluster_scale
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend
        self.tol, self.max_iter, self.plan, self.precision = tol, max_iter, plan, precision
        self.grad, self.static_y, self.group = grad, static_y, group
        #: The target's tensors, the state they had, and its term. Held, so that no other tensor takes their place in memory.
        self._kept: tuple[tuple[Tensor | None, ...], tuple[object, ...], SelfTerm] | None = None

    def extra_repr(self) -> str:
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}, tol={self.tol}"

    def forward(self, *args: Tensor, lengths: Sides | None = None, mask: Sides | None = None) -> Any:
        """The loss of (x, y) or (a, x, b, y).

        lengths  of padded batches: how many of the points are real, int (B,) for x and for y; None for a full side.
        mask     the same by flags, bool (B, N) and (B, M): True for real points.

        Padding may hold anything, and its gradient is 0. Weights that are not given are uniform over the real points.
        """
        a, x, b, y = measures(args)
        target, given = (y, b, (lengths or mask or (None, None))[1]), float_type(x, y)
        dtype = self.precision or (given if given.itemsize >= 4 else torch.float32)
        transformed = torch.compiler.is_compiling() or transforms.active()  # tensors hide their numbers from the loop
        if transformed and (self.cost is not None or self.plan or self.static_y or self.grad != "envelope" or self.group is not None):
            raise ProblemError(
                "under torch.compile and torch.func SamplesLoss is one opaque operation: leave out cost=, plan=True, static_y=True, group= "
                'and grad="implicit", or call it outside (torch.compiler.disable).'
            )
        if self.group is None:
            a, x, b, y = self._prepared(a, x, b, y, lengths, mask, dtype)
        elif lengths is not None or mask is not None:
            raise ProblemError("ranks share one pair of measures, without padding: leave out `lengths` and `mask`.")
        else:
            x, y = x.to(dtype), y.to(dtype)
        if transformed:
            reach = self.reach or math.inf
            value, f, g, _, _ = samples_loss(a, x, b, y, self.p, self.blur, reach, self.debias, self.backend, self.tol, self.max_iter)
            return (f.to(given), g.to(given)) if self.potentials else value.to(given)
        with torch.autocast(x.device.type, enabled=False):
            kept = self._kept_term(target) if self.debias else None
            problem, unit = self._problem(a, x, b, y)
            plain = not (self.cost or self.group or self.potentials or self.plan or self.static_y) and self.grad == "envelope"
            if plain and self.backend == "auto" and at_once.serves(problem):
                known = at_once.divergence(problem, self.debias, self.tol, self.max_iter)
                if known is not None:
                    value, status, n_sweeps = known
                    report(status, n_sweeps, self.verbose)
                    return (unit * value).to(given)
            options: dict[str, Any] = dict(backend=backend_for(self.backend, problem), grad=self.grad, tol=self.tol, max_iter=self.max_iter)
            if self.debias:
                cost_aa, cost_bb = self._within(problem.cost, x, y, kept is None)
                found = divergence(problem, cost_aa=cost_aa, cost_bb=cost_bb, self_b=kept, **options)
                if self.static_y and not any(z is not None and z.is_inference() for z in target):  # whose changes are not counted
                    self._kept = target, self._state(target), found.self_b.detach()
            else:
                found = solve(problem, **options)
        report(found.status, found.n_sweeps, self.verbose)
        values = (found.f, found.g) if self.potentials else (found.value,)
        out: list[Any] = [(unit * z).to(given) for z in values] + [found.plan] * self.plan
        return tuple(out) if len(out) > 1 else out[0]

    def _prepared(
        self, a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor, lengths: Sides | None, mask: Sides | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in `dtype`, without padding."""
        halves = any(w is not None and w.is_floating_point() and w.dtype.itemsize < 4 for w in (a, b))
        real_x, real_y = flags(x, y, lengths, mask)
        a, x = real("x", a, x, real_x, dtype)
        b, y = real("y", b, y, real_y, dtype)
        if halves and self.reach is None:  # masses that differ by the rounding of halves are meant to be the same
            mass = a.sum(-1, keepdim=True)
            b = torch.where((mass - b.sum(-1, keepdim=True)).abs() <= MASS_RTOL_HALF * mass, matched(a, b), b)
        return a, x, b, y

    def _problem(self, a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor) -> tuple[Problem, float]:
        """The problem, and the size of its unit of cost."""
        reach = self.reach or math.inf
        if self.cost is None:
            return between_samples(a, x, b, y, self.p, self.blur, reach, self.group)
        cost = _ground(self.cost, x, y)
        if self.group is not None:
            if cost.stored:
                raise ProblemError("with group=, cost must be a gpu_ot.Cost between clouds: no rank holds all points for a matrix.")
            cost = Sharded(cost, self.group)
        return Problem(cost, self.blur**self.p, a, b, KL(reach**self.p)), 1.0

    def _within(self, cost: Cost, x: Tensor, y: Tensor, both: bool) -> tuple[Cost | None, Cost | None]:
        """The costs within x and, for `both`, within y; None where the cost between them knows its points."""
        if self.cost is None or self.group is not None or _knows_points(cost):
            return None, None
        return _ground(self.cost, x, x), _ground(self.cost, y, y) if both else None

    def _state(self, target: tuple[Tensor | None, ...]) -> tuple[object, ...]:
        """All that a kept term depends on beside the tensors themselves."""
        versions = (None if z is None else z._version for z in target)
        return self.p, self.blur, self.reach, self.cost, self.precision, self.tol, *versions

    def _kept_term(self, target: tuple[Tensor | None, ...]) -> SelfTerm | None:
        """The term of a static target, if it was computed for these very tensors."""
        if not self.static_y:
            return None
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in target):
            raise ProblemError("static_y=True keeps the target's own term without its gradient, and y or its weights ask for one.")
        if self._kept is None:
            return None
        tensors, state, term = self._kept
        same = all(new is old for new, old in zip(target, tensors, strict=True))
        return term if same and state == self._state(target) else None


def _ground(cost: Ground, x: Tensor, y: Tensor) -> Cost:
    """The user's cost between two clouds. geomloss always calls its functions with a batch axis."""
    C = cost(x, y) if x.ndim == 3 or isinstance(cost, type) else cost(x.unsqueeze(0), y.unsqueeze(0))
    if not isinstance(C, (Tensor, Cost)):
        raise errors.not_a_tensor("cost(x, y)", C)
    bound = Matrix(C) if isinstance(C, Tensor) else C
    if x.ndim == 3 or len(bound.shape) == 2:
        return bound
    sides = bound.sides or [ROWS] * len(bound.inputs)
    return bound.of(z if side is None else z.squeeze(0) for z, side in zip(bound.inputs.values(), sides, strict=True))


def _knows_points(cost: Cost) -> bool:
    try:
        return cost.points is not None
    except ProblemError:
        return False
