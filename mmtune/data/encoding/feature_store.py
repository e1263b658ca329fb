"""Feature store: the features of a frozen vision tower on disk, one file for the images of a sample.

A file is found by the content of the images and by everything else that determines the tower's input. Data-loader workers look
it up, so that images whose features are stored are neither decoded nor processed. The training process writes the others.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import ProcessedImages, encode_sample
from mmtune.data.encoding.token_counts import processor_settings
from mmtune.data.media.image_content import content_digest
from mmtune.data.media.media import EmbeddedMedia, ImageView
from mmtune.data.message import Message, RowError, Sample, text_message
from mmtune.families.family_table import family_of_processor
from mmtune.utils.files import replace_bytes

FORMAT = 1
"""Version of the files. It is part of every key, so that older files are not read."""
FEATURES, MEDIA = "features.", "media."
"""Beginnings of the names of tensors in a file: those of the towers by number, and those of the image processor by name."""

StoredFeatures = dict[str, Any]
"""The entry `vision_features` of an encoded sample with images: its `key`; and `features`, the tensors that the towers return, or
else `media` and `replacements`, with which they are computed and stored. Only dictionaries and lists: the Trainer moves them."""


class FeatureStore:
    """Features of the images of samples, for one model and one processor.

    Args:
        folder: for the features of one model; created when a file is written.
        processor: the model's processor, whose settings must not change afterwards.
    """

    def __init__(self, folder: Path, processor: ProcessorMixin) -> None:
        self.folder = folder
        self._is_writable = True
        self._settings = {
            "format": FORMAT,
            "versions": [metadata.version(name) for name in ("transformers", "pillow", "mmtune")],
            "processor": [processor_settings(processor), processor.to_json_string()],
            "family": repr(family_of_processor(processor).image_settings),
        }

    def encode_images(
        self, sample_id: str, messages: list[Message], process: Callable[[], ProcessedImages]
    ) -> tuple[ProcessedImages, StoredFeatures | None]:
        """What `process` returns for the images of a sample, and their features.

        With stored features, the pixels are ones: only their shape matters.

        Args:
            process: decodes and processes the images.

        Raises:
            RowError: an image cannot be read or processed.
        """
        images = [block for message in messages for block in message["content"] if block["type"] == "image"]
        if not images:
            return ({}, []), None
        try:
            key = self._key(images)
        except (OSError, ValueError) as error:
            raise RowError(sample_id, "image", str(error), "image_unreadable") from error
        if (stored := self._read(key)) is not None:
            processed, features = stored
            return processed, {"key": key, "features": features}
        processed = process()
        return processed, {"key": key, "media": processed[0], "replacements": processed[1]}

    def _key(self, images: list[dict[str, Any]]) -> str:
        """32 characters that depend on everything that the tower's input depends on."""
        described = []
        for block in images:
            image = block["image"]
            view = (image.window, image.augmentation) if isinstance(image, ImageView) else None
            described.append([content_digest(image).hex(), repr(view), block.get("size")])
        return hashlib.blake2b(json.dumps([self._settings, described]).encode(), digest_size=16).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> tuple[ProcessedImages, list[torch.Tensor]] | None:
        """The processed images, with ones as pixels, and the features; None if there is no complete file."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        media = {name.removeprefix(MEDIA): tensor for name, tensor in tensors.items() if name.startswith(MEDIA)}
        for name, (dtype, shape) in json.loads(notes["pixels"]).items():
            media[name] = torch.ones((), dtype=getattr(torch, dtype)).expand(shape)
        count = sum(name.startswith(FEATURES) for name in tensors)
        return (media, json.loads(notes["replacements"])), [tensors[f"{FEATURES}{number}"] for number in range(count)]

    def write(self, key: str, media: Mapping[str, torch.Tensor], replacements: list[str], features: list[torch.Tensor]) -> None:
        """Store the features of a sample's images. If the disk is full or cannot be written, a warning is printed once.

        A file gets its name when it is complete, so that it can be written by several processes at once.

        Args:
            media, replacements: from the image processor.
        """
        if not self._is_writable:
            return
        tensors = {f"{FEATURES}{number}": tensor.cpu().contiguous() for number, tensor in enumerate(features)}
        pixels = {}
        for name, tensor in media.items():
            if tensor.is_floating_point():
                pixels[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            else:
                tensors[MEDIA + name] = tensor.cpu().contiguous()
        data = save(tensors, {"pixels": json.dumps(pixels), "replacements": json.dumps(replacements)})
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, data)
        except OSError as error:
            self._is_writable = False
            print(
                f"warning: data.cache_features: cannot write {path}: {error.strerror}; training continues, and features that are "
                "not stored are computed for every batch"
            )


def without_pixels(media: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The media tensors of a sample with ones, which take no memory, in place of pixels; padding stays distinct from images."""
    return {
        name: torch.ones((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_floating_point() else tensor
        for name, tensor in media.items()
    }


def probe_samples(processor: ProcessorMixin) -> list[dict[str, torch.Tensor]]:
    """Encoded samples with images of random pixels and several sizes: one image, none and two, where the processor takes them."""
    family = family_of_processor(processor)
    sizes: list[list[tuple[int, int]]] = [[(60, 40)], [], [(50, 80), (90, 40)]]
    sizes = [row[:1] if family.one_image else row for row in sizes if row or not family.needs_image]
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for row in sizes:
        content: list[dict[str, Any]] = []
        for size in row:
            file, noise = io.BytesIO(), torch.randint(0, 256, (size[0] * size[1] * 3,), generator=generator, dtype=torch.uint8)
            Image.frombytes("RGB", size, noise.numpy().tobytes()).save(file, "PNG")
            content.append({"type": "image", "image": EmbeddedMedia(Path("probe"), "probe.png", data=file.getvalue())})
        question = {"role": "user", "content": [*content, {"type": "text", "text": "?"}]}
        encoded.append(encode_sample(Sample("probe", [question, text_message("assistant", "yes")]), processor))
    return encoded
