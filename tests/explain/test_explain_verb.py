"""Verb `mmtune explain` and its page: what is printed, what JSON has, and what a browser shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import NARROW, axe_violations, opened_page, overflow
from PIL import Image

from mmtune.cli.explain_verb import METHODS
from mmtune.cli.main import entry_point
from mmtune.explain.explanation import AnswerToken, CellScores, Explanation, PromptWord
from mmtune.explain.explanation_methods import EXPLANATION_METHODS
from mmtune.report.explanations.explanation_page import LOWERS, OPAQUE, RAISES, explanation_values, heat_map, write_explanation

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_verb_prints_json_and_writes_a_page(
    base: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "why.html"
    question = ["explain", str(base), "--image", str(image), "--prompt", "Which is larger?", "--answer", " 3 7 "]
    assert entry_point([*question, "--grid", "2", "--out", str(out), "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["answer"] == "3 7"
    assert np.array(result["images"][0]["scores"]).shape == (len(result["tokens"]), 1, 2)
    assert [word["text"] for word in result["words"]] == ["Which", "is", "larger?"]
    assert "occlusion: 6 forward passes of" in output.err
    assert "answer: 3 7 (log-probability" in output.err
    assert "://" not in out.read_text(encoding="utf-8")


def test_the_methods_of_the_verb_are_those_of_the_table() -> None:
    assert set(METHODS) == set(EXPLANATION_METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer", "  "], "--answer: expected a text"),
        (["--grid", "0"], "--grid 0: expected at least 1"),
        (["--grid", "41"], "grid 41: the image has 40 x 24 pixels"),
        (["--out", "why.txt"], "--out why.txt: expected a .html file"),
        (["--window", "2", "1"], "--window 2 1: expected LOW HIGH"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_a_mistake_is_one_message(
    base: Path, image: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    question = ["explain", str(base), "--image", str(image), "--prompt", "Which?", "--answer", "7"]
    assert entry_point([*question, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_heat_map_has_a_pixel_for_each_cell_with_opacity_by_score() -> None:
    import io

    pixels = np.asarray(Image.open(io.BytesIO(heat_map(np.array([[2.0, -1.0], [0.0, 0.5]])))))
    assert pixels.shape == (2, 2, 4)
    assert pixels[0, 0].tolist() == [*RAISES, OPAQUE]
    assert pixels[0, 1].tolist() == [*LOWERS, round(OPAQUE / 2)]
    assert pixels[1, 0, 3] == 0


@pytest.fixture
def page(image: Path, tmp_path: Path) -> Path:
    scores = np.array([[[1.0, 0.0]], [[0.0, -2.0]], [[0.0, 0.0]]])
    words = (PromptWord("Which", (0.5, -0.5, 0.0)), PromptWord(HOSTILE, (0.0, 1.0, 0.0)))
    words += (PromptWord("\u202eleft", (0.0, 0.0, 0.0)),)
    tokens = (AnswerToken("3", -0.1), AnswerToken(HOSTILE, -2.0), AnswerToken("  ", -0.001))
    explanation = Explanation("occlusion", f"3{HOSTILE}", tokens, (CellScores(40, 24, scores),), words)
    write_explanation(explanation, [image], HOSTILE, tmp_path / "why.html")
    return tmp_path / "why.html"


def test_of_a_long_prompt_the_words_with_the_largest_scores_are_shown(tmp_path: Path) -> None:
    tokens, count = 500, 300
    random = np.random.default_rng(0).normal(size=(count, tokens))
    words = tuple(PromptWord(f"w{number}", tuple(scores)) for number, scores in enumerate(random))
    explanation = Explanation("occlusion", "7", (AnswerToken("7", -1.0),) * tokens, (), words)
    write_explanation(explanation, [], "?", tmp_path / "why.html")
    assert (tmp_path / "why.html").stat().st_size < 4_000_000
    view = explanation_values(explanation, [])["views"][1]
    strongest = sorted(range(count), key=lambda number: -abs(random[number, 0]))[: len(view["words"])]
    assert [word["text"] for word in view["words"]] == [f"w{number}" for number in sorted(strongest)]
    assert len(strongest) + view["words_left_out"] == count
    assert len(strongest) > 30


def test_the_page_escapes_the_reversal_of_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "\u202e" not in text
    assert "\\u202eleft" in text


def test_the_arrow_keys_choose_a_token_and_its_heat_map(browser: Any, page: Path) -> None:
    with opened_page(browser, page.as_uri()) as (opened, record):
        assert opened.locator("figure [data-view]:visible").all_inner_texts()[-1].splitlines()[-1].endswith("100%")
        assert "no cell raises it" not in opened.inner_text("figure")
        opened.locator("input[type=radio]").first.focus()
        opened.keyboard.press("ArrowRight")
        opened.keyboard.press("ArrowRight")
        assert opened.locator(".choice").all_inner_texts() == ["whole answer", "3", HOSTILE, "\u2423\u2423"]
        assert opened.locator(".overlay:visible").count() == 1
        assert opened.locator(".overlay:visible").get_attribute("data-view") == "2"
        assert "no cell raises it" in opened.inner_text("figure")
        assert opened.locator(".word.raises-5:visible").inner_text() == HOSTILE
        assert opened.locator(".word.lowers-2:visible, .word.lowers-3:visible").inner_text() == "Which"
    assert (record.errors, record.dialogs, record.external) == ([], [], [])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_a_narrow_window(browser: Any, page: Path, theme: str) -> None:
    with opened_page(browser, page.as_uri(), NARROW, theme) as (opened, record):
        assert overflow(opened) == 0
        assert axe_violations(opened) == []
        box, overlay = (opened.locator(selector).first.bounding_box() for selector in (".map > img", ".overlay"))
        assert box == overlay
    assert (record.errors, record.dialogs, record.external) == ([], [], [])
