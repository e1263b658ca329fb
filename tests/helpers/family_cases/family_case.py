"""A family of the tests: a tiny checkpoint, and what its chat template writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmtune.models.tiny.tiny_bases import TinyBase


@dataclass(frozen=True)
class FamilyCase:
    """One family of the tests.

    Attributes:
        base: its tiny checkpoint.
        end: the end-of-turn token of its chat template.
        leading: supervised text before an answer, if the generation prompt ends without it.
        needs_image: whether its processor takes no conversation without an image.
        plain_call: arguments without which plain transformers' processor makes no inputs for its model.
        one_image: whether its processor takes at most one image in a conversation.
        alone: whether the reference computes every row alone, because in plain transformers a row can depend on the others of its
            batch, and does not in mmtune.
        idle: a regular expression of the trained tensors on which no image feature depends, so that their gradient is zero.
        flat_images: whether its processor takes the images of a conversation in one list, which `apply_chat_template` nests.
        unpredictable: whether its memory cannot be predicted, because the class computes with positions that weights determine.
        lists: inputs that its class in plain transformers takes only as Python lists.
        supervise: `data.supervise`: a decoder with an encoder writes one answer, so that only the last turn can be one.
        projector: whether the model has a projector.
        template_file: a chat template that a user must write, because the release has none and no shipped one fits.
    """

    base: TinyBase
    end: str = "<|im_end|>"
    leading: str = ""
    needs_image: bool = False
    one_image: bool = False
    alone: bool = False
    idle: str = "(?!)"
    flat_images: bool = False
    unpredictable: bool = False
    lists: tuple[str, ...] = ()
    plain_call: dict[str, Any] = field(default_factory=dict)
    supervise: str = "all"
    projector: bool = True
    template_file: str | None = None
