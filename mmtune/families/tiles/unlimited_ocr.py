"""Unlimited-OCR: tiles in rows that end with a newline feature; its class splits them by numbers in a Python list."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmtune.families.family import Family


class UnlimitedOcr(Family):
    """Numbers of tiles in a tensor, as everything in a batch is."""

    def image_features(self, model: Any) -> Callable[..., Any]:
        """The features for numbers of tiles in a tensor."""
        return _with_list(model.get_image_features)

    def prepare_model(self, model: Any) -> None:
        """The class splits the tiles by a list, and fails with a tensor."""
        model.base_model.get_image_features = _with_list(model.base_model.get_image_features)


def _with_list(features: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(features)
    def get_image_features(
        pixel_values: Any, pixel_values_local: Any = None, num_local_patches: Any = None, *more: Any, **settings: Any
    ) -> Any:
        counts = None if num_local_patches is None else [int(count) for count in num_local_patches]
        return features(pixel_values, pixel_values_local, counts, *more, **settings)

    return get_image_features


UNLIMITED_OCR = UnlimitedOcr("unlimited_ocr", model_types=("unlimited_ocr",), processors=("UnlimitedOcrProcessor",))
