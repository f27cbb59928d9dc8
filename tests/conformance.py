"""What every backend must do, against the formulas as they are written, in float64.

A backend inherits the suite with two things, how it is built and what it serves:

    class TestMine(Conformance):
        costs = ("squared", "dot")

        def build(self, problem):
            return Mine(problem.cost)

Every test runs for so many combinations of costs, sizes, types and so on that any two values of them meet. The budget is the error of
torch's own operations in the type that the backend computes in, twice, and a few roundings of the largest number in sight.
"""

import math

import pytest
import torch

import gpu_ot
from gpu_ot import KL, TV, Cosine, Dot, Euclidean, Formula, Matrix, Problem, SqEuclidean
from gpu_ot.geometry.select import bind
from gpu_ot.penalties import BALANCED
from gpu_ot.solver.step import Alternating, State
from problems import INF, clouds, leaves, pairwise, rand, randn, weights


def manhattan(x, y):
    return (x - y).abs().sum(-1)


#: name: (the cost of two clouds, the same as a function of two points)
COSTS = {
    "squared": (SqEuclidean, lambda x, y: (x - y).square().sum(-1)),
    "euclidean": (Euclidean, lambda x, y: (x - y).square().sum(-1).sqrt()),
    "dot": (Dot, lambda x, y: -(x * y).sum(-1)),
    "cosine": (Cosine, lambda x, y: 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))),
    "formula": (lambda x, y: Formula(manhattan, x, y), manhattan),
    "folding sum": (
        lambda x, y: 0.3 * SqEuclidean(x, y) + 2.0 * Cosine(x, y),
        lambda x, y: 0.3 * COSTS["squared"][1](x, y) + 2.0 * COSTS["cosine"][1](x, y),
    ),
    "mixed sum": (
        lambda x, y: 0.3 * SqEuclidean(x, y) + 0.5 * Euclidean(x, y) + 0.1 * Dot(x, y),
        lambda x, y: 0.3 * COSTS["squared"][1](x, y) + 0.5 * COSTS["euclidean"][1](x, y) + 0.1 * COSTS["dot"][1](x, y),
    ),
    "matrix": (lambda x, y: Matrix(between("squared", x, y)), lambda x, y: COSTS["squared"][1](x, y)),
}


def between(name, x, y):
    """C_ij between all points, (*batch, n, m)."""
    return COSTS[name][1](x.unsqueeze(-2), y.unsqueeze(-3))


# The two verbs and the iterations as they are written: the truth for C in float64, and what torch makes of C in float32.


def softmin(C, h, eps):
    z = (h.unsqueeze(-2) - C.to(h.dtype)) / eps
    top = z.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return -eps * (top.squeeze(-1) + (z - top).to(C.dtype).exp().sum(-1).to(h.dtype).log())


def plan(C, k, h, eps):
    return ((k.unsqueeze(-1) + h.unsqueeze(-2) - C.to(h.dtype)) / eps).to(C.dtype).exp()


def damp(f, penalty, eps):
    return f.clamp(-penalty.tau, penalty.tau) if isinstance(penalty, TV) else f / (1 + eps / penalty.tau)


def weighed(g, b, eps):
    return torch.where(b > 0, g + eps * b.log(), -INF)


def iterations(C, problem, g, eps, k):
    """(f, g, the update of g) after k iterations from g."""
    on_a, on_b = problem.penalties
    g_next = g
    for _ in range(k):
        g = g_next
        f = damp(softmin(C, weighed(g, problem.b, eps), eps), on_a, eps)
        g_next = damp(softmin(C.mT, weighed(f, problem.a, eps), eps), on_b, eps)
    return f, g, g_next


def iterate(geometry, problem, g, eps, k):
    """The same by a backend."""
    state = geometry.run(Alternating(problem, eps), State(g, g, g), k)
    return state.f, state.g, state.g_next


def scaled(penalty, unit):
    """The penalties of both sides, whose tau is given in units of the cost."""
    return tuple(type(each)(each.tau * unit) for each in (penalty if isinstance(penalty, tuple) else (penalty, penalty)))


#: A few roundings, relative to the largest number in sight.
SLACK = {torch.float32: 1e-6, torch.float64: 1e-12}


#: Argument of a test: the list of its backend that it goes through.
AXES = dict(
    name="costs", size="sizes", dtype="dtypes", sharpness="sharpnesses", penalty="penalties",
    batch="batches", k="blocks", warm="warm", transposed="transposed",
)  # fmt: skip


class Conformance:
    """The suite. What a backend serves are the lists below; a subclass shortens them."""

    #: Its name; or override `build` and `solve`.
    backend = ""
    costs = tuple(COSTS)
    dtypes = (torch.float64, torch.float32)
    sizes = ((1, 1, 1), (63, 257, 3), (128, 100, 17))
    sharpnesses = (1.0, 0.05, 1e-3)
    penalties = (KL(), KL(0.3), (KL(), KL(0.05)), (KL(10.0), TV(0.3)))
    #: (of the cost, of the weights)
    batches = (((3,), (3,)), ((2, 2), (2, 2)), ((), (4,)), ((2, 1), (2, 3)), ((3,), ()))
    blocks = (1, 7, 10)
    warm = (False, True)
    transposed = (False, True)
    device = "cpu"
    #: Iterations of a whole solve, and between its checks.
    iterations = 41, 20
    #: Whether each float32 iteration may move the constant that f and g of a balanced problem share by a few roundings. It changes no plan.
    drifts = False

    def build(self, problem):
        return bind(problem, self.backend)

    def solve(self, problem, **options):
        return gpu_ot.solve(problem, backend=self.backend, **options)

    def pytest_generate_tests(self, metafunc):
        axes = [name for name in AXES if name in metafunc.fixturenames and hasattr(Conformance, metafunc.function.__name__)]
        if axes:
            rows = pairwise(*(getattr(self, AXES[name]) for name in axes))
            ids = ["-".join(str(value).removeprefix("torch.").replace(" ", "") for value in row) for row in rows]
            metafunc.parametrize(axes, rows, ids=ids)

    def pose(self, name, size, dtype, sharpness=0.1, *, batch=((), ()), offset=0.0, penalty=BALANCED, points=None):
        """A problem, its costs in float64 and in the type of its points, and eps."""
        n, m, d = size
        cloud_batch, weight_batch = batch
        if points is None:
            points = (z.to(self.device) for z in clouds(n, m, d, cloud_batch, offset=offset, dtype=dtype))
        x, y = points
        near = [z.detach() - offset for z in (x, y)]  # exact in either type, and the costs of far-off points that are compared need it
        C, rounded = (between(name, *(z.to(kind) for z in near)) for kind in (torch.float64, dtype))
        eps = sharpness * max(1.0, float(C.abs().max()))
        a, b = (weights(k, weight_batch, empty=int(k > 2), seed=seed, dtype=dtype).to(self.device) for seed, k in enumerate((n, m)))
        return Problem(COSTS[name][0](x, y), eps, a, b, scaled(penalty, eps / sharpness)), C, rounded, eps

    def bound(self, problem, C, eps, warm=False):
        """The backend, and potentials of the size of the costs with two empty atoms; warm: after an iteration, with what that leaves."""
        geometry = self.build(problem)
        if warm:
            iterate(geometry, problem, torch.zeros_like(problem.b), eps, 1)
        h = 0.3 * float(C.abs().max()) * randn(*problem.b.shape, seed=1).to(self.device)
        if h.shape[-1] > 2:
            h[..., 0] = h[..., h.shape[-1] // 2] = -INF
        return geometry, softmin(C, h, eps), h

    def close(self, dtype, ours, peer, truth, what="", scale=None):
        """As near as twice torch's own error, and a few roundings of this type."""
        live = truth.isfinite()
        assert ours.shape == truth.shape and torch.equal(ours[~live].to(truth.dtype), truth[~live]), what
        if live.any():
            size = max(1.0, float(truth[live].abs().max())) if scale is None else scale
            worst, torchs = (float((z - truth)[live].abs().max()) for z in (ours, peer))
            assert worst <= 2 * torchs + SLACK[dtype] * size, f"{what} off by {worst:.2e}, torch by {torchs:.2e}, size {size:.1e}"

    def test_softmin(self, name, size, dtype, sharpness, warm):
        """From both sides; and again after potentials that moved by a constant."""
        problem, C, rounded, eps = self.pose(name, size, dtype, sharpness)
        geometry, k, h = self.bound(problem, C, eps, warm)
        for moved in (h, h, h + 300 * float(C.abs().max())):
            found = geometry.softmin(moved, eps)
            assert found.dtype == h.dtype
            self.close(dtype, found, softmin(rounded, moved, eps), softmin(C, moved, eps), "softmin")
        self.close(dtype, geometry.T.softmin(k, eps), softmin(rounded.mT, k, eps), softmin(C.mT, k, eps), "softmin of the transpose")
        self.close(dtype, geometry.T.T.softmin(h, eps), softmin(rounded, h, eps), k, "softmin, transposed twice")

    def folded_plan(self, problem, k, h, eps):
        """The plan as torch sums it from the cost's folded form in float32."""
        alpha, beta, u, v = problem.cost.to(torch.float64).fold()
        return ((k - alpha).float().unsqueeze(-1) + (h - beta).float().unsqueeze(-2) + u.float() @ v.float().mT).div(eps).exp()

    #: Whether its products are sums of a folded cost in float32, which no torch operation on the matrix has the error of.
    folds = False

    def test_apply_and_plan(self, name, size, dtype, sharpness, warm, transposed):
        """For a plan whose rows sum to 1, and columns of very different sizes."""
        problem, C, rounded, eps = self.pose(name, size, dtype, sharpness)
        geometry, k, h = self.bound(problem, C, eps, warm)
        P = plan(C, k, h, eps)
        peer = self.folded_plan(problem, k, h, eps) if self.folds else plan(rounded, k, h, eps)
        if transposed:
            geometry, k, h, P, peer = geometry.T, h, k, P.mT, peer.mT
        units = torch.tensor([1.0, 1e-9, 1e6], dtype=torch.float64, device=self.device)
        v = randn(P.shape[-1], 3, seed=2).to(self.device)
        exponents = max(1.0, float(C.abs().max()) / eps)  # a rounding of an exponent is one of the entry, relatively
        self.close(dtype, geometry.apply(k, h, eps, v * units) / units, (peer @ v.to(peer.dtype)).double(), P @ v, "apply", exponents)
        self.close(dtype, geometry.plan(k, h, eps), peer, P, "plan", exponents)

    def test_pull_back(self, name, size, dtype, warm, transposed):
        """The derivative in the points, or in the matrix, of what has the derivative w_i p_ij in C_ij."""
        given = leaves(*clouds(*size, dtype=dtype))
        points = [z.to(self.device) for z in given]
        problem, C, _, eps = self.pose(name, size, dtype, points=points)
        geometry, k, h = self.bound(problem, C, eps, warm)
        w = randn(size[transposed], seed=3).to(self.device)
        G = plan(C, k, h, eps) * (w if transposed else w.unsqueeze(-1))
        exact = leaves(*given)
        truth = torch.autograd.grad(between(name, *(z.to(self.device).double() for z in exact)), exact, G)
        peers = torch.autograd.grad(between(name, *points), given, G.to(dtype), retain_graph=True)
        if transposed:
            geometry, k, h = geometry.T, h, k
        reached = [(z, grad) for z, grad in zip(geometry.inputs, geometry.pull_back(k, h, eps, w), strict=True) if z.requires_grad]
        found = torch.autograd.grad([z for z, _ in reached], given, [grad for _, grad in reached])
        for mine, peer, right, what in zip(found, peers, truth, "xy", strict=True):
            self.close(dtype, mine, peer, right, f"gradient in {what}", max(1.0, float(right.abs().max())) * 10)

    def test_iterations(self, name, size, dtype, sharpness, penalty, k, warm):
        """Blocks of k, from a start far from any solution and on from where they led, in units of eps."""
        problem, C, rounded, eps = self.pose(name, size, dtype, sharpness, penalty=penalty)
        geometry = self.build(problem)
        g = randn(size[1], seed=6).to(self.device) * (50 if warm else 0)
        for _ in range(2 if k > 1 else 5):
            g = self.compare(geometry, problem, C, rounded, g, eps, k)

    def compare(self, geometry, problem, C, rounded, g, eps, k):
        """The potentials of k iterations. To twice torch's error come four roundings of what is exponentiated at most: how far the
        potentials moved, how far damping moves them, and the logarithms of the weights."""
        ours, peer, truth = (
            iterate(geometry, problem, g, eps, k),
            iterations(rounded, problem, g, eps, k),
            iterations(C, problem, g, eps, k),
        )
        first = iterations(C, problem, g, eps, 1)[0]
        size = max(2.0, *(-float(w[w > 0].log().min()) for w in (problem.a, problem.b)))
        for right, since, penalty in zip(truth, (first, g, g), (problem.penalties[i] for i in (0, 1, 1)), strict=True):
            live = right.isfinite() & since.isfinite()
            size = max(size, float((right - since)[live].abs().max()) / eps, float(right[live].abs().max()) / penalty.tau)
        for what, mine, torchs, right in zip(("f", "g", "g_next"), ours, peer, truth, strict=True):
            assert mine.dtype == torch.float64
            live = right.isfinite()
            assert torch.equal(mine[~live], right[~live]), what
            worst, budget = (float((z - right)[live].abs().max()) / eps for z in (mine, torchs))
            # A cost formed in another way, folded say, is off by a rounding or two of its largest entry.
            formed = 0.0 if isinstance(problem.cost, Matrix) else float(C.abs().max()) / eps
            roundings = 4 * size + 2 * formed if rounded.dtype == torch.float32 else 64 * max(size, formed)
            allowed = 2 * budget + roundings * torch.finfo(rounded.dtype).eps
            assert worst <= allowed, f"{what} off by {worst:.2e} eps, torch by {budget:.2e}, exponents of {size:.1e}"
        return ours[2]

    def test_batches(self, name, dtype, batch, penalty):
        """Of costs, of weights over one cost, and of both; each cost on its own scale; and more potentials than problems."""
        size = (9, 14, 3)
        x, y = (z.to(self.device) for z in clouds(*size, batch[0], dtype=dtype))
        scale = torch.arange(1, 1 + math.prod(batch[0]), device=self.device).view(*batch[0], 1, 1)
        problem, C, rounded, eps = self.pose(name, size, dtype, batch=batch, penalty=penalty, points=(x * scale, y))
        geometry, k, h = self.bound(problem, C, eps)
        self.compare(geometry, problem, C, rounded, torch.zeros_like(problem.b), eps, 3)
        more = torch.stack((h, h.flip(-1)))
        self.close(dtype, geometry.softmin(more, eps), softmin(rounded, more, eps), softmin(C, more, eps), "softmin of more potentials")
        v = randn(*h.shape, 2, seed=2).to(self.device)
        P, peer = plan(C, k, h, eps), plan(rounded, k, h, eps)
        exponents = float(C.abs().max()) / eps
        self.close(dtype, geometry.apply(k, h, eps, v), (peer @ v.to(peer.dtype)).double(), P @ v, "apply", exponents)
        rows = torch.ones_like(k).unsqueeze(-1)
        self.close(dtype, geometry.T.apply(h, k, eps, rows), peer.double().mT @ rows, P.mT @ rows, "apply of the transpose", exponents)
        self.close(dtype, geometry.plan(k, h, eps), peer, P, "plan", exponents)

    #: Costs that a common offset of both clouds does not change.
    STILL = ("squared", "euclidean", "formula")

    def test_far_off_centre(self, dtype):
        """Clouds of unit size at distance 1e4: what the type has kept of the points is kept."""
        for name in set(self.STILL) & set(self.costs):
            problem, C, rounded, eps = self.pose(name, (50, 60, 3), dtype, 0.01, offset=1e4)
            geometry, _, h = self.bound(problem, C, eps)
            # Squares of 1e4 leave 1e8 roundings of float64 for the differences.
            slack = SLACK[dtype] if dtype == torch.float32 else 1e-7
            worst, torchs = (float((z - softmin(C, h, eps)).abs().max()) for z in (geometry.softmin(h, eps), softmin(rounded, h, eps)))
            assert worst <= 2 * torchs + slack * float(C.abs().max()), f"{name} off by {worst:.2e}, torch by {torchs:.2e}"

    def test_rows_that_meet_only_empty_atoms(self, dtype):
        problem, _, _, eps = self.pose(self.costs[0], (5, 40, 3), dtype)
        geometry, nothing, k = self.build(problem), torch.full_like(problem.b, -INF), torch.zeros_like(problem.a)
        for _ in range(2):
            assert (geometry.softmin(nothing, eps) == INF).all()
        assert (geometry.apply(k, nothing, eps, torch.ones_like(problem.b).unsqueeze(-1)) == 0).all()
        assert (geometry.T.apply(nothing, k - INF, eps, torch.ones_like(problem.a).unsqueeze(-1)) == 0).all()

    def test_forbidden_pairs(self, dtype, sharpness):
        """+inf among the costs, a row and a column that may use empty atoms only, and then potentials of inf in every iteration."""
        if "matrix" not in self.costs:
            pytest.skip("takes no matrix")
        n, m = 12, 9
        C = rand(n, m, dtype=dtype).to(self.device)
        C[rand(n, m, seed=3).to(self.device) < 0.3] = INF
        C[:, 4], C[2] = 0.5, 0.25
        C[0, 1:], C[2:, 0], C[:2, 0] = INF, INF, 0.5
        a, b = (weights(size, empty=2 - side, dtype=dtype).to(self.device) for side, size in enumerate((n, m)))
        problem = Problem(C, sharpness, a, b)
        geometry, g = self.build(problem), torch.zeros_like(problem.b)
        for k in (1, 5, 5):
            g = self.compare(geometry, problem, C.double(), C, g, sharpness, k)
        assert g[0] == INF

    def test_matrices_in_any_layout(self, dtype):
        if "matrix" not in self.costs:
            pytest.skip("takes no matrix")
        for C in (rand(30, 20, dtype=dtype).to(self.device).mT, rand(60, 40, dtype=dtype).to(self.device)[::2, ::2]):
            problem = Problem(C, 0.1)
            self.compare(self.build(problem), problem, C.double(), C, torch.zeros_like(problem.b), 0.1, 3)

    def test_whole_solves(self, name, dtype, penalty, size):
        self.solves(name, dtype, penalty, size, ((), ()), *self.iterations)

    def test_whole_solves_of_batches(self, name, dtype, penalty, batch):
        self.solves(name, dtype, penalty, (9, 14, 3), batch, 5, 20)

    def solves(self, name, dtype, penalty, size, batch, max_iter, check_every):
        """Value, potentials, plan, and the gradients in the points and the weights, with empty atoms on both sides."""
        given = [z.to(self.device) for z in clouds(*size, batch[0], dtype=dtype)]
        held = [weights(k, batch[1], empty=int(k > 2), seed=seed, dtype=dtype).to(self.device) for seed, k in enumerate(size[:2])]
        unit = max(1.0, float(between(name, *given).abs().max()))

        def run(solve, bind, dtype):
            x, y, a, b = asked = leaves(*(z.to(dtype) for z in given), *held)
            problem = Problem(bind(x, y), 0.05 * unit, a, b, scaled(penalty, unit))
            s = solve(problem, tol=0.0, max_iter=max_iter, check_every=check_every, accelerate="none")
            P = s.plan.to_dense()
            found = dict(value=s.value, f=s.f, g=s.g, plan=P, products=s.plan @ torch.ones(size[1], 4, dtype=P.dtype, device=P.device))
            grads = torch.autograd.grad((s.value * rand(*s.value.shape, seed=7).to(s.value)).sum(), asked)
            return {what: z.detach() for what, z in [*found.items(), *zip(("dx", "dy", "da", "db"), grads, strict=True)]}

        def readable(problem, **options):
            return gpu_ot.solve(problem, backend="softmin", **options)

        ours = run(self.solve, COSTS[name][0], dtype)
        peer, truth = (run(readable, lambda x, y: Matrix(between(name, x, y)), kind) for kind in (dtype, torch.float64))
        if self.drifts and dtype == torch.float32 and all(each.balanced for each in scaled(penalty, unit)):
            f, right = ours["f"], truth["f"]
            c = (f - right)[right.isfinite()].mean()
            assert c.abs() <= max_iter * SLACK[dtype] * max(1.0, float(right[right.isfinite()].abs().max()))
            ours |= {"f": f - c, "g": ours["g"] + c}
        for what, right in truth.items():
            self.close(dtype, ours[what].double(), peer[what].to(dtype), right.double(), what)
