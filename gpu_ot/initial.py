"""Row potentials to start from, `solve(problem, start=f)`: those of similar problems that have a closed form.

They are potentials without entropy, which are close to those of a small eps. At large eps, where the loop is fast anyway, they gain
little. Thornton and Cuturi 2022, arXiv:2206.07630. Detached, in float64 (float32 on Apple's GPUs, which have no float64), in units of
the cost and up to a constant, which the first iteration removes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import errors
from .problem import vector_dtype

#: Running totals of mass that differ by less than this fraction count as equal.
TIE = 1e-12


@torch.no_grad()
def sorted_potentials(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, p: float = 2.0) -> Tensor:
    """f (*batch, n), exact for the cost |x_i - y_j|^p on the line, p >= 1, without entropy. O((n + m) log(n + m)).

    x, y  (n,) and (m,), or (*batch, n, 1) and (*batch, m, 1).
    a, b  weights (*batch, n) and (*batch, m) of any mass, which is normalised; None is uniform.

    Mass on the line moves in order: the pairs with mass are a staircase (the north-west corner rule). Along it f_i + g_j = C_ij. So from
    one row to the next f grows as the cost to the column j where the staircase steps down:

        f_(i+1) - f_i = |x_(i+1) - y_j|^p - |x_i - y_j|^p.

    Any staircase gives f_i + g_j <= C_ij, since such costs are Monge. If it may step down at several columns, as for equal weights,
    each gives optimal potentials. f is the mean of the first and the last, and the entropic potentials lie between these.
    Raises ProblemError for clouds that are not on a line and p < 1. Villani 2003, Topics in Optimal Transportation, section 2.2.
    """
    if not p >= 1:
        raise errors.ProblemError(f"p must be >= 1, where mass on the line moves in order, found {p}.")
    x, y = (_on_the_line(name, z) for name, z in (("x", x), ("y", y)))
    a, b = _masses("a", a, x), _masses("b", b, y)
    batch = torch.broadcast_shapes(*(z.shape[:-1] for z in (x, y, a, b)))
    x, y, a, b = (z.expand(*batch, z.shape[-1]) for z in (x, y, a, b))
    (x, order), (y, across) = x.sort(-1), y.sort(-1)
    A, B = a.gather(-1, order).cumsum(-1)[..., :-1], b.gather(-1, across).cumsum(-1).contiguous()
    rises = []
    for total, right in ((A - TIE, False), (A + TIE, True)):
        column = torch.searchsorted(B, total.contiguous(), right=right).clamp(max=y.shape[-1] - 1)
        y_j = y.gather(-1, column)
        rises.append((x[..., 1:] - y_j).abs() ** p - (x[..., :-1] - y_j).abs() ** p)
    f = torch.cat((torch.zeros_like(x[..., :1]), ((rises[0] + rises[1]) / 2).cumsum(-1)), -1)
    return torch.empty_like(f).scatter_(-1, order, f)


@torch.no_grad()
def gaussian_potentials(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """f (*batch, n) for the cost |x_i - y_j|^2: exact for Gaussians with the means and covariances of the clouds.

    x, y  (*batch, n, d) and (*batch, m, d).
    a, b  weights (*batch, n) and (*batch, m) of any mass; None is uniform.

    With T(x) = m_y + A (x - m_x) and A = S_x^-1/2 (S_x^1/2 S_y S_x^1/2)^1/2 S_x^-1/2, the affine map between the two,

        f(x) = |x|^2 - (x - m_x)^T A (x - m_x) - 2 <m_y, x>,    grad f = 2 (x - T(x)).

    A inverts S_x only along directions in which x varies, so flat clouds are legal. O((n + m) d^2 + d^3).
    Raises ProblemError for clouds that do not fit each other. Peyré and Cuturi 2019, arXiv:1803.00567, remark 2.31
    (the map); Thornton and Cuturi 2022, arXiv:2206.07630 (as a start).
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        raise errors.wrong_shape("y", y.shape, f"(*batch, m, d) to match x with shape {errors.shape(x.shape)}")
    wide = vector_dtype(x.device)
    x, y = x.to(wide), y.to(wide)
    # Around a common centre: for clouds far from the origin, rounding of |x|^2 would be larger than the rest.
    centre = x.mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    a, b = _masses("a", a, x[..., 0]), _masses("b", b, y[..., 0])
    m_x, S_x = _gaussian(x, a)
    m_y, S_y = _gaussian(y, b)
    root, inverse = _roots(S_x)
    A = inverse @ _roots(root @ S_y @ root)[0] @ inverse
    off = x - m_x.unsqueeze(-2)
    return x.square().sum(-1) - ((off @ A) * off).sum(-1) - 2 * (x @ m_y.unsqueeze(-1)).squeeze(-1)


def _gaussian(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (*batch, d) and covariance (*batch, d, d)."""
    mean = (a.unsqueeze(-2) @ x).squeeze(-2)
    off = x - mean.unsqueeze(-2)
    return mean, off.mT @ (a.unsqueeze(-1) * off)


def _roots(S: Tensor) -> tuple[Tensor, Tensor]:
    """S^1/2 and the pseudo-inverse S^-1/2 of covariances."""
    values, vectors = torch.linalg.eigh((S + S.mT) / 2)
    kept = values > values.amax(-1, keepdim=True) * S.shape[-1] * torch.finfo(S.dtype).eps
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1.0), 0.0)
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def _on_the_line(name: str, z: Tensor) -> Tensor:
    """(*batch, n) from that or (*batch, n, 1)."""
    if z.ndim == 0 or (z.ndim > 1 and z.shape[-1] != 1):
        raise errors.wrong_shape(name, z.shape, "points on a line: (n,) or (*batch, n, 1)")
    return (z.squeeze(-1) if z.ndim > 1 else z).to(vector_dtype(z.device))


def _masses(name: str, w: Tensor | None, points: Tensor) -> Tensor:
    """(*batch, n) weights of mass 1 for points (*batch, n)."""
    if w is None:
        w = points.new_ones(points.shape[-1])
    if w.ndim == 0 or w.shape[-1] != points.shape[-1]:
        raise errors.wrong_shape(name, w.shape, f"(*batch, {points.shape[-1]}), a weight for each point")
    w = w.detach().to(points.dtype)
    return w / w.sum(-1, keepdim=True)
