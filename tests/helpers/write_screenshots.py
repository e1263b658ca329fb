"""Writes the pictures of docs/screenshots: pages of runs of the built-in model on digits, in headless Chromium.

    .venv/bin/python tests/helpers/write_screenshots.py                   # trains two runs: about ten minutes on two CPU cores
    .venv/bin/python tests/helpers/write_screenshots.py --folder FOLDER   # keeps the runs there, and takes those that exist
    .venv/bin/python tests/helpers/write_screenshots.py --folder FOLDER --only chat

A picture has at most 150 kB, so that a clone stays small. Look at each of them before you commit it.
"""

from __future__ import annotations

import argparse
import io
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import chromium, opened_page
from PIL import Image

from mmtune.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "screenshots"
WIDE, NARROW = (1100, 800), (400, 760)
CHAT, TRAINING = (1100, 900), (1100, 1120)
SCALE = 1.4
"""Pixels of a picture for one of the page, so that text is sharp where a picture is shown smaller."""
MAX_BYTES = 150_000
IMAGE, QUESTION = "digits/images/eval/00003.png", "Which is the larger digit, top left or bottom right?"
EVALUATION = (
    "train.eval_strategy=steps",
    "train.eval_steps=80",
    "evaluate.while_training={rows: 100, answers: true}",
    "evaluate.explain=6",
)
RUNS = {"quickstart": (), "rank-4": ("tune.language.r=4", "train.max_steps=400", "train.learning_rate=2e-3")}
"""The runs by name, with what differs from the recipe of the quickstart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--only", default="", help="only the pictures whose names begin with this")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        Screenshots(browser, (arguments.folder or Path(temporary)).resolve(), arguments.only).take_all()


class Screenshots:
    """Takes the pictures.

    Args:
        folder: of the digits and the runs.
        only: the beginning of the names of the pictures that are written.
    """

    def __init__(self, browser: Any, folder: Path, only: str) -> None:
        self._browser, self._folder, self._only = browser, folder, only

    def take_all(self) -> None:
        """Train the runs that are missing, and write the pictures."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "digits").exists():
            self._mmtune("data", "digits", "digits")
        for name, overrides in RUNS.items():
            if not self._run(name).summary.exists():
                self._train(name, overrides)
        pictures = {
            "report": self.report,
            "comparison": self.comparison,
            "tokens": self.tokens,
            "explain": self.explain,
            "chat": self.chat,
        }
        for name, take in pictures.items():
            if name.startswith(self._only) or self._only.startswith(name):
                take()

    def report(self) -> None:
        """The report of a finished run."""
        self._mmtune("report", "runs/quickstart")  # written by the present code
        page_file = self._run("quickstart").report
        for theme in ("light", "dark"):
            with self._page(page_file.as_uri(), WIDE, theme) as page:
                self._save(page, f"report-{theme}")
        with self._page(page_file.as_uri(), NARROW) as page:
            self._save(page, "report-narrow")
        with self._page(page_file.as_uri(), WIDE) as page:
            self._save(page, "report-curves", "#curves", height=820)
            self._save(page, "report-answers", "#answers", height=760)
            self._save(page, "report-batch", "#batch", height=470)

    def comparison(self) -> None:
        """The page that compares two runs."""
        self._mmtune("report", *(f"runs/{name}" for name in RUNS), "--html", "comparison.html")
        with self._page((self._folder / "comparison.html").as_uri(), WIDE) as page:
            self._save(page, "comparison")

    def tokens(self) -> None:
        """The page of a row's tokens."""
        self._mmtune("data", "show", "runs/quickstart/recipe.yaml", "--html", "tokens.html")
        with self._page((self._folder / "tokens.html").as_uri(), WIDE) as page:
            self._save(page, "tokens")

    def explain(self) -> None:
        """The page of an explanation, at the token that reads one place of the image."""
        self._mmtune("explain", "runs/quickstart", "--image", IMAGE, "--prompt", QUESTION, "--out", "why.html")
        with self._page((self._folder / "why.html").as_uri(), (800, 640)) as page:
            page.locator("label").nth(1).click()
            self._save(page, "explain")

    def chat(self) -> None:
        """The chat page: a conversation in a wide and a narrow window, compared answers, and the prompt as tokens."""
        with self._server("chat", "runs/quickstart", "--web") as url:
            for theme in ("light", "dark"):
                with self._page(url, CHAT, theme) as page:
                    self._converse(page)
                    self._save(page, f"chat-{theme}")
                    if theme == "dark":
                        continue
                    page.get_by_role("button", name="Answer with base and tuned").click()
                    page.wait_for_function(
                        "[...document.querySelectorAll('textarea')].some((box) => box.value.includes('Answer:'))"
                    )
                    self._save(page, "chat-compare", ".tabs")
                    for tab, button, frame in (
                        ("Prompt tokens", "Show the prompt as tokens", "Prompt as tokens"),
                        ("Why", "Explain the last answer", "Explanation"),
                    ):
                        page.get_by_role("tab", name=tab).click()
                        page.get_by_role("button", name=button).click()
                        page.wait_for_selector(f"iframe[title='{frame}']")
                        self._save(page, f"chat-{frame.split()[0].lower()}", ".tabs")
            with self._page(url, NARROW) as page:
                self._converse(page)
                self._save(page, "chat-narrow")

    def _converse(self, page: Any) -> None:
        """Ask two questions about an image."""
        for number, text in enumerate((QUESTION, "Is there a 5 in the picture?")):
            page.wait_for_selector("#question textarea:enabled")
            if number == 0:
                page.locator("#question input[type=file]").set_input_files(self._folder / IMAGE)
                page.wait_for_selector("#question img")
            page.locator("#question textarea").fill(text)
            page.locator("#question textarea").press("Enter")
            page.wait_for_function(f"document.querySelectorAll('article.assistant:not(.writing)').length == {number + 1}")
        page.wait_for_timeout(500)

    @contextmanager
    def _server(self, *arguments: str) -> Iterator[str]:
        """The address of a page that a command serves; Ctrl-C ends the command."""
        command = [sys.executable, "-m", "mmtune", *arguments]
        with subprocess.Popen(command, cwd=self._folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            addresses = (re.search(r"http://\S+", line) for line in process.stdout)
            address = next((match[0] for match in addresses if match), None)
            assert address is not None, f"{arguments}: no address printed"
            yield address
            process.send_signal(signal.SIGINT)

    def _run(self, name: str) -> RunDirectory:
        return RunDirectory(self._folder / "runs" / name)

    def _mmtune(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "mmtune", *arguments], cwd=self._folder, check=True)

    def _train(self, name: str, overrides: tuple[str, ...]) -> None:
        """Train a run, and take the picture of the report that is written meanwhile."""
        recipe = str(ROOT / "recipes" / "quickstart.yaml")
        paths = ("data.train.0.path=digits/tune.json", "evaluate.data.0.path=digits/eval.json", f"output_dir=runs/{name}")
        command = [sys.executable, "-m", "mmtune", "train", recipe, "--overwrite", *paths, *EVALUATION, *overrides]
        run = self._run(name)
        with subprocess.Popen(command, cwd=self._folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="")
                if name == "quickstart" and line.startswith("step 500/"):
                    with self._page(run.report.as_uri(), TRAINING) as page:
                        self._save(page, "report-training")
        assert process.returncode == 0, f"{name}: exit code {process.returncode}"

    @contextmanager
    def _page(self, url: str, size: tuple[int, int], theme: str = "light") -> Iterator[Any]:
        """A page that must do nothing wrong: no error, no request to another host."""
        with opened_page(self._browser, url, size, theme, scale=SCALE) as (page, record):
            yield page
            assert not record.errors and not record.external, (url, record)

    def _save(self, page: Any, name: str, selector: str = "", height: int = 10_000) -> None:
        """Write a picture with few colors: of a part of the page, down to `height`, or of what the window shows."""
        if not name.startswith(self._only):
            return
        clip = None
        if selector:
            box = page.locator(selector).bounding_box()
            left, top = max(box["x"] - 16, 0), box["y"] + page.evaluate("window.scrollY") - 16
            clip = {"x": left, "y": top, "width": box["width"] + 32, "height": min(box["height"] + 32, height)}
        image = Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=clip is not None)))
        path = OUT / f"{name}.png"
        image.convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)
        size = path.stat().st_size
        print(f"{path.relative_to(ROOT)}: {image.width} x {image.height} pixels, {size:,} bytes")
        assert size <= MAX_BYTES, f"{path}: more than {MAX_BYTES:,} bytes"


if __name__ == "__main__":
    main()
