"""POT's own names where ours are missing. POT is imported when one of them is used, and never before."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

#: These names of a module may be POT's: `from gpu_ot.pot import *` is `from ot import *`.
BOOKKEEPING = ("__all__", "__version__")


def forward(ours: str, theirs: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of our module `ours`, which replaces POT's module `theirs`."""

    def look_up(name: str) -> Any:
        if name.startswith("__") and name not in BOOKKEEPING:  # inspection reads such names of every module
            raise AttributeError(f"module {ours!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(theirs)
        except ImportError as missing:
            raise ImportError(f"{ours}.{name} would be POT's own, and POT cannot be imported ({missing}): pip install pot") from missing
        if not (hasattr(module, name) or name.startswith("_")) and find_spec(f"{theirs}.{name}"):
            return importlib.import_module(f"{theirs}.{name}")  # POT does not import ot.plot, for instance
        if not hasattr(module, name):
            raise AttributeError(f"module {ours!r} has no attribute {name!r}, and POT has no {theirs}.{name}")
        return getattr(module, name)

    def names() -> list[str]:
        own = set(vars(importlib.import_module(ours)))
        return sorted(own | set(dir(importlib.import_module(theirs)))) if find_spec("ot") else sorted(own)

    return look_up, names


class Ours(ModuleType):
    """The functions of `module` that are ours, as the module `name`. For POT's own names, an error says where they are."""

    def __init__(self, name: str, module: ModuleType) -> None:
        super().__init__(name, module.__doc__)
        self.__all__ = list(module.__all__)
        vars(self).update({function: getattr(module, function) for function in self.__all__})
        vars(self)["__getattr__"] = missing(name, module.__name__)


def missing(ours: str, way: str) -> Callable[[str], Any]:
    """`__getattr__` of the module `ours`: an AttributeError that points to `way` for the names that POT has."""

    def refuse(name: str) -> Any:
        message = f"module {ours!r} has no attribute {name!r}"
        # `from gpu_ot import plots` reads the attribute before it imports the module.
        if not name.startswith("_") and find_spec(f"gpu_ot.{name}") is None:
            try:
                pots = hasattr(importlib.import_module(way), name)
            except ImportError:  # POT is not installed
                pots = True
            if pots:
                message += f": it is POT's own, {way}.{name}. `import gpu_ot.pot as ot` has all of POT's names."
        raise AttributeError(message)

    return refuse
