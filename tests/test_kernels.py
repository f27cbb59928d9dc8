"""Every kernel against its naive twin in float64, in Triton's interpreter. Budgets are torch's own error in fp32."""

from dataclasses import replace

import pytest
import torch

from problems import pairwise

pytest.importorskip("triton")

from gpu_ot.kernels import absorbed, scaling, tuning
from gpu_ot.kernels.absorb import absorb
from gpu_ot.kernels.apply import apply
from gpu_ot.kernels.resident import run
from gpu_ot.kernels.softmin import softmin
from gpu_ot.kernels.tiles import cloud, split, split_by_torch

from gpu_ot import KL, Problem, solve
from gpu_ot.geometry.products import Power, Products

# Overflow is what a bad shift is for; the interpreter says so, a GPU does not.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]

SIZES = [(1, 1, 1), (63, 257, 3), (128, 100, 17), (70, 140, 8), (33, 50, 64), (20, 140, 130), (10, 30, 300)]
INF = float("inf")


def naive_softmin(u, v, h, eps):
    return -eps * torch.logsumexp((h[..., None, :] + u @ v.mT) / eps, -1)


def naive_apply(u, v, k, h, eps, w):
    return ((k[..., :, None] + h[..., None, :] + u @ v.mT) / eps).exp() @ w


def problem(n, m, d, *batch, seed=0):
    torch.manual_seed(seed)
    u, v, h = torch.randn(*batch, n, d), torch.randn(*batch, m, d), torch.randn(*batch, m)
    if m > 2:
        h[..., m // 2] = -INF  # an empty atom
    return u / d**0.5, v, h


def within(ours, naive, *args):
    """At most twice the error that torch makes on the same fp32 inputs, plus 1e-6 of the result's size."""
    truth = naive(*(x.double() if torch.is_tensor(x) else x for x in args))
    peer = naive(*args)
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    size = max(1.0, truth[truth.isfinite()].abs().max().item())
    worst, allowed = (ours - truth).abs().max().item(), 2 * (peer - truth).abs().max().item() + 1e-6 * size
    assert worst <= allowed, f"off by {worst:.2e}, torch by {allowed / 2:.2e}"


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("n, m, d", SIZES)
def test_softmin_is_as_accurate_as_torch(n, m, d, eps):
    u, v, h = problem(n, m, d)
    within(softmin(u, v, h, eps), naive_softmin, u, v, h, eps)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_any_shift_gives_the_same_softmin(precision, eps):
    """A good shift takes the fast loop; one that over- or underflows, or is not a number, is noticed row by row."""
    for n, m, d in [(63, 257, 3), (130, 100, 17)]:
        u, v, h = problem(n, m, d)
        plain = softmin(u, v, h, eps, precision=precision)
        bad = plain + torch.tensor([0.0, 500 * eps, -500 * eps, INF, -INF, float("nan"), 20 * eps]).repeat(n)[:n]
        for shift in (plain, plain + eps * torch.randn(n), bad, torch.zeros(n)):
            torch.testing.assert_close(softmin(u, v, h, eps, shift=shift, precision=precision), plain, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("n, m, d", [(5, 1500, 3), (70, 1111, 20)])
def test_split_columns_join(monkeypatch, n, m, d):
    """A softmin of softmins is a softmin, and the plan is a sum over its columns."""
    u, v, h = problem(n, m, d)
    monkeypatch.setattr(tuning, "processors", lambda device: 8)
    splits, per_split = tuning.split(n, m, 1, tuning.tile("softmin", u, 1, 16, n), u)
    assert splits > 1 and (splits - 1) * per_split < m
    h[:per_split] = -INF  # the first split meets nothing
    s = softmin(u, v, h, 0.3)
    within(s, naive_softmin, u, v, h, 0.3)
    torch.testing.assert_close(softmin(u, v, h, 0.3, shift=s), s, rtol=2e-6, atol=2e-6)
    for w in (torch.randn(m, 7), torch.randn(m, 1)):
        within(apply(u, v, s, h, 0.3, w), naive_apply, u, v, s, h, 0.3, w)


@pytest.mark.parametrize("eps", [0.02, 1.0, 100.0])
@pytest.mark.parametrize("n, m, d", SIZES)
def test_apply_is_as_accurate_as_torch(n, m, d, eps):
    """For a vector, a matrix, and the points themselves: the gradient of the value."""
    u, v, h = problem(n, m, d)
    k = naive_softmin(u, v, h, eps)
    for w in (torch.randn(m, 1), torch.randn(m, 5), v):
        within(apply(u, v, k, h, eps, w), naive_apply, u, v, k, h, eps, w)
    stored = cloud(v)
    if not stored.packed:
        within(apply(u, stored, k, h, eps, stored), naive_apply, u, v, k, h, eps, v)


@pytest.mark.parametrize("precision, allowed", [("fp32", None), ("fp16", 0.2)])
@pytest.mark.parametrize("d", [4, 200, 300])
def test_apply_to_more_columns_than_one_tile_holds(d, precision, allowed):
    u, v, h = problem(30, 60, d)
    k, w = naive_softmin(u, v, h, 0.5), torch.randn(60, 300)
    ours = apply(u, v, k, h, 0.5, w, precision=precision)
    if allowed is None:
        within(ours, naive_apply, u, v, k, h, 0.5, w)
    else:
        assert (ours - naive_apply(u, v, k, h, 0.5, w)).abs().max() <= allowed


def test_a_plan_of_any_scale():
    """Rows are scaled before they are halved: masses of 1e-30 and 1e30 keep their digits."""
    u, v, h = problem(40, 90, 6)
    k = naive_softmin(u, v, h, 1.0) + torch.linspace(-69, 69, 40)
    ours, truth = apply(u, v, k, h, 1.0, v), naive_apply(u.double(), v.double(), k.double(), h.double(), 1.0, v.double())
    size = truth.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ours / size, truth / size, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision, bits", [("tf32", 11), ("fp16", 11), ("bf16", 8)])
@pytest.mark.parametrize("d", [3, 16, 40])
def test_lower_precisions_solve_a_rounded_problem_exactly(precision, bits, d):
    """The points lose bits, once; what is computed from them loses no more than fp32 does."""
    u, v, h = problem(60, 90, d)
    stored = [cloud(x, precision) for x in (u, v)]
    seen = [(c.data[0, : c.n, :d].double() * c.unit.double()) for c in stored]
    for x, z in zip((u, v), seen, strict=True):
        assert (x - z).abs().max() <= 2.0**-bits * x.abs().max()
    if precision == "bf16":  # the interpreter multiplies the bits of a bf16; the same values in fp32 take the same path
        stored = [replace(c, data=c.data.float()) for c in stored]
    truth = naive_softmin(*seen, h.double(), 0.1)
    assert (softmin(*stored, h, 0.1) - truth).abs().max() <= 1e-5


def test_points_of_any_scale_keep_their_digits():
    """The unit of a cloud follows its largest coordinate, so halves serve 1e-12 and 1e12 alike."""
    u, v, h = problem(30, 40, 5)
    for scale in (1e-12, 1e12):
        within(softmin(u * scale, v / scale, h, 0.1), naive_softmin, u, v, h, 0.1)


def naive_sinkhorn(C, a, b, eps, tau_a, tau_b, g, k):
    """The iterations as the paper has them, in float64: (f, g, g_next)."""
    damp_a, damp_b = 1 / (1 + eps / tau_a), 1 / (1 + eps / tau_b)
    f = g_next = g
    for _ in range(k):
        g = g_next
        f = -damp_a * eps * torch.logsumexp((g + eps * b.log() - C) / eps, 1)
        g_next = -damp_b * eps * torch.logsumexp(((f + eps * a.log())[:, None] - C) / eps, 0)
    return f, g, g_next


@pytest.mark.parametrize(
    "n, m, eps, tau_a, tau_b",
    [
        *((1, 1, 0.1, 0.9, 0.4), (5, 7, 0.1, INF, 0.05), (63, 40, 0.05, INF, INF), (63, 40, 1e-3, 0.9, 0.4)),
        *((70, 130, 0.02, INF, 0.05), (130, 256, 10.0, INF, INF), (130, 256, 10.0, 0.9, 0.4)),
    ],
)
def test_a_resident_problem_runs_the_same_iterations(n, m, eps, tau_a, tau_b):
    """Same potentials as the naive ones, after one iteration and after thirty, whatever the batch."""
    torch.manual_seed(0)
    C, a, b = torch.rand(2, n, m), torch.rand(2, n) + 0.1, torch.rand(2, m) + 0.1
    C[1] *= 3
    if n > 2:
        a[0, 2] = b[0, 3] = 0  # empty atoms have potentials too
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    start = 0.1 * torch.rand(2, m)
    for k in (1, 30):
        moved = run(C, a, b, None, None, start, eps, k, taus=(tau_a, tau_b))
        for i in range(2):
            x, y, z, first = (t[i].double() for t in (C, a, b, start))
            for ours, theirs in zip(moved, naive_sinkhorn(x, y, z, eps, tau_a, tau_b, first, k), strict=True):
                torch.testing.assert_close(ours[i], theirs.float(), rtol=2e-6, atol=2e-6 * max(1, eps))
    for ours, theirs in zip(run(C[1:], a[1], b[1], None, None, start[1:], eps, 30, taus=(tau_a, tau_b)), moved, strict=True):
        assert torch.equal(ours[0], theirs[1]), "a problem does not depend on its batch"


def test_a_resident_problem_goes_on_where_it_was():
    torch.manual_seed(0)
    C, a, b = torch.rand(1, 40, 30), torch.full((40,), 1 / 40), torch.full((30,), 1 / 30)
    f, g, g_next = run(C, a, b, None, None, torch.zeros(1, 30), 0.05, 60)
    again = run(C, a, b, f, g, g_next, 0.05, 1)
    torch.testing.assert_close(again[1], g_next, rtol=0, atol=0)
    P = a[:, None] * b * ((f[0][:, None] + g[0] - C[0]) / 0.05).exp()
    assert (P.sum(1) - a).abs().sum() <= 1e-5 and (P.sum(0) - b).abs().sum() <= 1.1e-5


SHAPES = [
    *((1, 1, (), 1), (63, 257, (), 3), (130, 100, (), 4), (40, 1, (), 2), (1, 40, (), 2)),
    *((21, 5000, (), 1), (67, 33, (3,), 8), (5, 7, (2, 2), 1)),
]


@pytest.mark.parametrize("shape, tau, dtype", pairwise(SHAPES, [INF, 2.0, 0.01], [torch.float32, torch.float64]), ids=str)
def test_both_products_from_one_read(monkeypatch, shape, tau, dtype):
    """Entries and weights of any size, dropped entries, empty atoms; rows that no program's share or tile divides."""
    n, m, batch, processors = shape
    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    torch.manual_seed(n + m)
    K = torch.rand(*batch, n, m, dtype=torch.float64).mul(-30).exp()
    K[torch.rand_like(K) < 0.2] = 0
    K[..., 0] = 1
    w, a = (10 ** (-12 * torch.rand(*batch, size, dtype=torch.float64)) for size in (m, n))
    if m > 1:
        w[..., 1] = 0
    if n > 1:
        a[..., 1] = 0
    K, w, a = (z.to(dtype) for z in (K, w, a))
    power = None if tau == INF else Power.damped(100 * torch.rand(*batch, n, dtype=torch.float64) - 50, tau, 0.1 if tau == 2.0 else 5.0)
    products = Products(K)
    assert not products.whole_rows, "a CPU is not asked to interpret kernels"
    peer = products.both(w, a, power)
    wide = Products(K.double()).both(w.double(), a.double(), power)
    products.whole_rows = True
    ours = products.both(w, a, power)
    slack = 5e-7 if dtype == torch.float32 else 2e-13
    for name, mine, torchs, right in zip("st", ours, peer, wide, strict=True):
        assert mine.shape == right.shape and mine.dtype == dtype
        worst, budget = (((z - right).abs() / right.abs().clamp_min(1e-300)).max().item() for z in (mine, torchs))
        assert worst <= 2 * budget + slack, f"{name} off by {worst:.2e}, torch by {budget:.2e}"
    for again, mine in zip(products.both(w, a, power), ours, strict=True):
        assert torch.equal(again, mine), "sums come in the same order each time"


@pytest.mark.parametrize("m, dtype", [(16384, torch.float32), (8192, torch.float64)])
def test_the_longest_rows_that_fit(m, dtype):
    K, w, a = torch.rand(3, m, dtype=dtype), torch.rand(m, dtype=dtype), torch.rand(3, dtype=dtype)
    s, t = scaling.both(K, w, a)
    tight = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(s, K @ w, rtol=tight, atol=0)
    torch.testing.assert_close(t, K.T @ (a / s), rtol=tight, atol=0)
    longer = torch.rand(2, m + 1, dtype=dtype)
    assert not scaling.fits(longer)
    with pytest.raises(ValueError, match="64 KiB"):
        scaling.both(longer, longer[0], longer[:, 0])


def test_vectors_that_share_a_kernel_stay_a_product_of_matrices():
    products = Products(torch.rand(6, 9))
    products.whole_rows = True
    w, a = torch.rand(4, 9), torch.rand(4, 6)
    torch.testing.assert_close(products.both(w, a, None), (w @ products.K.T, (a / (w @ products.K.T)) @ products.K))


def test_a_sum_that_is_not_a_number_stays_visible():
    """Sums that vanish or overflow reach the caller, who looks at them to decide whether a product can be trusted."""
    K = torch.tensor([[0.0, 0.0], [1e38, 1e38], [1.0, 1.0]])
    s, t = scaling.both(K, torch.tensor([10.0, 10.0]), torch.ones(3))
    assert s[0] == 0 and s[1] == INF and s[2] == 20 and not t.isfinite().all()


@pytest.mark.parametrize("penalty, batch, dtype", pairwise([KL(), KL(0.3)], [(), (2,)], [torch.float32, torch.float64]), ids=str)
def test_a_dense_solve_by_whole_rows(monkeypatch, penalty, batch, dtype):
    """The iterations of a stored matrix with this kernel for its products, against the readable form of the same."""
    calls, init, kernel = [], Products.__init__, absorbed.iterate

    def asked(self, K):
        init(self, K)
        self.lone, self.whole_rows = False, True

    monkeypatch.setattr(Products, "__init__", asked)
    monkeypatch.setattr(absorbed, "iterate", lambda *given, **options: calls.append(given) or kernel(*given, **options))
    monkeypatch.setattr(tuning, "processors", lambda device: 2)
    torch.manual_seed(0)
    a = torch.rand(30, dtype=torch.float64)
    a[3] = 0
    asking = Problem(torch.rand(*batch, 30, 41, dtype=dtype), 0.005, a / a.sum(), None, penalty)
    ours, theirs = (solve(asking, backend=name, tol=0.0, max_iter=41, accelerate="none") for name in ("dense", "softmin"))
    assert calls
    tight = 2e-7 if dtype == torch.float32 else 1e-14
    for name in ("value", "f", "g"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tight, atol=tight)


@pytest.mark.parametrize("n, d, batch", [(1, 1, 1), (130, 2, 1), (50, 4, 3), (128, 10, 2), (60, 17, 1), (140, 200, 1), (20, 300, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_are_stored_as_halves(n, d, batch, dtype):
    torch.manual_seed(n + d)
    x = torch.randn(batch, d, n, dtype=dtype).mT * 10.0 ** torch.randint(-9, 9, (batch, 1, 1))
    x[0, 0] = 0
    for weights in (False, True):
        stored, twin = split(x, weights), split_by_torch(x, weights)
        assert torch.equal(stored.unit, twin.unit) and torch.equal(stored.data, twin.data)
        assert (stored.parts, stored.packed, stored.n, stored.d) == (twin.parts, twin.packed, n, d)
        assert stored.packed == (0 if weights or d > 10 else min(q for q in (2, 5, 10) if q >= d))
        if not stored.packed:
            seen = (stored.data[:, :n, :d].double() + stored.data[:, :n, stored.width : stored.width + d]) * stored.unit[:, None, None]
            assert ((seen - x).abs().amax((1, 2)) <= 2.0**-21 * x.abs().amax((1, 2))).all()
    assert cloud(torch.zeros(3, 4)).data.abs().max() == 0


@pytest.mark.parametrize("n, m, batch", [(1, 1, 1), (7, 1030, 1), (13, 40, 3)])
@pytest.mark.parametrize("eps, offset, scale", [(1e-3, 0.0, 1.0), (1e-3, 300.0, 1.0), (0.1, 0.0, 1e8), (1e-9, 0.0, 1e-7)])
@pytest.mark.parametrize("given", [False, True])
def test_an_absorbed_kernel_keeps_the_digits_of_wide_potentials(n, m, batch, eps, offset, scale, given):
    """Potentials far from 0 beside costs in fp32: exponents to the last digits of fp32, however many of them the potentials have."""
    torch.manual_seed(n)
    eps, C = eps * max(scale, 1.0), scale * torch.rand(batch, n, m)
    g = scale * (torch.randn(batch, m).double() / 10 + offset)
    C[..., m // 2] = INF if m > 2 else 0.0
    f = (C.double() - g[:, None]).amin(-1) - 0.3 * eps * torch.rand(batch, n).double() if given else None
    K, made = absorb(C, g, eps, -64.0, f)
    z = (made[..., None] + g[:, None] - C.double()) / eps
    assert made.dtype == torch.float64 and K.dtype == torch.float32
    truth = torch.where(z > -64, z.exp(), 0.0)
    sure = (z + 64).abs() > 1e-3  # beside the edge either is right
    error = ((K - truth).abs() / (truth * (1 + z.abs())).clamp(min=1e-38))[sure]
    assert K.isfinite().all() and error.nan_to_num().max() < 3e-7  # NaN at exponents of -inf, whose entries are 0
    if not given:
        assert (z.amax(-1).abs() < 1e-2 + 1e-7 * g.abs().amax() / eps).all()
