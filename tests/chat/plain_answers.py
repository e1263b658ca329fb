"""Answers of plain transformers to prompts that are rendered by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image


def plain_answer(model: Any, processor: Any, text: str, images: list[Path], **settings: Any) -> str:
    """The answer to a rendered prompt, greedy unless `settings` of `generate` say otherwise."""
    opened = [Image.open(path).convert("RGB") for path in images] or None
    inputs = processor(text=text, images=opened, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, **{"do_sample": False, **settings})
    answer: str = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer
