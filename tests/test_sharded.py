"""One problem on several ranks: gloo processes on this machine, against the solve in one process.

Ranks are started once for each number of them and leave what they found in files, which the tests read; see sharded_worker.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gpu_ot
from gpu_ot import KL, Cosine, Problem, Sharded, SqEuclidean

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")

WORKER = Path(__file__).with_name("sharded_worker.py")
#: float64 against float64, in another order.
EXACT = dict(rtol=0, atol=1e-11)
#: Seconds after which a group gives up on one of its ranks, and after which a test gives up on its ranks.
TIMEOUT, PATIENCE = 6, 100


def load():
    spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load()


def start(folder, jobs, size, timeout=60):
    """What each rank found, {job: [of each rank]}; None for the rank that does not live to say. No process outlives this."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if jobs == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # freed memory is given back at once
    lost = {"killed": 1, "stopped": 1}.get(jobs.split(",")[-1])
    command = [sys.executable, str(WORKER), jobs]
    logs = [(folder / f"{rank}.log").open("w") for rank in range(size)]
    running = [
        subprocess.Popen([*command, str(rank), str(size), str(folder), str(timeout)], env=environment, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    until = time.monotonic() + PATIENCE
    try:
        for rank, process in enumerate(running):
            if rank != lost:
                process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"a rank hangs in {jobs}:\n" + "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(size)))
    finally:
        for process, log in zip(running, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    found = {}
    for job in jobs.split(","):
        files = [folder / f"{job}{rank}.pt" for rank in range(size)]
        missing = [rank for rank, file in enumerate(files) if not file.exists() and rank != lost]
        assert not missing, f"{job}:\n" + "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in missing)
        found[job] = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """size -> what its ranks found: started at the first question."""
    kept = {}
    jobs = {3: "study,refusals,traffic,calls,raised", 4: "study,killed"}

    def of(size):
        if size not in kept:
            kept[size] = start(tmp_path_factory.mktemp(f"ranks{size}"), jobs.get(size, "study"), size)
        return kept[size]

    return of


@pytest.fixture(scope="module")
def truth():
    """case -> the same in one process."""
    kept = {}

    def of(case):
        if case not in kept:
            kept[case] = worker.study(case)
        return kept[case]

    return of


def joined(name, case, shares):
    """The whole from the ranks' shares; the columns of a matrix are whole on every rank."""
    if not name.endswith("[share]"):
        return shares[0]
    whole = worker.CASES[case][3] == "matrix" and (name.startswith("plan.T") or name.split(" ")[1] == "2")
    return shares[0] if whole else torch.cat(shares)


@pytest.mark.parametrize("size, case", [(size, case) for size in (1, 2, 3, 4) for case in worker.cases(size)])
def test_ranks_find_what_one_process_finds(size, case, ranks, truth):
    """Values, potentials, errors, plans, maps and gradients in every share, to 1e-11; the same number of iterations; whole numbers
    the same to the bit on every rank."""
    found = [rank[0][case] for rank in ranks(size)["study"]]
    assert set(found[0]) == set(truth(case))
    for name, z in truth(case).items():
        each = [rank[name] for rank in found]
        if not name.endswith("[share]"):
            assert all(torch.equal(one, each[0]) for one in each), name
        torch.testing.assert_close(joined(name, case, each), z, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
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
    }
    for name, word in words.items():
        kind, text = first[name]
        assert kind == "ProblemError" and word in text, (name, text)
    assert first["masses"][0] == "UnequalMasses" and "rank" not in first["masses"][1], "what all ranks find is no rank's fault"
    assert first["and then"][1] == "converged", "refusals leave the ranks in step"


def test_a_rank_that_diverges_is_named_on_all(ranks):
    """Its points turn to NaN between the problem and the solve."""
    for told in ranks(3)["refusals"]:
        assert told["diverges"][1].startswith("rank 2 of 3: x or y holds NaN")


def test_traffic_is_the_models_to_the_byte(ranks):
    for found in ranks(3)["traffic"]:
        assert len(found) == 4
        for name, (counted, model) in found.items():
            assert counted == model > 0, name


@pytest.mark.parametrize(
    "how, cause", [("killed", "has ended"), ("raised", "raised ValueError: no more of this"), ("stopped", "is stopped")]
)
def test_a_rank_that_ends_is_named_on_the_others_within_the_timeout(how, cause, ranks, tmp_path):
    """A process that is killed, raises, or stops in the middle of a solve."""
    found = start(tmp_path, how, 3, timeout=TIMEOUT)[how] if how == "stopped" else ranks(3 if how == "raised" else 4)[how]
    assert found[1] is None or how == "raised"
    for kind, text, seconds in (one for rank, one in enumerate(found) if rank != 1):
        assert kind == "RankFailed" and "rank 1" in text and cause in text, text
        assert seconds < TIMEOUT + 4
    if how == "raised":
        assert found[1][:2] == ("ValueError", "no more of this"), "its own error is its own"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_of_a_rank_in_the_ring_falls_as_one_over_the_ranks(tmp_path):
    peaks = {}
    for size in (1, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        found = start(folder, "memory", size)["memory"]
        assert all(points * size == 2**25 for points, _ in found)
        peaks[size] = max(peak for _, peak in found)
    assert peaks[4] < 0.36 * peaks[1], peaks  # a quarter, and the points that visit


# The other ways in, on three ranks.


@pytest.fixture(scope="module")
def calls(ranks):
    return ranks(3)["calls"]


@pytest.fixture(scope="module")
def points():
    return worker.inputs()


def test_dtensors_are_taken_as_they_are(calls, points):
    x, y, a, b = points
    x = x.clone().requires_grad_()
    whole = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b), tol=1e-12)
    for found in calls:
        torch.testing.assert_close(found["dtensor"][0], whole.value.detach(), **EXACT)
        torch.testing.assert_close(found["dtensor"][1], torch.autograd.grad(whole.value, x, retain_graph=True)[0], **EXACT)
        torch.testing.assert_close(
            found["dtensor sample"], gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5), tol=1e-12).value.detach(), **EXACT
        )
        assert "redistribute it to (Shard(0),)" in found["replicated dtensor"]


def test_solve_sample_takes_a_group(calls, points):
    x, y, a, b = points
    x = x.clone().requires_grad_()
    whole = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b, KL(2.0)), tol=1e-12)
    (gradient,) = torch.autograd.grad(whole.value, x)
    torch.testing.assert_close(torch.cat([found["solve_sample"][1] for found in calls]), gradient, **EXACT)
    for found in calls:
        torch.testing.assert_close(found["solve_sample"][0], whole.value.detach(), **EXACT)
        assert "debias" in found["solve_sample refuses"]


@pytest.mark.parametrize("name, options", [("loss", {}), ("relaxed loss", {"reach": 1.0, "p": 1}), ("cosine", {"cost": Cosine})])
def test_samples_loss_of_a_group_is_that_of_all_its_points(name, options, calls, points):
    x, y, *_ = points
    x = x.clone().requires_grad_()
    value = gpu_ot.SamplesLoss(blur=0.5, tol=1e-11, **options)(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(torch.cat([found[name][1] for found in calls]), gradient, **EXACT)
    for found in calls:
        torch.testing.assert_close(found[name][0], value.detach(), **EXACT)


def test_samples_loss_of_a_group_takes_weights(calls, points):
    x, y, a, b = points
    value = gpu_ot.SamplesLoss(blur=0.5, tol=1e-11)(a, x, b, y)
    for found in calls:
        torch.testing.assert_close(found["weighted loss"], value, **EXACT)


@pytest.mark.parametrize("layout", ["replicated", "ring"])
def test_batches_are_shared_along_their_points(layout, calls, points):
    x, y, a, b = points
    whole = gpu_ot.solve(Problem(SqEuclidean(torch.stack((x, x + 0.3)), torch.stack((y, y * 1.1))), 0.5, a, b), tol=1e-12)
    sent = torch.cat([found[f"batch {layout}"][2] for found in calls], -2)
    torch.testing.assert_close(sent, whole.plan @ y, **EXACT)
    for found in calls:
        torch.testing.assert_close(found[f"batch {layout}"][0], whole.value, **EXACT)
        torch.testing.assert_close(found[f"batch {layout}"][1], whole.f, **EXACT)


@pytest.mark.parametrize("layout", ["replicated", "ring"])
def test_pairs_are_drawn_from_the_one_plan_each_on_the_rank_of_its_row(layout, calls, points):
    x, y, a, b = points
    P = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b), tol=1e-9).plan.to_dense()
    for side, name in enumerate(("sample", "sample of columns")):
        pairs = [found[f"{name} {layout}"] for found in calls]
        for rank, (i, _) in enumerate(pairs):
            mine = worker.parts(3, rank)[side]
            assert bool(((i >= mine.start) & (i < mine.stop)).all())
        i, j = (torch.cat(z) for z in zip(*pairs, strict=True))
        assert len(i) == len(j) == 4000
        drawn = torch.zeros_like(P.mT if side else P).index_put_((i, j), torch.tensor(1 / 4000).double(), accumulate=True)
        marginal = (drawn.sum(1) - (P.mT if side else P).sum(1)).abs().sum()
        assert marginal < 0.15  # 4000 draws over 37 rows: 0.08 expected
        assert (drawn - (P.mT if side else P)).square().sum() < 3 / 4000  # sum P (1 - P) / 4000 expected


@pytest.mark.parametrize("layout", ["replicated", "ring"])
def test_floats_stay_floats(layout, calls, points):
    x, y, *_ = points
    whole = gpu_ot.solve(Problem(SqEuclidean(x.float(), y.float()), 0.5)).value
    for found in calls:
        assert found[f"float {layout}"].dtype == torch.float32
        torch.testing.assert_close(found[f"float {layout}"], whole, rtol=1e-5, atol=0)


def test_warm_starts(calls, points):
    x, y, a, b = points
    moved = gpu_ot.solve(
        Problem(SqEuclidean(x, y), 0.4, a, b), start=gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5, a, b), tol=1e-9), tol=1e-12
    )
    for found in calls:
        assert int(found["warm"]) <= 2
        torch.testing.assert_close(found["moved"], moved.f, **EXACT)


def test_a_solve_goes_on_from_its_checkpoint(calls, points, ranks, tmp_path):
    """Interrupted after 200 iterations, on the same ranks and, from the same file, in one process."""
    x, y, a, b = points
    hard = Problem(SqEuclidean(x, y), 0.02, a, b)
    whole = gpu_ot.solve(hard, tol=1e-9)
    shift = (whole.f - calls[0]["resumed"][0])[a > 0]
    assert float(shift.max() - shift.min()) < 1e-6, "the same potentials, up to the constant that a start leaves"
    kept = gpu_ot.Checkpoint(calls[0]["file"])
    f, g, about = kept.read()
    assert f.shape == (37,) and g.shape == (29,) and about["eps"] == "0.02" and int(about["n_iter"]) == 199
    alone, straight = gpu_ot.solve(hard, tol=1e-9, start=kept.start()), calls[0]["resumed"][1]
    assert alone.converged and alone.n_iter < straight / 2, "iterations are not done twice"


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
    with pytest.raises(gpu_ot.ProblemError, match="layout = 'torus' is not known"):
        Sharded(SqEuclidean(x, y), layout="torus")
    with pytest.raises(gpu_ot.ProblemError, match="a matrix has none"):
        Sharded(gpu_ot.Matrix(torch.ones(3, 4)), layout="ring")
    with pytest.raises(gpu_ot.ProblemError, match="forbidden pairs"):
        Sharded(gpu_ot.Matrix(torch.tensor([[1.0, torch.inf]])))
    with pytest.raises(gpu_ot.ProblemError, match="cannot be shared"):
        Sharded(Sharded(SqEuclidean(x, y)))
    cost = Sharded(SqEuclidean(x, y))
    with pytest.raises(gpu_ot.ProblemError, match="median"):
        Problem(cost, ("median", 0.1))
    with pytest.raises(gpu_ot.ProblemError, match="solve_sample"):
        gpu_ot.pot.solve(cost, reg=0.5)
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
    assert 'auto takes "dense"' in text


# The benchmarks.


@pytest.fixture(scope="module")
def bench():
    """The scripts by name: their folder is no package, and on the path only where they are run."""
    folder = str(WORKER.parents[1] / "bench")

    def script(name):
        sys.path.insert(0, folder)
        try:
            spec = importlib.util.spec_from_file_location(f"bench_{name}", f"{folder}/{name}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        finally:
            sys.path.remove(folder)

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
