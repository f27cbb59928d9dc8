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
    versions = ", ".join(
        f"{key} {env[key]}" for key in ("python", "torch", "numpy", "pot", "geomloss", "pykeops", "jax", "ott-jax") if env.get(key)
    )
    return f"{env['cpu']}, {env['cores']} cores; {versions}; gpu_ot at commit {env['commit']}."


def dense_cpu() -> str:
    found = read("dense_cpu")
    solvers = list(dict.fromkeys(row["solver"] for row in found["rows"]))
    by = {(row["n"], row["solver"]): row for row in found["rows"]}
    rows = []
    for n in dict.fromkeys(row["n"] for row in found["rows"]):
        rows.append([str(n), *[f"{by[n, s]['time_s']:.3g} s, {by[n, s]['peak_mib']:.0f} MiB" if (n, s) in by else "" for s in solvers]])
    return table(["n = m", *solvers], rows)


def small_cpu() -> str:
    """Medians of the calls between arrays."""
    rows = [row for row in read("small_cpu")["rows"] if row["section"] == "arrays"]
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    by = {(row["n"], row["case"], row["solver"]): row["time_ms"] for row in rows}
    cases = dict.fromkeys((row["n"], row["case"]) for row in rows)
    return table(["n = m, problem", *solvers], [[f"{n}, {case}", *[f"{by[n, case, s]:.3g}" for s in solvers]] for n, case in sorted(cases)])


def convergence() -> str:
    """Sweeps at n = 600 to 1e-3; what did not get there is more than the last that was counted."""
    rows = [row for row in read("convergence")["rows"] if row["n"] == 600 and row["tol"] == 1e-3]
    solvers = ("gpu_ot auto, log-domain", "gpu_ot plain", "POT sinkhorn_log", "OTT-JAX Anderson", "OTT-JAX momentum")
    by = {(row["data"], row["eps_std"], row["solver"]): row for row in rows}

    def cell(row: dict) -> str:
        return f"{row['passes']}" if row["converged"] else f"> {row['passes']}"

    cases = [case for case in dict.fromkeys((row["data"], row["eps_std"]) for row in rows) if all((*case, s) in by for s in solvers)]
    return table(["data, eps / std", *solvers], [[f"{data}, {eps}", *[cell(by[data, eps, s]) for s in solvers]] for data, eps in cases])


def clouds_cpu() -> str:
    rows = read("clouds_cpu")["rows"]
    return table(
        ["solver", "seconds", "marginal error left"],
        [[row["solver"], f"{row['time_s']:.3g}", f"{row['marginal_error']:.1%}"] for row in rows],
    )


def gradients() -> str:
    rows = read("gradients")["rows"]
    lines = [
        [f"{row['solver']}, gradient in {row['given']}, n = {row['n']}", f"{row['sweeps']:.2f}", f"{row['peak_mib']:.1f}"] for row in rows
    ]
    return table(["backend", "sweeps", "peak memory above the inputs, MiB"], lines)


def tables() -> dict[str, str]:
    """By the name under which a page asks for it."""
    made = {found.__name__: found for found in (dense_cpu, small_cpu, convergence, clouds_cpu, gradients)}
    return {name: found() for name, found in made.items()} | {f"{name}_machine": machine(read(name)) for name in made}
