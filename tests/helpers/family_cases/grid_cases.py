"""Families whose image is a grid of patches that keeps its aspect ratio."""

from __future__ import annotations

from family_cases.family_case import FamilyCase

GRID_CASES: dict[str, FamilyCase] = {}
