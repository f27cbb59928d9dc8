"""The house stands: rooms import only from below, packaging names every folder, importing costs little; and README's word is good."""

import ast
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_ot
from gpu_ot.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpu_ot"
README = (ROOT / "README.md").read_text()
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
BASH = [code for page in PAGES for code in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]

#: The rooms of each floor, from the ground up. A room imports from floors below; on the top floor also from its own, without circles.
FLOORS = (
    ("kernels", "compiled", "errors", "communicator", "transforms", "vectors"),
    ("penalties", "costs"),
    ("problem",),
    ("geometry",),
    ("solver", "gradients"),
    ("solution", "distributed", "at_once"),
    ("solve",),
    (
        "initial",
        "lerobot",
        "pot",
        "losses",
        "plots",
        "patch",
        "cli",
        "demo",
        "warm",
        "info",
        "assign",
        "barycenter",
        "gromov",
        "soft",
        "low_rank",
    ),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS) - 1

FILES = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that a file imports, wherever in the file it does."""
    package = ["gpu_ot", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in parsed(path):
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


def neighbours(room):
    """The other rooms that the files of a room import."""
    return set().union(*(imported_rooms(path) for path in FILES if room_of(path) == room)) & set(FLOOR) - {room}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    room = room_of(path)
    others = imported_rooms(path) & set(FLOOR) - {room}
    wrong = {other for other in others if FLOOR[other] > FLOOR[room] or FLOOR[other] == FLOOR[room] < TOP}
    assert not wrong, f"{path.name} on floor {FLOOR[room]} imports {wrong}, which is no floor below"


def test_the_imports_draw_the_house():
    """No longer chain of imports between rooms than there are floors, and no circle, which would have no length."""
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert len(FLOORS) <= 8 and set(FLOOR) == rooms | {"kernels"}

    def height(room, above=()):
        assert room not in above, f"a circle of imports: {[*above, room]}"
        return 1 + max((height(other, (*above, room)) for other in neighbours_of[room]), default=0)

    neighbours_of = {room: neighbours(room) for room in FLOOR}
    assert max(map(height, FLOOR)) <= len(FLOORS)


def test_a_page_shows_the_house():
    shown = re.search(r"<!-- house -->(.*?)<!-- /house -->", (ROOT / "docs" / "how_it_works.md").read_text(), re.S)
    floors = re.findall(r"^(\d)  (\w+)", shown[1], re.M)
    assert {room: int(floor) for floor, room in floors} == FLOOR and len(floors) == len(FLOOR)


def test_files_are_read_in_one_go():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
        if (lines := len(path.read_text().splitlines())) > 350 and path.parent.name != "lerobot"
    }
    assert not long


def test_costs_are_asked_what_they_can_do():
    """And not which kind they are: fewer than fifteen places look at the class of a cost."""
    nodes = [(path, node) for path in FILES for node in parsed(path)]
    classes = {node.name: {ast.unparse(base) for base in node.bases} for _, node in nodes if isinstance(node, ast.ClassDef)}
    kinds = {"Cost"}
    while more := {name for name, bases in classes.items() if kinds & bases} - kinds:
        kinds |= more
    calls = [(path, node) for path, node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"]
    checks = [f"{path.name}:{node.lineno}" for path, node in calls if kinds & set(re.findall(r"\w+", ast.unparse(node.args[1])))]
    assert len(checks) < 15, checks


def test_algorithms_see_the_protocol_and_no_machine():
    """Floor 4 is handed a Geometry; only `solve` and the front doors may bind one."""
    for room in ("solver", "gradients", "solution"):
        for path in (PACKAGE / room).glob("*.py"):
            assert not re.search(r"geometry(\.select)? import .*\b(bind|select)\b", path.read_text()), path


def test_kernels_import_triton_and_torch_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in parsed(path):
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
    """Beyond torch and numpy nothing is imported but this package, and that is little work, counted in calls: 640 a module on Python 3.11
    with torch 2.13. On 3.12 with torch 2.11 it was some 24 thousand more: registering an operator takes more of them there."""
    code = (
        "import cProfile, pstats, sys, torch, numpy; before = set(sys.modules); profile = cProfile.Profile();"
        "profile.runcall(__import__, 'gpu_ot'); print(pstats.Stats(profile).total_calls);"
        "new = set(sys.modules) - before; print(len(new), [m for m in new if m.split('.')[0] != 'gpu_ot'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    calls, rest = done.stdout.split("\n")[:2]
    modules, foreign = rest.split(" ", 1)
    assert int(calls) <= 700 * int(modules) + 25_000 * (sys.version_info >= (3, 12)) and foreign == "[]"


def test_the_folder_kernels_refuses_the_name_of_another_project():
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT)
    assert "gpu_ot.kernels" in done.stderr


def blocks(language):
    return [code for kind, code in BLOCKS if kind == language]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[0][:40])
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", [line for code in [*blocks("bash"), *BASH] for line in code.splitlines() if line.strip()])
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
    elif command[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(command[2]) is not None
    elif command[0] == "python":
        assert (ROOT / command[1]).is_file()
    else:
        assert command[:2] == ["pip", "install"]


def test_every_block_is_of_a_kind_that_is_checked():
    assert {kind for kind, _ in BLOCKS} <= {"python", "bash", "text"} and len(blocks("python")) >= 4


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 130


def test_the_version_is_in_one_place():
    assert f"version: {gpu_ot.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
