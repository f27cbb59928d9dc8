"""POT's `ot.unbalanced`, entropic: the same names, arguments, results and `log`, from the log-domain iteration in `relaxed`."""

from __future__ import annotations

import math
from typing import Any

from .. import errors
from . import direct, unrolled
from .arrays import number
from .barycenters import barycenter_unbalanced, barycenter_unbalanced_sinkhorn, barycenter_unbalanced_stabilized
from .forwarding import forward
from .refusals import known_method, warn, warn_unless_converged
from .relaxed import ELSEWHERE, METHODS, pair, run, settled_after

__all__ = [
    "barycenter_unbalanced",
    "barycenter_unbalanced_sinkhorn",
    "barycenter_unbalanced_stabilized",
    "sinkhorn_knopp_unbalanced",
    "sinkhorn_stabilized_unbalanced",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "sinkhorn_unbalanced_translation_invariant",
]


def sinkhorn_knopp_unbalanced(
    a, b, M, reg, reg_m, reg_type="kl", c=None, warmstart=None, numItermax=1000, stopThr=1e-6, verbose=False, log=False, **kwargs
):
    """POT's `ot.unbalanced.sinkhorn_knopp_unbalanced`, in the log domain. Arguments and results as `sinkhorn_unbalanced`."""
    options = (reg_type, c, warmstart, numItermax, stopThr, verbose, log)
    return sinkhorn_unbalanced(a, b, M, reg, reg_m, "sinkhorn", *options, **kwargs)


def sinkhorn_stabilized_unbalanced(
    a, b, M, reg, reg_m, reg_type="kl", c=None, warmstart=None, tau=1e5, numItermax=1000, stopThr=1e-6, verbose=False, log=False, **kwargs
):
    """POT's `ot.unbalanced.sinkhorn_stabilized_unbalanced`: checks the change of u alone, every 10 iterations.

    Warns when the loop stopped short. `tau` is accepted and not needed. Arguments and results as `sinkhorn_unbalanced`.
    """
    options = (reg_type, c, warmstart, numItermax, stopThr, verbose, log)
    return sinkhorn_unbalanced(a, b, M, reg, reg_m, "sinkhorn_stabilized", *options, **kwargs)


def sinkhorn_unbalanced_translation_invariant(
    a, b, M, reg, reg_m, reg_type="kl", c=None, warmstart=None, numItermax=1000, stopThr=1e-6, verbose=False, log=False, **kwargs
):
    """POT's `ot.unbalanced.sinkhorn_unbalanced_translation_invariant`: every iterate has its optimal mass.

    For large reg_m the plain iteration gains mass in steps of reg / reg_m; this one needs no more iterations than a balanced problem.
    Arguments and results as `sinkhorn_unbalanced`. Séjourné, Vialard and Peyré 2022, arXiv:2201.00730.
    """
    options = (reg_type, c, warmstart, numItermax, stopThr, verbose, log)
    return sinkhorn_unbalanced(a, b, M, reg, reg_m, "sinkhorn_translation_invariant", *options, **kwargs)


def sinkhorn_unbalanced(
    a, b, M, reg, reg_m, method="sinkhorn", reg_type="kl", c=None, warmstart=None, numItermax=1000, stopThr=1e-6, verbose=False, log=False,
    **kwargs,
):  # fmt: skip
    """Entropic transport between measures of any mass: `ot.sinkhorn_unbalanced`, on the device of its tensors, without underflow.

    Minimises <P, M> + reg KL(P | c) + reg_m1 KL(P1 | a) + reg_m2 KL(P^T 1 | b) over P >= 0.

    a          weights (n,), an array, tensor or list; empty or None is uniform.
    b          weights (m,), or (m, k) for k problems with the same a, M and c.
    M          costs (n, m); +inf forbids a pair.
    reg        > 0, in units of M; it and reg_m may be tensors that carry a gradient.
    reg_m      in units of M, for both marginals or a pair; inf or None holds a marginal exactly.
    method     "sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant" or "sinkhorn_reg_scaling".
    reg_type   "kl" for KL(P | c); "entropy" for sum P log P - P, that is c = 1, and all there is for several histograms.
    c          reference measure (n, m), a⊗b when left out. Where it is 0 so is P: a row without support moves nothing.
    numItermax, stopThr   stop when u and v change by less than `stopThr`, relative to their largest entry or 1.
    warmstart  (log u, log v) of an earlier call.
    accelerate   (keyword) None: POT's iterations for the first 100; after that each iterate is translated to its best mass, which large
                 reg_m needs. False: never. True: at once.
    warn         (keyword) False: say nothing where the loop stopped short.

    Returns the plan (n, m), or for k histograms the losses <P_k, M> (k,), in the kind, type and device of the inputs. With `log=True`
    also err, logu, logv with P = c exp(logu + logv - M / reg), cost = <P, M>, total_cost (the objective above, with the mass terms
    of the generalised KL), and `status`, `converged`, `n_iter`, `errors`. Differentiable in a, b, M, c, reg and reg_m.
    Raises ProblemError for input that has no answer.

    Chizat et al. 2018, arXiv:1607.05816.
    """
    method, plain = _known(method), not (log or verbose) and warmstart is None and c is None
    found = _directly(a, b, M, reg, reg_m, method, reg_type, numItermax, stopThr, kwargs) if plain else None
    if found is not None:
        return found.plan()
    done = run(
        a, b, M, reg, reg_m, method=method, reg_type=reg_type, c=c, warmstart=warmstart, numItermax=numItermax, stopThr=stopThr,
        verbose=verbose and (log or METHODS[method].table), log=log, **_options(kwargs),
    )  # fmt: skip
    result = done.give(done.linear()) if done.many else done.plan()
    return (result, done.log()) if log else result


def sinkhorn_unbalanced2(
    a, b, M, reg, reg_m, method="sinkhorn", reg_type="kl", c=None, warmstart=None, returnCost="linear", numItermax=1000, stopThr=1e-6,
    verbose=False, log=False, **kwargs,
):  # fmt: skip
    """The cost of the plan of `sinkhorn_unbalanced`: `ot.sinkhorn_unbalanced2`.

    Returns <P, M> for returnCost "linear", the whole objective for "total", 0-d; (k,) for k histograms.
    """
    if returnCost not in ("linear", "total"):
        raise errors.ProblemError(f"Unknown returnCost = {returnCost}. Choose 'linear' or 'total'.")
    method, plain = _known(method), not (log or verbose) and warmstart is None and c is None and returnCost == "linear"
    found = _directly(a, b, M, reg, reg_m, method, reg_type, numItermax, stopThr, kwargs) if plain else None
    if found is not None:
        return found.cost()
    done = run(
        a, b, M, reg, reg_m, method=method, reg_type=reg_type, c=c, warmstart=warmstart, numItermax=numItermax, stopThr=stopThr,
        verbose=verbose, log=log, **_options(kwargs),
    )  # fmt: skip
    result = done.give(done.objective() if returnCost == "total" else done.linear())
    return (result, done.log()) if log else result


def _directly(
    a: Any, b: Any, M: Any, reg: Any, reg_m: Any, method: str, reg_type: Any, max_iter: int, tol: float, options: dict[str, Any]
) -> direct.Found | None:
    """The problem in one piece, if it is that plain."""
    if not isinstance(reg_type, str) or reg_type.lower() != "kl":
        return None
    rules, pairs = METHODS[method], pair(reg_m)
    taus = number(pairs[0]), number(pairs[1])
    if math.inf in taus or unrolled.required(*pairs):
        return None
    found = direct.relaxed(a, b, M, reg, taus, rules, max_iter, tol, settled_after(rules, options.get("accelerate"), tol))
    if found is not None and options.get("warn", True):
        warn_unless_converged(found, rules.warning)
    return found


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What of a caller's further options is known; POT ignores the rest."""
    return {name: given[name] for name in ("accelerate", "warn") if name in given}


def _known(method: str) -> str:
    name = known_method(method, METHODS, ELSEWHERE)
    if name == "sinkhorn_reg_scaling":
        warn("Method not implemented yet. Using classic Sinkhorn-Knopp")
    return name


__getattr__, __dir__ = forward(__name__, "ot.unbalanced")
