"""POT under `patch()`: every reference replaced, calls that are POT's alone answered by POT, and everything as it was afterwards."""

import importlib
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ot
import ot.batch
import ot.da
import pytest
import torch

import gpu_ot
from gpu_ot.pot import arrays, bregman
from gpu_ot.pot.patching import REPLACED, patch
from problems import rand

#: In a container, since this module's own names are patched like any client's.
THEIRS = {"sinkhorn": ot.sinkhorn, "log": ot.bregman.sinkhorn_log, "unbalanced": ot.unbalanced.sinkhorn_unbalanced, "solve": ot.solve}


def references() -> dict[tuple[str, str], object]:
    """Every name of every loaded module of POT, and what it stands for."""
    modules = {name: module for name, module in sys.modules.items() if name == "ot" or name.startswith("ot.")}
    return {(name, attribute): value for name, module in modules.items() for attribute, value in vars(module).items()}


def client() -> types.ModuleType:
    """A module of someone else, with imports of its own."""
    module = types.ModuleType("a_client")
    exec("from ot import sinkhorn as mine\nfrom ot.unbalanced import sinkhorn_unbalanced\ndef run(*z): return mine(*z)", vars(module))
    sys.modules["a_client"] = module
    return module


@pytest.fixture(autouse=True)
def clean():
    yield
    sys.modules.pop("a_client", None)
    assert ot.sinkhorn is THEIRS["sinkhorn"], "a test left POT patched"


def test_every_reference_is_replaced_and_restored():
    before = references()
    module = client()
    originals = {id(getattr(sys.modules[home], name)) for home, (_, names) in REPLACED.items() for name in names}
    held = [key for key, value in before.items() if id(value) in originals]
    assert len(held) > 40  # ot.da.sinkhorn, ot.gromov._bregman.sinkhorn, ot.solvers._linear.sinkhorn_log, ...
    with patch():
        during = references()
        assert all(id(during[key]) not in originals for key in held)
        assert all(during[key] is value for key, value in before.items() if key not in held)
        assert module.mine is ot.sinkhorn is not THEIRS["sinkhorn"]
        assert ot.sinkhorn.__name__ == "sinkhorn" and ot.sinkhorn.__doc__ == THEIRS["sinkhorn"].__doc__
    after = references()
    assert all(after[key] is value for key, value in before.items())
    assert module.mine is THEIRS["sinkhorn"] and module.sinkhorn_unbalanced is THEIRS["unbalanced"]


def test_modules_imported_meanwhile_are_restored_too():
    with patch():
        module = client()
        assert module.mine is not THEIRS["sinkhorn"]
    assert module.mine is THEIRS["sinkhorn"]


def test_clients_get_the_plan_that_pot_could_not_compute(problem):
    a, b, M = (z.numpy() for z in problem(50, 40))
    M[:, 0] = 0.9 + 0.1 * M[:, 0]  # a far point: its whole column underflows in exp(-M / reg)
    module = client()
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("error")
        P = module.run(a, b, M, 1e-3, "sinkhorn", 20_000)
    assert P.sum() == pytest.approx(1) and isinstance(P, np.ndarray)
    with pytest.warns(UserWarning, match="numerical errors"):
        assert abs(module.run(a, b, M, 1e-3).sum() - 1) > 1e-3
    assert ot.da.SinkhornTransport is not None


def test_pots_own_classes_run_on_it(monkeypatch):
    x, y = rand(20, 2).numpy(), rand(15, 2, seed=1).numpy() + 0.5
    calls, original = [], bregman.run
    monkeypatch.setattr(bregman, "run", lambda *z, **k: calls.append(1) or original(*z, **k))
    theirs = ot.da.SinkhornTransport(reg_e=0.5).fit(Xs=x, Xt=y).coupling_
    with patch():
        ours = ot.da.SinkhornTransport(reg_e=0.5).fit(Xs=x, Xt=y).coupling_
    assert calls
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)


def test_what_is_pots_alone_runs_on_pot(problem):
    a, b, M = (z.numpy() for z in problem(12, 9))
    exact = ot.emd2(a, b, M)
    squares = ot.solve(M, a, b, reg=0.1, reg_type="L2").plan
    with patch():
        assert ot.solve(M, a, b).value == pytest.approx(exact)
        np.testing.assert_array_equal(ot.solve(M, a, b, reg=0.1, reg_type="L2").plan, squares)
        assert ot.solve_sample(a[:, None], b[:, None], method="1d").value is not None
        assert ot.solve(M, a, b, reg=0.1).n_iter > 0  # and ours is ours
        with pytest.raises(ValueError):
            ot.sinkhorn(a, b, M, 0.1, method="no such method")


def test_it_may_be_entered_twice_and_left_in_any_order():
    outer = patch()
    patched = [ot.sinkhorn]
    inner = patch()
    outer.undo()
    assert ot.sinkhorn is patched[0]
    for _ in range(2):
        inner.undo()
        assert ot.sinkhorn is THEIRS["sinkhorn"]
    for again in (lambda: outer, patch):  # whose call patches
        with again() as same, same:
            assert ot.sinkhorn is patched[0]
        assert ot.sinkhorn is THEIRS["sinkhorn"]


def test_errors_leave_nothing_behind():
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert ot.sinkhorn is THEIRS["sinkhorn"]
    with pytest.raises(RuntimeError):
        patch("no_such_device")
    assert ot.sinkhorn is THEIRS["sinkhorn"]


def test_threads(problem):
    """Enter, solve and leave from many threads: always patched inside, and not after the last."""
    a, b, M = (z.numpy() for z in problem(8, 7))
    truth, barrier = ot.bregman.sinkhorn_log(a, b, M, 0.02, numItermax=200), threading.Barrier(8)

    def work(_):
        barrier.wait()
        for _ in range(5):
            with patch():
                assert ot.sinkhorn is not THEIRS["sinkhorn"]
                np.testing.assert_allclose(ot.sinkhorn(a, b, M, 0.02, numItermax=200), truth, rtol=0, atol=1e-8)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert ot.sinkhorn is THEIRS["sinkhorn"]


def test_the_device_is_where_numpy_is_solved(problem, monkeypatch):
    """The innermost counts; tensors stay where they are. (On the device "meta" nothing is computed: it only shows who goes there.)"""
    a, b, M = problem(6, 5)
    with patch("cpu"):
        assert arrays.numpy_device == torch.device("cpu")
        assert isinstance(ot.sinkhorn(a.numpy(), b.numpy(), M.numpy(), 0.1), np.ndarray)
        with patch("meta"):
            (z,), _ = arrays.take(z=M.numpy())
            assert z.device.type == "meta"
            (z,), _ = arrays.take(z=M)
            assert z.device.type == "cpu"
            (z,), _ = arrays.take(z=[1.0, 2.0])
            assert z.device.type == "meta"
        assert arrays.numpy_device == torch.device("cpu")
    assert arrays.numpy_device is None


def test_ten_million_iterations_end(problem):
    """Flow matching's own test asks for 1e7 of them where reg is small: after POT's default limit they are accelerated."""
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=gen), torch.randn(64, 8, generator=gen)
    M, a = torch.cdist(x, y).double().numpy(), ot.unif(64)  # in float32 it would end as stalled
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, log = ot.sinkhorn2(a, a, M, reg=0.01, numItermax=int(1e7), log=True, warn=True)
        assert log["status"].name == "converged" and log["niter"] < 20_000
        assert log["err"][-1] <= 1e-9 and len(log["err"]) == log["niter"] // 10 + 1
        _, plain = ot.sinkhorn2(a, a, M, reg=0.01, numItermax=3 * log["niter"], log=True, accelerate=False)
    assert plain["err"][-1] > log["err"][-1]
    assert abs(loss - ot.emd2(a, a, M)) < 0.01 * np.log(64)  # 0 <= <P, M> - emd <= reg H(P) - reg H(emd plan)
    np.testing.assert_allclose(plain["err"][:100], log["err"][:100], rtol=0, atol=0)  # POT's iterates up to its default limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_numpy_goes_to_the_gpu_and_comes_back(problem):
    a, b, M = (z.numpy() for z in problem(60, 50))
    with patch("cuda"):
        ours = ot.sinkhorn(a, b, M, 0.05)
    assert isinstance(ours, np.ndarray)
    np.testing.assert_allclose(ours, ot.sinkhorn(a, b, M, 0.05), rtol=0, atol=1e-9)


def test_scripts_run_unmodified(tmp_path, monkeypatch, capsys):
    (tmp_path / "beside.py").write_text("from ot import sinkhorn as S\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy as np, ot, beside\n"
        "a = np.ones(4) / 4\n"
        "M = np.random.RandomState(0).rand(4, 4)\n"
        "print(__name__, sys.argv[1:], beside.S is ot.sinkhorn, round(float(beside.S(a, a, M, 1e-4).sum()), 6))\n"
    )
    run = [sys.executable, "-W", "error::RuntimeWarning", "-m", "gpu_ot.patch"]
    done = subprocess.run([*run, str(script), "one", "--two"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "__main__ ['one', '--two'] True 1.0", done.stderr
    monkeypatch.setattr(gpu_ot, "patch", gpu_ot.patch)  # importing the module of that name hides the function
    runner = importlib.import_module("gpu_ot.patch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    runner.main(["-m", "beside"])
    with pytest.raises(SystemExit) as stopped:
        runner.main([str(tmp_path / "missing.py")])
    assert stopped.value.code == 2 and "is not a file" in capsys.readouterr().err
