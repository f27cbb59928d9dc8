"""Balanced assignment: against a float64 reference, in halves, with capacities, between ranks, compiled."""

import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from gpu_ot import ProblemError, assign
from problems import gradcheck, randn


def scores(n, K, batch=(), seed=0, dtype=torch.float64):
    """Cosines between samples and prototypes, as self-supervised learning has them."""
    z, c = (torch.nn.functional.normalize(randn(*batch, k, 16, seed=seed + k), dim=-1) for k in (n, K))
    return (z @ c.mT).to(dtype)


def reference(logits, iterations, temperature):
    """SwAV's iterations as they are written, in float64: columns to equal sums, then rows to 1."""
    Q = (logits.double() / temperature).exp()
    for _ in range(iterations):
        Q = Q / Q.sum(-2, keepdim=True)
        Q = Q / Q.sum(-1, keepdim=True)
    return Q


@pytest.mark.parametrize("n, K", [(1, 1), (7, 1), (1, 5), (33, 12), (12, 33)])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_it_is_swavs_assignment(n, K, iterations):
    logits = scores(n, K)
    torch.testing.assert_close(assign(logits, iterations, 0.05), reference(logits, iterations, 0.05), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.03, 0.04, 0.1])
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 2e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_few_digits_change_the_last_ones_only(temperature, dtype, digits):
    """Of the same logits: what is computed is right to the digits that the result can hold."""
    logits = scores(200, 64, dtype=dtype)
    found = assign(logits, temperature=temperature)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), reference(logits, 3, temperature), rtol=digits * 1.01, atol=1e-7)


def test_autocast_rounds_nothing():
    logits = scores(50, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assign(logits)
    torch.testing.assert_close(found, assign(logits), rtol=0, atol=0)


def test_nothing_overflows():
    """Logits of 100 at temperature 0.04 are exponents of 2500."""
    logits = 100 * scores(40, 30, dtype=torch.bfloat16)
    found = assign(logits, iterations=50, temperature=0.04)
    exact = assign(logits.double(), iterations=50, temperature=0.04)
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(exact.sum(-1), torch.ones(40, dtype=torch.float64))


def test_many_iterations_give_every_prototype_its_share():
    found = assign(scores(60, 20), iterations=500, temperature=0.1)
    torch.testing.assert_close(found.sum(-2), torch.full((20,), 3.0, dtype=torch.float64))


def test_no_iteration_is_softmax():
    torch.testing.assert_close(assign(scores(5, 7), 0, 0.3), (scores(5, 7) / 0.3).softmax(-1))


def test_a_constant_of_a_prototype_changes_nothing():
    torch.testing.assert_close(assign(scores(9, 6) + 1e3 + randn(6)), assign(scores(9, 6)))


def test_problems_of_a_batch_are_solved_apart():
    logits = scores(9, 6, (2, 3))
    found = assign(logits)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], assign(logits[i, j]))


def test_many_prototypes():
    found = assign(randn(16, 65_536, dtype=torch.float32), temperature=0.5)
    torch.testing.assert_close(found.sum(-1), torch.ones(16))
    torch.testing.assert_close(found, reference(randn(16, 65_536, dtype=torch.float32), 3, 0.5).float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("capacity", [1.0, 1.3, 2.0])
def test_no_prototype_gets_more_than_it_has_room_for(capacity):
    logits = scores(60, 12)
    logits[:, 0] += 0.5  # everybody's favourite
    found = assign(logits, iterations=2000, temperature=0.1, capacity=capacity)
    room = capacity * 60 / 12
    torch.testing.assert_close(found.sum(-1), torch.ones(60, dtype=torch.float64))
    assert float(found.sum(-2).max()) <= room * (1 + 1e-4)
    # Those with room to spare keep the samples' own preference.
    spare = found.sum(-2) < room * 0.999
    free = (logits[:, spare] / 0.1).softmax(-1)
    torch.testing.assert_close(found[:, spare] / found[:, spare].sum(-1, keepdim=True), free, rtol=1e-3, atol=1e-9)


def test_ample_room_is_softmax():
    torch.testing.assert_close(assign(scores(8, 4), capacity=4.0), (scores(8, 4) / 0.05).softmax(-1))


def test_forbidden_pairs_and_those_without_any_partner():
    logits = scores(8, 5)
    logits[2], logits[:, 3], logits[0, 0] = -torch.inf, -torch.inf, -torch.inf
    for capacity in (None, 1.5):
        found = assign(logits, iterations=30, capacity=capacity)
        assert found.isfinite().all() and found[0, 0] == 0 and not found[2].any() and not found[:, 3].any()
        torch.testing.assert_close(found.sum(-1).round(decimals=12).unique(), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_no_samples():
    assert assign(torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("capacity", [None, 1.5])
def test_derivatives_go_through_the_iterations(capacity):
    logits = scores(4, 3).requires_grad_()
    assert gradcheck(lambda z: assign(z, temperature=0.4, capacity=capacity), [logits])
    masked = torch.where(torch.eye(4, 3, dtype=torch.bool), -torch.inf, logits).index_fill(0, torch.tensor(3), -torch.inf)
    assert torch.autograd.grad(assign(masked, capacity=capacity).square().sum(), logits)[0].isfinite().all()


def test_the_compiler_takes_it_whole():
    logits = scores(20, 6, dtype=torch.float32)
    for options in ({}, {"capacity": 1.5}, {"iterations": 0}):
        compiled = torch.compile(lambda z, options=options: assign(z, **options), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(logits), assign(logits, **options))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(logits=[[1.0]]), "logits must be a tensor"),
        (dict(logits=torch.zeros(3)), "logits has shape (3,)"),
        (dict(logits=torch.zeros(3, 0)), "logits has shape (3, 0)"),
        (dict(logits=torch.zeros(3, 2, dtype=torch.int64)), "pass logits.float()"),
        (dict(logits=torch.tensor([[0.0, torch.nan]])), "hold NaN or +inf"),
        (dict(logits=torch.tensor([[0.0, torch.inf]])), "hold NaN or +inf"),
        (dict(iterations=-1), "iterations must be a whole number"),
        (dict(iterations=2.5), "iterations must be a whole number"),
        (dict(temperature=0.0), "temperature must be a finite number > 0"),
        (dict(temperature=float("nan")), "temperature must be a finite number > 0"),
        (dict(capacity=0.9), "capacity must be at least 1"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ProblemError) as refusal:
        assign(**{"logits": torch.zeros(3, 2), **arguments})
    assert words in str(refusal.value)


SHARES = [13, 4]
CALLS = [dict(), dict(temperature=0.03), dict(iterations=6), dict(capacity=1.2, iterations=30), dict(iterations=0)]


def _rank(rank, file, results):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(SHARES))
        counted, reduce = [], dist.all_reduce

        def counting(z, *args, **options):
            counted.append(z.numel() * z.itemsize)
            return reduce(z, *args, **options)

        dist.all_reduce = counting
        own = scores(sum(SHARES), 7).split(SHARES)[rank].clone().requires_grad_()
        found = [assign(own, group=dist.group.WORLD, **options) for options in CALLS]
        assert not any(z.requires_grad for z in found)
        before = len(counted)
        assign(own.float(), group=dist.group.WORLD)
        results.put((rank, [z.numpy() for z in found], counted[before:]))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_find_what_one_finds(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    for rank, each, _ in found:
        assert isinstance(each, list), f"rank {rank}: {each}"
    for k, options in enumerate(CALLS):
        joined = torch.cat([torch.from_numpy(each[k]) for _, each, _ in found])
        torch.testing.assert_close(joined, assign(scores(sum(SHARES), 7), **options), rtol=1e-12, atol=1e-15)
    # K numbers of float32: the maxima, and one sum in each of three iterations.
    assert all(sent == [4 * 7] * 4 for _, _, sent in found)
