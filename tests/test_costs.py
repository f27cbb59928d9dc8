"""Costs: the matrix, its folded form, sums, and the digits both keep."""

import math

import pytest
import torch

from conformance import COSTS, manhattan
from gpu_ot import Cosine, Cost, Dot, Euclidean, Formula, Matrix, ProblemError, SqEuclidean
from gpu_ot.costs import Sum
from gpu_ot.costs import base as costs
from problems import clouds, generator, randn

FOLDING = ("squared", "dot", "cosine", "folding sum")
#: Of 7 and 9 points, with a matrix among the terms of a sum.
ALL = {name: bind for name, (bind, _) in COSTS.items()}
ALL["mixed sum"] = lambda x, y: 0.3 * SqEuclidean(x, y) + Formula(manhattan, 2 * x, y) + 0.1 * Matrix(torch.cdist(x, y))


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_the_folded_form_is_the_cost(name, batch):
    cost = ALL[name](*clouds(7, 9, batch=batch))
    alpha, beta, u, v = cost.fold()
    torch.testing.assert_close(alpha.unsqueeze(-1) + beta.unsqueeze(-2) - u @ v.mT, cost.dense())
    assert cost.dense().shape == cost.shape == (*batch, 7, 9)


def test_formulas_see_arrays_that_broadcast():
    x, y = clouds(7, 9)
    cost = Formula(manhattan, x, y)
    torch.testing.assert_close(cost.dense(), torch.cdist(x, y, p=1))
    assert cost.fold() is None and (SqEuclidean(x, y) + Euclidean(x, y)).fold() is None


def test_gradients_at_coincident_points_are_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    for cost in (SqEuclidean, Euclidean):
        (grad,) = torch.autograd.grad(cost(x, torch.zeros(2, 3)).dense().sum(), x)
        assert (grad == 0).all()


def test_a_point_at_the_origin_has_no_direction_and_terms_must_be_over_the_same_pairs():
    assert (Cosine(torch.zeros(1, 3), torch.rand(4, 3)).dense() == 1).all()
    x, y = clouds(7, 9)
    with pytest.raises(ProblemError, match=r"\(7, 8\).*\(7, 9\)"):
        SqEuclidean(x, y) + SqEuclidean(x, y[:8])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_a_part_is_a_cut_of_the_whole(name, batch):
    x, y = (z.requires_grad_() for z in clouds(7, 9, batch=batch))
    cost = ALL[name](x, y)
    C, rows, cols = cost.dense(), torch.tensor([4, 0, 4]), torch.tensor([8, 1])
    torch.testing.assert_close(cost.part(slice(1, 6, 2), slice(3, 5)).dense(), C[..., 1:6:2, 3:5])
    torch.testing.assert_close(cost.part(rows, slice(None)).dense(), C[..., rows, :])
    torch.testing.assert_close(cost.part(rows, cols).dense(), C[..., rows, :][..., cols])
    torch.testing.assert_close((cost.T.dense(), cost.T.part(cols, rows).dense()), (C.mT, C[..., rows, :][..., cols].mT))
    R = randn(3, 2, seed=1)
    found = torch.autograd.grad((cost.part(slice(2, 5), slice(0, 2)).dense() * R).sum(), (x, y), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((C[..., 2:5, 0:2] * R).sum(), (x, y)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [(5,), ()])  # a single cost is shared by the five choices
def test_each_problem_of_a_batch_may_choose_its_own_rows(name, batch):
    cost = ALL[name](*clouds(7, 9, batch=batch))
    rows = torch.randint(7, (5, 4), generator=generator(1))
    C = cost.dense().expand(5, 7, 9)
    expected = torch.stack([C[k][rows[k]] for k in range(5)])
    torch.testing.assert_close(cost.part(rows, slice(None)).dense().expand_as(expected), expected)


def test_a_cost_without_part_says_so():
    with pytest.raises(NotImplementedError, match=r"Cost does not say .* part\(\)"):
        Cost().part(slice(1), slice(1))
    with pytest.raises(NotImplementedError, match=r"Cost does not say .* of\(\)"):
        Cost().of(())


@pytest.mark.parametrize("name", [*FOLDING, "euclidean", "formula"])
def test_the_same_cost_between_other_points(name):
    (x, y), (x_new, y_new) = clouds(7, 9), clouds(4, 2, offset=0.5)
    cost = ALL[name](x, y)
    torch.testing.assert_close(cost.at(x=x_new).dense(), ALL[name](x_new, y).dense())
    torch.testing.assert_close(cost.at(y=y_new).dense(), ALL[name](x, y_new).dense())
    torch.testing.assert_close(cost.at(x_new, y_new).dense(), ALL[name](x_new, y_new).dense())
    torch.testing.assert_close(cost.at().dense(), cost.dense())
    assert cost.points[0] is x and cost.points[1] is y


def test_a_sum_over_several_clouds_takes_a_tuple_of_points():
    (x, y), (p, q) = clouds(7, 9), clouds(7, 9, 2, offset=1.0)
    cost = SqEuclidean(x, y) + 0.5 * Euclidean(p, q)
    at = cost.at(x=(x[:3], p[:3]))
    torch.testing.assert_close(at.dense(), cost.dense()[:3])
    assert cost.points[0][0] is x and cost.points[1][1] is q
    with pytest.raises(ProblemError, match="2 clouds of different points: pass x as a tuple"):
        cost.at(x=x)
    with pytest.raises(ProblemError, match="points of 3 terms, and this cost is a sum of 2"):
        cost.at(y=(y, q, q))
    with pytest.raises(ProblemError, match=r"\(7, 2\).*expected \(\*batch, k, 3\)"):
        SqEuclidean(x, y).at(x=p)


def test_a_matrix_has_no_points():
    M = Matrix(torch.rand(3, 4))
    for ask in (lambda: M.at(x=torch.rand(2, 3)), lambda: M.points, lambda: (M + M).at(x=torch.rand(2, 3))):
        with pytest.raises(ProblemError, match="Matrix has no points"):
            ask()


def test_a_sample_is_a_strided_cut_without_a_gradient():
    x, y = clouds(1000, 300, batch=(3, 3))
    cost = ALL["formula"](x.requires_grad_(), y)
    sample = cost.sample()
    assert sample.shape == (3, 250, 150) and not sample.requires_grad
    torch.testing.assert_close(sample, cost.dense().detach().flatten(0, 1)[::3, ::4, ::2])
    assert cost.sample(limit=10, problems=20).shape == (9, 10, 10)
    assert SqEuclidean(*clouds(7, 9)).sample().shape == (7, 9)
    assert SqEuclidean(*clouds(1, 257)).sample().shape == (1, 129)


KINDS = {"std": lambda C: C.std(correction=0), "mean": torch.mean, "median": torch.median, "max": torch.amax}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_scales_are_those_of_the_whole_array(name, kind, batch, monkeypatch):
    x, y = clouds(30, 20, batch=batch, offset=0.3)
    cost = ALL[name](x, y * torch.arange(1, 4))
    expected = KINDS[kind](cost.dense())
    for block in (costs.BLOCK, 64):  # 64 numbers: many blocks, whatever the kind
        monkeypatch.setattr(costs, "BLOCK", block)
        found = cost.scale(kind)
        assert found.shape == () and found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    if name in FOLDING and kind in ("std", "mean"):  # what folds never sees the pairs
        for kind_of_cost in (SqEuclidean, Dot, Cosine, Sum):
            monkeypatch.setattr(kind_of_cost, "dense", lambda self: pytest.fail("formed the array"))
        torch.testing.assert_close(cost.scale(kind), expected, rtol=1e-12, atol=1e-13)


def test_scales_keep_their_digits_in_float32():
    """Clouds of size 1e-3 at a distance of 30: the standard deviation is 1e-5 of the mean, and float32 has 1e-7."""
    x, y = (1e-3 * z for z in clouds(50, 60))
    cost = SqEuclidean((x + 30).float(), y.float())
    C = torch.cdist(cost.x.double(), cost.y.double()).square()
    assert abs(float(cost.scale("std") / C.std(correction=0)) - 1) < 1e-9
    assert abs(float(cost.scale("mean") / C.mean()) - 1) < 1e-12
    wide = SqEuclidean(*clouds(5, 6, d=40))  # more coordinates than points
    torch.testing.assert_close(wide.scale("std"), wide.dense().std(correction=0), rtol=1e-12, atol=0)


def test_scales_pass_over_forbidden_pairs():
    M = torch.tensor([[1.0, math.inf, 3.0], [math.inf, 8.0, math.inf]])
    assert [float(Matrix(M).scale(kind)) for kind in ("mean", "median", "max")] == [4.0, 3.0, 8.0]
    assert float(Matrix(M).scale("std")) == pytest.approx(torch.tensor([1.0, 3.0, 8.0]).std(correction=0).item())
    for kind in KINDS:
        assert math.isnan(Matrix(torch.full((2, 2), math.inf)).scale(kind))
    with pytest.raises(ProblemError, match="kind = 'min' is not known; choose one of 'std', 'mean', 'median', 'max'"):
        Matrix(M).scale("min")


@pytest.mark.parametrize("batch", [(), (60,)])
def test_medians_of_many_entries_are_those_of_a_sample(batch, monkeypatch):
    monkeypatch.setattr(costs, "SORTED", 2**14)
    cost = SqEuclidean(*clouds(211, 190, batch=batch))
    sizes = []
    dense = SqEuclidean.dense
    monkeypatch.setattr(SqEuclidean, "dense", lambda self: sizes.append(self.shape.numel()) or dense(self))
    found = cost.scale("median")
    assert sizes and max(sizes) <= max(2**14, 211 * 190)  # of a batch at least one whole problem of up to 1024 by 1024
    assert abs(float(found / dense(cost).median()) - 1) < 0.15


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_strips_make_up_the_whole(dim, block, monkeypatch):
    monkeypatch.setattr(costs, "BLOCK", block)
    cost = ALL["formula"](*clouds(7, 9, batch=(2,)))
    strips = list(cost.strips(dim))
    assert len(strips) == {1: cost.shape[dim], 10**6: 1}.get(block, len(strips))
    assert [i for window, _ in strips for i in range(cost.shape[dim])[window]] == list(range(cost.shape[dim]))
    torch.testing.assert_close(torch.cat([part.dense() for _, part in strips], dim), cost.dense())


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_wide_float32_points_under_vmap(dims):
    x, y = (randn(*([4] if dim == 0 else []), n, 20, dtype=torch.float32) for n, dim in zip((6, 5), dims, strict=True))
    costs = lambda x, y: SqEuclidean(x, y).dense()  # noqa: E731
    each = [costs(*(z[k] if dim == 0 else z for z, dim in zip((x, y), dims, strict=True))) for k in range(4)]
    assert torch.equal(torch.vmap(costs, in_dims=dims)(x, y), torch.stack(each))


@pytest.mark.parametrize("d", [16, 33, 300])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_wide_float32_points_lose_less_than_differences_do(d, offset):
    """By products in float64, batched and in slabs; the budget is torch's own error by differences in float32."""
    x, y = (randn(2, size, d, dtype=torch.float32) + offset for size in (300, 1100))
    y[:, :5] = x[:, :5]  # pairs that coincide, and some that nearly do
    y[:, 5:9] = x[:, 5:9] * (1 + 1e-6)
    truth = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    ours, torchs = SqEuclidean(x, y).dense(), torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    assert ours.dtype == torch.float32 and bool((ours >= 0).all())
    assert (ours - truth).abs().amax() <= (torchs - truth).abs().amax()
    near = 1e-13 * d * (1 + x.double().sub(x.mean()).square().amax())
    assert ours[:, range(5), range(5)].amax() <= near
