"""What every section of a recipe stands on: frozen typed objects whose errors are for the reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails

from mmtune.recipe.other_toolkits import boolean_hint, value_hint
from mmtune.recipe.pass_through.arguments import Settings, error_at, format_value
from mmtune.utils.errors import nearest
from mmtune.utils.files import expand_user

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expand_user)]
PassThroughArguments = Annotated[Settings, PlainSerializer(dict), WithJsonSchema({"type": "object"})]


class Section(BaseModel):
    """A frozen part of the recipe, whose errors are for the reader and are all found at once."""

    _expected: ClassVar[str] = "a mapping"
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        """Shorthands spelt out, and what is wrong between the keys; pydantic then checks each key."""
        return given, []

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, given: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(given, cls):
            return handler(given)
        arranged, errors = cls._normalize(dict(given) if isinstance(given, Mapping) else given)
        try:
            section = handler(arranged)
        except ValidationError as error:
            # pydantic counts a list's sound items only, and calls a list of one faulty item too short as well.
            told = (e for e in error.errors() if e["type"] != "too_short" or not e["input"])
            errors = [*errors, *(cls._to_message(detail) for detail in told)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return section

    @classmethod
    def _to_message(cls, detail: Any) -> InitErrorDetails:
        kind, where, context = detail["type"], detail["loc"], detail.get("ctx", {})
        if kind == "recipe":
            return error_at(where, detail["msg"])
        if kind == "extra_forbidden":
            return error_at(where, f"unknown key{nearest(str(where[-1]), set(cls.model_fields))}")
        if kind == "missing":
            return error_at(where, "required, and not given")
        expected = {
            "model_type": cls._expected,
            "tuple_type": "a list",
            "string_type": "a string",
            "string_too_short": "a string that is not empty",
            "int_type": "an integer",
            "float_type": "a number",
            "bool_type": "true or false",
            "too_short": "a list with at least one item",
            "literal_error": context.get("expected", ""),
            "greater_than": f"more than {context.get('gt', 0):g}",
            "greater_than_equal": f"at least {context.get('ge', 0):g}",
            "less_than_equal": f"at most {context.get('le', 0):g}",
        }.get(kind, detail["msg"].removeprefix("Input should be "))
        hint = ""
        if kind == "literal_error" and isinstance(detail["input"], str):
            close = nearest(detail["input"], context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
            hint = close if "did you mean" in close else ""
        truth = boolean_hint(detail["input"]) if kind == "bool_type" else ""
        hint = value_hint(str(where[-1]) if where else "", detail["input"]) or hint or truth
        return error_at(where, f"expected {expected}, got {format_value(detail['input'])}{hint}")
