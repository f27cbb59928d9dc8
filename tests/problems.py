"""Clouds, weights and matrices that tests share, each the same in every run; and which of many combinations a test needs."""

import itertools
import math

import numpy as np
import pytest
import torch

from gpu_ot import ProblemError, gradients

INF = math.inf


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float64):
    """Uniform on [0, 1)."""
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def clouds(n, m, d=3, batch=(), *, offset=0.0, seed=0, dtype=torch.float64):
    """(x, y), standard normal around `offset`."""
    gen = generator(seed + n + m + d)
    x, y = (torch.randn(*batch, k, d, generator=gen, dtype=torch.float64) + offset for k in (n, m))
    return x.to(dtype), y.to(dtype)


def weights(n, batch=(), *, empty=0, decades=0.0, seed=1, dtype=torch.float64):
    """(*batch, n) of mass 1 over so many decades, the first `empty` of them 0 where there are more."""
    w = 10 ** (-decades * rand(*batch, n, seed=seed + n)) if decades else rand(*batch, n, seed=seed + n) + 0.1
    if n > empty:
        w[..., :empty] = 0
    return (w / w.sum(-1, keepdim=True)).to(dtype)


def measures(n=7, m=5, d=2, batch=(), *, shift=0.3, seed=0, dtype=torch.float64):
    """(x, y, a, b): clouds in unit cubes, `shift` apart, and positive weights whose masses are not 1."""
    gen = generator(seed)
    x, y = (torch.rand(*batch, k, d, generator=gen, dtype=torch.float64) for k in (n, m))
    a, b = (torch.rand(*batch, k, generator=gen, dtype=torch.float64) + 0.1 for k in (n, m))
    return [z.to(dtype) for z in (x, y + shift, a, 1.7 * b)]


def random_problem(n, m, d=2, seed=0, dtype=torch.float64):
    """(a, b, M): weights of mass 1 and squared distances with largest entry 1."""
    x, y, a, b = measures(n, m, d, shift=0.2, seed=seed)
    M = torch.cdist(x, y).square()
    return (a / a.sum()).to(dtype), (b / b.sum()).to(dtype), (M / M.max()).to(dtype)


#: One small problem: 6 and 5 points in the plane, and weights of mass 1.
X, Y = rand(6, 2, seed=1), rand(5, 2, seed=2) + 0.2
A, B = ((w + 0.2) / (w + 0.2).sum() for w in (rand(6, seed=3), rand(5, seed=4)))


def leaves(*tensors):
    """Copies that gradients are asked in."""
    return [z.detach().clone().requires_grad_() for z in tensors]


def close(ours, theirs, **tolerance):
    """Numbers of either library, whatever holds them."""
    np.testing.assert_allclose(*(np.asarray(z.detach() if isinstance(z, torch.Tensor) else z) for z in (ours, theirs)), **tolerance)


def gradcheck(function, inputs, **options):
    # BLAS sums in an order that depends on where its arguments lie in memory, so a repeated backward may differ in the last digit.
    return torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12, **options)


def numbers(*values):
    """Each as a tensor that gradients are asked in."""
    return [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in values]


def first(function, tensors):
    """The derivatives of a number in all tensors, by torch.autograd."""
    asked = leaves(*tensors)
    return torch.autograd.grad(function(*asked), asked)


def second(function, tensors, v):
    """The derivatives in all tensors of <d function / d the first of them, v>."""
    asked = leaves(*tensors)
    (slope,) = torch.autograd.grad(function(*asked), asked[0], create_graph=True)
    return torch.autograd.grad((slope * v).sum(), asked, allow_unused=True)


OUTPUTS = ("value", "f", "g", "plan", "plan @ v", "map", "sharp cost")


def outputs(s, names=OUTPUTS):
    """A smooth number of each output of a solution that carries derivatives where those reach the potentials."""
    p, at = s.problem, (s.problem, s.geometry, s.f, s.g)
    (n, m), batch = p.shape[-2:], p.shape[:-2]
    v = (rand(m, 2, seed=8) - 0.3).expand(*batch, m, 2)
    found = {
        "value": lambda: s.value,
        "f": lambda: (s.f * rand(n, seed=5)).sum(-1),
        "g": lambda: (s.g * rand(m, seed=6)).sum(-1),
        "plan": lambda: (gradients.plan(*at) * rand(n, m, seed=7)).sum((-1, -2)),
        "plan @ v": lambda: (gradients.plan_product(*at, v).square() * rand(n, 1, seed=9)).sum((-1, -2)),
        "map": lambda: gradients.barycentric(p, s.geometry, s.g, v).sin().sum((-1, -2)),
        "sharp cost": lambda: gradients.plan_cost(*at),
    }
    return {name: found[name]() for name in names}


def differences(function, at, step):
    """Central differences of fourth order of numbers of tensors `function([z])`, for z along d, of all (z, d) in `at`."""
    far, near, on, beyond = (function([z + t * step * d for z, d in at]) for t in (-2, -1, 1, 2))
    return [(p - 8 * q + 8 * r - s) / (12 * step) for p, q, r, s in zip(far, near, on, beyond, strict=True)]


def pairwise(*axes):
    """So few rows, one value of each axis in a row, that any two values of two axes meet in one of them."""
    axes = [list(axis) for axis in axes]
    if not all(axes):
        return []
    sizes = [range(len(axis)) for axis in axes]
    both = itertools.combinations(range(len(axes)), 2)
    missing = {(i, p, j, q) for i, j in both for p, q in itertools.product(sizes[i], sizes[j])}
    rows = []
    while missing:
        row = min(missing)
        chosen = {row[0]: row[1], row[2]: row[3]}
        for k in range(len(axes)):
            if k not in chosen:
                chosen[k] = max(sizes[k], key=lambda v: sum(pair in missing for pair in _pairs({**chosen, k: v}, k)))
        missing -= {pair for k in chosen for pair in _pairs(chosen, k)}
        rows.append(tuple(axes[k][chosen[k]] for k in range(len(axes))))
    return rows or [(value,) for value in axes[0]]


def _pairs(chosen, k):
    """The pairs that value k of a row makes with its other values."""
    return [(*min((k, chosen[k]), (j, v)), *max((k, chosen[k]), (j, v))) for j, v in chosen.items() if j != k]


def refused(said, call, *args, **options):
    """Refused by a ProblemError that matches `said`, or holds each of its words."""
    with pytest.raises(ProblemError, match=said if isinstance(said, str) else None) as problem:
        call(*args, **options)
    assert isinstance(said, str) or all(word in str(problem.value) for word in said), problem.value
