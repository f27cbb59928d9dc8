"""Every block of the pages runs, every public name has a page and an example, and links between pages lead somewhere."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import gpu_ot
from gpu_ot import errors
from gpu_ot.solver import status

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = [(page, kind, code) for page in PAGES for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)]
PYTHON = [(page, code) for page, kind, code in BLOCKS if kind == "python"]


def examples():
    sys.path.insert(0, str(DOCS))
    try:
        from docstrings import examples

        return examples()
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(autouse=True)
def _without_a_screen(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if "matplotlib" in sys.modules:
        sys.modules["matplotlib"].use("Agg")
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def run(code, name):
    for package in ("matplotlib", "ot", "geomloss", "safetensors"):
        if re.search(rf"^(import|from) {package}\b", code, re.M) or (package == "matplotlib" and "gpu_ot.plots" in code):
            pytest.importorskip(package)
    exec(compile(code, name, "exec"), {"__name__": "page"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page, code", PYTHON, ids=[f"{page.stem}-{k}" for k, (page, _) in enumerate(PYTHON)])
def test_blocks_of_the_pages_run(page, code):
    run(code, page.name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", examples())
def test_examples_of_the_reference_run(name):
    run(examples()[name], name)


def test_blocks_are_of_a_kind_that_is_checked():
    assert {kind for _, kind, _ in BLOCKS} <= {"python", "bash", "text"}


def test_every_public_name_has_a_page_and_an_example():
    listed = set(re.findall(r"^   ([\w.]+)$", (DOCS / "api.md").read_text(), re.M))
    modules = {"pot", "bregman", "unbalanced"}  # on the reference's own page
    assert set(gpu_ot.__all__) - listed == modules
    assert set(gpu_ot.__all__) <= set(examples())


def test_every_example_has_its_place_in_the_gallery():
    order = re.search(r"ORDER = \((.*?)\)", (DOCS / "conf.py").read_text(), re.S)
    assert order and sorted(re.findall(r'"(\w+)"', order[1])) == sorted(path.stem for path in (DOCS / "examples").glob("*.py"))


def test_every_refusal_and_every_status_has_its_anchor():
    ends = ("Error", "Masses", "Refused", "Differ", "Failed")
    refusals = {
        name for name, found in vars(errors).items() if inspect.isfunction(found) and found.__annotations__["return"].endswith(ends)
    }
    page = (DOCS / "errors.md").read_text()
    assert refusals == set(re.findall(r"^\((\w+)\)=$", page, re.M))
    names = {found.name for found in vars(status).values() if isinstance(found, status.Status)}
    assert names <= set(re.findall(r"^## `?(\w+)", (DOCS / "converged.md").read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        built = target.startswith(("gallery/", "api/", "pictures/"))
        known = [f"api/gpu_ot.{name}.rst" for name in gpu_ot.__all__] + ["gallery/index.rst"]
        known += [f"pictures/{name}" for name in re.findall(r"\w+\.png", (DOCS / "figures.py").read_text())]
        known += [f"gallery/{path.stem}.rst" for path in (DOCS / "examples").glob("*.py")]
        assert target in known if built else (DOCS / target).exists(), target


def test_progress_shows_the_iterations(capsys):
    pytest.importorskip("tqdm")
    seen = []
    problem = gpu_ot.Problem(torch.rand(30, 40), eps=0.01)
    solution = gpu_ot.solve(problem, progress=True, on_check=lambda n_iter, errors: seen.append(n_iter))
    assert f"{seen[-1]} iterations" in capsys.readouterr().err and seen[-1] <= solution.n_iter + 1


def test_the_report_names_versions():
    from gpu_ot.info import describe

    assert f"torch       {torch.__version__}" in describe() and gpu_ot.__version__ in describe()
