"""Coordinates in which C_ij = shift_i + shift_j + |x_i - y_j|^2 / 2, and mass travels as little as a linear change of them allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..problem import Problem

#: Features at most.
AXES = 3


def coordinates(problem: Problem) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The shifts (n,) and (m,), and the points (n, 3) and (m, 3), of one problem whose cost folds, in float64, detached: coordinates that
    are missing are 0. |x|^2 of float32 points is then exact."""
    wide = problem.cost.to(torch.float64).fold()
    assert wide is not None
    alpha, beta, u, v = (z.detach() for z in wide)
    a, b = problem.a.detach().to(u), problem.b.detach().to(u)
    p, q = (w @ z / w.sum() for w, z in ((a, u), (b, v)))
    A = _common(_covariance(u - p, a), _covariance(v - q, b))
    x, y = (u - p) @ A.to(u), (v - q) @ torch.linalg.inv(A).to(u)  # A is symmetric
    # <u, v> = <x, y> + <p, v> + <q, u> - <p, q>
    shifts = alpha - u @ q + p @ q - x.square().sum(-1) / 2, beta - v @ p - y.square().sum(-1) / 2
    missing = AXES - x.shape[-1]
    return shifts, (torch.nn.functional.pad(x, (0, missing)), torch.nn.functional.pad(y, (0, missing)))


def _covariance(z: Tensor, w: Tensor) -> Tensor:
    return ((z * (w / w.sum()).unsqueeze(-1)).mT @ z).cpu()


def _common(S: Tensor, R: Tensor) -> Tensor:
    """The symmetric A with A S A = A^-1 R A^-1: A^2 moves a Gaussian of covariance S onto one of R. Stretches by a factor of 4 at most."""
    d = len(S)
    eye = torch.eye(d, dtype=S.dtype)
    size = float(S.trace() + R.trace()) / d
    if not size > 0:
        return eye
    ridge = 1e-6 * size * eye
    root, back = _power(S + ridge, 0.5), _power(S + ridge, -0.5)
    M = back @ _power(root @ (R + ridge) @ root, 0.5) @ back
    return _power((M + M.mT) / 2, 0.5, 4.0)


def _power(S: Tensor, p: float, limit: float = math.inf) -> Tensor:
    w, V = torch.linalg.eigh((S + S.mT) / 2)
    return (V * (w.clamp(min=1e-300) ** p).clamp(1 / limit, limit)) @ V.mT
