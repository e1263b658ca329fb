"""Held-out rows: no image on both sides, sides that later rows do not change, and counts that are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples
from mmtune.data.media.image_content import BLOCK, BLOCKS, content_digest, sampled_digest
from mmtune.data.media.media import EmbeddedMedia
from mmtune.data.sources import held_out_split
from mmtune.data.sources.held_out_split import Keys, split_rows
from mmtune.recipe.recipe import Recipe, Source
from mmtune.utils.errors import UserError

ROWS = st.lists(st.lists(st.binary(min_size=1, max_size=1), max_size=3).map(tuple), min_size=1, max_size=40)


def _sides(keys: Sequence[Keys], share: float, seed: int = 0) -> list[bool]:
    chosen = set(split_rows(keys, share, seed).held_out.tolist())
    return [index in chosen for index in range(len(keys))]


@given(ROWS, st.one_of(st.floats(0.05, 0.95), st.integers(1, 20)), st.integers())
def test_no_image_is_on_both_sides(keys: list[Keys], share: float, seed: int) -> None:
    sides = _sides(keys, share, seed)
    images = [{key for row, side in zip(keys, sides, strict=True) for key in row if side is each} for each in (True, False)]
    assert not images[0] & images[1]
    assert not any(side for row, side in zip(keys, sides, strict=True) if not row)
    if share >= 1:
        assert sum(sides) >= min(share, sum(bool(row) for row in keys))


@given(ROWS, st.lists(st.binary(min_size=1, max_size=1), max_size=20), st.floats(0.05, 0.95))
def test_added_rows_of_one_image_move_no_other_row(keys: list[Keys], added: list[bytes], share: float) -> None:
    assert _sides([*keys, *((key,) for key in added)], share)[: len(keys)] == _sides(keys, share)


@given(st.lists(st.binary(min_size=1, max_size=1), min_size=1), st.randoms())
def test_the_order_of_rows_with_one_image_does_not_count(keys: list[bytes], random: Any) -> None:
    shuffled = random.sample(keys, len(keys))
    side = dict(zip(keys, _sides([(key,) for key in keys], 0.5), strict=True))
    assert _sides([(key,) for key in shuffled], 0.5) == [side[key] for key in shuffled]


@given(ROWS, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3)), max_size=9))
def test_added_rows_that_bring_new_images_move_no_other_row(keys: list[Keys], added: list[tuple[int, int]]) -> None:
    """An added row has new images of its own, and after them one that was there before."""
    known = [row[0] for row in keys if row]
    rows = []
    for number, (row, images) in enumerate(added if known else []):
        rows.append((*(f"{number} {image}".encode() for image in range(images)), known[row % len(known)]))
    assert _sides([*keys, *rows], 0.5)[: len(keys)] == _sides(keys, 0.5)


def test_the_fraction_is_that_of_the_images_also_with_several_in_a_row() -> None:
    """Groups of one to four images: the share of groups is within four standard deviations of the fraction."""
    groups = 4000
    keys = [tuple(f"{group} {image}".encode() for image in range(1 + group % 4)) for group in range(groups)]
    for seed in (0, 1):
        share = split_rows(keys, 0.2, seed).held_out_groups / groups
        assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / groups)
    assert _sides(keys, 0.2, 0) != _sides(keys, 0.2, 1)


def _write(folder: Path, count: int, questions: int = 3, name: str = "rows.jsonl") -> Source:
    """Rows of `questions` about each of `count` images, the last one from a copy of the image under another path."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        for copy in ("a", "b"):
            Image.new("RGB", (20, 20), (number, 7, 9)).save(folder / f"{copy}{number}.png")
        for question in range(questions):
            turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{question}"}]
            rows.append({"image": f"{'b' if question == 2 else 'a'}{number}.png", "conversations": turns})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(folder / name), template="llava", held_out=0.3)


def _contents(samples: IndexedSamples) -> set[bytes]:
    return {content_digest(image) for sample in samples for image in sample.images}


def test_both_sides_have_all_rows_and_no_image_in_common(tmp_path: Path) -> None:
    source = _write(tmp_path / "x", 40)
    training, held_out_rows = IndexedSamples([source]), IndexedSamples([source.held_out_part()])
    ids = [sample.id for side in (training, held_out_rows) for sample in side]
    assert sorted(ids) == sorted(f"rows.jsonl:{number + 1}" for number in range(120))
    assert not _contents(training) & _contents(held_out_rows)
    assert training.held_out == held_out_rows.held_out
    counts = training.held_out["rows.jsonl"]
    assert counts["held_out_rows"] == len(held_out_rows) == 3 * counts["held_out_groups"]
    assert (counts["rows"], counts["groups"]) == (120, 40)


def test_an_image_has_the_same_side_in_another_format_and_folder(tmp_path: Path) -> None:
    source = _write(tmp_path / "x", 30, questions=1)
    table = {
        "image": [{"bytes": (tmp_path / "x" / f"a{number}.png").read_bytes(), "path": None} for number in range(30)],
        "conversations": [[{"from": "human", "value": "<image>\n0?"}, {"from": "gpt", "value": "0"}]] * 30,
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    other = source.model_copy(update={"path": str(tmp_path / "rows.parquet")})
    assert _contents(IndexedSamples([source.held_out_part()])) == _contents(IndexedSamples([other.held_out_part()]))


def test_rows_without_images_are_split_by_their_first_question(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": f"q{number % 20}"}, {"from": "gpt", "value": f"{number}"}]}
        for number in range(60)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    source = Source(path=str(path), template="llava", held_out=10)
    sides = [IndexedSamples([part]) for part in (source, source.held_out_part())]
    questions = [{sample.messages[0]["content"][0]["text"] for sample in side} for side in sides]
    assert not questions[0] & questions[1]
    assert [len(side) for side in sides] == [48, 12]  # of three rows a question, as many as reach ten


def test_rows_of_one_document_stay_together(tmp_path: Path) -> None:
    template = tmp_path / "pages.yaml"
    turns = [{"role": "user", "images": ["{{ page }}"], "text": "{{ question }}"}, {"role": "assistant", "text": "yes"}]
    example = {"page": "a.png", "question": "?", "document": "d"}
    template.write_text(
        json.dumps({"description": "pages", "messages": turns, "cluster": "document", "example": example}), encoding="utf-8"
    )
    rows = []
    for number in range(40):
        Image.new("RGB", (20, 20), (number, 7, 9)).save(tmp_path / f"{number}.png")
        rows.append({"page": f"{number}.png", "question": "?", "document": f"d{number % 10}"})
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    source = Source(path=str(tmp_path / "rows.json"), template=str(template), held_out=0.4)
    documents = [{sample.cluster for sample in IndexedSamples([part])} for part in (source, source.held_out_part())]
    assert not documents[0] & documents[1]
    assert len(documents[0] | documents[1]) == 10


def test_an_unreadable_row_stays_in_training_and_the_split_is_cached_only_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _write(tmp_path / "x", 30)
    sides = [sample.id for sample in IndexedSamples([source.held_out_part()])]
    [cached] = (tmp_path / "x" / ".mmtune").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(held_out_split, "map_rows", None)  # a cached split reads no row
        assert [sample.id for sample in IndexedSamples([source.held_out_part()])] == sides
    cached.unlink()
    image = tmp_path / "x" / f"a{(int(sides[0].split(':')[1]) - 1) // 3}.png"
    image.rename(image.with_suffix(".away"))
    held = IndexedSamples([source.held_out_part()])
    assert sides[0] not in [sample.id for sample in held]
    assert sides[2] in [sample.id for sample in held]  # the copy of the image under another path
    image.with_suffix(".away").rename(image)
    assert [sample.id for sample in IndexedSamples([source.held_out_part()])] == sides


def test_few_shot_examples_of_both_sides_are_training_rows(tmp_path: Path) -> None:
    source = _write(tmp_path / "x", 20, questions=1)
    plain = _contents(IndexedSamples([source.held_out_part()]))
    shots = Source(path=source.path, template="llava", held_out=0.3, shots={"count": 2})
    assert not _contents(IndexedSamples([shots])) & plain
    for sample in IndexedSamples([shots.held_out_part()]):
        assert [content_digest(image) in plain for image in sample.images] == [False, False, True]


def test_held_out_images_are_not_augmented(tmp_path: Path) -> None:
    source = _write(tmp_path / "x", 10).model_copy(
        update={"augment": Source(path="p", template="t", augment={"flip": 1.0}).augment}
    )
    assert all(isinstance(image, Path) for sample in IndexedSamples([source.held_out_part()]) for image in sample.images)
    assert not any(isinstance(image, Path) for sample in IndexedSamples([source]) for image in sample.images)


@pytest.mark.parametrize(("share", "side"), [(0.001, "no row is held out"), (400, "none is left for training")])
def test_an_empty_side_is_an_error(tmp_path: Path, share: float, side: str) -> None:
    source = _write(tmp_path / "x", 3).model_copy(update={"held_out": share})
    with pytest.raises(UserError, match=rf"rows\.jsonl: held_out: {share:g}: .*{side}.*9 rows with 3 images"):
        IndexedSamples([source])


@pytest.mark.parametrize("size", [0, 10, BLOCK * BLOCKS, BLOCK * BLOCKS + 1, 10 * BLOCK * BLOCKS + 123])
def test_a_sampled_digest_is_that_of_the_bytes_and_not_of_the_path(size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    first, second = (EmbeddedMedia(Path(name), name, data=data) for name in ("a", "b"))
    assert sampled_digest(first) == sampled_digest(second)
    assert content_digest(first) == content_digest(second)
    for changed in (data + b"x", b"x" + data[1:], data[:-1] + b"\xff"):
        if changed != data:
            assert sampled_digest(EmbeddedMedia(Path("a"), "a", data=changed)) != sampled_digest(first)


def test_a_sampled_digest_depends_on_the_size() -> None:
    first, second = (EmbeddedMedia(Path("a"), "a", data=bytes(BLOCK * BLOCKS + more)) for more in (1, 2))
    assert sampled_digest(first) != sampled_digest(second)


# --------------------------------------------------------------------------------------------------------------- recipes


def test_the_evaluation_has_the_held_out_parts_beside_its_data(make_recipe: Callable[..., Recipe], rows: Path) -> None:
    recipe = make_recipe("data.train.0.held_out=0.2")
    assert recipe.evaluate is not None
    assert [source.is_held_out for source in recipe.evaluate.sources] == [True]
    both = make_recipe("data.train.0.held_out=0.2", f"evaluate.data=[{{path: {rows}, template: llava}}]")
    assert both.evaluate is not None
    assert [source.is_held_out for source in both.evaluate.sources] == [False, True]


def test_a_recipe_with_held_out_rows_loads_back(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from mmtune.recipe.recipe import load_recipe

    recipe = make_recipe("data.train.0.held_out=0.2")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.0.held_out=1.0"], "expected a fraction between 0 and 1, or a number of rows, got 1.0"),
        (["data.train.0.held_out=0"], "expected a fraction between 0 and 1, or a number of rows, got 0"),
        (["data.train.0.held_out=true"], "expected a fraction between 0 and 1, or a number of rows, got true"),
        (["data.train.0.held_out=10%"], "expected a fraction between 0 and 1, or a number of rows, got '10%'"),
        (["data.train.0.held_out=5", "data.train.0.shots={count: 1}"], "shots of the same file"),
        (["data.train.0.held_out=0.1", "data.stream=true"], "not supported with data.stream: true"),
        (["evaluate={batch_size: 2}"], "required, and not given; such as .*held_out"),
        (["evaluate.data=[{path: r.json, template: llava, held_out: 0.1}]"], "all rows of this source are held out"),
    ],
)
def test_a_wrong_held_out_is_an_error(make_recipe: Callable[..., Recipe], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(*overrides)


def test_the_check_and_the_plan_show_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(tmp_path / "x", 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: builtin:tiny-llava}}\ndata: {{train: [{{path: {source.path}, template: llava, held_out: 0.3}}]}}\n"
        f"train: {{use_cpu: true}}\noutput_dir: {tmp_path / 'run'}\n",
        encoding="utf-8",
    )
    counts = IndexedSamples([source]).held_out["rows.jsonl"]
    line = f"rows.jsonl: {counts['held_out_rows']} of 120 rows, all of {counts['held_out_groups']} of 40 images or questions"
    assert entry_point(["data", "check", str(recipe)]) == 0
    assert line in capsys.readouterr().out
    assert entry_point(["plan", str(recipe), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["data"]
    assert plan["splits"] == {"rows.jsonl": counts}
    assert plan["rows"] == 120 - counts["held_out_rows"]
