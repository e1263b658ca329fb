"""Record of the first batch of a run exactly as the model gets it: its tokens, which of them are supervised, and its images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mmtune.data.encoding.encode import IGNORE_INDEX
from mmtune.data.message import RowError, Sample
from mmtune.data.validation.show_sample import SampleView, Token, escape_invisible, token_texts, view_sample
from mmtune.recipe.recipe import DataSection
from mmtune.report.sample_page import image_name, page_image, page_tokens
from mmtune.utils.files import replace_text

SHOWN_ROWS = 8
SHOWN_TOKENS = 2_000
"""Tokens of one row; repeated ones of an image count as one."""
IMAGE_BYTES = 1_500_000
"""The embedded images together."""


def record_first_batch(
    path: Path,
    processor: ProcessorMixin,
    section: DataSection,
    batch: Mapping[str, Any],
    rows: Sequence[str],
    samples: Mapping[str, Sample],
) -> None:
    """Write the first rows of a batch to `first_batch.json`, as the report shows them.

    Args:
        section: the recipe's data section.
        batch: of `Collator`, on the CPU.
        rows: the ids of its rows, in their order.
        samples: the samples of the rows whose images are shown, by id.
    """
    sequences = _sequences(batch)
    shown = []
    budget = IMAGE_BYTES
    for number, (ids, labels, attended) in enumerate(sequences[:SHOWN_ROWS]):
        row = rows[number] if number < len(rows) else "dummy sample"
        view = _view(samples.get(row), processor, section)
        media = _media_mask(ids, view, processor)
        images: list[dict[str, Any]] = []
        for position, image in enumerate(view.sample.images if view else ()):
            if budget <= 0:
                images.append({"name": image_name(image), "error": "left out: the batch has many images"})
                continue
            images.append(page_image(image, view.regions_of(position) if view else ()))
            budget -= len(images[-1].get("data", ""))
        tokens = _tokens(processor.tokenizer, ids, labels, attended, media)
        runs = [
            (kind, [asdict(each) for each in page_tokens(list(run))]) for kind, run in groupby(tokens, lambda each: each.kind)
        ]
        supervised = sum(label != IGNORE_INDEX for label in labels)
        shown.append(
            {
                "row": escape_invisible(row),
                "summary": f"{sum(attended):,} tokens, {supervised:,} of them supervised, {len(ids) - sum(attended):,} padding",
                "notes": view.notes if view else [],
                "images": images,
                "images_known": view is not None or row not in rows,
                "runs": _cut(runs),
            }
        )
    first = sequences[0][0] if sequences else []
    packed = "position_ids" in batch
    shape = f"1 x {sum(len(ids) for ids, _, _ in sequences):,}" if packed else f"{len(sequences):,} x {len(first):,}"
    record = {"shape": shape, "packed": packed, "sequences": len(sequences), "rows": shown}
    replace_text(path, json.dumps(record, ensure_ascii=True) + "\n")


def _sequences(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int], list[bool]]]:
    """For each row its tokens, labels, and whether a token is attended to; a packed batch is split into its samples."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    mask = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(row) for row in ids]
    if "decoder_input_ids" in batch:  # the labels are those of the decoder, whose tokens follow those of the question
        target = batch["decoder_input_ids"].tolist()
        mask = [
            [*row, *(label != IGNORE_INDEX or at == 0 for at, label in enumerate(own))]
            for row, own in zip(mask, labels, strict=True)
        ]
        labels = [[IGNORE_INDEX] * len(row) + own for row, own in zip(ids, labels, strict=True)]
        ids = [row + own for row, own in zip(ids, target, strict=True)]
    rows = [(row, own, [bool(each) for each in seen]) for row, own, seen in zip(ids, labels, mask, strict=True)]
    if "position_ids" not in batch:
        return rows
    [(packed, own, seen)] = rows
    starts = [at for at, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    bounds = zip(starts, [*starts[1:], len(packed)], strict=True)
    return [(packed[start:end], own[start:end], seen[start:end]) for start, end in bounds]


def _view(sample: Sample | None, processor: ProcessorMixin, section: DataSection) -> SampleView | None:
    if sample is None:
        return None
    try:
        return view_sample(sample, processor, section)
    except RowError:  # a row that cannot train: a dummy sample took its place
        return None


def _media_mask(ids: Sequence[int], view: SampleView | None, processor: ProcessorMixin) -> list[bool]:
    """For each token whether it belongs to an image: as the sample says if its tokens are those of the batch, else by its id."""
    if view is not None and [token.id for token in view.tokens] == list(ids[: len(view.tokens)]):
        return [token.kind == "media" for token in view.tokens] + [False] * (len(ids) - len(view.tokens))
    image_token = getattr(processor, "image_token_id", None)
    return [each == image_token for each in ids]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], attended: Sequence[bool], media: Sequence[bool]
) -> list[Token]:
    texts = token_texts(tokenizer, ids)
    return [
        Token(
            each,
            text,
            "padding" if not seen else "media" if is_media else "supervised" if label != IGNORE_INDEX else "prompt",
        )
        for each, text, label, seen, is_media in zip(ids, texts, labels, attended, media, strict=True)
    ]


def _cut(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The runs up to `SHOWN_TOKENS` tokens, then how many follow."""
    shown, left = [], SHOWN_TOKENS
    for kind, run in runs:
        shown.append((kind, run[:left]))
        left -= len(shown[-1][1])
        if left == 0:
            break
    hidden = sum(len(run) for _, run in runs) - sum(len(run) for _, run in shown)
    note = {"text": f"\u2026 {hidden:,} more tokens", "ids": "", "kind": "prompt", "times": 1}
    return [*((kind, run) for kind, run in shown if run), *([("prompt", [note])] if hidden else [])]
