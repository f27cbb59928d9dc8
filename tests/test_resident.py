"""What the resident backend has beside the suite of all backends: convergence, its limits, when it is taken. Interpreted."""

from __future__ import annotations

import pytest
import torch

import gpu_ot
from gpu_ot import KL, TV, Euclidean, Problem, SqEuclidean, errors, solve
from gpu_ot.geometry import select as backends
from gpu_ot.geometry.resident import Resident, resident_iterate
from gpu_ot.geometry.select import bind
from problems import rand, weights

pytest.importorskip("triton")

# A first iteration may overflow, which is noticed; the interpreter says so, a GPU does not.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned")]


def matrices(n, m, *batch):
    return rand(*batch, n, m, seed=n + m, dtype=torch.float32)


def test_it_converges_in_as_many_iterations_as_in_float64():
    """To 1e-6 of the mass, where f / eps is in the hundreds."""
    C, a, b = 10 + matrices(25, 25), weights(25), weights(25, seed=7)
    ours = solve(Problem(C, 2e-2, a.float(), b.float()), backend="resident", tol=1e-6, accelerate="none", check_every=20)
    truth = solve(Problem(C.double(), 2e-2, a, b), backend="softmin", tol=1e-6, accelerate="none", check_every=20)
    assert ours.status.name == "converged" and abs(ours.n_iter - truth.n_iter) <= 20


def test_the_operator_is_fit_for_torch_compile():
    C, a, b = matrices(6, 5, 2), weights(6, (2,)), weights(5, (2,))
    given = C, a, b, torch.zeros(2, 5, dtype=torch.float64), 0.1, float("inf"), 1.0, 2
    torch.library.opcheck(resident_iterate, given, test_utils=("test_schema", "test_faketensor"))


def test_what_it_refuses_and_why():
    C = matrices(4, 5)
    assert Resident.refuse(Problem(C, 0.1)) is None
    assert Resident.refuse(Problem(C, 0.1, penalties=(KL(), KL(1.0)))) is None
    assert Resident.refuse(Problem(Euclidean(torch.rand(4, 2), torch.rand(5, 2)), 0.1)) is None, "any cost that can be formed"
    for problem, why in (
        (Problem(C.double(), 0.1), "float64"),
        (Problem(C, 0.1, penalties=(KL(), TV(1.0))), "KL penalties"),
        (Problem(matrices(2, 1025), 0.1), "up to 1024 columns"),
    ):
        reason = Resident.refuse(problem)
        assert reason is not None and why in reason, reason
        with pytest.raises(errors.BackendError, match=why):
            bind(problem, "resident")


def test_auto_takes_it_for_small_problems_on_a_gpu_only(monkeypatch):
    def taken(problem):
        said = gpu_ot.explain(problem)
        assert f'auto takes "{backends._choose(problem)[0].backend}"' in said
        return backends._choose(problem)[0].backend

    small = Problem(matrices(10, 256, 3), 0.1)
    assert taken(small) == "dense" and "on a GPU" in gpu_ot.explain(small)
    monkeypatch.setattr(backends, "_on", lambda problem, device: device == "cuda")
    assert taken(small) == "resident" and taken(Problem(matrices(256, 256), 0.1)) == "resident"
    assert taken(Problem(SqEuclidean(torch.rand(9, 2), torch.rand(8, 2)), 0.1)) == "resident"
    assert taken(Problem(matrices(10, 257), 0.1)) == "dense"
    double = Problem(matrices(10, 20).double(), 0.1)
    assert taken(double) == "dense" and 'instead of "resident", which was refused' in gpu_ot.explain(double)
