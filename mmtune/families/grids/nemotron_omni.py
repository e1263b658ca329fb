"""Nemotron 3 Omni: a Mamba hybrid with its own output head inside, and a projector for audio."""

from __future__ import annotations

from mmtune.families.family import Family

NEMOTRON_OMNI = Family("nemotron_omni", model_types=("nemotron_h_omni",), others=("audio_tower", "embed_audio"))
