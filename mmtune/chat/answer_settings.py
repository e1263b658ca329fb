"""Answer settings of a chat: length, sampling and seed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mmtune.utils.errors import UserError, nearest

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: at most this many new tokens per answer.
        temperature: 0 is greedy; otherwise tokens are sampled from softmax(logits / temperature).
        top_p: with a temperature, tokens are sampled from the smallest set whose probability is at least `top_p`.
        seed: of the sampled tokens.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:  # logits / temperature must be finite
            raise UserError(f"temperature {self.temperature:g}: expected 0 (greedy) or a number from 0.01 to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p:g}: expected a number above 0, and at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed}: expected an integer from 0 to {MAX_SEED}")

    def with_value(self, name: str, text: str) -> AnswerSettings:
        """The settings with another value of one of them.

        Raises:
            UserError: an unknown name, or a text that is not a valid value.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if name not in values:
            raise UserError(f"unknown setting '{name[:100]}'{nearest(name, values)}")
        is_integer = isinstance(values[name], int)
        try:
            return AnswerSettings(**{**values, name: int(text) if is_integer else float(text)})
        except ValueError as error:
            kind = "an integer" if is_integer else "a number"
            raise UserError(f"{name}: expected {kind}, got '{text[:100]}'") from error

    def generation(self) -> dict[str, Any]:
        """The settings of transformers' GenerationConfig besides `max_new_tokens`."""
        if not self.temperature:
            return {}
        # transformers' default of top_k is 50
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def __str__(self) -> str:
        sampling = "" if self.temperature else " (greedy: top_p and seed have no effect)"
        return (
            f"temperature {self.temperature:g}{sampling}, top_p {self.top_p:g}, seed {self.seed}, "
            f"max_new_tokens {self.max_new_tokens}"
        )
