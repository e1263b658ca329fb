"""A recipe's `objective` section: what the training minimizes. Each objective has a section class of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from mmtune.recipe.pass_through.arguments import error_at, format_value
from mmtune.recipe.section import Section
from mmtune.utils.errors import nearest

if TYPE_CHECKING:
    from mmtune.recipe.sections import Recipe


class ObjectiveSection(Section):
    """The settings of one objective. A subclass names its `type` and overrides what differs."""

    _expected: ClassVar[str] = "a mapping, such as {type: sft}"
    type: str

    def named_files(self) -> Iterator[tuple[str, str, str]]:
        """The files that the section names: key below `objective`, path or hub id, and kind as in `check_files`."""
        return iter(())

    def conflicts(self, recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
        """What the objective excludes in the rest of the recipe: the key and the message."""
        return iter(())


class SftSection(ObjectiveSection):
    """Supervised fine-tuning: cross entropy at the supervised tokens."""

    type: Literal["sft"] = Field(default="sft", description="The objective.")


OBJECTIVE_SECTIONS: dict[str, type[ObjectiveSection]] = {"sft": SftSection}
"""By `objective.type`; `mmtune.objectives.objective_table` has the same names."""


def _by_type(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    name = value.get("type", "sft")
    if not isinstance(name, str) or name not in OBJECTIVE_SECTIONS:
        names = tuple(OBJECTIVE_SECTIONS)
        hint = nearest(name, names) if isinstance(name, str) else ""
        message = f"expected one of {', '.join(names)}, got {format_value(name)}{hint}"
        raise ValidationError.from_exception_data("ObjectiveSection", [error_at("type", message)])
    return OBJECTIVE_SECTIONS[name].model_validate(value)


AnyObjectiveSection = Annotated[SftSection, BeforeValidator(_by_type)]
"""A field that takes the section class of its `type`."""
