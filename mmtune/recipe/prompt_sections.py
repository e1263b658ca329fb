"""Recipe keys that select rows and change prompts: `where`, `held_out`, `shots`, `verbalizer`, `values`; answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, StrictBool, StrictFloat, StrictInt, WithJsonSchema
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

HeldOut = Annotated[
    StrictInt | StrictFloat,
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]}
    ),
]

WHERE = "Use only rows whose field has this value, or one of a list: {split: train}; a.b is the field b inside a."


def where_errors(section: Any) -> list[InitErrorDetails]:
    """Check `where` and convert it to Settings: field to a value or a list of values."""
    where = section.get("where") if isinstance(section, dict) else None
    if where is None or isinstance(where, Settings):
        return []
    errors = []
    if not isinstance(where, Mapping) or not where:
        errors.append(error_at("where", f"expected a mapping of fields to values, got {format_value(where)}"))
    for field, value in where.items() if isinstance(where, Mapping) else ():
        values = value if isinstance(value, list) and value else [value]
        if not all(item is None or isinstance(item, (str, int, float, bool)) for item in values):
            errors.append(error_at(("where", field), f"expected a value or a list of values, got {format_value(value)}"))
    section["where"] = None if errors else Settings(where)
    return errors


def held_out_errors(section: Any) -> list[InitErrorDetails]:
    """Check the `held_out` of a source: a fraction, or a number of rows."""
    share = section.get("held_out") if isinstance(section, dict) else None
    if share is None:
        return []
    if isinstance(share, int) and not isinstance(share, bool) and share >= 1:
        shots = section.get("shots")
        if isinstance(shots, Mapping) and shots.get("path") == section.get("path"):
            message = "expected a fraction: shots of the same file are then split by the same rule; give held_out: 0.1"
            return [error_at("held_out", message)]
        return []
    if isinstance(share, float) and 0 < share < 1:
        return []
    section["held_out"] = None
    return [error_at("held_out", f"expected a fraction between 0 and 1, or a number of rows, got {format_value(share)}")]


class Shots(Section):
    """Few-shot examples: other rows, with their answers and media, as turns before the question."""

    count: Annotated[StrictInt, Field(ge=1)] = Field(description="The number of examples for each row.")
    path: PathText = Field(description="The file of the examples, if it is not the source's; a row is never its own example.")
    template: PathText | None = Field(default=None, description="The template of that file; null: the source's.")
    media_root: PathText | None = Field(
        default=None,
        description="The directory of its media paths; null: the file's directory, or the source's media_root for the same file.",
    )
    join: PathText | None = Field(default=None, description="Its second file; null: the source's, if the file is the same.")
    where: FieldsToValues | None = Field(default=None, description=WHERE)
    same_image: StrictBool = Field(default=False, description="Allow examples about an image of the row.")

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        return values, where_errors(values)


class Sampling(Section):
    """Sampled answers of an evaluation. They do not depend on the batch size or the number of processes."""

    num_return_sequences: Annotated[StrictInt, Field(ge=1)] = Field(
        default=5, description="The number of answers to each question; the most frequent final answer is the prediction."
    )
    temperature: Annotated[StrictFloat, Field(gt=0)] = Field(
        default=0.7, description="Tokens are drawn from softmax(logits / temperature)."
    )
    seed: StrictInt = Field(default=0, description="The seed of the drawn tokens.")


class ChoiceScores(Section):
    """How `evaluate.score: choices` compares the log-likelihoods of the candidate answers."""

    per_token: StrictBool = Field(
        default=False, description="Divide a log-likelihood by the number of tokens, so that long candidates are not disfavoured."
    )
    calibrate: StrictBool = Field(
        default=False,
        description="Subtract the log-likelihood given a grey image: what the question alone makes likely does not count.",
    )


def verbalizer_errors(section: Any) -> list[InitErrorDetails]:
    """Check `verbalizer` and convert it to Settings: label to words."""
    words = section.get("verbalizer") if isinstance(section, dict) else None
    if words is None or isinstance(words, Settings):
        return []
    labelled = {str(label): word for label, word in enumerate(words)} if isinstance(words, list) else words
    section["verbalizer"] = None
    if not isinstance(labelled, Mapping) or not labelled:
        return [error_at("verbalizer", f"expected a mapping of labels to words or a list of words, got {format_value(words)}")]
    invalid = {label: word for label, word in labelled.items() if not isinstance(word, str) or not word.strip()}
    if not invalid:
        section["verbalizer"] = Settings(labelled)
    return [error_at(("verbalizer", label), f"expected words, got {format_value(word)}") for label, word in invalid.items()]


def values_errors(section: Any) -> list[InitErrorDetails]:
    """Check `values` and convert it to Settings: name to text."""
    values = section.get("values") if isinstance(section, dict) else None
    if values is None or isinstance(values, Settings):
        return []
    section["values"] = None
    if not isinstance(values, Mapping):
        return [error_at("values", f"expected a mapping of names to text, got {format_value(values)}")]
    invalid = {name: value for name, value in values.items() if not isinstance(value, str)}
    if not invalid:
        section["values"] = Settings(values)
    return [error_at(("values", name), f"expected a string, got {format_value(value)}") for name, value in invalid.items()]
