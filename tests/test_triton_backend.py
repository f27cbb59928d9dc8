"""What the streaming and the resident backend have beside the suite of all: precisions, ragged batches, operators, graphs, limits."""

import sys

import pytest
import torch

import problems
from problems import leaves, measures, rand, weights

pytest.importorskip("triton")

import gpu_ot
from gpu_ot import KL, TV, Euclidean, Matrix, Problem, SqEuclidean, errors, gradients
from gpu_ot.geometry import select as backends
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.protocol import weigh
from gpu_ot.geometry.resident import Resident, resident_iterate
from gpu_ot.geometry.select import bind
from gpu_ot.geometry.triton import Streaming, streamed_apply, streamed_softmin
from gpu_ot.solve import solve

# A first shift may overflow, which is noticed; the interpreter says so, a GPU does not.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def clouds(n, m, d, *batch):
    """Of one size in any dimension."""
    return [z / d**0.5 for z in problems.clouds(n, m, d, batch, dtype=torch.float32)]


def test_a_softmin_keeps_the_digits_that_float32_would_drop():
    """At a large eps every column counts, and the roundings of a sum average out below that of its logarithm."""
    x, y = clouds(60, 70, 3)
    problem = Problem(SqEuclidean(x, y), 1.0)
    ours, truth = Streaming(problem), Dense(problem.cost.to(torch.float64).dense())
    h = torch.randn(70, dtype=torch.float64)
    h[35] = -torch.inf
    right = truth.softmin(h, 1.0)
    ours.softmin(h, 1.0)
    near, top = ours._centred(h)
    rows, columns = ours.rows, ours.columns
    s = streamed_softmin(*rows.stored, *columns.stored, rows.form, "fp32", 60, near, (rows.last + top).float(), None, 1.0)
    assert s.dtype == torch.float64
    kept, rounded = ((rows.offset + z.double() - top - right).square().mean().sqrt() for z in (s, s.float()))
    assert kept < 0.9 * rounded


def ragged(sizes, d):
    """Clouds padded with zeros to the largest, and their weights; and the problems alone."""
    n, m = (max(side) for side in zip(*sizes, strict=True))
    x, y = clouds(n, m, d, len(sizes))
    a, b = (weights(k, (len(sizes),), dtype=torch.float32) for k in (n, m))
    for k, (rows, columns) in enumerate(sizes):
        a[k, rows:], b[k, columns:] = 0, 0
        x[k, rows:], y[k, columns:] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    alone = [(x[k, :i], y[k, :j], a[k, :i], b[k, :j]) for k, (i, j) in enumerate(sizes)]
    return (x, y, a, b), alone


@pytest.mark.parametrize("d", [3, 40])
def test_a_ragged_batch_is_each_problem_alone(monkeypatch, d):
    """Softmin in both directions, apply, and a solve with its gradient; padding of many tiles on either side, and of none."""
    sizes = [(70, 5), (6, 140), (1, 1)]
    (x, y, a, b), alone = ragged(sizes, d)
    x.requires_grad_()
    problem = Problem(SqEuclidean(x, y), 0.2, a, b)
    ours = Streaming(problem)
    monkeypatch.setattr(sys.modules[solve.__module__], "bind", lambda problem, *_: Streaming(problem))
    solution = solve(problem, tol=0.0, max_iter=6, check_every=5)
    (slope,) = torch.autograd.grad(solution.value.sum(), x)
    h, k = weigh(solution.g.detach(), problem.b, 0.2), weigh(solution.f.detach(), problem.a, 0.2)
    v = torch.randn(*y.shape[:2], 2)
    with torch.no_grad():
        s, t, p = ours.softmin(h, 0.2), ours.T.softmin(k, 0.2), ours.apply(k, h, 0.2, v.double())
        whole = Dense(problem.cost.to(torch.float64).dense()).softmin(h, 0.2)
    assert (s - whole).abs().max() < 1e-5 * whole.abs().max(), "empty atoms keep their softmin"
    for q, (each, (i, j)) in enumerate(zip(alone, sizes, strict=True)):
        points = each[0].detach().requires_grad_(), each[1]
        lone = Problem(SqEuclidean(*points), 0.2, *each[2:])
        geometry = Streaming(lone)
        theirs = solve(lone, tol=0.0, max_iter=6, check_every=5)
        (right,) = torch.autograd.grad(theirs.value, points[0])
        with torch.no_grad():
            pairs = {
                "softmin": (s[q, :i], geometry.softmin(h[q, :j], 0.2)),
                "its transpose": (t[q, :j], geometry.T.softmin(k[q, :i], 0.2)),
                "apply": (p[q, :i], geometry.apply(k[q, :i], h[q, :j], 0.2, v[q, :j].double())),
                "value": (solution.value[q], theirs.value),
                "f": (solution.f[q, :i], theirs.f),
                "gradient": (slope[q, :i], right),
            }
            for name, (one, other) in pairs.items():
                # Both are right to about 1e-6 of their size, see above; a batch has another centre than one problem.
                worst = (one - other).abs().max().item() / max(1.0, other.abs().max().item())
                assert worst < 5e-6, f"{name} of {q} differs by {worst:.1e}"
        assert (slope[q, i:] == 0).all() and (p[q, i:] == 0).all()


def test_gradients_of_empty_atoms_are_not_skipped():
    """The softmin of an atom without weight, and its slope: lengths are read off h and k, not off the weights."""
    (_, _, a, b), _ = ragged([(140, 20), (20, 140)], 3)
    x, y = clouds(140, 140, 3, 2)
    problem = Problem(SqEuclidean(x, y), 0.2, a, b)
    ours, truth = Streaming(problem), Dense(problem.cost.to(torch.float64).dense())
    h = torch.randn(2, 140).double()
    torch.testing.assert_close(ours.softmin(h, 0.2), truth.softmin(h, 0.2), rtol=0, atol=3e-6)
    s, w = truth.softmin(weigh(h, problem.b, 0.2), 0.2), torch.randn(2, 140).double()
    P, (_, _, p, q) = truth.plan(s, weigh(h, problem.b, 0.2), 0.2), ours.inputs
    mine = ours.pull_back(s, weigh(h, problem.b, 0.2), 0.2, w)
    for one, other in zip(
        mine, (w * P.sum(-1), (P.mT @ w[..., None])[..., 0], -w[..., None] * (P @ q), -P.mT @ (w[..., None] * p)), strict=True
    ):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize("d", [3, 40])
def test_tiles_of_padding_are_not_visited(monkeypatch, d, processors):
    """Poisoned points show who reads them: whole tiles of padding may hold NaN, whether or not the columns are split."""
    from gpu_ot.kernels import tuning
    from gpu_ot.kernels.apply import apply
    from gpu_ot.kernels.softmin import softmin
    from gpu_ot.kernels.tiles import cloud

    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    tile = tuning.Tile(64, 64, 4, 2)
    n, m, eps = 128, 512, 0.3
    x, y = clouds(n, m, d, 3)
    h, k, v = torch.randn(3, m), torch.randn(3, n), torch.randn(3, m, 4)
    rows, columns = torch.tensor([128, 64, 30], dtype=torch.int32), torch.tensor([512, 64, 250], dtype=torch.int32)
    for b in range(3):
        h[b, columns[b] :], k[b, rows[b] :] = -torch.inf, -torch.inf
    u, w = cloud(x), cloud(y)
    splits, _ = tuning.split(n, m, 3, tile, u.data)
    assert (splits > 1) == (processors > 1)
    expected = softmin(u, w, h, eps, tile=tile)
    plans = [apply(u, w, k, h, eps, each, tile=tile) for each in (v, v[..., :1], *([w] if not w.packed else []))]
    for b, used in enumerate((512, 64, 256)):  # the last tile that is visited is visited whole
        w.data[b, used:] = torch.nan
        v[b, used:] = torch.nan
    for shift in (None, expected):
        s = softmin(u, w, h, eps, shift=shift, columns_used=columns, tile=tile)
        torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-6)
    lengths = dict(rows_used=rows, columns_used=columns, tile=tile)
    matrix = cloud(v.nan_to_num(nan=0.0), weights=True)
    for b, used in enumerate((512, 64, 256)):
        matrix.data[b, used:] = torch.nan
    for each, plan in zip((matrix, v[..., :1], w), plans, strict=False):
        torch.testing.assert_close(apply(u, w, k, h, eps, each, **lengths), plan, rtol=1e-5, atol=1e-6)
    # Of a block of empty rows only the first tile is visited: the NaN of the second reaches its neighbours alone.
    w.data[1, :] = torch.nan_to_num(w.data[1, :])
    w.data[1, 64:128] = torch.nan
    k[1], columns[1] = 0.0, 128
    k[1, 64:], h[1, 64:128] = -torch.inf, 0.0
    out = apply(u, w, k, h, eps, torch.ones(3, m, 1), **lengths)[1, :, 0]
    if splits == 1:
        assert out[:64].isnan().all() and (out[64:] == 0).all()
    assert softmin(u, w, h, eps, columns_used=columns, tile=tile)[1].isnan().all(), "of a softmin, all rows are asked for"


@pytest.mark.parametrize("d", [3, 40])
def test_operators_are_fit_for_torch_compile(d):
    ours = Streaming(Problem(SqEuclidean(*clouds(20, 25, d, 2)), 0.1))
    given = (*ours.rows.stored, *ours.columns.stored, ours.rows.form, "fp32", 20)
    h, k, used = torch.randn(2, 25), torch.randn(2, 20), torch.tensor([20, 7], dtype=torch.int32)
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    for lengths in (None, used):
        for shift in (None, k):
            torch.library.opcheck(streamed_softmin, (*given, h, shift, lengths, 0.1), **checks)
        for w in (torch.randn(2, 25, 1), torch.randn(2, 25, 4), *([None] if d > 10 else [])):
            torch.library.opcheck(streamed_apply, (*given, k, h, w, lengths, lengths, 0.1), **checks)


def test_the_graph_does_not_break():
    """Softmin, apply and the value's gradient rule, traced as one graph."""
    x, y = clouds(20, 25, 3)
    problem = Problem(SqEuclidean(x, y), 0.1)
    ours = Streaming(problem)

    def two_steps(g):
        f = ours.softmin(weigh(g, problem.b, 0.1), 0.1)
        k = weigh(f, problem.a, 0.1)
        return ours.T.softmin(k, 0.1), ours.apply(k, weigh(g, problem.b, 0.1), 0.1, torch.ones(25, 1))

    g = torch.zeros(25, dtype=torch.float64)
    expected = two_steps(g)
    for one, other in zip(torch.compile(two_steps, backend="eager", fullgraph=True)(g), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kernel, precision, d", [("softmin", "fp32", 20), ("vector", "tf32", 3), ("apply", "fp32", 20), ("apply", "fp32", 3)]
)
def test_what_tune_times_runs_with_any_tile(kernel, precision, d):
    from gpu_ot.kernels import trial, tuning

    calls = trial.Trial(kernel, precision, 70, d).calls(torch.device("cpu"))
    assert len(calls) == (2 if kernel == "softmin" or (kernel == "apply" and d > 10) else 1)
    for call in calls:
        found = [call(tuning.Tile(64, block_m, 4, 2)) for block_m in (32, 128)]
        assert found[0].isfinite().all()
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * found[0].abs().max().item())


def test_gradients_reach_only_who_asked():
    x, y = clouds(20, 25, 3)
    x.requires_grad_()
    problem = Problem(SqEuclidean(x, y), 0.1)
    ours, truth = Streaming(problem), Dense(problem.cost.dense())
    g = torch.randn(25, dtype=torch.float64)
    mine, theirs = (torch.autograd.grad(gradients.softmin(m, g, problem.b, 0.1).sum(), x)[0] for m in (ours, truth))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_streaming_refuses_and_why():
    x, y = clouds(4, 5, 3)
    assert Streaming.refuse(Problem(SqEuclidean(x, y), 0.1)) is None
    for cost, why in (
        (SqEuclidean(x.double(), y.double()), "float64"),
        (Euclidean(x, y), "alpha_i"),
        (Matrix(torch.rand(4, 5)), "alpha_i"),
        (SqEuclidean(x, y) + (-1.0) * SqEuclidean(x, y), "alpha_i"),
        (SqEuclidean(x[:, :0], y[:, :0]), "no coordinates"),
    ):
        reason = Streaming.refuse(Problem(cost, 0.1))
        assert reason is not None and why in reason, reason
    with pytest.raises(errors.BackendError, match="alpha_i"):
        Streaming(Problem(Euclidean(x, y), 0.1))


@pytest.mark.parametrize(
    "precision, eps",
    [
        pytest.param("tf32", 0.02, marks=pytest.mark.slow),
        pytest.param("fp16", 0.02, marks=pytest.mark.slow),
        *[("fp32", 0.02), ("bf16", 0.02), ("bf16", 0.1)],
    ],
)
def test_rough_sweeps_end_in_the_faithful_solution(precision, eps):
    """Rounded points are another problem, for bf16 at eps = 0.02 one that overflows; the correction leaves nothing of it."""
    x, y, *_ = measures(70, 60, 5, shift=0.0, dtype=torch.float32)
    ours = solve(Problem(SqEuclidean(x, y), eps), backend="triton", tol=1e-5, precision=precision)
    truth = solve(Problem(SqEuclidean(x.double(), y.double()), eps), backend="softmin", tol=1e-10)
    error = float((ours.plan.to_dense().double() - truth.plan.to_dense()).abs().sum())
    assert ours.status.name in ("converged", "stalled") and error <= 1e-4, error


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_a_rounded_start_keeps_the_gradient(precision, grad):
    """Derivatives are of the solve that corrected it, in full precision."""
    x, y = leaves(*rand(2, 20, 3, dtype=torch.float32))
    problem = Problem(SqEuclidean(x, y), 0.1)
    ours, exact = (solve(problem, backend="triton", tol=1e-5, precision=p, grad=grad).value for p in (precision, "fp32"))
    for one, other in zip(*(torch.autograd.grad(value, (x, y)) for value in (ours, exact)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


# The resident backend.


def matrices(n, m, *batch):
    return rand(*batch, n, m, seed=n + m, dtype=torch.float32)


def test_resident_converges_in_as_many_iterations_as_in_float64():
    """To 1e-6 of the mass, where f / eps is in the hundreds."""
    C, a, b = 10 + matrices(25, 25), weights(25), weights(25, seed=7)
    ours = solve(Problem(C, 2e-2, a.float(), b.float()), backend="resident", tol=1e-6, accelerate="none", check_every=20)
    truth = solve(Problem(C.double(), 2e-2, a, b), backend="softmin", tol=1e-6, accelerate="none", check_every=20)
    assert ours.status.name == "converged" and abs(ours.n_iter - truth.n_iter) <= 20


def test_the_resident_operator_is_fit_for_torch_compile():
    C, a, b = matrices(6, 5, 2), weights(6, (2,)), weights(5, (2,))
    given = C, a, b, torch.zeros(2, 5, dtype=torch.float64), 0.1, float("inf"), 1.0, 2
    torch.library.opcheck(resident_iterate, given, test_utils=("test_schema", "test_faketensor"))


def test_what_resident_refuses_and_why():
    C = matrices(4, 5)
    assert Resident.refuse(Problem(C, 0.1)) is None
    assert Resident.refuse(Problem(C, 0.1, penalties=(KL(), KL(1.0)))) is None
    assert Resident.refuse(Problem(Euclidean(torch.rand(4, 2), torch.rand(5, 2)), 0.1)) is None, "any cost that can be formed"
    for problem, why in (
        (Problem(C.double(), 0.1), "float64"),
        (Problem(C, 0.1, penalties=(KL(), TV(1.0))), "KL penalties"),
        (Problem(matrices(2, 1025), 0.1), "up to 1024 columns"),
    ):
        reason = Resident.refuse(problem)
        assert reason is not None and why in reason, reason
        with pytest.raises(errors.BackendError, match=why):
            bind(problem, "resident")


def test_auto_takes_resident_for_small_problems_on_a_gpu_only(monkeypatch):
    def taken(problem):
        said = gpu_ot.explain(problem)
        assert f'auto takes "{backends._choose(problem)[0].backend}"' in said
        return backends._choose(problem)[0].backend

    small = Problem(matrices(10, 256, 3), 0.1)
    assert taken(small) in ("compiled", "dense") and "on a GPU" in gpu_ot.explain(small)
    monkeypatch.setattr(backends, "_on", lambda problem, device: device == "cuda")
    assert taken(small) == "resident" and taken(Problem(matrices(256, 256), 0.1)) == "resident"
    assert taken(Problem(SqEuclidean(torch.rand(9, 2), torch.rand(8, 2)), 0.1)) == "resident"
    assert taken(Problem(matrices(10, 257), 0.1)) == "dense"
    double = Problem(matrices(10, 20).double(), 0.1)
    assert taken(double) == "dense" and 'instead of "resident", which was refused' in gpu_ot.explain(double)
