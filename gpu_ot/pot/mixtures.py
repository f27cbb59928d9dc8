"""POT's problems whose unknown is what a measure is mixed of: `unmix` and `jcpot_barycenter`, in the log domain.

Couplings exp(f_i + g_j - C_ij / reg) are projected in turn on their two marginals, of which one is shared between several (Benamou et al.
2015, arXiv:1412.5154). Only f is kept: g is what gives the columns their mass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..problem import float_type
from ..solver.status import DIVERGED, Status
from ..vectors import in_full_precision
from .arrays import number, take
from .clouds import between
from .refusals import print_error
from .refusals import warn as tell

SETTLED = Status("converged", "The weights have stopped moving.")
MOVING = Status("max_iter", "The weights still move, by the last entry of `errors`. Raise numItermax, raise reg, or loosen stopThr.")


@in_full_precision
def unmix(a, D, M, M0, h0, reg, reg0, alpha, numItermax=1000, stopThr=1e-3, verbose=False, log=False, warn=True):
    """What a measure is mixed of, by transport: `ot.bregman.unmix`, without underflow.

    Minimises (1 - alpha) W_M,reg(a, D h) + alpha W_M0,reg0(h0, h) over the weights h of the atoms.

    a, D       the measure (n,) and the atoms (n, k), a column each.
    M, M0      costs (n, n) between bins, and (k, l) between atoms and those of the prior.
    h0         the prior (l,), of the mass of a.
    reg, reg0  > 0, in units of M and M0.
    alpha      in [0, 1], how far to trust the prior.
    numItermax, stopThr   stop when h moves by less than `stopThr`, in the Euclidean norm.

    Returns h (k,), and with `log=True` err, niter, `status`, `converged`, `n_iter`, `errors`. Differentiable in the arrays, through the
    iterations. Nakhostin et al. 2016, WHISPERS (Supervised planetary unmixing with optimal transport).
    """
    (ta, tD, tM, tM0, th), back = take(a=a, D=D, M=M, M0=M0, h0=h0)
    if tD is None or tD.ndim != 2:
        raise errors.wrong_shape("D", () if tD is None else tD.shape, "(n, k), a column for each atom")
    n, k = tD.shape
    if th is None:
        raise errors.wrong_shape("h0", (), "(l,), a weight for each atom of the prior")
    prior = th.shape[-1]
    expected = (("a", ta, (n,)), ("M", tM, (n, n)), ("h0", th, (prior,)), ("M0", tM0, (k, prior)))
    for name, z, shape in expected:
        if z is None or z.shape != shape:
            raise errors.wrong_shape(name, () if z is None else z.shape, f"{errors.shape(shape)} to match D with shape ({n}, {k})")
    alpha, dtype = number(alpha, "alpha"), float_type(tD)
    if not 0 <= alpha <= 1:
        raise errors.ProblemError(f"alpha must be in [0, 1], found {alpha}: it is the prior's part.")
    C, C0 = tM.double() / _positive("reg", reg), tM0.double() / _positive("reg0", reg0)
    tD, log_a, log_h0 = tD.double(), _log(ta.double()), _log(th.double())
    used = (tD > 0).any(-1)  # a bin that no atom has gets no mass

    def iterate(at: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        f, f0, last, _ = at
        rows, rows0 = _rows(f, C, log_a), _rows(f0, C0, log_h0)
        h = (f0 + rows0).exp()
        mixed = torch.where(used, torch.where(used, tD @ h, 1.0).log(), -torch.inf)
        # Both couplings give the bins the geometric mean of what they gave them: `ratio` times the second.
        step = torch.where(used, alpha * (torch.where(used, f + rows - mixed, 0.0)), -torch.inf)
        factors = tD.mT @ step.exp()
        new = h * factors
        return (step + mixed - rows, f0 + _log(factors), h, new), (new - last).norm()

    zeros = torch.zeros_like(C0[:, 0])
    start = torch.zeros_like(log_a), zeros, th.double() if prior == k else zeros, zeros
    (*_, h), entries = _loop(iterate, start, numItermax, stopThr, verbose, 1, "Unmixing did not converge." if warn else None, back, dtype)
    return (back(h.to(dtype)), entries) if log else back(h.to(dtype))


@in_full_precision
def jcpot_barycenter(
    Xs, Ys, Xt, reg, metric="sqeuclidean", numItermax=100, stopThr=1e-6, verbose=False, log=False, warn=True, **kwargs
):  # fmt: skip
    """The shares of the classes in a target, from several labelled sources: `ot.bregman.jcpot_barycenter`, without underflow.

    Xs, Ys    lists of points (n_k, d) and of their labels (n_k,), consecutive whole numbers; all sources count from their least.
    Xt        points of the target (m, d), of equal weight.
    reg       > 0, in units of the costs.
    metric    as in `solve_sample`.
    numItermax, stopThr   stop when the shares move by less than `stopThr`, in the Euclidean norm.

    Returns the shares (C,) for the classes of the first source, and with `log=True` err, niter, M, D1, D2, gamma (lists, one for each
    source: costs, indicators of the classes, the same as averages, couplings), and `status`, `converged`, `n_iter`, `errors`.
    Differentiable in the points, through the iterations. The labels that were passed stay as they are.

    Redko et al. 2019, arXiv:1803.04899, algorithm 1.
    """
    Xs, Ys = list(Xs), list(Ys)
    if not Xs or len(Xs) != len(Ys):
        raise errors.ProblemError(f"Xs and Ys must hold as many arrays, at least one, found {len(Xs)} and {len(Ys)}.")
    named = {f"Xs[{k}]": z for k, z in enumerate(Xs)} | {f"Ys[{k}]": z for k, z in enumerate(Ys)}
    (target, *rest), back = take(Xt=Xt, **named)
    clouds, labels = rest[: len(Xs)], rest[len(Xs) :]
    eps, dtype = _positive("reg", reg), float_type(clouds[0])
    M = [between(x, target, metric).dense() for x in clouds]
    D1 = _indicators(labels, M)
    counts = [D.sum(-1, keepdim=True) for D in D1]
    C = [z.double() / eps for z in M]
    log_b = torch.full_like(C[0][0], 1 / len(target)).log()
    log_D = [torch.where(D > 0, 0.0, -torch.inf) for D in D1]
    classes = [D.argmax(0) for D in D1]
    # The logarithm of a class's share of a point: its own class is the only one. A source may have no point of another.
    log_D2 = [-c.squeeze(-1)[own].log() for c, own in zip(counts, classes, strict=True)]

    K = len(C)

    def iterate(at: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        gs = [_columns(f, costs, log_b) for f, costs in zip(at[:K], C, strict=True)]
        rows = [(g - costs).logsumexp(-1) for g, costs in zip(gs, C, strict=True)]
        shares = torch.stack([(f + z + own).logsumexp(-1) for f, z, own in zip(at[:K], rows, log_D, strict=True)]).mean(0)
        fs = [shares[c] + part - z for c, part, z in zip(classes, log_D2, rows, strict=True)]
        return (*fs, *gs, shares.exp()), (shares.exp() - at[-1]).norm()

    zeros = [torch.zeros_like(costs[:, 0]) for costs in C]
    start = (*zeros, *zeros, torch.ones_like(counts[0][:, 0]))
    message = "The shares of the classes did not converge." if warn else None
    (*potentials, shares), entries = _loop(iterate, start, numItermax, stopThr, verbose, 200, message, back, dtype)
    result = back((shares / shares.sum()).to(dtype))
    if not log:
        return result
    gammas = [(f.unsqueeze(-1) + g - costs).exp() for f, g, costs in zip(potentials[:K], potentials[K:], C, strict=True)]
    averages = [D / torch.where(c > 0, c, 1.0) for D, c in zip(D1, counts, strict=True)]
    lists = {"M": M, "D1": D1, "D2": averages, "gamma": gammas}
    return result, {**entries, **{name: [back(z.to(dtype)) for z in each] for name, each in lists.items()}}


def _indicators(labels: list[Tensor], M: list[Tensor]) -> list[Tensor]:
    """(C, n_k) for each source, 1 where a point is of a class."""
    found = []
    for k, (y, costs) in enumerate(zip(labels, M, strict=True)):
        if y is None or y.shape != costs.shape[:1]:
            raise errors.wrong_shape(f"Ys[{k}]", () if y is None else y.shape, f"({len(costs)},), a label for each point of Xs[{k}]")
        y = y.detach()
        y = (y - y.min()).long()
        n_classes = found[0].shape[0] if found else len(y.unique())
        if int(y.max()) >= n_classes:
            raise errors.ProblemError(
                f"Ys[{k}] holds labels up to {int(y.max())} above its least, and Ys[0] has {n_classes} classes: number them 0, 1, ... in "
                "all sources."
            )
        found.append(torch.nn.functional.one_hot(y, n_classes).mT.to(torch.float64))
    return found


def _rows(f: Tensor, C: Tensor, log_w: Tensor) -> Tensor:
    """log sum_j exp(g_j - C_ij) for the g that gives the columns the weights w."""
    return (_columns(f, C, log_w) - C).logsumexp(-1)


def _columns(f: Tensor, C: Tensor, log_w: Tensor) -> Tensor:
    return log_w - (f.unsqueeze(-1) - C).logsumexp(-2)


def _log(w: Tensor) -> Tensor:
    """log w, with derivative 0 where w is 0."""
    return torch.where(w > 0, torch.where(w > 0, w, 1.0).log(), -torch.inf)


def _positive(name: str, found: Any) -> float:
    value = number(found, name)
    if not 0 < value < torch.inf:
        raise errors.bad_eps(name, found)
    return value


def _loop(
    iterate: Callable[[tuple[Tensor, ...]], tuple[tuple[Tensor, ...], Tensor]], at: tuple[Tensor, ...], max_iter: int, tol: float,
    verbose: bool, every: int, message: str | None, back: Callable[[Tensor], Any], dtype: torch.dtype,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:  # fmt: skip
    """`iterate` until the error is below `tol`, and POT's log of it. With a message, a warning where it stopped short."""
    history, status, error = [], MOVING, float("nan")
    for k in range(max(max_iter, 1)):
        at, moved = iterate(at)
        history.append(back(moved.detach().to(dtype)))
        error = float(moved.detach())
        if verbose:
            print_error(k, moved, every)
        if not error < torch.inf:
            status = DIVERGED
            break
        if error < tol:
            status = SETTLED
            break
    if status is not SETTLED and message is not None:
        tell(f"{message} Status {status.name}: {status.explanation}")
    n_iter = len(history) - 1
    report = {"status": status, "converged": status is SETTLED, "n_iter": n_iter, "errors": history}
    return at, {"err": history, "niter": n_iter, **report}
