"""Pairs: DTW against its definition, files that are believed only when they fit, and draws that depend on their number alone."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_collate

from gpu_ot import cli
from gpu_ot.errors import ProblemError
from gpu_ot.lerobot import OTConfig
from gpu_ot.lerobot import dtw as dtw_module
from gpu_ot.lerobot.dataset import LeRobotOTPairDataset
from gpu_ot.lerobot.draws import DrawLoader, MixedDataset, Part, co_training
from gpu_ot.lerobot.dtw import dtw
from gpu_ot.lerobot.episodes import Recording, Side, digest, read_recording
from gpu_ot.lerobot.frames import FrameCache
from gpu_ot.lerobot.pairfile import read_pairs
from gpu_ot.lerobot.pairing import pair_episodes
from gpu_ot.lerobot.pairs import ARRAYS, PairOptions
from problems import refused

COSTS = ("euclidean", "l1", "linf")
STATE, TOP = "observation.state", "observation.images.top"


# The definition


def distances(x, y, cost):
    gap = np.abs(x[:, None] - y[None])
    return {"euclidean": lambda: np.sqrt((gap**2).sum(-1)), "l1": lambda: gap.sum(-1), "linf": lambda: gap.max(-1)}[cost]()


def truth(x, y, cost="euclidean", band=None):
    """The least sum over all monotone paths, cell by cell."""
    C, n, m = distances(x, y, cost), len(x), len(y)
    D = np.full((n + 1, m + 1), np.inf)
    for i in range(n):
        for j in range(m):
            far = n > 1 and abs(i * (m - 1) - j * (n - 1)) > (math.inf if band is None else band) * (max(n, m) - 1) + 1e-9
            before = 0.0 if i == j == 0 else min(D[i, j], D[i, j + 1], D[i + 1, j])
            D[i + 1, j + 1] = math.inf if far else C[i, j] + before
    return D[n, m]


def walk(n, d, seed, levels=None):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).cumsum(0) if levels is None else rng.integers(0, levels, (n, d)).astype(float)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("band", [None, 1, 2.5, 6])
@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (7, 1), (2, 9), (12, 12), (17, 9), (9, 17)])
def test_distance_is_the_least_over_monotone_paths(cost, band, n, m):
    for seed, levels in ((0, None), (1, 3)):  # the second is full of ties
        x, y = walk(n, 3, seed, levels), walk(m, 3, seed + 10, levels)
        found = dtw(x, y, cost=cost, band=band)
        assert found.total == pytest.approx(truth(x, y, cost, band), rel=1e-12, abs=1e-12)
        path = found.path
        assert tuple(path[0]) == (0, 0) and tuple(path[-1]) == (n - 1, m - 1)
        steps = np.diff(path, axis=0)
        assert ((steps == 0) | (steps == 1)).all() and (steps.sum(1) > 0).all()
        assert len(path) == found.steps
        assert distances(x, y, cost)[path[:, 0], path[:, 1]].sum() == pytest.approx(found.total, rel=1e-12, abs=1e-12)
        if band is not None and n > 1:
            assert (np.abs(path[:, 0] * (m - 1) - path[:, 1] * (n - 1)) <= band * (max(n, m) - 1)).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 24), m=st.integers(1, 24), d=st.integers(1, 12), levels=st.sampled_from([None, 2, 4]),
    cost=st.sampled_from(COSTS), band=st.sampled_from([None, 1, 1.7, 5]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_machine_code_agrees_to_the_last_bit_ties_included(n, m, d, levels, cost, band, seed):
    pytest.importorskip("numba")
    x, y = walk(n, d, seed, levels), walk(m, d, seed + 99, levels)
    found, peer = dtw(x, y, cost=cost, band=band), dtw_module._align_one(x, np.ascontiguousarray(y.T), COSTS.index(cost), band or -1.0)
    assert found.total == peer[0] and (found.first == peer[1]).all() and (found.last == peer[2]).all()


def test_equal_paths_speeds_and_the_order_of_the_arguments():
    """Steps of both come before steps of one, a copy at another speed is at distance 0, and either argument may come first."""
    found = dtw(np.zeros((3, 1)), np.zeros((5, 1)))
    assert found.path.tolist() == [[0, 0], [0, 1], [0, 2], [1, 3], [2, 4]]
    x, y = walk(30, 4, 0), walk(41, 4, 1)
    assert dtw(x, x).total == 0
    assert dtw(x, x).path.tolist() == [[i, i] for i in range(30)]
    pace = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 4, 30))
    found = dtw(x, x[pace])
    assert found.total == 0
    np.testing.assert_array_equal([found.first, found.last], [pace, pace])
    for band in (None, 3):
        assert dtw(x, y, band=band).total == pytest.approx(dtw(y, x, band=band).total, rel=1e-12)


@pytest.mark.parametrize("call, words", [
    (lambda: dtw(np.zeros((3, 2)), np.zeros((3, 1))), ["features", "2 and 1"]),
    (lambda: dtw(np.zeros((0, 2)), np.zeros((3, 2))), ["x has shape (0, 2)"]),
    (lambda: dtw(np.array([[np.nan]]), np.zeros((3, 1))), ["x holds NaN", "1 of its 1"]),
    (lambda: dtw(np.zeros(3), np.zeros(3), band=0.5), ["band", "0.5"]),
    (lambda: dtw(np.zeros(3), np.zeros(3), cost="cosine"), ["cosine", "'l1'"]),
    (lambda: dtw("abc", np.zeros(3)), ["x must be an array of numbers", "str"]),
    (lambda: PairOptions(stride=0), ["stride", "0"]),
    (lambda: PairOptions(dim_slice=(3, 3)), ["dim_slice", "[3, 3]"]),
    (lambda: PairOptions(norm="path"), ["norm", "'arc'"]),
    (lambda: pair_episodes([], [np.zeros(3)]), ["source has no episodes"]),
    (lambda: pair_episodes([np.zeros((3, 2))], [np.zeros((3, 4))]), ["2 and 4 features", "dim_slice"]),
    (lambda: pair_episodes([np.zeros((3, 4))], [np.zeros((3, 4))], PairOptions(dim_slice=(2, 5))), ["[2, 5)", "source", "4 features"]),
    (lambda: pair_episodes([np.zeros(3), np.full(2, np.inf)], [np.ones(3)]), ["source episode 1", "2 of its 2"]),
    (lambda: pair_episodes([np.zeros(3)], [np.ones(3)], PairOptions(norm="arc")), ["arc", "stand still", "steps"]),
])  # fmt: skip
def test_refusals_name_the_argument_and_what_was_found(call, words):
    refused(words, call)


# Episodes


def sets(d=3):
    """Source and target; the targets are sources 1 and 0 at other speeds, and a stranger."""
    source = [walk(n, d, n) for n in (40, 55, 33)]
    return source, [source[1][::2].copy(), source[0].repeat(2, 0), walk(30, d, 7)]


@pytest.mark.parametrize("options", [
    {}, {"stride": 3}, {"stride": 2, "band": 3}, {"dim_slice": (1, 3), "norm": "none", "cost": "linf"},
    {"center": True, "zscore": True, "band": 20, "topk": 2, "norm": "arc", "cost": "l1", "stride": 2},
], ids=lambda o: "-".join(o) or "plain")  # fmt: skip
def test_pairs_are_dtw_of_the_prepared_labels(options):
    """Prepared here a second time, plainly."""
    source, target = sets()
    o = PairOptions(**options)
    pairs = pair_episodes(source, target, o, workers=2)

    a, b = o.dim_slice or (0, 3)
    x, y = ([z[:, a:b] - (z[:, a:b].mean(0) if o.center else 0) for z in side] for side in (source, target))
    if o.zscore:
        every = np.concatenate(x + y)
        x, y = ([(z - every.mean(0)) / every.std(0) for z in side] for side in (x, y))
    for t, one in enumerate(y):
        expected = {}
        for s, other in enumerate(x):
            kept_x, kept_y = (sorted({*range(0, len(z), o.stride), len(z) - 1}) for z in (other, one))
            band = None if o.band is None else max(1, o.band / o.stride)
            total = truth(other[kept_x], one[kept_y], o.cost, band)
            path = dtw(other[kept_x], one[kept_y], cost=o.cost, band=band).steps
            arc = 0.5 * sum(distances(z[1:], z[:-1], o.cost).diagonal().sum() for z in (other, one))
            expected[s] = total / {"steps": path, "arc": arc / o.stride, "none": 1}[o.norm]
        nearest = sorted(expected, key=expected.__getitem__)[: o.topk]
        mine = pairs.of(t)
        assert pairs.source_episode[mine].tolist() == nearest
        np.testing.assert_allclose(pairs.distance[mine], [expected[s] for s in nearest], rtol=1e-9, atol=1e-12)


def test_a_constant_feature_does_not_count_after_scaling():
    source, target = sets()
    flat = [[np.column_stack((z, np.full(len(z), 0.1))) for z in side] for side in (source, target)]
    o = PairOptions(zscore=True)
    np.testing.assert_allclose(pair_episodes(*flat, o).distance, pair_episodes(source, target, o).distance, rtol=1e-9)


def test_frames_that_were_skipped_are_interpolated():
    t = np.linspace(0, 1, 61)[:, None]
    x = np.concatenate((t, np.sin(5 * t)), 1)
    pairs = pair_episodes([x], [x, x[::2]], PairOptions(stride=4))
    assert [pairs.frames_of(0, k).tolist() for k in range(61)] == [[k] for k in range(61)]
    for k in range(31):  # twice as fast: frame k of the target is frame 2k of the source, up to what a stride of 4 resolves
        assert abs(pairs.frames_of(1, k) - 2 * k).max() <= 4
    assert pairs.frames_of(1, 0)[0] == 0 and pairs.frames_of(1, 30)[-1] == 60


def test_progress_is_told_and_threads_change_nothing():
    source, target = sets()
    told = []
    one = pair_episodes(source, target, workers=1, progress=lambda *at: told.append(at))
    four = pair_episodes(source, target, workers=4)
    assert told[-1] == (9, 9) and told == sorted(told)
    np.testing.assert_array_equal(one.first, four.first)
    np.testing.assert_array_equal(one.source_episode, four.source_episode)


# Files


def recording(episodes, name="here", fps=10.0, numbers=None):
    labels = np.concatenate(episodes)
    numbers = np.arange(len(episodes)) if numbers is None else np.array(numbers)
    return Recording(Side(name, fps, numbers, np.array([len(z) for z in episodes]), digest(labels)), (STATE,), labels)


def test_a_file_gives_back_what_was_written(tmp_path):
    source, target = sets()
    pairs = pair_episodes(recording(source, numbers=[2, 5, 9]), recording(target), PairOptions(stride=2, topk=2, dim_slice=(0, 2)))
    again = read_pairs(pairs.write(tmp_path / "new" / "pairs.npz"))
    assert again.options == pairs.options
    assert set(again.source_episode.tolist()) <= {2, 5, 9}
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(pairs, name))
    again.check(recording(source, numbers=[2, 5, 9], name="moved"), recording(target))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.npz"]
    header = json.loads(str(np.load(tmp_path / "new" / "pairs.npz", allow_pickle=False)["header"]))
    assert (header["format"], header["version"], header["index_base"]) == ("gpu_ot pairs", 1, 0)
    assert header["source"]["fps"] == 10 and header["options"]["keys"] == [STATE]


@pytest.mark.parametrize("change, words", [
    (lambda s: recording([*s[:2], s[2][:-1]]), ["episode 2 has 32 frames instead of 33"]),
    (lambda s: recording([*s, s[0]]), ["4 episodes instead of 3", "3 among them"]),
    (lambda s: recording(s, fps=20.0), ["20 frames a second instead of 10"]),
    (lambda s: recording([s[0] + 1e-6, *s[1:]]), ["labels have other values"]),
])  # fmt: skip
def test_other_data_are_noticed(change, words):
    source, target = sets()
    pairs = pair_episodes(recording(source, name="me/sim"), recording(target))
    pairs.check(source=recording([source[0], source[2]], numbers=[0, 2]))  # a part of the episodes is enough
    refused(["source", "me/sim", "gpu-ot pair", *words], pairs.check, source=change(source))


def rewritten(path, **changes):
    """Pairs of `sets` in a file, some of its arrays made by functions of what they were, and keys of its header replaced."""
    arrays = dict(np.load(pair_episodes(*sets()).write(path)))
    arrays |= {name: change(arrays[name]) for name, change in changes.items() if name != "header"}
    header = json.dumps(json.loads(str(arrays["header"])) | changes.get("header", {}))
    np.savez(path, **arrays | {"header": np.array(header)})
    return path


@pytest.mark.parametrize("name, change", [
    ("first", lambda a: a.astype(np.int64) + 1000), ("count", lambda a: a * 0), ("source_episode", lambda a: a.astype(np.int64) + 50),
    ("offsets", lambda a: a[:-1]), ("distance", lambda a: a * np.nan),
])  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, name, change):
    refused(r"(?i)pairs.npz: .*pair again", read_pairs, rewritten(tmp_path / "pairs.npz", **{name: change}))


def test_what_is_no_pair_file_is_refused(tmp_path):
    refused("gpu-ot pair --src", read_pairs, tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    refused("is no pair file", read_pairs, tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    refused("something else", read_pairs, tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", header=np.array([{}], dtype=object))
    with pytest.raises(ProblemError, match="is no pair file"):  # nothing is unpickled
        read_pairs(tmp_path / "objects.npz")
    refused("format 99", read_pairs, rewritten(tmp_path / "new.npz", header={"version": 99}))


def test_whatever_is_damaged_is_refused_or_changes_nothing(tmp_path):
    """300 files with a few bytes overwritten or the end cut off: refused, saying how to make the file again, or the same pairs."""
    whole = pair_episodes(*sets()).write(tmp_path / "pairs.npz")
    data, pairs, rng, refused = whole.read_bytes(), read_pairs(whole), np.random.default_rng(0), 0
    for k in range(300):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        whole.write_bytes(damaged if k % 3 else damaged[: rng.integers(len(data))])
        try:
            found = read_pairs(whole)
        except ProblemError as problem:
            refused += 1
            assert str(whole) in str(problem) and ("gpu-ot pair" in str(problem) or "Pair again" in str(problem)), problem
            continue
        assert all(np.array_equal(getattr(found, name), getattr(pairs, name)) for name in ARRAYS) and found.target.name == pairs.target.name
    assert refused > 200


@pytest.mark.parametrize("change", [
    {"version": "1"}, {"source": 3}, {"source": {"name": 3, "fps": 10, "digest": None, "exact": True}}, {"options": {"center": "false"}},
    {"target": {"name": "a", "fps": "ten", "digest": None, "exact": True}}, {"options": {"keys": [1]}}, {"options": {"dim_slice": [0.5]}},
    {"options": [1]}, {"target": {"name": "a", "fps": 10, "digest": 7, "exact": 1}}, ("distance", "<U3"), ("first", float), ("steps", bool),
])  # fmt: skip
def test_wrong_types_inside_are_refused(tmp_path, change):
    changes = {"header": change} if isinstance(change, dict) else {change[0]: lambda array: array.astype(change[1])}
    refused(r"pairs.npz.*gpu-ot pair", read_pairs, rewritten(tmp_path / "pairs.npz", **changes))


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez_compressed", lambda *args, **arrays: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pair_episodes(*sets()).write(tmp_path / "pairs.npz")
    assert not list(tmp_path.iterdir())


OLD = {
    "demo_2": [
        {"demo_name": "demo_11", "raw_dtw_dist": 8.0, "pairing": {"0": [0], "1": [0, 1], "2": [4], "3": [5, 7, 9]}},
        {"demo_name": 3, "raw_dtw_dist": 2.0, "pairing": {str(t): [t] for t in range(4)}},
    ],
    "demo_1": [{"demo_name": "12", "raw_dtw_dist": 6.0, "pairing": {"0": [0, 1], "4": [8]}}],
}


def test_the_forks_file_is_read(tmp_path):
    (path := tmp_path / "pairs.json").write_text(json.dumps(OLD))
    pairs = read_pairs(path, base_index_tgt=1)
    assert pairs.target_episode.tolist() == [0, 1, 1]
    assert pairs.source_episode.tolist() == [12, 3, 11]
    np.testing.assert_allclose(pairs.distance, [6 / 3, 2 / 4, 8 / 7])
    np.testing.assert_allclose(read_pairs(path, base_index_tgt=1, norm="none").distance, [6, 2, 8])
    assert [pairs.frames_of(2, t).tolist() for t in range(4)] == [[0], [0, 1], [4], [5, 7, 9]]
    assert [pairs.frames_of(0, t).tolist() for t in range(5)] == [[0, 1], [0, 1], [0, 1], [8], [8]]  # listed with a stride of 4
    again = read_pairs(pairs.write(tmp_path / "pairs.npz"))
    assert again.frames_of(2, 3).tolist() == [5, 7, 9] and not again.source.exact
    again.check(Side("longer", 10.0, np.arange(20), np.full(20, 50)), None)
    refused("episode 11 has 9 frames instead of at least 10", again.check, Side("shorter", 10.0, np.arange(20), np.full(20, 9)), None)


@pytest.mark.parametrize("content, words", [
    ({}, ["target demo"]),
    ([1], ["target demo", "list"]),
    ({"demo_1": [{"demo_name": "demo_2", "pairing": {}}]}, ["raw_dtw_dist", "demo_1"]),
    ({"left": [{"demo_name": "demo_2", "raw_dtw_dist": 1, "pairing": {"0": [1]}}]}, ["left", "demo_12"]),
    ({"demo_1": [{"demo_name": "demo_2", "raw_dtw_dist": 1, "pairing": {}}]}, ["pairs no frame"]),
    ({"demo_1": [{"demo_name": "demo_0", "raw_dtw_dist": 1, "pairing": {"0": [1]}}]}, ["demo_0", "base_index_src"]),
    ({"demo_1": [{"demo_name": "demo_1", "raw_dtw_dist": 1, "pairing": {"0": [-3]}}]}, ["-3"]),
    ({"demo_1": [{"demo_name": "demo_1", "raw_dtw_dist": 1, "pairing": {"0": [0.5]}}]}, ["whole numbers"]),
    ({"demo_1": [{"demo_name": "demo_1", "raw_dtw_dist": "far", "pairing": {"0": [1]}}]}, ["or a distance"]),
    ({"demo_1": 3}, ["gpu-ot pair"]),
])  # fmt: skip
def test_a_bad_json_is_refused(tmp_path, content, words):
    (path := tmp_path / "pairs.json").write_text(json.dumps(content))
    refused([str(path), *words], read_pairs, path, base_index_src=1)


# Draws


class Fake:
    """As much of a LeRobotDataset as is needed. Images tell which frame they are; `reads` counts what was decoded."""

    def __init__(self, lengths, name="fake", numbers=None, image=torch.uint8, transforms=None, extra=()):
        self.repo_id, self.reads, self.image_transforms, self.image = name, [], transforms, image
        numbers = range(len(lengths)) if numbers is None else numbers
        self.episode = np.repeat(list(numbers), lengths)
        self.frame = np.concatenate([np.arange(n) for n in lengths])
        self.hf_dataset = {"episode_index": self.episode}
        features = {STATE: {"shape": (2,)}, TOP: {"shape": (3, 2, 2)}, "action": {"shape": (1,)}}
        self.meta = SimpleNamespace(fps=10, camera_keys=[TOP], features=features | {k: {"shape": (1,)} for k in extra})
        self.extra = extra

    def __len__(self):
        return len(self.episode)

    def __getitem__(self, index):
        assert type(index) is int
        self.reads.append(index)
        image = torch.full((3, 2, 2), int(self.frame[index]), dtype=torch.uint8)
        image = image if self.image == torch.uint8 else image.float() / 255
        return {
            STATE: torch.tensor([float(self.episode[index]), float(self.frame[index])]),
            TOP: self.image_transforms(image) if self.image_transforms else image,
            "action": torch.zeros(1),
            "action_is_pad": torch.zeros(1, dtype=torch.bool),
            "task": f"task of {self.repo_id}",
        } | {key: torch.zeros(1) for key in self.extra}


def fakes(**options):
    source, target = sets()
    pairs = pair_episodes(source, target)
    return Fake([len(z) for z in source], "sim", **options), Fake([len(z) for z in target], "real", **options), pairs


def sampled(**given):
    return OTConfig(**dict(window_size=10, sharpness=10.0, cutoff=0.01) | given)


def paired(sampling=None, **options):
    return LeRobotOTPairDataset(*fakes(), sampling, **options)


def test_an_epoch_is_every_target_frame_once_and_the_next_is_another_order():
    data = paired()
    n = len(data)
    epochs = [[data.draw(k).target for k in range(e * n, (e + 1) * n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [data.draw(k) for k in range(n)] != [data.draw(k + n) for k in range(n)]


def test_items_are_the_frames_that_were_drawn():
    data = paired(sampled(window_size=3))
    for n in range(50):
        item, drawn = data.item(n), data.draw(n)
        assert set(item) == {"src", "tgt"}
        for side, role, episode in (("src", "source", drawn.source_episode), ("tgt", "target", drawn.target_episode)):
            assert set(item[side]) == {"obs", "actions"} and torch.equal(item[side]["actions"], torch.zeros(1))
            row, frames, state = getattr(drawn, role), getattr(data, role), item[side]["obs"][STATE]
            assert state[0] == episode == frames.dataset.episode[row]
            assert state[1] == frames.dataset.frame[row]
            assert torch.equal(item[side]["obs"][TOP], torch.full((3, 2, 2), int(state[1])) / 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_ends_after_an_epoch_and_the_next_draws_anew(workers):
    data = paired(sampled(window_size=5, sharpness=0))
    loader = DataLoader(data, 8, shuffle=True, num_workers=workers)
    epochs = [[row for batch in loader for row in flat(batch)] for _ in range(2)]
    every = [(e, f) for e, n in zip(data.target.side.episodes, data.target.side.lengths, strict=True) for f in range(n)]
    for epoch in epochs:
        assert len(epoch) == len(data) and sorted(row[2:] for row in epoch) == every
    sources = [{row[2:]: row[:2] for row in epoch} for epoch in epochs]
    assert sum(sources[0][at] != sources[1][at] for at in every) > len(every) / 2
    torch.manual_seed(5)
    first = [flat(batch) for batch in loader]
    torch.manual_seed(5)
    assert [flat(batch) for batch in loader] == first
    with pytest.raises(IndexError, match="an epoch has"):
        data[len(data)]
    some = paired(episodes=[0, 2])
    assert len(some) == 28 + 30 and {some.draw(n).target_episode for n in range(200)} == {0, 2}
    refused("no episode 7", paired, episodes=[7])


def test_source_frames_are_aligned_ones_and_jitter_stays_in_its_window_and_episode():
    data = paired(sampled(window_size=0, sharpness=0))
    w = 6
    shaken = paired(sampled(window_size=w, sharpness=0))
    offsets, edges = [], 0
    for n in range(1500):
        for d, low, high in ((data.draw(n), 0, 0), (shaken.draw(n), -w, w - 1)):
            pair = next(k for k in data.pairs.of(d.target_episode) if data.pairs.source_episode[k] == d.source_episode)
            aligned = data.pairs.frames_of(pair, int(data.target.dataset.frame[d.target]))
            frame, length = data.source.dataset.frame[d.source], data.source.side.lengths[d.source_episode]
            assert data.source.dataset.episode[d.source] == d.source_episode
            assert max(0, aligned.min() + low) <= frame <= min(length - 1, aligned.max() + high)
            if high and len(aligned) == 1 and w <= aligned[0] < length - w:
                offsets.append(int(frame - aligned[0]))
            edges += high > 0 and (aligned.min() + low < 0 or aligned.max() + high >= length)
    assert set(offsets) == set(range(-w, w)) and edges > 20
    counts = np.bincount(np.array(offsets) + w)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 35  # chi-square, 11 degrees of freedom: 1e-4 lies at 37


def test_without_a_window_the_whole_episode_is_drawn_and_frames_of_a_run_are_uniform():
    data = paired(sampled(no_window=True))
    drawn = [data.draw(n) for n in range(4000)]
    for episode in {d.source_episode for d in drawn}:
        frames = {int(data.source.dataset.frame[d.source]) for d in drawn if d.source_episode == episode}
        many = sum(d.source_episode == episode for d in drawn)
        if many > 1000:
            assert frames == set(range(data.source.side.lengths[episode]))
    pairs = pair_episodes([np.zeros((50, 1))], [np.zeros((1, 1))])  # one target frame meets every source frame
    data = LeRobotOTPairDataset(Fake([50]), Fake([1]), pairs, sampled(window_size=0))
    counts = np.bincount([data.draw(n).source for n in range(5000)], minlength=50)
    assert ((counts - 100) ** 2 / 100).sum() < 95  # 49 degrees of freedom: 1e-4 lies at 96


@pytest.mark.parametrize("sharpness, cutoff", [(10.0, 0.01), (0.3, 3.0), (1.0, None), (0.0, None)])
def test_episodes_are_drawn_by_their_weights(sharpness, cutoff):
    d = np.array([0.02, 1.5, 4.0])
    weight = np.exp(-sharpness * d) if cutoff is None else 1 / (1 + np.exp(sharpness * (d - cutoff)))
    sampling = sampled(sharpness=sharpness, cutoff=cutoff)
    np.testing.assert_allclose(sampling.probabilities(d), weight / weight.sum(), rtol=1e-10)

    data = paired(sampling)
    drawn = [data.draw(n) for n in range(6000)]
    for episode in range(3):
        mine = data.pairs.of(episode)
        expected = sampling.probabilities(data.pairs.distance[mine])
        found = np.array([d.source_episode for d in drawn if d.target_episode == episode])
        for k, p in zip(mine, expected, strict=True):
            assert abs((found == data.pairs.source_episode[k]).mean() - p) <= 4.5 * math.sqrt(p * (1 - p) / len(found)) + 1e-9


def test_weights_that_underflow_keep_their_ratios_and_only_the_nearest_are_drawn_where_asked():
    far = np.array([500.0, 500.1, 600.0])
    for cutoff in (0.01, None):
        np.testing.assert_allclose(sampled(sharpness=10, cutoff=cutoff).probabilities(far), [1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0])
    assert sampled(sharpness=1e6).probabilities(np.array([0.0, 0.005, 1.0])).tolist() == [0.5, 0.5, 0]

    data = paired(sampled(sharpness=0, topk_src_episodes=1))
    nearest = {t: data.pairs.source_episode[data.pairs.of(t)[0]] for t in range(3)}
    assert all(d.source_episode == nearest[d.target_episode] for d in map(data.draw, range(300)))


def test_a_draw_depends_on_its_number_and_the_seed_alone():
    one, two, other = paired(), paired(), paired(sampled(seed=1))
    forwards = [one.draw(n) for n in range(400)]
    assert forwards == [two.draw(n) for n in reversed(range(400))][::-1]
    assert sum(a == b for a, b in zip(forwards, map(other.draw, range(400)), strict=True)) < 40
    assert one.law == two.law != other.law
    copied = pickle.loads(pickle.dumps(one))
    assert [copied.draw(n) for n in range(0, 400, 7)] == forwards[::7]
    assert flat(default_collate([copied.item(3)])) == flat(default_collate([one.item(3)]))


def flat(batch):
    """(source episode, its frame, target episode, its frame) of each row."""
    return [(*map(int, row),) for row in torch.cat([batch[side]["obs"][STATE] for side in ("src", "tgt")], 1)]


def test_ranks_share_the_draws_of_one_and_never_draw_the_same():
    alone = DrawLoader(paired(), 8, rank=0, world=1)
    pair = [DrawLoader(paired(), 4, rank=r, world=2) for r in (0, 1)]
    for _ in range(20):
        whole, parts = flat(next(alone)), [flat(next(each)) for each in pair]
        assert [row for rows in zip(*parts, strict=True) for row in rows] == whole
        assert {row[2:] for row in parts[0]}.isdisjoint(row[2:] for row in parts[1])


def test_ranks_come_from_the_launcher(monkeypatch):
    expected = flat(next(DrawLoader(paired(), 9, rank=0, world=1)))[2::3]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert flat(next(DrawLoader(paired(), 3))) == expected
    refused("rank = 3", DrawLoader, paired(), 3, rank=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_very_next_batch(workers):
    """Also in the middle of an epoch, and whatever the workers have prepared beyond it."""
    whole = DrawLoader(paired(), 8, rank=1, world=2)
    expected = [flat(next(whole)) for _ in range(24)]
    assert 2 * len(whole.dataset) < 24 * 16, "the run crosses epochs"
    first = DrawLoader(paired(), 8, rank=1, world=2, num_workers=workers)
    assert [flat(next(first)) for _ in range(9)] == expected[:9]
    state = json.loads(json.dumps(first.state_dict()))
    second = DrawLoader(paired(), 8, rank=1, world=2, num_workers=workers)
    next(second)
    second.load_state_dict(state)
    assert [flat(next(second)) for _ in range(9, 24)] == expected[9:]
    assert second.state_dict() == whole.state_dict()


def test_a_state_of_other_draws_is_refused_and_torchs_random_numbers_are_left_alone():
    loader = DrawLoader(paired(), 4)
    refused(r"seed, sampling options, .*--restart-pairs", loader.load_state_dict, DrawLoader(paired(sampled(seed=5)), 4).state_dict())

    before = torch.get_rng_state()
    next(DrawLoader(paired(image_transforms=lambda image: image + torch.rand(())), 4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_one_transform_serves_both_sides_and_follows_the_draw(dtype):
    def noise(image):
        assert image.dtype == torch.float32 and image.max() <= 1
        return image.mul_(0).add_(torch.rand(()))  # works in place: the cache must not see it

    data, again = (LeRobotOTPairDataset(*fakes(image=dtype), image_transforms=noise) for _ in range(2))
    for n in (3, 11, 3):
        a, b = ([data.item(n)[side]["obs"][TOP] for side in ("src", "tgt")] for data in (data, again))
        assert all(map(torch.equal, a, b)) and not torch.equal(*a)
    assert len(data.source.cache) == 4
    drawn = data.draw(3)
    kept = data.target.cache.get((id(data.target), drawn.target), dict)[TOP]
    assert torch.equal(kept, data.target.dataset[drawn.target][TOP])


@pytest.mark.parametrize("image", [torch.uint8, torch.float32])
def test_transforms_of_the_datasets_are_applied_after_the_cache(image):
    seen = []

    def brighter(image):
        seen.append(float(image.max()))
        return image + 1

    source, target, pairs = fakes(image=image)
    target.image_transforms = brighter
    data = LeRobotOTPairDataset(source, target, pairs, sampled(window_size=0))
    for _ in range(2):
        for side in data.item(5).values():
            assert torch.equal(side["obs"][TOP], torch.full((3, 2, 2), int(side["obs"][STATE][1])) / 255 + 1)
    assert len(seen) == 4 and max(seen) <= 1
    assert target.image_transforms is brighter, "the dataset that was given is left as it is"
    assert len(source.reads) == 1


def test_a_dataset_with_a_reader_keeps_its_transforms_too():
    """LeRobot 0.6 decodes in an object of its own, which a plain copy of the dataset would share."""

    class Reader:
        def set_image_transforms(self, transforms):
            self.transforms = transforms

    source, target, pairs = fakes()
    source.reader, source.image_transforms = Reader(), lambda image: image
    source.reader.set_image_transforms(source.image_transforms)
    data = LeRobotOTPairDataset(source, target, pairs)
    assert data.source.dataset.reader.transforms is None
    assert source.reader.transforms is source.image_transforms is data.source.transforms


def test_frames_are_decoded_once_while_they_fit():
    data = paired()
    n = len(data)
    for k in range(2 * n):
        data.item(k)
    assert sorted(data.target.dataset.reads) == list(range(n))
    bare = paired(cache_bytes=0)
    for k in (1, 1, 1):
        bare.item(k)
    assert len(bare.source.dataset.reads) == 3
    cache, reads = FrameCache(3000), []

    def read(k):
        return cache.get(k, lambda: reads.append(k) or {"x": torch.zeros(186)})  # 744 + 256 bytes

    for k in (0, 1, 2, 0, 3, 0, 1):
        read(k)
    assert reads == [0, 1, 2, 3, 1] and cache.held == 3000 and len(cache) == 3
    assert len(pickle.loads(pickle.dumps(cache))) == 0 and cache.get(9, lambda: {"x": torch.zeros(10**4)})["x"].numel() == 10**4
    assert cache.held == 3000


def test_a_part_of_the_episodes_serves_those():
    _, target, pairs = fakes()
    some = Fake([40, 33], numbers=[0, 2])
    data = LeRobotOTPairDataset(some, target, pairs, sampled(sharpness=0))
    assert {d.source_episode for d in map(data.draw, range(200))} == {0, 2}
    assert all(some.episode[d.source] == d.source_episode for d in map(data.draw, range(200)))
    kept = pair_episodes(*sets(), PairOptions(topk=1))
    refused("target episode 0 is paired with 1 episodes, none of which", LeRobotOTPairDataset, some, target, kept)


def test_datasets_that_were_not_paired_are_refused():
    source, target, pairs = fakes()
    refused("source dataset other is not the one", LeRobotOTPairDataset, Fake([40, 55, 34], "other"), target, pairs)
    refused("episode_index", LeRobotOTPairDataset, SimpleNamespace(), target, pairs)
    shuffled = copy.copy(source)
    shuffled.hf_dataset = {"episode_index": np.roll(source.episode, 5)}
    refused("not together", LeRobotOTPairDataset, shuffled, target, pairs)


# The batch to imitate

#: The paper's shares: 0.45 of the paired source episodes, 0.45 of the others, 0.1 of the target.
MIX = OTConfig(bc_src_weight=0.9)


def test_shares_of_the_mixture_are_kept():
    source, target, _ = fakes()
    kept = pair_episodes(*sets(), PairOptions(topk=1))
    mixed = co_training(source, target, kept, MIX)
    chosen = set(kept.source_episode.tolist())
    assert len(mixed.parts) == 3 and 0 < len(chosen) < 3
    drawn = [mixed.draw(n) for n in range(8000)]
    for part, share in enumerate((0.45, 0.45, 0.1)):
        rows = [row for p, row in drawn if p == part]
        assert abs(len(rows) / 8000 - share) < 4.5 * math.sqrt(share * (1 - share) / 8000)
        frames = [k for k in range(len(source)) if (source.episode[k] in chosen) == (part == 0)] if part < 2 else range(len(target))
        assert set(rows) == set(frames)
    names = {mixed.item(n)["task"] for n in range(60)}
    assert names == {"task of sim", "task of real"}


def test_without_other_episodes_the_paired_have_their_share():
    source, target, pairs = fakes()
    mixed = co_training(source, target, pairs, OTConfig(bc_src_weight=0.8))
    assert [part.name for part in mixed.parts] == ["paired source", "target"]
    np.testing.assert_allclose(mixed.cumulated, [0.8, 1])
    larger = co_training(source, target, pairs, OTConfig(bc_src_weight=0.5, normalize_bc_weights_by_ds_size=False))
    np.testing.assert_allclose(larger.cumulated[0], len(source) / (len(source) + len(target)))


def test_the_mixture_resumes_and_splits_among_ranks():
    def loader(**options):
        return DrawLoader(co_training(*fakes(), MIX, seed=3), 8, **options)

    whole = loader(rank=0, world=1)
    states = torch.cat([next(whole)[STATE] for _ in range(6)])
    ranks = [loader(rank=r, world=2) for r in (0, 1)]
    halves = [torch.cat([next(each)[STATE] for _ in range(3)]) for each in ranks]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), states)
    assert not torch.equal(*halves)
    resumed = loader(rank=0, world=1)
    resumed.load_state_dict(ranks[0].state_dict())
    assert torch.equal(next(resumed)[STATE], next(whole)[STATE])


def test_ends_of_episodes_are_left_out_where_a_policy_asks_for_it():
    source, target, pairs = fakes()
    mixed = co_training(source, target, pairs, OTConfig(bc_src_weight=0.5), drop_last=4)
    for n in range(3000):
        part, row = mixed.draw(n)
        data, side = mixed.parts[part].dataset, mixed.frames[part].side
        assert data.frame[row] < side.lengths[data.episode[row]] - 4
    refused("no frames to give", MixedDataset, [Part("short", source, 1.0, [2], 33)])


def test_columns_that_only_some_have_are_dropped_and_other_shapes_refused():
    source, target = Fake([5], "sim", extra=["depth"]), Fake([5], "real")
    parts = [Part("sim", source, 0.5), Part("real", target, 0.5)]
    mixed = MixedDataset(parts)
    assert set(mixed.item(0)) == set(target[0]) and {mixed.draw(n)[0] for n in range(20)} == {0, 1}
    target.meta.features[TOP] = {"shape": (3, 8, 8)}
    refused(rf'"{TOP}" has the shapes \(3, 2, 2\) in sim, \(3, 8, 8\) in real', MixedDataset, parts)
    MixedDataset(parts, image_transforms=lambda image: image)
    refused("positive sum", MixedDataset, [Part("sim", source, 0.0)])
    refused("sim has a share of 1 and no frames", MixedDataset, [Part("sim", source, 1.0, [7])])


# The command, and the real package


def write_dataset(folder, episodes, version="v3.0", **info):
    """A LeRobotDataset's numbers, in parquet, as either format lays them out."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: it comes with lerobot")
    pq = pytest.importorskip("pyarrow.parquet")
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    counts = dict(codebase_version=version, fps=10, total_episodes=len(episodes), total_frames=sum(map(len, episodes)))
    (folder / "meta" / "info.json").write_text(json.dumps(counts | info))
    tables = []
    for k, z in enumerate(episodes):
        frames = dict(episode_index=[k] * len(z), frame_index=list(range(len(z))))
        tables.append(pa.table({STATE: z.tolist(), "gripper": z[:, 0].tolist(), "task": ["pick"] * len(z)} | frames))
    files = [(f"episode_{k:06d}", [table]) for k, table in enumerate(tables)]
    for name, held in files if version == "v2.1" else (("file-000", tables[:1]), ("file-001", tables[1:])):
        pq.write_table(pa.concat_tables(held), folder / "data" / "chunk-000" / f"{name}.parquet")
    return folder


def test_without_pyarrow_the_way_out_is_said(tmp_path, monkeypatch):
    for name in ("meta/info.json", "data/file.parquet"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"pip install gpu_ot\[lerobot\]", read_recording, tmp_path)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_labels_are_read_from_either_format(tmp_path, version):
    source, _ = sets()
    found = read_recording(write_dataset(tmp_path / "a", source, version), [STATE, "gripper"])
    for z, expected in zip(found.episodes(), source, strict=True):
        np.testing.assert_array_equal(z, np.column_stack((expected, expected[:, 0])))
    assert found.side.fps == 10 and found.side.lengths.tolist() == [40, 55, 33]


@pytest.mark.parametrize("info, key, words", [
    ({"total_frames": 5}, "gripper", ["total_frames = 5", "128", "finalize"]),
    ({"codebase_version": "v2.0"}, "gripper", ["v2.0", "Convert"]),
    ({}, "griper", ['"griper"', "observation.state, gripper, episode_index"]),
    ({}, "task", ['"task"', "string"]),
])  # fmt: skip
def test_datasets_that_cannot_be_read_say_why(tmp_path, info, key, words):
    folder = write_dataset(tmp_path / "a", sets()[0], **info)
    refused(words, read_recording, folder, [key])


def test_frames_that_are_not_numbers_or_missing_are_named(tmp_path):
    source, _ = sets()
    source[1][3, 2] = np.nan
    refused("NaN or infinity in 1 frames, first in episode 1", read_recording, write_dataset(tmp_path / "a", source))
    refused(r"no meta/info\.json", read_recording, tmp_path)
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a" / "data" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    refused(r"episode 0 of .* missing or twice around frame 1", read_recording, tmp_path / "a")


def test_the_command_pairs_two_folders(tmp_path, capsys):
    source, target = sets()
    src, tgt = write_dataset(tmp_path / "sim", source), write_dataset(tmp_path / "real", target)
    out = tmp_path / "out" / "pairs.npz"
    arguments = shlex.split("--slice 0 2 --zscore --center --stride 2 --band 20 --topk 2 --cost linf --norm arc")
    assert cli.main(["pair", "--src", str(src), "--tgt", str(tgt), "--out", str(out), *arguments]) == 0
    said = capsys.readouterr()
    assert "9/9 pairs" in said.err and f"wrote {out}" in said.out and "3 target episodes, each with 2 of 3" in said.out
    pairs = read_pairs(out)
    options = PairOptions(dim_slice=(0, 2), zscore=True, center=True, stride=2, band=20, topk=2, cost="linf", norm="arc")
    assert pairs.options == options
    again = pair_episodes(source, target, options)
    np.testing.assert_array_equal(pairs.first, again.first)
    np.testing.assert_array_equal(pairs.distance, again.distance)
    pairs.check(read_recording(src), read_recording(tgt))


def test_the_command_shows_strips_path_and_distances(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source, target = sets()
    src, tgt = write_dataset(tmp_path / "sim", source), write_dataset(tmp_path / "real", target)
    file = pair_episodes(read_recording(src), read_recording(tgt)).write(tmp_path / "pairs.npz")
    arguments = ["pairs", "show", str(file), "--src", str(src), "--tgt", str(tgt), "--out", str(tmp_path / "pairs.png")]
    assert cli.main(arguments) == 0 and "target episode" in capsys.readouterr().out
    assert (tmp_path / "pairs.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*arguments, "--episode", "9"]) == 2
    assert "target episode 9 has no pairs" in capsys.readouterr().err


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    for arguments, words in (
        (["--src", str(tmp_path)], "no meta/info.json"),
        (["--src", "x", "--out", str(tmp_path / "pairs.json")], "JSON is only read"),
        (["--src", "x", "--band", "0"], "band must be a finite number of at least 1"),
        (["--src", "x", "--slice", "3", "1"], "[3, 1]"),
    ):
        assert cli.main(["pair", "--tgt", "y", "--out", str(tmp_path / "p.npz"), *arguments]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out


def create(LeRobotDataset, name, root, episodes):
    features = {
        STATE: {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (1,), "names": ["u"]},
        TOP: {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channel"]},
    }
    data = LeRobotDataset.create(name, fps=10, features=features, root=root, use_videos=False)
    for z in episodes:
        for t, state in enumerate(z.astype(np.float32)):
            image = np.full((16, 16, 3), t, np.uint8)
            data.add_frame({STATE: state, "action": state[:1], TOP: image, "task": "pick"})
        data.save_episode()
    data.finalize()
    return LeRobotDataset(name, root=root)


@pytest.fixture(scope="module")
def real(lerobot, tmp_path_factory):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = tmp_path_factory.mktemp("lerobot")
    source, target = ([z[:20] for z in side] for side in sets())
    made = (create(LeRobotDataset, f"me/{name}", folder / name, episodes) for name, episodes in (("sim", source), ("real", target)))
    return LeRobotDataset, *made, folder


@pytest.mark.lerobot
def test_real_datasets_are_paired_and_drawn(real):
    _, source, target, folder = real
    out = folder / "pairs.npz"
    assert cli.main(["pair", "--src", str(source.root), "--tgt", str(target.root), "--out", str(out)]) == 0
    arguments = ["pairs", "show", str(out), "--src", str(source.root), "--tgt", str(target.root), "--out", str(folder / "pairs.png")]
    assert cli.main([*arguments, "--camera", TOP]) == 0 and (folder / "pairs.png").stat().st_size > 5000
    assert cli.main([*arguments, "--camera", "observation.images.wrist"]) == 2
    states = source.hf_dataset.with_format("numpy")[STATE][:]
    np.testing.assert_array_equal(read_recording(source.root).labels, states)

    data = LeRobotOTPairDataset(source, target, out)
    spawned = DrawLoader(data, 4, rank=0, world=1, num_workers=2, multiprocessing_context="spawn")
    here = DrawLoader(data, 4, rank=0, world=1)
    for _ in range(3):
        batch, expected = next(spawned), next(here)
        for one, other in ((batch[side]["obs"], expected[side]["obs"]) for side in ("src", "tgt")):
            assert torch.equal(one["index"], other["index"])
            assert torch.equal(one[TOP], other[TOP])
            assert torch.allclose(other[TOP].mean((1, 2, 3)), other["frame_index"].float() / 255)
            assert other["task"] == ["pick"] * 4


@pytest.mark.lerobot
def test_real_datasets_by_repo_id_in_part_with_history_and_transforms(real, monkeypatch):
    lerobot, source, target, folder = real
    monkeypatch.setenv("HF_LEROBOT_HOME", str(folder / "home"))
    (folder / "home" / "me").mkdir(parents=True)
    (folder / "home" / "me" / "sim").symlink_to(source.root)
    pairs = pair_episodes(read_recording("me/sim"), read_recording(target.root))
    options = dict(delta_timestamps={"action": [0, 0.1, 0.2]}, image_transforms=lambda image: image * 0 - 1)
    some = lerobot("me/sim", root=source.root, episodes=[0, 2], **options)
    data = LeRobotOTPairDataset(some, target, pairs)
    for n in range(20):
        item, drawn = data.item(n), data.draw(n)
        assert item["src"]["obs"]["episode_index"] == drawn.source_episode and drawn.source_episode in (0, 2)
        assert item["src"]["actions"].shape == item["src"]["obs"]["action_is_pad"].shape == (3,)
        assert all((side["obs"][TOP] == -1).all() for side in item.values())
    assert (some[0][TOP] == -1).all(), "the dataset that was given keeps its transforms"

    with pytest.raises(ProblemError, match="labels have other values"):
        LeRobotOTPairDataset(source, create(lerobot, "me/real", folder / "again", [z[:20] + 1 for z in sets()[1]]), pairs)


@pytest.mark.lerobot
def test_a_real_mixture_collates(real):
    _, source, target, _ = real
    pairs = pair_episodes(read_recording(source.root), read_recording(target.root), PairOptions(topk=1))
    batch = next(DrawLoader(co_training(source, target, pairs, MIX), 16, num_workers=2))
    assert batch[TOP].shape == (16, 3, 16, 16) and batch[STATE].shape == (16, 3)
