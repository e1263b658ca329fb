"""Messages about keys that a recipe does not have: where the same is said in a recipe, and one message for one mistake."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from mmtune.recipe.other_toolkits import OTHER_NAMES
from mmtune.recipe.pass_through.arguments import method_arguments, train_arguments
from mmtune.recipe.sections import DataSection, EvaluateSection, ModelSection, Recipe, Source

UNKNOWN = "unknown key"
MISSING = "required, and not given"
SOURCES = "such as [{path: rows.json, template: llava}]"
EXAMPLES = {
    "model": "such as model: {base: builtin:tiny-llava}",
    "data": "such as data: {train: [{path: rows.json, template: llava}]}",
    "output_dir": "such as output_dir: runs/first",
}


def told(mistakes: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Keys and messages as they are shown.

    An unknown key names the recipe's own key where another toolkit, or another section, has one of that name. A key is not called
    missing where an unknown one beside it is a misspelling of it.
    """
    mistakes = [(key, _unknown(key) or message if _is_guess(message) else message) for key, message in mistakes]
    meant = set()
    for key, message in mistakes:
        if message.startswith(UNKNOWN) and (named := re.search(r"did you mean '(\w+)'|write (\w+)|name here is (\w+)", message)):
            above = key.rpartition(".")[0]
            meant.add(f"{above}." * bool(above) + next(filter(None, named.groups())))
    for key, message in mistakes:
        if message != MISSING:
            is_list = key in ("data.train", "evaluate.data") and message.startswith("expected a list")
            yield key, f"{message}; {SOURCES}" if is_list else message
        elif key not in meant:
            yield key, f"{message}; {EXAMPLES[key]}" if key in EXAMPLES else message


def _is_guess(message: str) -> bool:
    return message == UNKNOWN or message.startswith((f"{UNKNOWN}; did you mean", f"{UNKNOWN}; valid here"))


def _unknown(key: str) -> str | None:
    """The message about an unknown key whose like is elsewhere in a recipe; None where nothing is."""
    above, _, name = key.rpartition(".")
    target = OTHER_NAMES.get(name) or _elsewhere(name)
    if target is None:
        train = train_arguments()
        reason = None if above else train.renamed.get(name) or train.managed.get(name)
        return reason and f"{UNKNOWN}; of train's arguments: {reason}"
    place, colon, value = target.partition(":")
    value = colon + value
    if place.startswith("--"):
        return f"{UNKNOWN}; give {place}"
    if place.rpartition(".")[0] == above:
        here = f"{place.rpartition('.')[2]}{value}"
        return f"{UNKNOWN}; {'write' if value else 'its name here is'} {here}"
    if above.startswith("tune.") and place.startswith("tune.language."):
        return f"{UNKNOWN}; write {above}.{place.removeprefix('tune.language.')}{value}"
    return f"{UNKNOWN}; write {target}"


def _elsewhere(name: str) -> str | None:
    """The key of that name in another section."""
    sections: dict[str, Collection[str]] = {
        "model": ModelSection.model_fields,
        "data": DataSection.model_fields,
        "evaluate": EvaluateSection.model_fields,
        "train": train_arguments().arguments,
        "data.train.0": Source.model_fields,
        "tune.language": method_arguments("lora").arguments,
    }
    if name in Recipe.model_fields:
        return None
    return next((f"{section}.{name}" for section, names in sections.items() if name in names), None)


def override_error(text: str) -> str | None:
    """What is wrong with the form of an override `key=value`, if anything is."""
    key, equals, value = text.partition("=")
    dotted = re.sub(r"\[(\d+)\]", r".\1", key)
    if equals and text != (together := f"{dotted.strip()}={value.strip()}") and dotted != dotted.strip():
        return f"expected key=value without spaces: write {together}"
    if equals and dotted != key:
        return f"items of a list are counted with dots: write {dotted}={value}"
    return None


def split_override_error(overrides: Sequence[str]) -> str | None:
    """What is wrong where one override `key=value` came as several arguments, with spaces."""
    for first, second, third in zip(overrides, [*overrides[1:], ""], [*overrides[2:], "", ""], strict=False):
        if "=" not in first and second.startswith("="):
            value = second[1:] or third
        elif second and "=" not in second and (first.endswith("=") or re.fullmatch(r"\w+(\.\w+)+", first)):
            value = second
        else:
            continue
        return f"command line: {first}: expected key=value without spaces: write {first.removesuffix('=')}={value}"
    return None


def key_of_option(name: str) -> str | None:
    """The recipe's key that somebody gave as an option `--NAME`, if there is one."""
    if re.fullmatch(r"(model|tune|data|evaluate|train)\.[\w.]+|output_dir", name):
        return name
    known = (OTHER_NAMES.get(name) or _elsewhere(name) or "").partition(":")[0]
    return known if re.fullmatch(r"[\w.]+", known) else None
