"""README's word is good: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gpu_ot.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)


def blocks(language):
    return [code for kind, code in BLOCKS if kind == language]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[0][:40])
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", [line for code in blocks("bash") for line in code.splitlines() if line.strip()])
def test_commands_exist(line, capsys):
    command = line.split("#")[0].split()
    if command[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("no make here")
        done = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif command[0] == "gpu-ot":
        with pytest.raises(SystemExit) as finished:
            main([*command[1 : command.index("--") if "--" in command else None], "--help"])
        assert finished.value.code == 0
    elif command[0] == "torchrun" and "-m" in command:
        assert importlib.util.find_spec(command[command.index("-m") + 1]) is not None
    elif command[0] == "torchrun":
        assert (ROOT / next(word for word in command if word.endswith(".py"))).is_file()
    elif command[0] == "python":
        assert (ROOT / command[1]).is_file()
    else:
        assert command[:2] == ["pip", "install"]


def test_every_block_is_of_a_kind_that_is_checked():
    assert {kind for kind, _ in BLOCKS} <= {"python", "bash", "text"} and len(blocks("python")) >= 4


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
