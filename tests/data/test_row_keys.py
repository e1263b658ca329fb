"""What a row says in its keys is honoured or refused: media, weights, indexes, placeholders."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtune.cli import entry_point
from mmtune.data.collate import pack
from mmtune.data.count import count_tokens
from mmtune.data.encode import IGNORE_INDEX, encode_sample
from mmtune.data.media import Embedded
from mmtune.data.message import RowError, Sample, is_supervised, split_question
from mmtune.data.reader import Reader
from mmtune.data.unread import holds_media
from mmtune.recipe import Source


def _user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def _assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def _samples(media: Path, *rows: dict[str, Any], template: str = "messages", **settings: Any) -> list[Sample]:
    (media / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    reader = Reader(Source(path=str(media / "rows.json"), template=template, **settings))
    opened = reader.open()
    return [reader.sample(*opened[index]) for index in range(len(opened))]


def _told(sample: Sample) -> list[list[str]]:
    """Each message as its texts, and `<name>` for a medium."""
    return [
        [block["text"] if block["type"] == "text" else f"<{block[block['type']].name}>" for block in message["content"]]
        for message in sample.messages
    ]


# ---------------------------------------------------------------------------------------------------- media that nobody reads

UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"image": "a.png", "messages": [_user("q"), _assistant("a")]}, "image"),
    ("messages", {"image_0": "ex_399_img_0", "messages": [_user("q"), _assistant("a")]}, "image_0"),
    ("messages", {"img_path": "a.png", "messages": [_user("q"), _assistant("a")]}, "img_path"),
    ("messages", {"shown": ["x", "pics/a b.JPG"], "messages": [_user("q"), _assistant("a")]}, "shown"),
    ("messages", {"shown": "https://x.org/a.webp?size=3", "messages": [_user("q"), _assistant("a")]}, "shown"),
    ("messages", {"shown": "pics\\a.png", "messages": [_user("q"), _assistant("a")]}, "shown"),
    ("messages", {"shown": "data:image/png;base64,AAAA", "messages": [_user("q"), _assistant("a")]}, "shown"),
    ("messages", {"shown": {"bytes": None, "path": "a"}, "messages": [_user("q"), _assistant("a")]}, "shown"),
    ("messages", {"messages": [_user("q", image_url="a"), _assistant("a")]}, r"messages\[0\]\.image_url"),
    ("messages", {"messages": [_user("q"), _assistant("a", shown="a.png")]}, r"messages\[1\]\.shown"),
    (
        "messages",
        {"messages": [_user([{"type": "text", "text": "q", "image": "a.png"}]), _assistant("a")]},
        r"content\[0\]\.image",
    ),
    ("messages", {"messages": [_user([{"type": "image", "file": "a.png"}]), _assistant("a")]}, r"content\[0\]\.file"),
    ("llava", {"video": "v.mp4", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "video"),
    ("llava", {"images": ["a.png"], "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "images"),
    ("alpaca", {"image": "a.png", "instruction": "q", "input": "", "output": "a"}, "image"),
    ("vqa", {"image": "a.png", "mask": "m.png", "question": "q", "answer": "a"}, "mask"),
]


@pytest.mark.parametrize(("template", "row", "where"), UNREAD)
def test_media_that_nobody_reads_are_an_error_of_the_row(media: Path, template: str, row: dict[str, Any], where: str) -> None:
    with pytest.raises(RowError, match=rf"^rows\.json\[0\]: \S*{where}: names or holds media and is not read; ") as caught:
        _samples(media, row, template=template)
    assert caught.value.finding == "media_unread"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("image", "images", "video") for value in (None, "", [], {}, False, 0, 3)),
        ("image_id", 7),
        ("image_width", "640"),
        ("num_images", 2),
        ("has_image", True),
        ("image_caption", "a cat"),
        ("source", "https://en.wikipedia.org/wiki/Cat"),
        ("source", {"url": "https://x.org/a.png", "licence": "CC"}),
        ("caption", "The file is not there.\nSee a.png"),
        ("version", "v1.0"),
        ("notes", ["a", "b"]),
        ("embedding", [0.1, 0.2]),
        ("table", "rows.json"),
    ],
)
def test_what_only_speaks_of_media_is_no_media(key: str, value: Any) -> None:
    assert not holds_media(key, value)


def test_bytes_and_members_are_media() -> None:
    assert (
        holds_media("a", b"\x89PNG") and holds_media("a", {"bytes": b"x", "path": None}) and holds_media("a", "/9j/" + "A" * 200)
    )
    assert holds_media("seg.png", Embedded(Path("s.tar"), "1.seg.png")) and not holds_media(
        "npy", Embedded(Path("s.tar"), "1.npy")
    )


def test_media_that_are_meant_to_be_left_out(media: Path) -> None:
    """Named in `ignore`, read by `where`, the row's own id, or null as parquet fills it."""
    row = {
        "id": "pics/a.png",
        "thumb": "t.png",
        "set": "a.png",
        "image": None,
        "messages": [_user("q", image=None), _assistant("a")],
    }
    [sample] = _samples(media, row, ignore=["thumb"], where={"set": "a.png"})
    assert _told(sample) == [["q"], ["a"]]
    with pytest.raises(RowError, match="thumb: names or holds media"):
        _samples(media, row, where={"set": "a.png"})


# ---------------------------------------------------------------------------------------------------- media of a turn


@pytest.mark.parametrize(
    ("turns", "images", "told"),
    [
        ([_user("q", images=["a.png"]), _assistant("a")], [], [["<a.png>", "q"], ["a"]]),
        ([_user("q", image="a.png"), _assistant("a")], [], [["<a.png>", "q"], ["a"]]),
        (
            [_user("<image>\nq <image>r", images=["b.png", "a.png"]), _assistant("a")],
            [],
            [["<b.png>", "q ", "<a.png>", "r"], ["a"]],
        ),
        (
            [_user([{"type": "text", "text": "q"}, {"type": "image"}], images=["a.png"]), _assistant("a")],
            [],
            [["q", "<a.png>"], ["a"]],
        ),
        (
            [_user("<image>q"), _assistant("a"), _user("r", images=["b.png"]), _assistant("b")],
            ["a.png"],
            [["<a.png>", "q"], ["a"], ["<b.png>", "r"], ["b"]],
        ),
        (
            [
                _user([{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "q"}]),
                _assistant("a"),
            ],
            ["a.png", "b.png"],
            [["<b.png>", "<a.png>", "q"], ["a"]],
        ),
        (
            [_user([{"type": "image", "index": 0}]), _assistant("a"), _user([{"type": "image", "index": 0}]), _assistant("b")],
            ["a.png"],
            [["<a.png>"], ["a"], ["<a.png>"], ["b"]],
        ),
        ([_user([{"type": "image", "index": None, "text": None}]), _assistant("a")], ["a.png"], [["<a.png>"], ["a"]]),
        ([_user([{"type": "image_url", "image_url": "a.png"}]), _assistant("a")], [], [["<a.png>"], ["a"]]),
        ([_user([{"type": "image", "image_url": {"url": "a.png", "detail": "low"}}]), _assistant("a")], [], [["<a.png>"], ["a"]]),
    ],
)
def test_media_of_turns_and_blocks(media: Path, turns: list[Any], images: list[str], told: list[list[str]]) -> None:
    [sample] = _samples(media, {"messages": turns, "images": images})
    assert _told(sample) == told


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([_user("<image>q", images=["a.png", "b.png"]), _assistant("a")], [], r"messages\[0\]: 2 images for 1 '<image>' pl"),
        ([_user("q", images=["a.png"], image="a.png"), _assistant("a")], [], r"messages\[0\]\.images: 'image' is given too"),
        ([_user("q", images=["none.png"]), _assistant("a")], [], r"messages\[0\]\.images: no such file"),
        ([_user("q"), _assistant("a", images=["a.png"])], [], r"messages\[1\]: an answer cannot hold an image"),
        ([_user("q", images=["a.png"]), _assistant("a")], ["b.png"], "images: 1 images for 0 '<image>' placeholders"),
        ([_user([{"type": "image", "index": 2}]), _assistant("a")], ["a.png"], "index from 0 on into 1 images, got 2"),
        ([_user([{"type": "image", "index": -1}]), _assistant("a")], ["a.png"], r"content\[0\]\.index: .* got -1"),
        ([_user([{"type": "image", "index": "0"}]), _assistant("a")], ["a.png"], "got '0'"),
        ([_user([{"type": "image", "index": 0}]), _assistant("a")], ["a.png", "b.png"], "2 images, and no block has index 1"),
        (
            [_user([{"type": "image", "index": 0}, {"type": "image"}]), _assistant("a")],
            ["a.png"],
            "some blocks have an index and",
        ),
        ([_user([{"type": "image", "image": "a.png", "path": "b.png"}]), _assistant("a")], [], "both 'image' and 'path'"),
    ],
)
def test_media_of_turns_that_are_not_clear(media: Path, turns: list[Any], images: list[str], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        _samples(media, {"messages": turns, "images": images})


def test_images_without_a_placeholder_are_added_where_the_source_says_so(media: Path) -> None:
    row = {
        "images": ["a.png", "b.png"],
        "messages": [{"role": "system", "content": "s"}, _user("q"), _assistant("a"), _user("r"), _assistant("b")],
    }
    with pytest.raises(RowError, match=r"images: 2 images for 0 '<image>' placeholders; `image_placeholder: add` in the source"):
        _samples(media, row)
    [sample] = _samples(media, row, image_placeholder="add")
    assert _told(sample) == [["s"], ["<a.png>", "<b.png>", "q"], ["a"], ["r"], ["b"]]
    row["messages"] = [_user("<image>q"), _assistant("a")]
    with pytest.raises(RowError, match=r"2 images for 1 '<image>' placeholders$"):
        _samples(media, row, image_placeholder="add")
    row["messages"] = [_user([{"type": "image", "index": 0}]), _assistant("a")]
    with pytest.raises(RowError, match="no block has index 1"):
        _samples(media, row, image_placeholder="add")
    for images in ({"images": ["a.png"]}, {"image": "a.png"}, {"images": [], "image": "a.png"}):  # TRL's rows have either
        trl = {**images, "prompt": [_user([{"type": "text", "text": "q"}])], "completion": [_assistant("a")]}
        [sample] = _samples(media, trl, template="prompt_completion", image_placeholder="add")
        assert _told(sample) == [["<a.png>", "q"], ["a"]]
    with pytest.raises(RowError, match="images: 'image' is given too; give one of them"):
        _samples(media, {**trl, "images": ["b.png"]}, template="prompt_completion")


# ---------------------------------------------------------------------------------------------------- weights


def _answers(sample: Sample, processor: Any, **settings: Any) -> list[str]:
    """The supervised tokens, decoded span by span."""
    encoded = encode_sample(sample, processor, **settings)
    pairs = zip(encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist(), strict=True)
    spans = [list(group) for on, group in groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX) if on]
    return [processor.tokenizer.decode([token for token, _ in span]) for span in spans]


def _talk(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": ["a.png"],
        "messages": [_user("<image>q"), _assistant("WRONG", **first), _user("r"), _assistant("right", **last)],
    }


@pytest.mark.parametrize(
    ("first", "last", "trains"),
    [
        ({}, {}, ["WRONG", "right"]),
        ({"weight": 0}, {"weight": 1}, ["right"]),
        ({"weight": 0.0}, {}, ["right"]),
        ({"loss": False}, {"loss": True}, ["right"]),
        ({"train": True}, {"train": False}, ["WRONG"]),
        ({"training": False, "weight": 0}, {"weight": None, "loss": None}, ["right"]),
    ],
)
def test_a_weight_takes_its_turn_out_of_the_loss_and_changes_nothing_else(
    untrained: tuple[Any, Any], media: Path, first: dict[str, Any], last: dict[str, Any], trains: list[str]
) -> None:
    processor = untrained[1]
    sample, plain = _samples(media, _talk(first, last), _talk({}, {}))
    assert _answers(sample, processor) == [f"{answer}<|end|>" for answer in trains]
    whole, weighed = encode_sample(plain, processor), encode_sample(sample, processor)
    assert all(torch.equal(whole[key], weighed[key]) for key in whole if key != "labels")
    supervised = int((weighed["labels"] != IGNORE_INDEX).sum())
    assert (
        count_tokens(sample, processor).supervised
        == supervised
        == len(processor.tokenizer("".join(f"{a}<|end|>" for a in trains))["input_ids"])
    )
    assert torch.equal(pack([weighed, whole])["labels"], torch.cat([weighed["labels"], whole["labels"]], dim=1))


def test_a_weight_and_the_last_answer_alone(untrained: tuple[Any, Any], media: Path) -> None:
    sample, without = _samples(media, _talk({"weight": 0}, {}), _talk({}, {"weight": 0}))
    assert _answers(sample, untrained[1], supervise="last") == ["right<|end|>"]
    with pytest.raises(
        RowError, match=r"rows\.json\[1\]: messages: the last answer, .* has weight 0, so that nothing trains"
    ) as caught:
        encode_sample(without, untrained[1], supervise="last")
    assert caught.value.finding == "nothing_supervised"


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        ({"weight": 0.5}, {}, r"messages\[1\]\.weight: expected 0, 1, true or false, got 0\.5"),
        ({"weight": 2}, {}, "got 2"),
        ({"loss": "false"}, {}, r"messages\[1\]\.loss: expected 0, 1, true or false, got 'false'"),
        ({}, {"loss": float("nan")}, r"messages\[3\]\.loss: .* got nan"),
        ({"weight": [0]}, {}, r"got \[0\]"),
        ({"weight": 0, "loss": True}, {}, r"messages\[1\]: weight and loss disagree"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            {},
            r"messages\[1\]\.train_detail: cannot be honoured",
        ),
        ({"loss_scale": 0.3}, {}, r"messages\[1\]\.loss_scale: expected 0, 1, true or false, got 0\.3"),
        ({"weight": 0}, {"weight": 0}, "messages: every answer has weight 0"),
    ],
)
def test_a_weight_that_cannot_be_honoured_is_an_error(
    media: Path, first: dict[str, Any], last: dict[str, Any], reason: str
) -> None:
    reader = Reader(Source(path=str(media / "rows.jsonl"), template="messages"))
    with pytest.raises(RowError, match=reason):
        reader.sample("r", _talk(first, last))


def test_a_question_has_no_loss_to_ask_for(media: Path) -> None:
    asks = [_user("q", weight=1), _assistant("a")]
    with pytest.raises(RowError, match=r"messages\[0\]\.weight: 1 asks for loss on a turn of the user"):
        _samples(media, {"messages": asks})
    with pytest.raises(RowError, match=r"rows\.json\[0\]: loss_mask: cannot be honoured"):
        _samples(media, {"messages": [_user("q"), _assistant("a")], "loss_mask": [0, 1]})
    [sample] = _samples(media, {"messages": [_user("q", weight=0, loss=None), _assistant("a")]})
    assert [is_supervised(message) for message in sample.messages] == [False, True]


def test_an_answer_of_weight_0_is_no_reference(media: Path) -> None:
    kept, excluded = _samples(media, _talk({"weight": 0}, {}), _talk({}, {"weight": 0}))
    assert split_question(kept)[1] == "right"
    with pytest.raises(RowError, match=r"^rows\.json\[1\]: messages: the last answer has weight 0"):
        split_question(excluded)


def test_answers_in_a_prompt_are_context(untrained: tuple[Any, Any], media: Path) -> None:
    """As TRL puts the loss on the completion; a turn's own weight goes before it."""
    prompt = [_user("a"), _assistant("b"), _user("c"), _assistant("d", weight=1), _user("e")]
    row = {"prompt": prompt, "completion": [_assistant("f"), _user("g"), _assistant("h")]}
    [sample] = _samples(media, row, template="prompt_completion")
    assert _answers(sample, untrained[1]) == [f"{answer}<|end|>" for answer in "dfh"]
    rows = [{"query": "c", "response": "d", "history": [["a", "b"]]}]
    assert _answers(_samples(media, *rows, template="query_response")[0], untrained[1]) == ["b<|end|>", "d<|end|>"]


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "q"}, "completion: expected a text or a list of turns"),
        (
            "prompt_completion",
            {"promt": "q", "completion": "a"},
            "prompt: expected a text or a list of turns; did you mean 'promt'",
        ),
        ("prompt_completion", {"prompt": 3, "completion": "a"}, "prompt: expected a text or a list of turns"),
        ("prompt_completion", {"prompt": [], "completion": "a"}, "prompt: expected a text or a list of turns"),
        ("prompt_completion", {"prompt": ["q"], "completion": "a"}, r"prompt\[0\]: expected an object with 'role' and 'content'"),
        ("prompt_completion", {"prompt": "q", "completion": [_user("a")]}, "turns alternate"),
        ("prompt_completion", {"prompt": "q", "completion": "  "}, r"messages\[1\]: the answer is empty"),
        (
            "query_response",
            {"query": "q", "response": "a", "history": [["q"]]},
            r"history\[0\]: expected a question and its answer",
        ),
        ("query_response", {"query": "q", "response": "a", "history": "q"}, r"history\[0\]: expected a question and its answer"),
        ("query_response", {"query": "q", "response": "a", "system": 3}, "system: expected text"),
    ],
)
def test_questions_and_answers_that_are_none(media: Path, template: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        _samples(media, row, template=template)


# ---------------------------------------------------------------------------------------------------- shards


def _shard(folder: Path, *rows: dict[str, Any]) -> Path:
    """A shard of rows: each a member's ending to its bytes, or to what its JSON holds."""
    with tarfile.open(folder / "s.tar", "w") as tar:
        for number, row in enumerate(rows):
            for ending, value in row.items():
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "s.tar"


def _png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def _nested(question: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}], **keys}


def test_a_conversation_inside_of_a_shards_json(tmp_path: Path) -> None:
    many = {f"{n}.png": _png("red") for n in range(11)}
    rows = [
        {"json": _nested("<image>q", id="x7"), "png": _png("red")},
        {"json": _nested("<image>q", image="coco/7.jpg"), "jpg": _png("red")},
        {"json": _nested("q")},
        {"json": _nested("<image>" * 11), **many},
    ]
    reader = Reader(Source(path=str(_shard(tmp_path, *rows)), template="llava"))
    opened = reader.open()
    told = [_told(reader.sample(*opened[index])) for index in range(len(opened))]
    assert told[:3] == [[["<000.png>", "q"], ["a"]], [["<001.jpg>", "q"], ["a"]], [["q"], ["a"]]]
    assert told[3][0] == [f"<003.{n}.png>" for n in range(11)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"json": _nested("<image>q", image=["a", "b"]), "png": _png("red")}, r"s\.tar:000: image: 2 in `json` and 1 members"),
        ({"json": _nested("q"), "png": _png("red")}, "image: 1 images for 0"),
        ({"json": _nested("q"), "mp4": b"x"}, "mp4: names or holds media and is not read"),
        ({"json": _nested("q", video="a.mp4")}, "video: names or holds media and is not read"),
    ],
)
def test_a_shards_row_whose_media_are_not_clear(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    reader = Reader(Source(path=str(_shard(tmp_path, row)), template="llava"))
    with pytest.raises(RowError, match=reason):
        reader.sample(*reader.open()[0])


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def mmtune(media: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a verb over a recipe of some rows; gives the exit code and what was printed."""

    def run(verb: list[str], rows: list[Any], source: dict[str, Any], *overrides: str, **sections: Any) -> tuple[int, str]:
        (media / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        data = {"train": [{"path": str(media / "rows.json"), "template": "messages", **source}]}
        document = {"model": {"base": str(base)}, "data": data, "output_dir": str(media / "run"), **sections}
        document["train"] = {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 1}
        (media / "recipe.yaml").write_text(json.dumps(document), encoding="utf-8")
        code = entry_point([*verb, str(media / "recipe.yaml"), *overrides])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_a_key_with_media_is_told_by_check_plan_and_train(mmtune: Callable[..., tuple[int, str]]) -> None:
    rows = [{"image": "a.png", "messages": [_user("q"), _assistant("a")]}]
    code, told = mmtune(["data", "check"], rows, {})
    assert code == 1 and "media_unread" in told and "0 notes" in told
    for verb in (["plan"], ["train"]):
        code, told = mmtune(verb, rows, {})
        assert "rows.json[0]: image: names or holds media and is not read; the template reads media in images, videos" in told, (
            verb
        )
    assert code == 2 and "1 of 1 rows cannot train" in told
    assert mmtune(["data", "check"], rows, {"ignore": ["image"]})[0] == 0


def test_a_weight_is_seen_by_check_show_and_plan(mmtune: Callable[..., tuple[int, str]]) -> None:
    rows = [_talk({"weight": 0}, {})]
    assert mmtune(["data", "check"], rows, {})[0] == 0
    _, told = mmtune(["data", "show", "--json"], rows, {})
    shown = [token["text"] for token in json.loads(told)["tokens"] if token["kind"] == "supervised"]
    assert "".join(shown) == "right<|end|>"
    _, told = mmtune(["plan"], rows, {})
    assert re.search(rf"supervised tokens │ +{len(shown)} ", told)


def test_a_last_answer_of_weight_0_can_train_and_cannot_be_asked(mmtune: Callable[..., tuple[int, str]], media: Path) -> None:
    rows = [_talk({}, {"weight": 0})]
    assert mmtune(["data", "check"], rows, {})[0] == 0
    code, told = mmtune(["data", "check"], rows, {}, "data.supervise=last")
    assert code == 1 and "nothing_supervised" in told
    (media / "held_out.json").write_text(json.dumps(rows), encoding="utf-8")
    asked = {"data": [{"path": str(media / "held_out.json"), "template": "messages"}]}
    code, told = mmtune(["data", "check"], [_talk({}, {})], {}, evaluate=asked)
    assert code == 1 and "reference_weight" in told
    code, told = mmtune(["train"], [_talk({}, {})], {}, evaluate=asked)
    assert code == 2 and "1 of 1 rows cannot be asked:\n  held_out.json[0]: messages: the last answer has weight 0" in told
