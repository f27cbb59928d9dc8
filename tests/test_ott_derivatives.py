"""Implicit derivatives of the sharp cost and of the plan in the cost, against OTT-JAX's: numbers stored by bench/ott_derivatives.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import gpu_ot
from gpu_ot import KL, Problem

STORED = json.loads((Path(__file__).parent / "ott_derivatives.json").read_text())
PROBLEMS = {p["name"]: p for p in STORED["problems"]}


def tensor(z):
    return torch.tensor(z, dtype=torch.float64)


def solved(p, C):
    on_a, on_b = (KL(math.inf if tau is None else tau) for tau in p["tau"])
    return gpu_ot.solve(Problem(C, p["eps"], tensor(p["a"]), tensor(p["b"]), (on_a, on_b)), grad="implicit", tol=1e-13, strict=True)


def off(ours, theirs):
    """The largest difference, relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_plans_agree(name):
    p = PROBLEMS[name]
    assert off(solved(p, tensor(p["C"])).plan.to_dense(), tensor(p["plan"])) <= 1e-10


@pytest.mark.parametrize("output", ["sharp_cost", "linear"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_agree(name, output):
    p = PROBLEMS[name]
    C = tensor(p["C"]).requires_grad_()
    P = solved(p, C).plan.to_dense()
    value = (P * (C if output == "sharp_cost" else tensor(p["W"]))).sum()
    theirs = p[output]
    assert theirs["off_differences"] <= 1e-8, "not a reference"
    assert float(value.detach()) == pytest.approx(theirs["value"], rel=1e-10)
    (grad,) = torch.autograd.grad(value, C)
    assert off(grad, tensor(theirs["grad"])) <= 1e-6


def test_the_sharp_cost_of_a_solution_has_the_same_derivative():
    p = PROBLEMS["balanced, clouds"]
    C = tensor(p["C"]).requires_grad_()
    (grad,) = torch.autograd.grad(solved(p, C).sharp_cost, C)
    assert off(grad, tensor(p["sharp_cost"]["grad"])) <= 1e-6


def test_both_kinds_of_marginals_are_there():
    hard = [tau is None for p in PROBLEMS.values() for tau in p["tau"]]
    assert len(PROBLEMS) == 3 and any(hard) and not all(hard)
