"""Media, indexes and placeholders in a row's keys are used or rejected, in the same way by every command."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from message_rows import assistant, contents, samples, talk, user
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.media.media import EmbeddedMedia, open_image
from mmtune.data.message import RowError
from mmtune.data.sources.reader import SourceReader
from mmtune.data.templates.unread_media import holds_media
from mmtune.recipe.recipe import Source

# ---------------------------------------------------------------------------------------------------- media that nobody reads

UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"image": "a.png", "messages": [user("q"), assistant("a")]}, "image"),
    ("messages", {"image_0": "ex_399_img_0", "messages": [user("q"), assistant("a")]}, "image_0"),
    ("messages", {"img_path": "a.png", "messages": [user("q"), assistant("a")]}, "img_path"),
    ("messages", {"shown": ["x", "pics/a b.JPG"], "messages": [user("q"), assistant("a")]}, "shown"),
    ("messages", {"shown": "https://x.org/a.webp?size=3", "messages": [user("q"), assistant("a")]}, "shown"),
    ("messages", {"shown": "pics\\a.png", "messages": [user("q"), assistant("a")]}, "shown"),
    ("messages", {"shown": "data:image/png;base64,AAAA", "messages": [user("q"), assistant("a")]}, "shown"),
    ("messages", {"shown": {"bytes": None, "path": "a"}, "messages": [user("q"), assistant("a")]}, "shown"),
    ("messages", {"messages": [user("q", image_url="a"), assistant("a")]}, r"messages\[0\]\.image_url"),
    ("messages", {"messages": [user("q"), assistant("a", shown="a.png")]}, r"messages\[1\]\.shown"),
    (
        "messages",
        {"messages": [user([{"type": "text", "text": "q", "image": "a.png"}]), assistant("a")]},
        r"content\[0\]\.image",
    ),
    ("messages", {"messages": [user([{"type": "image", "file": "a.png"}]), assistant("a")]}, r"content\[0\]\.file"),
    ("llava", {"video": "v.mp4", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "video"),
    ("llava", {"images": ["a.png"], "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "images"),
    ("alpaca", {"image": "a.png", "instruction": "q", "input": "", "output": "a"}, "image"),
    ("vqa", {"image": "a.png", "mask": "m.png", "question": "q", "answer": "a"}, "mask"),
    ("messages", {"attachments": [{"type": "image", "image": "ex_3"}], "messages": [user("q"), assistant("a")]}, "attachments"),
    ("messages", {"attachments": [{"image_url": {"url": "a.jpg"}}], "messages": [user("q"), assistant("a")]}, "attachments"),
    ("messages", {"meta": {"file_name": "a.jpg", "n": 1}, "messages": [user("q"), assistant("a")]}, "meta"),
    ("messages", {"meta": {"url": "https://x.org/a.jpg", "n": 1}, "messages": [user("q"), assistant("a")]}, "meta"),
    ("messages", {"messages": [user("q", files=[{"name": "0.png"}]), assistant("a")]}, r"messages\[0\]\.files"),
    ("messages", {"messages": [user([{"type": "image", "file": {"file_id": "0.png"}}]), assistant("a")]}, r"content\[0\]\.file"),
]


@pytest.mark.parametrize(("template", "row", "where"), UNREAD)
def test_unread_media_are_an_error_of_the_row(media: Path, template: str, row: dict[str, Any], where: str) -> None:
    with pytest.raises(RowError, match=rf"^rows\.json\[0\]: \S*{where}: the key refers to media but is not read; ") as caught:
        samples(media, row, template=template)
    assert caught.value.issue == "media_unread"


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
        ("source", {"url": "https://en.wikipedia.org/wiki/Cat"}),
        ("title", "How to open a .png"),
        ("source", "see fig1.png"),
        ("image_url", {"url": None}),
        ("image", {"bytes": None, "path": None}),
        ("images", [None]),
        ("images", [[], {"url": ""}]),
        *(("image", word) for word in ("None", "none", "null", "nan", "False", "false")),
        ("caption", "The file is not there.\nSee a.png"),
        ("version", "v1.0"),
        ("notes", ["a", "b"]),
        ("embedding", [0.1, 0.2]),
        ("table", "rows.json"),
    ],
)
def test_text_about_media_is_not_media(key: str, value: Any) -> None:
    assert not holds_media(key, value)


def test_a_picture_s_address_in_metadata_is_provenance_where_media_are_read(media: Path) -> None:
    source = {"url": "https://x.org/a.png", "licence": "CC"}
    assert holds_media("source", source) and not holds_media("source", source, provenance=True)
    assert holds_media("source", {**source, "file": "a.png"}, provenance=True)
    assert holds_media("a", [{"type": "image", "url": "https://x.org/a.png", "n": 1}], provenance=True)
    row = {"images": ["a.png"], "source": source, "messages": [user("<image>q", meta=source), assistant("a")]}
    assert contents(samples(media, row)[0]) == [["<a.png>", "q"], ["a"]]


def test_values_that_are_not_media_do_not_change_a_row(media: Path) -> None:
    text = {"type": "text", "text": "q", "image_url": {"url": None}}
    picture = {"type": "image", "image": "a.png", "url": {"url": None}}
    rows = {"image": {"bytes": None, "path": None}, "messages": [user([text, picture], name="bob.png"), assistant("a")]}
    assert contents(samples(media, rows)[0]) == [["q", "<a.png>"], ["a"]]


def test_anthropics_source_block_is_read_or_rejected(media: Path) -> None:
    data = base64.b64encode(_png("red")).decode()

    def row(source: Any) -> dict[str, Any]:
        return {"images": [], "messages": [user([{"type": "image", "source": source}]), assistant("a")]}

    [sample] = samples(media, row({"type": "base64", "media_type": "image/png", "data": data}))
    assert open_image(sample.images[0]).getpixel((0, 0)) == (255, 0, 0)
    for source, reason in (
        ({"type": "url", "url": "https://x.org/a.png"}, "is a URL; set `allow_urls: true`"),
        ({"type": "file", "file_id": "f1"}, "got an object with type, file_id"),
        ({"type": "base64", "media_type": "image/png", "data": "!"}, "not valid base64"),
    ):
        with pytest.raises(RowError, match=rf"messages\[0\]\.content\[0\]\.source: .*{reason}"):
            samples(media, row(source))


def test_bytes_and_members_are_media() -> None:
    assert (
        holds_media("a", b"\x89PNG") and holds_media("a", {"bytes": b"x", "path": None}) and holds_media("a", "/9j/" + "A" * 200)
    )
    assert holds_media("seg.png", EmbeddedMedia(Path("s.tar"), "1.seg.png")) and not holds_media(
        "npy", EmbeddedMedia(Path("s.tar"), "1.npy")
    )


def test_media_can_be_left_out_on_request(media: Path) -> None:
    """Named in `ignore`, read by `where`, the row's own id, or null as parquet fills it."""
    row = {
        "id": "pics/a.png",
        "thumb": "t.png",
        "set": "a.png",
        "image": None,
        "messages": [user("q", image=None), assistant("a")],
    }
    [sample] = samples(media, row, ignore=["thumb"], where={"set": "a.png"})
    assert contents(sample) == [["q"], ["a"]]
    with pytest.raises(RowError, match="thumb: the key refers to media"):
        samples(media, row, where={"set": "a.png"})


# ---------------------------------------------------------------------------------------------------- media of a turn


@pytest.mark.parametrize(
    ("turns", "images", "expected"),
    [
        ([user("q", images=["a.png"]), assistant("a")], [], [["<a.png>", "q"], ["a"]]),
        ([user("q", image="a.png"), assistant("a")], [], [["<a.png>", "q"], ["a"]]),
        (
            [user("<image>\nq <image>r", images=["b.png", "a.png"]), assistant("a")],
            [],
            [["<b.png>", "q ", "<a.png>", "r"], ["a"]],
        ),
        (
            [user([{"type": "text", "text": "q"}, {"type": "image"}], images=["a.png"]), assistant("a")],
            [],
            [["q", "<a.png>"], ["a"]],
        ),
        (
            [user("<image>q"), assistant("a"), user("r", images=["b.png"]), assistant("b")],
            ["a.png"],
            [["<a.png>", "q"], ["a"], ["<b.png>", "r"], ["b"]],
        ),
        (
            [
                user([{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "q"}]),
                assistant("a"),
            ],
            ["a.png", "b.png"],
            [["<b.png>", "<a.png>", "q"], ["a"]],
        ),
        (
            [user([{"type": "image", "index": 0}]), assistant("a"), user([{"type": "image", "index": 0}]), assistant("b")],
            ["a.png"],
            [["<a.png>"], ["a"], ["<a.png>"], ["b"]],
        ),
        ([user([{"type": "image", "index": None, "text": None}]), assistant("a")], ["a.png"], [["<a.png>"], ["a"]]),
        ([user([{"type": "image_url", "image_url": "a.png"}]), assistant("a")], [], [["<a.png>"], ["a"]]),
        ([user([{"type": "image", "image_url": {"url": "a.png", "detail": "low"}}]), assistant("a")], [], [["<a.png>"], ["a"]]),
    ],
)
def test_media_of_turns_and_blocks(media: Path, turns: list[Any], images: list[str], expected: list[list[str]]) -> None:
    [sample] = samples(media, {"messages": turns, "images": images})
    assert contents(sample) == expected


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        (
            [user("<image>q", images=["a.png", "b.png"]), assistant("a")],
            [],
            r"messages\[0\]: expected one '<image>' placeholder for each image, got 1 for 2",
        ),
        (
            [user("q", images=["a.png"], image="a.png"), assistant("a")],
            [],
            r"messages\[0\]\.images: expected one of 'images' and 'image', got both",
        ),
        ([user("q", images=["none.png"]), assistant("a")], [], r"messages\[0\]\.images: no such file"),
        ([user("q"), assistant("a", images=["a.png"])], [], r"messages\[1\]: expected only text in an answer, got an image"),
        (
            [user("q", images=["a.png"]), assistant("a")],
            ["b.png"],
            "images: expected one '<image>' placeholder for each image, got 0 for 1",
        ),
        (
            [user([{"type": "image", "index": 2}]), assistant("a")],
            ["a.png"],
            "expected 0 <= index < 1 .*, got 2",
        ),
        ([user([{"type": "image", "index": -1}]), assistant("a")], ["a.png"], r"content\[0\]\.index: .* got -1"),
        ([user([{"type": "image", "index": "0"}]), assistant("a")], ["a.png"], "got '0'"),
        ([user([{"type": "image", "index": 0}]), assistant("a")], ["a.png", "b.png"], "2 images, but no block has index 1"),
        (
            [user([{"type": "image", "index": 0}, {"type": "image"}]), assistant("a")],
            ["a.png"],
            "some blocks have an index and",
        ),
        (
            [user([{"type": "image", "image": "a.png", "path": "b.png"}]), assistant("a")],
            [],
            "expected one of 'image' and 'path', got both",
        ),
    ],
)
def test_ambiguous_media_of_turns_are_errors(media: Path, turns: list[Any], images: list[str], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        samples(media, {"messages": turns, "images": images})


def test_images_without_a_placeholder_are_added_if_the_source_requests_it(media: Path) -> None:
    row = {
        "images": ["a.png", "b.png"],
        "messages": [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"), assistant("b")],
    }
    with pytest.raises(
        RowError,
        match=r"images: expected .* placeholder for each image, got 0 for 2; set `image_placeholder: add` in the source",
    ):
        samples(media, row)
    [sample] = samples(media, row, image_placeholder="add")
    assert contents(sample) == [["s"], ["<a.png>", "<b.png>", "q"], ["a"], ["r"], ["b"]]
    row["messages"] = [user("<image>q"), assistant("a")]
    with pytest.raises(RowError, match=r"expected one '<image>' placeholder for each image, got 1 for 2$"):
        samples(media, row, image_placeholder="add")
    row["messages"] = [user([{"type": "image", "index": 0}]), assistant("a")]
    with pytest.raises(RowError, match="no block has index 1"):
        samples(media, row, image_placeholder="add")
    for images in ({"images": ["a.png"]}, {"image": "a.png"}, {"images": [], "image": "a.png"}):  # TRL's rows have either
        trl = {**images, "prompt": [user([{"type": "text", "text": "q"}])], "completion": [assistant("a")]}
        [sample] = samples(media, trl, template="prompt_completion", image_placeholder="add")
        assert contents(sample) == [["<a.png>", "q"], ["a"]]
    with pytest.raises(RowError, match="images: expected one of 'images' and 'image', got both; remove one"):
        samples(media, {**trl, "images": ["b.png"]}, template="prompt_completion")


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
        {"json": _nested("<image><image>", image=["p/1.png", "0.png"]), "0.png": _png("red"), "1.png": _png("red")},
        {"json": _nested("<image><image>", image=["005.1.png", {"path": "005.0.png"}]), "0.png": b"", "1.png": b""},
    ]
    reader = SourceReader(Source(path=str(_shard(tmp_path, *rows)), template="llava"))
    opened = reader.open()
    turns = [contents(reader.sample(*opened[index])) for index in range(len(opened))]
    assert turns[:3] == [[["<000.png>", "q"], ["a"]], [["<001.jpg>", "q"], ["a"]], [["q"], ["a"]]]
    assert turns[3][0] == [f"<003.{n}.png>" for n in range(11)]
    assert [turns[4][0], turns[5][0]] == [[f"<00{row}.{n}.png>" for n in (1, 0)] for row in (4, 5)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"json": _nested("<image>q", image=["a", "b"]), "png": _png("red")},
            r"s\.tar:000: image: expected as many files in `json` as members of the shard, got 2 and 1",
        ),
        (
            {"json": _nested("<image><image>", image=["1.png", "x.png"]), "0.png": b"", "1.png": b""},
            r"image: `json` refers to 'x\.png', which is not a member of the shard's row \(0\.png, 1\.png\)",
        ),
        (
            {"json": _nested("<image>", image="1.png"), "0.png": b"", "1.png": b""},
            r"image: `json` refers to the member 1\.png .* but not to 0\.png",
        ),
        ({"json": _nested("q"), "png": _png("red")}, "image: expected one '<image>' placeholder for each image, got 0 for 1"),
        ({"json": _nested("q"), "mp4": b"x"}, "mp4: the key refers to media but is not read"),
        ({"json": _nested("q", video="a.mp4")}, "video: the key refers to media but is not read"),
    ],
)
def test_ambiguous_media_in_a_shard_are_an_error(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    reader = SourceReader(Source(path=str(_shard(tmp_path, row)), template="llava"))
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


CATS = {"images": ["a.png"], "prompt": [user("<image>q")], "completion": [assistant("a cat")]}


@pytest.mark.parametrize(
    ("template", "rows", "trains", "images"),
    [
        ("messages", [{"messages": [user("q", images=["a.png"]), assistant("a cat")]}], ["a cat"], 1),
        (
            "messages",
            [
                {
                    "images": ["a.png", "b.png"],
                    "messages": [user([{"type": "image", "index": 1}, {"type": "image", "index": 0}]), assistant("b")],
                }
            ],
            ["b"],
            2,
        ),
        ("prompt_completion", [CATS], ["a cat"], 1),
        (
            "query_response",
            [{"images": ["a.png"], "query": "<image>q", "response": "b", "history": [["Hello", "Hi"]]}],
            ["Hi", "b"],
            1,
        ),
        ("classification", "image,label\na.png,cat\n", ["cat"], 1),
        ("llava", b"", ["a"], 1),
    ],
    ids=["images in a turn", "index", "prompt_completion", "query_response", "word labels", "shard"],
)
def test_common_row_formats_are_checked_and_shown(
    media: Path, base: Path, capsys: pytest.CaptureFixture[str], template: str, rows: Any, trains: list[str], images: int
) -> None:
    if isinstance(rows, bytes):
        path = _shard(media, {"json": _nested("<image>q"), "png": _png("red")})
    elif isinstance(rows, str):
        (path := media / "rows.csv").write_text(rows, encoding="utf-8")
    else:
        (path := media / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    data = {"train": [{"path": str(path), "template": template}]}
    (media / "recipe.yaml").write_text(json.dumps({"model": {"base": str(base)}, "data": data, "output_dir": "run"}))
    assert entry_point(["data", "check", str(media / "recipe.yaml")]) == 0
    capsys.readouterr()
    assert entry_point(["data", "show", "--json", str(media / "recipe.yaml")]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert "".join(token["text"] for token in tokens if token["kind"] == "supervised") == "".join(f"{a}<|end|>" for a in trains)
    assert sum(token["kind"] == "media" for token in tokens) == 16 * images


def test_an_invalid_json_file_is_rejected_by_every_command(media: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"train": [{"path": str(media / "rows.json"), "template": "llava"}]}
    (media / "recipe.yaml").write_text(json.dumps({"model": {"base": str(base)}, "data": data, "output_dir": str(media / "run")}))
    for text, message in (
        (b"this is not json", "rows.json:1: not valid JSON"),
        ("[]".encode("utf-16"), "rows.json: expected UTF-8 text, got UTF-16"),
    ):
        (media / "rows.json").write_bytes(text)
        for verb in (["data", "check"], ["data", "show"], ["plan"], ["train"]):
            assert entry_point([*verb, str(media / "recipe.yaml")]) == 2
            assert message in capsys.readouterr().err


def test_an_unread_media_key_is_reported_by_check_plan_and_train(mmtune: Callable[..., tuple[int, str]]) -> None:
    rows = [{"image": "a.png", "messages": [user("q"), assistant("a")]}]
    code, output = mmtune(["data", "check"], rows, {})
    assert code == 1 and "media_unread" in output and "0 notes" in output
    for verb in (["plan"], ["train"]):
        code, output = mmtune(verb, rows, {})
        assert (
            "rows.json[0]: image: the key refers to media but is not read; the template reads media in images, videos" in output
        ), verb
    assert code == 2 and "1 of 1 rows cannot train" in output
    assert mmtune(["data", "check"], rows, {"ignore": ["image"]})[0] == 0


def test_a_weight_is_seen_by_check_show_and_plan(mmtune: Callable[..., tuple[int, str]]) -> None:
    rows = [talk({"weight": 0}, {})]
    assert mmtune(["data", "check"], rows, {})[0] == 0
    _, output = mmtune(["data", "show", "--json"], rows, {})
    shown = [token["text"] for token in json.loads(output)["tokens"] if token["kind"] == "supervised"]
    assert "".join(shown) == "right<|end|>"
    _, output = mmtune(["plan"], rows, {})
    assert re.search(rf"supervised tokens │ +{len(shown)} ", output)


def test_a_last_answer_of_weight_0_can_train_and_cannot_be_evaluated(mmtune: Callable[..., tuple[int, str]], media: Path) -> None:
    rows = [talk({}, {"weight": 0})]
    assert mmtune(["data", "check"], rows, {})[0] == 0
    code, output = mmtune(["data", "check"], rows, {}, "data.supervise=last")
    assert code == 1 and "nothing_supervised" in output
    (media / "held_out.json").write_text(json.dumps(rows), encoding="utf-8")
    asked = {"data": [{"path": str(media / "held_out.json"), "template": "messages"}]}
    code, output = mmtune(["data", "check"], [talk({}, {})], {}, evaluate=asked)
    assert code == 1 and "reference_weight" in output
    code, output = mmtune(["train"], [talk({}, {})], {}, evaluate=asked)
    assert code == 2 and "1 of 1 rows cannot be evaluated:\n  held_out.json[0]: messages: the last answer has weight 0" in output
