"""One page from the rows of every benchmark: tables in Markdown, charts beside them.

    python bench/report.py [--results bench/results] [--out DIR] [--tables]

Reads every *.json in the folder, a list of rows or {"environment": {...}, "rows": [...]}, and writes REPORT.md and its PNGs. It knows no
benchmark by name. A row is a dictionary with named keys; those that mean something here are

    solver (or method)              who ran
    time_s, time_ms, time_us        the median; time_min_*, time_max_* its spread. A row without a time may count passes or iterations
    peak_mib, floor_*               memory above the inputs; the least time that the chip allows
    n, or "n = m = 1000" in case    the size, which runs along the axis of a chart; else whatever starts with eps
    section, case, data, d, tol...  what was asked: rows that agree in all of it share a table
    converged, status               how a run ended
    passed, error, torch_error      a check instead of a measurement
    skipped, error                  why there is no number

and any other key is a column. A time is compared with the fastest gpu_ot row of the same problem and precision, if both ended well.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from measures import SECONDS, Source, Table, Unusable, number, read, tables, unit_of

HARDWARE = ("gpu", "capability", "processors", "clock_ghz", "memory_mib", "cpu", "cores")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table without its empty columns; numbers to the right."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    numeric = [all(re.match(r"^[-<\d].*$|^$", row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header[i] for i in kept) + " |", "|" + "|".join("---:" if numeric[i] else "---" for i in kept) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row[i].replace("|", "\\|") for i in kept) + " |" for row in rows])


def section(table: Table) -> str:
    unit = unit_of([m.value for m in table.measures if m.value]) if table.quantity == "time" else ""
    per = SECONDS.get(unit, 1.0)
    extras = list(dict.fromkeys(key for m in table.measures for key in m.extra))
    alike = [key for key in extras if len(table.measures) > 1 and len({str(m.extra.get(key)) for m in table.measures}) == 1]
    extras = [key for key in extras if key not in alike]
    every = ", ".join(f"{key.replace('_', ' ')} {number(table.measures[0].extra[key])}" for key in alike)
    what = f"median, {unit.replace('us', 'µs')}" if unit else table.quantity
    header = [
        table.axis or "",
        "solver",
        what,
        "min – max",
        "of gpu_ot",
        "floor",
        "peak, MiB",
        *(key.replace("_", " ") for key in extras),
        "ended",
    ]
    lines = []
    for m in sorted(table.measures, key=lambda m: m.x if m.x is not None else 0):
        spread = "" if m.low is None or m.high is None or m.value is None else f"{number(m.low / per)} – {number(m.high / per)}"
        memory = "" if m.peak_mib is None else "<1" if m.peak_mib < 1 else f"{m.peak_mib:.0f}"
        shown = ["" if z is None else number(z / per) for z in (m.value, m.floor)]
        ratio = f"{number(m.against[1])}×" if m.against else ""
        ended = f"**{m.trouble}**" if m.trouble.startswith("NOT") else m.trouble
        numbers = [shown[0], spread, ratio, shown[1], memory, *(number(m.extra[k]) if k in m.extra else "" for k in extras)]
        lines.append(["" if m.x is None else number(m.x), f"**{m.solver}**" if m.ours else m.solver, *numbers, ended])
    return f"### {table.title}\n\n" + (f"All rows: {every}.\n\n" if every else "") + f"{markdown(header, lines)}\n"


def checks(of: Source) -> str:
    """The checks by name and precision: how many passed, and the worst error beside torch's own in that check."""
    lines = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in of.checks:
        groups.setdefault((str(row.get("check", row.get("section", "?"))), str(row.get("precision", ""))), []).append(row)
    for (name, precision), rows in groups.items():
        passed = sum(bool(row["passed"]) for row in rows)
        worst = max((row for row in rows if isinstance(row.get("error"), float)), key=lambda row: row["error"], default=None)
        errors = ["", ""] if worst is None else [number(worst["error"]), number(worst["torch_error"]) if "torch_error" in worst else ""]
        lines.append(
            [name, precision, f"{passed} of {len(rows)}" if passed == len(rows) else f"**{passed} of {len(rows)}: FAILED**", *errors]
        )
    return "### Checks against float64\n\n" + markdown(["check", "precision", "passed", "worst error", "torch's there"], lines) + "\n"


def page(sources: list[Source], charts: dict[str, list[tuple[str, str]]]) -> str:
    """REPORT.md; `charts` gives each source's (title, file)."""
    parts = [
        "# Measurements\n",
        "Written by `bench/report.py` from the JSON files in this folder. Times are medians with their spread beside them; memory is what "
        "a call takes above its inputs. *of gpu_ot*: a peer's time over that of the fastest gpu_ot row on the same problem at the same "
        "precision; above 1, gpu_ot is faster. Runs that did not converge are marked and compared with nobody.\n",
    ]
    for each in sources:
        parts.append(f"## {each.name}\n")
        known = {key: value for key, value in each.environment.items() if value is not None}
        hardware = ", ".join(f"{key} {number(known[key])}" for key in HARDWARE if key in known)
        rest = ", ".join(f"{key} {value}" for key, value in known.items() if key not in (*HARDWARE, "commit", "when", "dry", "max_rss_mib"))
        lines = [("Hardware", hardware), ("Versions", rest), ("Commit", known.get("commit")), ("When", known.get("when"))]
        parts.append("".join(f"- {name}: {text}\n" for name, text in lines if text) or "- the file names no hardware, versions or commit\n")
        if known.get("dry"):
            parts.append("**A dry run in Triton's interpreter: it checks the script. Its times mean nothing and are left out.**\n")
        if each.red:
            left = any("time_ms" in row and not row.get("on_red_tests") for row in each.rows)
            what = "Times of what they check are not reported." if left else "No timings are reported."
            parts.append(f"**Checks of this run failed. {what}**\n")
        if each.checks:
            parts.append(checks(each))
        parts += [f"![{title}]({file})\n" for title, file in charts.get(each.name, [])]
        parts += [section(table) for table in tables(each)]
        absent = sorted({str(row.get("solver")) for row in each.rows if row.get("section") == "peers"})
        if absent:
            parts.append(f"Not installed, hence not measured: {', '.join(absent)}.\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder with the JSON files")
    parser.add_argument("--out", type=Path, help="folder for REPORT.md and the PNGs; by default that of the results")
    parser.add_argument("--tables", action="store_true", help="no charts, and no need for matplotlib")
    args = parser.parse_args(argv)
    out = args.out or args.results
    try:
        if not args.tables and importlib.util.find_spec("matplotlib") is None:
            raise Unusable("charts need matplotlib, which is not installed: pip install gpu_ot[bench], or --tables to go without.")
        sources = read(args.results)
        drawn: dict[str, list[tuple[str, str]]] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not args.tables:
                from charts import draw

                for each in sources:
                    drawn[each.name] = draw(each.name, tables(each), out, _credit(each))
            (out / "REPORT.md").write_text(page(sources, drawn), encoding="utf-8")
        except OSError as problem:
            raise Unusable(
                f"{problem.filename or out} cannot be written ({problem.strerror}). Name a folder of yours: --out DIR."
            ) from None
    except Unusable as refusal:
        print(f"bench/report.py: {refusal}", file=sys.stderr)
        return 2
    print(f"wrote {out / 'REPORT.md'}" + "".join(f"\n      {out / file}" for files in drawn.values() for _, file in files))
    return 0


def _credit(of: Source) -> str:
    """The small print of a chart: where its numbers come from."""
    known = of.environment
    words = [
        known.get("gpu") or known.get("cpu"),
        known.get("cores") and f"{known['cores']} cores",
        known.get("torch") and f"torch {known['torch']}",
    ]
    words += [known.get("triton") and f"triton {known['triton']}", known.get("commit") and f"commit {known['commit']}"]
    return ", ".join(str(w) for w in words if w)


if __name__ == "__main__":
    sys.exit(main())
