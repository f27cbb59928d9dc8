"""The scripts of bench/examples do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch

from problems import differences, first, generator, randn

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
    gen = generator()
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
    x, y = ground_cost.mixed(*ground_cost.twice(8, generator(2)))
    A, v = torch.eye(x.shape[-1], dtype=x.dtype), randn(x.shape[-1], x.shape[-1])

    def loss(A):
        return -(len(x) * ground_cost.match(x, y, A).plan.to_dense().diagonal()).log().mean()

    (truth,) = differences(lambda z: [float(loss(*z))], [(A, v)], 1e-3)
    assert float((first(loss, [A])[0] * v).sum()) == pytest.approx(truth, rel=1e-3)


def test_co_training_aligns_what_imitation_does_not(tmp_path):
    cotraining = script("cotraining")
    source, target = cotraining.recordings(generator())
    trained = {name: cotraining.train(source, target, weight, steps=150) for name, weight in (("alone", 0.0), ("together", 1.0))}
    found = {name: shares for name, (_, shares) in trained.items()}
    assert found["alone"][0] < 0.2 and found["alone"][-1] < 0.2
    assert found["together"][0] < 0.2 and found["together"][-1] > 0.9
    pytest.importorskip("matplotlib")
    cotraining.picture({name: policy for name, (policy, _) in trained.items()}, found, tmp_path / "cotraining.png")
    assert (tmp_path / "cotraining.png").stat().st_size > 10_000


def test_gradient_flow_arrives(tmp_path):
    flow = script("gradient_flow")
    gen = generator()
    x, y = flow.disc(40, gen), flow.spiral(40, gen)
    clouds, values = flow.flow(x, y, steps=15)
    assert values[-1] <= values[0] / 100 and min(values) >= 0
    nearest = torch.cdist(clouds[-1], y).amin(0)  # every target has a point near it: a biased loss leaves the ends bare
    assert nearest.mean() <= 0.1 * torch.cdist(x, y).amin(0).mean()
    pytest.importorskip("matplotlib")
    flow.picture(clouds, values, y, tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_barycentre_of_two_diracs_is_their_midpoint():
    module = script("barycentre")
    points = module.grid(5)
    ends = torch.eye(25, dtype=torch.float64)[[0, 24]]
    w, objectives = module.barycentre(ends, torch.tensor([0.5, 0.5]), points, steps=60)
    assert abs(float(w.sum()) - 1) <= 1e-12 and int(w.argmax()) == 12 and float(w[12]) >= 0.95
    # Half the squared half-diagonal, to each end.
    assert objectives[-1] == pytest.approx(float((points[0] - points[12]).square().sum()) / 2, rel=0.02)


def test_barycentre_of_digits_lies_between():
    pytest.importorskip("sklearn")
    module = script("barycentre")
    ends, points = module.digits(0, 1), module.grid(8)
    w, objectives = module.barycentre(ends, torch.tensor([0.5, 0.5]), points, steps=30)
    assert abs(float(w.sum()) - 1) <= 1e-12 and objectives[-1] < objectives[0] / 4
    mean, (first, second) = w @ points, ends @ points  # the barycentre's mean is the mean of the means
    torch.testing.assert_close(mean, (first + second) / 2, rtol=0, atol=0.01)
