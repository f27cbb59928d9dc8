"""Couplings of low rank, Q diag(1/g) R^T: mirror descent on (Q, R, g) and the projection that each of its steps ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Newton iterations that a projection may take: a step that needs more of them is too long. The first has no shorter one.
NEWTON, FIRST = 30, 300
#: No multiplier moves by more in a Newton iteration, and what keeps its matrix invertible.
STRIDE, RIDGE = 5.0, 1e-12
#: Lengths of a Newton step that are tried, each a quarter of the last.
TRIES = 4
#: L1 error of the factors' marginals that a projection ends with.
EXACT = 1e-11
#: What the objective, and the marginals, of an accepted step may be off by.
SLACK = 1e-9
#: The first step, in units of 1 / cost, and by how much steps grow: until one has been too long, and after that.
STEP, GROWTH, LATER = 10.0, 1.5, 1.1
#: A step is halved at most so often before the descent counts as stalled.
HALVINGS = 40


class Factors(NamedTuple):
    """Q_ik = a_i exp(q_ik) and R_jk = b_j exp(r_jk), whose columns sum to g: exp(q) (B, n, r) and exp(r) (B, m, r) have rows of sum 1.

    `sides` holds, for the rows and then for the columns of the plan, the logarithms and their exponentials; `levels` (B, n) and (B, m) are
    what the projection subtracted from them, the multipliers of the marginals.
    """

    sides: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    levels: tuple[Tensor, Tensor]
    g: Tensor  # (B, r)
    error: Tensor  # (B,) L1, of the columns' sums against g


class _Dual(NamedTuple):
    """The projection's dual at multipliers h of the two conditions on the columns: its value (B,) and what its derivatives are made of."""

    value: Tensor
    q: tuple[Tensor, Tensor]
    p: tuple[Tensor, Tensor]
    levels: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor]
    g: Tensor
    free: Tensor  # 1 where g is above its floor


def project(
    z: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], log_g: Tensor, log_floor: float, tol: float = EXACT, max_iter: int = NEWTON
) -> Factors:
    """The factors nearest to a exp(z_1), b exp(z_2) and exp(log_g) in KL whose rows sum to the weights w and whose columns sum to a common
    g >= exp(log_floor).

    Dykstra's algorithm ascends the dual by turns; here the rows' multipliers are eliminated, which leaves

        D(h) = sum_i a_i log sum_k exp(z_ik + h1_k) + the same of b, h2 + sum_k exp(log_g_k - h1_k - h2_k),

    convex in 2 r numbers, and Newton's method takes a few iterations of O((n + m) r^2). Where it fails, h becomes what Dykstra's next turn
    would make of it. Scetbon, Cuturi and Peyré 2021, arXiv:2103.04737, section 3.3.
    """
    r = log_g.shape[-1]
    h, n_iter = (torch.zeros_like(log_g), torch.zeros_like(log_g)), 0
    at = _dual(z, w, h, log_g, log_floor)
    eye = RIDGE * torch.eye(2 * r, dtype=log_g.dtype, device=log_g.device)
    while True:
        slope = torch.cat([c - at.g for c in at.sums], -1)
        error = slope.abs().sum(-1)
        if n_iter == max_iter or not bool((error > tol).any()):
            break
        n_iter += 1
        step, found = _newton(at, w, slope, eye)
        # Problems that are done stay where they are.
        size = (STRIDE / step.abs().amax(-1, keepdim=True).clamp(min=STRIDE)) * (error > tol).unsqueeze(-1)
        gain, noise = (slope * step).sum(-1), 8 * torch.finfo(log_g.dtype).eps * (1 + at.value.abs())
        moved, there, good = h, at, torch.zeros_like(found)
        for _ in range(TRIES):
            moved = h[0] + size * step[..., :r], h[1] + size * step[..., r:]
            there = _dual(z, w, moved, log_g, log_floor)
            good = found & (there.value <= at.value + 1e-4 * size.squeeze(-1) * gain + noise)
            if bool(good.all()):
                break
            size = torch.where(good.unsqueeze(-1), size, size / 4)
        else:
            turn, keep = _turn(at, h, log_g, log_floor), good.unsqueeze(-1)
            moved = torch.where(keep, moved[0], turn[0]), torch.where(keep, moved[1], turn[1])
            there = _dual(z, w, moved, log_g, log_floor)
        h, at = moved, there
    return Factors(((at.q[0], at.p[0]), (at.q[1], at.p[1])), at.levels, at.sums[1], error)


def _dual(z: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], h: tuple[Tensor, Tensor], log_g: Tensor, log_floor: float) -> _Dual:
    q, p, levels, sums = [], [], [], []
    value = torch.zeros_like(log_g[..., 0])
    for each, weights, shift in zip(z, w, h, strict=True):
        tilted = each + shift.unsqueeze(-2)
        level = tilted.logsumexp(-1)
        q.append(tilted - level.unsqueeze(-1))
        p.append(q[-1].exp())
        levels.append(level)
        sums.append((weights.unsqueeze(-2) @ p[-1]).squeeze(-2))
        value = value + (weights * level).sum(-1)
    exponent = log_g - h[0] - h[1]
    free = exponent > log_floor
    g = exponent.clamp(min=log_floor).exp()
    value = value + (g * (1 + (exponent - log_floor).clamp(max=0.0))).sum(-1)
    return _Dual(value, tuple(q), tuple(p), tuple(levels), tuple(sums), g, free.to(g))  # type: ignore[arg-type]


def _newton(at: _Dual, w: tuple[Tensor, Tensor], slope: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """The Newton step (B, 2 r), and where there is one (B,)."""
    shared = torch.diag_embed(at.g * at.free)
    one, other = (torch.diag_embed(c) - p.mT @ (weights.unsqueeze(-1) * p) + shared for c, p, weights in zip(at.sums, at.p, w, strict=True))
    H = torch.cat((torch.cat((one, shared), -1), torch.cat((shared, other), -1)), -2) + eye
    L, failed = torch.linalg.cholesky_ex(H)
    found = failed == 0
    L = torch.where(found[..., None, None], L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device))
    step = -torch.cholesky_solve(slope.unsqueeze(-1), L).squeeze(-1)
    return torch.where(found.unsqueeze(-1), step, 0.0), found


def _turn(at: _Dual, h: tuple[Tensor, Tensor], log_g: Tensor, log_floor: float) -> tuple[Tensor, Tensor]:
    """The multipliers of the columns that fit the rows' as they are."""
    tiny = torch.finfo(log_g.dtype).tiny
    one, other = (c.clamp(min=tiny).log() - shift for c, shift in zip(at.sums, h, strict=True))
    level = ((log_g + one + other) / 3).clamp(min=log_floor)
    return level - one, level - other


@dataclass(frozen=True)
class Descended:
    """Where the descent ended: the factors, the length (B,) of the last step, the entropy (B,), and the slope (B,) after each step."""

    factors: Factors
    step: Tensor
    entropy: Tensor
    converged: Tensor
    stalled: bool
    slopes: list[Tensor]


@dataclass(frozen=True)
class Descent:
    """Minimises -sum_k <A_k, B_k> / g_k + eps (KL(Q | a⊗1/r) + KL(R | b⊗1/r) + KL(g | 1/r)) with A = Q^T u and B = R^T v.

    For a cost alpha_i + beta_j - <u_i, v_j> this is <C, P> up to a constant. A step goes along the slope in u and v and takes the entropy
    as it is; its length is such that the quadratic model of mirror descent holds, F(new) <= F + <slope, new - old> + KL(new | old) / step,
    and so the objective never grows.

    u, v   (B, n, d) and (B, m, d), centred and of variance 1;   w   their weights, (B, n) and (B, m), of sum 1.
    eps    (B,), in the same units.   inner_iter   of a projection, at most NEWTON.
    """

    u: Tensor
    v: Tensor
    w: tuple[Tensor, Tensor]
    eps: Tensor
    log_floor: float
    inner_iter: int = NEWTON

    def run(self, factors: Factors, tol: float, max_iter: int) -> Descended:
        """From these factors until the slope along the constraints is at most `tol` for all problems, which then stay where they are."""
        step, growth = torch.full_like(self.eps, STEP), torch.full_like(self.eps, GROWTH)
        taken, converged = step, torch.zeros_like(step, dtype=torch.bool)
        stuck = converged
        slopes: list[Tensor] = []
        while len(slopes) < max_iter and not bool((converged | stuck).all()):
            new, found, shorter, gap = self._step(factors, step, converged | stuck)
            moved = found & ~(converged | stuck)
            stuck = stuck | ~found
            growth = torch.where(shorter < step, LATER, growth)
            # The entropy, taken as it is, holds a step back: its length is 1 / (1 / step + eps).
            slope = (2 * gap.clamp(min=0.0)).sqrt() * (1 / shorter + self.eps)
            slopes.append(torch.where(moved, slope, slopes[-1] if slopes else torch.inf))
            factors, taken = where(moved, new, factors), torch.where(moved, shorter, taken)
            converged = converged | (moved & (slope <= tol))
            step = torch.where(moved, shorter * growth, step)
        return Descended(factors, taken, self._entropy(factors), converged, bool(stuck.any()), slopes)

    def _step(self, old: Factors, step: Tensor, settled: Tensor) -> tuple[Factors, Tensor, Tensor, Tensor]:
        """The next factors, where there are any (B,), the length of their step, and KL(new | old). No length may be short enough for a
        problem; those that are settled are left alone."""
        (A, B), _ = self.means(old)
        (q1, _), (q2, _) = old.sides
        down, uphill = (self.u @ B.mT, self.v @ A.mT), (A * B).sum(-1)  # minus the slopes of Q and R, and the slope of g
        log_r = math.log(old.g.shape[-1])
        new, done = old, settled
        for _ in range(HALVINGS):
            t = 1 + step * self.eps
            z = tuple((q + step[..., None, None] * z) / t[..., None, None] for q, z in zip((q1, q2), down, strict=True))
            log_g = (old.g.log() + log_r - step.unsqueeze(-1) * uphill) / t.unsqueeze(-1) - log_r
            trial = project(z, self.w, log_g, self.log_floor, max_iter=min(NEWTON, self.inner_iter))  # type: ignore[arg-type]
            (A1, B1), cross = self.means(trial)
            # The cross term is of degree 1, so its linear model at the old factors needs no value there.
            linear = -(trial.g * ((A1 * B).sum(-1) + (B1 * A).sum(-1) - uphill)).sum(-1)
            good = (cross <= linear + self._gap(trial, old) / step + SLACK) & (trial.error <= SLACK)
            new, done = where(done, new, trial), done | good
            if bool(done.all()):
                break
            step = torch.where(done, step, step / 2)
        return new, done, step, self._gap(new, old)

    def means(self, factors: Factors) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The means of u and v in each cluster, (B, r, d), and -sum_k g_k <u_k, v_k>, (B,)."""
        g = factors.g.unsqueeze(-1)
        A, B = ((weights.unsqueeze(-1) * p).mT @ z / g for (_, p), weights, z in zip(factors.sides, self.w, (self.u, self.v), strict=True))
        return (A, B), -(g * A * B).sum((-1, -2))

    def objective(self, factors: Factors) -> Tensor:
        """What is minimised, (B,)."""
        return self.means(factors)[1] + self.eps * self._entropy(factors)

    def _gap(self, new: Factors, old: Factors) -> Tensor:
        """KL(new | old) of Q, R and g together, (B,)."""
        total = (new.g * (new.g / old.g).log()).sum(-1)
        for (q, p), (before, _), weights in zip(new.sides, old.sides, self.w, strict=True):
            total = total + (weights * (p * (q - before)).sum(-1)).sum(-1)
        return total

    def _entropy(self, factors: Factors) -> Tensor:
        """The three KL together, (B,)."""
        shift = math.log(factors.g.shape[-1])
        total = (factors.g * (factors.g.log() + shift)).sum(-1)
        for (q, p), weights in zip(factors.sides, self.w, strict=True):
            total = total + (weights * (p * (q + shift)).sum(-1)).sum(-1)
        return total


def where(first: Tensor, one: Factors, other: Factors) -> Factors:
    """The factors of `one` for the problems where `first` (B,) holds, and of `other` for the rest."""
    if not bool(first.any()):
        return other

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(first.view(-1, *[1] * (x.ndim - 1)), x, y)

    (q1, p1), (q2, p2) = (tuple(map(pick, each, rest)) for each, rest in zip(one.sides, other.sides, strict=True))
    rows, columns = map(pick, one.levels, other.levels)
    return Factors(((q1, p1), (q2, p2)), (rows, columns), pick(one.g, other.g), pick(one.error, other.error))
