"""Prompt settings of a source: phrasing, system prompt, shuffled answer options, verbalizer.

Every random choice is a hash of the seed, the row id and the name of the choice. It is the same in every process, on every
machine and in every epoch, and does not depend on the rows that were read before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import Field, field_validator

from mmtune.data.message import RowError
from mmtune.data.templates.expressions import TemplateSection, as_text, check_jinja, evaluate_expression
from mmtune.utils.errors import nearest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Item = TypeVar("Item")


@dataclass(frozen=True)
class PromptSettings:
    """Prompt settings of one recipe source.

    Attributes:
        seed: seed for the phrasing, the order of the options, and the few-shot examples.
        system: system message for rows without one.
        shuffle_options: whether to shuffle the answer options.
        words: label to answer words, replacing those of the template.
        values: values that replace those of the template's `values`.
        ignore: fields that are not read and may contain media.
        add_images: whether the images of a row without placeholders go to the start of the first user turn.
    """

    seed: int = 0
    system: str | None = None
    shuffle_options: bool = False
    words: Mapping[str, str] | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    add_images: bool = False


DEFAULT_PROMPT_SETTINGS = PromptSettings()


def draw(seed: int, *names: str | int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the seed and the names."""
    text = "\x1f".join(str(name) for name in (seed, *names))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # a float has 53 bits of precision, so the result is less than 1


def shuffled(items: Sequence[Item], seed: int, *names: str | int) -> list[Item]:
    """The items in a pseudo-random order that depends only on the seed, the names and the number of items."""
    order = sorted(range(len(items)), key=lambda index: draw(seed, *names, index))
    return [items[index] for index in order]


@dataclass(frozen=True)
class ClosedAnswers:
    """The possible answers of a closed question.

    Attributes:
        shared: Jinja variables for all answers.
        alternatives: Jinja variables of each answer.
        correct: index of the correct answer.
    """

    shared: dict[str, Any]
    alternatives: list[dict[str, Any]]
    correct: int


class Options(TemplateSection):
    """Answer options of each row, written as lines `A. text`."""

    choices: str = Field(description="Jinja: the list of options.")
    answer: str = Field(description="Jinja: the index of the right one, from 0.")
    line: str = Field(default="{letter}. {option}", description="How a line is written: text with {letter} and {option}.")
    optional: bool = Field(default=False, description="Whether a row with an empty list is an open question.")

    @field_validator("choices", "answer")
    @classmethod
    def _jinja(cls, source: str) -> str:
        check_jinja(source)
        return source

    @field_validator("line")
    @classmethod
    def _both_names(cls, line: str) -> str:
        if line.count("{letter}") != 1 or line.count("{option}") != 1:
            raise ValueError(f"expected {{letter}} and {{option}} once each, got {line[:80]!r}")
        return line

    def read(
        self, row_id: str, row: Mapping[str, Any], context: Mapping[str, Any], prompting: PromptSettings
    ) -> ClosedAnswers | None:
        """The options of a row and the correct one; None for an open question.

        Raises:
            RowError: fewer than two options, or an index out of range.
        """
        choices = evaluate_expression(row_id, "options.choices", self.choices, context, row)
        if self.optional and choices in ([], ()):
            return None
        if not isinstance(choices, (list, tuple)) or not 2 <= len(choices) <= len(LETTERS):
            raise RowError(
                row_id,
                "options.choices",
                f"expected a list of 2 to {len(LETTERS)} options, got {_short_repr(choices)}",
                "field_type",
            )
        answer = evaluate_expression(row_id, "options.answer", self.answer, context, row)
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            detail = f"expected the index of the correct option, 0 to {len(choices) - 1}, got {_short_repr(answer)}"
            raise RowError(row_id, "options.answer", detail, "field_type")
        try:
            texts = [as_text(choice) for choice in choices]
        except ValueError as error:
            raise RowError(row_id, "options.choices", str(error), "field_type") from error
        order = list(range(len(texts)))
        if prompting.shuffle_options:
            order = shuffled(order, prompting.seed, row_id, "options")
        before, _, after = self.line.partition("{option}")
        lines = [
            f"{before.replace('{letter}', letter)}{texts[index]}{after.replace('{letter}', letter)}"
            for letter, index in zip(LETTERS, order, strict=False)
        ]
        alternatives = [{"letter": letter, "option": texts[index]} for letter, index in zip(LETTERS, order, strict=False)]
        return ClosedAnswers({"options": "\n".join(lines)}, alternatives, order.index(answer))


class Verbalizer(TemplateSection):
    """Labels, and the words of the answer for each label. Without `words`, a label that is a word is the answer itself."""

    label: str = Field(description="Jinja: the row's label.")
    words: dict[str, str] = Field(default_factory=dict, description="Label to words; a source's `verbalizer` replaces them.")

    @field_validator("label")
    @classmethod
    def _jinja(cls, source: str) -> str:
        check_jinja(source)
        return source

    def label_of(self, row_id: str, row: Mapping[str, Any], context: Mapping[str, Any]) -> str:
        """The row's label as text, in the form of the keys of `words`.

        Raises:
            RowError: the row has no label.
        """
        label = evaluate_expression(row_id, "verbalizer.label", self.label, context, row)
        try:
            return str(label).lower() if isinstance(label, bool) else as_text(label)
        except ValueError as error:
            raise RowError(row_id, "verbalizer.label", str(error), "field_type") from error

    def read(self, row_id: str, row: Mapping[str, Any], context: Mapping[str, Any], prompting: PromptSettings) -> ClosedAnswers:
        """The words of all labels, and those of the row's label.

        Raises:
            RowError: there are no words for the label, and it is a number or an id and not a word.
        """
        words = self.words if prompting.words is None else prompting.words
        label = self.label_of(row_id, row, context)
        candidates = list(dict.fromkeys(words.values()))
        if not words and _is_word(label):
            return ClosedAnswers({"candidates": candidates}, [{"verbalized": label}], 0)
        answer = words.get(label, label)
        if answer not in candidates:
            if words:
                detail = f"the verbalizer has no words for the label {label!r}"[:200]
                detail += nearest(label[:100], {*words, *candidates})
            else:
                quoted = label[:100].replace("'", "''")
                detail = f"expected a word as label, got the number or id {label!r}; "[:200]
                detail += f"set the words for all labels in the source: verbalizer: {{'{quoted}': WORDS, ...}}"
            raise RowError(row_id, "verbalizer.label", detail, "label_unknown")
        alternatives = [{"verbalized": candidate} for candidate in candidates]
        return ClosedAnswers({"candidates": candidates}, alternatives, candidates.index(answer))


def _is_word(label: str) -> bool:
    """Whether a label is a word: it has at least two letters, and is not an id such as class_3 or n02123045."""
    letters = sum(character.isalpha() for character in label)
    return letters >= 2 and label not in ("true", "false") and not re.fullmatch(r"[^\W\d_]+[_-]?\d+", label.strip())


def _short_repr(value: Any) -> str:
    return repr(value)[:100]
