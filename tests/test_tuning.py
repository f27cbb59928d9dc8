"""Tiles that were timed: the file they are kept in, when they are believed, and the command that writes them. The clock is a fake one."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gpu_ot.kernels import trial, tuning
from gpu_ot.kernels.tuning import Tile

from gpu_ot import cli
from gpu_ot.cli import main
from gpu_ot.errors import ProblemError

HERE = "sm_90 | A GPU | triton 0"
TILE = Tile(64, 32, 8, 3, 64)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """Of no user's own; nothing is read yet."""
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv(tuning.ENVIRONMENT, str(path))
    monkeypatch.setattr(tuning, "machine", lambda device: HERE)
    monkeypatch.setattr(tuning, "architecture", lambda x: "sm_90")
    tuning.timed.cache_clear()
    yield path
    tuning.timed.cache_clear()


def entry(n=1000, tile=TILE, **changes):
    return dict(kernel="softmin", storage="pair", bucket=64, n=n, tile=tile, time_ms=1.0, table_ms=2.0) | changes


def points(is_cuda=True, dtype=torch.float16):
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cuda:0")


def lookup(n, x=None, width=64, kernel="softmin"):
    return tuning.tile(kernel, x or points(), 2, width, n)


def test_a_timed_row_comes_before_the_table_near_its_size(file):
    tuning.write(file, HERE, [entry(1000), entry(10_000, Tile(128, 32, 4, 1))])
    assert lookup(1000) == lookup(250) == lookup(2000) == TILE
    assert lookup(5000) == lookup(40_000) == Tile(128, 32, 4, 1)
    table = tuning.row("softmin", "sm_90", "pair", 64, False)
    assert lookup(249) == lookup(40_001) == table
    assert lookup(1000, width=128) == tuning.row("softmin", "sm_90", "pair", 128, False)
    assert lookup(1000, kernel="vector") == tuning.row("vector", "sm_90", "pair", 64, False)
    assert lookup(1000, points(is_cuda=False)) == table, "the interpreter does not depend on what a GPU once measured"


def test_rows_of_another_machine_are_kept_and_not_used(file, monkeypatch):
    tuning.write(file, "another | GPU | triton 0", [entry()])
    assert lookup(1000) == tuning.row("softmin", "sm_90", "pair", 64, False)
    tuning.write(file, HERE, [entry(500)])
    tuning.write(file, HERE, [entry(500, Tile(64, 64, 8, 1)), entry(9000)])
    held = json.loads(file.read_text())["machines"]
    assert {name: [row["n"] for row in rows] for name, rows in held.items()} == {"another | GPU | triton 0": [1000], HERE: [500, 9000]}
    assert lookup(500) == Tile(64, 64, 8, 1), "written over, and read again in the process that wrote"
    assert [p.name for p in file.parent.iterdir()] == [file.name], "no partial file stays"


def test_the_file_is_read_once(file, monkeypatch):
    tuning.write(file, HERE, [entry()])
    calls, read = [], tuning.read
    monkeypatch.setattr(tuning, "read", lambda path: calls.append(path) or read(path))
    for _ in range(3):
        lookup(1000)
    assert calls == [file]


ROW = entry() | {"tile": {"block_n": 64, "block_m": 32, "warps": 8, "stages": 3, "block_c": 64}}


def whole(*rows):
    return json.dumps({"format": tuning.FORMAT, "machines": {HERE: list(rows)}})


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "does not begin"),
        ('{"format": "other", "machines": {}}', "does not begin"),
        (json.dumps({"format": tuning.FORMAT, "machines": {HERE: 3}}), "no list"),
        (whole(3), "no row"),
        (whole(ROW | {"kernel": "rm -rf"}), "no kernel is known"),
        (whole(ROW | {"kernel": ["softmin"]}), "no kernel is known"),
        (whole(ROW | {"bucket": 63}), "no kernel is known"),
        (whole(ROW | {"bucket": True}), "no kernel is known"),
        (whole(ROW | {"n": 0}), "no number of rows"),
        (whole(ROW | {"tile": [64, 64]}), "no tile"),
        (whole(ROW | {"tile": ROW["tile"] | {"block_n": 96}}), "block_n = 96"),
        (whole(ROW | {"tile": ROW["tile"] | {"warps": 8.0}}), "warps = 8.0"),
        (whole(ROW, ROW | {"tile": ROW["tile"] | {"stages": 10**9}}), "stages = 1000000000"),
        (" " * (tuning.LARGEST_FILE + 1), "larger than"),
        (None, "No such file"),
    ],
)
def test_a_broken_or_foreign_file_is_ignored_with_a_warning(file, content, says):
    """All of it, with what was wrong and how to be rid of it; and it is not written over."""
    file.parent.mkdir()
    if content is not None:
        file.write_text(content)
    with pytest.warns(UserWarning, match="is ignored") as said:
        assert lookup(1000) == lookup(1000) == tuning.row("softmin", "sm_90", "pair", 64, False)
    (message,) = [str(w.message) for w in said]
    assert says in message and str(file) in message and ("rm " in message or content is None) and "gpu-ot tune" in message
    if content is not None:
        with pytest.raises(ValueError):
            tuning.write(file, HERE, [entry()])
        assert file.read_text() == content
        with pytest.raises(ProblemError, match="rm "):
            cli._tuning_file(None, tuning)


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.ENVIRONMENT, "/named.json")
    assert str(tuning.cache_file()) == "/named.json"
    monkeypatch.setenv(tuning.ENVIRONMENT, "")
    assert tuning.cache_file() is None and tuning.timed() == {}
    tuning.timed.cache_clear()
    with pytest.raises(ProblemError, match="--out"):
        cli._tuning_file(None, tuning)
    monkeypatch.delenv(tuning.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / "gpu_ot" / "tuning.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.timed() == {}, "nobody has tuned: nothing to say"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the convention tells to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / ".cache" / "gpu_ot" / "tuning.json"


def test_every_row_of_the_table_is_a_candidate_and_legal(file):
    for kernel, arch, storage in tuning.TABLE:
        for bucket in tuning.BUCKETS:
            for thin in (False, True):
                found = tuning.candidates(kernel, arch, storage, bucket, thin)
                assert found[0] == tuning.row(kernel, arch, storage, bucket, thin) and len(set(found)) == len(found) > 10
                assert all(vars(tile)[key] in allowed for tile in found for key, allowed in tuning.LEGAL.items())
                assert all(tile.block_n <= tuning.THIN for tile in found) or not thin


def race(seconds, rounds=None):
    """A clock that knows how long each tile takes; None for one that does not run."""

    def clock(calls, tiles, k):
        if rounds is not None:
            rounds.append((len(tiles), k))
        return [seconds(tile) for tile in tiles]

    return clock


def test_the_fastest_candidate_wins_and_is_found_again(file):
    asked = [trial.Trial("softmin", "fp32", 1000, 64), trial.Trial("apply", "tf32", 1000, 3)]
    rounds = []
    # Fastest where it does not run; then at block_m 32, 8 warps.
    clock = race(lambda t: None if t.stages == 3 else 1.0 + (t.block_m != 32) + (t.warps != 8) + 0.1 * t.stages + t.block_n / 1e3, rounds)
    steps = list(trial.run(asked, torch.device("cpu"), "sm_90", clock))
    done, total, _ = steps[-1]
    assert done == total and [d for d, _, _ in steps] == sorted(d for d, _, _ in steps)
    found = [outcome for *_, outcome in steps if outcome]
    assert [o.trial for o in found] == asked
    for o in found:
        assert (o.new.block_n, o.new.block_m, o.new.warps, o.new.stages) == (64, 32, 8, 1) and o.new_ms < o.old_ms
        tuning.write(file, HERE, [o.row()])
    assert rounds.count((2, 15)) == 2, "the winner meets the table's tile again, in turns"
    assert lookup(1000) == found[0].new
    assert tuning.tile("apply", points(dtype=torch.float32), 1, 16, 900) == found[1].new
    text = cli.tuned_table(found)
    assert "64x32 w8 s1" in text and "128x128 w4 s2" in text and f"{found[0].old_ms / found[0].new_ms:.2f}x" in text


def test_a_gain_within_the_noise_keeps_the_table(file):
    asked = [trial.Trial("softmin", "fp32", 1000, 64)]
    table = tuning.row("softmin", "sm_90", "pair", 64, False)
    (outcome,) = [o for *_, o in trial.run(asked, torch.device("cpu"), "sm_90", race(lambda t: 1.0 if t == table else 0.99)) if o]
    assert outcome.new == outcome.old == table and "kept" in cli.tuned_table([outcome])
    with pytest.raises(RuntimeError, match="own tile"):
        list(trial.run(asked, torch.device("cpu"), "sm_90", race(lambda t: None if t == table else 1.0)))


@pytest.mark.parametrize(
    "precision, d, storage, bucket", [("fp32", 3, "half", 32), ("fp32", 64, "pair", 64), ("tf32", 3, "tf32", 16), ("fp16", 300, "half", 0)]
)
def test_a_trial_is_of_the_row_that_a_launch_would_look_up(precision, d, storage, bucket):
    asked = trial.Trial("softmin", precision, 10, d)
    assert (asked.storage, asked.bucket) == (storage, bucket)


def test_without_a_gpu_it_says_so(file, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    printed, refusal = capsys.readouterr()
    assert printed == "" and "GPU" in refusal and "Nothing was written" in refusal and refusal.count("\n") == 1
    assert not file.exists() and not file.parent.exists()


@pytest.mark.parametrize("arguments, says", [(["--d", "0"], "--d"), (["--n", "many"], "--n"), (["--precision", "fp8"], "--precision")])
def test_unparsable_options_are_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *arguments])
    refusal = capsys.readouterr().err
    assert stop.value.code == 2 and says in refusal and refusal.count("\n") == 1


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProblemError, match="cannot be written"):
        cli._tuning_file(str(tmp_path / "file" / "tiles.json"), tuning)
    assert cli._tuning_file(str(tmp_path / "new" / "tiles.json"), tuning).parent.is_dir()
    assert not list((tmp_path / "new").iterdir())


def test_progress_in_a_log_is_a_few_lines(capsys):
    for done in range(1, 101):
        cli._bar(done, 100, 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 12 and lines[-1] == "100/100 shapes, 0 s left"
