"""Calls in one piece of machine code: between arrays, of batches, and losses of clouds. Each is as the usual way has it."""

import functools
import math
import re
import warnings

import numpy as np
import ot.batch
import pytest
import torch

import gpu_ot
from problems import clouds, pairwise, random_problem, weights

pytestmark = pytest.mark.skipif(gpu_ot.compiled.refused() is not None, reason=f"no machine code: {gpu_ot.compiled.refused()}")

SIZES = [(1, 1), (1, 7), (5, 3), (17, 64), (65, 33)]
DTYPES = [torch.float64, torch.float32]


def unaligned(z):
    """At an odd place in memory, as in files."""
    return np.ndarray(z.shape, z.dtype, bytearray(b"x" + z.tobytes()), offset=1)


def read_only(z):
    z = z.copy()
    z.setflags(write=False)
    return z


def strided(z):
    """Every second number of a larger array, in both directions."""
    out = np.zeros([2 * k for k in z.shape], z.dtype)
    out[tuple(slice(None, None, 2) for _ in z.shape)] = z
    return out[tuple(slice(None, None, 2) for _ in z.shape)]


KINDS = {
    "arrays": lambda z: z,
    "float32": lambda z: z.astype(np.float32),
    "Fortran order": np.asfortranarray,
    "strided": strided,
    "backwards": lambda z: np.ascontiguousarray(z[::-1])[::-1],
    "read-only": read_only,
    "unaligned": unaligned,
    "other byte order": lambda z: z.astype(">f8"),
    "float16": lambda z: z.astype(np.float16),
    "subclass": lambda z: z.view(np.recarray),
    "lists": lambda z: z.tolist(),
    "lists beside an array": lambda z: z if z.ndim == 2 else z.tolist(),
    "tensors": torch.from_numpy,
    "float32 tensors": lambda z: torch.from_numpy(z).float(),
    "bfloat16 tensors": lambda z: torch.from_numpy(z).bfloat16(),
    "turned tensors": lambda z: torch.from_numpy(np.ascontiguousarray(z.T)).T if z.ndim == 2 else torch.from_numpy(z),
    "negated tensors": lambda z: torch._neg_view(torch.from_numpy(-z)),
    "sparse tensors": lambda z: torch.from_numpy(z).to_sparse() if z.ndim == 2 else torch.from_numpy(z),
    "complex tensors": lambda z: torch.complex(torch.from_numpy(z), torch.from_numpy(z)),
    "parameters": lambda z: torch.nn.Parameter(torch.from_numpy(z), requires_grad=False),
    "weights that are tensors": lambda z: z if z.ndim == 2 else torch.from_numpy(z),
    "costs that are a tensor": lambda z: torch.from_numpy(z) if z.ndim == 2 else z,
    "costs of float32": lambda z: z.astype(np.float32) if z.ndim == 2 else z,
    "weights of float32": lambda z: z if z.ndim == 2 else z.astype(np.float32),
    "columns": lambda z: z if z.ndim == 2 else z[:, None],
}


#: What a warning says of the error.
ERROR = re.compile(r"an error of (\S+):")


def outcome(call):
    """What a call returns or raises, and what it warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = call()
        except Exception as error:
            found = error
    said = [(warning.category, ERROR.sub(lambda z: z[0] if float(z[1]) > 1e-14 else "rounding", str(warning.message))) for warning in told]
    return found, [each for each in said if "Casting complex" not in each[1]]  # which torch says once a process


def same(ours, theirs, rounding=1e-10):
    """Equal in type and to rounding, whatever holds the numbers."""
    assert type(ours) is type(theirs), f"{type(ours).__name__} ({str(ours)[:100]}), not {type(theirs).__name__} ({str(theirs)[:100]})"
    if isinstance(theirs, Exception):
        assert str(ours) == str(theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key], rounding)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for z, w in zip(ours, theirs, strict=True):
            same(z, w, rounding)
    elif hasattr(theirs, "dtype"):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        z, w = (np.asarray(z.double() if isinstance(z, torch.Tensor) else z, dtype=float) for z in (ours, theirs))
        digits = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}.get(str(theirs.dtype).removeprefix("torch."), rounding)
        np.testing.assert_allclose(z, w, rtol=digits, atol=digits * np.abs(w[np.isfinite(w)]).max(initial=0.0) + 1e-14)
    else:
        assert ours == theirs


@pytest.fixture
def as_usual(hidden):
    """The call gives the same, by whatever way it goes, as with machine code hidden; which is returned."""

    def check(call, rounding=1e-10):
        ours, told = outcome(call)
        with hidden():
            theirs, said = outcome(call)
        same(ours, theirs, rounding)
        assert told == said
        return ours

    return check


@pytest.fixture
def given():
    a, b, M = (z.numpy() for z in random_problem(9, 12))
    return a, b, M


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", ["sinkhorn", "sinkhorn2"])
def test_arrays_of_every_kind(as_usual, given, kind, function):
    a, b, M = (KINDS[kind](z) for z in given)
    before = [z.copy() if isinstance(z, np.ndarray) else z.clone() if isinstance(z, torch.Tensor) else list(z) for z in (a, b, M)]
    for weighed in ((a, b), (None, None), ([], [])):
        as_usual(lambda weighed=weighed: getattr(gpu_ot, function)(*weighed, M, 0.05))
    for z, kept in zip((a, b, M), before, strict=True):
        unchanged = np.array_equal(z, kept) if not isinstance(z, torch.Tensor) else torch.equal(z.to_dense(), kept.to_dense())
        assert unchanged, "the caller's numbers were changed"


def test_integer_costs(as_usual, given):
    a, b, M = given
    whole = (10 * M).astype(int)
    for z in (whole, torch.from_numpy(whole), whole.astype(np.uint8), whole > 3):
        as_usual(lambda z=z: gpu_ot.sinkhorn(*((None, None) if isinstance(z, torch.Tensor) else (a, b)), z, 0.5))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("reg", [0.1, 0.01, 1])
def test_sizes_and_types(as_usual, n, m, reg, dtype):
    a, b, M = (z.numpy().astype(dtype) for z in random_problem(n, m))
    as_usual(lambda: gpu_ot.sinkhorn(a, b, M, reg, numItermax=200))


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(numItermax=60),
        dict(numItermax=300, stopThr=1e-4),
        dict(stopThr=0.0, numItermax=40),
        dict(numItermax=0),
        dict(numItermax=-3),
        dict(numItermax=1, warn=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_log_tells_the_same_and_changes_no_bit_of_the_plan(as_usual, given, method, settings, kind):
    a, b, M = (KINDS[kind](z) for z in given)
    P, log = as_usual(lambda: gpu_ot.sinkhorn(a, b, M, 0.02, method=method, log=True, **settings), rounding=1e-7)
    alone, _ = outcome(lambda: gpu_ot.sinkhorn(a, b, M, 0.02, method=method, **settings))
    assert np.array_equal(P, alone) and log["status"] is not None


def test_acceleration_after_a_thousand_iterations(given):
    a, b, M = given
    ours, log = gpu_ot.sinkhorn(a, b, M, 2e-3, numItermax=100_000, stopThr=1e-12, log=True)
    assert 1000 < log["niter"] < 2000 and log["converged"]
    np.testing.assert_allclose(ours.sum(0), b, rtol=0, atol=1e-11)


UNUSUAL = {
    "masses that differ": lambda a, b, M: (a, 2 * b, M),
    "masses that hardly differ": lambda a, b, M: (a, (1 + 9e-6) * b, M),
    "masses that differ a little too much": lambda a, b, M: (a, (1 + 1.1e-5) * b, M),
    "masses far from 1": lambda a, b, M: (1e150 * a, 1e150 * b, M),
    "tiny masses": lambda a, b, M: (1e-300 * a, 1e-300 * b, M),
    "huge masses": lambda a, b, M: (1e300 * a, 1e300 * b, M),
    "no mass on one side": lambda a, b, M: (0 * a, b, M),
    "no mass at all": lambda a, b, M: (0 * a, 0 * b, M),
    "a short a": lambda a, b, M: (a[:-1], b, M),
    "no rows": lambda a, b, M: (a[:0], b, M[:0]),
    "three axes": lambda a, b, M: (a, b, M[None]),
    "several histograms": lambda a, b, M: (a, np.stack((b, b), 1), M),
    "empty atoms": lambda a, b, M: (np.append(a, 0), np.append(b, 0), np.pad(M, (0, 1))),
    "negative costs": lambda a, b, M: (a, b, M - 5),
    "costs that are all one": lambda a, b, M: (a, b, 0 * M + 3),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_problems_end_as_they_did(as_usual, given, what):
    a, b, M = UNUSUAL[what](*given)
    as_usual(lambda: gpu_ot.sinkhorn(a, b, M, 0.05))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0], ids=str)
@pytest.mark.parametrize("where", range(3), ids="abM")
@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_unusual_numbers_are_refused_as_they_were(as_usual, given, number, where, kind):
    given = [z.copy() for z in given]
    given[where].flat[2] = number
    a, b, M = (KINDS[kind](z) for z in given)
    as_usual(lambda: gpu_ot.sinkhorn(a, b, M, 0.05))


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(reg=z) for z in (0, -1.0, math.nan, math.inf, "x", None, True)),
        *(dict(reg=z) for z in (np.float32(0.05), np.int64(1), np.array(0.05), torch.tensor(0.05))),
        *(dict(numItermax=z) for z in (np.int64(50), 50.0, 10**9, 10**13)),
        *(dict(stopThr=z, numItermax=300) for z in (0, -1.0, math.nan, np.float32(1e-6))),
        *(dict(method=z) for z in ("sinkhorn_log", "SINKHORN", "nothing")),
        *(dict(accelerate=z) for z in (True, False)),
        dict(print_period=5, method="sinkhorn_stabilized"),
        dict(warmstart=(np.zeros(9), np.zeros(12))),
    ],
    ids=str,
)  # fmt: skip
def test_settings_mean_what_they_did(as_usual, given, settings):
    as_usual(lambda: gpu_ot.sinkhorn(*given, **({"reg": 0.1} | settings)))


def test_gradients_go_the_usual_way(as_usual, given):
    a, b, M = (torch.from_numpy(z) for z in given)

    def gradient(leaf):
        leaves = [z.clone().requires_grad_(k == leaf) for k, z in enumerate((a, b, M))]
        return torch.autograd.grad(gpu_ot.sinkhorn2(*leaves, 0.05), leaves[leaf])[0]

    for leaf in range(3):
        as_usual(lambda leaf=leaf: gradient(leaf), rounding=1e-8)
    M.requires_grad_()
    with torch.no_grad():
        as_usual(lambda: gpu_ot.sinkhorn(a, b, M, 0.05))
    with torch.inference_mode():
        as_usual(lambda: gpu_ot.sinkhorn(a, b, M.detach(), 0.05))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reg_m", [0.3, (math.inf, 0.3), (0.2, 5.0)], ids=str)
def test_relaxed_marginals_between_arrays_of_every_kind(as_usual, given, kind, reg_m):
    a, b, M = (KINDS[kind](z) for z in (given[0], 1.7 * given[1], given[2]))
    as_usual(lambda: gpu_ot.sinkhorn_unbalanced(a, b, M, 0.05, reg_m), rounding=1e-8)
    as_usual(lambda: gpu_ot.sinkhorn_unbalanced([], [], M, 0.05, reg_m), rounding=1e-8)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant"])
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("settings", [dict(numItermax=15), dict(numItermax=1), dict(stopThr=1e-9)], ids=str)
def test_log_of_relaxed_marginals(as_usual, given, method, reg_type, settings):
    a, b, M = given
    call = functools.partial(gpu_ot.sinkhorn_unbalanced, a, 1.7 * b, M, 0.02, 0.3, method=method, reg_type=reg_type)
    P, _ = as_usual(lambda: call(log=True, **settings), rounding=1e-7)
    alone, _ = outcome(lambda: call(**settings))
    np.testing.assert_allclose(P, alone, rtol=1e-12)
    for cost in ("linear", "total"):
        as_usual(lambda cost=cost: gpu_ot.sinkhorn_unbalanced2(a, b, M, 0.02, 0.3, returnCost=cost, **settings), rounding=1e-7)


@pytest.mark.parametrize("what", [what for what in UNUSUAL if what not in ("tiny masses", "huge masses")])
def test_unusual_relaxed_problems_end_as_they_did(as_usual, given, what):
    a, b, M = UNUSUAL[what](*given)
    as_usual(lambda: gpu_ot.sinkhorn_unbalanced(a, b, M, 0.05, 0.3), rounding=1e-7)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0], ids=str)
@pytest.mark.parametrize("where", range(3), ids="abM")
def test_unusual_numbers_of_relaxed_problems_are_refused_as_they_were(as_usual, given, number, where):
    given = [z.copy() for z in given]
    given[where].flat[2] = number
    as_usual(lambda: gpu_ot.sinkhorn_unbalanced(*given, 0.05, 0.3), rounding=1e-7)


# Batches.


def batch(size=5, n=9, m=12):
    """(a (B, n), b (B, m), M (B, n, m)) of problems that take unlike many iterations: costs up to 0.1 to 3."""
    a, b, M = (np.stack(z) for z in zip(*((z.numpy() for z in random_problem(n, m, seed=k)) for k in range(size)), strict=True))
    return a, b, M * np.logspace(-1, 0.5, size)[:, None, None]


def told(found):
    """All that a result says. Errors, which end at the rounding of a type, as parts of the mass."""
    return vars(found) | {"status": str(found.status), "errors": [1 + z for z in found.errors]}


def of_batch(a, b, M, reg=0.05, **settings):
    return lambda: told(gpu_ot.solve_batch(M, reg, a, b, **settings))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("columns", "sparse tensors")])
def test_batches_of_every_kind(as_usual, kind):
    make = KINDS[kind] if kind not in ("turned tensors",) else lambda z: torch.from_numpy(np.ascontiguousarray(z.swapaxes(-1, -2))).mT
    a, b, M = map(make, batch())
    as_usual(of_batch(a, b, M), rounding=1e-8)
    as_usual(of_batch(None, None, M), rounding=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n, m", SIZES)
@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12])
def test_sizes_and_units_of_batches(as_usual, n, m, unit, dtype):
    a, b, M = (z.astype(dtype) for z in batch(4, n, m))
    as_usual(of_batch(a, b, M * dtype(unit), 0.1 * unit, tol=1e-5 if dtype is np.float32 else 1e-9), 1e-8)


@pytest.mark.parametrize("settings", [dict(tol=1e-3), dict(tol=1e-9), dict(tol=0, max_iter=25), dict(max_iter=1)], ids=str)
@pytest.mark.parametrize("method, reg_type", [("sinkhorn", "kl"), ("log_sinkhorn", "entropy")])
def test_each_problem_of_a_batch_is_what_it_is_alone(as_usual, settings, method, reg_type):
    """With its own number of iterations, which is POT's for that problem."""
    a, b, M = batch()
    settings = settings | dict(method=method, reg_type=reg_type)
    found = as_usual(of_batch(a, b, M, **settings), rounding=1e-8)
    for k in range(len(M)):
        alone = ot.batch.solve_batch(M[k : k + 1], 0.05, a[k : k + 1], b[k : k + 1], **settings)
        for name in ("value", "value_linear", "plan"):
            np.testing.assert_allclose(found[name][k], getattr(alone, name)[0], rtol=1e-9, atol=1e-13)
        for z, w in zip(found["potentials"], alone.potentials, strict=True):
            np.testing.assert_allclose(z[k], w[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_cores_change_no_bit_of_a_batch(threads):
    a, b, M = batch(64, 33, 40)
    one = told(gpu_ot.solve_batch(M, 0.05, a, b))
    torch.set_num_threads(threads)
    try:
        same(told(gpu_ot.solve_batch(M, 0.05, a, b)), one, rounding=0)
    finally:
        torch.set_num_threads(1)


UNUSUAL_BATCHES = {
    "weights for all": lambda a, b, M: (a[0], b[:1], M),
    "weights of another number": lambda a, b, M: (a[:2], b, M),
    "costs for all": lambda a, b, M: (a, b, M[:1]),
    "a short b": lambda a, b, M: (a, b[:, :-1], M),
    "no problems": lambda a, b, M: (a[:0], b[:0], M[:0]),
    "no rows": lambda a, b, M: (a[:, :0], b, M[:, :0]),
    "one problem": lambda a, b, M: (a, b, M[0]),
    "masses that differ": lambda a, b, M: (a, b * np.array([1, 1, 1, 1, 2.0])[:, None], M),
    "masses that hardly differ": lambda a, b, M: (a, (1 + 9e-6) * b, M),
    "no mass in one": lambda a, b, M: (a * np.array([1, 1, 0, 1, 1])[:, None], b * np.array([1, 1, 0, 1, 1])[:, None], M),
    "empty atoms": lambda a, b, M: (np.pad(a, ((0, 0), (0, 2))), np.pad(b, ((0, 0), (1, 0))), np.pad(M, ((0, 0), (0, 2), (1, 0)))),
    "a forbidden pair": lambda a, b, M: (a, b, np.where(np.arange(M.size).reshape(M.shape) == 7, np.inf, M)),
    "a cost that is none": lambda a, b, M: (a, b, np.where(np.arange(M.size).reshape(M.shape) == 7, np.nan, M)),
    "a cost far off": lambda a, b, M: (a, b, np.where(np.arange(M.size).reshape(M.shape) == 7, 1e9, M)),
    "costs far from zero": lambda a, b, M: (a, b, M + 1e6),
}


@pytest.mark.parametrize("what", UNUSUAL_BATCHES)
def test_unusual_batches_end_as_they_did(as_usual, what):
    as_usual(of_batch(*UNUSUAL_BATCHES[what](*batch())), rounding=1e-7)


def test_batches_of_costs_that_no_type_resolves_say_so(as_usual):
    a, b, M = batch()
    found = as_usual(lambda: str(gpu_ot.solve_batch(1e15 * M, 0.05, a, b, max_iter=20).status).split(":")[0])
    assert found == "unresolved"


@pytest.mark.parametrize("max_iter", [0, -3, 10**9, 50.0], ids=str)
def test_any_limit_of_a_batch(as_usual, max_iter):
    as_usual(of_batch(*batch(), max_iter=max_iter), rounding=1e-8)


@pytest.mark.parametrize("reg", [0, -1.0, math.nan, math.inf, "x", None, np.float32(0.05), torch.tensor(0.05)], ids=str)
def test_any_reg_of_a_batch(as_usual, reg):
    as_usual(of_batch(*batch(), reg), rounding=1e-8)


def test_gradients_of_batches_go_the_usual_way(as_usual):
    a, b, M = (torch.from_numpy(z) for z in batch())

    def gradient():
        leaf = M.clone().requires_grad_()
        found = gpu_ot.solve_batch(leaf, 0.05, a, b)
        return torch.autograd.grad(found.value.sum() + found.value_linear.sum(), leaf)[0]

    as_usual(gradient, rounding=1e-8)


# Losses.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("debias, reach, p", pairwise([True, False], [None, 0.5], [1, 2]))
@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (9, 7, 2), (33, 40, 20)])
def test_losses_of_clouds(hidden, dtype, debias, reach, p, n, m, d):
    rounding = 1e-6 if dtype == torch.float64 else 5e-3  # by either way within the tolerance
    loss = gpu_ot.SamplesLoss(p=p, blur=0.2, reach=reach, debias=debias, tol=1e-10 if dtype == torch.float64 else 1e-4)
    x, y = clouds(n, m, d, dtype=dtype)
    weighed = weights(n, dtype=dtype), x, weights(m, dtype=dtype), y

    def run(*arguments):
        leaves = [z.clone().requires_grad_() for z in arguments]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    for arguments in ((x, y), weighed, [torch.stack((z, z)) for z in weighed]):
        ours, _ = outcome(lambda arguments=arguments: run(*arguments))
        with hidden():
            theirs, _ = outcome(lambda arguments=arguments: run(*arguments))
        assert len(ours) == len(theirs)
        for z, w in zip(ours, theirs, strict=True):
            torch.testing.assert_close(z, w, rtol=rounding, atol=rounding * max(float(theirs[0].abs().max()), 0.1))
