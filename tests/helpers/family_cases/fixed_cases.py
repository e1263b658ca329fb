"""Families with a fixed number of tokens for every image."""

from __future__ import annotations

from family_cases.family_case import FamilyCase

FIXED_CASES: dict[str, FamilyCase] = {}
