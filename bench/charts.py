"""The charts of bench/report.py: time and memory along the size, and every peer beside gpu_ot. 1000 pixels wide."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measures import SECONDS, Measure, Table, unit_of

# Okabe & Ito's palette, which the colour blind tell apart. Colour is the library; marker and dash tell its variants apart, so that
# nothing rests on colour alone.
COLOURS = {
    "gpu_ot": "#0072B2",
    "POT": "#D55E00",
    "flash": "#E69F00",
    "GeomLoss": "#009E73",
    "KeOps": "#CC79A7",
    "torch": "#000000",
    "OTT": "#56B4E9",
}
SPARE = "#7F7F7F"
MARKERS, DASHES = "osD^vPX*", ("-", (0, (5, 2)), (0, (1.2, 1.5)), (0, (5, 1.5, 1.2, 1.5)))
WIDTH, DPI = 6.25, 160  # 1000 pixels
#: More charts than this of one section are panels of one figure, so many side by side.
MANY, ACROSS = 4, 3
STYLE: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "legend.frameon": False,
}  # fmt: skip


def draw(name: str, tables: list[Table], out: Path, credit: str) -> list[tuple[str, str]]:
    """(title, file) of every chart worth drawing of one file of results."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        for section in dict.fromkeys(table.section for table in tables):
            mine = [table for table in tables if table.section == section]
            lines = [table for table in mine if len({m.x for m in _shown(table)}) > 1]
            if len(lines) > MANY:
                title = f"{section}: {lines[0].quantity}"
                drawn.append((title, _save(panels(title, lines, credit), out, f"{name}-{section}" if section != name else name)))
            else:
                for table in lines:
                    figure = along(table, _shown(table), credit)
                    drawn.append((table.title, _save(figure, out, f"{name}-{table.title}" if table.title != name else name)))
            pairs = [(table, m) for table in mine for m in _last(table) if m.against]
            if pairs:
                title = f"{section}: peers beside gpu_ot"
                drawn.append(
                    (title, _save(versus(section, pairs, credit), out, f"{name}-{section}-versus" if section != name else f"{name}-versus"))
                )
    return drawn


def along(table: Table, series: list[Measure], credit: str) -> Figure:
    """Time, and memory where it was measured, against what the rows vary in; logarithmic both ways."""
    timed = table.quantity == "time"
    unit = unit_of([m.value for m in series if m.value]) if timed else ""
    per = SECONDS.get(unit, 1.0)
    remembered = any(m.peak_mib is not None for m in series)
    solvers = list(dict.fromkeys(m.solver for m in series))
    columns = 3 if max(map(len, solvers)) < 26 else 2
    rows = -(-(len(solvers) + 2) // columns)
    figure = Figure(figsize=(WIDTH, 3.1 + 0.18 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2 if remembered else 1, squeeze=False)[0]
    marks = styles(solvers)
    for solver in solvers:
        mine = sorted((m for m in series if m.solver == solver), key=lambda m: m.x or 0)
        look = _line(axes[0], mine, marks[solver], per)
        if remembered and (kept := [m for m in mine if m.peak_mib is not None]):
            axes[1].plot([m.x for m in kept], [max(m.peak_mib or 0, 1.0) for m in kept], **look)
    floors = sorted({(m.x, m.floor / per) for m in series if m.floor and m.x})
    if floors:
        axes[0].plot(
            *zip(*floors, strict=True), linestyle="", marker="_", markersize=16, color="#555555", label="floor of the chip, by precision"
        )
    lost = any(m.trouble for m in series)
    if timed:
        axes[0].set(title="Time: median, bars from least to most")
    axes[0].set_ylabel(f"{table.quantity} [{unit.replace('us', 'µs')}]" if timed else table.quantity)
    if remembered:
        axes[1].set(title="Peak memory above the inputs", ylabel="memory [MiB], at least 1")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="n = m [points]" if table.axis == "n" else table.axis)
        _label(ax, table.points)
    axes[0].plot([], [], linestyle="", marker="x", color="black", label="not converged") if lost else None
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.4, columnspacing=1.6, fontsize=7.5)
    return _headed(figure, table.title, credit)


def panels(title: str, tables: list[Table], credit: str) -> Figure:
    """One small chart for each table, all of one section, under one legend."""
    unit = unit_of([m.value for table in tables for m in _shown(table) if m.value]) if tables[0].quantity == "time" else ""
    solvers = list(dict.fromkeys(m.solver for table in tables for m in _shown(table)))
    rows, marks = -(-len(tables) // ACROSS), styles(solvers)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, ACROSS, squeeze=False, sharey=True).ravel()
    labelled: dict[str, Any] = {}
    for ax, table in zip(axes, tables, strict=False):
        for solver in solvers:
            if mine := sorted((m for m in _shown(table) if m.solver == solver), key=lambda m: m.x or 0):
                _line(ax, mine, marks[solver], SECONDS.get(unit, 1.0))
        ax.set(xscale="log", yscale="log")
        name = table.title.removeprefix(f"{table.section}: ")
        ax.set_title(name, fontsize=7.5 if len(name) < 30 else 5.8)
        _label(ax, table.points)
        ax.tick_params(labelsize=6.5)
        labelled |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    for ax in axes[len(tables) :]:
        ax.set_visible(False)
    if any(m.trouble for table in tables for m in _shown(table)):
        labelled["not converged"] = axes[0].plot([], [], linestyle="", marker="x", color="black")[0]
    figure.supylabel(f"{tables[0].quantity} [{unit.replace('us', 'µs')}]" if unit else tables[0].quantity, fontsize=8)
    for ax in axes[len(tables) - ACROSS : len(tables)]:
        ax.set_xlabel("n = m [points]" if tables[0].axis == "n" else tables[0].axis)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, handlelength=3.4, fontsize=7.5)
    return _headed(figure, title, credit)


def _line(ax: Any, mine: list[Measure], look: dict[str, Any], per: float) -> dict[str, Any]:
    """A solver's rows along the size, with their spread, and a cross where one has not converged."""
    x, y = [m.x for m in mine], [(m.value or 0) / per for m in mine]
    look = dict(look, label=mine[0].solver, linewidth=1.8 if mine[0].ours else 1.2, markersize=5, zorder=3 if mine[0].ours else 2)
    below = [((m.value or 0) - (m.value if m.low is None else m.low)) / per for m in mine]  # type: ignore[operator]
    above = [((m.value if m.high is None else m.high) - (m.value or 0)) / per for m in mine]  # type: ignore[operator]
    ax.errorbar(x, y, yerr=[below, above], capsize=2.5, elinewidth=0.9, **look)
    if lost := [(a, b) for a, b, m in zip(x, y, mine, strict=True) if m.trouble]:
        ax.plot(*zip(*lost, strict=True), linestyle="", marker="x", markersize=11, color="black", zorder=5)
    return look


def versus(section: str, pairs: list[tuple[Table, Measure]], credit: str) -> Figure:
    """How many times gpu_ot's time each peer takes, at the largest size of each problem."""
    figure = Figure(figsize=(WIDTH, 1.25 + 0.26 * (len(pairs) + len({id(t) for t, _ in pairs}))), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    ticks, labels, height = [], [], 0.0
    colour = colours(list(dict.fromkeys(m.solver for _, m in pairs)))
    before = None
    for table, m in pairs:
        if table is not before:
            height -= 1
            size = f"n = {m.x:g}" if table.axis == "n" and m.x else f"{table.axis} = {m.x:g}" if m.x is not None else ""
            ticks.append(height)
            labels.append(f"{table.title}, {size}".removesuffix(", "))
            before, height = table, height - 1
        assert m.against is not None
        ours, ratio = m.against
        ax.barh(height, ratio - 1, left=1, height=0.62, color=colour[m.solver], hatch=None if ratio >= 1 else "////", edgecolor="white")
        ax.annotate(
            f"{ratio:.3g}×",
            (ratio, height),
            xytext=(4 if ratio >= 1 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if ratio >= 1 else "right",
            fontsize=7.5,
        )
        ticks.append(height)
        labels.append(f"{m.solver}  /  {ours}")
        height -= 1
    ratios = [m.against[1] for _, m in pairs if m.against]
    ax.set(
        xscale="log",
        yticks=ticks,
        yticklabels=labels,
        ylim=(height + 0.3, 0),
        xlim=(min(0.7, 0.5 * min(ratios)), max(1.5, 2.2 * max(ratios))),
    )
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.axvline(1, color="black", linewidth=1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("the peer's time / gpu_ot's, same precision")
    for label in ax.get_yticklabels():
        if "  /  " not in label.get_text():
            label.set(fontweight="bold")
    return _headed(figure, f"{section}: peers beside gpu_ot", credit)


def styles(solvers: list[str]) -> dict[str, dict[str, Any]]:
    """A colour for each library, a marker and a dash for each of its variants."""
    colour, seen, found = colours(solvers), dict[str, int](), {}
    for solver in solvers:
        own = colour[solver]
        k = seen[own] = seen.get(own, -1) + 1
        found[solver] = {"color": own, "marker": MARKERS[k % len(MARKERS)], "linestyle": DASHES[k % len(DASHES)]}
        if k % 2:
            found[solver]["markerfacecolor"] = "white"
    return found


def colours(solvers: list[str]) -> dict[str, str]:
    """The library's own colour; who has none takes those that are left, each its own, and grey after the last."""
    found = {solver: next((colour for name, colour in COLOURS.items() if solver.startswith(name)), "") for solver in solvers}
    left = [colour for colour in COLOURS.values() if colour not in found.values()]
    return {solver: colour or (left.pop(0) if left else SPARE) for solver, colour in found.items()}


def _headed(figure: Figure, title: str, credit: str) -> Figure:
    """The title, and under it in small print where the numbers come from."""
    height = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.42 / height))  # type: ignore[union-attr, call-arg]
    figure.text(0.01, 1 - 0.07 / height, title, fontsize=10, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.27 / height, credit, fontsize=6.5, color="#555555", va="top")
    return figure


def _shown(table: Table) -> list[Measure]:
    return [m for m in table.measures if m.value is not None and m.x is not None]


def _last(table: Table) -> list[Measure]:
    last = table.points[-1] if table.points else None
    return [m for m in table.measures if m.x == last]


def _label(ax: Any, points: list[float]) -> None:
    """The measured sizes as ticks, and powers of ten that read as numbers."""
    ax.set_xticks(points, [f"{p / 1000:g}k" if p >= 1000 and p % 100 == 0 else f"{p:g}" for p in points])
    ax.xaxis.set_minor_locator(LogLocator(subs=[]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.08)


def _save(figure: Figure, out: Path, name: str) -> str:
    file = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".png"
    figure.savefig(out / file)
    return file
