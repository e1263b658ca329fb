"""Families without a vision tower: pixels are projected straight to embeddings, or become tokens of the vocabulary."""

from __future__ import annotations

from mmtune.families.family import Family

GEMMA4_UNIFIED = Family("gemma4_unified", model_types=("gemma4_unified",), encoder_free=True)
