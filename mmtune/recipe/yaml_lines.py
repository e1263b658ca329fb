"""YAML of recipes and data templates, and `key.sub=value` overrides: plain values with the location of each key.

The schema is the core schema of YAML 1.2, on PyYAML's safe loader: `2e-5` is a number, and `no`, `on` and `2024-01-01` are text,
so that `save_strategy: no` has the meaning that it has in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmtune.utils.errors import UserError
from mmtune.utils.files import path_hint
from mmtune.utils.shipped import shipped_recipes

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")
_CORE_SCHEMA = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
)


MAX_BYTES = 2**20
MAX_DEPTH = 50
MAX_SIZE = 100_000
"""Maximum number of values in a document. Texts count once per 64 characters, and aliases each time they are used."""
MAX_DIGITS = 1_000


class _Loader(yaml.SafeLoader):
    """The safe loader with the core schema of YAML 1.2 and a limit on nesting."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or the loader above would read as another type."""


for _name, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass(frozen=True)
class Origin:
    """Where a key was written. `order` sorts errors: those of the file by line, then those of the command line."""

    place: str
    order: tuple[int, int]
    override: str | None = None


@dataclass
class Document:
    """Plain values of a recipe, the origin of every dotted key, and errors in the YAML.

    Attributes:
        unread: keys with an invalid value; they are None in `values`.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    problems: list[tuple[Origin, str]] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    def origin(self, key: str) -> Origin:
        """Where the key, or its nearest written parent, was written."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins[key] if key else Origin(f"{self.name}:1", (0, 1))

    def report(self, key: str, message: str) -> None:
        """Add a problem with a key.

        It is left out if it may be a consequence of an invalid value in the same place, which is reported already.
        """
        if any(_lies_in(key, each) or _lies_in(each, key) for each in self.unread):
            return
        self.problems.append((self.origin(key), located_message(self.origin(key), key, message)))

    def raise_problems(self) -> None:
        """Raise all problems as one UserError, one per line, in the order in which the keys were written."""
        if self.problems:
            lines = [text for _, text in sorted(self.problems, key=lambda problem: problem[0].order)]
            raise UserError("\n".join(dict.fromkeys(lines)))


def _lies_in(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


def located_message(origin: Origin, key: str, message: str) -> str:
    """One line with location, key and message. The location of an override contains the key already."""
    return f"{origin.place}: {message}" if key == origin.override else f"{origin.place}: {key}: {message}"


def read_document(path: Path, kind: str = "recipe", keys: str = "model, data, output_dir") -> Document:
    """Read a recipe, or another YAML file that holds a mapping.

    Args:
        path: the file.
        kind: of the file, for messages.
        keys: examples of its keys, for messages.

    Raises:
        UserError: the file cannot be read, is too large, is not YAML or is not a mapping. Duplicate and non-text keys are added
            to `problems`.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give a {kind} file")
    if not path.exists():
        ships = kind == "recipe" and str(path) in shipped_recipes()
        copy = f"; this is a shipped recipe: `mmtune recipe copy {path}`, then give {path}.yaml"
        raise UserError(f"{path}: no such {kind} file{copy if ships else path_hint(path)}")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; give a {kind} file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: expected at most {MAX_BYTES:,} bytes for a {kind}, got {path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, problem = _syntax_error(error, text)
        raise UserError(f"{path}:{line}: not valid YAML: {problem}") from error
    if node is None:
        raise UserError(f"{path}:1: the {kind} is empty; expected a mapping with {keys}")
    if not isinstance(node, yaml.MappingNode):
        node_kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected a mapping with {keys}, got {node_kind}")
    document = Document(str(path))
    document.values = _Builder(document, kind=kind).build(node)
    return document


def apply_override(document: Document, text: str, number: int, shorthands: Mapping[str, str]) -> None:
    """Apply `key.sub=value` to the document. The value is YAML; a number in the key is the index of a list item.

    Args:
        text: the override.
        number: its position on the command line, for the order of errors.
        shorthands: keys whose value may be a string instead of a mapping, and the key of the mapping that the string is for.
    """
    place = Origin(f"command line: {text}", (1, number))
    key, equals, value_text = text.partition("=")
    if not equals or not all(key.split(".")):
        document.problems.append((place, f"{place.place}: expected key=value, with dots between the parts of the key"))
        return
    origin = Origin(place.place, place.order, key)
    built = Document(document.name)
    try:
        node = yaml.compose(value_text, Loader=_Loader)
    except yaml.YAMLError as error:
        document.problems.append((origin, located_message(origin, key, f"not valid YAML: {_syntax_error(error, value_text)[1]}")))
        return
    if isinstance(node, yaml.MappingNode) and value_text.endswith(":") and value_text.count(":") == 1:
        # `Answer:` is a text here, not a mapping without values.
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value_text, node.start_mark, node.end_mark)
    value = None if node is None else _Builder(built, origin).build(node, key)
    document.problems += built.problems
    document.unread |= built.unread

    parent: Any = document.values
    *above, last = key.split(".")
    for depth, part in enumerate([*above, last]):
        here = ".".join(key.split(".")[:depth])
        if isinstance(parent, list):
            if not part.isdecimal() or int(part) >= len(parent):
                have = f"it has {len(parent)} item{'' if len(parent) == 1 else 's'}, counted from 0"
                document.problems.append((origin, located_message(origin, key, f"{here} has no item '{part}'; {have}")))
                return
            slot: Any = int(part)
        elif isinstance(parent, dict):
            slot = part
        else:
            document.problems.append((origin, located_message(origin, key, f"{here} is {parent!r}, which has no keys")))
            return
        if depth == len(above):
            parent[slot] = value
            break
        path = ".".join(above[: depth + 1])
        child = parent.get(slot) if isinstance(parent, dict) else parent[slot]
        if child is None:
            if [*above, last][depth + 1].isdecimal():
                document.problems.append((origin, located_message(origin, key, f"{path} has no items; give the whole list")))
                return
            child = parent[slot] = {}
            document.origins[path] = origin
        elif isinstance(child, str) and path in shorthands:
            child = parent[slot] = {shorthands[path]: child}
            document.origins[f"{path}.{shorthands[path]}"] = document.origins[path]
        parent = child
    document.origins = {k: v for k, v in document.origins.items() if not k.startswith(f"{key}.")}
    document.origins |= {key: origin} | built.origins


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain values, in the order of their keys. `read_document` reads back the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        return mark.line + 1 if mark else 1, f"{message}; indent with spaces" if r"'\t'" in message else message
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1, f"the character {error.character!r} is not allowed"
    return 1, str(error)


class _Builder:
    """Builds plain values from YAML nodes, and adds the origin of each key and problems to the document."""

    def __init__(self, document: Document, override: Origin | None = None, kind: str = "recipe") -> None:
        self._document = document
        self._override = override
        self._kind = kind
        self._open: set[int] = set()
        self._size = 0

    def build(self, node: yaml.Node, key: str = "") -> Any:
        self._size += 1 + (len(node.value) // 64 if isinstance(node, yaml.ScalarNode) else 0)
        if self._size > MAX_SIZE:
            message = f"expected at most {MAX_SIZE:,} values; aliases count each time they are used"
            raise UserError(located_message(self._origin(node), key or self._kind, message))
        if id(node) in self._open:
            return self._add_invalid(node, key, "the value contains itself")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            return self._add_invalid(node, key, f"the YAML tag '{node.tag}' is not supported")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                return [self._child(item, item, key, str(index)) for index, item in enumerate(node.value)]
            return self._scalar(node, key)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        built: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        # Keys of '<<' first, so that the origin of a key that is also written here is the line here.
        for name_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != f"{_TAG}merge"):
            name = name_node.value
            if name_node.tag == f"{_TAG}merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    merged = self.build(source, key)
                    if not isinstance(merged, dict):
                        self._add_problem(value_node, key, "'<<' expects a mapping, or a list of them")
                        continue
                    inherited = merged | inherited
                continue
            if name_node.tag != f"{_TAG}str":
                shown = name if isinstance(name, str) else "a list or a mapping"
                self._add_problem(name_node, key or self._kind, f"a key must be text, got {shown}; quote it")
                continue
            path = f"{key}.{name}" if key else name
            if name in first_line:
                self._add_problem(name_node, path, f"key given twice; first on line {first_line[name]}")
                continue
            first_line[name] = name_node.start_mark.line + 1
            built[name] = self._child(name_node, value_node, key, name)
        return built | {name: value for name, value in inherited.items() if name not in built}

    def _child(self, key_node: yaml.Node, node: yaml.Node, key: str, name: str) -> Any:
        path = f"{key}.{name}" if key else name
        self._document.origins[path] = self._origin(key_node)
        return self.build(node, path)

    def _scalar(self, node: yaml.Node, key: str) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind in ("int", "float") and len(text) > MAX_DIGITS:
                return self._add_invalid(node, key, f"expected a number of at most {MAX_DIGITS:,} characters, got {len(text):,}")
            if kind == "int":
                return int(text, 0 if text[:2] in ("0x", "0o") else 10)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if kind == "str":
                return text
        except (ValueError, KeyError):
            return self._add_invalid(node, key, f"'{text[:60]}' is not a YAML {kind}")
        return self._add_invalid(node, key, f"the YAML tag '{node.tag}' is not supported")

    def _add_invalid(self, node: yaml.Node, key: str, message: str) -> None:
        self._add_problem(node, key, message)
        self._document.unread.add(key)

    def _origin(self, node: yaml.Node) -> Origin:
        line = node.start_mark.line + 1
        return self._override or Origin(f"{self._document.name}:{line}", (0, line))

    def _add_problem(self, node: yaml.Node, key: str, message: str) -> None:
        origin = self._origin(node)
        self._document.problems.append((origin, located_message(origin, key, message)))
