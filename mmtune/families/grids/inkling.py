"""Inkling: the last layer of its vision tower maps to the width of the language model."""

from __future__ import annotations

from typing import Any

from mmtune.families.family import Family


class Inkling(Family):
    """A tower without a projector of its own."""

    def projector_of(self, model: Any) -> tuple[str, ...]:
        """The last layer of the tower, and the norm after it."""
        last = len(model.model.vision_tower.encoder_layers) - 1
        return f"model.vision_tower.encoder_layers.{last}", "model.vision_tower.final_norm"


INKLING = Inkling("inkling", model_types=("inkling_mm_model",))
