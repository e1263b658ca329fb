"""Text of generated answers: without special tokens, but with those of regions, which are a part of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mmtune.chat_templates.jinja_rendering import BOX_TOKENS


class AnswerDecoder:
    """Decodes the tokens of answers; it has the method of a tokenizer that transformers' text streamers call.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        skipped = {number for number, content in special.items() if not BOX_TOKENS.fullmatch(content)}
        self._skipped = skipped if len(skipped) < len(special) else None
        """The ids of special tokens that are left out; None if the tokenizer leaves out all of them itself."""

    def decode(self, tokens: Any, **options: Any) -> str:
        """The text of one answer.

        Args:
            tokens: token ids, as a list or a tensor of shape (length,).
            options: of the tokenizer's `decode`.
        """
        if self._skipped is None:
            return str(self._tokenizer.decode(tokens, **{**options, "skip_special_tokens": True}))
        text = [token for token in (tokens if isinstance(tokens, list) else tokens.tolist()) if token not in self._skipped]
        return str(self._tokenizer.decode(text, **{**options, "skip_special_tokens": False}))


def decode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """The texts of generated answers, given as token ids, by `AnswerDecoder`."""
    decoder = AnswerDecoder(tokenizer)
    return [decoder.decode(list(answer)) for answer in answers]
