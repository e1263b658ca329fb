"""The families that tests run over, by name: the `model_type`, with a suffix if a class has several variants."""

from __future__ import annotations

from family_cases.document_cases import DOCUMENT_CASES
from family_cases.family_case import FamilyCase
from family_cases.fixed_cases import FIXED_CASES
from family_cases.grid_cases import GRID_CASES
from family_cases.patch_cases import PATCH_CASES
from family_cases.separate_cases import SEPARATE_CASES
from family_cases.shipped_bases import SHIPPED
from family_cases.tile_cases import TILE_CASES

CASES: dict[str, FamilyCase] = {
    **SHIPPED,
    **FIXED_CASES,
    **GRID_CASES,
    **TILE_CASES,
    **DOCUMENT_CASES,
    **PATCH_CASES,
    **SEPARATE_CASES,
}
