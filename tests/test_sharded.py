"""One problem on several ranks: gloo processes on this machine, against the solve in one process.

sharded_worker.py runs once for each number of ranks, which leave what they found in files; the tests read these.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gpu_ot
from gpu_ot import Matrix, Problem, Sharded, SqEuclidean, errors

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")

WORKER = Path(__file__).with_name("sharded_worker.py")
#: float64 against float64, in another order.
EXACT = dict(rtol=0, atol=1e-11)
#: What so many ranks do, in this order. No limit of time is set here: the timeouts of their groups end every rank.
JOBS = {2: "memory,study", 3: "study,refusals,traffic,calls,silent,raised", 4: "memory,study,killed"}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load(WORKER)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """size -> {job: what each rank found}, None for the rank that is killed. The ranks run when they are first asked for."""

    @functools.cache
    def of(size):
        if size == 1:
            return {"study": [worker.study(0, 1)]}
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        # The threshold of malloc: freed memory is given back at once, for the peaks that are measured.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
        command = [sys.executable, str(WORKER), JOBS[size], str(size), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        files = {job: [folder / f"{job}{rank}.pt" for rank in range(size)] for job in JOBS[size].split(",")}
        missing = [file.stem for some in files.values() for file in some if not file.exists()]
        assert missing == (["killed1"] if size == 4 else []), done.stderr[-3000:]
        return {job: [torch.load(z, weights_only=False) if z.exists() else None for z in some] for job, some in files.items()}

    return of


truth = functools.cache(worker.answers)


def assert_same(found, expected, whole=()):
    """What the ranks found, {name: tensor} each: shards make up the whole, and everything else is the same to the bit on every rank."""
    assert all(set(rank) == set(expected) for rank in found)
    for name, z in expected.items():
        each = [rank[name] for rank in found]
        if "[shard]" not in name:
            assert all(torch.equal(one, each[0]) for one in each), name
        joined = torch.cat(each) if "[shard]" in name and name not in whole else each[0]
        close = EXACT if z.dtype != torch.float32 else dict(rtol=1e-5, atol=0)
        torch.testing.assert_close(joined, z, **close, msg=lambda text, name=name: f"{name}: {text}")


#: Four processes on two cores take their time.
MANY = pytest.param(4, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "size, case",
    [pytest.param(size, case, marks=[pytest.mark.slow] if size == 4 else []) for size in (1, 2, 3, 4) for case in worker.cases(size)],
)
def test_ranks_find_what_one_process_finds(size, case, ranks):
    """Values, potentials, errors, plans, maps and gradients in every shard, to 1e-11, after the same number of iterations."""
    # What has a row for each column of a matrix is on every rank.
    whole = {name for name in truth(case) if "plan.T" in name or " 2 [" in name} if "matrix" in case else ()
    assert_same([once[case] for once, _ in ranks(size)["study"]], truth(case), whole)


@pytest.mark.parametrize("size", [1, 2, 3, MANY])
def test_two_runs_are_the_same_to_the_bit(size, ranks):
    compared = 0
    for once, again in ranks(size)["study"]:
        for case, found in again.items():
            compared += len(found)
            assert all(torch.equal(z, once[case][name]) for name, z in found.items()), case
    assert compared > 10 * size


def test_what_one_rank_asks_differently_all_are_told(ranks):
    first, *others = ranks(3)["refusals"]
    assert all(told == first for told in others), "the same error on every rank"
    words = {
        "nan": "rank 2 of 3: x or y holds NaN or an infinity of the wrong sign in 51",
        "nan and a relative eps": "rank 2 of 3: x or y holds NaN",
        "weight": "rank 2 of 3: a must hold finite weights >= 0, found 17 negative",
        "eps": "eps differs: rank 0 has 0.5, rank 2 has 0.6",
        "penalty": "penalties differs: rank 0 has (KL(tau=1.0)",
        "layout": "layout differs: rank 0 has 'replicated', rank 2 has 'ring'",
        "dimensions": "the form of x differs",
        "type": "torch.float64",
        "kind": "the kind of cost differs: rank 0 has 'SqEuclidean', rank 2 has 'Euclidean'",
        "length": "rank 2 of 3: a has shape (16,), expected (*batch, 17)",
        "tol": "tol differs: rank 0 has 0.0001, rank 2 has 0.001",
        "backend": "backend differs",
        "start": "start differs",
        "grad": "grad = 'none' is not known",
        "a gradient": "the form of x differs",
        "diverges": "rank 2 of 3: x or y holds NaN",  # its points change between the problem and the solve
    }
    for name, word in words.items():
        kind, text = first[name]
        assert issubclass(getattr(errors, kind), gpu_ot.ProblemError) and word in text, (name, text)
    assert first["masses"][0] == "UnequalMasses" and "rank" not in first["masses"][1], "what all ranks find is no rank's fault"
    assert first["and then"] == ("", ""), "refusals leave the ranks in step"


def test_traffic_is_the_models_to_the_byte(ranks):
    for found in ranks(3)["traffic"]:
        assert len(found) == 4
        for name, (counted, model) in found.items():
            assert counted == model > 0, name


@pytest.mark.parametrize(
    "how, size, cause",
    [
        ("raised", 3, "rank 1 raised ValueError: no more of this"),
        pytest.param("killed", 4, "some rank ended or did not answer", marks=pytest.mark.slow),
        ("silent", 3, "some rank ended or did not answer"),
    ],
)
def test_a_rank_that_fails_ends_the_solve_on_all_others(how, size, cause, ranks):
    """It raises, is killed, or answers no more, within the timeout of the group."""
    found = ranks(size)[how]
    for kind, text in (one for rank, one in enumerate(found) if rank != 1):
        assert kind == "RankFailed" and cause in text and "noticed by rank" in text, text
    if how == "raised":
        assert found[1] == ("ValueError", "no more of this"), "its own error is its own"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_of_a_rank_in_the_ring_falls_as_one_over_the_ranks(ranks):
    two, four = (ranks(size)["memory"] for size in (2, 4))
    assert [points * len(found) for found in (two, four) for points, _ in found] == [2**25] * 6
    assert max(peak for _, peak in four) < 0.6 * max(peak for _, peak in two)


# The other ways in, on three ranks.


@pytest.fixture(scope="module")
def calls(ranks):
    return ranks(3)["calls"]


@pytest.fixture(scope="module")
def points():
    return worker.inputs()


def test_other_ways_in_find_what_one_process_finds(calls):
    """DTensors, solve_sample, SamplesLoss and its weights, batches, floats and warm starts."""
    found = [rank["other ways"] for rank in calls]
    assert_same(found, worker.other_ways())
    assert max(int(found[0][f"iterations from the solution {layout}"]) for layout in ("replicated", "ring")) <= 2
    for rank in calls:
        assert "redistribute it to (Shard(0),)" in rank["replicated dtensor"] and "debias" in rank["debias"]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("layout", ["replicated", "ring"])
def test_pairs_are_drawn_from_the_one_plan_each_on_the_rank_of_its_row(layout, side, calls, points):
    x, y, a, b = points
    plan = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b), tol=1e-9).plan
    P = (plan.T if side else plan).to_dense()
    pairs = [found[f"sample {layout}"][side] for found in calls]
    for rank, (i, _) in enumerate(pairs):
        own = worker.parts(3, rank)[side]
        assert bool(((i >= own.start) & (i < own.stop)).all())
    i, j = (torch.cat(z) for z in zip(*pairs, strict=True))
    assert len(i) == len(j) == 4000
    drawn = torch.zeros_like(P).index_put_((i, j), torch.tensor(1 / 4000).double(), accumulate=True)
    assert (drawn.sum(1) - P.sum(1)).abs().sum() < 0.15  # 4000 draws over 37 rows: 0.08 expected
    assert (drawn - P).square().sum() < 3 / 4000  # sum P (1 - P) / 4000 expected


def test_a_solve_goes_on_from_its_checkpoint(calls, points):
    """Interrupted after 200 iterations, on the same ranks and, from the same file, in one process."""
    x, y, a, b = points
    hard = Problem(SqEuclidean(x, y), 0.02, a, b)
    whole, straight = gpu_ot.solve(hard, tol=1e-9), gpu_ot.solve(hard, tol=1e-9, accelerate="mixing")
    shift = (whole.f - calls[0]["resumed"])[a > 0]
    assert float(shift.max() - shift.min()) < 1e-6, "the same potentials, up to the constant that a start leaves"
    kept = gpu_ot.Checkpoint(calls[0]["file"])
    f, g, about = kept.read()
    assert f.shape == (37,) and g.shape == (29,) and about["eps"] == "0.02" and int(about["n_iter"]) == 199
    alone = gpu_ot.solve(hard, tol=1e-9, start=kept.start())
    assert alone.converged and alone.n_iter < straight.n_iter / 2, "iterations are not done twice"


def test_checkpoints_appear_whole_or_not_at_all(tmp_path, points, monkeypatch):
    x, y, a, b = points
    problem = Problem(SqEuclidean(x, y), 0.05, a, b)
    kept = gpu_ot.Checkpoint(tmp_path / "f.safetensors", minutes=0)
    assert kept.start() is None
    solution = gpu_ot.solve(problem, checkpoint=kept, tol=1e-9)
    f, g, _ = kept.read()
    assert torch.equal(f, solution.f) and torch.equal(g, solution.g)
    before = kept.path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        gpu_ot.solve(problem, checkpoint=kept)
    assert kept.path.read_bytes() == before and list(tmp_path.iterdir()) == [kept.path]
    monkeypatch.undo()
    seldom = gpu_ot.Checkpoint(tmp_path / "seldom.safetensors", minutes=10)
    gpu_ot.solve(problem, checkpoint=seldom)
    assert not seldom.path.exists()


def test_checkpoints_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(gpu_ot.BackendError, match="pip install safetensors"):
        gpu_ot.Checkpoint(tmp_path / "f.safetensors")


# One process, which is a group of one.


def test_refusals(points):
    x, y = points[:2]
    cost = Sharded(SqEuclidean(x, y))
    for words, ask in {
        "layout = 'torus' is not known": lambda: Sharded(SqEuclidean(x, y), layout="torus"),
        "a matrix has none": lambda: Sharded(Matrix(torch.ones(3, 4)), layout="ring"),
        "forbidden pairs": lambda: Sharded(Matrix(torch.tensor([[1.0, torch.inf]]))),
        "cannot be shared": lambda: Sharded(cost),
        "median": lambda: Problem(cost, ("median", 0.1)),
        "kind = 'mode' is not known": lambda: Problem(cost, ("mode", 0.1)),
        "solve_sample": lambda: gpu_ot.pot.solve(cost, reg=0.5),
    }.items():
        with pytest.raises(gpu_ot.ProblemError, match=words):
            ask()
    with pytest.raises(NotImplementedError, match="on none of them"):
        cost.dense()
    live = x.clone().requires_grad_()
    solution = gpu_ot.solve(Problem(Sharded(SqEuclidean(live, y)), 0.5), grad="implicit", tol=1e-9)
    with pytest.raises(gpu_ot.ProblemError, match="transpose them"):
        solution.plan.T.to_dense()
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(solution.value, live, create_graph=True)


def test_explain_says_how_it_is_shared(points):
    x, y = points[:2]
    text = gpu_ot.explain(Problem(Sharded(SqEuclidean(x, y), layout="ring"), 0.5))
    assert '37 by 29, rows 37, columns 29 on the ranks, layout "ring": shares of points go round' in text
    assert re.search('auto takes "(compiled|dense)"', text)


# The benchmarks.


@pytest.fixture(scope="module")
def bench():
    """The scripts by name: their folder is no package, and on the path only where they are run."""
    folder = WORKER.parents[1] / "bench"

    def script(name):
        sys.path.insert(0, str(folder))
        try:
            return load(folder / f"{name}.py")
        finally:
            sys.path.remove(str(folder))

    return script


def test_every_modelled_point_says_so_and_has_no_time(bench):
    rows = bench("sharded").modelled()
    assert {row["ranks"] for row in rows} == {2**k for k in range(11)} and len({row["solver"] for row in rows}) == 4
    assert all(row["modelled"] and "modelled" in row["section"] and "time_s" not in row for row in rows)
    for name in {row["solver"] for row in rows}:
        least = [row["modelled_s"] - row["modelled_work_s"] for row in rows if row["solver"] == name]
        assert min(least) >= 0, "nothing is faster than its work"


def test_the_fit_finds_what_made_the_times(bench):
    script = bench("sharded")
    rows = []
    for ranks in (1, 2, 4):
        for n, layout in ((1000, "replicated"), (3000, "ring")):
            row = dict(layout=layout, n=n, m=n, ranks=ranks, messages=3.0 * (ranks - 1), bytes_sent=1e5 * (ranks - 1) / ranks * n)
            pairs, messages, sent = script.work(row, 8)
            rows.append(row | {"time_min_s": 2e-9 * pairs + 1e-3 * messages + 1e-9 * sent})
    fitted = script.fit(rows, 8)
    found = [fitted[key] for key in ("seconds_a_pair", "seconds_a_message", "seconds_a_byte")]
    assert found == pytest.approx([2e-9, 1e-3, 1e-9], rel=1e-6) and fitted["relative_error"] < 1e-9


def test_pictures_do_not_depend_on_who_makes_them(bench):
    script = bench("giant")
    cpu = torch.device("cpu")
    all_of_them = script.pictures(torch.arange(600), 0.0, cpu)
    some = torch.tensor([599, 3, 501])
    torch.testing.assert_close(script.pictures(some, 0.0, cpu), all_of_them[some], rtol=0, atol=0)
    assert abs(float(all_of_them.square().mean()) - 1) < 0.05
    blurred = script.pictures(some, 8.0, cpu)
    assert float(blurred.square().mean()) < 0.5 and float((blurred * all_of_them[some]).sum()) > 0
