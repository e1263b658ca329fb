"""Checks of a processor before rows are encoded: exact labels, and the processor's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import CHAT_TEMPLATE_HINT, IGNORE_INDEX, encode_prompt, encode_sample, open_images
from mmtune.data.media.media import blank_image
from mmtune.data.message import Message, RowError, Sample, text_message
from mmtune.families.family_table import PLAIN, family_of_processor
from mmtune.utils.errors import RecipeValueError, UserError, reason_of


def check_encoding(processor: ProcessorMixin) -> None:
    """Check that the chat template gives exact labels, and that a family without an entry is encoded as by its processor.

    Raises:
        UserError: as `check_chat_template` and `check_plain_family`.
    """
    check_chat_template(processor)
    if family_of_processor(processor) is PLAIN:
        check_plain_family(processor)


def check_chat_template(processor: ProcessorMixin) -> None:
    """Check with two short conversations that exactly the answer and its end-of-turn token are supervised.

    Conversations of several turns are checked sample by sample: `encode_sample` counts their spans.

    Raises:
        UserError: more or fewer tokens are supervised, for example no end-of-turn token.
    """
    has_encoder = family_of_processor(processor).decoder_start(processor) is not None
    for word in ("yes", "no"):
        span = _supervised_tokens(processor, word)
        # BART's decoder also writes the first special token.
        text = processor.tokenizer.decode(span[:-1], skip_special_tokens=has_encoder)
        end = processor.tokenizer.decode(span[-1:])
        if text.strip() != word:
            raise RecipeValueError(
                "model",
                f"expected the answer {word!r} and one end-of-turn token to be supervised, got {text + end!r}; "
                f"{CHAT_TEMPLATE_HINT}",
            )


def _supervised_tokens(processor: ProcessorMixin, answer: str) -> list[int]:
    images = [{"type": "image", "image": blank_image()}] * family_of_processor(processor).needs_image
    messages: list[Message] = [
        {"role": "user", "content": [*images, {"type": "text", "text": "Is it?"}]},
        text_message("assistant", answer),
    ]
    try:
        labels = encode_sample(Sample("chat template", messages), processor)["labels"]
    except RowError as error:
        raise RecipeValueError(
            "model", f"the chat template gives no exact labels: {error.detail}; {CHAT_TEMPLATE_HINT}"
        ) from error
    tokens: list[int] = labels[labels != IGNORE_INDEX].tolist()
    return tokens


def label_tokens(processor: ProcessorMixin, labels: Sequence[str]) -> list[int]:
    """The token of each label of a soft verbalizer, as the chat template writes it in an answer.

    Raises:
        RecipeValueError: a label of several tokens, or two labels of one token.
    """
    tokens = []
    for label in labels:
        answer = _supervised_tokens(processor, label)[:-1]
        if len(answer) != 1 or answer[0] in tokens:
            pieces = ", ".join(repr(processor.tokenizer.decode([token])) for token in answer)
            problem = f"is {len(answer)} tokens ({pieces})" if len(answer) != 1 else "has the token of another label"
            raise RecipeValueError(
                "tune.language.soft_verbalizer",
                f"expected labels of one token each, all different; '{label}' {problem}: give the labels other words, such as "
                "A and B, here and in the rows (a source's verbalizer)",
            )
        tokens += answer
    return tokens


def check_system_prompt(processor: ProcessorMixin, text: str) -> None:
    """Check that the chat template writes a system prompt: some reject it, and some leave it out.

    Raises:
        UserError: it does not, or the text is not valid Unicode.
    """
    images = [{"type": "image", "image": blank_image()}] * family_of_processor(processor).needs_image
    question: Message = {"role": "user", "content": [*images, {"type": "text", "text": "Is it?"}]}

    def prompt_ids(system: str) -> list[int]:
        messages: list[Message] = [text_message("system", system), question]
        ids: list[list[int]] = encode_prompt("system prompt", messages, processor)["input_ids"].tolist()
        return ids[0]

    if prompt_ids(text) == prompt_ids(f"{text} {text}"):
        raise UserError("system prompt: the model's chat template leaves it out; put the text into your question")


def check_plain_family(processor: ProcessorMixin) -> None:
    """Compare an encoded question with an image with what the processor itself returns for it.

    Families with an entry are compared by tests. For others this is the proof that tokens and media are those of the release. A
    line says where the processor's own chat template call fails.

    Raises:
        UserError: a tensor is missing, or differs.
    """
    name = type(processor).__name__
    content = [{"type": "image", "image": blank_image()}, {"type": "text", "text": "Is it?"}]
    messages: list[Message] = [{"role": "user", "content": content}]
    try:
        expected: dict[str, Any] = dict(
            processor.apply_chat_template(
                [open_images("chat template", messages)],  # older processors take no single text
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
        )
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
    ) as error:  # in other code
        print(f"{name}: its encoding is not compared: its apply_chat_template fails ({reason_of(error)})")
        return
    encoded = encode_prompt("chat template", messages, processor)
    wrong = [key for key, value in expected.items() if key not in encoded or not _is_same(encoded[key], value)]
    if wrong:
        raise UserError(
            f"{name}: expected a question with an image to be encoded as by its apply_chat_template; not so: {', '.join(wrong)}; "
            "the family needs an entry (CONTRIBUTING.md)"
        )


def _is_same(tensor: torch.Tensor, expected: Any) -> bool:
    return torch.equal(tensor, torch.as_tensor(expected).to(tensor.dtype))
