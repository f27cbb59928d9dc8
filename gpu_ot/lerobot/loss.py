"""The alignment loss: <P, M> with P the unbalanced entropic plan of the detached costs, so that the gradient is that of M alone.

Cheng et al. 2025, arXiv:2509.18631, section 4. Every term is a weighted squared distance, so M is one squared distance between
concatenated features scaled by sqrt(weight), and the whole loss one solve in which nothing n by m need exist.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import at_once, errors
from ..costs import Cost, Matrix, SqEuclidean
from ..errors import ProblemError
from ..penalties import KL
from ..problem import Problem, vector_dtype
from ..solution.solution import Solution
from ..solve import solve
from ..solver.status import CONVERGED, STALLED, Status
from .config import COST_SCALES, REFERENCES, OTCostConfig, OTLossConfig, TransportConfig, call
from .features import Term, terms, weighted

#: Below this share of the mass the plan has collapsed: the loss is off.
COLLAPSED = 1e-3
#: Metrics are 0-d tensors where the loss is: copying them to the host is the caller's, see `floats`.
Metrics = dict[str, Tensor]
#: Term -> costs (n, m).
Costs = Mapping[str, Tensor]


class Aligned(NamedTuple):
    """The loss, its metrics, the plan (n, m), detached, and the terms' names with a tensor of whether each is finite: see `refuse_nan`."""

    loss: Tensor
    metrics: Metrics
    plan: Callable[[], Tensor]
    finite: tuple[list[str], Tensor]


class CostScale:
    """The running average that costs are divided by, see TransportConfig. Without one, a batch is divided by its own.

    shared  among the ranks of torch.distributed, which all must then come here at every step: one number, the mean of theirs.
    """

    def __init__(self, shared: bool = False) -> None:
        self.value: Tensor | None = None
        self.shared = shared

    def of(self, cost: Cost, cfg: TransportConfig) -> Tensor:
        """0-d, after this batch; 1 for "none"."""
        kind, q = call(cfg.cost_scale, "cost_scale", COST_SCALES)
        if kind == "none":
            return torch.ones((), device=next(iter(cost.inputs.values())).device)
        if q is None:
            now = cost.scale(kind)
        else:
            sample = wide(cost.sample(1024)).flatten()
            now = sample.kthvalue(max(1, math.ceil(q * len(sample)))).values
        if self.shared and (world := _world()) > 1:
            torch.distributed.all_reduce(now)
            now = now / world
        if not now > 0:
            raise ProblemError(f"cost_scale: {cfg.cost_scale} of this batch's costs is {float(now):g}: all of its pairs coincide.")
        self.value = now if self.value is None else cfg.momentum * self.value.to(now.dtype).to(now) + (1 - cfg.momentum) * now
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {} if self.value is None else {"value": float(self.value)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = torch.tensor(state["value"], dtype=torch.float64) if "value" in state else None


def compute_ot_loss_for_policy(
    policy: nn.Module,
    src_obs: Mapping[str, Any],
    tgt_obs: Mapping[str, Any],
    cfg: OTLossConfig,
    *,
    scale: CostScale | None = None,
    reference: Tensor | None = None,
    gather: bool = False,
    metrics: bool = True,
) -> tuple[Tensor, Metrics]:
    """(loss, metrics) of aligning two batches of observations, (n, ...) and (m, ...), in the policy's own embedding.

    policy     as it is, or inside torch.compile or DistributedDataParallel.
    src_obs, tgt_obs  feature -> tensor or array; a side {"obs": {...}, "actions": ...} of LeRobotOTPairDataset as well.
    scale      a CostScale that lives through the training, for cfg.cost_scale.
    reference  a measure (n, m) of one's own in place of cfg.reference; rows and columns without any get no mass.
    gather     one problem over the batches of all ranks; the gradient is scaled so that the mean over ranks, as DDP takes it, is right.
    metrics    False: an empty dict, and the passes that they take saved.

    Metrics: ot_loss; ot_pi_sum, the mass that moves; for n = m ot_pi_diag and ot_diag_ratio, the part of it on pairs (i, i); ot_iters,
    ot_marginal_error, ot_plan_entropy (0 a matching, 1 a⊗b); of each term ot_cost/<term>, its mean over all pairs without term_weight,
    ot_share/<term>, its share of the mean of M, and ot_moved/<term>, its part of ot_loss.

    Raises ProblemError for a key, slice or embedding that does not fit, reference: diagonal of n != m, and NaN in a feature: with
    reference: diagonal only along with metrics, since its closed form never waits for the device (`attach_ot` looks a step later).
    """
    return align(terms(policy, src_obs, tgt_obs, cfg), cfg, scale or CostScale(), reference, gather, metrics)[:2]


def align(
    found: list[Term], cfg: OTLossConfig, scale: CostScale, reference: Tensor | None = None, gather: bool = False, metrics: bool = True
) -> Aligned:
    """`compute_ot_loss_for_policy` of terms, with the plan."""
    with torch.autocast(found[0].x.device.type, enabled=False):
        ranks = _world() if gather else 1
        if ranks > 1:
            _same_sizes(found[0])
            found = [term._replace(x=_everyone(term.x), y=_everyone(term.y)) for term in found]
        finite = [term.name for term in found], torch.stack([term.x.isfinite().all() & term.y.isfinite().all() for term in found])
        try:
            loss, told, plan = _of_terms(found, cfg, scale, reference, metrics)
        except ProblemError:
            refuse_nan(*finite)
            raise
        return Aligned(loss if ranks == 1 else loss.detach() + ranks * (loss - loss.detach()), told, plan, finite)


def refuse_nan(names: list[str], finite: Tensor) -> None:
    """Raises ProblemError for the first term that is not finite. Waits for the device."""
    if bad := [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]:
        raise ProblemError(f'the term "{bad[0]}" holds NaN or infinity: look at its features and their normalisation.')


def compute_ot_loss_from_terms(
    term_costs: Costs, cfg: OTCostConfig, *, scale: CostScale | None = None, reference: Tensor | None = None, metrics: bool = True
) -> tuple[Tensor, Metrics]:
    """(loss, metrics) for costs (n, m) of the caller's, by the names that cfg.terms weigh. As `compute_ot_loss_for_policy` otherwise.

    Raises ProblemError for a term without costs, and for costs of two shapes.
    """
    if not cfg.terms:
        raise ProblemError("cfg.terms is empty: name at least one of the costs, and its weight.")
    if missing := [term.name for term in cfg.terms if term.name not in term_costs]:
        raise ProblemError(f'term_costs has no "{missing[0]}"; it has {", ".join(term_costs) or "nothing"}.')
    wide = {term.name: C if (C := term_costs[term.name]).dtype == torch.float64 else C.float() for term in cfg.terms}
    first = wide[cfg.terms[0].name]
    for name, C in wide.items():
        if C.shape != first.shape or C.ndim != 2:
            raise errors.wrong_shape(f'the cost "{name}"', C.shape, f"(n, m), all terms alike; the first is {errors.shape(first.shape)}")
    with torch.autocast(first.device.type, enabled=False):
        M = torch.stack([term.weight * wide[term.name] for term in cfg.terms]).sum(0)
        units = (scale or CostScale()).of(Matrix(M.detach()), cfg).to(M)
        M = M / units
        loss, plan, solution = _transport(Matrix(M), cfg, reference, M.diagonal)
        if not metrics:
            return loss, {}
        P, costs = plan.to_dense().to(M), [wide[term.name].detach() for term in cfg.terms]
        parts = [(term.name, term.weight, C.mean(), (P * C).sum() / units) for term, C in zip(cfg.terms, costs, strict=True)]
        return loss, _metrics(loss, plan, solution, parts)


def floats(metrics: Metrics) -> dict[str, float]:
    """The metrics on the host, by one copy."""
    if not metrics:
        return {}
    return dict(zip(metrics, torch.stack([wide(z.detach()) for z in metrics.values()]).tolist(), strict=True))


def alarm(metrics: Mapping[str, float], cfg: TransportConfig) -> str | None:
    """What to say when the plan has lost its mass, which turns the loss off without a word; None while it has not."""
    mass = metrics.get("ot_pi_sum", 1.0)
    if mass >= COLLAPSED:
        return None
    shares = {name.removeprefix("ot_share/"): share for name, share in metrics.items() if name.startswith("ot_share/")} or {"": 1.0}
    heaviest = max(shares, key=lambda name: shares[name])
    return (
        f"ot_pi_sum is {mass:.2g}: almost no mass moves, so the OT loss is off. Moving costs far more than tau_src + tau_tgt = "
        f'{sum(cfg.taus):g}, what letting go of it costs; "{heaviest}" makes {shares[heaviest]:.0%} of the cost. Raise both taus towards '
        f"the typical cost, lower the weights (that of {heaviest} first), or set cost_scale: mean."
    )


class _OneToOne:
    """The plan where only pairs (i, i) move mass `p` (n,): as much of a plan of the solver's as is asked of it here."""

    def __init__(self, p: Tensor) -> None:
        self.p, self.marginals, self.shape = p, (p, p), (len(p), len(p))

    def diagonal(self) -> Tensor:
        return self.p

    def to_dense(self) -> Tensor:
        return self.p.diag()

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.p.to(v).unsqueeze(-1) * v


def _of_terms(
    found: list[Term], cfg: TransportConfig, scale: CostScale, reference: Tensor | None, metrics: bool
) -> tuple[Tensor, Metrics, Callable[[], Tensor]]:
    x, y = weighted(term[1:] for term in found)
    units = scale.of(SqEuclidean(x.detach(), y.detach()), cfg).to(x)
    x, y = x / units.sqrt(), y / units.sqrt()
    if not metrics and reference is None and cfg.reference == "product" and (known := _directly(SqEuclidean(x, y), cfg)) is not None:
        return known[0], {}, lambda: known[1]
    loss, plan, solution = _transport(SqEuclidean(x, y), cfg, reference, lambda: (x - y).square().sum(-1))
    if not metrics:
        return loss, {}, plan.to_dense
    if solution is None and not bool(loss.detach().isfinite()):  # the solver, which looks for itself, was not asked
        raise ProblemError("the costs hold NaN or infinity.")
    with torch.no_grad():
        parts, (rows, columns) = [], map(wide, plan.marginals)
        # A common centre changes no distance and keeps the digits of features far from the origin.
        centred = [(z := torch.cat((term.x, term.y)).mean(0), term.x - z, term.y - z)[1:] for term in found]
        sent = (plan @ torch.cat([v for _, v in centred], -1)).split([v.shape[-1] for _, v in centred], -1)
        for term, (u, v), w in zip(found, centred, sent, strict=True):
            squares = u.square().sum(-1).to(w), v.square().sum(-1).to(w)
            mean = squares[0].mean() + squares[1].mean() - 2 * (u.mean(0) * v.mean(0)).sum()
            cost = (rows * squares[0]).sum() + (columns * squares[1]).sum() - 2 * (u * w).sum()
            parts.append((term.name, term.weight, mean, cost.clamp(min=0) / units))
        return loss, _metrics(loss, plan, solution, parts), plan.to_dense


def _directly(cost: Cost, cfg: TransportConfig) -> tuple[Tensor, Tensor] | None:
    """(<P, cost> with P detached, P) in one piece, where that serves."""
    problem = Problem(cost, _eps(cost, cfg), penalties=(KL(cfg.taus[0]), KL(cfg.taus[1])))
    if cfg.backend != "auto" or not at_once.serves(problem):
        return None
    known = at_once.held_cost(problem, cfg.tol, cfg.max_iter)
    if known is None:
        return None
    loss, P, status, n_iter = known
    _warn(status, n_iter)
    return loss, P


def _eps(cost: Cost, cfg: TransportConfig) -> float:
    return cfg.reg[1] * float(cost.scale(cfg.reg[0])) if isinstance(cfg.reg, list) else cfg.reg


def _warn(status: Status, n_iter: int) -> None:
    if status not in (CONVERGED, STALLED):
        warnings.warn(f"OT loss, {n_iter} iterations, {status}", RuntimeWarning, stacklevel=5)


def _transport(cost: Cost, cfg: TransportConfig, r: Tensor | None, paired: Callable[[], Tensor]) -> tuple[Tensor, Any, Solution | None]:
    """<P, cost> with P detached, the plan P, and what found it where it was looked for; `paired` gives the costs of pairs (i, i) alone."""
    n, m = cost.shape
    named, number = call(cfg.reference, "reference", REFERENCES)
    if r is None and named != "product" and n != m:
        raise ProblemError(
            f"reference: {cfg.reference} compares pairs (i, i), and this batch has {n} source and {m} target rows: pass as many of both, "
            "pair by pair, or use reference: product."
        )
    eps = _eps(cost, cfg)
    if r is None and named == "diagonal":  # n P_ii = exp(-M_ii / (eps + tau_src + tau_tgt))
        D = paired()
        p = (-wide(D.detach()) / (eps + sum(cfg.taus))).exp() / n
        return (p.to(D) * D).sum(), _OneToOne(p), None
    if r is not None and (r.shape != cost.shape or not bool(((r >= 0) & r.isfinite()).all())):
        raise ProblemError(f"reference must hold finite numbers >= 0 of shape {errors.shape(cost.shape)}, found {errors.shape(r.shape)}.")
    if r is None and number is not None:
        ones = wide(next(iter(cost.inputs.values())).new_ones(n, n))
        rows = torch.eye(n).to(ones) / n
        r = (1 - number) * rows + number * ones / n**2 if named == "soft_diagonal" else ones.triu(-int(number)).tril(int(number))
        r = r / r.sum()
    if r is not None:
        cost = Matrix(cost.dense())  # it is n by m as r is
    solution = _solved(cost, eps, cfg, r)
    plan = solution.plan
    loss = solution.held_cost if r is None else (plan.to_dense().detach().to(C := cost.dense()) * C).sum()
    return loss, plan, solution


def _solved(cost: Cost, eps: float, cfg: TransportConfig, r: Tensor | None) -> Solution:
    """eps KL(P | r) is eps KL(P | a⊗b) with eps log(r / a⊗b) taken off the cost, up to a constant."""
    n, m = cost.shape
    penalties = KL(cfg.taus[0]), KL(cfg.taus[1])
    a = b = None
    if r is not None:
        C = cost.dense().detach()
        cost = Matrix(C - (eps * (wide(r) * (n * m)).log()).to(C))
        a, b = (wide(r.sum(axis) > 0) / r.shape[1 - axis] for axis in (1, 0))  # mass without a partner stays away
        for w, penalty, side in ((a, penalties[0], "row"), (b, penalties[1], "column")):
            if penalty.balanced and bool((w == 0).any()):
                why = "is 0 throughout, and its mass must move: give both taus, or let it go somewhere"
                raise ProblemError(f"a {side} of the reference {why}.")
    solution = solve(Problem(cost, eps, a, b, penalties), backend=cfg.backend, tol=cfg.tol, max_iter=cfg.max_iter)
    _warn(solution.status, solution.n_iter)
    return solution


def _metrics(loss: Tensor, plan: Any, solution: Solution | None, parts: list[tuple[str, float, Tensor, Tensor]]) -> Metrics:
    """`parts`: name, weight, mean over all pairs, and <P, M_term> of each term."""
    mass = wide(plan.marginals[0]).sum()
    out = {"ot_loss": loss.detach(), "ot_pi_sum": mass}
    if plan.shape[0] == plan.shape[1]:
        on = wide(plan.diagonal()).sum()
        out |= {"ot_pi_diag": on, "ot_diag_ratio": torch.where(mass > 0, on / mass, 0.0)}
    zero = torch.zeros_like(mass)  # where there is a closed form: it is exact and one-to-one
    found = (zero, zero, zero) if (s := solution) is None else (zero + s.n_iter, s.errors[-1].to(mass), s.normalized_entropy.to(mass))
    out |= dict(zip(("ot_iters", "ot_marginal_error", "ot_plan_entropy"), found, strict=True))
    total = torch.stack([weight * mean.to(mass) for _, weight, mean, _ in parts]).sum()
    for name, weight, mean, cost in parts:
        out[f"ot_cost/{name}"] = mean
        out[f"ot_share/{name}"] = torch.where(total > 0, weight * mean / total, 0.0)
        out[f"ot_moved/{name}"] = weight * cost
    return out


def wide(z: Tensor) -> Tensor:
    """As wide as potentials are on its device."""
    return z.to(vector_dtype(z.device))


def _world() -> int:
    """The ranks of torch.distributed, 1 without it."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def _same_sizes(term: Term) -> None:
    """A gather of unequal batches ends the process with no word why."""
    mine = torch.tensor([len(term.x), len(term.y)], device=term.x.device)
    every = [torch.empty_like(mine) for _ in range(_world())]
    torch.distributed.all_gather(every, mine)
    if len(set(sizes := [tuple(z.tolist()) for z in every])) > 1:
        raise ProblemError(
            f"gather needs as many pairs on every rank, found (source, target) rows {', '.join(map(str, sizes))}: drop the last incomplete "
            "batch (drop_last=True), or set gather: false."
        )


def _everyone(z: Tensor) -> Tensor:
    """The rows of all ranks, in their order; those of the others are constants."""
    parts = [torch.empty_like(z) for _ in range(_world())]
    torch.distributed.all_gather(parts, z.detach().contiguous())
    parts[torch.distributed.get_rank()] = z
    return torch.cat(parts)
