"""Data templates for rows without answers: the conversation is read up to the question, and ends with a placeholder answer."""

from __future__ import annotations

from typing import Any

from mmtune.data.templates.columns import TurnTemplate
from mmtune.data.templates.expressions import is_jinja, names_read
from mmtune.data.templates.template import UNANSWERED, DataTemplate


def without_answers(template: DataTemplate) -> DataTemplate:
    """The template for rows whose last answer may be missing; the last answer of its samples is a placeholder.

    What only the answer, the references and the task read is not needed: a column, the right option, a region, a joined row. The
    earlier questions of a row keep their answers, so a template that repeats its messages still reads all answers.
    """
    changes: dict[str, Any] = {"references": None}
    if not template.messages or template.repeat:
        return template.awaiting_answer(changes)
    *turns, answer = template.messages
    if answer.role == "assistant":
        changes["messages"] = (*turns, TurnTemplate(role="assistant", text=(UNANSWERED,)))
    sources = [source for turn in turns for source in (*turn.images, *turn.videos, *turn.audio, *turn.text)]
    asked = {name for source in sources for name in names_read(source)}
    if template.options is not None:
        changes["options"] = template.options.model_copy(update={"answer": "{{ 0 }}"})
        asked |= names_read(template.options.choices)
    if template.verbalizer is not None:
        label = next(iter(template.verbalizer.words), "unknown")
        changes["verbalizer"] = template.verbalizer.model_copy(update={"label": "{{ " + repr(label) + " }}"})
    for name, section in template.regions.items():
        if not asked & {section.kind, name}:
            changes[name] = None
    if template.join is not None and "joined" not in asked:
        changes["join"] = None
        of_joined = is_jinja(template.task or "") and "joined" in names_read(template.task or "")
        changes["task"] = None if of_joined or (template.task or "").startswith("joined.") else template.task
    return template.awaiting_answer(changes)
