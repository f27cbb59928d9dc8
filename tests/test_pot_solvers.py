"""POT's unified API: `solve`, `solve_sample`, `solve_batch`; values, gradients by mode, and what is POT's alone."""

import warnings

import numpy as np
import ot
import pytest
import torch

import gpu_ot
from gpu_ot.pot import batch, solvers
from gpu_ot.pot.refusals import Elsewhere
from gpu_ot.pot.relaxed import run
from problems import close, gradcheck, leaves, measures, numbers, pairwise, rand, random_problem

ATTRIBUTES = ("value", "value_linear", "plan", "potential_a", "potential_b")
POINTS = measures(12, 9, 3, shift=0.0)[:2]
#: (a (B, n), b (B, m), M (B, n, m))
BATCH = [torch.stack(z) for z in zip(*(random_problem(12, 9, seed=s) for s in range(3)), strict=True)]
GRADS = ("autodiff", "envelope", "last_step", "detach")


KINDS = pytest.mark.parametrize("kind", [lambda z: z.numpy(), lambda z: z], ids=["numpy", "torch"])
REG_TYPE = pytest.mark.parametrize("reg_type", ["KL", "entropy"])


@KINDS
@pytest.mark.parametrize("grad", GRADS)
@REG_TYPE
def test_balanced_results_are_pots(problem, kind, reg_type, grad):
    a, b, M = (kind(z) for z in problem(20, 15))
    ours, theirs = (
        f(M, a, b, reg=0.1, reg_type=reg_type, tol=1e-12) for f in (lambda *z, **k: solvers.solve(*z, **k, grad=grad), ot.solve)
    )
    for name in ATTRIBUTES:
        close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-9)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    assert ours.converged and ours.status.name == "converged" and ours.n_iter > 0 and len(ours.errors) > 1
    assert ours.log is None and ours.lazy_plan is None and ours.value_quad is None
    close(ours.marginals[0], a, rtol=1e-12)
    close(ours.marginal_b, b, rtol=0, atol=1e-9)
    assert type(ours.sparse_plan) is type(theirs.sparse_plan)


@pytest.mark.parametrize("unbalanced_type", ["KL", "TV"])
@REG_TYPE
def test_relaxed_values_are_the_objective(problem, reg_type, unbalanced_type):
    """POT's KL value is 0 at every optimum; its L-BFGS-B stops early, at a higher value of the same objective."""
    a, b, M = (z.numpy() for z in problem(12, 9))
    b = 1.3 * b
    ours = solvers.solve(M, a, b, reg=0.1, reg_type=reg_type, unbalanced=(0.5, 0.4), unbalanced_type=unbalanced_type, tol=1e-11)
    divergences = dict(reg_div=reg_type, regm_div=unbalanced_type)
    _, log = ot.unbalanced.lbfgsb_unbalanced(a, b, M, 0.1, (0.5, 0.4), log=True, numItermax=5000, stopThr=1e-15, **divergences)
    assert ours.value <= log["total_cost"] + 1e-9
    penalty = gpu_ot.KL if unbalanced_type == "KL" else gpu_ot.TV
    dual = run(a, b, M, 0.1, (0.5, 0.4), reg_type=reg_type, penalty=penalty, stopThr=1e-11).optimum()
    assert ours.value == pytest.approx(float(dual), abs=1e-8)  # and no plan costs less than the dual
    if unbalanced_type == "KL":
        assert ours.value == pytest.approx(log["total_cost"], abs=1e-9)
    if reg_type == unbalanced_type == "KL":
        theirs = ot.solve(M, a, b, reg=0.1, unbalanced=(0.5, 0.4), tol=1e-12)
        assert abs(theirs.value) < 1e-6 < ours.value
        for name in ATTRIBUTES[1:]:
            close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-8)


#: Iterations: an envelope holds at the solution, and automatic differentiation after any number of them.
ENOUGH = {"envelope": 200, "autodiff": 40}


@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
@REG_TYPE
def test_gradients_of_the_balanced_value(reg_type, grad):
    """In a and b too, where POT's envelope for KL is up to 60 % off."""

    def value(a, b, M, reg):
        return solvers.solve(M, a / a.sum(), b / b.sum(), reg=reg, reg_type=reg_type, grad=grad, tol=0.0, max_iter=ENOUGH[grad]).value

    assert gradcheck(value, (*leaves(*random_problem(6, 5)), *numbers(0.1)))


@pytest.mark.parametrize("unbalanced_type, grad, reg_type", pairwise(["KL", "TV"], ["autodiff", "envelope"], ["KL", "entropy"]))
def test_gradients_of_the_relaxed_value(unbalanced_type, grad, reg_type):
    def value(a, b, M, reg, *taus):
        # 1.3: with equal masses total variation has a kink
        options = dict(unbalanced=taus, unbalanced_type=unbalanced_type, reg_type=reg_type, grad=grad, tol=0.0, max_iter=ENOUGH[grad])
        return solvers.solve(M, a, 1.3 * b, reg=reg, **options).value

    assert gradcheck(value, (*leaves(*random_problem(4, 3)), *numbers(0.1, 0.4, 0.7)))


@pytest.mark.parametrize("grad", ["autodiff", "last_step"])
def test_gradients_of_everything(grad):
    def everything(a, b, M):
        found = solvers.solve(M, a / a.sum(), b / b.sum(), reg=0.1, grad=grad, tol=0.0, max_iter=60)
        return found.plan, found.value_linear, found.value

    assert gradcheck(everything, leaves(*random_problem(5, 4)))


def test_modes_carry_what_they_say(problem):
    a, b, M = leaves(*problem(6, 5))
    for relaxed in (None, 0.5):
        envelope = solvers.solve(M, a, b, reg=0.1, grad="envelope", unbalanced=relaxed)
        assert envelope.value.requires_grad and not envelope.plan.requires_grad and not envelope.value_linear.requires_grad
        nothing = solvers.solve(M, a, b, reg=0.1, grad="detach", unbalanced=relaxed)
        with pytest.raises(RuntimeError):
            nothing.value.backward()
        close(envelope.value, nothing.value, rtol=1e-12)
    with pytest.raises(ValueError, match="grad=last_step"):
        solvers.solve(M, a, b, reg=0.1, grad="last_step", max_iter=0)


ALONE = [
    *((dict(), "ot.emd"), (dict(reg=0), "ot.emd"), (dict(unbalanced=1.0), "ot.unbalanced.mm_unbalanced")),
    *((dict(reg=0.1, reg_type=kind), "ot.solve") for kind in ("L2", (abs, abs), "cryptic divergence")),
    (dict(reg=0.1, unbalanced=1.0, unbalanced_type="L2"), "ot.unbalanced.lbfgsb_unbalanced"),
    (dict(reg=0.1, unbalanced=1.0, method="mm"), "ot.unbalanced.mm_unbalanced"),
]


@pytest.mark.parametrize("options, function", ALONE, ids=str)
def test_what_is_pots_alone_names_its_function(problem, options, function):
    a, b, M = problem(6, 5)
    with pytest.raises(NotImplementedError, match=function.replace(".", r"\.")) as seen:
        solvers.solve(M, a, b, **options)
    assert isinstance(seen.value, Elsewhere) and isinstance(seen.value, gpu_ot.ProblemError)


def test_wrong_settings(problem):
    a, b, M = problem(6, 5)
    for options, message in (
        (dict(reg=0.1, method="simplex"), "Unknown method"),
        (dict(reg=-1.0), "reg must be"),
        (dict(reg=0.1, grad="maybe"), "grad"),
    ):
        with pytest.raises(ValueError, match=message):
            solvers.solve(M, a, b, **options)
    with pytest.raises(ValueError, match="M must be an array"):
        solvers.solve([[0.0, 1.0]], reg=0.1)
    for relaxed in (None, 1.0):
        with pytest.warns(UserWarning, match="Sinkhorn did not converge"):
            solvers.solve(M, a, b, reg=1e-3, max_iter=3, unbalanced=relaxed)


def test_potentials_to_start_from_are_used(problem):
    a, b, M = problem(20, 15)
    for relaxed in (None, 0.5):
        found = solvers.solve(M, a, b, reg=0.05, unbalanced=relaxed)
        again = solvers.solve(M, a, b, reg=0.05, unbalanced=relaxed, potentials_init=found.potentials, tol=1e-7)
        assert found.n_iter > 0 and again.n_iter == 0


@KINDS
def test_zero_weights(problem, kind):
    a, b, M = problem(12, 9)
    a[0], b[:2] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    truth = ot.bregman.sinkhorn_log(a, b, M, 0.1, stopThr=1e-12)
    for reg_type in ("KL", "entropy"):
        found = solvers.solve(kind(M), kind(a), kind(b), reg=0.1, reg_type=reg_type, tol=1e-12)
        close(found.plan, truth, rtol=0, atol=1e-10)
        reference = torch.outer(a, b) if reg_type == "KL" else torch.ones_like(M)
        entropy = torch.special.xlogy(truth, truth / torch.where(reference > 0, reference, 1.0)).sum()
        assert float(found.value) == pytest.approx(float((truth * M).sum() + 0.1 * entropy), rel=1e-9)
    a, b, M = a.requires_grad_(), b.requires_grad_(), M.requires_grad_()
    for grad in ("autodiff", "envelope"):
        value = solvers.solve(M, a, b, reg=0.1, reg_type="entropy", grad=grad).value
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (a, b, M)))


@KINDS
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("lazy", [False, True])
def test_samples(problem, kind, metric, lazy):
    a, b, x, y = (kind(z) for z in (*problem(12, 9)[:2], *POINTS))
    ours = solvers.solve_sample(x, y, a, b, metric, 0.2, lazy=lazy, tol=1e-11)
    theirs = ot.solve_sample(x, y, a, b, metric, 0.2, tol=1e-12)
    for name in ("value", "value_linear"):
        close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-9)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    close(ours.lazy_plan[:] if lazy else ours.plan, theirs.plan, rtol=0, atol=1e-9)
    assert (ours.plan is None) == lazy and type(ours.potential_a) is type(x)
    close(ours.marginal_b, b, rtol=0, atol=1e-9)
    if lazy:
        POT = ot.solve_sample(x, y, a, b, metric, 0.2, lazy=True, tol=1e-12)
        close(ours.potential_a, POT.potential_a, rtol=0, atol=1e-8)
        assert set(POT.log) <= set(ours.log)


@pytest.mark.parametrize("unbalanced_type", ["KL", "TV"])
def test_lazy_samples_relaxed(unbalanced_type):
    """POT has no lazy relaxed solver."""
    x, y = POINTS
    options = dict(reg=0.2, unbalanced=(0.3, 0.4), unbalanced_type=unbalanced_type, tol=1e-12)
    b = torch.full((9,), 0.2, dtype=torch.float64)
    lazy, dense = (solvers.solve_sample(x, y, None, b, lazy=lazy, **options) for lazy in (True, False))
    close(lazy.lazy_plan[:], dense.plan, rtol=0, atol=1e-9)
    close(lazy.value, dense.value, rtol=1e-9)
    close(lazy.value_linear, dense.value_linear, rtol=1e-8)


def test_gradients_of_lazy_samples():
    inputs = leaves(*(z[:4] for z in POINTS), rand(4, seed=3) + 0.1)

    def found(x, y, a, grad="autodiff", **options):
        return solvers.solve_sample(x, y, a / a.sum(), None, reg=0.3, lazy=True, max_iter=60, tol=0.0, grad=grad, **options)

    assert gradcheck(lambda *z: (found(*z).value, found(*z).value_linear), inputs)
    for options in (dict(reg_type="entropy"), dict(unbalanced=0.5)):
        assert gradcheck(lambda *z, options=options: found(*z, "envelope", **options).value, inputs)
    assert not found(*inputs, "detach").value.requires_grad


@KINDS
def test_samples_debiased_and_scaled(kind):
    x, y = (kind(z) for z in POINTS)
    ours, theirs = (f(x, y, reg=0.2, debias=True, tol=1e-12) for f in (solvers.solve_sample, ot.solve_sample))
    close(ours.value, theirs.value, rtol=0, atol=1e-10)
    close(ours.value_linear, theirs.value_linear, rtol=0, atol=1e-10)
    assert set(ours.log) == set(theirs.log)
    scaled = solvers.solve_sample(x, y, reg=0.2, scaler=lambda z: 2 * z)  # POT scales the first cloud alone
    close(scaled.plan, solvers.solve_sample(2 * x, 2 * y, reg=0.2).plan, rtol=0, atol=1e-12)
    close(ot.solve_sample(x, y, reg=0.2, scaler=lambda z: 2 * z).plan, ot.solve_sample(2 * x, y, reg=0.2).plan, rtol=0, atol=1e-12)


def test_methods_of_samples():
    x, y = POINTS
    for method in ("sinkhorn", "sinkhorn_log", "geomloss_tensorized"):
        assert solvers.solve_sample(x, y, reg=0.2, method=method).plan is not None
    for method in ("geomloss", "geomloss_online"):
        found = solvers.solve_sample(x, y, reg=0.2, method=method)
        assert found.lazy_plan is not None and found._formed is None
        close(found.plan, found.lazy_plan[:], rtol=0, atol=0)  # formed when read, as geomloss's results do
    for options in (dict(method="sliced"), dict(method="1d"), dict(), dict(lazy=True), dict(reg=0.2, debias="split")):
        with pytest.raises(Elsewhere, match=r"ot\.(solve|emd)"):
            solvers.solve_sample(x, y, **options)
    with pytest.raises(ValueError, match="Unknown method"):
        solvers.solve_sample(x, y, method="invalid_method")
    with pytest.raises(ValueError, match="lazy"):
        solvers.solve_sample(x, y, reg=0.2, lazy=True, c=torch.ones(12, 9))


ENDS = [(1, 0), (3, 0), (100, 0), (1000, 1e-5), (1000, 1e-9)]


@KINDS
@pytest.mark.parametrize("end, method, reg_type", pairwise(ENDS, ["auto", "log_sinkhorn", "sinkhorn"], ["entropy", "kl"]), ids=str)
def test_batches_are_pots(kind, method, reg_type, end):
    a, b, M = (kind(z) for z in BATCH)
    iterations, tol = end
    options = dict(reg_type=reg_type, method=method, max_iter=iterations, tol=tol)
    ours, theirs = (f(M, 0.1, a, b, **options) for f in (batch.solve_batch, ot.batch.solve_batch))
    for name in ATTRIBUTES:
        close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-10)
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    if tol:
        assert ours.log == theirs.log and np.asarray(ours.converged).all()
    close(ours.marginals[1], b, rtol=1e-12)


@pytest.mark.parametrize("grad", ["envelope", "autodiff"])
@REG_TYPE
def test_gradients_of_batches(reg_type, grad):
    """POT's envelope does not reach the weights."""
    a, b, M = BATCH

    def value(a, b, M, reg):
        a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
        return batch.solve_batch(M, reg, a, b, reg_type=reg_type.lower(), grad=grad, tol=0, max_iter=ENOUGH[grad]).value

    assert gradcheck(value, (*leaves(a[:2, :4], b[:2, :3], M[:2, :4, :3]), *numbers(0.1)))


def test_modes_of_batches():
    a, b, M = leaves(*BATCH)
    a, b = a.detach(), b.detach()
    exact = dict(tol=1e-12, max_iter=100_000)
    envelope = batch.solve_batch(M, 0.1, a, b, **exact)
    assert not envelope.plan.requires_grad
    (grad,) = torch.autograd.grad(envelope.value_linear.sum(), M)  # POT has the plan, which holds it still
    (right,) = torch.autograd.grad(batch.solve_batch(M, 0.1, a, b, grad="autodiff", **exact).value_linear.sum(), M)
    close(grad, right, rtol=0, atol=1e-8)
    with pytest.raises(RuntimeError):
        batch.solve_batch(M, 0.1, a, b, grad="detach").value.sum().backward()
    for wrong in (dict(method="foo"), dict(reg_type="foo"), dict(grad="foo"), dict(method="sinkhorn", reg=0)):
        with pytest.raises(ValueError):
            batch.solve_batch(M, **dict(reg=0.1) | wrong)
    with pytest.raises(Elsewhere, match=r"ot\.batch\.solve_batch"):
        batch.solve_batch(M)
    a[:, 0] = 0  # POT: NaN
    assert batch.solve_batch(M, 0.1, a / a.sum(-1, keepdim=True), b, reg_type="kl").value.isfinite().all()


@KINDS
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "minkowski", "kl"])
def test_distances_of_batches(kind, metric):
    x, y = (kind(rand(3, n, 4, seed=n)) for n in (6, 5))
    close(batch.dist_batch(x, y, metric), ot.batch.dist_batch(x, y, metric), rtol=0, atol=1e-13)
    ours = batch.solve_sample_batch(x, y, 0.2, metric=metric).value
    for k in range(3):  # each ends on its own
        close(ours[k : k + 1], ot.batch.solve_sample_batch(x[k : k + 1], y[k : k + 1], 0.2, metric=metric).value, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="Unknown metric: foo"):
        batch.dist_batch(x, y, "foo")


@KINDS
@pytest.mark.parametrize("name", ["bregman_log_projection_batch", "bregman_projection_batch"])
def test_projections(kind, name):
    a, b, M = BATCH
    K = kind(-M / 0.1 if "log" in name else (-M / 0.1).exp())
    ours, theirs = (getattr(library, name)(K, kind(a), kind(b)) for library in (batch, ot.batch))
    assert set(ours) == set(theirs) and ours["n_iters"] == theirs["n_iters"]
    for key in set(theirs) - {"n_iters", "potentials"}:
        close(ours[key], theirs[key], rtol=0, atol=1e-12)
    close(ours["potentials"][0], theirs["potentials"][0], rtol=1e-10)
    close(batch.entropy_batch(ours["T"]), ot.batch._utils.entropy_batch(theirs["T"]), rtol=1e-9)
    close(batch.loss_linear_batch(kind(M), ours["T"]), ot.batch.loss_linear_batch(kind(M), theirs["T"]), rtol=1e-10)


class Foreign:
    """An array of some other library, as far as DLPack needs to know it."""

    def __init__(self, z):
        self._z = z

    def __dlpack__(self, **options):
        return self._z.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._z.__dlpack_device__()

    @property
    def shape(self):
        return self._z.shape

    @staticmethod
    def from_dlpack(z):
        return Foreign(torch.from_dlpack(z))


class Spaced(Foreign):
    """One whose module has the way back, as the array API asks."""

    def __array_namespace__(self):
        return Foreign


@pytest.mark.parametrize("library", [Foreign, Spaced])
def test_foreign_arrays_come_back_in_kind(problem, library):
    a, b, M = problem(6, 5)
    theirs = [library(z) for z in (a, b, M)]
    P, log = gpu_ot.sinkhorn(*theirs, 0.1, log=True)
    assert type(P) is Foreign and type(log["u"]) is Foreign
    close(P._z, gpu_ot.sinkhorn(a, b, M, 0.1), rtol=0, atol=0)
    found = solvers.solve(theirs[2], *theirs[:2], reg=0.1)
    assert type(found.plan) is Foreign and type(found.value) is Foreign
    lists = gpu_ot.sinkhorn(a.tolist(), b.tolist(), theirs[2], 0.1)
    close(lists._z, P._z, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="same type/backend"):
        gpu_ot.sinkhorn(a, b, theirs[2], 0.1)
    with pytest.raises(Elsewhere, match="Opaque"):
        gpu_ot.sinkhorn(a, b, type("Opaque", (), {"shape": (6, 5)})(), 0.1)


def test_weights_may_be_integers_and_lists(problem):
    M = problem(3, 2)[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(solvers.solve(M, torch.tensor([1, 0, 1]), torch.tensor([1, 1]), reg=0.1).marginal_a, [1, 0, 1], rtol=1e-12)
    for a, b, costs in (([1, 0, 1], [1, 1], M), (np.array([1, 0, 1]), np.array([1, 1]), M.float())):
        close(gpu_ot.sinkhorn(a, b, costs.numpy(), 0.1).sum(1), [1, 0, 1], rtol=1e-6)
