"""Families that split an image into tiles."""

from __future__ import annotations

from family_cases.family_case import FamilyCase

TILE_CASES: dict[str, FamilyCase] = {}
