"""Families whose image features are not tokens of the decoder's sequence."""

from __future__ import annotations

from family_cases.family_case import FamilyCase

SEPARATE_CASES: dict[str, FamilyCase] = {}
