"""Barycentres: the problems of one axis share a column marginal, which is what their updates agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry.protocol import Geometry
from ..penalties import KL
from .criterion import RESOLVED, ROUNDING, Criterion, Measured
from .step import Alternating, Start, State

#: Updates of the debiasing scaling in an iteration: each halves its error at worst, and costs half a sweep of one problem.
DEBIASING = 2


class Shared(NamedTuple):
    """What the problems share, (*batch, 1, m) each: logarithms of the barycentre and of the debiasing scaling, relative to the problem's b;
    and how far the latter moved."""

    log_b: Tensor
    log_d: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Barycentric(Alternating):
    """Sinkhorn's iteration for K problems whose common column marginal is free: the barycentre. Benamou et al. 2015, arXiv:1412.5154.

    With t_k the softmins of the rows, the marginals are b exp((g_k - t_k) / eps), and they agree for

        log(beta / b) = -sum_k w_k t_k / eps,    g_k = t_k + eps log(beta / b),    sum_k w_k g_k = 0.

    Under KL penalties, with r = tau / (tau + eps): beta / b = (sum_k w_k exp(-(1 - r) t_k / eps))^(1 / (1 - r)) and g_k = r (t_k +
    eps log(beta / b)), Chizat et al. 2018, arXiv:1607.05816. Debiased, beta is d times as much, and d <- sqrt(d beta / K d) for the
    kernel K among the columns, whose fixed point is the barycentre of Sinkhorn divergences: Janati et al. 2020, arXiv:2006.02575.

    weights   (*batch, K, 1), of sum 1.
    own       the cost among the columns as a geometry (*batch, 1, m, m), where the barycentre is debiased.
    """

    weights: Tensor | None = None
    own: Geometry | None = None
    one_sided = True

    def start(self, geometry: Geometry, start: Start) -> State:
        t = geometry.first(start.f, start.weight, self.eps)
        g, shared = self.agreed(t, torch.zeros_like(t[..., :1, :]))
        return State(start.f, g, g, shared, n_sweeps=1)

    def moved(self, geometry: Geometry, state: State, g: Tensor, memory: Any, k: int, plain: bool = False) -> State:
        (a, b), eps, shared, f = (self.problem.a, self.problem.b), self.eps, state.memory, state.f
        columns, g_next, penalty = geometry.T, g, self.problem.penalties[0]
        for _ in range(k):
            g = g_next
            f = penalty.damp(geometry.update(g, b, eps), eps)
            g_next, shared = self.agreed(columns.update(f, a, eps), shared.log_d)
        return State(f, g, g_next, shared, state.done, None, state.n_iter + k, state.age + k, state.n_sweeps + 2 * k, plain)

    def agreed(self, t: Tensor, log_d: Tensor) -> tuple[Tensor, Shared]:
        """(g, what is shared) for softmins t (*batch, K, m)."""
        w, eps, penalty = self.weights, self.eps, self.problem.penalties[1]
        assert w is not None
        reached = t.isfinite().all(-2, keepdim=True)  # a point that some problem cannot reach has no mass
        t = torch.where(reached, t, 0.0)
        if isinstance(penalty, KL) and not penalty.balanced:
            part = eps / (penalty.tau + eps)
            log_b = (torch.where(w > 0, w, 1.0).log() - part * t / eps).masked_fill(w <= 0, -torch.inf).logsumexp(-2, keepdim=True) / part
        else:
            part = 0.0
            log_b = -(w * t).sum(-2, keepdim=True) / eps
        log_b = log_b + log_d
        g = (1 - part) * (t + eps * log_b)
        log_b, moved = torch.where(reached, log_b, -torch.inf), torch.zeros_like(log_d)
        for _ in range(DEBIASING if self.own is not None else 0):
            assert self.own is not None
            ones = torch.ones_like(log_d)
            # K d, with the weights b of the problem in it.
            spread = -self.own.update(eps * log_d + eps * self.problem.log_b[..., :1, :], ones, eps) / eps
            halfway = (log_d + torch.where(reached, log_b, 0.0) - spread) / 2
            moved, log_d = halfway - log_d, halfway
        return g, Shared(log_b, log_d, moved)

    def marginals(self, state: State) -> Tensor:
        """(*batch, K, m): what the rows' update at g gives each column, as POT measures it."""
        shared: Shared = state.memory
        r = 1.0
        if isinstance(penalty := self.problem.penalties[1], KL) and not penalty.balanced:
            r = penalty.tau / (penalty.tau + self.eps)
        t = state.g_next / r - self.eps * torch.where(shared.log_b.isfinite(), shared.log_b, 0.0)
        return torch.where(shared.log_b.isfinite(), self.problem.b * ((state.g - t) / self.eps).exp(), 0.0)


@dataclass(frozen=True)
class Agreement(Criterion):
    """The standard deviation over the problems of the mass they give a point, summed over points: POT's rule. Relaxed marginals
    never agree, and the change of g is taken instead.

    tol    as a part of the mass.
    """

    tol: float = 1e-4

    def measure(self, step: Alternating, state: State, before: State, dtype: torch.dtype) -> Measured:
        assert isinstance(step, Barycentric)
        beta = (step.problem.b * state.memory.log_b.exp())[..., :1, :]
        mass = beta.sum(-1)
        if step.problem.balanced:
            spread = step.marginals(state).std(-2, correction=0).sum(-1, keepdim=True)
        else:
            spread = (beta * ((state.g_next - state.g) / step.eps).abs().amax(-2, keepdim=True)).sum(-1)
        spread = spread + (beta * state.memory.moved.abs()).sum(-1)
        size = torch.where(state.g.isfinite(), state.g.abs(), 0.0).amax((-2, -1)).unsqueeze(-1)
        floor = ROUNDING * torch.finfo(dtype).eps + torch.finfo(state.g.dtype).eps * size / step.eps
        error = spread / mass
        error = torch.where(floor > RESOLVED, torch.maximum(error, floor), error)
        each = state.f.shape[:-1]
        return Measured(state.f, state.g, error.expand(each), floor.expand(each))

    def relative(self, step: Alternating, error: Tensor) -> Tensor:
        return error
