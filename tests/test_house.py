"""The house stands: rooms import only their own floor or below, packaging names every folder, importing costs little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpu_ot"

#: Room -> floor. A room may import its own floor and those below. design: README, "The house".
FLOORS = {
    "kernels": 0,
    "errors": 0,
    "communicator": 0,
    "transforms": 0,
    "vectors": 0,
    "penalties": 1,
    "costs": 1,
    "problem": 2,
    "geometry": 3,
    "solver": 4,
    "gradients": 4,
    "solution": 5,
    "distributed": 5,
    "solve": 6,
    "initial": 7,
    "lerobot": 7,
    "pot": 7,
    "losses": 7,
    "plots": 7,
    "patch": 7,
    "cli": 7,
    "demo": 7,
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that a file imports, wherever in the file it does."""
    package = ["gpu_ot", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = base + (node.module.split(".") if node.module else [])
            targets = [stem] if len(stem) > 1 else [[*stem, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            continue
        rooms |= {target[1] for target in targets if target[0] == "gpu_ot" and len(target) > 1}
    return rooms


FILES = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    floor = FLOORS[room_of(path)]
    upwards = {room for room in imported_rooms(path) if room in FLOORS and FLOORS[room] > floor}
    assert not upwards, f"{path.name} on floor {floor} imports {upwards} from above"


def test_algorithms_see_the_protocol_and_no_machine():
    """Floor 4 is handed a Geometry; only `solve` and the front doors may bind one."""
    for room in ("solver", "gradients", "solution"):
        for path in (PACKAGE / room).glob("*.py"):
            assert not re.search(r"geometry(\.select)? import .*\b(bind|select)\b", path.read_text()), path


def test_kernels_import_triton_and_torch_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, path


def test_packaging_names_every_folder():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")} | {"gpu_ot.kernels"}
    assert listed == found


def test_no_room_for_leftovers():
    vague = {"utils", "misc", "common", "helpers"}
    assert not [p for p in [*PACKAGE.rglob("*"), *(ROOT / "kernels").rglob("*")] if p.stem in vague]


def test_importing_is_light():
    """No more than 0.2 s of work beyond torch (the best of three), and nothing heavy until something needs it."""
    code = (
        "import time, torch, numpy, sys; t = time.process_time(); import gpu_ot; print(time.process_time() - t);"
        "print([m for m in ('triton', 'pykeops', 'ot', 'geomloss', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n") for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) <= 0.2
    assert runs[0][1] == "[]"


def test_the_folder_kernels_refuses_the_name_of_another_project():
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT)
    assert "gpu_ot.kernels" in done.stderr
