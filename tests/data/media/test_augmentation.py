"""Augmentation: operations in closed form, transformed boxes, and draws that depend on the epoch but not on the processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from family_processors import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmtune.chat.session import ChatSession
from mmtune.cli.main import entry_point
from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler
from mmtune.data.dataset import IndexedSamples, SampleEncoder, StreamedSamples, TrainingSet
from mmtune.data.encoding.encode import encode_sample
from mmtune.data.encoding.token_counts import count_tokens
from mmtune.data.media.augmentation import ImageAugmentation
from mmtune.data.media.media import ImageView, image_size, open_image
from mmtune.data.message import RowError, text_of
from mmtune.data.templates.regions import Region
from mmtune.data.validation.show_sample import view_sample
from mmtune.data.validation.validate import ValidationSettings, Validator
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.evaluation.answers import Answer
from mmtune.planning.token_plan import build_plan
from mmtune.recipe.recipe import DataSection, Source
from mmtune.release.merge import parity_samples
from mmtune.report.answer_cards import images_of
from mmtune.training.dataloader import make_batches
from mmtune.training.trainer import EpochLoader
from mmtune.utils.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def _lanczos(pixels: Any, length: int, axis: int) -> Any:
    """Resampling by the Lanczos kernel of 3 lobes, widened by the scale where an image shrinks, weights summing to 1."""
    pixels = np.moveaxis(np.asarray(pixels, dtype=np.float64), axis, 0)
    scale = len(pixels) / length
    wide = max(scale, 1.0)
    centers = (np.arange(length) + 0.5) * scale
    distance = (np.arange(len(pixels)) + 0.5 - centers[:, None]) / wide
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, pixels, 1), 0, axis)


def _resized(pixels: Any, size: tuple[int, int]) -> Any:
    return np.clip(_lanczos(np.clip(_lanczos(pixels, size[0], 1), 0, 255), size[1], 0), 0, 255)


def test_a_crop_is_resized_to_the_images_size() -> None:
    change = ImageAugmentation(crop=0.5, position=(0.99, 0.25))
    assert change.crop_box(IMAGE.size) == (28, 5, 56, 25)  # half of 56 x 40; the last of 29 places, and 0.25 x 21 of 21
    augmented = np.asarray(change.apply(IMAGE), dtype=np.float64)
    assert np.abs(augmented - _resized(PIXELS[5:25, 28:56], (56, 40))).max() <= 2  # each of the two passes is rounded


def test_an_image_is_resized_to_the_longest_side() -> None:
    change = ImageAugmentation(longest_edge=32)
    assert change.size(IMAGE.size) == (32, 23)
    assert np.abs(np.asarray(change.apply(IMAGE), dtype=np.float64) - _resized(PIXELS, (32, 23))).max() <= 1
    assert np.array_equal(np.asarray(ImageAugmentation(longest_edge=56).apply(IMAGE)), PIXELS)


def test_a_flip_mirrors_left_and_right() -> None:
    assert np.array_equal(np.asarray(ImageAugmentation(flip=True).apply(IMAGE)), PIXELS[:, ::-1])


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.3, 2.0])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_blended(name: str, factor: float) -> None:
    """Between a black image, one of the mean grey, or the image's own grey (ITU-R 601-2 luma), and the image, or past it."""
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    degenerate = {"brightness": np.zeros(1), "contrast": np.floor(luma.mean() + 0.5), "saturation": luma[..., None]}[name]
    expected = np.clip(degenerate + factor * (PIXELS.astype(np.float64) - degenerate), 0, 255)
    augmented = np.asarray(ImageAugmentation(**{name: factor}).apply(IMAGE), dtype=np.float64)
    assert np.abs(augmented - expected).max() <= 2


def test_operations_are_applied_in_order() -> None:
    change = ImageAugmentation(crop=0.5, longest_edge=32, flip=True, brightness=0.5)
    expected = _resized(PIXELS[:20, :28], (32, 23))[:, ::-1] * 0.5
    assert np.abs(np.asarray(change.apply(IMAGE), dtype=np.float64) - expected).max() <= 2


CHANGES = st.builds(
    ImageAugmentation,
    crop=st.floats(0.01, 1),
    position=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    longest_edge=st.none() | st.integers(32, 300),
    flip=st.booleans(),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(change=CHANGES, width=st.integers(1, 200), height=st.integers(1, 200), data=st.data())
def test_a_crop_lies_in_the_image_and_keeps_its_boxes(
    change: ImageAugmentation, width: int, height: int, data: st.DataObject
) -> None:
    left, top, right, bottom = change.crop_box((width, height))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (right - left, bottom - top) == (max(1, round(width * change.crop)), max(1, round(height * change.crop)))
    assert change.apply(Image.new("RGB", (width, height))).size == change.size((width, height))
    x1, y1 = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    x2, y2 = data.draw(st.floats(x1 + 0.4, width)), data.draw(st.floats(y1 + 0.4, height))
    keeping = ImageAugmentation(change.crop, change.position, (x1, y1, x2, y2), change.longest_edge, change.flip)
    left, top, right, bottom = keeping.crop_box((width, height))
    assert 0 <= left <= x1 and x2 <= right <= width and 0 <= top <= y1 and y2 <= bottom <= height
    box = keeping.transform_region(Region(((x1, y1), (x2, y2)), width, height))
    assert (box.width, box.height) == keeping.size((width, height))
    assert 0 <= box.x1 < box.x2 <= box.width and 0 <= box.y1 < box.y2 <= box.height
    quad = keeping.transform_region(Region(((x1, y1), (x2, y1), (x2, y2), (x1, y2)), width, height))
    assert quad.corners == ((box.x1, box.y1), (box.x2, box.y1), (box.x2, box.y2), (box.x1, box.y2))  # also when flipped
    point = keeping.transform_region(Region(((x1, y1),), width, height))
    assert point.corners == ((box.x2 if change.flip else box.x1, box.y1),)


# ------------------------------------------------------------------------------------------------------------------ rows

DRAWN = {"crop": 0.5, "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
BOXES = """description: boxes
boxes: {value: "{{ bbox }}", layout: xyxy}
messages:
  - {role: user, images: ["{{ image }}"], text: "Where?"}
  - {role: assistant, text: "{% for box in boxes %}{{ box | pixels }}{{ box | thousandths }}{% endfor %}"}
example: {image: a.png, bbox: [0, 0, 1, 1]}
"""


def _rows(folder: Path, count: int = 4, **more: Any) -> str:
    """Rows of one picture each, a red square of its own on grey noise, whose box is in `bbox`; written once."""
    rows: list[Any] = []
    if (folder / "rows.json").exists():
        return str(folder / "rows.json")
    for number in range(count):
        box = [20 + 9 * number, 30, 50 + 9 * number, 70 + number]
        noise = np.random.default_rng(number).integers(100, 200, (120, 160), dtype=np.uint8)
        image = Image.fromarray(noise).convert("RGB")
        ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill="red")
        image.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a square"}]
        rows.append({"image": f"{number}.png", "bbox": box, "conversations": turns, **more})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "boxes.yaml").write_text(BOXES, encoding="utf-8")
    return str(folder / "rows.json")


def _source(folder: Path, template: str = "llava", augment: Any = DRAWN, **more: Any) -> Source:
    return Source(path=_rows(folder), template=template, augment=augment, **more)


def _pixels(samples: IndexedSamples, visit: int) -> list[bytes]:
    return [open_image(samples.visit(index, visit).images[0]).tobytes() for index in range(len(samples))]


def test_nothing_changes_without_augment(tmp_path: Path) -> None:
    samples = IndexedSamples([_source(tmp_path, augment=None)])
    for visit in range(2):
        assert [samples.visit(index, visit).images for index in range(4)] == [[tmp_path / f"{index}.png"] for index in range(4)]


def test_every_visit_of_a_row_has_its_own_reproducible_draw(tmp_path: Path) -> None:
    first, second = IndexedSamples([_source(tmp_path)]), IndexedSamples([_source(tmp_path)])
    drawn = [_pixels(first, visit) for visit in range(3)]
    assert drawn == [_pixels(second, visit) for visit in range(3)]
    assert len({pixels for visit in drawn for pixels in visit}) == 12
    assert _pixels(IndexedSamples([_source(tmp_path, seed=1)]), 0) != drawn[0]
    changes = [first.visit(index, visit).images[0].augmentation for index in range(4) for visit in range(50)]
    assert 80 < sum(change.flip for change in changes) < 120
    assert all(0.5 <= change.crop < 1 and 0.7 <= change.contrast <= 1.3 for change in changes)


def test_boxes_follow_the_image(tmp_path: Path) -> None:
    """The square's pixels are where the text says, for every draw; half a pixel of blur at each edge."""
    source = _source(tmp_path, str(tmp_path / "boxes.yaml"), DRAWN | {"resize": 100})
    samples = IndexedSamples([source])
    texts = set()
    for index in range(4):
        for visit in range(6):
            sample = samples.visit(index, visit)
            image = np.asarray(open_image(sample.images[0])).astype(int)
            assert image.shape == (75, 100, 3) and image_size(sample.images[0]) == (100, 75)
            red = image[..., 0] - image[..., 1] > (image[..., 0] - image[..., 1]).max() / 2
            rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
            text = text_of(sample.messages[1])
            pixels, shares = (json.loads(f"[{part}]") for part in text[1:-1].split("]["))
            seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(seen - pixels).max() <= 1
            assert np.abs(np.array(shares) * [0.1, 0.075, 0.1, 0.075] - pixels).max() <= 0.6
            texts.add(text)
    assert len(texts) == 24


def test_boxes_of_a_planned_run_keep_their_first_draw(tmp_path: Path) -> None:
    """Their numbers are text, whose tokens were counted."""
    samples = IndexedSamples([_source(tmp_path, str(tmp_path / "boxes.yaml"))], planned=True)
    assert samples.visit(1, 5) == samples.visit(1, 0) == samples[1]
    assert IndexedSamples([_source(tmp_path)], planned=True).visit(1, 5) != samples.visit(1, 0)


@pytest.mark.parametrize(
    "text",
    [
        *("[12, 30, 44, 80]", "<box>1", "(1, 2),(30.5, 40)", '{"bbox_2d": 1}', "<loc0001>", "(0.1,0.2,0.3,0.4)"),
        *('{"point_2d": 1}', "<loc_7>", "<patch_index_0044>", "[1, 2, 3, 4, 5, 6, 7, 8]", "<|quad_start|>", '<points x1="3"'),
    ],
)
def test_boxes_in_plain_text_are_rejected(tmp_path: Path, text: str) -> None:
    path = _rows(tmp_path, 1)
    rows = json.loads(Path(path).read_text())
    rows[0]["conversations"][1]["value"] = f"It is at {text}."
    Path(path).write_text(json.dumps(rows))
    for augment in ({"crop": 0.9}, {"flip": 0.1}, {"resize": 64}):
        with pytest.raises(
            RowError, match=r"^rows.json\[0\]: messages\[1\]: the text has a box, '.* remove these three, or declare"
        ):
            IndexedSamples([Source(path=path, template="llava", augment=augment)])[0]
    assert IndexedSamples([Source(path=path, template="llava", augment={"contrast": 0.5})])[0].images


def test_a_template_with_undeclared_boxes_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _rows(tmp_path)
    written = BOXES.replace("boxes: {value", "# {value").replace("{% for box in boxes %}", "{{ bbox[0] }} {{ bbox[1] }}")
    (tmp_path / "own.yaml").write_text(written.split("{{ box | pixels")[0] + '"}\n' + BOXES.splitlines()[-1])
    text = f"""
model: {{base: builtin:tiny-llava}}
data:
  train: [{{path: {path}, template: {tmp_path / "own.yaml"}, augment: {{flip: 0.5}}}}]
output_dir: {tmp_path / "run"}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    assert entry_point(["recipe", "check", str(tmp_path / "recipe.yaml")]) == 2
    stderr = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'recipe.yaml'}:4: data.train.0.augment: {path}:" in stderr
    assert "would move the image but not the box 'bbox'" in stderr
    assert entry_point(["recipe", "check", str(tmp_path / "recipe.yaml"), "data.train.0.augment={contrast: 0.1}"]) == 0


def test_held_out_rows_and_parity_are_not_augmented(tmp_path: Path, make_recipe: Any) -> None:
    path = _rows(tmp_path)
    recipe = make_recipe(f"data.train.0.path={path}", "data.train.0.augment={flip: 1.0}")
    assert [sample.images[0] for sample in parity_samples(recipe, 4)] == [tmp_path / f"{index}.png" for index in range(4)]
    assert all(isinstance(sample.images[0], ImageView) for sample in IndexedSamples(recipe.data.train))
    with pytest.raises(UserError, match=r"held-out rows are not augmented; leave it out"):
        make_recipe(f"evaluate={{data: [{{path: {path}, template: llava, augment: {{flip: 0.5}}}}]}}")


def test_few_shot_examples_are_not_augmented(tmp_path: Path) -> None:
    [sample] = list(IndexedSamples([_source(tmp_path, shots={"count": 1}, limit=1)]))
    assert [isinstance(image, ImageView) for image in sample.images] == [False, True]


# --------------------------------------------------------------------------------------------------------- order and lengths


def _seen(loader: Any, epochs: range, skip: int = 0) -> list[Any]:
    seen = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        batches = skip_first_batches(loader, skip) if skip and epoch == epochs[0] else loader
        seen += [[(row["row"], row["pixel_values"].numpy().tobytes()) for row in batch] for batch in batches]
    return seen


def _loader(samples: IndexedSamples, processor: Any, section: DataSection, workers: int = 0, **layout: Any) -> EpochLoader:
    batches = MixtureBatchSampler(
        Mixture.by_repeats(samples.counts, [source.weight for source in section.train]), seed=0, size=2, visits=True, **layout
    )
    dataset = TrainingSet(samples, SampleEncoder(processor, section))
    return EpochLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=workers, persistent_workers=workers > 0)


def test_draws_are_the_same_with_workers_in_processes_and_after_a_resume(tmp_path: Path, untrained: Any) -> None:
    section = DataSection(train=(_source(tmp_path, weight=2.0),))
    samples, processor = IndexedSamples(section.train), untrained[1]
    whole = _seen(_loader(samples, processor, section), range(2))
    pictures = [pixels for batch in whole for _, pixels in batch]
    assert len(whole) == 8 and len(set(pictures)) == 16  # 4 rows, twice in each of two epochs
    for workers in (1, 2):
        assert _seen(_loader(samples, processor, section, workers), range(2)) == whole
    assert _seen(_loader(samples, processor, section, 2), range(1, 2), skip=3) == whole[7:]
    apart = [_seen(_loader(samples, processor, section, rank=rank, world_size=2), range(2)) for rank in range(2)]
    assert [batch for pair in zip(*apart, strict=True) for batch in pair] == whole


def test_a_stream_draws_by_its_epoch(tmp_path: Path) -> None:
    indexed, streamed = IndexedSamples([_source(tmp_path)]), StreamedSamples([_source(tmp_path)])
    for epoch in range(2):
        handles = list(streamed.stream_openers[0](epoch))
        assert [handle() for handle in handles] == [indexed.visit(index, epoch) for index in range(4)]


def test_batches_number_visits_where_a_source_is_augmented(tmp_path: Path, make_recipe: Any) -> None:
    from mmtune.training.training_arguments import build_training_arguments

    for augment, kind in (({"flip": 0.5}, tuple), (None, int)):
        recipe = make_recipe(f"data.train.0.path={_rows(tmp_path)}", f"data.train.0.augment={json.dumps(augment)}")
        batches = make_batches(
            IndexedSamples(recipe.data.train), recipe.data, build_training_arguments(recipe), SINGLE_PROCESS, None
        )
        assert all(isinstance(row, kind) for batch in batches for row in batch)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_counted_tokens_are_those_of_every_visit(tmp_path: Path, family: str) -> None:
    processor = FAMILIES[family]()
    plain = IndexedSamples([_source(tmp_path, augment=None)])
    samples = IndexedSamples([_source(tmp_path, augment=DRAWN | {"resize": 70})])
    for index in range(2):
        tokens = count_tokens(samples[index], processor).tokens
        assert tokens < count_tokens(plain[index], processor).tokens
        for visit in range(3):
            assert encode_sample(samples.visit(index, visit), processor)["input_ids"].shape[1] == tokens


def test_a_planned_run_with_boxes_trains_on_the_counted_lengths(tmp_path: Path) -> None:
    processor = FAMILIES["qwen2_vl"]()
    samples = IndexedSamples([_source(tmp_path, str(tmp_path / "boxes.yaml"))], planned=True)
    for index in range(2):
        lengths = {encode_sample(samples.visit(index, visit), processor)["input_ids"].shape[1] for visit in range(3)}
        assert lengths == {count_tokens(samples[index], processor).tokens}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("augment={}", "expected at least one key; leave augment out"),
        ("augment={flip: 2}", "expected at most 1"),
        ("augment={crop: 0}", "expected more than 0"),
        ("augment={resize: 8}", "expected at least 32"),
        ("augment={rotate: 8}", "unknown key"),
        (
            "window={center: 40, width: 400}",
            r"expected \[LOW, HIGH\].* a window of center c and width w is \[c - w/2, c \+ w/2\]",
        ),
        ("window=[400, 40]", r"expected \[LOW, HIGH\]"),
        ("window=[1, 2, 3]", r"expected \[LOW, HIGH\]"),
        ("window=[.nan, 3]", r"expected \[LOW, HIGH\]"),
    ],
)
def test_invalid_image_settings_of_a_source_are_errors(make_recipe: Any, override: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"command line: data\.train\.0\.{override[:6]}.*{reason}"):
        make_recipe(f"data.train.0.{override}")


def test_a_recipe_with_a_window_and_augment_is_written_and_read_again(make_recipe: Any, tmp_path: Path) -> None:
    from mmtune.recipe.recipe import load_recipe

    recipe = make_recipe("data.train.0.window=[-160, 240]", "data.train.0.augment={crop: 0.8, resize: 448}")
    assert recipe.data.train[0].window == (-160.0, 240.0)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_source_shows_its_images_through_its_window(tmp_path: Path, untrained: Any) -> None:
    values = np.linspace(-1000, 3000, 48 * 40, dtype=np.float32).reshape(40, 48)
    Image.fromarray(values).save(tmp_path / "ct.tif")
    (tmp_path / "0.png").write_bytes(b"")
    path = _rows(tmp_path, 1)
    rows = json.loads(Path(path).read_text())
    rows[0]["image"] = "ct.tif"
    Path(path).write_text(json.dumps(rows))
    [sample] = list(IndexedSamples([Source(path=path, template="llava", window=(-160.0, 240.0))]))
    expected = np.floor(np.clip((values.astype(np.float64) + 160) / 400, 0, 1) * 255 + 0.5)
    assert np.array_equal(np.asarray(open_image(sample.images[0]))[..., 0], expected)
    Image.fromarray(expected.astype(np.uint8)).save(tmp_path / "0.png")
    rows[0]["image"] = "0.png"
    Path(path).write_text(json.dumps(rows))
    [flat] = list(IndexedSamples([Source(path=path, template="llava")]))
    seen, same = (encode_sample(each, untrained[1])["pixel_values"] for each in (sample, flat))
    assert torch.equal(seen, same)


def test_lengths_are_planned_checked_and_shown_of_augmented_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor = FAMILIES["qwen2_vl"]()
    source = _source(tmp_path, augment={"resize": 64, "flip": 1.0})
    samples = IndexedSamples([source])
    plan = build_plan(samples, processor)
    assert plan.tokens.tolist() == [encode_sample(samples.visit(index, 3), processor)["input_ids"].shape[1] for index in range(4)]
    assert plan.media is not None and plan.media.files == [str(tmp_path / f"{index}.png") for index in range(4)]
    limit = int(plan.tokens.max())
    for augment, kinds in ((source.augment, set()), (None, {"too_long"})):
        validator = Validator(
            [source.model_copy(update={"augment": augment})], settings=ValidationSettings(processor, max_tokens=limit)
        )
        assert {each.issue for each in validator.issues(1) if each.severity == "error"} == kinds
    view = view_sample(samples[0], processor, DataSection(train=(source,)))
    assert len(view.tokens) == plan.tokens[0] and "images have the augmentation of the first visit" in view.notes[0]


def test_a_report_and_chat_show_images_through_the_window(tmp_path: Path, untrained: Any) -> None:
    Image.fromarray(np.linspace(0, 4, 48 * 40, dtype=np.float32).reshape(40, 48)).save(tmp_path / "0.tif")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a ramp"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.tif", "conversations": turns}]))
    source = Source(path=str(tmp_path / "rows.json"), template="llava", window=(0.0, 4.0))
    [sample] = list(IndexedSamples([source]))
    answer = Answer(sample.id, None, "What?", (str(sample.images[0]),), ("a ramp",), "a ramp", "ramp", "exact_match", score=1.0)
    [image] = images_of([answer], [source])[sample.id]
    assert np.asarray(open_image(image))[..., 0].ravel()[[0, -1]].tolist() == [0, 255]
    model, processor = untrained
    assert ChatSession(model, processor, window=(0.0, 4.0)).attach(tmp_path / "0.tif") == (48, 40)
    with pytest.raises(UserError, match=r"has floating-point values, .*in chat: --window LOW HIGH"):
        ChatSession(model, processor).attach(tmp_path / "0.tif")
    assert entry_point(["chat", "builtin:tiny-llava", "--window", "4", "0"]) == 2
