"""The families that tests run over, by name: the `model_type`, with a suffix if a class has several variants."""

from __future__ import annotations

from family_cases.family_case import FamilyCase
from family_cases.shipped_bases import SHIPPED

CASES: dict[str, FamilyCase] = {**SHIPPED}
