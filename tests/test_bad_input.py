"""Every refusal names the argument, what was found and the way out; and what is legal is taken."""

import math

import numpy as np
import pytest
import torch

import gpu_ot
from gpu_ot import ProblemError
from gpu_ot.problem import Problem

M = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NAN, INF = math.nan, math.inf


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("door", ["Problem", "sinkhorn"])
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(a=weights(0.5, 0.5)), ["a", "(2,)", "(3, 4)"]),
        (dict(b=torch.ones(3, 4, 2, dtype=torch.float64)), ["b", "(3, 4, 2)"]),
        (dict(M=torch.rand(3)), ["M", "(3,)", "n, m)"]),
        (dict(M=torch.rand(3, 0)), ["one"]),
        (dict(a=weights(0.5, NAN, 0.5)), ["a", "1 NaN", "empty atom"]),
        (dict(b=weights(0.5, -0.5, 0.5, 0.5)), ["b", "1 negative"]),
        (dict(a=weights(INF, 0.5, 0.5)), ["a", "1 infinite"]),
        (dict(a=weights(0.0, 0.0, 0.0)), ["a", "sums to 0"]),
        (dict(M=M.masked_fill(torch.eye(3, 4, dtype=torch.bool), NAN)), ["M", "NaN", "3 of its rows", "+inf"]),
        (dict(M=-M.masked_fill(torch.eye(3, 4, dtype=torch.bool), INF)), ["M", "infinity of the wrong sign", "3 of its rows"]),
        (dict(M=torch.cat((M[:2], torch.full((1, 4), INF, dtype=torch.float64)))), ["1 row of M", "only +inf", "a"]),
        (dict(M=torch.cat((M[:, :3], torch.full((3, 1), INF, dtype=torch.float64)), 1)), ["1 column of M", "only +inf", "b"]),
        (dict(eps=-1.0), ["-1.0", "> 0"]),
        (dict(eps=NAN), ["nan", "> 0"]),
        (dict(eps=INF), ["inf", "finite"]),
        (dict(M=M.to_sparse()), ["M is sparse", "to_dense"]),
        (dict(M=M + 0j), ["M is complex"]),
        (dict(M=M.to("meta")), ["one device", "meta", "cpu"]),
        (dict(M="cost"), ["M must be", "str"]),
    ],
    ids=str,
)
def test_refusals(door, change, words):
    given = dict(M=M, eps=0.1, a=weights(0.2, 0.3, 0.5), b=weights(0.25, 0.25, 0.25, 0.25)) | change
    with pytest.raises(ProblemError) as refusal:
        if door == "Problem":
            Problem(given["M"], given["eps"], given["a"], given["b"])
        else:
            gpu_ot.sinkhorn(given["a"], given["b"], given["M"], given["eps"])
    for word in words:
        assert word in str(refusal.value)


def test_unequal_masses_and_mass_with_no_open_way_are_refused():
    """A row may have finite costs and still reach no weight; in a batch the uneven problem is found."""
    a, b = weights(0.2, 0.3, 0.5), weights(0.5, 0.5, 0.5, 0.5)
    for says, given in (
        (r"sum\(a\) = 1 and sum\(b\) = 2.*Normalise.*penalty=KL", (M, 0.1, a, b)),
        (r"sum\(a\) = 2 and sum\(b\) = 1", (M, 0.1, torch.stack([a, 2 * a]))),
        ("1 row of M", (torch.tensor([[INF, 1.0], [1.0, 1.0]]), 0.1, weights(0.5, 0.5), weights(1.0, 0.0))),
    ):
        with pytest.raises(ProblemError, match=says):
            Problem(*given)
    Problem(M, 0.1, a, b, gpu_ot.KL(1.0))


def test_clouds_are_checked_by_their_points():
    x, y = torch.rand(5, 2), torch.rand(6, 2)
    with pytest.raises(ProblemError, match=r"y has shape \(6, 2\)"):
        gpu_ot.SqEuclidean(torch.rand(5, 3), y)
    x[2, 1] = NAN
    with pytest.raises(ProblemError, match=r"x or y holds NaN.* 1 of its entries"):
        Problem(gpu_ot.SqEuclidean(x, y), 0.1)


def test_settings_that_do_not_exist():
    problem = Problem(M, 0.1)
    for setting, words in (
        (dict(backend="cuda"), "'dense'"),
        (dict(grad="exact"), "'envelope'"),
        (dict(norm="l3"), "'l1'"),
        (dict(max_iter=0), "at least 1"),
    ):
        with pytest.raises(ProblemError, match=words):
            gpu_ot.solve(problem, **setting)
    with pytest.raises(ProblemError, match="divide the cost"):
        gpu_ot.solve(Problem(M, torch.tensor(0.1, requires_grad=True)), grad="implicit")


def test_arrays_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="All array should be from the same type"):
        gpu_ot.sinkhorn(np.full(3, 1 / 3), torch.full((4,), 0.25), M, 0.1)
    with pytest.raises(ProblemError, match="expected numbers"):
        gpu_ot.sinkhorn([], [], np.array([["a", "b"]]), 0.1)


def test_eps_may_be_a_tensor_or_relative_to_the_cost():
    assert Problem(M, torch.tensor(0.1)).eps == pytest.approx(0.1)
    for kind, scale in (("std", M.std(correction=0)), ("mean", M.mean()), ("median", M.median()), ("max", M.max())):
        assert Problem(M, (kind, 0.05)).eps == pytest.approx(0.05 * float(scale), rel=1e-10)
        with pytest.raises(ProblemError, match="do not vary"):
            Problem(torch.zeros(3, 3), (kind, 0.05))
    for penalty in (gpu_ot.KL, gpu_ot.TV):
        with pytest.raises(ProblemError, match="tau must be > 0"):
            penalty(0.0)
