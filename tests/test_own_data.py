"""The commands of docs/own_data.md, run with the built-in model because the page's base is on the hub."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from mmtune.builtin.digits import digit_images, draw_scene
from mmtune.cli.main import entry_point

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "own_data.md").read_text(encoding="utf-8")
BUILTIN = ["model.base=builtin:tiny-llava", "model.precision=fp32", "train.max_steps=2"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of section 1, with the rows of the page and a few more, and the page's recipe beside it."""
    monkeypatch.chdir(tmp_path)
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    header, *shown = csv.reader(blocks("csv")[0].splitlines())
    assert header == ["image", "question", "answer"]
    rows = [[f"images/{number:05}.png", shown[0][1], str(number)] for number in range(8)]
    assert {row[0] for row in shown} <= {row[0] for row in rows}
    digits, _ = digit_images(held_out=True)
    for path, *_ in rows:
        draw_scene(rng.choice(digits, 4), rng)[0].save(folder / path)
    for name, part in (("train", rows[:6]), ("eval", rows[6:])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *part])
    (tmp_path / "photos.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return folder


@pytest.mark.slow
def test_every_command_of_the_page(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["recipe", "check", "photos.yaml"]) == 0  # as it stands, with its base on the hub
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 11
    for program, *words in commands:
        assert program == "mmtune"
        if "photos.yaml" in words and BUILTIN[0] not in words:
            words += BUILTIN
        assert entry_point(words) == 0, words
        assert capsys.readouterr().out, words
    assert (photos.parent / "models" / "photos" / "model.safetensors").is_file()
