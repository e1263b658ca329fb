"""The part of a recipe that says which rows are taken and how they are put to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, StrictInt, WithJsonSchema
from pydantic_core import InitErrorDetails

from mmtune.recipe.pass_through.arguments import Settings, error_at, format_value
from mmtune.recipe.section import PathText, Section

_WORDS = {"type": "string", "minLength": 1}
FieldsToValues = Annotated[Settings, PlainSerializer(dict), WithJsonSchema({"type": "object", "minProperties": 1})]
LabelsToWords = Annotated[
    Settings,
    PlainSerializer(dict),
    WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": _WORDS}, {"type": "array", "items": _WORDS}]}),
]
NamesToText = Annotated[
    Settings, PlainSerializer(dict), WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}})
]

WHERE = "Take only rows whose field has this value, or one of a list: {split: train}; a.b is the field b inside a."


def where_errors(given: Any) -> list[InitErrorDetails]:
    """Put a `where` into one form, field to a value or a list of values, and say what is wrong with it."""
    where = given.get("where") if isinstance(given, dict) else None
    if where is None or isinstance(where, Settings):
        return []
    errors = []
    if not isinstance(where, Mapping) or not where:
        errors.append(error_at("where", f"expected a mapping of fields to values, got {format_value(where)}"))
    for field, value in where.items() if isinstance(where, Mapping) else ():
        values = value if isinstance(value, list) and value else [value]
        if not all(item is None or isinstance(item, (str, int, float, bool)) for item in values):
            errors.append(error_at(("where", field), f"expected a value or a list of values, got {format_value(value)}"))
    given["where"] = None if errors else Settings(where)
    return errors


class Shots(Section):
    """Few-shot examples: other rows, with their answers and media, as turns before the question."""

    count: Annotated[StrictInt, Field(ge=1)] = Field(description="How many examples each row has.")
    path: PathText = Field(description="The file they are taken from, if not the source's own; a row is never its own example.")
    template: PathText | None = Field(default=None, description="The template of that file; null: the source's.")
    media_root: PathText | None = Field(
        default=None,
        description="Where its media paths start; null: the file's own directory, or the source's for the same file.",
    )
    join: PathText | None = Field(default=None, description="Its second file; null: the source's, if the file is the same.")
    where: FieldsToValues | None = Field(default=None, description=WHERE)

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        return given, where_errors(given)


def verbalizer_errors(given: Any) -> list[InitErrorDetails]:
    """Put a source's `verbalizer` into one form, label to words, and say what is wrong with it."""
    words = given.get("verbalizer") if isinstance(given, dict) else None
    if words is None or isinstance(words, Settings):
        return []
    labelled = {str(label): word for label, word in enumerate(words)} if isinstance(words, list) else words
    given["verbalizer"] = None
    if not isinstance(labelled, Mapping) or not labelled:
        return [error_at("verbalizer", f"expected a mapping of labels to words or a list of words, got {format_value(words)}")]
    wrong = {label: word for label, word in labelled.items() if not isinstance(word, str) or not word.strip()}
    if not wrong:
        given["verbalizer"] = Settings(labelled)
    return [error_at(("verbalizer", label), f"expected words, got {format_value(word)}") for label, word in wrong.items()]


def values_errors(given: Any) -> list[InitErrorDetails]:
    """Check a source's `values`, name to text."""
    values = given.get("values") if isinstance(given, dict) else None
    if values is None or isinstance(values, Settings):
        return []
    given["values"] = None
    if not isinstance(values, Mapping):
        return [error_at("values", f"expected a mapping of names to text, got {format_value(values)}")]
    wrong = {name: value for name, value in values.items() if not isinstance(value, str)}
    if not wrong:
        given["values"] = Settings(values)
    return [error_at(("values", name), f"expected a string, got {format_value(value)}") for name, value in wrong.items()]
