"""README and docs against the repository: translations, named paths, links, complete recipes, keys of other toolkits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmtune.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHER_PROJECTS = ("llava/",)
CODE_SPAN = re.compile(r"`[^`]+`")


def shape(text: str) -> dict[str, list[object]]:
    """What a translation keeps: levels of headings, code blocks, and of each table row the number of cells and their code."""
    prose = FENCE.sub("", text)
    rows = [line.strip("|").split("|") for line in prose.splitlines() if line.startswith("|")]
    return {
        "headings": [len(level) for level in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "code blocks": list(FENCE.findall(text)),
        "tables": [[CODE_SPAN.findall(cell) for cell in row] for row in rows],
        "indented blocks": re.findall(r"^ {4}\S.*", prose, re.MULTILINE),
    }


def test_the_chinese_readme_has_the_structure_of_the_english_one() -> None:
    english, chinese = (ROOT / "README.md").read_text("utf-8"), (ROOT / "README.zh-CN.md").read_text("utf-8")
    assert shape(chinese) == shape(english)
    assert sorted(re.findall(r"\]\((docs/\w+\.\w+)\)", chinese)) == sorted(re.findall(r"\]\((docs/\w+\.\w+)\)", english))
    assert "(README.zh-CN.md)" in english
    assert "(README.md)" in chinese
    assert re.findall(r"\d+\.\d+%?|\d+e-\d+", FENCE.sub("", chinese)) == re.findall(
        r"\d+\.\d+%?|\d+e-\d+", FENCE.sub("", english)
    )


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("headings", "## A\n"),
        ("code blocks", "# A\n\n```bash\nmake\n```\n"),
        ("tables", "# A\n\n| `b` | c |\n"),
        ("indented blocks", "# A\n\n    pip\n"),
    ],
)
def test_a_difference_of_two_pages_is_reported(kind: str, changed: str) -> None:
    assert {key for key, value in shape(changed).items() if value != shape("# A\n")[key]} == {kind}


def paths_named(text: str) -> set[str]:
    """Paths of files of this repository that a page names: `a/b.py`, and relative links."""
    return set(re.findall(r"(?<![\w/.<*-])((?:[\w-]+/)+[\w.-]+\.(?:py|json|jinja|txt|toml))\b(?![\w*{])", text))


def missing_paths(page: Path, text: str) -> list[str]:
    """Names of files with a known folder, that are neither below the root, the package nor the page's folder."""
    folders = {item.name for base in (ROOT, ROOT / "mmtune") for item in base.iterdir() if item.is_dir()} - {"data"}
    named = sorted(name for name in paths_named(text) if not name.startswith(OTHER_PROJECTS))
    own_paths = [name for name in named if name.split("/")[0] in folders or name.endswith(".py")]
    return [name for name in own_paths if not any((base / name).exists() for base in (ROOT, ROOT / "mmtune", page.parent))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    assert missing_paths(page, page.read_text("utf-8")) == []


def test_a_missing_path_is_reported() -> None:
    text = "see `mmtune/no_such_file.py`, `data/no_such_file.py` and `mmtune/train.py`"
    assert missing_paths(ROOT / "README.md", text) == ["data/no_such_file.py", "mmtune/no_such_file.py"]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def complete_recipes() -> list[tuple[str, str]]:
    """YAML blocks of the pages that name a model, data and an output directory, with the page and number as an id."""
    blocks = [
        (f"{page.name}-{number}", body)
        for page in PAGES
        for number, (_, body) in enumerate(FENCE.findall(page.read_text("utf-8")))
    ]
    return [
        (name, body)
        for name, body in blocks
        if all(re.search(rf"^{key}:", body, re.MULTILINE) for key in ("model", "data", "output_dir"))
    ]


@pytest.mark.parametrize(("name", "text"), complete_recipes(), ids=[name for name, _ in complete_recipes()])
def test_a_complete_recipe_of_a_page_is_valid(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml")
