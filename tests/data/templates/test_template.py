"""Data templates: rows of every format become the same messages, or an error that names the row and the field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.data.media.media import MediaRules, image_size
from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.templates.template import DataTemplate, load_data_template
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError
from mmtune.utils.shipped import shipped_dir


def _said(sample: Sample, root: Path) -> list[tuple[str, list[str]]]:
    """Each turn's role and blocks, an image as `<its path below the root>`."""
    return [
        (
            message["role"],
            [
                block["text"] if block["type"] == "text" else f"<{Path(block['image']).relative_to(root.resolve())}>"
                for block in message["content"]
            ],
        )
        for message in sample.messages
    ]


def _llava(*turns: tuple[str, Any], image: Any = None) -> dict[str, Any]:
    row: dict[str, Any] = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    return row if image is None else {**row, "image": image}


def _read(name: str, row: dict[str, Any], root: Path) -> list[tuple[str, list[str]]]:
    return _said(load_data_template(name).sample("r[0]", row, MediaRules(root)), root)


@pytest.mark.parametrize(
    ("text", "image", "blocks"),
    [
        ("no image", None, ["no image"]),
        ("no image", "", ["no image"]),
        ("no image", [], ["no image"]),
        ("<image>", "a.png", ["<a.png>"]),
        ("<image>\nwhat?", "a.png", ["<a.png>", "what?"]),
        ("what?\n<image>", ["a.png"], ["what?", "<a.png>"]),
        ("first <image> then <image>?", ["a.png", "b.png"], ["first ", "<a.png>", " then ", "<b.png>", "?"]),
        ("<image><image>\n\nwhich?", ["b.png", "b.png"], ["<b.png>", "<b.png>", "\nwhich?"]),
        ("<Image> <image>", ["a.png"], ["<Image> ", "<a.png>"]),
    ],
)
def test_images_are_placed_at_the_placeholders(media: Path, text: str, image: Any, blocks: list[str]) -> None:
    row = _llava(("human", text), ("gpt", "x"), image=image)
    assert _read("llava", row, media) == [("user", blocks), ("assistant", ["x"])]


def test_images_of_several_turns_are_used_in_order(media: Path) -> None:
    row = _llava(("human", "<image>\n1?"), ("gpt", "one"), ("human", "2? <image>"), ("gpt", "two"), image=["b.png", "a.png"])
    assert [blocks for role, blocks in _read("llava", row, media) if role == "user"] == [["<b.png>", "1?"], ["2? ", "<a.png>"]]


def test_an_absolute_path_serves_below_the_root(media: Path) -> None:
    row = _llava(("human", "<image>"), ("gpt", "x"), image=str(media / "a.png"))
    assert _read("llava", row, media)[0] == ("user", ["<a.png>"])


@pytest.mark.parametrize(
    ("blocks", "images", "expected"),
    [
        ([{"type": "image"}, {"type": "text", "text": "?"}], ["a.png"], ["<a.png>", "?"]),
        ([{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}], None, ["<b.png>", "?"]),
        ([{"type": "image", "path": "b.png"}, {"type": "image", "url": "a.png"}], None, ["<b.png>", "<a.png>"]),
        ([{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "a.png"}}], None, ["?", "<a.png>"]),
        ([{"type": "image", "image": "b.png"}, {"type": "image"}], ["a.png"], ["<b.png>", "<a.png>"]),
        ("look: <image>", ["a.png"], ["look: ", "<a.png>"]),
    ],
)
def test_blocks_of_messages(media: Path, blocks: Any, images: Any, expected: list[str]) -> None:
    row = {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": "x"}], "images": images}
    assert _read("messages", row, media)[0] == ("user", expected)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            _llava(("human", "<image> <image>"), ("gpt", "x"), image="a.png"),
            "image",
            "expected one '<image>' placeholder for each image, got 2 for 1",
        ),
        (
            _llava(("human", "what?"), ("gpt", "x"), image="a.png"),
            "image",
            "expected one '<image>' placeholder for each image, got 0 for 1",
        ),
        (_llava(("human", "<image>"), ("gpt", "x")), "image", "expected one '<image>' placeholder for each image, got 1 for 0"),
        (_llava(("human", "q"), ("gpt", "<image>"), image="a.png"), "image", "placeholder for each image, got 0 for 1"),
        (_llava(("human", "<image>"), ("gpt", "x"), image="none.png"), "image", "no such file: .*none.png"),
        (_llava(("human", "<image>"), ("gpt", "x"), image="../outside.png"), "image", "is outside media_root"),
        (_llava(("human", "<image>"), ("gpt", "x"), image="link.png"), "image", "is outside media_root"),
        (_llava(("human", "<image>"), ("gpt", "x"), image="/etc/passwd"), "image", "is outside media_root"),
        (_llava(("human", "<image>"), ("gpt", "x"), image=3), "image", "expected the path of an image or its bytes, got int"),
        (_llava(("human", "<image>"), ("gpt", "x"), image=[None]), "image", "got NoneType"),
        (_llava(("human", "<image>"), ("gpt", "x"), image={"bytes": "AAAA"}), "image", "expected bytes in 'bytes', got str"),
        (_llava(("human", "q"), ("gpt", "")), "messages[1]", "the answer is empty"),
        (_llava(("human", "q"), ("gpt", " \n")), "messages[1]", "the answer is empty"),
        (
            _llava(("human", "q"), ("gpt", "x"), ("human", "q")),
            "messages",
            "expected an answer as the last turn, got a turn of the user",
        ),
        (_llava(("human", "q")), "messages", "expected an answer as the last turn"),
        (_llava(("gpt", "x"), ("human", "q")), "messages", "turns that alternate .* got assistant, user"),
        (_llava(("human", "q"), ("human", "q"), ("gpt", "x")), "messages", "got user, user, assistant"),
        (
            _llava(("human", "q"), ("system", "s"), ("gpt", "x")),
            "messages",
            "expected a system message only as the first message",
        ),
        (_llava(("system", "s")), "messages", "got none"),
        (_llava(("humen", "q"), ("gpt", "x")), "conversations[0].from", "unknown role 'humen'; did you mean 'human'?"),
        (_llava(("human", "q"), ("bot", "x")), "conversations[1].from", "valid here: gpt, human, system"),
        (_llava((["human"], "q"), ("gpt", "x")), "conversations[0].from", "unknown role"),  # type: ignore[arg-type]
        (_llava(("human", "q"), ("gpt", None)), "conversations[1].value", "expected text, got NoneType"),
        (_llava(("human", 5), ("gpt", "x")), "conversations[0].value", "expected text, got int"),
        ({"conversations": []}, "conversations", "expected a list of turns$"),
        ({"conversations": "hello"}, "conversations", "expected a list of turns$"),
        ({"conversation": []}, "conversations", "did you mean 'conversation'?"),
        ({"conversations": ["hello"]}, "conversations[0]", "expected an object with 'from' and 'value'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]", "expected an object with 'from' and 'value'"),
    ],
)
def test_a_faulty_row_is_named_with_its_field(media: Path, row: dict[str, Any], field: str, reason: str) -> None:
    (media / "link.png").symlink_to(media.parent / "outside.png")
    with pytest.raises(RowError, match=reason) as caught:
        load_data_template("llava").sample("r.json[7]", row, MediaRules(media))
    assert caught.value.row == "r.json[7]" and caught.value.field == field
    assert str(caught.value).startswith(f"r.json[7]: {field}: ")


@pytest.mark.parametrize(
    ("user", "assistant", "images", "reason"),
    [
        ([{"type": "tool"}], "x", None, r"messages\[0\].content\[0\]: expected a text, image, video or audio block, got"),
        (["text"], "x", None, r"content\[0\]: expected a text, image, video or audio block"),
        ([{"type": "text", "text": None}], "x", None, "expected a text, image, video or audio block"),
        ([{"type": "audio"}], "x", None, "audios: expected one '<audio>' placeholder for each audio, got 1 for 0"),
        ([{"type": "video", "video": "none.mp4"}], "x", None, "no such file"),
        ([{"type": "image"}], "x", None, "placeholder for each image, got 1 for 0"),
        ([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}], "x", None, "is a URL"),
        ([{"type": "image_url", "image_url": {}}], "x", None, "expected a URL in the block 'image_url', got none"),
        ("q", [{"type": "text", "text": "x"}, {"type": "image"}], ["a.png"], "expected only text in an answer, got an image"),
        ("q", [], None, "the answer is empty"),
    ],
)
def test_a_faulty_block_is_named(media: Path, user: Any, assistant: Any, images: Any, reason: str) -> None:
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], "images": images}
    with pytest.raises(RowError, match=reason):
        load_data_template("messages").sample("r", row, MediaRules(media))


VQA = {"image": "a.png", "question": "q", "answer": "x"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png", "question": "q"}, r"messages\[1\]: 'answer' is undefined; the row has: image, question"),
        ({**VQA, "answer": None}, r"messages\[1\]: expected text or a number, got null"),
        ({**VQA, "answer": ["x"]}, r"messages\[1\]: expected text or a number, got list"),
        ({**VQA, "answer": ""}, r"messages\[1\]: the answer is empty"),
        ({**VQA, "image": "none.png"}, "image: no such file"),
        ({**VQA, "image": None}, r"messages\[0\]: expected the path of an image or its bytes, got NoneType"),
        ({**VQA, "question": float("nan")}, r"messages\[0\]: expected text or a finite number, got nan"),
        ({**VQA, "answer": True}, r"messages\[1\]: expected text or a number, got true"),
        ({**VQA, "question": b"q"}, r"messages\[0\]: expected text or a number, got bytes"),
        ({**VQA, "image": "../outside.png"}, "image: .*is outside media_root"),
    ],
)
def test_columns_that_are_missing_are_named(media: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        load_data_template("vqa").sample("r", row, MediaRules(media))


def test_a_row_within_a_row_names_its_task(media: Path) -> None:
    template = _columns("q").model_copy(update={"task": "a.b"})
    for row, task in [({"a": {"b": 7}}, "7"), ({"a": {}}, None), ({"a": 1}, None), ({}, None)]:
        assert template.sample("r", row, MediaRules(media)).task == task
    with pytest.raises(RowError, match=r"^r: a\.b: expected a text or a number, got list"):
        template.sample("r", {"a": {"b": []}}, MediaRules(media))


def test_a_list_of_images_is_as_many_images(media: Path) -> None:
    turns = [{"role": "user", "images": ["{{ pictures }}", "b.png"], "text": "?"}, {"role": "assistant", "text": "x"}]
    template = DataTemplate.model_validate({"description": "d", "messages": turns, "example": {}})
    for pictures, blocks in [([], ["<b.png>", "?"]), (["b.png", "a.png"], ["<b.png>", "<a.png>", "<b.png>", "?"])]:
        assert _said(template.sample("r", {"pictures": pictures}, MediaRules(media)), media)[0] == ("user", blocks)
    inside = {"bytes": (media / "a.png").read_bytes(), "path": None}
    [image, _] = template.sample("r", {"pictures": inside}, MediaRules(media)).images
    assert image_size(image) == (40, 24)
    with pytest.raises(RowError, match=r"^r: messages\[0\]: 'pictures' is undefined; the row has: no columns"):
        template.sample("r", {}, MediaRules(media))


def _repeated(**row: Any) -> list[tuple[str, list[str]]]:
    turns = [
        {"role": "system", "text": "s"},
        {"role": "user", "text": "{{ title }}: {{ q }}"},
        {"role": "assistant", "text": "{{ a.text }}"},
    ]
    template = {"description": "d", "messages": turns, "repeat": {"q": "questions", "a": "answers"}, "example": {}}
    return _said(DataTemplate.model_validate(template).sample("r", row, MediaRules(Path())), Path())


def test_turns_repeat_over_lists() -> None:
    row = {"title": "t", "questions": ["1?", 2], "answers": [{"text": "one"}, {"text": "two"}]}
    expected = [("system", ["s"]), ("user", ["t: 1?"]), ("assistant", ["one"]), ("user", ["t: 2"]), ("assistant", ["two"])]
    assert _repeated(**row) == expected
    with pytest.raises(RowError, match=r"^r: questions: expected lists of equal length, got 2 questions, 1 answers"):
        _repeated(**{**row, "answers": [{"text": "one"}]})
    with pytest.raises(RowError, match=r"^r: answers: expected a non-empty list; did you mean 'answer'\?"):
        _repeated(title="t", questions=["1?"], answer=[])
    with pytest.raises(RowError, match=r"^r: questions: expected a non-empty list$"):
        _repeated(**{**row, "questions": "no list"})


def test_a_number_becomes_text_and_jinja_in_a_row_is_not_rendered(media: Path) -> None:
    row = {**VQA, "question": "{{ answer }} <b>&", "answer": 2}
    assert _read("vqa", row, media) == [
        ("user", ["<a.png>", "{{ answer }} <b>&\nAnswer the question using a single word or phrase."]),
        ("assistant", ["2"]),
    ]


def _columns(text: str) -> DataTemplate:
    turns = [{"role": "user", "text": text}, {"role": "assistant", "text": "x"}]
    return DataTemplate.model_validate({"description": "d", "messages": turns, "example": {}})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ a.__class__ }}",
        "{{ a|attr('__class__') }}",
        "{{ ().__class__.__bases__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__}'.format(a) }}",
        "{{ a.append(1) }}",
        "{{ range(10**9)|list }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"^r: messages\[0\]: "):
        _columns(source).sample("r", {"a": [1]}, MediaRules(tmp_path))


@pytest.mark.parametrize(
    "source", ["{{ a + 1 }}", "{{ 1 / 0 }}", "{{ a | int + none }}", "{{ '%d' % a }}", "{{ b }}", "{{ a | dictsort }}"]
)
def test_a_template_that_fails_on_a_row_names_it(source: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"^r: messages\[0\]: .*the row has: a$"):
        _columns(source).sample("r", {"a": "text"}, MediaRules(tmp_path))


OWN = """
description: mine
conversation: {field: chat, role: who, text: says, roles: {me: user, you: assistant}}
images: pictures
placeholder: "[img]"
example: {}
"""


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


def test_a_custom_template_is_read_by_path(media: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN, encoding="utf-8")
    row = {"chat": [{"who": "me", "says": "[img]<image>"}, {"who": "you", "says": "x"}], "pictures": ["a.png"]}
    assert _read(str(tmp_path / "mine.yaml"), row, media) == [("user", ["<a.png>", "<image>"]), ("assistant", ["x"])]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (OWN + "imagse: x", r"imagse: unknown key; did you mean 'images'\?"),
        (OWN + "messages: [{role: user, text: x}]", "data template: set exactly one of 'conversation' and 'messages'"),
        ("description: d\nexample: {}", "exactly one of 'conversation' and 'messages'"),
        (OWN.replace("you: assistant", "you: bot"), "unknown role 'bot'; expected one of system, user, assistant"),
        ("description: d\nexample: {}\nmessages: [{role: tool, text: x}]", "unknown role 'tool'"),
        (OWN + "repeat: {a: b}", "'repeat' cannot be used with 'conversation'"),
        (OWN + "join: {by: a}", "'join' cannot be used with 'conversation'"),
        ("description: d\nexample: {}\nimages: a\nmessages: [{role: user, text: x}]", "'images' cannot be used with 'messages'"),
        ("description: d\nexample: {}\nmessages: [{role: user, text: []}]", "messages.0.text: "),
        ("description: d\nexample: {}\nmessages: [{role: user, images: ['{{'], text: x}]", "not valid Jinja at line 1: "),
        ("description: d\nexample: {}\nreferences: '{{ x'\nmessages: [{role: user, text: x}]", "not valid Jinja at line 1: "),
        ("description: d\nexample: {}\nboxes: {value: x, layout: yx}\nmessages: [{role: user, text: x}]", "boxes.layout: "),
        (
            "description: d\nexample: {}\njoin: {by: a}\nmessages: [{role: user, text: x}]",
            "needs the joined row in its example, under 'joined'",
        ),
        (
            "description: d\nexample: {}\nmessages: [{role: user, text: x}]\n"
            "options: {choices: a, answer: b}\nverbalizer: {label: a}",
            "set only one of 'options' and 'verbalizer'",
        ),
        ("description: d\nexample: {}\nmessages: [{role: user, text: '{{ x'}]", "not valid Jinja at line 1: .*{{ x"),
        (OWN.replace("description: mine", ""), "description: required key is missing"),
        ("a: [", "not valid YAML"),
        ("", "mine.yaml:1: the data template is empty"),
        ("- a", "mine.yaml:1: expected a mapping with description"),
        (b"description: \xff\xfe\xff", "not UTF-8 text"),
        (
            OWN + "values: {a: " + "9" * 100_000 + "}",
            r"mine\.yaml:7: values\.a: expected a number of at most 1,000 characters",
        ),
        (OWN + "values: {a: " + "[" * 5000, r"mine\.yaml:7: not valid YAML: nested more than 50 levels deep"),
        (
            OWN + "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
            "expected at most 100,000 values",
        ),
        (OWN + "images: more", r"mine\.yaml:7: images: key given twice; first on line 4"),
        (OWN.replace("{}", "\n  when: 2024-99-99\n  1: x"), r"mine\.yaml:8: example: a key must be text, got 1"),
    ],
)
def test_a_bad_template_is_rejected(tmp_path: Path, text: str | bytes, reason: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=reason) as caught:
        load_data_template(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lava", "did you mean 'llava'?"),
        ("zzz", "valid here: alpaca, aokvqa"),
        ("none.yaml", "no such data template: none.yaml"),
    ],
)
def test_a_template_that_is_not_there(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason.replace("?", r"\?")):
        load_data_template(name)


PIECE = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<image>" not in text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pieces=st.lists(PIECE, min_size=1, max_size=5), answer=PIECE.filter(str.strip))
def test_text_around_placeholders_is_kept(pieces: list[str], answer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every character comes back, but for one line break on each side of a placeholder."""
    root = tmp_path_factory.getbasetemp()
    (root / "p.png").touch()
    text = "<image>".join(pieces)
    if text.count("<image>") != len(pieces) - 1:
        return  # two pieces spell one more
    row = _llava(("human", text), ("gpt", answer), image=["p.png"] * (len(pieces) - 1))
    messages = load_data_template("llava").sample("r", row, MediaRules(root)).messages
    read_text = "".join(block.get("text", "<image>") for block in messages[0]["content"])
    last = len(pieces) - 1
    trimmed = [piece.removeprefix("\n") if number else piece for number, piece in enumerate(pieces)]
    trimmed = [piece.removesuffix("\n") if number < last else piece for number, piece in enumerate(trimmed)]
    assert read_text == "<image>".join(trimmed)
    assert text_of(messages[1]) == answer
    plain = load_data_template("llava").sample("r", _llava(("human", pieces[0]), ("gpt", answer)), MediaRules(root))
    assert text_of(plain.messages[0]) == pieces[0]


PAGE = (Path(__file__).parents[3] / "docs" / "data_templates.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.mark.parametrize("block", [block for block in BLOCKS if "example" in block], ids=lambda block: block["description"])
def test_the_templates_on_the_page_read_their_examples(block: dict[str, Any], media: Path) -> None:
    template = DataTemplate.model_validate(block)
    sample = template.sample("r", template.example, MediaRules(media))
    assert [image.name for image in sample.images if isinstance(image, Path)] == ["a.png"]
    assert text_of(sample.messages[-1]) in ("A cat.", "2")


def test_the_page_names_every_template_and_every_key() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert {file.stem for file in shipped_dir("data_templates").glob("*.yaml")} <= named
    of_sources = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## What a source adds")[2], flags=re.MULTILINE)
    assert len(of_sources) == 9 and set(of_sources) <= set(Source.model_fields)
    keys = set(re.findall(r"^(\w+):|^\| `(\w+): ", PAGE, flags=re.MULTILINE))
    names = {name for pair in keys for name in pair if name} | {"videos", "audio"}  # described next to `images`
    assert set(DataTemplate.model_fields) <= names
