"""Leakage between training and held-out rows: what is an error, what a warning, and that both sides are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples, StreamedSamples
from mmtune.data.media.image_content import difference_hash, sampled_digest
from mmtune.data.validation import leakage
from mmtune.data.validation.leakage import NEAR_BITS, check_leakage, nearest_hashes
from mmtune.data.validation.validate import ValidationSettings, Validator
from mmtune.evaluation.evaluate import warn_of_leakage
from mmtune.recipe.recipe import EvaluateSection, Recipe, Source
from mmtune.utils.errors import UserError


def _picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth random picture, whose hash has about as many bits set as not."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def _rows(folder: Path, name: str, *rows: tuple[str | None, str, str], **settings: Any) -> Source:
    """Rows of an image (a file of the folder, or None), a question and an answer."""
    lines = []
    for image, question, answer in rows:
        start = "" if image is None else "<image>\n"
        turns = [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"conversations": turns} | ({} if image is None else {"image": image})) + "\n")
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return Source(path=str(folder / name), template="llava", **settings)


def _issues(train: list[Source], held_out: list[Source], warn: bool = False) -> list[tuple[str, str, str]]:
    settings = ValidationSettings(leakage="warn" if warn else "error")
    return [(each.row, each.issue, each.detail.split()[-1]) for each in Validator(train, held_out, settings).issues()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures, and copies of the first: the same bytes, and compressed, smaller and with a mark (near-duplicates)."""
    first, second = _picture(1), _picture(2)
    first.save(tmp_path / "a.png")
    second.save(tmp_path / "b.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    first.save(tmp_path / "near.jpg", quality=50)
    return tmp_path


def test_the_same_question_and_answer_about_the_same_image_is_an_error(pictures: Path) -> None:
    train = _rows(pictures, "train.jsonl", ("b.png", "How many?", "2"), ("a.png", "What is it?", "A cat"), (None, "Hi", "Hello"))
    held_out = _rows(
        pictures,
        "test.jsonl",
        ("copy.png", "what  is it?", "a cat"),  # case and spaces do not count
        ("b.png", "What is it?", "A cat"),  # another image
        (None, "Hi", "Hello"),
        (None, "Hi", "Good morning"),
    )
    expected = [
        ("test.jsonl:1", "leaked", "train.jsonl:2"),
        ("test.jsonl:2", "image_shared", "train.jsonl:1"),
        ("test.jsonl:3", "leaked", "train.jsonl:3"),
    ]
    for warn, name in ((False, "row_leaked"), (True, "row_shared")):
        assert _issues([train], [held_out], warn) == [(row, name if i == "leaked" else i, other) for row, i, other in expected]


def test_the_same_image_is_an_error_for_rows_split_off_and_a_warning_for_an_official_split(pictures: Path) -> None:
    train = _rows(pictures, "train.jsonl", ("copy.png", "Where?", "here"))
    split = _rows(pictures, "rows.jsonl", ("a.png", "What?", "x"), ("b.png", "What?", "y"), held_out=1)
    [[name, *_]] = [sample.images for sample in IndexedSamples([split.held_out_part()])]
    other = train if name == pictures / "a.png" else _rows(pictures, "train.jsonl", ("b.png", "Where?", "here"))
    row = "rows.jsonl:1" if name == pictures / "a.png" else "rows.jsonl:2"
    assert _issues([split, other], [split.held_out_part()]) == [(row, "image_leaked", "train.jsonl:1")]
    assert _issues([split, other], [split.held_out_part()], warn=True) == [(row, "image_shared", "train.jsonl:1")]
    official = _rows(pictures, "test.jsonl", ("a.png", "What?", "x"))
    assert _issues([train], [official]) == [("test.jsonl:1", "image_shared", "train.jsonl:1")]


def test_a_copied_row_is_found_although_its_prompt_is_drawn_by_row(tmp_path: Path) -> None:
    template = tmp_path / "t.yaml"
    texts = ["One: {{ q }}", "Two: {{ q }}", "Three: {{ q }}", "Four: {{ q }}"]
    turns = [{"role": "user", "text": texts}, {"role": "assistant", "text": "{{ a }}"}]
    template.write_text(json.dumps({"description": "x", "messages": turns, "example": {"q": "x", "a": "y"}}), encoding="utf-8")
    rows = [{"q": f"q{number}", "a": "y"} for number in range(8)]
    sources = []
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text(json.dumps(rows if name == "test.json" else rows[::-1]), encoding="utf-8")
        sources.append(Source(path=str(tmp_path / name), template=str(template)))
    assert [issue for _, issue, _ in _issues([sources[0]], [sources[1]])] == ["row_leaked"] * 8


def test_a_near_duplicate_is_a_warning_and_other_pictures_are_none(pictures: Path) -> None:
    marked = _picture(1).resize((48, 40))
    marked.paste((255, 0, 0), (40, 0, 48, 4))
    marked.save(pictures / "marked.png")
    for number, level in enumerate((0, 128, 255)):  # flat pictures are like each other, and not reported
        Image.new("RGB", (50, 50), (level,) * 3).save(pictures / f"flat{number}.png")
    train = _rows(pictures, "train.jsonl", ("a.png", "q", "a"), ("flat0.png", "q", "a"))
    names = ("near.jpg", "b.png", "marked.png", "flat1.png", "flat2.png")
    held_out = _rows(pictures, "test.jsonl", *((name, "p", "a") for name in names))
    issues = _issues([train], [held_out])
    assert sorted(issues) == [(f"test.jsonl:{row}", "image_near_duplicate", "train.jsonl:1") for row in (1, 3)]


def test_pictures_that_differ_are_far_apart() -> None:
    hashes = np.array([difference_hash(_embedded(_picture(seed))) for seed in range(150)])
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=-1) + 256 * np.eye(150, dtype=int)
    assert distances.min() > 3 * NEAR_BITS


def test_pages_with_a_few_lines_are_not_near_duplicates() -> None:
    pages = []
    for seed in range(60):
        page = np.full((1100, 850), 255, np.uint8)
        random = np.random.default_rng(seed)
        for line in range(6):
            words = random.integers(0, 2, (10, int(random.integers(60, 700)))).astype(np.uint8)
            page[60 + 18 * line : 70 + 18 * line, 60 : 60 + words.shape[1]] = 255 * words
        pages.append(difference_hash(_embedded(Image.fromarray(page))))
    hashes = np.array([value for value in pages if value is not None])
    assert len(hashes) > 30
    assert not [pair for number in range(len(hashes)) for pair in nearest_hashes(hashes[:number], hashes[number : number + 1])]
    assert list(nearest_hashes(hashes[:1], hashes[:1])) == [(0, 0, 0)]


def _embedded(picture: Image.Image) -> Any:
    import io

    from mmtune.data.media.media import EmbeddedMedia

    file = io.BytesIO()
    picture.save(file, "PNG")
    return EmbeddedMedia(Path("x"), "x.png", data=file.getvalue())


def test_the_hash_is_that_of_the_definition(tmp_path: Path) -> None:
    """Darker than the right neighbour, row by row, on a picture with as many pixels as the hash has cells."""
    cells = np.random.default_rng(0).integers(0, 256, (16, 17), dtype=np.uint8)
    Image.fromarray(cells).save(tmp_path / "x.png")
    value = difference_hash(tmp_path / "x.png")
    assert value is not None
    assert np.array_equal(np.unpackbits(value.view(np.uint8)).reshape(16, 16), cells[:, 1:] > cells[:, :-1])


def test_nearest_hashes_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    others = random.integers(0, 2**64, (50, 4), dtype=np.uint64)
    hashes = others[:20] ^ (np.uint64(1) << random.integers(0, 64, (20, 4), dtype=np.uint64))
    monkeypatch.setattr(leakage, "PAIRS", 150)  # three hashes at once
    assert list(nearest_hashes(hashes, others, most=4)) == [(number, number, 4) for number in range(20)]
    assert list(nearest_hashes(hashes, others, most=3)) == []


def test_different_large_files_with_the_same_sampled_digest_are_not_one_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    for name in ("a.bmp", "b.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
        pixels[-14, 100] ^= 255  # between two blocks
    assert sampled_digest(tmp_path / "a.bmp") == sampled_digest(tmp_path / "b.bmp")
    train, held_out = (_rows(tmp_path, f"{name}.jsonl", (f"{name}.bmp", "q", "a")) for name in ("a", "b"))
    assert [issue for _, issue, _ in _issues([train], [held_out])] == []


def test_at_most_a_number_of_images_is_decoded(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10, 22):
        _picture(number).save(pictures / f"{number}.png")
    train = _rows(pictures, "train.jsonl", *((f"{number}.png", "q", "a") for number in range(10, 22)))
    held_out = _rows(pictures, "test.jsonl", ("a.png", "q", "a"))
    decoded: list[Any] = []
    monkeypatch.setattr(leakage, "NEAR_IMAGES", 4)
    monkeypatch.setattr(leakage, "difference_hash", lambda image: decoded.append(image))
    assert _issues([train], [held_out]) == []
    assert len(decoded) == 1 + 4
    assert "at most 4 training images are compared" in capsys.readouterr().out


def test_few_shot_examples_of_held_out_rows_may_be_training_rows(pictures: Path) -> None:
    train = _rows(pictures, "train.jsonl", ("a.png", "q", "a"))
    shots: dict[str, Any] = {"count": 1, "path": train.path}
    held_out = _rows(pictures, "test.jsonl", ("b.png", "q", "b"), shots=shots)
    assert _issues([train], [held_out]) == []
    leaking = _rows(pictures, "train.jsonl", ("a.png", "q", "a"), shots={"count": 1, "path": held_out.path})
    own = _rows(pictures, "own.jsonl", ("a.png", "q", "a"))  # the row after its example
    assert _issues([leaking], [own]) == [("own.jsonl:1", "row_leaked", "train.jsonl:1")]
    held_out = _rows(pictures, "test.jsonl", ("b.png", "q", "b"))
    assert _issues([leaking], [held_out]) == [("test.jsonl:1", "row_leaked", "train.jsonl:1")]


# ------------------------------------------------------------------------------------------------------- before training


def test_a_run_does_not_start_on_leaked_rows(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = _rows(
        pictures, "train.jsonl", *((f"{name}.png", "q", "a") for name in "ab"), *((None, f"{n}", "a") for n in range(9))
    )
    held_out = _rows(pictures, "test.jsonl", ("copy.png", "r", "a"), *((None, f"{n}", "a") for n in range(9)))
    section = EvaluateSection(data=(held_out,))
    for samples in (IndexedSamples([train]), StreamedSamples([train])):
        with pytest.raises(UserError) as error:
            check_leakage(samples, section, 100)
        message = str(error.value)
        assert "9 of 10 held-out rows leak into the training data" in message
        assert "test.jsonl:2: the same question and answer in training: train.jsonl:3" in message
        assert message.count("test.jsonl:") == 5
        assert "and 4 more" in message
        assert "test.jsonl:1: the same image in training: train.jsonl:1" in capsys.readouterr().out
        check_leakage(samples, section.model_copy(update={"leakage": "warn"}), 100)
        assert "warning: 10 of 10 held-out rows" in capsys.readouterr().out
        check_leakage(samples, section, 0)  # data.check_rows: 0


def test_the_commands_fail_with_both_rows(make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]")
    (tmp_path / "leaky.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert entry_point(["data", "check", str(tmp_path / "leaky.yaml"), "--json"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["leaked_rows"] == 12
    assert "12 held-out rows leak into the training data" in output.err
    assert entry_point(["train", str(tmp_path / "leaky.yaml")]) == 2
    assert (
        f"{rows.name}[0]: the same question and answer about the same image in training: {rows.name}[0]"
        in capsys.readouterr().err
    )


def test_an_evaluation_on_training_rows_is_a_warning(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = EvaluateSection(data=(Source(path=str(rows), template="llava"),))
    recipe = make_recipe()
    warn_of_leakage(recipe, section)
    assert "warning: 12 of 12 held-out rows share an image or more with training rows" in capsys.readouterr().out
    moved = make_recipe(f"data.train=[{{path: {tmp_path / 'gone.json'}, template: llava}}]")
    warn_of_leakage(moved, section)
    assert "warning: the rows are not compared with those that the run was trained on: " in capsys.readouterr().out


def test_a_check_of_data_finds_references_that_the_metric_cannot_use(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "a cat"}]} for n in range(3)]
    (tmp_path / "held_out.json").write_text(json.dumps(answers))
    recipe = make_recipe(f"evaluate.data=[{{path: {tmp_path / 'held_out.json'}, template: llava}}]", "evaluate.metric=numeric")
    (tmp_path / "numbers.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert entry_point(["data", "check", str(tmp_path / "numbers.yaml")]) == 1
    assert "3 of 3 rows cannot be evaluated" in capsys.readouterr().err
