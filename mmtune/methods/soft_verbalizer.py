"""Soft verbalizer: the output embeddings of the labels' tokens train, as PEFT's trainable tokens (WARP, arXiv 2101.00121).

A label is one token. Its logit at the position of the answer is the product of the hidden state there and the label's vector,
which starts as the base's output embedding of the token. All other rows of the head stay frozen, so that the adapter holds one
vector for each label, and a merge changes these rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmtune.methods.method import Setting
from mmtune.utils.errors import UserError

SOFT_VERBALIZER = "soft_verbalizer"
LABELS_SETTING = {
    SOFT_VERBALIZER: Setting(
        list[str] | None,
        "The labels, each a word of one token: their output embeddings train, and the rest of the head stays frozen.",
    )
}


def label_conflicts(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the labels, as `Method.conflicts`."""
    labels = settings.get(SOFT_VERBALIZER)
    if labels is None:
        return
    if len(set(labels)) < max(2, len(labels)):
        yield SOFT_VERBALIZER, f"expected two or more different labels, got {labels}"
    if settings.get("trainable_token_indices") is not None:
        yield SOFT_VERBALIZER, "not supported with trainable_token_indices, which it sets; leave one out"


def trained_rows(model: Any, tokens: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """PEFT's `trainable_token_indices` of the labels: rows of the head; of head and embeddings where both are one matrix.

    Args:
        model: the base.
        tokens: the labels' token ids.

    Raises:
        UserError: PEFT would not train the head's rows.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:  # huggingface/peft issue 3649
        raise UserError(f"{SOFT_VERBALIZER}: the head of {type(model).__name__} has a bias, which PEFT would leave out")
    is_tied = head.weight is model.get_input_embeddings().weight
    if not is_tied:
        return {next(name for name, module in model.named_modules() if module is head): [*tokens]}
    if not model.config.to_dict().get("tie_word_embeddings"):  # what PEFT reads
        raise UserError(
            f"{SOFT_VERBALIZER}: the head is tied to the embeddings, and the base's config.json lacks tie_word_embeddings: true"
        )
    return [*tokens]
