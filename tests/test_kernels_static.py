"""What can be known of the kernels without a GPU: their numbers, in Triton's interpreter, and their code, compiled offline."""

import os
import pathlib
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]


def run(*command, **environment):
    """In a process of its own: Triton decides whether it interprets when it is imported."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_every_kernel_agrees_with_its_naive_twin():
    run("-m", "pytest", "-q", "--import-mode=importlib", "tests/test_kernels.py", TRITON_INTERPRET="1")


@pytest.mark.skipif(
    tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9), reason="the table counts what the compiler of Triton 3.9 issues"
)
def test_the_table_compiles_without_spills_and_within_its_bars():
    pytest.importorskip("triton.backends.nvidia")
    run("bench/static.py", "--quick")
