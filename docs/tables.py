"""Tables of the benchmark pages, made from the committed rows: no number is written by hand."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine(found: dict) -> str:
    """Where and with which versions it was measured."""
    env = found["environment"]
    versions = ", ".join(f"{key} {env[key]}" for key in ("python", "torch", "numpy", "pot", "geomloss", "pykeops", "jax", "ott") if env.get(key))
    return f"{env['cpu']}, {env['cores']} cores; {versions}; gpu_ot at commit {env['commit']}."


def dense_cpu() -> str:
    found = read("dense_cpu")
    solvers = list(dict.fromkeys(row["solver"] for row in found["rows"]))
    by = {(row["n"], row["solver"]): row for row in found["rows"]}
    rows = []
    for n in dict.fromkeys(row["n"] for row in found["rows"]):
        rows.append([str(n), *[f"{by[n, s]['time_s']:.3g} s, {by[n, s]['peak_mib']:.0f} MiB" if (n, s) in by else "" for s in solvers]])
    return table(["n = m", *solvers], rows)


def tables() -> dict[str, str]:
    """By the name under which a page asks for it."""
    return {"dense_cpu": dense_cpu(), "dense_cpu_machine": machine(read("dense_cpu"))}
