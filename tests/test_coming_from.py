"""docs/coming_from.md against the recipe's schema and against the names that error messages translate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmtune.cli.main import entry_point
from mmtune.recipe.other_toolkits import OTHER_METHODS, OTHER_NAMES, OTHER_VALUES
from mmtune.recipe.recipe import recipe_schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming_from.md"
START, END = "<!-- generated from mmtune/recipe/other_toolkits.py -->", "<!-- to here -->"
SCHEMA = recipe_schema()


def is_recipe_key(key: str, node: Mapping[str, Any] | None = None) -> bool:
    """Whether a dotted key, with list items by index, is in the recipe's JSON schema."""
    node = SCHEMA if node is None else node
    if "$ref" in node:
        return is_recipe_key(key, SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    if not key:
        return True
    head, _, rest = key.partition(".")
    inner = node.get("properties", {}).get(head) or (node.get("items") if head.isdigit() else None)
    branches = [branch for name in ("anyOf", "oneOf", "allOf") for branch in node.get(name, [])]
    return (inner is not None and is_recipe_key(rest, inner)) or any(is_recipe_key(key, branch) for branch in branches)


def key_of(target: str) -> str:
    """`tune.vision` of `tune.vision: frozen`, `--resume` of `--resume on the command line`."""
    return re.split(r":| ", target, maxsplit=1)[0]


def key_rows() -> Iterator[tuple[list[str], list[str]]]:
    """The code spans of the first cell, and those of the other cells, of every row of a table with our keys first."""
    table = False
    for line in PAGE.read_text("utf-8").partition(START)[0].splitlines():
        table = line.startswith("| recipe |") or (table and line.startswith("|"))
        if table and line.startswith("| `"):
            first, *others = line.strip("|").split("|")
            yield re.findall(r"`([^`]+)`", first), re.findall(r"`([^`]+)`", "|".join(others))


def test_every_key_on_our_side_is_one_of_the_recipe() -> None:
    ours = [target for cell, _ in key_rows() for target in cell]
    keys = [key_of(target) for target in ours if not target.startswith(("--", "mmtune ", "accelerate launch "))]
    assert len(keys) > 50
    assert [key for key in keys if not is_recipe_key(key)] == []


@pytest.mark.parametrize("key", ["model.bas", "tune.language.rank", "data.train.0.rows", "data.max_tokens.1", "trains"])
def test_an_unknown_recipe_key_is_reported(key: str) -> None:
    assert not is_recipe_key(key)


def test_the_tables_agree_with_the_error_messages() -> None:
    differing = [
        f"{name}: the page has {cell}, the message {OTHER_NAMES[name]}"
        for cell, names in key_rows()
        for name in names
        if name in OTHER_NAMES and key_of(OTHER_NAMES[name]) not in [key_of(target) for target in cell]
    ]
    assert differing == []


def test_every_command_on_our_side_has_these_options(capsys: pytest.CaptureFixture[str]) -> None:
    for cell, _ in key_rows():
        for verb, rest in re.findall(r"mmtune (\w+)([^`]*)", " ".join(cell)):
            with pytest.raises(SystemExit):
                entry_point([verb, "--help"])
            shown = capsys.readouterr().out
            assert all(option in shown for option in re.findall(r"--[\w-]+", rest)), rest


def generated() -> str:
    """The tables of names, methods and values that error messages translate."""
    by_target: dict[str, list[str]] = {}
    for name, target in OTHER_NAMES.items():
        by_target.setdefault(target, []).append(f"`{name}`")
    lines = ["| other name | write |", "|---|---|"]
    for target, names in by_target.items():
        code, space, words = target.partition(" ") if target.startswith("--") else (target, "", "")
        lines.append(f"| {', '.join(names)} | `{code}`{space}{words} |")
    lines += ["", "| other method | write |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in OTHER_METHODS.items()]
    lines += ["", "| key | other value | write |", "|---|---|---|"]
    for key, values in OTHER_VALUES.items():
        by_value: dict[str, list[str]] = {}
        for other, value in values.items():
            by_value.setdefault(value, []).append(f"`{other}`")
        lines += [f"| `{key}` | {', '.join(others)} | `{value}` |" for value, others in by_value.items()]
    return "\n".join(lines)


def test_the_last_tables_are_those_of_the_error_messages() -> None:
    text = PAGE.read_text("utf-8")
    assert text.partition(START)[2].partition(END)[0].strip() == generated(), f"put this into the page:\n\n{generated()}"
