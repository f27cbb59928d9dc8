"""The alignment loss: the page's formula through POT, references by their closed forms, encoders found and refused, metrics, gradients."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
import types
import warnings

import numpy as np
import ot
import pytest
import torch
from torch import nn

from gpu_ot import Plan, ProblemError
from gpu_ot.lerobot import (
    CostScale,
    OTConfig,
    OTCostConfig,
    OTFeatureSpec,
    OTLossConfig,
    OTTermConfig,
    alarm,
    attach_ot,
    compute_ot_loss_from_terms,
    detach_ot,
    embed,
    floats,
    retrieval,
)
from gpu_ot.lerobot import compute_ot_loss_for_policy as aligned
from gpu_ot.lerobot.attach import CoTraining
from problems import refused

STATE, CAMERA = "observation.state", "observation.images.front"


class Policy(nn.Module):
    """Stands for a policy with encoders of its own."""

    name = "stub"

    def __init__(self, width: int = 6, dim: int = 5) -> None:
        super().__init__()
        self.state = nn.Linear(width, dim, dtype=torch.float64)
        self.camera = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64))
        self.seen: list[int] = []

    def encode_feature_for_ot(self, key, x):
        self.seen.append(len(x))
        return self.state(x) if key == STATE else self.camera(x).mean((-2, -1))

    def forward(self, batch):
        return self.state(batch[STATE]).square().mean(), {"l1_loss": 1.0}


@pytest.fixture
def observations():
    gen = torch.Generator().manual_seed(0)

    def draw(n):
        numbers = dict(generator=gen, dtype=torch.float64)
        return {STATE: torch.randn(n, 6, **numbers), CAMERA: torch.rand(n, 3, 8, 8, **numbers), "action": torch.randn(n, 4, 3, **numbers)}

    return draw


@pytest.fixture
def batch(observations):
    """What the policy imitates."""
    return {STATE: observations(4)[STATE]}


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return Policy()


def features(**changes):
    label = dict(src_key=STATE, dim_slice=[0, 4], weight_label=0.05, term_name="pose")
    image = dict(src_key=CAMERA, use_learned_embed=True, weight_embed=0.7, weight_label=0.0, term_weight=0.5)
    state = dict(src_key=STATE, use_learned_embed=True, weight_embed=0.3, weight_label=0.0, term_name="state")
    return OTLossConfig.from_dict(dict(features=[label, image, state], reg=0.1, tol=1e-12) | changes)


def one(reg=0.1, tol=1e-6, tau=None, **spec):
    """A single feature."""
    return OTLossConfig.from_dict(dict(features=[spec], reg=reg, tol=tol, tau_src=tau, tau_tgt=tau))


def is_pots(loss, M, *problem, rtol=1e-6, **options):
    """The loss is <P, M> with POT's plan P, which is returned."""
    P = pot_plan(M, *problem, **options)
    torch.testing.assert_close(loss, (P * M).sum(), rtol=rtol, atol=0)
    return P


def by_hand(policy, src, tgt):
    """M of `features`, from its definition."""
    z = policy.camera(torch.cat((src[CAMERA], tgt[CAMERA]))).mean((-2, -1))
    n = len(src[STATE])

    def squares(x, y):
        return (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)

    pose = 0.05 * squares(src[STATE][:, :4], tgt[STATE][:, :4])
    image = 0.7 * squares(z[:n], z[n:])
    state = 0.3 * squares(policy.state(src[STATE]), policy.state(tgt[STATE]))
    return pose + 0.5 * image + state


def pot_plan(M, reg, taus, c=None, sizes=None):
    M = M.detach().numpy()
    a, b = (np.full(size, 1 / of) for size, of in zip(M.shape, sizes or M.shape, strict=True))
    taus = tuple(math.inf if tau is None else tau for tau in taus)
    if taus == (math.inf, math.inf) and c is None:
        return torch.from_numpy(ot.sinkhorn(a, b, M, reg, stopThr=1e-15, numItermax=100_000, method="sinkhorn_log"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = ot.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, reg, taus, c=c, stopThr=1e-16, numItermax=100_000)
    return torch.from_numpy(plan)


@pytest.mark.parametrize("reference", ["product", "diagonal"])
@pytest.mark.parametrize("tau", [None, 0.05, 5.0, math.inf])
def test_the_loss_is_the_papers_through_pot(policy, observations, reference, tau):
    src, tgt = observations(17), observations(17)
    cfg = features(reference=reference, tau_src=tau, tau_tgt=tau)
    loss, metrics = aligned(policy, src, tgt, cfg)
    M = by_hand(policy, src, tgt)
    held = tau is None or math.isinf(tau)
    n = len(M)
    P = torch.eye(n).double() / n if held and reference == "diagonal" else pot_plan(
        M, 0.1, (tau, tau), None if reference == "product" else np.eye(n) / n
    )  # fmt: skip
    expected = (P * M).sum()
    assert abs(loss - expected) <= 1e-6 * abs(expected)
    assert abs(metrics["ot_pi_sum"] - P.sum()) <= 1e-6 * P.sum()
    assert abs(metrics["ot_pi_diag"] - P.trace()) <= 1e-6 * P.sum()
    if reference == "diagonal" and not held:  # and the closed form is what POT returns
        torch.testing.assert_close(P.diag(), (-M.diag() / (0.1 + 2 * tau)).exp().detach() / n, atol=1e-7 / n, rtol=1e-6)
    parameters = list(policy.parameters())
    ours, theirs = (torch.autograd.grad(z, parameters, allow_unused=True) for z in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_one_sided_relaxation_and_rectangles_in_one_call_of_the_encoder(policy, observations):
    src, tgt = observations(13), observations(9)
    loss, metrics = aligned(policy, src, tgt, features(tau_src=0.2))
    assert policy.seen == [22, 22]  # both sides in one call of the encoder
    is_pots(loss, by_hand(policy, src, tgt), 0.1, (0.2, None))
    assert "ot_pi_diag" not in metrics
    refused("13 source and 9 target rows", aligned, policy, src, tgt, features(reference="diagonal"))


@pytest.mark.parametrize("reference, measure", [
    ("soft_diagonal(0.3)", lambda n: 0.7 * np.eye(n) / n + 0.3 / n**2),
    ("band(2)", lambda n: np.triu(np.tril(np.ones((n, n)), 2), -2) / (np.triu(np.tril(np.ones((n, n)), 2), -2)).sum()),
])  # fmt: skip
def test_references_are_pots_measure_c(policy, observations, reference, measure):
    src, tgt = observations(11), observations(11)
    loss, _ = aligned(policy, src, tgt, features(reference=reference, tau_src=0.5, tau_tgt=0.8))
    is_pots(loss, by_hand(policy, src, tgt), 0.1, (0.5, 0.8), measure(11))


def test_a_reference_of_ones_own_may_leave_rows_out(policy, observations):
    src, tgt = observations(6), observations(5)
    r = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    r[2], r[:, 3], r[0, 0] = 0, 0, 0
    loss, metrics = aligned(policy, src, tgt, features(tau_src=0.5, tau_tgt=0.5), reference=r)
    M, kept = (z[[0, 1, 3, 4, 5]][:, [0, 1, 2, 4]] for z in (by_hand(policy, src, tgt), r))
    P = is_pots(loss, M, 0.1, (0.5, 0.5), kept.numpy(), sizes=(6, 5))
    assert abs(metrics["ot_pi_sum"] - P.sum()) <= 1e-6
    refused("a row of the reference is 0 throughout", aligned, policy, src, tgt, features(), reference=r)
    refused(r"of shape \(6, 5\)", aligned, policy, src, tgt, features(tau_src=1), reference=r[:4])


def test_streamed_or_stored_the_loss_is_one(policy, observations):
    src, tgt = observations(40), observations(30)
    found = []
    for backend in ("dense", "chunked"):
        loss, metrics = aligned(policy, src, tgt, features(backend=backend, tau_src=1.0, tau_tgt=2.0))
        found.append((loss.item(), *torch.autograd.grad(loss, list(policy.state.parameters())), *metrics.values()))
    for dense, chunked in zip(*found, strict=True):
        torch.testing.assert_close(dense, chunked, rtol=1e-9, atol=1e-12)


def test_costs_of_the_callers_give_the_same_loss(policy, observations):
    src, tgt = observations(12), observations(12)
    M = by_hand(policy, src, tgt)
    cfg = OTCostConfig.from_dict(dict(terms=[dict(name="a", weight=0.25), {"name": "b"}], reg=0.1, tau_src=1, tau_tgt=1, tol=1e-12))
    loss, metrics = compute_ot_loss_from_terms({"a": M, "b": 0.75 * M}, cfg)
    other, theirs = aligned(policy, src, tgt, features(tau_src=1, tau_tgt=1))
    torch.testing.assert_close(loss, other, rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["ot_share/a"].item(), 0.25)
    torch.testing.assert_close(metrics["ot_moved/a"] + metrics["ot_moved/b"], theirs["ot_loss"], rtol=1e-9, atol=0)
    refused('no "b"; it has a', compute_ot_loss_from_terms, {"a": M}, cfg)
    refused(r'"b" has shape \(12, 11\)', compute_ot_loss_from_terms, {"a": M, "b": M[:, :11]}, cfg)


def test_metrics_add_up(policy, observations):
    src, tgt = observations(20), observations(20)
    metrics = aligned(policy, src, tgt, features(tau_src=1.0, tau_tgt=1.0))[1]
    assert all(z.ndim == 0 and not z.requires_grad for z in metrics.values())  # nothing on the host yet
    m = floats(metrics)
    terms = ("pose", CAMERA, "state")
    assert math.isclose(sum(m[f"ot_moved/{name}"] for name in terms), m["ot_loss"], rel_tol=1e-9)
    assert math.isclose(sum(m[f"ot_share/{name}"] for name in terms), 1.0, rel_tol=1e-9)
    mean = m["ot_cost/pose"] + 0.5 * m[f"ot_cost/{CAMERA}"] + m["ot_cost/state"]
    assert math.isclose(mean, by_hand(policy, src, tgt).mean().item(), rel_tol=1e-9)
    assert math.isclose(m["ot_diag_ratio"], m["ot_pi_diag"] / m["ot_pi_sum"], rel_tol=1e-12)
    assert 0 <= m["ot_plan_entropy"] <= 1 and m["ot_iters"] > 1 and m["ot_marginal_error"] < 1e-9
    assert aligned(policy, src, tgt, features(tau_src=1.0, tau_tgt=1.0), metrics=False)[1] == {}


@pytest.mark.parametrize("reference", ["product", "soft_diagonal(0.3)"])
def test_steps_without_metrics_take_no_passes_for_them(policy, observations, monkeypatch, reference):
    def refuse(*_):
        raise AssertionError("a pass over the pairs that only metrics want")

    src, tgt, cfg = observations(9), observations(9), features(tau_src=1.0, tau_tgt=1.0, reference=reference)
    with monkeypatch.context() as patched:
        patched.setattr(Plan, "_apply", refuse)
        patched.setattr(Plan, "diagonal", refuse)
        bare, _ = aligned(policy, src, tgt, cfg, metrics=False)
    torch.testing.assert_close(bare, aligned(policy, src, tgt, cfg)[0], rtol=1e-12, atol=0)


def test_far_off_centre_features_keep_their_digits(observations):
    src, tgt = observations(20), observations(20)
    cfg = one(0.5, tau=5.0, src_key=STATE)
    truth, exact = aligned(nn.Linear(1, 1), src, tgt, cfg)
    far = [{STATE: (z[STATE] + 1000).float()} for z in (src, tgt)]
    loss, metrics = aligned(nn.Linear(1, 1), *far, cfg)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-3, atol=0)  # half a float32 digit of 1000 in distances of about 3
    torch.testing.assert_close(metrics[f"ot_moved/{STATE}"].double(), exact[f"ot_moved/{STATE}"], rtol=2e-3, atol=0)


def test_halves_are_compared_in_float32(policy, observations):
    src, tgt = ({STATE: z[STATE].bfloat16()} for z in (observations(16), observations(16)))
    cfg = one(tau=1.0, src_key=STATE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = aligned(policy, src, tgt, cfg)
    exact, _ = aligned(policy, {STATE: src[STATE].double()}, {STATE: tgt[STATE].double()}, cfg)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_a_collapsed_plan_is_named(policy, observations):
    src, tgt = observations(16), observations(16)
    cfg = features(reg=1e-3, tau_src=1e-3, tau_tgt=1e-3)
    metrics = floats(aligned(policy, src, tgt, cfg)[1])
    said = alarm(metrics, cfg)
    assert said is not None and "the OT loss is off" in said and "cost_scale: mean" in said
    heaviest = max(("pose", CAMERA, "state"), key=lambda name: metrics[f"ot_share/{name}"])
    assert f'"{heaviest}" makes' in said
    scaled = features(reg=0.05, tau_src=1.0, tau_tgt=1.0, cost_scale="mean")
    metrics = floats(aligned(policy, src, tgt, scaled)[1])
    assert alarm(metrics, scaled) is None and metrics["ot_pi_sum"] > 0.3


@pytest.mark.parametrize("kind", ["mean", "median", "quantile(0.9)"])
def test_cost_scale_is_a_running_average_without_gradient(policy, observations, kind):
    batches = [(observations(15), observations(15)) for _ in range(3)]
    scale, cfg = CostScale(), features(cost_scale=kind, momentum=0.5, tau_src=1.0, tau_tgt=1.0)
    expected = None
    for src, tgt in batches:
        loss, _ = aligned(policy, src, tgt, cfg, scale=scale)
        M = by_hand(policy, src, tgt).detach().flatten()
        now = M.mean() if kind == "mean" else M.median() if kind == "median" else M.kthvalue(math.ceil(0.9 * len(M))).values
        expected = now if expected is None else 0.5 * expected + 0.5 * now
        torch.testing.assert_close(scale.value, expected, rtol=1e-9, atol=0)
    is_pots(loss, by_hand(policy, *batches[-1]) / expected, 0.1, (1.0, 1.0))
    again = CostScale()
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert torch.equal(again.value, scale.value)


def test_relative_reg_follows_the_costs(policy, observations):
    src, tgt = observations(15), observations(15)
    M = by_hand(policy, src, tgt).detach()
    relative, _ = aligned(policy, src, tgt, features(reg=["std", 0.2]))
    absolute, _ = aligned(policy, src, tgt, features(reg=0.2 * M.std(correction=0).item()))
    torch.testing.assert_close(relative, absolute, rtol=1e-8, atol=0)


def test_cosine_embeddings_fold(policy, observations):
    src, tgt = observations(10), observations(10)
    cfg = one(0.1, 1e-12, src_key=STATE, use_learned_embed=True, weight_embed=0.8, weight_label=0, embed_cost="cosine")
    loss, _ = aligned(policy, src, tgt, cfg)
    M = 0.8 * (1 - nn.functional.cosine_similarity(policy.state(src[STATE]).unsqueeze(1), policy.state(tgt[STATE]).unsqueeze(0), dim=-1))
    is_pots(loss, M, 0.1, (None, None), rtol=1e-7)


def test_labels_carry_no_gradient(observations):
    src, tgt = observations(8), observations(8)
    src[STATE].requires_grad_()
    loss, _ = aligned(nn.Linear(1, 1), src, tgt, one(src_key=STATE))
    assert not loss.requires_grad
    rest = dict(reg=0.5, reg_m=1.0, tol=1e-12)
    label, loose = OTFeatureSpec(STATE), OTFeatureSpec(STATE, detach_label=False)
    M = (src[STATE].unsqueeze(1) - tgt[STATE].unsqueeze(0)).square().sum(-1)
    expected = torch.autograd.grad((pot_plan(M, 0.5, (1.0, 1.0)) * M).sum(), src[STATE])[0]
    for cfg in (OTLossConfig([label], detach_label=False, **rest), OTLossConfig([loose], **rest)):
        loss, _ = aligned(nn.Linear(1, 1), src, tgt, cfg)
        torch.testing.assert_close(torch.autograd.grad(loss, src[STATE])[0], expected)


def test_action_chunks(observations):
    src, tgt = observations(8), observations(8)
    padded = torch.zeros(8, 4, dtype=torch.bool)
    padded[3, 2:], padded[5, :1] = True, True  # after the episode's end, and before its start
    src["action_is_pad"] = padded
    frames = src["action"].clone()
    frames[3, 2:], frames[5, :1] = frames[3, 1], frames[5, 1]
    for time, x in (("first", frames[:, 0]), ("last", frames[:, -1]), ("flatten", frames.flatten(1)), (None, frames[:, 0])):
        y = tgt["action"]
        y = {"first": y[:, 0], "last": y[:, -1], "flatten": y.flatten(1), None: y[:, 0]}[time]
        loss, _ = aligned(nn.Linear(1, 1), src, tgt, one(0.5, 1e-12, src_key="action", time=time))
        plain = one(0.5, 1e-12, src_key="observation.z")
        expected, _ = aligned(nn.Linear(1, 1), {"observation.z": x}, {"observation.z": y}, plain)
        torch.testing.assert_close(loss, expected)


def test_the_frame_that_is_now(observations):
    """A policy that sees frames -1 and 0 has its label in the last; one that sees 0, 1, 2, as TDMPC does, in the first."""
    frames = [torch.randn(6, 3, 4, dtype=torch.float64) for _ in "st"]
    policy, cfg = nn.Linear(1, 1), one(0.5, 1e-12, src_key=STATE)
    for offsets, k in (([-2, -1, 0], 2), ([0, 1, 2], 0), ([-1, 0, 1], 1), (None, 2)):
        policy.config = types.SimpleNamespace(observation_delta_indices=offsets)
        loss, _ = aligned(policy, *({STATE: z} for z in frames), cfg)
        expected, _ = aligned(policy, *({STATE: z[:, k]} for z in frames), cfg)
        torch.testing.assert_close(loss, expected)


def test_the_contract_is_kept_to_the_letter():
    spec = OTFeatureSpec(
        src_key="observation.state", tgt_key="observation.state", dim_slice=slice(0, 8), use_learned_embed=True,
        embed_name="joints+gripper", weight_embed=1.0, weight_label=1.0,
    )  # fmt: skip
    for ends in ([0, 8], (0, 8), {"start": 0, "stop": 8}):
        assert spec == OTFeatureSpec(STATE, STATE, ends, True, "joints+gripper", 1.0, 1.0)
    assert OTFeatureSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec and OTFeatureSpec("a").dim_slice is None
    assert spec.name == STATE and OTFeatureSpec(STATE, dim_slice=slice(3, None)).name == STATE
    loss, cost = OTLossConfig([spec], 0.1), OTCostConfig([OTTermConfig("a", 2.0)], 0.2)
    assert (loss.features, loss.reg) == ([spec], 0.1) and (cost.terms[0].name, cost.terms[0].weight, cost.reg) == ("a", 2.0, 0.2)
    for given in (dict(reg_m=0.5), dict(reg_m=(0.5, 0.5)), dict(tau1=0.5, tau2=0.5), dict(tau_src=0.5, tau2=0.5)):
        assert OTLossConfig.from_dict(given).taus == OTCostConfig(**given).taus == (0.5, 0.5)
    assert OTLossConfig(reg_m=math.inf).taus == OTLossConfig(reg_m=[math.inf, None]).taus == (math.inf, math.inf)
    refused('two terms are called "a"', OTCostConfig, [OTTermConfig("a"), OTTermConfig("a")])


def test_terms_of_one_name_are_told_apart(policy, observations):
    src, tgt = observations(6), observations(6)
    specs = [OTFeatureSpec(STATE), OTFeatureSpec(STATE, dim_slice=slice(0, 2)), OTFeatureSpec("action", term_name=STATE)]
    metrics = aligned(policy, src, tgt, OTLossConfig(specs, 0.5))[1]
    assert {name for name in metrics if name.startswith("ot_cost/")} == {f"ot_cost/{STATE}{end}" for end in ("", "_2", "_3")}
    assert {"ot_loss", "ot_pi_sum", "ot_pi_diag"} <= set(metrics)


def test_a_method_that_gives_none_hands_on(policy, observations):
    """To the path of the configuration, then to what is known of the policy, then to an error."""
    src, tgt = observations(5), observations(5)
    given = one(src_key=STATE, use_learned_embed=True, weight_label=0)
    expected = aligned(policy, src, tgt, given)[0]
    policy.encode_feature_for_ot = lambda key, x: None
    path = one(src_key=STATE, use_learned_embed=True, weight_label=0, embed_path="state")
    torch.testing.assert_close(aligned(policy, src, tgt, path)[0], expected)
    refused("how stub embeds an observation is not known", aligned, policy, src, tgt, given)
    policy.name, policy.model = "act", module(encoder_robot_state_input_proj=policy.state)
    torch.testing.assert_close(aligned(policy, src, tgt, given)[0], expected)


def test_arrays_bytes_and_sides_of_a_batch_are_observations(policy, observations):
    src, tgt = observations(5), observations(5)
    for obs in (src, tgt):
        obs[CAMERA] = (255 * obs[CAMERA]).to(torch.uint8)
    cfg = features(tau_src=1.0)
    loss = aligned(policy, src, tgt, cfg)[0]
    as_floats = [obs | {CAMERA: obs[CAMERA].double() / 255} for obs in (src, tgt)]
    torch.testing.assert_close(loss, aligned(policy, *as_floats, cfg)[0])
    arrays = [{key: z.numpy() for key, z in obs.items()} for obs in (src, tgt)]
    torch.testing.assert_close(loss, aligned(policy, *arrays, cfg)[0])
    small = copy.deepcopy(policy).float()  # numpy's numbers are float64
    torch.testing.assert_close(aligned(small, *arrays, cfg)[0], loss, rtol=1e-4, atol=0)
    sides = ({"obs": {k: z for k, z in obs.items() if k != "action"}, "actions": obs["action"]} for obs in (src, tgt))
    cfg.features.append(OTFeatureSpec("action"))
    torch.testing.assert_close(aligned(policy, *sides, cfg)[0], aligned(policy, src, tgt, cfg)[0])
    with pytest.raises(ProblemError, match=f"every feature of the source needs as many rows, found 5 of {STATE}, 4 of {CAMERA}"):
        aligned(policy, src | {CAMERA: src[CAMERA][:4]}, tgt, cfg)


def test_a_wildcard_is_every_camera(policy, observations):
    src, tgt = observations(6), observations(6)
    for obs in (src, tgt):
        obs["observation.images.wrist"] = obs[CAMERA].flip(-1)
    for key in ("observation.images.*", "observation.images"):
        cfg = one(src_key=key, use_learned_embed=True, weight_label=0, term_name="img")
        metrics = aligned(policy, src, tgt, cfg)[1]
        assert {name for name in metrics if name.startswith("ot_cost")} == {"ot_cost/img/front", "ot_cost/img/wrist"}
    # A camera with a feature of its own is not counted twice; without a name, terms are called as their keys are.
    every = OTFeatureSpec("observation.images.*", use_learned_embed=True, weight_label=0)
    specs = [every, OTFeatureSpec(CAMERA, None, None, True, None, 5.0, 0)]
    metrics = aligned(policy, src, tgt, OTLossConfig(specs, 0.1))[1]
    assert {name for name in metrics if name.startswith("ot_cost")} == {f"ot_cost/{CAMERA}", "ot_cost/observation.images.wrist"}
    with pytest.raises(ProblemError, match=r'"observation.depth.\*" stands for nothing in the source, which has action, .*front, .*wrist'):
        aligned(policy, src, tgt, one(src_key="observation.depth.*"))
    del tgt["observation.images.wrist"]
    refused(r"the same features on both sides: the source has .*wrist", aligned, policy, src, tgt, cfg)


@pytest.mark.parametrize("spec, said", [
    (dict(src_key="observation.pose"), 'the source has no "observation.pose"; it has action, observation.images.front, observation.state'),
    (dict(src_key=STATE, dim_slice=[0, 8]), r"dim_slice \[0, 8\] .* has 6 numbers"),
    (dict(src_key=STATE, dim_slice=[3, 3]), r"outside"),
    (dict(src_key=CAMERA, dim_slice=[0, 2], weight_label=1.0), "holds images"),
    (dict(src_key=STATE, tgt_key="action"), "6 numbers in the source and 3 in the target"),
])  # fmt: skip
def test_a_feature_that_does_not_fit_says_so(policy, observations, spec, said):
    refused(said, aligned, policy, observations(4), observations(4), one(**spec))


def test_an_embedding_without_a_gradient_is_refused(policy, observations):
    spec = dict(src_key=STATE, use_learned_embed=True, weight_label=0)
    for parameter in policy.state.parameters():
        parameter.requires_grad_(False)
    refused("carries no gradient", aligned, policy, observations(4), observations(4), one(**spec))
    with torch.no_grad():  # where nobody asks for one, it may be evaluated
        assert aligned(policy, observations(4), observations(4), one(**spec))[0] > 0


def test_an_encoders_own_errors_surface(policy, observations):
    policy.encode_feature_for_ot = lambda key, x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        aligned(policy, observations(4), observations(4), one(src_key=STATE, use_learned_embed=True))
    policy.encode_feature_for_ot = lambda key, x: x[:2]
    refused("8 rows", aligned, policy, observations(4), observations(4), one(src_key=STATE, use_learned_embed=True))


@pytest.mark.parametrize("reference", ["product", "diagonal"])
def test_nan_is_traced_to_its_term(policy, observations, reference):
    src, tgt = observations(5), observations(5)
    src[CAMERA][2, 0, 0, 0] = torch.nan
    refused(f'the term "{CAMERA}" holds NaN', aligned, policy, src, tgt, features(tau_src=1.0, reference=reference))


def test_unequal_batches_of_ranks_are_refused(policy, observations, monkeypatch):
    def all_gather(parts, mine):
        for rank, part in enumerate(parts):
            part.copy_(mine + rank)

    for name, stand_in in (("is_initialized", lambda: True), ("get_world_size", lambda: 2), ("all_gather", all_gather)):
        monkeypatch.setattr(torch.distributed, name, stand_in)
    with pytest.raises(ProblemError, match=r"rows \(5, 4\), \(6, 5\): .*drop_last"):
        aligned(policy, observations(5), observations(4), features(tau_src=1.0), gather=True)


def pairs(observations, n=6):
    return [(observations(n), observations(n)) for _ in range(3)]


def co_config(**changes):
    return OTConfig.from_dict(dict(lambda_ot=0.5, loss_config=features(tau_src=1.0, tau_tgt=1.0).to_dict()) | changes)


def test_attached_and_detached(policy, observations, batch):
    loader = pairs(observations)
    before, cls = policy.forward(batch)[0], type(policy)
    keys = set(policy.state_dict())
    training = attach_ot(policy, loader, co_config(), log_every=2)
    assert isinstance(policy, cls) and type(policy).__name__ == "Policy" and set(policy.state_dict()) == keys
    expected = [0.5 * aligned(policy, *pair, co_config().loss_config)[0] for pair in (*loader, loader[0])]
    for k, weighted in enumerate(expected):
        loss, info = policy.forward(batch)
        torch.testing.assert_close(loss, before + weighted)
        assert ("ot_loss" in info) == (k % 2 == 1) and info["l1_loss"] == 1.0
        assert all(isinstance(value, float) for value in info.values())
    assert training.step == 4
    policy.eval()
    torch.testing.assert_close(policy.forward(batch)[0], before)
    policy.train()
    with torch.no_grad():
        torch.testing.assert_close(policy.forward(batch)[0], before)
    twin = copy.deepcopy(policy)
    torch.testing.assert_close(twin.forward(batch)[0], before)  # a copy is not co-trained
    refused("co-trained already", attach_ot, policy, loader, co_config())
    assert type(detach_ot(policy)) is cls
    torch.testing.assert_close(policy.forward(batch)[0], before)


def test_a_policy_inside_something_is_reached(policy, observations, batch):
    """torch.compile and DistributedDataParallel train with the alignment, and are asked for embeddings through it."""
    pair, *_ = pairs(observations)
    bare = policy.forward(batch)[0] + 0.5 * aligned(policy, *pair, co_config().loss_config)[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (lambda p: torch.compile(p, backend="eager"), nn.parallel.DistributedDataParallel):
            wrapped = wrap(policy)
            torch.testing.assert_close(*(aligned(p, *pair, co_config().loss_config)[0] for p in (wrapped, policy)))
            training = attach_ot(wrapped, [pair], co_config(), log_every=1)
            loss, info = wrapped(batch)
            torch.testing.assert_close(loss, bare)
            assert training.step == 1 and info["ot_loss"] > 0
            assert detach_ot(wrapped) is wrapped and type(policy) is Policy
    finally:
        torch.distributed.destroy_process_group()


def test_without_weight_nothing_is_done(policy, observations, batch):
    def never(start):
        raise AssertionError("a pair is asked for")
        yield

    training = attach_ot(policy, never, co_config(lambda_ot=0.0, plan_every=1, grad_norms_every=1), log_every=1, out_dir="nowhere")
    policy.seen.clear()
    loss, info = policy.forward(batch)
    torch.testing.assert_close(loss, policy.state(batch[STATE]).square().mean())
    assert info == {"l1_loss": 1.0} and training.step == 1 and not policy.seen


def test_what_is_saved_is_the_plain_policy(policy, observations, tmp_path, batch):
    before = policy.forward(batch)[0]
    attach_ot(policy, iter(pairs(observations)), co_config())
    torch.save(policy, tmp_path / "policy.pt")
    for again in (torch.load(tmp_path / "policy.pt", weights_only=False), pickle.loads(pickle.dumps(policy)), copy.copy(policy)):
        assert type(again) is Policy and not hasattr(again, "_co_training")
        torch.testing.assert_close(again.forward(batch)[0], before)
    assert policy.forward(batch)[0] > before


def test_a_policy_may_return_its_loss_alone(observations, batch):
    class Bare(Policy):
        def forward(self, batch):
            return super().forward(batch)[0]

    policy, pair = Bare(), (observations(6), observations(6))
    before, weighted = policy.forward(batch), 0.5 * aligned(policy, *pair, co_config().loss_config)[0]
    training = attach_ot(policy, [dict(zip(("src", "tgt"), pair, strict=True))], co_config(), log_every=1)
    torch.testing.assert_close(policy.forward(batch), before + weighted)
    assert math.isclose(training.last["ot_loss_weighted"], weighted.item(), rel_tol=1e-9) and training.last["lambda_ot"] == 0.5
    refused(r"must return \(loss, info\) or the loss while it trains, found dict", training.add_to, policy, {"loss": before})


def test_the_log_names_the_loss_for_what_it_is(policy, observations, caplog, batch):
    attach_ot(policy, pairs(observations), co_config(warmup_steps=4), log_every=1)
    with caplog.at_level("INFO"):
        policy.forward(batch)
    said = caplog.messages[-1]
    assert all(f" {name}:" in said for name in ("ot_loss", "ot_pi_sum", "ot_pi_diag", "ot_cost/pose", "ot_loss_weighted"))
    assert " lambda_ot:0.125 " in f"{said} " and " loss:" not in said
    cfg = co_config(warmup_steps=4, lambda_ot=0.2)
    torch.testing.assert_close([cfg.weight_at(step) for step in (0, 1, 3, 100)], [0.05, 0.1, 0.2, 0.2])


def test_nan_between_the_steps_that_are_logged_is_named_at_once(policy, observations, batch):
    pair = (observations(5), observations(5))
    cfg = co_config(loss_config=features(reference="diagonal", tau_src=1.0, tau_tgt=1.0).to_dict())
    attach_ot(policy, [pair], cfg, log_every=1000)
    policy.forward(batch)
    pair[1][CAMERA][2, 0, 0, 0] = torch.nan
    refused(f'the term "{CAMERA}" holds NaN', policy.forward, batch)


def test_retrieval_is_the_share_of_partners_that_are_nearest(policy, observations, batch):
    """In evaluation mode, in the embedding alone, and every so many steps."""
    src = observations(12)
    tgt = {key: z + 1e-3 * torch.randn(z.shape, dtype=z.dtype) for key, z in src.items()}
    cfg = features(tau_src=1.0, tau_tgt=1.0)
    assert retrieval(policy, src, tgt, cfg) == {"ot_retrieval_top1": 1.0} and policy.camera.training
    tgt = {key: torch.cat((z[:9], z[9:].roll(1, 0))) for key, z in tgt.items()}
    tgt[STATE][:, :4] += 0  # the label is not asked
    assert retrieval(policy, src, tgt, cfg) == {"ot_retrieval_top1": 0.75}
    attach_ot(policy, pairs(observations), co_config(retrieval_every=2), log_every=0, held_out=lambda: (src, tgt))
    infos = [policy.forward(batch)[1] for _ in range(4)]
    assert [info.get("ot_retrieval_top1") for info in infos] == [None, 0.75, None, 0.75]
    refused("pass held_out", CoTraining, co_config(retrieval_every=2), [])
    refused("no feature is embedded", CoTraining, OTConfig(retrieval_every=2, loss_config=one(src_key=STATE)), [], held_out=(src, tgt))


def test_resuming_goes_on_with_the_next_pair(policy, observations, batch):
    loader = pairs(observations)
    cfg = co_config()
    cfg.loss_config.cost_scale = "mean"

    def begin(start):
        return (loader[k % 3] for k in range(start, 5))

    training = attach_ot(policy, begin, cfg)
    straight = [policy.forward(batch)[0].item() for _ in range(5)]
    detach_ot(policy)
    training = attach_ot(policy, begin, cfg)
    for _ in range(2):
        policy.forward(batch)
    state = json.loads(json.dumps(training.state_dict()))
    detach_ot(policy)
    attach_ot(policy, begin, cfg).load_state_dict(state)
    assert [policy.forward(batch)[0].item() for _ in range(3)] == straight[2:]


def test_gradient_norms_on_request(policy, observations, batch):
    pair = (observations(6), observations(6))
    attach_ot(policy, [pair], co_config(grad_norms_every=1), log_every=1000)
    loss, info = policy.forward(batch)
    detach_ot(policy)
    ot_loss = 0.5 * aligned(policy, *pair, co_config().loss_config)[0]
    ot_pull = torch.autograd.grad(ot_loss, list(policy.parameters()))
    bc_pull = torch.autograd.grad(policy.forward(batch)[0], list(policy.state.parameters()))
    norms = [torch.cat([g.flatten() for g in found]).norm().item() for found in (ot_pull, bc_pull)]
    assert math.isclose(info["ot_grad_norm"], norms[0], rel_tol=1e-9) and math.isclose(info["bc_grad_norm"], norms[1], rel_tol=1e-9)
    assert math.isclose(info["ot_grad_ratio"], norms[0] / norms[1], rel_tol=1e-9)
    loss.backward()  # the graph is still whole


def test_plans_are_drawn_and_shown_where_wandb_runs(policy, observations, tmp_path, monkeypatch, batch):
    pytest.importorskip("matplotlib")
    shown = []
    run = types.SimpleNamespace(run=object(), Image=lambda path: path, log=lambda data, step: shown.append((data, step)))
    monkeypatch.setitem(sys.modules, "wandb", run)
    attach_ot(policy, pairs(observations), co_config(plan_every=2), out_dir=tmp_path)
    for _ in range(4):
        policy.forward(batch)
    drawn = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in drawn] == ["000002.png", "000004.png"] and all(path.stat().st_size > 5000 for path in drawn)
    assert shown == [({"train/ot_plan": str(tmp_path / "ot_plans" / f"00000{step}.png")}, step) for step in (2, 4)]


def test_pairs_that_are_none_or_do_not_begin_anew(policy, observations, batch):
    refused("no features", CoTraining, OTConfig(), [])
    attach_ot(policy, [], co_config())
    refused("there are no pairs", policy.forward, batch)
    attach_ot(detach_ot(policy), iter(pairs(observations)), co_config())
    for _ in range(3):
        policy.forward(batch)
    refused("do not begin anew", policy.forward, batch)


def test_a_feature_that_the_preprocessor_drops_is_named(policy, observations, batch):
    def lerobots(batch):
        return {key: z for key, z in batch.items() if key == "action" or key.startswith("observation.")}

    batches = [tuple({**side, "eef_pose": side[STATE]} for side in pair) for pair in pairs(observations)]
    label = dict(src_key="eef_pose", term_name="label")
    loss = dict(features=[*features().to_dict()["features"], label], tau_src=1.0, tau_tgt=1.0)
    attach_ot(policy, batches, OTConfig.from_dict(dict(loss_config=loss)), lerobots)
    refused('"eef_pose" does not come out of the preprocessor', policy.forward, batch)


def test_the_whole_observation_goes_to_ones_own_encoder_as_it_is(policy, observations):
    class Whole(Policy):
        def encode_feature_for_ot(self, key, x):
            return self.state(x[STATE]) + 0 * self.camera(x[CAMERA]).mean()

    whole, src, tgt = Whole(), observations(5), observations(7)
    loss, _ = aligned(whole, src, tgt, one(src_key="observation", use_learned_embed=True, weight_label=0))
    whole.encode_feature_for_ot = lambda key, x: whole.state(x)
    expected, _ = aligned(whole, src, tgt, one(src_key=STATE, use_learned_embed=True, weight_label=0))
    torch.testing.assert_close(loss, expected)
    for option in (dict(dim_slice=[0, 4]), dict(embed_path="state")):
        with pytest.raises(ProblemError, match="leave dim_slice and embed_path"):
            aligned(whole, src, tgt, one(src_key="observation", use_learned_embed=True, weight_label=0, **option))


@pytest.mark.parametrize("missing, option, said", [
    ("matplotlib.figure", dict(plan_every=500), "pip install matplotlib"),
    ("torch.utils.tensorboard", dict(tensorboard_dir="runs"), "pip install tensorboard"),
    (None, dict(plan_every=500), "out_dir"),
])  # fmt: skip
def test_what_reports_need_is_asked_for_before_the_first_step(policy, observations, monkeypatch, tmp_path, missing, option, said):
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    out = tmp_path if missing is not None else None
    refused(said, attach_ot, policy, pairs(observations), co_config(**option), out_dir=out)
    detach_ot(policy)
    attach_ot(policy, pairs(observations), co_config(**option), out_dir=out, main=False)  # which reports nothing


def test_the_forks_training_file_reads_unchanged(tmp_path):
    camera = dict(use_learned_embed=True, weight_embed=0.3333, weight_label=0.0)
    specs = [
        dict(src_key=f"observation.images.{name}", tgt_key=f"observation.images.{name}", term_name=name, **camera) for name in ("a", "b")
    ]
    specs.append(dict(src_key="action", tgt_key="action", dim_slice=[0, 8], use_learned_embed=False, embed_name=None,
                      weight_embed=0.0, weight_label=0.02, term_name="action_lbl"))  # fmt: skip
    given = dict(
        dataset=dict(repo_id="real"), steps=20000,
        ot=dict(enable=True, src_repo_id="sim", src_root="/data/sim", pair_info_path="pairs.json", batch_ratio=0.5, bc_src_weight=0.8,
                normalize_bc_weights_by_ds_size=True, lambda_ot=0.1, obs_keys=["observation.images.a"], base_index_src=0, base_index_tgt=0,
                window_size=10, sharpness=0.5, topk_src_episodes=None, no_window=False,
                loss_config=dict(features=specs, reg=0.1, tau_src=0.5, tau_tgt=0.5, heuristic=True)),
    )  # fmt: skip
    (path := tmp_path / "act_ot.json").write_text(json.dumps(given))
    cfg = OTConfig.from_file(path)
    assert cfg.window_size == 10 and cfg.loss_config.reference == "diagonal" and cfg.loss_config.features[2].weight_label == 0.02
    assert cfg.pairs_of(8) == 4 and cfg.cutoff is None
    assert OTLossConfig.from_file(path) == cfg.loss_config
    assert OTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize("given, said", [
    (dict(windw_size=3), 'no key "windw_size": did you mean "window_size"'),
    (dict(loss_config=dict(tau_scr=1)), 'OTLossConfig has no key "tau_scr": did you mean "tau_src"'),
    (dict(loss_config=dict(features=[dict(tgt_key="a")])), "OTFeatureSpec needs src_key"),
    (dict(loss_config=dict(heuristic="false")), "heuristic must be true or false, found 'false'"),
    (dict(loss_config=dict(features=[dict(src_key="a", use_learned_embed=1)])), "use_learned_embed must be true or false"),
    (dict(loss_config=dict(features=[dict(src_key="a", dim_slice=3)])), "dim_slice of a must be .*found 3"),
    (dict(loss_config=dict(features=[dict(src_key="a", dim_slice=slice(0, 8, 2))])), "a step of 2"),
    (dict(loss_config=dict(features=[dict(src_key=7)])), "src_key must be text"),
    (dict(loss_config=dict(features=dict(src_key="a"))), "features must be a list"),
    (dict(loss_config=dict(reg_m=1, tau_tgt=2)), "tau_tgt and reg_m are names of one number"),
    (dict(loss_config=dict(reg_m=[1, 2, 3])), r"reg_m must be a number or \[tau_src, tau_tgt\]"),
    (dict(obs_keys=3), "obs_keys must be a list of keys, found 3"),
    (dict(loss_config=dict(features=[dict(src_key="a", weight_label=0)])), "counts for nothing"),
    (dict(loss_config=dict(features=[dict(src_key="a", dim_slice=[0])])), "dim_slice of a must be"),
    (dict(loss_config=dict(reg=0)), "reg must be a finite number above 0"),
    (dict(loss_config=dict(reg=["typical", 0.1])), "one of std, mean, median, max"),
    (dict(loss_config=dict(tau_src=-1)), "tau_src must be a finite number above 0"),
    (dict(loss_config=dict(reference="diag")), "reference = 'diag' is not known"),
    (dict(loss_config=dict(reference="soft_diagonal")), "takes a number, as in"),
    (dict(loss_config=dict(reference="band(1.5)")), "a whole number"),
    (dict(loss_config=dict(reference="product(2)")), "takes no number"),
    (dict(loss_config=dict(heuristic=True, reference="band(2)")), "Leave one out"),
    (dict(loss_config=dict(cost_scale="mean", reg=["mean", 0.1])), "leave cost_scale out"),
    (dict(bc_src_weight=1.5), "a share from 0 to 1"),
    (dict(batch_ratio=0), "batch_ratio must be"),
    (dict(batch_size="many"), "batch_size must be a finite number"),
    (dict(topk_src_episodes=0), "topk_src_episodes must be a finite number of at least 1"),
    (dict(window_size=2.5), "window_size must be a whole number"),
    (dict(cutoff="near"), "cutoff must be a finite number"),
    (dict(enable="false"), "enable must be true or false"),
    ([1, 2], "made of keys and values"),
])  # fmt: skip
def test_a_mistaken_configuration_says_what_is_wrong(given, said):
    refused(said, OTConfig.from_dict, given)


def test_files_that_cannot_be_read_are_named(tmp_path):
    found = [
        ("a.json", b"{", "not JSON"), ("b.json", b'{"lamda_ot": 1}', "lambda_ot"), ("c.json", None, "cannot be read"),
        ("d.json", b"[" * 10**5, "nested too deeply"), ("e.json", b'{"seed": 1, "seed": 2}', '"seed" is there twice'),
        ("f.json", b'{"src_repo_id": "\xff"}', "not UTF-8: byte 17 is 0xff"), ("g.yaml", b"seed: 1\nseed: 2", '"seed" is there twice'),
        ("h.yaml", b"a: [" * 2000, "nested too deeply"), ("i.yaml", b"? [1]\n: 2", "cannot be a key"), ("j.yaml", b"a: [", "not YAML"),
        ("k.yaml", b"a: 2024-13-45", "not YAML"),
    ]  # fmt: skip
    for name, text, said in found:
        path = tmp_path / name
        if path.suffix == ".yaml":
            pytest.importorskip("yaml")
        if text is not None:
            path.write_bytes(text)
        refused(f"{name}.*{said}", OTConfig.from_file, path)


def test_single_values_are_set_from_the_command_line(tmp_path):
    (path := tmp_path / "ot.json").write_text(json.dumps(co_config().to_dict()))
    values = ("reg=0.05", "lambda_ot=2", "features.1.weight_embed=3", "src_repo_id=sim", "loss_config.tau_src=null")
    cfg = OTConfig.from_file(path, [f"--ot.{value}" for value in values])
    assert (cfg.loss_config.reg, cfg.lambda_ot, cfg.loss_config.features[1].weight_embed) == (0.05, 2, 3)
    assert (cfg.src_repo_id, cfg.loss_config.tau_src, cfg.loss_config.tau_tgt) == ("sim", None, 1.0)
    wrong = ("rge=1", 'no key "rge"'), ("features.7.reg=1", "numbered from 0"), ("reg.a=1", "under a value"), ("reg", "KEY=VALUE")
    for value, said in wrong:
        refused(said, OTConfig.from_file, path, [f"--ot.{value}"])


def test_yaml_reads_alike(tmp_path):
    yaml = pytest.importorskip("yaml")
    (path := tmp_path / "ot.yaml").write_text(yaml.safe_dump(co_config().to_dict()) + "# tau_tgt: .inf\n")
    assert OTConfig.from_file(path) == co_config()
    path.write_text("loss_config: {tau_src: .inf, tau_tgt: null}")
    assert OTConfig.from_file(path).loss_config.taus == (math.inf, math.inf)


def module(**parts):
    """The parts of one of LeRobot's large policies that the registry looks for, and nothing else of it."""
    held = nn.Module()
    for key, part in parts.items():
        setattr(held, key, part)
    return held


def test_large_policies_embed_what_they_would_be_given():
    """SmolVLA and pi0 pad states and resize images by methods of their own; GR00T embeds a state by its robot."""
    patches = nn.Conv2d(3, 5, 4, 4)
    tower = module(patches=patches)
    tower.embed_image = lambda image: patches(image).flatten(2).mT  # (batch, tokens, 5)
    pad = lambda batch: nn.functional.pad(batch[STATE], (0, 4))  # noqa: E731
    state, image = torch.randn(3, 6), torch.rand(3, 3, 8, 8)

    def large(name, part):
        policy = module(name=name, model=module(state_proj=nn.Linear(10, 7), **{part: tower}))
        policy.prepare_state, policy.prepare_images = pad, lambda batch: ([2 * batch[CAMERA] - 1], None)
        policy._preprocess_images = policy.prepare_images
        return policy

    pi0 = large("pi0", "paligemma_with_expert")
    for policy in (large("smolvla", "vlm_with_expert"), pi0):
        padded = nn.functional.pad(state, (0, 4))
        torch.testing.assert_close(embed(policy, STATE, state, {STATE: state}), policy.model.state_proj(padded))
        tokens = patches(2 * image - 1).mean((-2, -1))
        torch.testing.assert_close(embed(policy, CAMERA, image, {CAMERA: image}), tokens)
        patches.requires_grad_(False)  # as SmolVLA's tower is by default
        refused("carries no gradient", embed, policy, CAMERA, image, {CAMERA: image})
        patches.requires_grad_(True)
    for pi0.name in ("pi05", "pi0_fast"):
        torch.testing.assert_close(embed(pi0, CAMERA, image, {CAMERA: image}), tokens)
        with pytest.raises(
            ProblemError, match=f'{pi0.name} has no embedding of "observation.state" alone; it embeds "observation.images.<cam'
        ):
            embed(pi0, STATE, state, {STATE: state})

    class ByRobot(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 6, 4))

        def forward(self, x, robot):
            return torch.einsum("btd,bdk->btk", x, self.weight[robot])

    groot = module(name="groot", _groot_model=module(action_head=module(state_encoder=ByRobot())))
    robots = torch.tensor([0, 1, 1])
    z = embed(groot, "state", state.unsqueeze(1), {"state": state, "embodiment_id": robots})
    torch.testing.assert_close(z[2], state[2] @ groot._groot_model.action_head.state_encoder.weight[1])
    refused("embodiment_id", embed, groot, "state", state.unsqueeze(1), {"state": state})


def test_a_part_of_ones_own_policy_is_named_by_its_path(observations):
    body = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float64))
    policy = module(name="mine", body=body, state=nn.Linear(6, 2, dtype=torch.float64))
    obs = observations(5)
    torch.testing.assert_close(embed(policy, CAMERA, obs[CAMERA], obs, "body.0"), body(obs[CAMERA]).mean((-2, -1)))
    frames = torch.stack((obs[STATE], 2 * obs[STATE]), 1)
    torch.testing.assert_close(embed(policy, STATE, frames, obs, "state"), policy.state(frames).flatten(1))
    with pytest.raises(ProblemError, match=r'embed_path "model.body": Module has no "model"; its parts are body, state'):
        embed(policy, STATE, obs[STATE], obs, "model.body")
    refused("how mine embeds an observation is not known", embed, policy, STATE, obs[STATE], obs)
    with pytest.raises(ProblemError, match="its dim_slice must keep them all"):
        embed(module(name="act", model=module(encoder_robot_state_input_proj=nn.Linear(6, 2))), STATE, obs[STATE][:, :4], obs)


def test_metrics_go_to_tensorboard(policy, observations, tmp_path, batch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    attach_ot(policy, pairs(observations), co_config(tensorboard_dir=str(tmp_path)), log_every=1)
    policy.forward(batch)
    assert any(path.stat().st_size > 100 for path in tmp_path.iterdir())
