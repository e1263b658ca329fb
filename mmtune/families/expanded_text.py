"""The texts of images, read back from the token ids of a processor that does not report them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.utils.errors import RecipeValueError

TEXT_KEYS = {
    *("text_replacement_offsets", "input_ids", "attention_mask", "labels"),
    *("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"),
}
"""Outputs of a processor that belong to its text."""


def expanded_images(processor: Any, images: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """The media outputs of a processor without `replace_image_token`, and the text with which it replaced each placeholder.

    The end-of-sequence token stands between the placeholders, and every text must give the same token ids again.

    Args:
        images: of one sample, in order; at least one PIL image.

    Raises:
        UserError: the token ids do not show which text stands for which image.
        ValueError: an image that the processor rejects.
    """
    tokenizer, separator = processor.tokenizer, processor.tokenizer.eos_token
    unknown = RecipeValueError(
        "model", f"{type(processor).__name__} has no `replace_image_token`, and its token ids do not show the text of an image"
    )
    text = separator.join([processor.image_token] * len(images))
    try:
        outputs: Mapping[str, Any] = processor(text=[text], images=list(images), return_tensors="pt")
    except NotImplementedError as error:  # from `replace_image_token` itself
        raise unknown from error
    ids = outputs["input_ids"][0].tolist()
    empty = tokenizer("")["input_ids"]
    while empty and ids[:1] == empty[:1] and ids[0] != tokenizer.eos_token_id:
        ids, empty = ids[1:], empty[1:]
    if empty and ids[-len(empty) :] == empty:
        ids = ids[: -len(empty)]
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.eos_token_id:
            parts.append([])
        else:
            parts[-1].append(token)
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(part, **settings) for part in parts]
    again = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if len(parts) != len(images) or again != parts or not all(parts):
        raise unknown
    return {key: value for key, value in outputs.items() if key not in TEXT_KEYS}, texts
