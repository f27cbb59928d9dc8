"""What a row of results says, whichever benchmark wrote it: see report.py for the keys."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
COUNTS = ("passes", "iterations")
NAMES = ("solver", "method", "name")
ASKED = ("section", "case", "protocol", "problem", "data", "cloud", "B", "d", "tol", "penalty", "tau")
ENDED = ("converged", "status", "skipped", "on_red_tests")
SIZE = re.compile(r"\bn = (?:m = )?(\d+),? ?")
PRECISION = re.compile(r"\b(fp64|fp32|tf32|bf16|fp16)\b")


class Unusable(Exception):
    """A folder or a file that cannot be reported, and what to do about it."""


@dataclass
class Measure:
    """A row, understood. Seconds, or a count where there was no time."""

    solver: str
    x: float | None
    value: float | None
    low: float | None
    high: float | None
    peak_mib: float | None
    floor: float | None
    trouble: str  # why the number is missing or is not what was asked; empty when all is well
    extra: dict[str, Any]
    against: tuple[str, float] | None = None  # (the gpu_ot row, this value over its)

    @property
    def ours(self) -> bool:
        return self.solver.startswith("gpu_ot")

    @property
    def precision(self) -> str | None:
        return found[0] if (found := PRECISION.search(self.solver)) else None


@dataclass
class Table:
    """Rows that were asked the same, but for what runs along the axis."""

    title: str
    section: str
    axis: str | None
    quantity: str  # "time" or the count's name
    measures: list[Measure] = field(default_factory=list)

    @property
    def points(self) -> list[float]:
        return sorted({m.x for m in self.measures if m.x is not None})


@dataclass
class Source:
    """One file of results."""

    name: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def red(self) -> bool:
        return any(row.get("passed") is False for row in self.rows)

    @property
    def checks(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "passed" in row]


def read(folder: Path) -> list[Source]:
    if not folder.is_dir():
        raise Unusable(f"there is no folder {folder}. Name the one with the JSON files: --results DIR.")
    found = [source(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise Unusable(f"{folder} holds no JSON files. A benchmark writes one with --out {folder}.")
    return found


def source(path: Path) -> Source:
    again = "Write it again with the benchmark's --out, or move it elsewhere."
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise Unusable(f"{path} is not readable JSON ({problem}). {again}") from None
    rows, environment = (held.get("rows"), held.get("environment", {})) if isinstance(held, dict) else (held, {})
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not isinstance(environment, dict):
        raise Unusable(f'{path} is neither a list of rows nor {{"environment": {{...}}, "rows": [...]}}. {again}')
    return Source(path.stem, environment, rows)


def tables(of: Source) -> list[Table]:
    """Measurements by what was asked, in the order of the file; none of a dry run, whose times mean nothing."""
    if of.environment.get("dry"):
        return []
    rows = [row for row in of.rows if "passed" not in row and row.get("section") not in ("parity", "peers")]
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any], float | None]]] = {}
    axis = _axis(rows)
    for row in rows:
        asked = {
            key: z for key, z in row.items() if z is not None and key != axis and (key in ASKED or key == "n" or key.startswith("eps"))
        }
        x = _number(row.get(axis)) if axis else None
        case = asked.get("case")
        if axis == "n" and x is None and isinstance(case, str) and (sized := SIZE.search(case)):
            x, asked["case"] = int(sized[1]), case.replace(sized[0], "").rstrip(", ")
        found.setdefault(json.dumps(asked, sort_keys=True), []).append((row, asked, x))
    return [_table(of, axis, group) for group in found.values()]


def _axis(rows: list[dict[str, Any]]) -> str | None:
    """The key that takes the most values, of n and of those that start with eps."""
    values: dict[str, set[Any]] = {"n": set()}
    for row in rows:
        sized = SIZE.search(str(row.get("case")))
        values["n"].add(sized[1] if sized else str(row.get("n")))
        for key in row:
            if key.startswith("eps") and _number(row[key]) is not None:
                values.setdefault(key, set()).add(row[key])
    most = max(values, key=lambda key: len(values[key]))
    return most if len(values[most]) > 1 else None


def _number(z: Any) -> float | None:
    return z if isinstance(z, (int, float)) and not isinstance(z, bool) else None


def _table(of: Source, axis: str | None, group: list[tuple[dict[str, Any], dict[str, Any], float | None]]) -> Table:
    asked = group[0][1]
    words = [value if isinstance(value, str) else f"{key} = {number(value)}" for key, value in asked.items()]
    timed = any(_seconds(row, "time")[0] is not None for row, _, _ in group)
    quantity = "time" if timed else next((key for key in COUNTS if any(key in row for row, _, _ in group)), "value")
    title = ", ".join(words).replace(", ", ": ", "section" in asked and len(words) > 1)
    table = Table(title or of.name, str(asked.get("section", of.name)), axis, quantity)
    for row, _, x in group:
        table.measures.append(_measure(row, x, axis, quantity))
    for point in {m.x for m in table.measures}:
        _compare([m for m in table.measures if m.x == point])
    return table


def _measure(row: dict[str, Any], x: float | None, axis: str | None, quantity: str) -> Measure:
    name = next((key for key in NAMES if key in row), None)
    (value, used), (low, also), (high, too), (floor, last) = (_seconds(row, stem) for stem in ("time", "time_min", "time_max", "floor"))
    if quantity != "time":
        value = _number(row.get(quantity))
    trouble = _trouble(row) or ("no number" if value is None else "")
    known = {
        name,
        axis,
        used,
        also,
        too,
        last,
        quantity,
        "n",
        "peak_mib",
        *ASKED,
        *ENDED,
        *(["error"] if isinstance(row.get("error"), str) else []),
    }
    extra = {key: z for key, z in row.items() if key not in known and not key.startswith("eps") and z is not None}
    if row.get("on_red_tests"):
        value = low = high = None
    return Measure(str(row.get(name, "?")), x, value, low, high, _number(row.get("peak_mib")), floor, trouble, extra)


def _seconds(row: dict[str, Any], stem: str) -> tuple[float | None, str | None]:
    for unit, size in SECONDS.items():
        if (value := _number(row.get(key := f"{stem}_{unit}"))) is not None:
            return value * size, key
    return None, None


def _trouble(row: dict[str, Any]) -> str:
    if row.get("on_red_tests"):
        return "not reported: checks of this run failed"
    for key in ("skipped", "error"):
        if isinstance(row.get(key), str):
            return f"{'failed: ' if key == 'error' else ''}{row[key]}"
    status = row.get("status")
    if row.get("converged") is False or (isinstance(status, str) and status != "converged"):
        return "NOT CONVERGED" + (f" ({status})" if isinstance(status, str) and status != "converged" else "")
    return ""


def _compare(measures: list[Measure]) -> None:
    """Each peer beside the fastest gpu_ot row of its precision; who did not end well is compared with nobody."""
    good = [m for m in measures if m.value and not m.trouble]
    for peer in good:
        same = [m for m in good if m.ours and m.precision == peer.precision and m.precision]
        if same and not peer.ours:
            best = min(same, key=lambda m: m.value or math.inf)
            peer.against = best.solver, peer.value / best.value  # type: ignore[operator]


def unit_of(seconds: list[float]) -> str:
    typical = statistics.median(seconds or [1.0])
    return "s" if typical >= 1 else "ms" if typical >= 1e-3 else "us"


def number(value: Any) -> str:
    """Three digits; whole numbers whole."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
