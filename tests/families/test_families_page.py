"""`docs/families.md` and the numbers in the READMEs, compared with the families that the tests run over."""

from __future__ import annotations

import re

import pytest
from family_cases import CASES
from family_cases.write_families_page import PAGE, ROOT, page

from mmtune.families.family_table import NOT_SUPPORTED, OUT_OF_SCOPE


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run tests/helpers/family_cases/write_families_page.py"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_has_the_numbers_of_the_page(readme: str) -> None:
    works, total = re.findall(r"(\d+) of (\d+) types work", PAGE.read_text(encoding="utf-8"))[0]
    [numbers] = re.findall(r"\[(\d+)[^\d\]]+(\d+)[^\]]*\]\(docs/families\.md\)", (ROOT / readme).read_text(encoding="utf-8"))
    assert sorted(numbers) == sorted((works, total))


def test_a_type_that_works_has_no_reason_not_to() -> None:
    assert not {*CASES} & {*OUT_OF_SCOPE, *NOT_SUPPORTED}
