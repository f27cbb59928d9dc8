"""The command line and the demo: what is printed, what is drawn, and that the map is the plan's."""

import contextlib
import io
import sys

import pytest
import torch

import gpu_ot
from gpu_ot.cli import main
from problems import generator

demo = pytest.importorskip("gpu_ot.demo", reason="pip install gpu_ot[demo]")
imread = pytest.importorskip("matplotlib.image").imread

PIXELS, REG = 120, 5e-3


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(the PNG's path, what was printed) of one small run."""
    path, printed = tmp_path_factory.mktemp("demo") / "new folder" / "demo.png", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--pixels", str(PIXELS), "--reg", str(REG), "--out", str(path)]) == 0
    return path, printed.getvalue()


def clouds(n):
    """Two samples, and the cost between them."""
    gen = generator(1)
    x, y = (demo.sample(photo, n, gen) for photo in demo.photographs())
    return x, y, gpu_ot.SqEuclidean(x, y).dense()


def test_picture_shows_the_photographs_and_the_exchange(shown):
    path, printed = shown
    assert f"wrote {path}" in printed
    assert path.stat().st_size < 1.2e6
    image = torch.tensor(imread(path))[..., :3]
    height, width, _ = image.shape
    assert len((image.reshape(-1, 3) * 255).int().unique(dim=0)) > 10_000
    # By position, without the titles: china is bright and flower dark, and each result is as bright as the other's original.
    middle = slice(height // 8, 3 * height // 8), slice(5 * height // 8, 7 * height // 8)
    left = slice(width // 20, 5 * width // 20), slice(8 * width // 20, 12 * width // 20)
    (china, china_after), (flower, flower_after) = [[float(image[down, across].mean()) for across in left] for down in middle]
    assert china > china_after + 0.1
    assert flower < flower_after - 0.1


def test_table_has_four_solvers_that_agree(shown):
    printed = shown[1]
    lines = [line for line in printed.splitlines() if line.startswith(("POT ", "gpu_ot "))]
    names, numbers = zip(*((line[:20].strip(), line[20:].split(maxsplit=4)) for line in lines), strict=True)
    assert names == ("POT sinkhorn", "POT sinkhorn_log", "gpu_ot fp64, cpu", "gpu_ot fp32, cpu")
    iterations, errors, differences, ended = zip(*(row[1:] for row in numbers), strict=True)
    assert iterations[1] == iterations[2]
    assert max(map(float, errors)) < 2 * demo.TOLERANCE * PIXELS**0.5  # |z|_1 <= sqrt(n) |z|_2
    assert differences[1] == "reference" and ended[2:] == ("converged", "converged")
    # Rounding moves exponents of at most 3 / reg by a few last digits of them, and entries by as much, relatively.
    for difference, dtype in ((differences[2], torch.float64), (differences[3], torch.float32)):
        assert float(difference) <= 10 * torch.finfo(dtype).eps * (3 / REG) / PIXELS


def test_map_on_the_sample_is_the_barycentric_map_of_the_plan():
    """Both ways, from the drop-in's scalings and from the potentials of `solve`; converged or not."""
    x, y, C = clouds(80)
    a = torch.full((80,), 1 / 80, dtype=torch.float64)
    P, log = gpu_ot.sinkhorn(a, a, C, REG, method="sinkhorn_log", numItermax=50, warn=False, log=True)
    rows, columns = (P @ y) / P.sum(1, keepdim=True), (P.T @ x) / P.sum(0).unsqueeze(-1)
    torch.testing.assert_close(demo.extend(x, y, log["log_v"], REG), rows, rtol=0, atol=1e-8)
    torch.testing.assert_close(demo.extend(y, x, log["log_u"], REG), columns, rtol=0, atol=1e-8)

    solution = gpu_ot.solve(gpu_ot.Problem(C, REG))
    ours = (solution.plan @ y) / solution.plan.marginals[0].unsqueeze(-1)
    torch.testing.assert_close(demo.extend(x, y, solution.g / REG, REG), ours, rtol=0, atol=1e-8)


def test_all_pixels_take_part_where_the_mesh_serves(shown):
    """The printed line says so. A map between all pixels brings back the mean colour of the other photograph; a sample's cannot, quite."""
    if gpu_ot.compiled.refused():
        pytest.skip("needs numba")
    assert "all 273280 pixels of each photograph" in shown[1] and "marginals off by" in shown[1]
    china, flower = (photo[::4, ::4].contiguous() for photo in demo.photographs())
    painted = demo.every_pixel(china, flower, REG, torch.device("cpu"))
    for mine, other in zip(painted, (flower, china), strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine.mean((0, 1)), other.mean((0, 1)), rtol=0, atol=demo.EVERY_PIXEL_TOL)
    assert demo.every_pixel(china, flower, 1e-8, torch.device("cpu")) is None


def test_table_says_what_pot_warned_about(monkeypatch):
    """At a reg this small exp(-C / reg) is 0 for most pairs; ours says how it ended in every case."""
    _, _, C = clouds(40)
    monkeypatch.setattr(demo, "MAX_ITER", 100)
    knopp, _, double, single = demo.compare(C, 1e-4, torch.device("cpu"))
    assert knopp.ended.startswith("warned: ")
    assert {double.ended, single.ended} <= {"converged", "max_iter", "stalled"}
    text = demo.table([knopp, knopp, double, single], C, 1e-4)
    assert knopp.ended in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device cpu works"),
        (["--pixels", "1"], "--pixels must be between 2 and"),
        (["--pixels", "1000000"], "--pixels must be between 2 and"),
        (["--reg", "0"], "--reg must be a finite number > 0"),
        (["--reg", "nan"], "--reg must be a finite number > 0"),
        (["--out", "{folder}"], "cannot be written"),
        (["--out", "{file}/demo.png"], "cannot be written"),
    ],
)
def test_refusals_are_one_line(arguments, says, tmp_path, capsys):
    (tmp_path / "file").touch()
    names = dict(folder=tmp_path, file=tmp_path / "file")
    assert main(["demo", "--out", str(tmp_path / "demo.png"), *(word.format(**names) for word in arguments)]) == 2
    printed, refusal = capsys.readouterr()
    assert printed == ""
    assert says in refusal and refusal.count("\n") == 1
    assert not (tmp_path / "demo.png").exists()


@pytest.mark.parametrize("module, package", [("matplotlib.figure", "matplotlib"), ("sklearn.datasets", "scikit-learn")])
def test_missing_package_names_the_extra(module, package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.delitem(sys.modules, "gpu_ot.demo")
    monkeypatch.delattr(gpu_ot, "demo")
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"gpu-ot: the demo needs {package}, which is not installed: pip install gpu_ot[demo]\n"


def test_version_help_and_unparsable_options(capsys):
    for arguments, code in ((["--version"], 0), (["demo", "--pixels", "many"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    printed, refusal = capsys.readouterr()
    assert printed == f"gpu_ot {gpu_ot.__version__}\n" and "--pixels" in refusal and refusal.count("\n") == 1
    assert main([]) == 0 and "demo" in capsys.readouterr().out
