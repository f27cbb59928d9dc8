"""POT's `ot.lowrank`: the same names, arguments, results and `log`, from `gpu_ot.low_rank`."""

from __future__ import annotations

import sys

import torch

from .. import errors
from ..costs import SqEuclidean
from .answer import ConvertedPlan, log_weight
from .arrays import number, take
from .clouds import take_points
from .forwarding import forward
from .refusals import Elsewhere
from .refusals import warn as tell

__all__ = ["lowrank_sinkhorn"]

#: Slope, in units of the spread of the clouds, at which the descent ends before POT's 100 steps; and starts of which the best is taken.
TOL, STEPS, STARTS = 1e-5, 100, 4


def lowrank_sinkhorn(
    X_s, X_t, a=None, b=None, reg=0, rank=None, alpha=1e-10, rescale_cost=True, init="random", reg_init=1e-1, seed_init=49,
    gamma_init="rescale", numItermax=2000, stopThr=1e-7, warn=True, log=False,
):  # fmt: skip
    """A coupling Q diag(1/g) R^T of low nonnegative rank between X_s (n, d) and X_t (m, d): `ot.lowrank.lowrank_sinkhorn`.

    Minimises <C, Q diag(1/g) R^T> + reg (sum Q log Q + sum R log R + sum g log g) for squared distances C, which are never formed.

    a, b          weights (n,) and (m,), uniform when left out; empty atoms are taken.
    reg           >= 0, in units of C, or of the rescaled C.
    rank          at most so many columns of Q and R; min(n, m) when left out.
    alpha         the least entry of g, at most 1 / rank.
    rescale_cost  C is divided by the roots of the largest entries of its two factors, (|x|^2, 1, -2 x) and (1, |y|^2, y).
    seed_init     of the sample that the first clusters are made of.
    numItermax    iterations of each projection on the marginals, which are right to 1e-9 and need some ten.
    `init`, `reg_init`, `gamma_init` and `stopThr` are accepted and not needed: the best of four starts is taken, and steps are as long
    as the descent allows. There are at most 100 of them, as in POT.

    Returns Q (n, r), R (m, r) and g (r,), and with `log=True` value, value_linear, lazy_plan, `status`, `converged`, `n_iter`, `errors`.
    `value` is differentiable in points and weights, at the coupling as it is; the rest is detached. Warns when a projection did not reach
    the marginals.

    Scetbon, Cuturi and Peyré 2021, arXiv:2103.04737.
    """
    if init not in ("random", "deterministic", "kmeans"):
        raise errors.unknown("init", init, ("random", "deterministic", "kmeans"))
    if gamma_init not in ("rescale", "theory"):
        raise Elsewhere(f'Not implemented gamma_init="{gamma_init}". Choose "rescale" or "theory": steps are chosen here, whichever it is.')
    (x, y), back = take_points(X_s=X_s, X_t=X_t)
    (ta, tb), _ = take(a=a, b=b)
    n, m = len(x), len(y)
    r = min(n, m) if rank is None else min(n, m, int(number(rank, "rank")))
    if r <= 0:
        raise errors.ProblemError(f"rank must be at least 1, found {rank}.")
    alpha, reg = number(alpha, "alpha"), number(reg)
    if not 0 < alpha <= 1 / r:
        raise errors.ProblemError(f"alpha ({alpha}) should be > 0 and smaller than 1/rank ({1 / r}): g has {r} entries of sum 1.")
    if rescale_cost:
        # |x - y|^2 of points times the root of a factor is the cost times the factor.
        roots = [torch.maximum(z.square().sum(-1).amax(), (s * z).amax()).clamp(min=1.0) for s, z in ((-2.0, x), (1.0, y))]
        unit = (roots[0] * roots[1]) ** -0.25
        x, y = x * unit, y * unit
    found = sys.modules["gpu_ot"].low_rank(
        SqEuclidean(x, y), r, ta, tb, eps=reg, least=alpha, generator=torch.Generator(x.device).manual_seed(int(seed_init)), tol=TOL,
        max_iter=STEPS, starts=STARTS, inner_iter=numItermax,
    )  # fmt: skip
    if warn and found.status.name == "inexact":
        tell(f"Dykstra did not converge. Status inexact: {found.status.explanation}")
    Q, R, g = found.plan.Q, found.plan.R, found.plan.g
    result = back(Q), back(R), back(g)
    if not log:
        return result
    entropy = sum(torch.special.xlogy(z, z).sum() for z in (Q, R, g))
    # Relative to a⊗1/r and b⊗1/r the entropies differ by constants, and by those of the weights.
    live = found.value + reg * sum(((w * log_weight(w)).sum() for w in (ta, tb) if w is not None), start=torch.zeros_like(found.value))
    value = found.sharp_cost + reg * entropy + (live - live.detach())
    lazy = ConvertedPlan(found.plan, back)  # pyright: ignore[reportArgumentType]
    report = {"status": found.status, "converged": back(found.converged), "n_iter": found.n_iter, "errors": [back(e) for e in found.errors]}
    return *result, {"value": back(value), "value_linear": back(found.sharp_cost), "lazy_plan": lazy, **report}


__getattr__, __dir__ = forward(__name__, "ot.lowrank")
