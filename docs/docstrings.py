"""From the docstrings as they are written to what Sphinx reads.

The docstrings are made for `help()`: arguments in two columns, formulas indented, code between single backticks. Here arguments become a
list of definitions, formulas literal blocks, and whatever reStructuredText would take for markup is escaped.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

EXAMPLES = Path(__file__).parent / "api_examples.py"

#: `name  text` or `name, other  text`: two columns, at least two spaces between them.
COLUMNS = re.compile(r"^(\w+(?:, \w+)*)\s{2,}(\S.*)$")
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")


def escaped(line: str) -> str:
    """A line of prose: code between backticks becomes literal, and the rest loses its markup."""
    pieces = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{p}`" if p.startswith("`") and len(p) > 1 else MARKUP.sub(r"\\\1", p) for p in pieces)


def converted(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    out: list[str] = []
    kind = "prose"
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            out.append("")
            kind = "prose"
        elif indent == 0 and text.startswith(">>>"):
            out += ["", line] if kind != "doctest" else [line]
            kind = "doctest"
        elif indent == 0 and (found := COLUMNS.match(text)):
            out += ["", *[", ".join(f"``{name}``" for name in found[1].split(", "))], f"   {escaped(found[2])}"]
            kind = "columns"
        elif indent and kind == "columns":
            out.append(f"   {escaped(text)}")
        elif indent:
            out += [] if kind == "literal" else ["", "::", ""]
            out.append(f"   {line}")
            kind = "literal"
        else:
            out += ["", escaped(line)] if kind in ("columns", "literal") else [escaped(line)]
            kind = "prose"
    return out


def as_restructured_text(app, what, name, obj, options, lines):
    """Sphinx's hook: rewrites `lines` in place."""
    if name.startswith("gpu_ot"):
        lines[:] = converted(lines)


@functools.cache
def examples() -> dict[str, str]:
    """The example of each public name, from `api_examples.py`."""
    parts = re.split(r"^# %% (\S+)\n", EXAMPLES.read_text(), flags=re.M)
    return {name: code.strip() for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def add_example(app, what, name, obj, options, lines):
    """Sphinx's hook: appends the name's example."""
    if (code := examples().get(name.removeprefix("gpu_ot."))) and what != "property":
        lines += ["", ".. rubric:: Example", "", ".. code-block:: python", "", *[f"   {line}" for line in code.splitlines()], ""]
