"""The report in Chromium: hostile text, both themes, a narrow window, hover and keyboard, filters, updates of a running run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import NARROW, WIDE, axe_violations, opened_page, overflow
from PIL import Image

from mmtune.evaluation.answers import Answer
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.comparison import tuning_metrics
from mmtune.recipe.recipe import Recipe
from mmtune.report.live_report import LiveReport
from mmtune.report.run_report import RunState, base_scores, rewrite_report, stops_reported, write_report
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import CheckFailed

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>{{ 7 * 7 }}\u2028\udcff\u202e"
LONG = "x" * 10_000
STEPS = 60


def _loss(step: int) -> float:
    return 2 * math.exp(-step / 20) + 0.001 * step


def _write_run(run: RunDirectory, recipe: Recipe, images: list[str], longest: int) -> RunDirectory:
    """The records of a finished run, without weights; texts and names are hostile, and one answer is `longest` of them long."""
    run.path.mkdir(parents=True)
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    versions = {"mmtune": "1", "torch": HOSTILE.encode("utf-8", "ignore").decode()}
    run.environment.write_text(json.dumps({"command": ["mmtune", HOSTILE], "versions": versions, "started": "now"}))
    lines = []
    for step in range(2, STEPS + 1, 2):
        lines.append({"step": step, "loss": _loss(step), f"loss/{HOSTILE}": 1.0, "loss/b": 2.0, "learning_rate": 1e-4 * step})
        if step % 20 == 0:
            lines.append({"step": step, "eval_loss": 1 / step})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    component = {"component": "language", "method": "lora", "weights": "fp32", "total": 10, "trainable": 5, "learning_rate": 1e-3}
    modules = {"class": "Llava", "components": [component], "modules": {f"model.{LONG[:300]}": [1, 5]}, "lines": [HOSTILE]}
    run.modules.write_text(json.dumps(modules))
    issues = [{"row": f"{HOSTILE}[{n}]", "field": "image", "detail": LONG, "issue": "row_unusable"} for n in range(30)]
    lists = {"quarantined": issues, "dropped_over_length": [], "media_changed": []}
    skipped = [{"step": 3, "rows": ["a"], "reason": HOSTILE}]
    run.data_report.write_text(json.dumps({"rows": 40, "checked": 40, "held_out": {}, **lists, "skipped_steps": skipped}))
    token = {"text": HOSTILE, "ids": "1", "kind": "prompt", "times": 1}
    tokens = [("prompt", [token, token]), ("media", [token | {"times": 16}]), ("supervised", [token] * 40), ("padding", [token])]
    row = {"row": HOSTILE, "summary": "44 tokens", "notes": [HOSTILE], "images": [{"name": HOSTILE, "error": HOSTILE}]}
    record = {"shape": "1 x 44", "packed": False, "sequences": 1, "rows": [row | {"images_known": True, "runs": tokens}]}
    run.first_batch.write_text(json.dumps(record))
    check = {"time": "now", "engine": HOSTILE, "same answers": "3 of 3", "result": HOSTILE}
    run.serving.write_text(json.dumps({"checks": [check]}))
    after, before = [], []
    for number in range(24):
        task = ("colour", HOSTILE)[number % 2]
        shared: dict[str, Any] = {"id": f"r[{number}]", "task": task, "images": (images[number % len(images)],)}
        shared |= {"question": HOSTILE if number else LONG, "references": (("yes", "no")[number % 4 // 2],)}
        shared |= {"cluster": str(number), "metric": "yes_no"}
        right = shared["references"][0]
        wrong = {"yes": "no", "no": "yes"}[right]
        texts = (right, wrong) if number % 3 else (wrong, right if number % 2 else wrong)
        for answers, text in ((after, texts[0]), (before, texts[1])):
            more = f" {HOSTILE * longest}" if number == 1 else ""
            answers.append(Answer(**shared, prediction=text + more, score=float(text == right), groups={"language": HOSTILE}))
    write_answers(after, run.answers("after"))
    write_answers(before, run.answers("before"))
    numbers = {"trainable_parameters": 5, "total_parameters": 10, "train_seconds": 2.0, "peak_memory_mb": 5.0, "steps": STEPS}
    merged = {"merge_samples": 4, "merge_same_answers": 4, "merge_dtype": "fp32", "merge_kl": 1e-9, "merge_tolerance": 1e-3}
    differences = ("max_logit_difference", "mean_logit_difference", "unrounded_difference", "difference_from_base")
    merged |= {f"merge_{name}": 0.5 for name in differences}
    run.update_summary(numbers | merged | tuning_metrics(before, after))
    return run


@pytest.fixture(scope="module")
def finished(
    make_recipe_in: Callable[..., Recipe], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDirectory, Recipe]:
    folder = tmp_path_factory.mktemp("report")
    images = []
    for number, size in enumerate(((32, 32), (1600, 200), (200, 1600))):
        images.append(str(folder / f"<img onerror=alert(3)>{number}.png"))
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images[-1])
    recipe = make_recipe_in(folder, f"evaluate.data=[{{path: {rows}, template: llava}}]", "evaluate.groups=[language]")
    run = _write_run(RunDirectory(folder / "run <b onclick=alert(4)>"), recipe, images, longest=12_000)
    rewrite_report(run)
    return run, recipe


@pytest.mark.parametrize(
    ("size", "theme"),
    [
        (WIDE, "light"),
        (NARROW, "dark"),
        pytest.param(WIDE, "dark", marks=pytest.mark.slow),
        pytest.param(NARROW, "light", marks=pytest.mark.slow),
    ],
    ids=["wide-light", "narrow-dark", "wide-dark", "narrow-light"],
)
def test_hostile_text_is_shown_as_text_in_every_theme_and_width(
    browser: Any, finished: tuple[RunDirectory, Recipe], size: tuple[int, int], theme: str
) -> None:
    run, _ = finished
    with opened_page(browser, run.report.as_uri(), size, theme) as (page, record):
        for details in page.query_selector_all("details"):
            details.evaluate("each => { each.open = true; }")
        assert (record.errors, record.dialogs, record.external) == ([], [], [])
        assert overflow(page) == 0
        assert axe_violations(page) == []
        assert page.locator("img[onerror], b[onclick], script[src], main script:not([type='application/json'])").count() == 0
        text = page.inner_text("main")
        assert "{{ 7 * 7 }}" in text and "</script><script>alert(1)" in text and "\\udcff" in text
        assert page.locator(".sample").count() == 24 and page.locator(".sample img").count() == 24
        for title in ("Curves", "Answers", "Data", "Adapted modules", "Checks of releases", "Recipe", "Versions"):
            assert page.get_by_role("heading", name=title, exact=True).count() == 1
        assert len(text) < 500_000  # an answer of a megabyte is cut


def test_the_values_under_the_pointer_and_of_the_arrow_keys_are_those_of_the_log(
    browser: Any, finished: tuple[RunDirectory, Recipe]
) -> None:
    with opened_page(browser, finished[0].report.as_uri()) as (page, record):
        chart = page.locator(".chart").first
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        step = 20  # of 2 to 60
        page.mouse.move(box["x"] + box["width"] * (step - 2) / (STEPS - 2), box["y"] + 40)
        shown = chart.locator(".tip").inner_text().split("\n")
        assert shown == ["step 20", f"training {float(f'{_loss(20):.5g}'):g}", "held out 0.05"]
        page.mouse.move(5, 5)
        assert chart.locator(".tip").is_hidden()

        chart.focus()
        page.keyboard.press("Home")
        assert chart.get_attribute("aria-valuetext") == f"step 2: training {float(f'{_loss(2):.5g}'):g}"
        page.keyboard.press("ArrowRight")
        assert chart.get_attribute("aria-valuenow") == "4"
        page.keyboard.press("End")
        assert chart.get_attribute("aria-valuetext").startswith("step 60: training ")
        page.keyboard.press("Escape")
        assert chart.locator(".tip").is_hidden()
        rates = page.locator(".plot", has_text="Learning rate").locator("tbody td").all_text_contents()
        assert rates[:2] == ["2", "0.0002"] and rates[-2:] == ["60", "0.006"]
        assert record.errors == []


def test_answers_are_filtered_by_keyboard_and_stay_so(browser: Any, finished: tuple[RunDirectory, Recipe]) -> None:
    run, _ = finished
    after, before = ({answer.id: answer for answer in read_answers(run.answers(when))} for when in ("after", "before"))
    better = {row for row in after if after[row].score > before[row].score}
    wrong = {row for row in after if not after[row].score}
    with opened_page(browser, run.report.as_uri()) as (page, record):

        def visible() -> set[str]:
            labels = page.locator(".sample:visible > p:last-child").all_text_contents()
            return {label.split(" · ")[0] for label in labels}

        count = page.locator("#filter-count")
        shown = visible()
        assert len(shown) == 24 and count.inner_text() == "24 of 24 answers" and count.get_attribute("role") == "status"
        page.locator("#filter-wrong").focus()
        page.keyboard.press("Space")
        assert visible() == wrong and count.inner_text() == f"{len(wrong)} of 24 answers"
        page.keyboard.press("Space")
        page.locator("#filter-change").focus()
        page.keyboard.type("bet")
        assert visible() == better and not page.get_by_role("heading", name="Worse than the base").is_visible()
        page.locator("#filter-group").select_option("colour")
        colours = {row for row in better if after[row].task == "colour"}
        assert visible() == colours and 0 < len(colours) < len(better)
        page.reload()
        assert visible() == colours and page.locator("#filter-change").input_value() == "better"

        first, second = page.locator(".tokens .token").nth(0), page.locator(".tokens .token").nth(1)
        first.focus()
        page.keyboard.press("ArrowRight")
        assert second.evaluate("each => each === document.activeElement") and first.get_attribute("tabindex") == "-1"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.tokens')") is None  # one stop for all tokens
        assert record.errors == []


def test_the_page_of_a_running_run_reads_itself_again_and_says_when_it_is_old(
    browser: Any, finished: tuple[RunDirectory, Recipe], tmp_path: Path
) -> None:
    run, recipe = finished
    live = RunDirectory(tmp_path / "run")
    run.path.rename(live.path)  # the same records
    try:
        for path in (live.summary,):
            path.rename(tmp_path / path.name)
        write_report(live, recipe, RunState("running", "Training: step 60 of 90."), base=base_scores(live))
        with opened_page(browser, live.report.as_uri()) as (page, record):
            page.clock.install()
            page.reload()
            assert page.locator(".badge").inner_text() == "running" and page.locator("#age").is_visible()
            assert axe_violations(page) == [] and page.locator("#answers").count() == 0
            assert "before tuning" in page.inner_text("#scores")
            with live.metrics.open("a") as file:
                file.write('{"step": 70, "loss": 0.5}\n')
            write_report(live, recipe, RunState("running", "Training: step 70 of 90."))
            page.locator("#whole-recipe summary").click()
            page.locator("#plot-1").focus()
            with page.expect_navigation():
                page.clock.fast_forward(15_000)
            assert "step 70 of 90" in page.inner_text("#state") and page.locator("#stale").inner_text() == ""
            assert page.locator("#whole-recipe").get_attribute("open") is not None
            assert page.evaluate("document.activeElement.id") == "plot-1"

            page.locator("#pause").focus()
            page.keyboard.press("Enter")
            write_report(live, recipe, RunState("running", "Training: step 80 of 90."))
            page.clock.fast_forward(300_000)
            assert "step 70 of 90" in page.inner_text("#state")  # paused
            assert page.locator("#pause").get_attribute("aria-pressed") == "true"
            assert "No update for some minutes" in page.inner_text("#stale")
            assert record.errors == [] and record.external == []

        with pytest.raises(CheckFailed), stops_reported(live, recipe, is_main_process=True):
            raise CheckFailed("the loss is nan at step 80; <b>")
        with opened_page(browser, live.report.as_uri()) as (page, record):
            assert page.locator(".badge").inner_text() == "stopped"
            assert "CheckFailed: the loss is nan at step 80; <b>" in page.inner_text("#state")
            assert page.locator("#age").is_hidden() and page.locator("#pause").is_hidden() and record.errors == []
        data_report = live.data_report.read_text()
        live.data_report.write_text("{")  # no page can be written
        with pytest.raises(CheckFailed, match="the first error"), stops_reported(live, recipe, is_main_process=True):
            raise CheckFailed("the first error")
        live.data_report.write_text(data_report)
    finally:
        (tmp_path / "summary.json").rename(live.summary)
        live.path.rename(run.path)
        rewrite_report(run)


def test_the_page_is_written_during_a_run_and_at_its_end(
    browser: Any, make_recipe: Callable[..., Recipe], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = []
    write = LiveReport.write

    def record(self: LiveReport, text: str) -> None:
        write(self, text)
        pages.append(run.report.read_text(encoding="utf-8"))

    monkeypatch.setattr("mmtune.report.live_report.INTERVAL_S", 0.0)
    monkeypatch.setattr("mmtune.report.live_report.MAX_SHARE", math.inf)
    monkeypatch.setattr(LiveReport, "write", record)
    recipe = make_recipe(
        f"evaluate.data=[{{path: {rows}, template: llava}}]",
        "evaluate.samples=4",
        "evaluate.max_new_tokens=4",
        "evaluate.leakage=warn",
    )
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["mmtune", "train"])
    assert len(pages) == 5  # before, after each step, and before the evaluation
    during = run.path / "during.html"
    during.write_text(pages[2], encoding="utf-8")
    for path, kind, state in ((during, "running", "Training: step 2 of 3"), (run.report, "finished", "Finished: 3 steps")):
        with opened_page(browser, path.as_uri(), NARROW) as (page, events):
            assert (events.errors, events.external, overflow(page)) == ([], [], 0)
            assert page.locator(".badge").inner_text() == kind and state in page.inner_text("#state")
            assert axe_violations(page) == []
            assert page.locator(".chart").count() >= 5 and page.locator("#batch .token.supervised").count() > 4
            assert page.locator("#batch img").count() == 4  # one image in each row
            assert page.locator(".sample").count() == (4 if kind == "finished" else 0)
            scores = page.inner_text("#scores")
            assert ("of the base, before tuning" in scores) == (kind == "running") and "overall" in scores
    assert pages[0].count('class="chart"') == 0 and "Training begins: 3 steps" in pages[0]

    stopped = make_recipe("train.learning_rate=1e30", "train.max_steps=8", f"output_dir={recipe.output_dir}-stopped")
    with suppress(CheckFailed):
        run = RunDirectory(Path(stopped.output_dir))
        train(stopped, ["mmtune", "train"])
        raise AssertionError("expected a loss that is not finite")
    page_text = run.report.read_text(encoding="utf-8")
    assert 'data-kind="stopped"' in page_text and "Stopped: CheckFailed: " in page_text


@pytest.mark.slow
def test_the_page_stays_small_after_many_steps_with_many_answers(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path
) -> None:
    images = []
    for number in range(60):
        images.append(str(tmp_path / f"{number}.png"))
        Image.effect_noise((320, 320), 90).convert("RGB").save(images[-1], compress_level=1)
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]", "evaluate.samples=10000")
    run = _write_run(RunDirectory(tmp_path / "run"), recipe, images, longest=1)
    answer = replace(read_answers(run.answers("after"))[0], prediction=f"yes {'&' * 5_000}", question="&" * 5_000)
    many = [replace(answer, id=f"r[{number}]", images=(images[number % 60],)) for number in range(400)]
    write_answers(many, run.answers("after"))
    line = json.dumps({f"loss/{name}": name + 0.5 for name in range(15)} | {"loss": 1.0, "eval_loss": 2.0, "grad_norm": 1.0})
    with run.metrics.open("w") as file:
        for step in range(1, 100_001):
            file.write(f'{{"step": {step}, {line[1:]}\n')
    rewrite_report(run)
    page = run.report.read_text(encoding="utf-8")
    assert 4e6 < len(page.encode()) < 10e6
    assert page.count('<li class="sample"') == 300 and "an image is left out" in page
    assert "3 further lines" in page
