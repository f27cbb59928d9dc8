"""The page and the charts that bench/report.py makes of rows: what they say, and what they refuse to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def report():
    """The script as a module: its folder is no package, and on the path only where it is run."""
    sys.path.insert(0, str(BENCH))
    try:
        import report

        yield report
    finally:
        sys.path.remove(str(BENCH))


def timing(solver, n, ms, **more):
    return dict(solver=solver, n=n, time_ms=ms, time_min_ms=0.5 * ms, time_max_ms=2 * ms, peak_mib=n / 10) | more


ROWS = [
    *(timing("gpu_ot fp32", 100, 1.0), timing("gpu_ot fp64", 100, 2.0), timing("POT fp32", 100, 4.0)),
    timing("gpu_ot fp32", 1000, 10.0, status="converged"),
    timing("gpu_ot fp64", 1000, 30.0),
    timing("POT fp32", 1000, 25.0, status="max_iter"),
    timing("POT fp64", 1000, 45.0),
    dict(solver="OTT", n=1000, error="OutOfTime: took more than 8 s"),
]


def write(folder, name, rows, **environment):
    (folder / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": rows} if environment else rows))


def made(report, folder, *options):
    """The page that the script makes of a folder."""
    assert report.main(["--results", str(folder), *options]) == 0
    return (folder / "REPORT.md").read_text()


def lines(page, *words):
    return [line for line in page.splitlines() if all(word in line for word in words)]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_gives_medians_spread_memory_and_where_they_come_from(report, tmp_path, capsys):
    write(tmp_path, "speed", ROWS, cpu="a chip", cores=4, torch="2.13.0", commit="abc1234")
    page = made(report, tmp_path)
    assert "Hardware: cpu a chip, cores 4" in page and "torch 2.13.0" in page and "Commit: abc1234" in page
    header = cells(lines(page, "solver", "median")[0])
    assert header == ["n", "solver", "median, ms", "min – max", "of gpu_ot", "peak, MiB", "ended"]
    assert cells(lines(page, "| 100 |", "POT fp32")[0]) == ["100", "POT fp32", "4", "2 – 8", "4×", "10", ""]
    assert cells(lines(page, "| 1000 |", "gpu_ot fp64")[0]) == ["1000", "**gpu_ot fp64**", "30", "15 – 60", "", "100", ""]
    printed = capsys.readouterr().out
    for file in ("REPORT.md", "speed.png", "speed-versus.png"):
        assert (f"]({file})" in page or file == "REPORT.md") and str(tmp_path / file) in printed and (tmp_path / file).exists()


def test_equal_precision_only_and_nobody_is_compared_with_a_run_that_did_not_converge(report, tmp_path):
    write(tmp_path, "speed", ROWS)
    page = made(report, tmp_path, "--tables")
    assert "1.5×" in lines(page, "POT fp64")[0], "45 ms of float64 against 30 of float64, not 10 of float32"
    lost = cells(lines(page, "| 1000 |", "POT fp32")[0])
    assert lost[4] == "" and lost[-1] == "**NOT CONVERGED (max_iter)**" and lost[2] == "25"
    failed = cells(lines(page, "OTT")[0])
    assert failed[2] == "" and failed[-1] == "failed: OutOfTime: took more than 8 s"
    assert not list(tmp_path.glob("*.png"))


def test_sizes_and_units_are_read_from_what_gpu_py_writes(report, tmp_path):
    """n stands in the text of the case there, the least time and the clock's units in the keys; rows of d = 3 and 64 do not mix."""
    rows = []
    for d in (3, 64):
        for n in (1000, 10_000):
            common = dict(section="iterations", case=f"forward, n = m = {n}, d = {d}, per iteration", floor_ms=n / 1e6)
            rows += [common | dict(solver=f"{name} fp32", time_ms=d * n / rate) for name, rate in (("gpu_ot kernels", 1e4), ("POT", 2e3))]
    rows.append(dict(section="parity", check="softmin", precision="fp32", passed=True, error=1e-7, torch_error=2e-7))
    rows.append(dict(section="peers", case="absent", solver="OTT-JAX", skipped="not installed"))
    write(tmp_path, "gpu", rows, gpu="H200")
    page = made(report, tmp_path)
    titles = [line.removeprefix("### ") for line in lines(page, "### ")]
    assert titles == ["Checks against float64", *(f"iterations: forward, d = {d}, per iteration" for d in (3, 64))]
    assert cells(lines(page, "| 10000 |", "POT fp32")[1]) == ["10000", "POT fp32", "320", "5×", "0.01"]
    assert cells(lines(page, "| softmin |")[0]) == ["softmin", "fp32", "1 of 1", "1e-07", "2e-07"]
    assert "not measured: OTT-JAX" in page


def test_no_timings_on_red_tests_and_none_of_a_dry_run(report, tmp_path):
    red = [dict(check="softmin", passed=False, error=1.0), *(row | {"section": "speed", "on_red_tests": True} for row in ROWS)]
    write(tmp_path, "red", red, gpu="H200")
    write(tmp_path, "wet", [dict(check="softmin", passed=True, error=1.0), *ROWS], dry=True)
    page = made(report, tmp_path)
    assert "**0 of 1: FAILED**" in page and "No timings are reported" in page and "left out" in page
    assert "2 – 8" not in page and not list(tmp_path.glob("*.png"))
    assert len(lines(page, "not reported: checks of this run failed")) == len(ROWS)


def test_counts_along_eps(report, tmp_path):
    """Rows without a time: passes, against the eps that varies while n does not."""
    counts = [(eps, method, first / eps) for eps in (0.1, 0.01) for method, first in (("plain", 20), ("gpu_ot", 3))]
    rows = [dict(data="cube", n=600, eps_over_std=eps, method=method, passes=int(passes)) for eps, method, passes in counts]
    write(tmp_path, "convergence", rows)
    page = made(report, tmp_path)
    assert cells(lines(page, "| 0.01 |", "plain")[0]) == ["0.01", "plain", "2000"]
    assert (tmp_path / "convergence-cube-n-600.png").exists()


def test_many_charts_of_one_section_are_panels_of_one_figure(report, tmp_path):
    rows = [dict(row, section="speed", case=f"case {k}") for k in range(5) for row in ROWS]
    write(tmp_path, "many", rows)
    page = made(report, tmp_path)
    assert page.count("](many-speed.png)") == 1 and sorted(f.name for f in tmp_path.glob("*.png")) == [
        "many-speed-versus.png",
        "many-speed.png",
    ]


def test_charts_of_the_rows_kept_here(report, tmp_path):
    """At least 1000 pixels wide, colours that are there, and a page that names each picture."""
    kept = BENCH / "results" / "dense_cpu.json"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / kept.name).write_text(kept.read_text())
    assert report.main(["--results", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "REPORT.md").read_text()
    rows = json.loads(kept.read_text())["rows"]
    assert len(lines(page, "| ", "fp")) == len(rows)
    for file in ("dense-cpu.png", "dense-cpu-versus.png"):
        assert f"]({file})" in page
        image = imread(tmp_path / "out" / file)[..., :3]
        assert image.shape[1] == 1000
        vermillion = (abs(image * 255 - (0xD5, 0x5E, 0x00)).max(-1) < 2).sum()
        assert vermillion > 500, "POT's curves are drawn"
        assert (image[:, [0, -1]] == 1).all(), "nothing is cut off at the sides"


def test_a_chart_marks_what_did_not_converge(report):
    import charts
    import measures

    (table,) = measures.tables(measures.Source("speed", {}, ROWS))
    series = [m for m in table.measures if m.value is not None]
    figure = charts.along(table, series, "")
    time, memory = figure.axes
    crosses = [line for line in time.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [tuple(line.get_xydata()[0]) for line in crosses] == [(1000, 25.0)]
    assert "ms" in time.get_ylabel() and "MiB" in memory.get_ylabel() and time.get_xscale() == time.get_yscale() == "log"
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {"gpu_ot fp32", "gpu_ot fp64", "POT fp32", "POT fp64", "not converged"}
    looks = charts.styles(["gpu_ot fp32", "gpu_ot fp64", "POT fp32", "who knows", "nobody"])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 5


@pytest.mark.parametrize(
    "content, says",
    [("{", "not readable JSON"), ('{"rows": 3}', "neither a list of rows"), ("[1, 2]", "neither a list of rows"), (None, "no JSON files")],
)
def test_refusals_are_one_line_with_a_way_out(report, tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / "broken.json").write_text(content)
    assert report.main(["--results", str(tmp_path)]) == 2
    printed, refusal = capsys.readouterr()
    assert printed == "" and says in refusal and "--out" in refusal and refusal.count("\n") == 1
    assert not (tmp_path / "REPORT.md").exists()


def test_missing_folders_and_places_that_cannot_be_written(report, tmp_path, capsys):
    assert report.main(["--results", str(tmp_path / "nowhere")]) == 2
    assert "--results DIR" in capsys.readouterr().err
    write(tmp_path, "speed", ROWS)
    (tmp_path / "file").touch()
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_matplotlib_it_says_so_and_tables_still_work(report, tmp_path, capsys, monkeypatch):
    write(tmp_path, "speed", ROWS)
    find = report.importlib.util.find_spec
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "pip install gpu_ot[bench]" in capsys.readouterr().err
    assert report.main(["--results", str(tmp_path), "--tables"]) == 0


def test_the_day_with_a_gpu_ends_at_once_without_one():
    """As a user calls it, from anywhere: nothing is measured, and that is no failure."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(BENCH / "gpu.py")], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and "nothing measured" in done.stdout, done.stderr


DRIVER = """
import sys
sys.argv = ["gpu.py", "--dry"]
sys.path.insert(0, "bench")
import rows
report = rows.Report(None)
report.rows = [
    dict(section="parity", check="apply", kernel="apply fp32", passed=False),
    dict(section="parity", check="softmin", kernel="softmin fp32", passed=True),
]
names = ["gpu_ot kernels fp32", "gpu_ot solve fp32", "gpu_ot kernels tf32", "gpu_ot resident fp32", "gpu_ot.sinkhorn fp64", "POT fp32"]
print([rows.red(dict(section="s", solver=name, time_ms=1.0), report.failed()) for name in names])
report.rows[0]["kernel"] = ""
print([rows.red(dict(section="s", solver=name, time_ms=1.0), report.failed()) for name in names])
"""


def test_a_failed_check_is_red_for_what_needs_it():
    """A kernel that errs takes with it the times of what runs it; a failure that names none those of everything of ours."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=BENCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str([False, True, False, False, False, False]), str([True, True, True, True, True, False])]


@pytest.mark.slow
def test_the_day_with_a_gpu_is_rehearsed_to_its_end(tmp_path):
    """Every stage on a device that is not there: kernels launched and right, no contestant of ours that fails, and a plan that fits."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, str(BENCH / "gpu.py"), "--dry", "--out", str(tmp_path)], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"] for row in rows} >= {"parity", "iterations", "dense", "batched", "tolerance", "giant", "graphs"}
    checked = {row["kernel"] for row in rows if "passed" in row}
    assert checked >= {"triton", "dense", "resident", "step", "graphs", "softmin fp32", "apply fp32"}
    assert not [row for row in rows if str(row.get("solver", "")).startswith("gpu_ot") and "error" in row]
    planned = [line.split() for line in done.stdout.splitlines() if line.startswith("in all")]
    assert float(planned[0][2]) <= 9 * 60


@pytest.mark.slow
def test_the_table_of_kernels_compiles_without_spills_and_within_its_bars():
    """What the compiler makes of the kernels, offline; the table counts what that of Triton 3.9 issues."""
    pytest.importorskip("triton", minversion="3.9")
    pytest.importorskip("triton.backends.nvidia")
    done = subprocess.run([sys.executable, "bench/static.py", "--quick"], cwd=BENCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
