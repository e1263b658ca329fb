"""Shipped data templates: each reads rows in the published format of its data set, and names a row that it cannot read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mmtune.data.media.media import EmbeddedMedia, MediaRules, image_size
from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.sources.reader import SourceReader, example_rows, write_rows
from mmtune.data.templates.prompts import PromptSettings
from mmtune.data.templates.template import load_data_template
from mmtune.recipe.recipe import Source, load_recipe
from mmtune.rehearse import draw_picture, example_images, rehearse
from mmtune.utils.shipped import shipped_dir

FIXTURES = Path(__file__).parent / "fixtures"
SHIPPED = sorted(file.stem for file in shipped_dir("data_templates").glob("*.yaml"))
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# The file of rows, as published, and what else a recipe would say.
SOURCES: dict[str, dict[str, Any]] = {
    "alpaca": {"path": "alpaca_data.json"},
    "aokvqa": {"path": "aokvqa_v1p0_val.json"},
    "audio_caption": {"path": "val.jsonl"},
    "chartqa": {"path": "test_human.json"},
    "classification": {"path": "train.jsonl", "verbalizer": CIFAR10},
    "coco_caption": {"path": "captions_val2014.json"},
    "conceptual_captions": {"path": "00000.tar"},
    "digit_boxes": {"path": "boxes.json"},
    "docvqa": {"path": "val_v1.0.json"},
    "flickr30k": {"path": "dataset_flickr30k.json", "where": {"split": "train"}},
    "gqa": {"path": "val_balanced_questions.json"},
    "image_text_match": {"path": "pairs.jsonl"},
    "llava": {"path": "llava_v1_5_mix665k.json"},
    "messages": {"path": "train.jsonl"},
    "ocr_vqa": {"path": "dataset.json", "where": {"split": 1}},
    "prompt_completion": {"path": "train.jsonl"},
    "query_response": {"path": "train.jsonl"},
    "refcoco": {"path": "val.json"},
    "scienceqa": {"path": "problems.json", "where": {"split": ["train"]}},
    "sharegpt": {"path": "mllm_demo.json"},
    "textvqa": {"path": "TextVQA_0.5.1_val.json"},
    "video_qa": {"path": "val.jsonl"},
    "visual_genome_qa": {"path": "question_answers.json", "join": "image_data.json"},
    "visual_genome_regions": {"path": "region_descriptions.json", "join": "image_data.json"},
    "vqa": {"path": "rows.jsonl"},
    "vqa_v2": {
        "path": "v2_OpenEnded_mscoco_val2014_questions.json",
        "join": "v2_mscoco_val2014_annotations.json",
        "values": {"images": "val2014"},
    },
}


def _expected(name: str) -> Any:
    return json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))


def _media_of(expected: Any) -> Iterator[tuple[str, str]]:
    for sample in expected:
        for _, blocks, *_ in sample["messages"]:
            for block in blocks:
                if isinstance(block, dict) and "any of" not in block:
                    yield from block.items()


def _place(root: Path, kind: str, name: str) -> None:
    """A picture of 64 x 48 pixels, or a file that stands for a video or a sound."""
    if kind == "image":
        draw_picture(root / name, seed=0)
    else:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not decoded")


def _reader(name: str, root: Path, **settings: Any) -> SourceReader:
    keys = {**SOURCES[name], "template": name, "media_root": str(root), **settings}
    for key in ("path", "join"):
        if key in keys and not Path(keys[key]).is_absolute():
            keys[key] = str(FIXTURES / name / keys[key])
    return SourceReader(Source.model_validate(keys))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A media root for each template, with all that its fixture names."""
    folders = {name: tmp_path_factory.mktemp(name) for name in SHIPPED}
    for name, root in folders.items():
        for kind, medium in _media_of(_expected(name)):
            _place(root, kind, medium)
    return folders


def _same(block: dict[str, Any], expected: Any, root: Path) -> bool:
    if isinstance(expected, dict) and "any of" in expected:
        return block["type"] == "text" and block["text"] in expected["any of"]
    if isinstance(expected, dict):
        [(kind, name)] = expected.items()
        if isinstance(block.get(kind), EmbeddedMedia):
            return block["type"] == kind and block[kind].name == name
        return block == {"type": kind, kind: root.resolve() / name}
    return block == {"type": "text", "text": expected}


def test_every_shipped_template_has_a_fixture() -> None:
    assert sorted(SOURCES) == SHIPPED == sorted(folder.name for folder in FIXTURES.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_as_published_become_these_messages(name: str, roots: dict[str, Path]) -> None:
    reader, expected = _reader(name, roots[name]), _expected(name)
    rows = reader.open()
    assert len(rows) == len(expected)
    for index, sample_expected in enumerate(expected):
        sample = reader.sample(*rows[index])
        messages = sample_expected["messages"]
        assert [message["role"] for message in sample.messages] == [role for role, *_ in messages]
        assert list(sample.tools) == sample_expected.get("tools", [])
        for message, (_, blocks, *keys) in zip(sample.messages, messages, strict=True):
            others = {key: value for key, value in message.items() if key not in ("role", "content", "supervised")}
            assert others == (keys[0] if keys else {})
            assert len(message["content"]) == len(blocks)
            for block, block_expected in zip(message["content"], blocks, strict=True):
                assert _same(block, block_expected, roots[name]), (block, block_expected)
        assert sample.task == sample_expected.get("task")
        assert list(sample.choices) == sample_expected.get("choices", [])
        assert list(sample.references) == sample_expected.get("references", [])
        assert sample.source == reader.source.path


@pytest.mark.parametrize("name", SHIPPED)
def test_a_row_streamed_is_the_row_by_index(name: str, roots: dict[str, Path]) -> None:
    reader = _reader(name, roots[name])
    rows = reader.open()
    assert [parse() for parse in reader.stream()] == [rows[index] for index in range(len(rows))]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_template_reads_its_own_example(name: str, tmp_path: Path) -> None:
    """Laid out as the template says, two copies of it, each with its media: what `--rehearse` trains on."""
    template = load_data_template(name)
    rows = example_rows(template, 2)
    for row in rows:
        for image in example_images(template, row):
            draw_picture(tmp_path / image, seed=0)
        for kind, medium in template.columns().media_values(row) if template.messages else ():
            _place(tmp_path, kind, str(medium))
    written = write_rows(template, rows, tmp_path / "rows.json")
    keys = {key: value for key, value in SOURCES[name].items() if key not in ("path", "join", "where", "values")}
    reader = SourceReader(Source.model_validate({**keys, **written, "template": name, "media_root": str(tmp_path)}))
    opened = reader.open()
    samples = [reader.sample(*opened[index]) for index in range(len(opened))]
    assert len(samples) == 2 and len({sample.id for sample in samples}) == 2
    assert all(sample.messages[-1]["role"] == "assistant" for sample in samples)


def test_an_image_inside_a_parquet_file_is_its_rows(tmp_path: Path) -> None:
    """RefCOCO as it is published: one file, its pictures in it."""
    rows = json.loads((FIXTURES / "refcoco" / "val.json").read_text(encoding="utf-8"))
    for row in rows:
        draw_picture(tmp_path / "a.png", seed=0)
        row["image"] = {"bytes": (tmp_path / "a.png").read_bytes(), "path": row["image"]}
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "val.parquet")
    reader = SourceReader(Source(path=str(tmp_path / "val.parquet"), template="refcoco"))
    opened = reader.open()
    samples = [reader.sample(*opened[index]) for index in range(len(opened))]
    assert [image_size(sample.images[0]) for sample in samples] == [(64, 48)] * 2
    answers = [text_of(message) for sample in samples for message in sample.messages if message["role"] == "assistant"]
    assert answers == ["[125, 250, 500, 625]"] * 2 + ["[0, 0, 1000, 1000]"]


@pytest.mark.slow
def test_a_recipe_over_every_template_is_rehearsed(tmp_path: Path) -> None:
    """What `--rehearse` makes of joins, objects of rows, options, labels and few-shot examples trains and is scored."""
    sources = [{**SOURCES[name], "template": name} for name in SHIPPED if name not in ("audio_caption", "video_qa")]
    by_name = {source["template"]: source for source in sources}
    by_name["aokvqa"] |= {"shuffle_options": True, "shots": {"count": 2, "path": by_name["aokvqa"]["path"]}}
    by_name["scienceqa"]["shots"] = {"count": 1, "path": "captions.json", "template": "coco_caption"}
    closed = [by_name[name] for name in ("aokvqa", "classification", "scienceqa")]
    document = {
        "model": {"base": "builtin:tiny-llava-untrained"},
        "data": {"train": sources},
        "evaluate": {"data": closed, "score": "choices", "before": False},
        "train": {"use_cpu": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(document), encoding="utf-8")
    summary = rehearse(load_recipe(tmp_path / "recipe.yaml"))
    assert summary["questions"] == 12


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", " ", "<image>", "a\x00b", "\ud800", "../../etc/passwd", "/", ".", "{{ 7 * 7 }}", "http://x.org/a.png"])
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


@st.composite
def hostile(draw: st.DrawFn, row: dict[str, Any]) -> dict[str, Any]:
    """A sound row with some of its values exchanged for anything, or taken out; or a row of anything."""
    if draw(st.integers(0, 9)) == 0:
        anything: dict[str, Any] = draw(st.dictionaries(st.sampled_from([*row, "x"]), VALUES, max_size=6))
        return anything
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*(path for path in _paths(row) if path), ("an unknown field",)]))
        parent = row
        for key in path[:-1]:
            parent = parent[key]
        if path in _paths(row) and draw(st.integers(0, 4)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(VALUES)
    return row


def _check_sound(sample: Sample) -> None:
    """Whatever was accepted is a conversation that can train."""
    roles = [message["role"] for message in sample.messages]
    assert roles[0] in ("user", "system") and roles[-1] == "assistant"
    for message in sample.messages:
        for block in message["content"]:
            what = block[block["type"]]
            assert isinstance(what, str) if block["type"] == "text" else isinstance(what, EmbeddedMedia) or what.is_file()
        if message["role"] == "assistant" and "tool_calls" not in message:
            assert "".join(block["text"] for block in message["content"]).strip()
        for call in message.get("tool_calls", ()):
            assert message["role"] == "assistant" and call["function"]["name"]
            assert isinstance(call["function"]["arguments"], dict)
    assert all(tool["function"]["name"] for tool in sample.tools)
    assert all(isinstance(text, str) for text in (*sample.choices, *sample.references))
    assert not sample.choices or sample.messages[-1]["content"][0]["text"] in sample.choices


@pytest.mark.parametrize("name", SHIPPED)
def test_a_hostile_row_is_rejected_by_name_or_valid(name: str, roots: dict[str, Path]) -> None:
    reader = _reader(name, roots[name])
    template, rows = reader.template, reader.open()
    partners = {}
    if template.join is not None:
        beside = FIXTURES / name / SOURCES[name].get("join", SOURCES[name]["path"])
        listed = json.loads(beside.read_text(encoding="utf-8"))
        listed = listed[template.join.rows] if template.join.rows else listed
        partners = {partner[template.join.to or template.join.by]: partner for partner in listed}
    sound = [row for _, row in (rows[index] for index in range(len(rows)))]
    if template.join is not None:
        sound = [{**row, "joined": partners[row[template.join.by]]} for row in sound]
    words = {str(label): word for label, word in enumerate(CIFAR10)} if name == "classification" else None
    prompting = PromptSettings(words=words, values=SOURCES[name].get("values", {}))
    for row in sound:
        _check_sound(template.sample("row", row, MediaRules(roots[name]), prompting))
    outcomes = set()

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(row=st.sampled_from(sound).flatmap(hostile))
    def check(row: dict[str, Any]) -> None:
        try:
            sample = template.sample("row", row, MediaRules(roots[name]), prompting)
        except RowError as error:
            assert error.row == "row" and error.field and len(str(error)) < 2000
            outcomes.add("refused")
        else:
            _check_sound(sample)
            outcomes.add("sound")

    check()
    assert "refused" in outcomes
