"""Native boxes: the box in each family's convention covers the object in the image that the real processor returns."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import CASES
from PIL import Image, ImageDraw
from transformers import TextIteratorStreamer
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

from mmtune.chat_templates.resolving import resolve_chat_template
from mmtune.data.encoding.answer_decoding import AnswerDecoder, decode_answers
from mmtune.data.encoding.encode import encode_prompt, encode_sample
from mmtune.data.encoding.native_regions import with_native_regions, write_native_regions
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.encoding.token_counts import count_tokens
from mmtune.data.media.image_settings import ImageSettings
from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.region_text import read_areas, read_points
from mmtune.data.templates.regions import NativeRegion, Region
from mmtune.data.templates.template import DataTemplate
from mmtune.evaluation.metrics.entries.box_overlap import IOU
from mmtune.evaluation.metrics.metric import Item
from mmtune.families.box_convention import RegionKind
from mmtune.families.family_table import FAMILIES as TABLE
from mmtune.families.family_table import family_of_processor
from mmtune.preflight import check_recipe
from mmtune.recipe.recipe import load_recipe
from mmtune.recipe.source_section import Augment
from mmtune.utils.errors import RecipeValueError, UserError

Array = np.ndarray[Any, Any]

TOKENS = {
    "qwen2_vl": ["<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>"],
    "internvl": ["<box>", "</box>", "<ref>", "</ref>"],
    "florence2": [f"<loc_{number}>" for number in range(1000)],
    "paligemma": [f"<loc{number:04d}>" for number in range(1024)],
    "kosmos-2": [f"<patch_index_{number:04d}>" for number in range(1024)],
}
"""The tokens with which a family's tokenizer writes boxes. All are special here, so that each must survive the escaping."""


def _qwen_image(media: dict[str, torch.Tensor], processor: Any) -> Array:
    """The image of patches in groups of `merge_size` squared, of shape (height, width, 3)."""
    settings = processor.image_processor
    patch, merge = settings.patch_size, settings.merge_size
    _, rows, columns = media["image_grid_thw"][0].tolist()
    shape = (rows // merge, columns // merge, merge, merge, 3, settings.temporal_patch_size, patch, patch)
    pixels = media["pixel_values"].reshape(shape)[..., 0, :, :]
    return np.asarray(pixels.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3))


def _whole_image(media: dict[str, torch.Tensor], processor: Any) -> Array:
    """The only image, or the thumbnail after the tiles."""
    return np.asarray(media["pixel_values"][-1].permute(1, 2, 0))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _of_thousand(text: str, size: tuple[int, int]) -> list[float]:
    return [number * side / 1000 for number, side in zip(_numbers(text), (*size, *size), strict=True)]


def _of_pixels(text: str, size: tuple[int, int]) -> list[float]:
    return [float(number) for number in json.loads(text)["bbox_2d"]]


def _of_1024(text: str, size: tuple[int, int]) -> list[float]:
    """As the PaliGemma paper reads them: of 1,024, y before x."""
    y1, x1, y2, x2 = _numbers(text)
    return [number * side / 1024 for number, side in zip((x1, y1, x2, y2), (*size, *size), strict=True)]


def _of_florence(text: str, size: tuple[int, int]) -> list[float]:
    post_processor = Florence2PostProcessor(config={}, tokenizer=_processor("florence2").tokenizer)
    return [float(value) for value in post_processor.dequantize(torch.tensor([_numbers(text)]), size)[0]]


def _of_kosmos(text: str, size: tuple[int, int]) -> list[float]:
    shares = patch_index_to_coordinate(*_numbers(text), 32)
    return [share * side for share, side in zip(shares, (*size, *size), strict=True)]


FAMILIES: dict[str, tuple[Callable[..., Array], Callable[..., list[float]], float]] = {
    "qwen2_vl": (_qwen_image, _of_thousand, 0.001),
    "qwen2_5_vl": (_qwen_image, _of_pixels, 0),
    "qwen3_vl": (_qwen_image, lambda text, size: _of_thousand(text.replace("bbox_2d", ""), size), 0.001),
    "internvl": (_whole_image, _of_thousand, 0.001),
    "paligemma": (_whole_image, _of_1024, 0.001),
    "florence2": (_whole_image, _of_florence, 0.001),
    "kosmos-2": (_whole_image, _of_kosmos, 1 / 32),
}
"""For each family: the image from the processor's output, a reader of its text, and the width of a bin."""


@cache
def _processor(family: str) -> Any:
    """The real processor of a family, with images large enough to measure boxes in."""
    base = CASES[family].base
    processor: Any = copy.deepcopy(base.processor())
    processor.chat_template = base.template
    if base.required_template is not None:
        placeholder = None if family_of_processor(processor).images_first else "<image>"
        processor.chat_template = resolve_chat_template(base.required_template, processor.tokenizer, image_token=placeholder)
    images, square = processor.image_processor, {"height": 224, "width": 224}
    if family.startswith("qwen"):
        images.size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    else:
        images.size = square
    if family == "kosmos-2":
        images.do_center_crop = False  # as with `use_square_size` in the files of the published checkpoint
    processor.tokenizer.add_special_tokens({"additional_special_tokens": TOKENS.get(family, [])})
    return processor


def _sample(
    folder: Path,
    size: tuple[int, int],
    corners: tuple[int, ...],
    augment: Augment | None = None,
    declared: dict[str, Any] | None = None,
    answer: str | None = None,
) -> Sample:
    """A row with a red object on a blue image, whose answer is its native box or another declared region."""
    image = Image.new("RGB", size, (0, 0, 255))
    ImageDraw.Draw(image).rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=(255, 0, 0))
    image.save(folder / "a.png")
    sections = declared or {"boxes": {"value": "{{ bbox }}", "layout": "xyxy"}}
    kind = {"boxes": "box", "points": "point", "quads": "quad"}[next(iter(sections))]
    written = answer or f"{{{{ {kind} | native }}}}"
    turns = [{"role": "user", "images": ["{{ image }}"], "text": "where?"}, {"role": "assistant", "text": written}]
    template = DataTemplate.model_validate({"description": "d", "messages": turns, **sections, "example": {}})
    row = {"image": "a.png", "bbox": list(corners)}
    return template.sample("r", row, MediaRules(folder), settings=ImageSettings(augment=augment))


def _seen(family: str, sample: Sample, read: Any = "box") -> tuple[list[float], list[float], tuple[int, int]]:
    """The object's corners in the image that the model sees, those of the written box, and the size of that image."""
    processor = _processor(family)
    encoded = encode_sample(sample, processor)
    to_image, read_box, _ = FAMILIES[family]
    pixels = to_image(encoded, processor)
    difference = pixels[..., 0] - pixels[..., 2]
    red = difference > (difference.min() + difference.max()) / 2
    ys, xs = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    size = (pixels.shape[1], pixels.shape[0])
    supervised = encoded["labels"][encoded["labels"] >= 0]
    text = processor.tokenizer.decode(supervised, skip_special_tokens=False).replace("Ġ", " ")
    written = text_of(with_native_regions(sample, processor).messages[1])
    assert written in text
    return [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], read_box(written, size) if read else [], size


def _assert_covers(family: str, sample: Sample) -> None:
    expected, box, size = _seen(family, sample)
    slack = [2 + FAMILIES[family][2] * side for side in (*size, *size)]
    assert all(abs(a - b) <= limit for a, b, limit in zip(expected, box, slack, strict=True)), (expected, box, size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("size", "corners"),
    [
        ((640, 480), (64, 240, 320, 432)),
        ((300, 1000), (30, 40, 150, 320)),
        ((1000, 250), (600, 100, 1000, 250)),
        ((61, 47), (0, 0, 30, 20)),
    ],
)
def test_a_native_box_covers_the_object_that_the_model_sees(
    family: str, size: tuple[int, int], corners: tuple[int, ...], tmp_path: Path
) -> None:
    _assert_covers(family, _sample(tmp_path, size, corners))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_covers_the_object_after_augmentation(family: str, tmp_path: Path) -> None:
    augment = Augment(crop=0.7, resize=400, flip=1.0)
    _assert_covers(family, _sample(tmp_path, (640, 480), (64, 240, 320, 432), augment))


AUGMENT = Augment(crop=0.7, resize=400, flip=1.0)


@pytest.mark.parametrize("augment", [None, AUGMENT])
@pytest.mark.parametrize("size", [(640, 480), (300, 1000), (1000, 250)])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_native_point_is_on_the_object(family: str, size: tuple[int, int], augment: Augment | None, tmp_path: Path) -> None:
    corners = (60, 100, 100, 180)
    sample = _sample(tmp_path, size, corners, augment, {"points": {"value": "{{ [80, 140] }}"}})
    (x1, y1, x2, y2), _, shape = _seen(family, sample, read=None)
    point = json.loads(text_of(with_native_regions(sample, _processor(family)).messages[1]))["point_2d"]
    x, y = point if family == "qwen2_5_vl" else (number * side / 1000 for number, side in zip(point, shape, strict=True))
    assert abs(x - (x1 + x2) / 2) <= 2 and abs(y - (y1 + y2) / 2) <= 2


@pytest.mark.parametrize("augment", [None, AUGMENT])
@pytest.mark.parametrize("size", [(640, 480), (300, 1000), (1000, 250)])
def test_a_native_quadrilateral_is_that_of_florence(size: tuple[int, int], augment: Augment | None, tmp_path: Path) -> None:
    quads = {"quads": {"value": "{{ [[60, 100], [100, 100], [100, 180], [60, 180]] }}"}}
    sample = _sample(tmp_path, size, (60, 100, 100, 180), augment, quads, '{{ quad | native("A cup") }}')
    (x1, y1, x2, y2), _, shape = _seen("florence2", sample, read=None)
    text = text_of(with_native_regions(sample, _processor("florence2")).messages[1])
    post_processor = Florence2PostProcessor(config={}, tokenizer=_processor("florence2").tokenizer)
    [parsed] = post_processor.parse_ocr_from_text_and_spans(text, None, shape)
    assert parsed["text"] == "A cup"
    assert parsed["quad_box"] == pytest.approx([x1, y1, x2, y1, x2, y2, x1, y2], abs=2)
    assert read_areas(text) == [tuple(zip(*[iter(_numbers(text))] * 2, strict=True))]


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2_vl", "point"), ("internvl", "point"), ("florence2", "point"), ("qwen3_vl", "quad")]
)
def test_a_region_that_the_family_does_not_document_is_an_error(family: str, kind: str, tmp_path: Path) -> None:
    value = {"point": [80, 140], "quad": [0, 0, 9, 0, 9, 9, 0, 9]}[kind]
    sample = _sample(tmp_path, (640, 480), (60, 100, 100, 180), None, {f"{kind}s": {"value": f"{{{{ {value} }}}}"}})
    names = {"point": "points", "quad": "quadrilaterals"}
    expected = rf"how its models write {names[kind]}, .* write them with \{{\{{ {kind} \| thousandths"
    with pytest.raises(RecipeValueError, match=expected):
        with_native_regions(sample, _processor(family))


def test_the_extent_of_native_coordinates(tmp_path: Path) -> None:
    sample = _sample(tmp_path, (640, 480), (64, 240, 320, 432))
    extents = {family: with_native_regions(sample, _processor(family)).extent for family in FAMILIES}
    assert extents.pop("qwen2_5_vl") == _seen("qwen2_5_vl", sample)[2]
    assert extents == {
        **dict.fromkeys(("qwen2_vl", "qwen3_vl", "internvl", "florence2"), (1000, 1000)),
        "paligemma": (1024, 1024),
        "kosmos-2": (32, 32),
    }


def test_it_covers_the_object_in_an_image_that_is_shrunk_to_the_token_limit(tmp_path: Path) -> None:
    processor = _processor("qwen2_5_vl")
    sample = _sample(tmp_path, (640, 480), (64, 240, 320, 432))
    limit = count_tokens(sample, processor).tokens - 20
    fitted = fit_to_budget(sample, processor, limit, "shrink_media").sample
    whole, shrunk = _seen("qwen2_5_vl", sample), _seen("qwen2_5_vl", fitted)
    assert shrunk[2][0] < whole[2][0] and shrunk[1] != whole[1]
    _assert_covers("qwen2_5_vl", fitted)


BOX = Region(((146, 137), (615, 415)), 640, 428)
"""The box of the example in Qwen's script `process_bbox.ipynb`."""
WRITTEN = {
    # the results of the script
    "qwen2_vl": ("<|box_start|>(228,320),(961,970)<|box_end|>", '<|object_ref_start|>a "bowl"<|object_ref_end|>{}'),
    "qwen2_5_vl": ('{"bbox_2d": [147, 134, 619, 407]}', '{"bbox_2d": [147, 134, 619, 407], "label": "a \\"bowl\\""}'),
    "qwen3_vl": ('{"bbox_2d": [228, 320, 961, 970]}', '{"bbox_2d": [228, 320, 961, 970], "label": "a \\"bowl\\""}'),
    # the code of InternVL's documentation, of big_vision, and of transformers' classes for the two others
    "internvl": ("<box>[[228, 320, 961, 970]]</box>", '<ref>a "bowl"</ref>{}'),
    "paligemma": ("<loc0327><loc0233><loc0992><loc0983>", '{} a "bowl"'),
    "florence2": ("<loc_228><loc_320><loc_960><loc_969>", 'a "bowl"{}'),
    "kosmos-2": ("<object><patch_index_0327><patch_index_1022></object>", '<phrase>a "bowl"</phrase>{}'),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_family(family: str) -> None:
    processor = copy.deepcopy(_processor(family))
    if family == "qwen2_5_vl":
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 4 * 1280}
    box, labelled = WRITTEN[family]
    for label, expected in ((None, box), ('a "bowl"', labelled.replace("{}", box))):
        block = {"type": "text", "text": "[]", "native": NativeRegion(BOX, label), "region_image": Path("a.png")}
        [message] = write_native_regions("r", [{"role": "user", "content": [{"type": "text", "text": "At "}, block]}], processor)
        if family == "qwen2_5_vl":
            assert processor.image_processor.patch_size * processor.image_processor.merge_size == 28
        assert message["content"] == [{"type": "text", "text": f"At {expected}"}]


@pytest.mark.parametrize("family", TOKENS)
def test_tokens_of_boxes_are_tokens_and_not_their_spelling(family: str, tmp_path: Path) -> None:
    processor = _processor(family)
    sample = _sample(tmp_path, (640, 480), (64, 240, 320, 432))
    encoded = encode_sample(sample, processor)
    written = text_of(with_native_regions(sample, processor).messages[1])
    spelled = [token for token in TOKENS[family] if token in written]
    ids = processor.tokenizer.convert_tokens_to_ids(spelled)
    assert spelled and set(ids) <= set(encoded["labels"].flatten().tolist())


def test_boxes_in_a_question_with_labels(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    text = "{% for each in boxes %}{{ each | native(names[loop.index0]) }}, {% endfor %}which is larger?"
    turns = [{"role": "user", "images": ["{{ image }}"], "text": text}, {"role": "assistant", "text": "the cup"}]
    boxes = {"value": "{{ bbox }}", "layout": "xyxy"}
    template = DataTemplate.model_validate({"description": "d", "messages": turns, "boxes": boxes, "example": {}})
    row = {"image": "a.png", "bbox": [[0, 0, 10, 10], [50, 0, 100, 50]], "names": ["cup", "plate"]}
    sample = template.sample("r", row, MediaRules(tmp_path))
    assert text_of(sample.messages[0]) == "[0, 0, 100, 200], [500, 0, 1000, 1000], which is larger?"
    processor = _processor("qwen3_vl")
    labelled = [{"bbox_2d": [0, 0, 100, 200], "label": "cup"}, {"bbox_2d": [500, 0, 1000, 1000], "label": "plate"}]
    expected = ", ".join([*map(json.dumps, labelled), "which is larger?"])
    assert text_of(with_native_regions(sample, processor).messages[0]) == expected
    prompt = encode_prompt("r", sample.messages[:1], processor)["input_ids"][0]
    assert expected in processor.tokenizer.decode(prompt)


def test_a_family_without_a_convention_is_an_error(tmp_path: Path) -> None:
    sample = _sample(tmp_path, (640, 480), (64, 240, 320, 432))
    processor = CASES["gemma3"].base.processor()
    assert not family_of_processor(processor).box_conventions
    with pytest.raises(RecipeValueError, match=r"Gemma3Processor: .*`native` cannot be used; write them with \{\{ box \|"):
        with_native_regions(sample, processor)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("{{ (box | native)[1:] }}", "the mark of a region that another filter changed"),
        ("{{ bbox | native }}", "expected a region declared in the template's 'boxes', 'points' or 'quads', got list"),
        ("{{ box | native(none) }}{{ box | native([1]) }}", "expected text or a number, got list"),
    ],
)
def test_what_native_cannot_write_is_an_error_of_the_row(answer: str, reason: str, tmp_path: Path) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    turns = [{"role": "user", "images": ["{{ image }}"], "text": "where?"}, {"role": "assistant", "text": answer}]
    boxes = {"value": "{{ bbox }}", "layout": "xyxy"}
    template = DataTemplate.model_validate({"description": "d", "messages": turns, "boxes": boxes, "example": {}})
    with pytest.raises(RowError, match=rf"^r: messages\[1\]: .*{reason}"):
        template.sample("r", {"image": "a.png", "bbox": [0, 0, 10, 10]}, MediaRules(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_keeps_the_tokens_of_boxes_and_is_scored_by_its_iou(family: str, tmp_path: Path) -> None:
    processor = _processor(family)
    corners = ((64, 240, 320, 432), (96, 240, 352, 432))
    texts = []
    for each in corners:
        encoded = encode_sample(_sample(tmp_path, (640, 480), each), processor)
        [answer] = decode_answers(processor.tokenizer, [encoded["labels"][encoded["labels"] >= 0].tolist()])
        texts.append(answer)
    reference = text_of(with_native_regions(_sample(tmp_path, (640, 480), corners[1]), processor).messages[1])
    assert texts[1].strip() == reference
    score = IOU.score(Item(prediction=texts[0], references=(reference,)))
    assert score == pytest.approx(224 / 288, abs=0.02 + FAMILIES[family][2])
    assert IOU.score(Item(prediction=texts[1], references=(reference,))) == 1


def test_the_documentation_has_every_convention() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data_templates.md").read_text(encoding="utf-8")
    conventions = {name: each for family in TABLE.values() for name, each in family.box_conventions.items()}
    corners = (64 / 640, 240 / 480, 320 / 640, 432 / 480)
    regions: dict[RegionKind, tuple[float, ...]] = {"point": (0.1, 0.5), "quad": (0.1, 0.5, 0.5, 0.5, 0.5, 0.9, 0.1, 0.9)}
    for name, convention in conventions.items():
        for kind in convention.others:
            assert f"| `{name}` | {kind} | `{convention.write(kind, regions[kind], (644, 476), 'cup')}` |" in page
        text = convention.write("box", corners, (644, 476), "cup").replace("|", "\\|")
        assert f"| `{name}` | {convention.meaning} | `{text}` | {convention.source} |" in page


@pytest.mark.parametrize("kind", ["box", "point"])
def test_a_base_without_a_convention_is_an_error_at_the_template(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [
        {"role": "user", "images": ["{{ image }}"], "text": "where?"},
        {"role": "assistant", "text": f"{{{{ {kind} | native }}}}"},
    ]
    sections = {"box": {"boxes": {"value": "{{ bbox }}", "layout": "xyxy"}}, "point": {"points": {"value": "{{ bbox[:2] }}"}}}
    template = {"description": "d", "messages": turns, **sections[kind], "example": {"image": "a.png", "bbox": [0, 0, 9, 9]}}
    Path("boxes.yaml").write_text(json.dumps(template))
    Path("rows.json").write_text("[]")
    Path("recipe.yaml").write_text(
        """
        model: {base: builtin:tiny-llava}
        tune: {language: {method: lora}}
        data:
          train:
            - path: rows.json
              template: boxes.yaml
        train: {max_steps: 1}
        output_dir: run
        """
    )
    with pytest.raises(UserError, match=r"recipe.yaml:7: data.train.0.template: boxes.yaml: llava: .*write them with") as error:
        check_recipe(load_recipe("recipe.yaml"))
    assert f"{{{{ {kind} | thousandths }}}}, fractions or pixels" in str(error.value)


def test_a_row_that_spells_the_tokens_of_a_box_has_the_tokens(tmp_path: Path) -> None:
    """As the rows of Qwen's authors do (QwenLM/Qwen3-VL issue 105). Control tokens of the chat stay text."""
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    processor = _processor("qwen2_vl")
    answer = "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|im_end|>"
    image, text = ({"type": "image", "image": tmp_path / "a.png"}, {"type": "text", "text": "Where?"})
    messages = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    ids = encode_sample(Sample("r", messages), processor)["labels"].flatten().tolist()
    assert [ids.count(number) for number in processor.tokenizer.convert_tokens_to_ids(TOKENS["qwen2_vl"])] == [1, 1, 1, 1]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize("family", TOKENS)
def test_a_streamed_answer_keeps_the_tokens_of_boxes(family: str, tmp_path: Path) -> None:
    processor = _processor(family)
    encoded = encode_sample(_sample(tmp_path, (640, 480), (64, 240, 320, 432)), processor)
    tokens = encoded["labels"][encoded["labels"] >= 0]
    streamer = TextIteratorStreamer(AnswerDecoder(processor.tokenizer))  # type: ignore[arg-type]
    for token in tokens:
        streamer.put(token[None])
    streamer.end()
    assert "".join(streamer) == decode_answers(processor.tokenizer, [tokens.tolist()])[0]


def test_points_in_the_forms_of_answers() -> None:
    forms = (
        '{"point_2d": [12, 34], "label": "a"}',
        "(12, 34)",
        '<point x="12" y="34" alt="a">a</point>',
        "<points x1='12' y1='34'>",
    )
    assert [read_points(form) for form in forms] == [[((12, 34),)]] * 4
    assert read_points('<points x1="1" y1="2" x2="3" y2="4">a</points>') == [((1, 2),), ((3, 4),)]
    assert read_points("[1, 2, 3, 4]") == read_points("[1e30, 2]") == read_points("x is 3") == []
