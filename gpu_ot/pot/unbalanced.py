"""POT's `ot.unbalanced`, entropic: the same names, arguments, results and `log`, from the log-domain iteration in `relaxed`."""

from __future__ import annotations

from typing import Any

from .. import errors
from .forwarding import forward
from .refusals import unknown_method, warn
from .relaxed import ELSEWHERE, METHODS, run

__all__ = [
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
    return _plan("sinkhorn", locals())


def sinkhorn_stabilized_unbalanced(
    a, b, M, reg, reg_m, reg_type="kl", c=None, warmstart=None, tau=1e5, numItermax=1000, stopThr=1e-6, verbose=False, log=False, **kwargs
):
    """POT's `ot.unbalanced.sinkhorn_stabilized_unbalanced`: looks every 10 iterations, at the change of u alone, and warns when the
    loop stopped short. `tau` is accepted and not needed. Arguments and results as `sinkhorn_unbalanced`."""
    return _plan("sinkhorn_stabilized", locals())


def sinkhorn_unbalanced_translation_invariant(
    a, b, M, reg, reg_m, reg_type="kl", c=None, warmstart=None, numItermax=1000, stopThr=1e-6, verbose=False, log=False, **kwargs
):
    """POT's `ot.unbalanced.sinkhorn_unbalanced_translation_invariant`: each iterate carries its optimal mass, so large reg_m, where the
    plain iteration gains its mass in steps of reg / reg_m, needs no more iterations than a balanced problem.

    Arguments and results as `sinkhorn_unbalanced`. Séjourné, Vialard and Peyré 2022, arXiv:2201.00730.
    """
    return _plan("sinkhorn_translation_invariant", locals())


def sinkhorn_unbalanced(
    a,
    b,
    M,
    reg,
    reg_m,
    method="sinkhorn",
    reg_type="kl",
    c=None,
    warmstart=None,
    numItermax=1000,
    stopThr=1e-6,
    verbose=False,
    log=False,
    **kwargs,
):
    """Entropic transport between measures of any mass: `ot.sinkhorn_unbalanced`, on the device its tensors live on, without underflow.

    Minimises <P, M> + reg KL(P | c) + reg_m1 KL(P1 | a) + reg_m2 KL(P^T 1 | b) over P >= 0.

    a          weights (n,), an array, tensor or list; empty or None is uniform.
    b          weights (m,), or (m, k) for k problems with the same a, M and c.
    M          costs (n, m); +inf forbids a pair.
    reg        > 0, in units of M; it and reg_m may be tensors that carry a gradient.
    reg_m      in units of M, for both marginals or a pair; inf or None holds a marginal exactly.
    method     "sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant" or "sinkhorn_reg_scaling".
    reg_type   "kl" for KL(P | c); "entropy" for sum P log P - P, that is c = 1.
    c          reference measure (n, m), a⊗b when left out. Where it is 0 so is P: a row without support moves nothing.
    numItermax, stopThr   stop when u and v change by less than `stopThr`, relative to their largest entry or 1.
    warmstart  (log u, log v) of an earlier call.
    accelerate   (keyword) POT's iterations for the first 100 and translated to their best mass after that, which large reg_m needs;
                 False never, True at once.

    Returns the plan (n, m), or for k histograms the losses <P_k, M> (k,), in the kind, type and device of the inputs; with `log=True`
    also err, logu, logv with P = c exp(logu + logv - M / reg), cost = <P, M>, total_cost (the objective above, with the mass terms
    of the generalised KL), and `status`, `converged`, `n_iter`, `errors`. Differentiable in a, b, M, c, reg and reg_m.
    Raises ProblemError for input that has no answer.

    Chizat et al. 2018, arXiv:1607.05816.
    """
    return _plan(_known(method), locals())


def sinkhorn_unbalanced2(
    a,
    b,
    M,
    reg,
    reg_m,
    method="sinkhorn",
    reg_type="kl",
    c=None,
    warmstart=None,
    returnCost="linear",
    numItermax=1000,
    stopThr=1e-6,
    verbose=False,
    log=False,
    **kwargs,
):
    """The cost of the plan of `sinkhorn_unbalanced`: `ot.sinkhorn_unbalanced2`.

    Returns <P, M> for returnCost "linear", the whole objective for "total", 0-d; (k,) for k histograms.
    """
    if returnCost not in ("linear", "total"):
        raise errors.ProblemError(f"Unknown returnCost = {returnCost}. Choose 'linear' or 'total'.")
    done = run(a, b, M, reg, reg_m, **_own(_known(method), locals()))
    result = done.give(done.total() if returnCost == "total" else done.linear())
    return (result, done.log()) if log else result


_OPTIONS = {"reg_type", "c", "warmstart", "numItermax", "stopThr", "verbose", "log", "accelerate"}


def _own(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a front door and its **kwargs; POT ignores the others, too."""
    return {"method": method, **{k: v for k, v in {**arguments["kwargs"], **arguments}.items() if k in _OPTIONS}}


def _plan(method: str, arguments: dict[str, Any]) -> Any:
    done = run(*(arguments[k] for k in ("a", "b", "M", "reg", "reg_m")), **_own(method, arguments))
    result = done.give(done.linear()) if done.many else done.plan()
    return (result, done.log()) if arguments["log"] else result


def _known(method: str) -> str:
    if method.lower() not in METHODS:
        raise unknown_method(method, list(METHODS), ELSEWHERE)
    if method.lower() == "sinkhorn_reg_scaling":
        warn("Method not implemented yet. Using classic Sinkhorn-Knopp")
    return method.lower()


__getattr__, __dir__ = forward(__name__, "ot.unbalanced")
