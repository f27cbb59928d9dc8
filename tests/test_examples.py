"""The scripts of bench/examples do what they say; those of the losses are held to it in test_losses.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "bench" / "examples"


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ground_cost():
    return script("ground_cost")


def test_a_learned_ground_cost_finds_partners_it_has_not_seen(ground_cost, tmp_path):
    gen = torch.Generator().manual_seed(0)
    x, y = ground_cost.mixed(*ground_cost.twice(32, gen))
    held = ground_cost.mixed(*ground_cost.twice(32, gen))
    A, losses = ground_cost.learn(x, y, steps=30)
    euclidean = torch.eye(len(A), dtype=A.dtype)
    before, after = (ground_cost.match(*held, metric).plan.to_dense() for metric in (euclidean, A))
    assert losses[-1] <= losses[0] / 10
    assert ground_cost.found(before) <= 0.4 and ground_cost.found(after) >= 0.75
    (turn,) = ground_cost.mixed(euclidean)
    lengths = (turn @ A).norm(dim=-1)  # of the features that were mixed: the metric has told signal from noise
    assert lengths[: ground_cost.SIGNAL].amin() >= 2 * lengths[ground_cost.SIGNAL :].amax()
    pytest.importorskip("matplotlib")
    ground_cost.picture((before, after), A, losses, tmp_path / "ground_cost.png")
    assert (tmp_path / "ground_cost.png").stat().st_size > 10_000


def test_the_derivative_it_descends_along_is_the_losses(ground_cost):
    gen = torch.Generator().manual_seed(2)
    x, y = ground_cost.mixed(*ground_cost.twice(8, gen))
    d = x.shape[-1]

    def loss(A):
        return -(len(x) * ground_cost.match(x, y, A).plan.to_dense().diagonal()).log().mean()

    A = torch.eye(d, dtype=x.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(A), A)
    direction = torch.randn(d, d, generator=gen, dtype=x.dtype)
    with torch.no_grad():
        far, near, on, beyond = (float(loss(A + 1e-3 * k * direction)) for k in (-2, -1, 1, 2))
    assert float((grad * direction).sum()) == pytest.approx((far - 8 * near + 8 * on - beyond) / 12e-3, rel=1e-3)


def test_co_training_aligns_what_imitation_does_not(tmp_path):
    cotraining = script("cotraining")
    source, target = cotraining.recordings(torch.Generator().manual_seed(0))
    trained = {name: cotraining.train(source, target, weight) for name, weight in (("alone", 0.0), ("together", 1.0))}
    found = {name: shares for name, (_, shares) in trained.items()}
    assert found["alone"][0] < 0.2 and found["alone"][-1] < 0.2
    assert found["together"][0] < 0.2 and found["together"][-1] > 0.9
    pytest.importorskip("matplotlib")
    cotraining.picture({name: policy for name, (policy, _) in trained.items()}, found, tmp_path / "cotraining.png")
    assert (tmp_path / "cotraining.png").stat().st_size > 10_000
