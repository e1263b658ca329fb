"""Base class of a recipe's sections: frozen pydantic models that report all errors at once, in messages for the user."""

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
from mmtune.recipe.pass_through.annotations import choices_of
from mmtune.recipe.pass_through.arguments import MISSING, Settings, copied_error, error_at, format_value, unknown_key_at
from mmtune.utils.errors import closest_hint
from mmtune.utils.files import expand_user

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expand_user)]
PassThroughArguments = Annotated[Settings, PlainSerializer(dict), WithJsonSchema({"type": "object"})]


class Section(BaseModel):
    """A frozen part of the recipe. All errors in it are reported at once, in messages for the user."""

    _expected: ClassVar[str] = "a mapping"
    _examples: ClassVar[Mapping[str, str]] = {}
    """By key: an example of a value, for errors about a missing value or one that is not a list."""
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        """The values with shorthands expanded, and errors of combinations of keys; pydantic then checks each key."""
        return values, []

    @model_validator(mode="wrap")
    @classmethod
    def _collect_errors(cls, values: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(values, cls):
            return handler(values)
        normalized, errors = cls._normalize(dict(values) if isinstance(values, Mapping) else values)
        try:
            section = handler(normalized)
        except ValidationError as error:
            # pydantic counts the valid items of a list only: a list of one invalid item is reported as too short as well.
            details = (each for each in error.errors() if each["type"] != "too_short" or not each["input"])
            errors = [*errors, *map(cls._user_error, details)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return section

    @classmethod
    def _user_error(cls, detail: Any) -> InitErrorDetails:
        """An error of pydantic's with a message for the user."""
        kind, loc, value, context = detail["type"], detail["loc"], detail["input"], detail.get("ctx", {})
        if "text" in context:
            return copied_error(detail)
        name = str(loc[-1]) if loc else ""
        example = f"; {cls._examples[name]}" if name in cls._examples else ""
        if kind == "extra_forbidden":
            return unknown_key_at(loc, set(cls.model_fields))
        if kind == "missing":
            return error_at(loc, f"required, and not given{example}", kind=MISSING)
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
        hint = value_hint(name, value)
        if not hint and kind == "literal_error" and isinstance(value, str):
            hint = closest_hint(value, choices_of(cls.model_fields[name].annotation))
        if not hint and kind == "bool_type":
            hint = boolean_hint(value)
        if kind in ("tuple_type", "too_short"):
            hint += example
        return error_at(loc, f"expected {expected}, got {format_value(value)}{hint}")
