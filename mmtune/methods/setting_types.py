"""Types of a method's settings that are narrower than the annotations of PEFT's configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, WithJsonSchema

COUNT = Annotated[int, Ge(1)]
POSITIVE_INT = Annotated[int, Gt(0)]
POSITIVE_OR_NONE = Annotated[float, Gt(0)] | None
DROPOUT = Annotated[float, Ge(0), Lt(1)]
SELECTOR = list[str] | str


@dataclass(frozen=True)
class NumberedName:
    """Metadata of `numbered`, from which an error message is written."""

    stem: str


def numbered(stem: str) -> Any:
    """The annotation of strings that are a stem and a number."""

    def check(value: str) -> str:
        if not re.fullmatch(rf"{re.escape(stem)}[0-9]+", value):
            raise ValueError(f"not {stem}N")
        return value

    schema = {"type": "string", "pattern": f"^{stem}[0-9]+$"}
    return Annotated[str, AfterValidator(check), WithJsonSchema(schema), NumberedName(stem)]
