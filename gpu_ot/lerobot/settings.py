"""What every configuration does: it reads JSON, YAML and the command line, writes what it can read, and refuses in words."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, ClassVar, TypeVar

from ..errors import ProblemError, unknown

_S = TypeVar("_S", bound="Settings")


def bounded(default: Any, **bounds: Any) -> Any:
    """A field that holds a number within these bounds of `number`; None as well where that is its default."""
    return field(default=default, metadata={"whole": False} | bounds)


def choice(default: str | None, known: Iterable[str]) -> Any:
    """A field that holds one of these words; None as well where that is its default."""
    return field(default=default, metadata={"known": tuple(known)})


@dataclass
class Settings:
    """Reading, writing and refusing, once for all of them: fields of truth values, text and `bounded` numbers are checked."""

    INSIDE: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            given = getattr(self, f.name)
            if given is None and "None" in str(f.type):
                continue
            if "known" in f.metadata:
                if given not in f.metadata["known"]:
                    raise unknown(f.name, given, f.metadata["known"])
            elif f.metadata:
                setattr(self, f.name, number(f.name, given, **f.metadata))
            elif str(f.type).startswith("bool") and not isinstance(given, bool):
                raise ProblemError(f"{f.name} must be true or false, found {given!r}.")
            elif str(f.type).startswith("str"):
                if not isinstance(given, (str, PurePath)):
                    raise ProblemError(f"{f.name} must be text, found {given!r}.")
                setattr(self, f.name, str(given))

    @classmethod
    def from_dict(cls: type[_S], given: Mapping[str, Any]) -> _S:
        """From keys and values as a JSON or YAML file has them. Raises ProblemError for a key that is not known, with the nearest."""
        if not isinstance(given, Mapping):
            raise ProblemError(f"{cls.__name__} is made of keys and values, found {type(given).__name__}: {given!r:.80}")
        parameters = inspect.signature(cls).parameters
        for key in given:
            if key not in parameters:
                near = difflib.get_close_matches(str(key), list(parameters), 1, 0.5)
                hint = f'did you mean "{near[0]}"?' if near else f"it has {', '.join(parameters)}."
                raise ProblemError(f'{cls.__name__} has no key "{key}": {hint}')
        if missing := [key for key, p in parameters.items() if p.default is p.empty and key not in given]:
            raise ProblemError(f"{cls.__name__} needs {' and '.join(missing)}, found only {', '.join(given) or 'nothing'}.")
        return cls(**given)

    @classmethod
    def from_file(cls: type[_S], path: str | Path, overrides: Iterable[str] = ()) -> _S:
        """From a .json, .yaml or .yml file, with single values in its place, see `overridden`. Raises ProblemError naming the file."""
        try:
            return cls.from_dict(overridden(cls._found_in(read(path)), overrides, cls._place))
        except ProblemError as problem:
            raise ProblemError(f"{path}: {problem}") from None

    @classmethod
    def _found_in(cls, given: Any) -> Any:
        """The part of a file that is meant: under the keys of INSIDE where they are, as in the file of a whole training."""
        for key in cls.INSIDE:
            given = given[key] if isinstance(given, Mapping) and isinstance(given.get(key), Mapping) else given
        return given

    @classmethod
    def _place(cls, key: str) -> list[str]:
        """Where a key of the command line belongs."""
        return [key]

    def to_dict(self) -> dict[str, Any]:
        """Keys and values that `from_dict` reads, and a JSON or YAML file can hold."""
        return dataclasses.asdict(self)


def made(kind: type[_S], given: Any, name: str) -> list[_S]:
    """A list of settings, each as itself or as keys and values."""
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise ProblemError(f"{name} must be a list, each with the keys of {kind.__name__}; found {given!r:.80}.")
    return [each if isinstance(each, kind) else kind.from_dict(each) for each in given]


def needed(module: str, why: str) -> ModuleType:
    """A module that is not always installed. Raises ProblemError with `why`; {} in it becomes the name of what is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ProblemError(why.format(missing.name)) from None


def read(path: str | Path) -> Any:
    """What a JSON or YAML file holds. YAML needs PyYAML, which LeRobot brings."""
    path = Path(path)
    kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    try:
        text = path.read_text(encoding="utf-8")
        return _yaml(text) if kind == "YAML" else json.loads(text, object_pairs_hook=_distinct)
    except OSError as problem:
        raise ProblemError(f"it cannot be read: {problem.strerror}.") from None
    except UnicodeDecodeError as problem:
        raise ProblemError(f"it is not UTF-8: byte {problem.start} is {problem.object[problem.start]:#x}. Save it as UTF-8.") from None
    except RecursionError:
        raise ProblemError(f"its {kind} is nested too deeply for a configuration, which has four levels.") from None
    except json.JSONDecodeError as problem:
        raise ProblemError(f"it is not JSON: {problem}") from None


def _distinct(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    if odd := [key for key in keys if not isinstance(key, Hashable)]:
        raise ProblemError(f"{odd[0]!r:.80} cannot be a key.")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ProblemError(f'the key "{twice[0]}" is there twice, and one of the values would be lost. Keep one.')
    return dict(pairs)


def _yaml(text: str) -> Any:
    yaml = needed("yaml", "reading YAML needs PyYAML: pip install pyyaml, or write the same keys as JSON.")

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            plain = [(key, value) for key, value in node.value if not key.tag.endswith(":merge")]
            _distinct([(self.construct_object(key, deep=True), None) for key, _ in plain])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as problem:
        raise ProblemError(f"it is not YAML: {problem}") from None


def overridden(given: Any, overrides: Iterable[str], place: Callable[[str], list[str]]) -> Any:
    """Keys and values with those of "--ot.features.0.weight_embed=1" in place, read as JSON, else as text; `place` is of a first key."""
    for each in overrides:
        match = re.fullmatch(r"--ot\.([\w.]+)=(.*)", each, re.DOTALL)
        if match is None or not isinstance(given, Mapping):
            raise ProblemError(f"{each} is not understood: single values of the configuration are set by --ot.KEY=VALUE.")
        (first, *rest), text = match[1].split("."), match[2]
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        given = _set(given, [*place(first), *rest], value, each)
    return given


def _set(node: Any, path: Sequence[str], value: Any, text: str) -> Any:
    if not path:
        return value
    if isinstance(node, list):
        if not path[0].isdigit() or int(path[0]) >= len(node):
            raise ProblemError(f'{text}: there are {len(node)} in the list, numbered from 0, and no "{path[0]}".')
        k = int(path[0])
        return [*node[:k], _set(node[k], path[1:], value, text), *node[k + 1 :]]
    if node is not None and not isinstance(node, Mapping):
        raise ProblemError(f'{text}: there is nothing under a value, found "{path[0]}" under {node!r:.40}.')
    node = dict(node or {})
    return node | {path[0]: _set(node.get(path[0]), path[1:], value, text)}


def number(name: str, given: Any, least: float = -math.inf, above: float = -math.inf, most: float = math.inf, whole: bool = False) -> Any:
    """`given` as a float, or an int for a whole number. Raises ProblemError for what is none, or outside its bounds."""
    try:
        value = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (least <= value < math.inf and above < value <= most):
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        wanted = "a share from 0 to 1" if (least, most) == (0, 1) else f"a finite number{bound}" + f", at most {most:g}" * (most < math.inf)
        raise ProblemError(f"{name} must be {wanted}, found {given!r}.")
    if whole and value != int(value):
        raise ProblemError(f"{name} must be a whole number, found {given!r}.")
    return int(value) if whole else value


#: What the number of a word may be.
_INSIDE = {"soft_diagonal": {"above": 0, "most": 1}, "quantile": {"above": 0, "most": 1}, "band": {"least": 0, "whole": True}}


def call(text: str, name: str, known: tuple[str, ...]) -> tuple[str, float | None]:
    """("band", 3) of "band(3)", ("mean", None) of "mean"; checked. Numbers that belong to a name must be there."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([^)]*?)\s*\))?\s*", str(text))
    if match is None or match[1] not in known:
        raise unknown(name, text, known)
    word, inside = match[1], match[2]
    if word not in _INSIDE and inside is not None:
        raise ProblemError(f'{name}: "{word}" takes no number, found "{text}".')
    if word not in _INSIDE:
        return word, None
    if inside is None:
        raise ProblemError(f'{name}: "{word}" takes a number, as in "{word}({3 if word == "band" else 0.1})"; found "{text}".')
    return word, number(f"{name}: that of {word}", inside, **_INSIDE[word])
