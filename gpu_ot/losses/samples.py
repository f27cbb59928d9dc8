"""Transport as a loss for training: geomloss's SamplesLoss, and a loss over matrices or clouds in this package's own terms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import errors, gradients, transforms
from ..communicator import ROWS
from ..costs import Cost, Euclidean, Matrix, SqEuclidean
from ..distributed.costs import Sharded
from ..errors import ProblemError
from ..geometry.protocol import Geometry, attach, weigh
from ..geometry.select import BACKENDS
from ..penalties import KL
from ..problem import MASS_RTOL_HALF, Problem, float_type, matched, vector_dtype
from ..solution.solution import Solution
from ..solve import solve
from ..solver.status import CONVERGED, STALLED, Status
from .divergence import SelfTerm, at_potentials, divergence

#: (x, y) -> a Cost, or costs (*batch, n, m).
Ground = Callable[[Tensor, Tensor], Cost | Tensor]
#: One entry for each side.
Sides = tuple[Tensor | None, Tensor | None]
#: The costs within each side, where the cost between them does not tell.
Within = tuple[Cost | Tensor | None, Cost | Tensor | None]

_KERNEL_NORMS = ("gaussian", "laplacian", "energy", "hausdorff")


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
    static_y       the target stays as it is: its own term is computed once and kept for as long as y and its weights are the same,
                   unmodified tensors, and carries no gradient.
    group          a process group or DeviceMesh: x, y, a and b are this rank's share of one pair of measures, and the loss is the same on
                   every rank, see `gpu_ot.Sharded`. Without weights every point of the group weighs the same. F and G count all points.

    `diameter`, `scaling`, `truncate` and `cluster_scale` shape geomloss's schedule and its coarse grid, `kernel` its kernel norms:
    taken, kept as attributes, and without effect.

    Call it with (x, y), uniform weights, or (a, x, b, y): points (N, D), (M, D) and weights (N,), (M,), giving a scalar, or all with a
    batch axis in front, giving (B,). Weights need not be normalised and may be 0. Gradients flow to x, y, a and b, through both sides of
    every term, and with reach, too, they are the derivatives of the value. Halves, alone or under autocast, are computed in
    float32 and come back as they were. torch.func.grad, vmap and torch.compile(fullgraph=True) see one opaque operation with a first
    derivative. Raises ProblemError (a ValueError) for arguments without meaning here.

    Feydy et al. 2019, arXiv:1810.08278; Séjourné et al. 2019, arXiv:1910.12958.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Ground | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        tol: float = 1e-4,
        max_iter: int = 10_000,
        plan: bool = False,
        precision: torch.dtype | None = None,
        grad: str = "envelope",
        static_y: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        if loss in _KERNEL_NORMS:
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
        self._kept: _Kept | None = None

    def extra_repr(self) -> str:
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}, tol={self.tol}"

    def forward(self, *args: Tensor, lengths: Sides | None = None, mask: Sides | None = None) -> Any:
        """The loss of (x, y) or (a, x, b, y).

        lengths  ragged batches, padded: how many of the points are real, int (B,) for x and for y; None for a full side.
        mask     the same by flags, bool (B, N) and (B, M): True for real points.

        What lies in the padding does not matter, and its gradient is 0. Weights that are not given are uniform over the real points.
        """
        a, x, b, y = _measures(args)
        target, given = (y, b, (lengths or mask or (None, None))[1]), float_type(x, y)
        if _transformed() and (self.cost is not None or self.plan or self.static_y or self.grad != "envelope" or self.group is not None):
            raise ProblemError(
                "under torch.compile and torch.func SamplesLoss is one opaque operation: leave out cost=, plan=True, static_y=True, group= "
                'and grad="implicit", or call it outside (torch.compiler.disable).'
            )
        if self.group is None:
            a, x, b, y = self._prepared(a, x, b, y, lengths, mask)
        elif lengths is not None or mask is not None:
            raise ProblemError("ranks share one pair of measures, without padding: leave out `lengths` and `mask`.")
        if _transformed():
            reach = self.reach or math.inf
            value, f, g, _, _ = _Transformable.apply(
                a, x, b, y, self.p, self.blur, reach, self.debias, self.backend, self.tol, self.max_iter
            )
            return (f.to(given), g.to(given)) if self.potentials else value.to(given)
        with torch.autocast(x.device.type, enabled=False):
            if self.debias:
                kept = self._kept_term(target)
                problem, within, unit = self._problem(a, x, b, y, within=kept is None)
                found = divergence(
                    problem,
                    cost_aa=within[0],
                    cost_bb=within[1],
                    self_b=kept,
                    backend=_backend(self.backend, problem),
                    grad=self.grad,
                    tol=self.tol,
                    max_iter=self.max_iter,
                )
                solution, status = found.between, found.status
                if self.static_y and not any(z is not None and z.is_inference() for z in target):  # whose changes are not counted
                    self._kept = _Kept(target, tuple(z._version for z in target if z is not None), self._settings(), found.self_b.detach())
            else:
                problem, _, unit = self._problem(a, x, b, y, within=None)
                found = solution = solve(
                    problem, backend=_backend(self.backend, problem), grad=self.grad, tol=self.tol, max_iter=self.max_iter
                )
                status = solution.status
        _report(status, found.n_passes, self.verbose)
        if self.potentials:
            out = tuple((unit * z).to(given) for z in (found.f, found.g))
            return (*out, solution.plan) if self.plan else out
        value = (unit * found.value).to(given)
        return (value, solution.plan) if self.plan else value

    def _prepared(
        self, a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor, lengths: Sides | None, mask: Sides | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in the type to compute in, without padding."""
        given = float_type(x, y)
        dtype = self.precision or (given if given.itemsize >= 4 else torch.float32)
        coarse = any(w is not None and w.is_floating_point() and w.dtype.itemsize < 4 for w in (a, b))
        flags = _flags(x, y, lengths, mask)
        a, x = _real("x", a, x, flags[0], dtype)
        b, y = _real("y", b, y, flags[1], dtype)
        if coarse and self.reach is None:  # masses that differ by the rounding of halves are meant to be the same
            mass = a.sum(-1, keepdim=True)
            b = torch.where((mass - b.sum(-1, keepdim=True)).abs() <= MASS_RTOL_HALF * mass, matched(a, b), b)
        return a, x, b, y

    def _problem(self, a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor, within: bool | None) -> tuple[Problem, Within, float]:
        """The problem, the costs within x and y where its cost does not tell (y's if `within`), and what a unit of cost is worth."""
        reach = self.reach or math.inf
        if self.group is not None:
            given = float_type(x, y)
            x, y = (z.to(self.precision or (given if given.itemsize >= 4 else torch.float32)) for z in (x, y))
            if self.cost is None:
                problem, unit = _between_samples(a, x, b, y, self.p, self.blur, reach, self.group)
                return problem, (None, None), unit
            cost = _ground(self.cost, x, y)
            if cost.stored:
                raise ProblemError("with group=, cost must be a gpu_ot.Cost between clouds: no rank holds all points for a matrix.")
            return Problem(Sharded(cost, self.group), self.blur**self.p, a, b, KL(reach**self.p)), (None, None), 1.0
        if self.cost is not None:
            problem = Problem(_ground(self.cost, x, y), self.blur**self.p, a, b, KL(reach**self.p))
            if within is None or _knows_points(problem.cost):
                return problem, (None, None), 1.0
            return problem, (_ground(self.cost, x, x), _ground(self.cost, y, y) if within else None), 1.0
        problem, unit = _between_samples(a, x, b, y, self.p, self.blur, reach)
        return problem, (None, None), unit

    def _settings(self) -> tuple[object, ...]:
        return self.p, self.blur, self.reach, self.cost, self.precision, self.tol

    def _kept_term(self, target: tuple[Tensor | None, ...]) -> SelfTerm | None:
        """The term of a static target, if it was computed for these very tensors."""
        if not self.static_y:
            return None
        if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in target):
            raise ProblemError("static_y=True keeps the target's own term without its gradient, and y or its weights ask for one.")
        return self._kept.term if self._kept is not None and self._kept.serves(target, self._settings()) else None


class SinkhornLoss(nn.Module):
    """Entropic transport as a loss, for costs or for clouds: OT_eps(a, b), or <P, C> with the plan taken as given.

    eps          > 0, in units of the cost.
    tau          None holds the marginals exactly; a number, or a pair (rows, columns), relaxes them by tau KL, in units of the cost.
                 eps and tau may be tensors of one number, parameters say, and get derivatives, too (grad="envelope").
    cost         what moving x_i to y_j costs, (x, y) -> Cost or costs (*batch, n, m); for clouds only.
    reduction    "mean" or "sum" over the batch, "none" for each problem's own, (*batch,).
    detach_plan  False: the value <C, P> + eps KL(P | a⊗b) + penalties, whose gradients in C, x, y, a and b are exact at convergence.
                 True: sum_ij P_ij C_ij with P constant, whose gradient in C is P itself, and in x and y that of the cost under P.
    backend, grad, tol, max_iter  as in `gpu_ot.solve`.

    Call it with costs (*batch, n, m), with a gpu_ot.Cost, or with clouds x (*batch, n, d) and y (*batch, m, d), and weights a=(*batch, n)
    and b=(*batch, m), uniform when left out. Nothing n by m is formed for clouds that are streamed. Raises what `gpu_ot.solve` raises;
    not converging is a warning.

    Cuturi 2013, arXiv:1306.0895; Feydy et al. 2019, arXiv:1810.08278, equation (9).
    """

    def __init__(
        self,
        eps: float | Tensor,
        tau: float | Tensor | tuple[float | Tensor, float | Tensor] | None = None,
        cost: Ground = SqEuclidean,
        reduction: str = "mean",
        detach_plan: bool = False,
        *,
        backend: str = "auto",
        grad: str = "envelope",
        tol: float = 1e-4,
        max_iter: int = 10_000,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise errors.unknown("reduction", reduction, ["mean", "sum", "none"])
        self.eps, self.tau, self.cost, self.reduction, self.detach_plan = eps, tau, cost, reduction, detach_plan
        self.backend, self.grad, self.tol, self.max_iter = backend, grad, tol, max_iter

    def extra_repr(self) -> str:
        return f"eps={self.eps}, tau={self.tau}, reduction={self.reduction!r}, detach_plan={self.detach_plan}"

    def forward(self, x: Tensor | Cost, y: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        if not isinstance(x, (Tensor, Cost)):
            raise errors.not_a_tensor("x", x)
        if not isinstance(x, Tensor) and y is not None:
            raise ProblemError("a Cost is bound to both clouds already: leave y out.")
        device = x.device if isinstance(x, Tensor) else next(iter(x.inputs.values())).device
        rows, columns = self.tau if isinstance(self.tau, tuple) else (self.tau, self.tau)
        rows, columns = (KL(math.inf if tau is None else tau) for tau in (rows, columns))  # pyright: ignore[reportArgumentType]
        with torch.autocast(device.type, enabled=False):
            cost = self.cost(x, y) if isinstance(x, Tensor) and y is not None else x
            problem = Problem(cost, self.eps, a, b, (rows, columns))
            solution = solve(problem, backend=self.backend, grad=self.grad, tol=self.tol, max_iter=self.max_iter)
            value = held_cost(solution) if self.detach_plan else solution.value
        if solution.status not in (CONVERGED, STALLED):
            warnings.warn(f"SinkhornLoss, {solution.n_iter} iterations, {solution.status}", RuntimeWarning, stacklevel=4)
        return value if self.reduction == "none" else value.mean() if self.reduction == "mean" else value.sum()


class _Kept(NamedTuple):
    """A term and what it was computed for. The tensors are held, so that no other can take their place in memory."""

    target: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    settings: tuple[object, ...]
    term: SelfTerm

    def serves(self, target: tuple[Tensor | None, ...], settings: tuple[object, ...]) -> bool:
        same = len(target) == len(self.target) and all(new is old for new, old in zip(target, self.target, strict=True))
        return same and self.settings == settings and self.versions == tuple(z._version for z in target if z is not None)


def _report(status: Status, n_passes: int, verbose: bool) -> None:
    if verbose:
        print(f"SamplesLoss, {n_passes} passes over the pairs, {status}")
    if status not in (CONVERGED, STALLED):  # stalled is as good as the type allows
        warnings.warn(f"SamplesLoss, {n_passes} passes over the pairs, {status}", RuntimeWarning, stacklevel=5)


def _between_samples(
    a: Tensor | None, x: Tensor, b: Tensor | None, y: Tensor, p: float, blur: float, reach: float, group: Any = None
) -> tuple[Problem, float]:
    """The problem with C = |x - y|^p / p, p = 1 or 2, in units of its own, and what one of these is worth."""
    # Lengths are counted in units of about blur, so that no power of them leaves the range of float32; a power of 2 moves no digit.
    grain = 2.0 ** math.floor(math.log2(blur))
    x, y, blur, reach = x / grain, y / grain, blur / grain, reach / grain
    kind, half = (Euclidean, 1.0) if p == 1 else (SqEuclidean, 0.5)  # |x - y|^2 / 2 by its units, not by one more array
    cost = kind(x, y) if group is None else Sharded(kind(x, y), group)
    return Problem(cost, blur**p / half, a, b, KL(reach**p / half)), half * grain**p


def _backend(name: str, problem: Problem) -> str:
    """geomloss's name in ours: the first backend of that kind that takes the problem. What is a matrix already is not streamed."""
    if name not in ("tensorized", "online", "multiscale"):
        return name
    problem = problem.cost.ranks.largest(problem)
    streaming = ("triton", "keops") if problem.a.is_cuda else ()
    taken = [one for one in (*streaming, "chunked") if BACKENDS[one].refuse(problem) is None]
    return taken[0] if taken and name != "tensorized" else "dense"


class _PlanCost(gradients.Each):
    """sum_ij P_ij C_ij with P held: the derivative in C_ij is P_ij = exp((k_i + h_j - C_ij) / eps) where it stands."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        geometry: Geometry, eps: float, value: Tensor, k: Tensor, h: Tensor, *inputs: Tensor
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.eps, _, *given = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, h, *inputs = ctx.saved_tensors
        w = grad_outputs[0].to(k.dtype).unsqueeze(-1).expand_as(k)
        geometry = attach(ctx.geometry, inputs)
        if torch.is_grad_enabled():
            return None, None, None, None, None, *gradients.pull_held(geometry, k, h, ctx.eps, w)
        return None, None, None, None, None, *geometry.pull_back(k, h, ctx.eps, w)


def held_cost(solution: Solution) -> Tensor:
    """<P, C> with P constant."""
    problem, geometry = solution.problem, solution.geometry
    k, h = (weigh(z.detach(), w.detach(), problem.eps) for z, w in ((solution.f, problem.a), (solution.g, problem.b)))
    return _PlanCost.apply(geometry, problem.eps, solution.sharp_cost.detach(), k, h, *geometry.inputs)


def _transformed() -> bool:
    """Whether tensors are stand-ins, whose numbers no loop can look at: under torch.compile, torch.func and vmap."""
    return torch.compiler.is_compiling() or transforms.active()


@torch.library.custom_op("gpu_ot::samples_loss", mutates_args=())
def _samples_loss(
    a: Tensor,
    x: Tensor,
    b: Tensor,
    y: Tensor,
    p: float,
    blur: float,
    reach: float,
    debias: bool,
    backend: str,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value, f, g, f_aa, g_bb) as one operation, opaque to whatever transforms the program around it.

    It keeps potentials for its derivative, which forms the costs anew: O(n + m) memory between the two, one sweep a term more.
    """

    def work() -> tuple[Tensor, ...]:
        problem, unit = _between_samples(a.detach(), x.detach(), b.detach(), y.detach(), p, blur, reach)
        settings: dict[str, Any] = dict(backend=_backend(backend, problem), tol=tol, max_iter=max_iter)
        if debias:
            found = divergence(problem, **settings)
            status, out = found.status, (found.value, found.f, found.g, found.self_a.f, found.self_b.f)
        else:
            found = solve(problem, **settings)
            status, out = found.status, (found.value, found.f, found.g, torch.zeros_like(found.f), torch.zeros_like(found.g))
        _report(status, found.n_passes, False)
        return (unit * out[0]).to(x.dtype), *((unit * z).contiguous() for z in out[1:])

    value, f, g, f_aa, g_bb = transforms.outside(work, x)
    return value, f, g, f_aa, g_bb


@torch.library.custom_op("gpu_ot::samples_loss_backward", mutates_args=())
def _samples_loss_backward(
    grad: Tensor,
    a: Tensor,
    x: Tensor,
    b: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    f_aa: Tensor,
    g_bb: Tensor,
    p: float,
    blur: float,
    reach: float,
    debias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:

    def work() -> tuple[Tensor, ...]:
        leaves = [z.detach().requires_grad_() for z in (a, x, b, y)]
        problem, unit = _between_samples(leaves[0], leaves[1], leaves[2], leaves[3], p, blur, reach)
        own = (f_aa / unit, g_bb / unit) if debias else None
        value = at_potentials(problem, (f + f_aa) / unit, (g + g_bb) / unit, own, _backend(backend, problem))
        return torch.autograd.grad(unit * value, leaves, grad.to(value.dtype))

    da, dx, db, dy = (z.contiguous() for z in transforms.outside(work, x))
    return da, dx, db, dy


@_samples_loss.register_fake
def _(a: Tensor, x: Tensor, b: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    wide = vector_dtype(x.device)
    f, g = a.new_empty(x.shape[:-1], dtype=wide), b.new_empty(y.shape[:-1], dtype=wide)
    return x.new_empty(x.shape[:-2]), f, g, torch.empty_like(f), torch.empty_like(g)


@_samples_loss_backward.register_fake
def _(grad: Tensor, a: Tensor, x: Tensor, b: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return a.new_empty(a.shape), x.new_empty(x.shape), b.new_empty(b.shape), y.new_empty(y.shape)


class _Transformable(torch.autograd.Function):
    """The operation with its derivative, in the form that torch.func and torch.compile can take apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _samples_loss(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.settings = inputs[4:9]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The compiler does not trace a Function within a Function, and torch.func takes no operation without one.
        derivative = _samples_loss_backward if torch.compiler.is_compiling() else _Derivative.apply
        return (*derivative(grad_outputs[0], *ctx.saved_tensors, *ctx.settings), *[None] * 7)


class _Derivative(torch.autograd.Function):
    """The first derivative, and a refusal of the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _samples_loss_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("SamplesLoss has first derivatives under torch.func and torch.compile: its potentials are held still.")


def _by_batch(op: Any) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    """vmap is what the solver does anyway: one more batch axis in front."""

    def mapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        moved = [
            z if not isinstance(z, Tensor) else z.expand(info.batch_size, *z.shape) if dim is None else z.movedim(dim, 0)
            for z, dim in zip(args, in_dims, strict=True)
        ]
        out = op(*moved)
        return out, (0,) * len(out)

    return mapped


_samples_loss.register_vmap(_by_batch(_samples_loss))
_samples_loss_backward.register_vmap(_by_batch(_samples_loss_backward))


def _measures(args: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    if len(args) == 6:
        raise ProblemError(
            "labels (l_x, a, x, l_y, b, y) tell geomloss's multiscale backend its clusters; here nothing is clustered: pass (a, x, b, y)."
        )
    if len(args) not in (2, 4):
        raise ProblemError(f"SamplesLoss takes (x, y) or (a, x, b, y), found {len(args)} arguments.")
    a, x, b, y = (None, args[0], None, args[1]) if len(args) == 2 else args
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor):
            raise errors.not_a_tensor(name, z)
        if z.ndim not in (2, 3) or z.ndim != x.ndim or z.shape[-1] != x.shape[-1]:
            raise errors.wrong_shape(name, z.shape, "points (N, D) or (B, N, D), the other cloud alike")
    return a, x, b, y


def _flags(x: Tensor, y: Tensor, lengths: Sides | None, mask: Sides | None) -> Sides:
    """Which points are real, bool (*batch, n), for each side; None for all."""
    if lengths is not None and mask is not None:
        raise ProblemError("pass `lengths` or `mask`: either says which points are real.")
    if mask is not None:
        for name, z, flag in zip("xy", (x, y), mask, strict=True):
            if flag is not None and (flag.dtype != torch.bool or flag.shape != z.shape[:-1]):
                raise errors.wrong_shape(f"the mask of {name} ({flag.dtype})", flag.shape, f"bool {errors.shape(z.shape[:-1])}")
        return mask
    flags: list[Tensor | None] = []
    for name, z, count in zip("xy", (x, y), lengths or (None, None), strict=True):
        if count is None:
            flags.append(None)
            continue
        if count.is_floating_point() or count.shape != z.shape[:-2]:
            raise errors.wrong_shape(f"the lengths of {name} ({count.dtype})", count.shape, f"integers {errors.shape(z.shape[:-2])}")
        flags.append(torch.arange(z.shape[-2], device=z.device) < count.to(z.device).unsqueeze(-1))
    return flags[0], flags[1]


def _real(name: str, w: Tensor | None, z: Tensor, flags: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weights, points) in `dtype`. Padding has weight 0 and lies on the first real point: no NaN, and nothing far from the others."""
    z = z.to(dtype)
    if w is None:
        real = z.new_ones(z.shape[:-1]) if flags is None else flags.to(dtype)
        w = real / real.sum(-1, keepdim=True)
    else:
        if w.shape == (*z.shape[:-1], 1):
            w = w.squeeze(-1)
        if w.ndim == 0 or w.shape[-1] != z.shape[-2] or w.ndim > z.ndim - 1:
            raise errors.wrong_shape(f"the weights of {name}", w.shape, errors.shape(z.shape[:-1]))
        w = w.to(dtype).expand(z.shape[:-1])
    if flags is not None:
        first = flags.int().argmax(-1, keepdim=True).unsqueeze(-1)
        w = torch.where(flags, w, 0.0)
        z = torch.where(flags.unsqueeze(-1), z, z.detach().take_along_dim(first, -2))
    return w, z


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
