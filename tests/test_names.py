"""Whose name is whose: `gpu_ot.solve` is ours alone, `gpu_ot.pot` has all of POT's, the top level says where to find the others."""

import inspect
import subprocess
import sys

import numpy as np
import ot
import ot.batch
import pytest
import torch

import gpu_ot
import gpu_ot.pot
from gpu_ot import Problem, ProblemError
from gpu_ot.pot.forwarding import forward
from gpu_ot.pot.patching import REPLACED

M = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SUBMODULES = ["bregman", "unbalanced", "batch", "solvers", "partial", "gromov", "lowrank"]
OURS = [(home, name) for home, (_, names) in REPLACED.items() for name in names]
OURS += [("ot", name) for name in ("sinkhorn", "sinkhorn2", "sinkhorn_unbalanced", "sinkhorn_unbalanced2", "solve", "solve_batch")]
OURS += [("ot", "barycenter"), ("ot", "barycenter_unbalanced"), ("ot", "lowrank_sinkhorn")]
OURS += [("ot", "dist"), ("ot.batch", "dist_batch"), ("ot.batch", "loss_linear_batch"), ("ot.batch", "loss_linear_samples_batch")]


@pytest.mark.parametrize("home", ["ot", *(f"ot.{name}" for name in SUBMODULES)])
def test_the_drop_in_has_every_name(home):
    """Ours where we have it, POT's own object elsewhere."""
    theirs, ours = sys.modules[home], sys.modules[home.replace("ot", "gpu_ot.pot", 1)]
    assert set(dir(theirs)) <= set(dir(ours))
    mine = {name for where, name in OURS if where == home} | set(SUBMODULES if home == "ot" else [])
    assert all(getattr(ours, name) is not getattr(theirs, name) for name in mine)
    public = {name for name in dir(theirs) if not name.startswith("_")} - mine
    others = [name for name in public if getattr(ours, name) is not getattr(theirs, name)]
    assert all(getattr(getattr(ours, name), "__module__", "gpu_ot").startswith("gpu_ot") for name in others), others


def test_its_modules_and_classes_are_pots():
    assert gpu_ot.pot.emd is ot.emd and gpu_ot.pot.da is ot.da and gpu_ot.pot.plot.__name__ == "ot.plot"  # not imported by POT itself
    assert gpu_ot.pot.unbalanced.mm_unbalanced is ot.unbalanced.mm_unbalanced and gpu_ot.pot.__version__ == ot.__version__
    for module, name in ((gpu_ot.pot, "ot.no_such"), (gpu_ot.pot.bregman, "ot.bregman.no_such")):
        with pytest.raises(AttributeError, match=f"POT has no {name}"):
            module.no_such  # noqa: B018
        assert not hasattr(module, "__wrapped__")


def test_without_pot_its_names_say_what_to_install(monkeypatch):
    look_up, names = forward("gpu_ot.pot", "ot")
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"gpu_ot\.pot\.emd would be POT's own.*pip install pot"):
        look_up("emd")
    with pytest.raises(AttributeError, match=r"gpu_ot\.pot\.emd"):
        gpu_ot.emd  # noqa: B018
    assert "sinkhorn" in names() and "emd" not in names()


@pytest.mark.parametrize(
    "path", ["emd", "da", "bregman.empirical_sinkhorn_nystroem", "unbalanced.mm_unbalanced", "no_such", "bregman.no_such"]
)
def test_the_top_level_names_the_way_out(path):
    *modules, name = path.split(".")
    namespace = getattr(gpu_ot, modules[0]) if modules else gpu_ot
    with pytest.raises(AttributeError) as refused:
        getattr(namespace, name)
    assert (f"it is POT's own, gpu_ot.pot.{path}" in str(refused.value)) == ("no_such" not in path)


def test_what_we_have_is_on_the_top_level():
    assert all(hasattr(gpu_ot, name) for name in gpu_ot.__all__)
    assert gpu_ot.bregman.sinkhorn is gpu_ot.sinkhorn is gpu_ot.pot.sinkhorn and inspect.ismodule(gpu_ot.unbalanced)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gpu_ot.solve(M, None, None, 0.1),
        lambda: gpu_ot.solve(M.numpy(), reg=0.1),
        lambda: gpu_ot.solve(M=M.tolist(), reg=0.1),
        lambda: gpu_ot.solve(gpu_ot.SqEuclidean(M, M)),
    ],
)
def test_solve_takes_problems_and_names_the_way_out(call):
    with pytest.raises(ProblemError, match=r"gpu_ot\.Problem\(M, eps, a, b\)\).*gpu_ot\.pot\.solve\(M, a, b, reg\)"):
        call()


def test_foreign_options_are_refused_by_name():
    problem = Problem(M, 0.1)
    assert list(inspect.signature(gpu_ot.solve).parameters)[:2] == ["problem", "backend"]
    for option in ("verbose", "reg", "method"):
        with pytest.raises(TypeError, match=option):
            gpu_ot.solve(problem, **{option: None})
    with pytest.raises(ProblemError, match="'autodiff'"):
        gpu_ot.solve(problem, grad="autodiff")
    with pytest.raises(ProblemError, match="holds its weights"):
        gpu_ot.solve(problem, None, None)
    with pytest.raises(TypeError, match="backend"):
        gpu_ot.pot.solve(M, reg=0.1, backend="dense")
    with pytest.raises(ProblemError, match=r"gpu_ot\.solve\(problem\)"):
        gpu_ot.pot.solve(problem, reg=0.1)


@pytest.mark.parametrize("home, name", [z for z in OURS if z[0] != "ot"], ids="-".join)
def test_signatures_are_pots(home, name):
    theirs, ours = (inspect.signature(getattr(sys.modules[z], name)) for z in (home, home.replace("ot", "gpu_ot.pot", 1)))
    own = {"group", "layout"} if name == "solve_sample" else set()  # keyword-only, after all of POT's
    mine = [(p.name, p.default, p.kind) for p in ours.parameters.values() if p.name not in own]
    assert mine == [(p.name, p.default, p.kind) for p in theirs.parameters.values()]


def test_the_drop_in_runs_what_pot_runs():
    a, b = np.full(6, 1 / 6), np.full(5, 1 / 5)
    code = "import sys, gpu_ot.pot as ot, gpu_ot.plots; before = 'ot' in sys.modules; ot.emd; print(before, 'ot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[-2:] == ["False", "True"]
    assert gpu_ot.pot.emd2(a, b, M.numpy()) <= gpu_ot.pot.solve(M.numpy(), a, b, 0.1).value_linear
