"""MiniCPM-V 4.7: slices and the whole image, with positions on the canvas of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class MiniCpm(Family):
    """Positions that the markers of slices in the text determine."""

    def planned_batch(self, batch: dict[str, torch.Tensor], images: int) -> dict[str, torch.Tensor]:
        """Positions of plain text, because the planned text has no markers; memory is the same."""
        return batch | {"mm_token_type_ids": batch["input_ids"] * 0}


MINICPM = MiniCpm(
    "minicpm",
    model_types=("minicpmv4_7",),
    processors=("MiniCPMV4_7Processor",),
    unpackable="its positions follow the slices of the images of a whole row",
)
