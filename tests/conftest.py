"""What tests share beside problems.py: fixtures, and the process in which Triton's kernels are interpreted."""

import contextlib
import gc
import importlib.util
import io
import json
import os
import queue
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

import gpu_ot
from problems import random_problem

with contextlib.redirect_stdout(io.StringIO()):  # geomloss, which POT imports, greets on stdout through KeOps
    pytest.importorskip("ot")

pytest.register_assert_rewrite("conformance")


def pytest_addoption(parser):
    parser.addoption("--without-numba", action="store_true", help="as where it cannot be installed: torch operations alone")


# Small problems, and maybe other work on the machine: a second thread would mostly wait for its turn.
torch.set_num_threads(1)


@pytest.fixture
def problem():
    """(a, b, M) of a size: see problems.py."""
    return random_problem


@pytest.fixture
def hidden(monkeypatch):
    """with hidden(): as if numba were not there."""

    @contextlib.contextmanager
    def hide():
        with monkeypatch.context() as patch:
            patch.setattr(gpu_ot.compiled, "refused", lambda: "hidden by a test")
            yield

    return hide


@pytest.fixture
def poisoned(monkeypatch):
    """An output that a kernel forgets to write cannot pass for a right one."""
    empty = torch.empty

    def full_of_poison(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -(10**9))

    monkeypatch.setattr(torch, "empty", full_of_poison)


@pytest.fixture(params=["numpy", "torch"])
def arrays(request, problem):
    """make(n, m, ...) -> (a, b, M) as numpy arrays or as tensors, b of mass `mass`."""

    def make(n, m, dtype=torch.float64, seed=0, mass=1.0):
        a, b, M = (z.to(dtype) for z in problem(n, m, seed=seed))
        z = a, mass * b, M
        return tuple(t.numpy() for t in z) if request.param == "numpy" else z

    return make


@pytest.fixture(scope="session")
def lerobot():
    """LeRobot, without a network, here and in the processes that a test starts."""
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("LeRobot is not installed here: make lerobot")
    site = Path(__file__).parent / "lerobot_site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        kept = runpy.run_path(str(site / "sitecustomize.py"))  # operators go when their library does
        yield
        kept.clear()


def pytest_collection_finish():
    gc.freeze()  # what imports and the list of tests have made stays, and need not be searched for garbage again


def pytest_unconfigure():
    gc.unfreeze()


def exchange_once():
    """Triton's interpreter exchanges the functions of its language before a launch, and again for every call within, to no effect: that
    would be a third of its time."""
    with contextlib.suppress(ImportError, AttributeError):
        from triton.runtime import interpreter

        exchange, restore, done = interpreter._patch_lang, interpreter._LangPatchScope.restore, {}

        def once(function):
            module = function.__globals__["__name__"]
            if module not in done:
                done[module] = exchange(function)
            return done[module]

        def restored(scope):
            done.clear()
            restore(scope)

        interpreter._patch_lang, interpreter._LangPatchScope.restore = once, restored


# Triton decides once, when it is imported, whether it interprets. Tests marked `interpreted` therefore run in a second process, beside the
# others, and this one hands on the report of each as if it had run it.

CHANNEL = "GPU_OT_TEST_REPORTS"


def pytest_configure(config):
    if config.getoption("--without-numba"):
        sys.modules["numba"] = None  # type: ignore[assignment]
    if CHANNEL in os.environ:
        config.pluginmanager.register(Child(config))
    if os.environ.get("TRITON_INTERPRET") == "1":
        exchange_once()
    elif CHANNEL not in os.environ:
        config.pluginmanager.register(Interpreter(config))


class Child:
    """Sends its reports to the process that started it, one a line."""

    def __init__(self, config):
        self.config, self.channel = config, os.fdopen(int(os.environ.pop(CHANNEL)), "w")

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.channel, flush=True)


class Interpreter:
    def __init__(self, config):
        self.config, self.process, self.reports, self.arrived = config, None, {}, queue.Queue()

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: item.get_closest_marker("interpreted") is not None)  # last: by then they have been run

    def pytest_collection_finish(self, session):
        chosen = [item.nodeid for item in session.items if item.get_closest_marker("interpreted")]
        if chosen and not self.config.option.collectonly:
            self.start(chosen)

    def start(self, chosen):
        source, sink = os.pipe()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", *chosen],
            cwd=self.config.rootpath,
            env=os.environ | {"TRITON_INTERPRET": "1", CHANNEL: str(sink)},
            stdout=self.log,
            stderr=self.log,
            pass_fds=[sink],
        )
        os.close(sink)
        threading.Thread(target=self.listen, args=[source], daemon=True).start()

    def listen(self, source):
        with os.fdopen(source) as lines:
            for line in lines:
                self.arrived.put(json.loads(line))
        self.arrived.put(None)

    def pytest_runtest_protocol(self, item):
        if self.process is None or not item.get_closest_marker("interpreted"):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def reports_of(self, item):
        own = self.reports.setdefault(item.nodeid, [])
        while not any(report.when == "teardown" for report in own):
            data = self.arrived.get()
            if data is None:
                self.arrived.put(None)  # for whoever asks next
                self.log.seek(0)
                why = "the process of the interpreter ended before this test:\n" + self.log.read()[-8000:]
                return [pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")]
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            self.reports.setdefault(report.nodeid, []).append(report)
        return own

    def pytest_unconfigure(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
