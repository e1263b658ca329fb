"""`mmtune data show`: token texts equal transformers' decoding, and token kinds agree with the labels."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import family_processors as families
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_prompt, encode_sample
from mmtune.data.media.image_settings import ImageSettings
from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.templates.template import DataTemplate
from mmtune.data.validation.show_sample import (
    SampleView,
    escape_invisible,
    find_sample,
    print_sample,
    token_texts,
    view_sample,
)
from mmtune.recipe.recipe import DataSection, Recipe, Source
from mmtune.recipe.source_section import Augment
from mmtune.report.sample_page import write_page
from mmtune.utils.errors import UserError


def _section(**settings: Any) -> DataSection:
    return DataSection.model_validate({"train": [{"path": "r.json", "template": "llava"}], **settings})


def _sample(media: Path, *turns: str) -> Sample:
    """A conversation; what ends in .png is an image before the next turn's text."""
    messages: list[dict[str, Any]] = []
    content: list[dict[str, Any]] = []
    for turn in turns:
        if turn.endswith(".png"):
            content.append({"type": "image", "image": media / turn})
        else:
            role = "assistant" if len(messages) % 2 else "user"
            messages.append({"role": role, "content": [*content, {"type": "text", "text": turn}]})
            content = []
    return Sample("r.json[7]", messages)


HARD = "caf\u00e9 \u732b \U0001f431\u200d\u2b1b e\u0301 \ufffd <|im_end|> <image>"


def _printed(view: SampleView, **settings: Any) -> str:
    out = io.StringIO()
    print_sample(view, Console(file=out, width=80, **settings))
    return out.getvalue()


# --------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_tokens_are_those_that_train(media: Path, family: str) -> None:
    processor = families.FAMILIES[family]()
    sample = _sample(media, "a.png", "b.png", f"what? {HARD}", f"a cat. {HARD}", "sure?", "yes")
    view, encoded = view_sample(sample, processor, _section()), encode_sample(sample, processor)
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    assert [token.id for token in view.tokens] == ids
    assert [token.kind == "supervised" for token in view.tokens] == [label != IGNORE_INDEX for label in labels]
    texts = "".join(token.text for token in view.tokens)
    assert texts == processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    learnt = "".join(token.text for token in view.tokens if token.kind == "supervised")
    assert learnt == processor.tokenizer.decode(
        [label for label in labels if label != IGNORE_INDEX], clean_up_tokenization_spaces=False
    )
    media_ids = {token.id for token in view.tokens if token.kind == "media"}
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) in media_ids
    others = {token.id for token in view.tokens if token.kind != "media"}
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) not in others


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=24))
def test_texts_join_to_the_decoded_text(text: str) -> None:
    for tokenizer in (families.FAMILIES["qwen2_vl"]().tokenizer, families.FAMILIES["gemma3"]().tokenizer):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in texts)


@pytest.mark.parametrize("name", ["vicuna_v1", "gemma", "mistral", "chatml"])
def test_texts_of_other_tokenizers_keep_their_spaces(template_processors: dict[str, Any], name: str) -> None:
    tokenizer = template_processors[name].tokenizer
    ids = tokenizer("the cat  is on\n\nthe mat \u732b \U0001f431.", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "\u732b" in texts[-20:] or "\u732b" in "".join(texts)


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    tokenizer = families.FAMILIES["qwen2_vl"]().tokenizer
    ids = tokenizer("\U0001f431", add_special_tokens=False).input_ids
    assert len(ids) > 1  # the tokenizer has learnt no emoji
    assert token_texts(tokenizer, ids) == [*[""] * (len(ids) - 1), "\U0001f431"]
    assert token_texts(tokenizer, ids[:-1])[-1] == "\ufffd"  # cut short, it is what the decoder says
    written = tokenizer("\ufffda", add_special_tokens=False).input_ids
    assert token_texts(tokenizer, written)[-2:] == ["\ufffd", "a"]  # that character itself is whole


def test_the_recipe_says_what_is_supervised_and_what_a_long_row_becomes(media: Path, untrained: tuple[Any, Any]) -> None:
    processor = untrained[1]
    sample = _sample(media, "a.png", "one?", "1", "two?", "2")
    shown = view_sample(sample, processor, _section(supervise="last"))
    assert "".join(token.text for token in shown.tokens if token.kind == "supervised") == "2<|end|>"
    length = len(shown.tokens)
    fits = view_sample(sample, processor, _section(max_tokens=length))
    assert not fits.notes and len(fits.tokens) == length
    dropped = view_sample(sample, processor, _section(max_tokens=length - 1, over_length="drop_media"))
    assert dropped.notes == ["1 images dropped to fit data.max_tokens"]
    assert not any(token.kind == "media" for token in dropped.tokens)
    long = view_sample(sample, processor, _section(max_tokens=length - 1, over_length="drop_sample"))
    assert long.notes == [
        f"not used in training: {length} tokens, more than data.max_tokens: {length - 1} (data.over_length: drop_sample)"
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_rendered_prompt_equals_the_evaluation_prompt(media: Path, family: str) -> None:
    processor = families.FAMILIES[family]()
    sample = _sample(media, "what?", "a cat", "sure?", "yes")
    prompt = view_sample(sample, processor, _section()).prompt
    asked = encode_prompt(sample.id, sample.messages[:-1], processor)["input_ids"][0].tolist()
    assert processor.tokenizer(prompt, add_special_tokens=False).input_ids == asked
    assert prompt.count("cat") == 1 and "yes" not in prompt


# ------------------------------------------------------------------------------------------------------------- terminal


def test_token_kinds_are_distinguishable_without_colours(media: Path, untrained: tuple[Any, Any]) -> None:
    view = view_sample(_sample(media, "a.png", "what?\nwho?", "a cat"), untrained[1], _section())
    plain = _printed(view)
    lines = [line.rstrip() for line in plain.splitlines()]
    assert "\x1b" not in plain
    assert lines[0] == "r.json[7]"
    assert lines[1].startswith(f"{len(view.tokens)} tokens: 6 supervised, ") or "supervised" in lines[1]
    assert "     media | <image> x 16" in lines
    assert "supervised | a cat<|end|>" in lines
    assert any(line.startswith("    prompt | <|user|>") for line in lines)
    assert any("what?\u23ce" in line for line in lines) and any("who?<|end|><|assistant|>" in line for line in lines)
    coloured = _printed(view, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m" in coloured and re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_control_and_bidi_characters_in_text_are_escaped(media: Path, untrained: tuple[Any, Any]) -> None:
    view = view_sample(_sample(media, "\x1b[2Jgone \u202eback [red]x[/red] \x9b0m \0", "yes\r"), untrained[1], _section())
    shown = _printed(view)
    assert not set("\x1b\u202e\x9b\0\r") & set(shown)
    assert all(escape in shown for escape in ("\\x1b[2Jgone", "\\u202e", "[red]x[/red]", "\\x9b", "\\x00", "yes\\r"))
    assert escape_invisible("tab\there\nline \u00e9\u732b") == "tab\\there\nline \u00e9\u732b"


# ----------------------------------------------------------------------------------------------------------------- page


class _Page(HTMLParser):
    """What a page holds: every tag with its attributes, and the words of the tokens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.style = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        classes = (dict(attrs).get("class") or "").split()
        if "token" in classes:
            self.tokens.append((str(dict(attrs)["title"]), classes[-1], ""))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        elif self.tokens and self._open and self._open[-1] == "span":
            ids, kind, text = self.tokens[-1]
            self.tokens[-1] = (ids, kind, text + data)


def test_the_page_has_every_token_and_image_and_no_scripts(tmp_path: Path, media: Path) -> None:
    processor = families.FAMILIES["qwen2_5_vl"]()
    evil = "</span><script>alert(1)</script>\"'&amp; \U0001f431"
    view = view_sample(_sample(media, "a.png", "b.png", evil, f"{evil} yes"), processor, _section())
    write_page(view, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page(text)
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names and names.count("img") == 2
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("style", "href") for name in attributes)
    policy = next(dict(each)["content"] for tag, each in page.tags if tag == "meta" and "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"

    ids = [number for ids, kind, _ in page.tokens if kind != "media" for number in ids.split()]
    assert ids == [str(token.id) for token in view.tokens if token.kind != "media"]
    shown = "".join(words for _, kind, words in page.tokens if kind == "supervised")
    assert shown == "".join(token.text for token in view.tokens if token.kind == "supervised")
    assert all(words for *_, words in page.tokens)

    pictures = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in pictures]
    assert sizes == [(40, 24), (24, 40)]


def test_a_large_picture_is_scaled_down_and_a_broken_one_named(tmp_path: Path, media: Path, untrained: tuple[Any, Any]) -> None:
    Image.effect_noise((1600, 900), 40).save(media / "large.png")
    whole = (media / "a.png").read_bytes()
    (media / "cut.png").write_bytes(whole[:60])
    view = view_sample(_sample(media, "large.png", "cut.png", "what?", "noise"), untrained[1], _section())
    write_page(view, tmp_path / "page.html")
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    [source] = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (640, 360)
    assert "cannot decode" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        write_page(view, tmp_path / "no" / "page.html")


def test_declared_regions_are_drawn_on_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only on their outlines, on the row's own image, which is scaled down and flipped."""
    Image.new("RGB", (1280, 960), "white").save(tmp_path / "a.png")
    text = "{{ box | native }} {{ box | thousandths }}"
    turns = [{"role": "user", "images": ["{{ image }}"], "text": "where?"}, {"role": "assistant", "text": text}]
    sections = {"boxes": {"value": "{{ bbox }}", "layout": "xyxy"}, "points": {"value": "{{ [640, 240] }}"}}
    template = DataTemplate.model_validate({"description": "d", "messages": turns, **sections, "example": {}})
    row = {"image": "a.png", "bbox": [[128, 96, 384, 576], [0, 0, 64, 64]]}
    sample = template.sample("r", row, MediaRules(tmp_path), settings=ImageSettings(augment=Augment(flip=1)))
    view = view_sample(sample, families.FAMILIES["qwen2_5_vl"](), _section())
    write_page(view, tmp_path / "page.html")
    page = _Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "1280 x 960 pixels, 2 boxes drawn, 1 point drawn" in (tmp_path / "page.html").read_text(encoding="utf-8")
    [source] = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("L")).astype(int)
    assert image.shape == (480, 640)
    dark = image < 180
    assert dark[100, 446:450].any() and dark[100, 574:578].any()  # the left and the right side of the mirrored box
    assert dark[46:50, 500].any() and dark[285:290, 500].any() and dark[115:126, 314:327].any()
    assert not dark[60:280, 455:570].any() and dark.mean() < 0.02
    print_sample(view)
    assert "box [896, 96, 1152, 576], in pixels of 1280 x 960" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> str:
    make_recipe()
    return str(tmp_path / "recipe.yaml")


def test_the_command_gives_a_row_as_json(recipe_file: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["data", "show", recipe_file, "--row", "rows.json[3]", "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert list(view) == ["row", "tokens"] and view["row"] == "rows.json[3]"
    assert all(list(token) == ["id", "text", "kind"] for token in view["tokens"])
    answer = json.loads(rows.read_text(encoding="utf-8"))[3]["conversations"][-1]["value"]
    assert "".join(token["text"] for token in view["tokens"] if token["kind"] == "supervised") == answer + "<|end|>"
    assert entry_point(["data", "show", recipe_file, "--index", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == view


def test_the_command_prints_a_row_or_its_prompt_or_writes_a_page(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry_point(["data", "show", recipe_file]) == 0
    assert "supervised | " in capsys.readouterr().out
    assert entry_point(["data", "show", recipe_file, "--prompt"]) == 0
    assert re.fullmatch(r"<\|user\|><image>\n.*<\|end\|><\|assistant\|>\n", capsys.readouterr().out)
    assert entry_point(["data", "show", recipe_file, "--html", str(tmp_path / "page.html")]) == 0
    assert "<!doctype html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_missing_row_is_an_error(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--row", "rows.json[99]"], "no row has the id 'rows.json[99]'; expected an id such as 'rows.json[11]'"),
        (["--index", "12"], "--index 12: expected 0 to 11: there are 12 training rows"),
    ):
        assert entry_point(["data", "show", recipe_file, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_row_is_found_in_every_source(tmp_path: Path) -> None:
    lines = [json.dumps({"conversations": [{"from": "human", "value": str(n)}, {"from": "gpt", "value": "x"}]}) for n in range(5)]
    (tmp_path / "one.jsonl").write_text("\n\n".join([*lines[:2], "not JSON", *lines[2:]]) + "\n")
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    sources = [Source(path=str(tmp_path / name), template="llava") for name in ("one.jsonl", "two.jsonl")]
    for row_id, text in (("one.jsonl:1", "0"), ("one.jsonl:3", "1"), ("one.jsonl:11", "4"), ("two.jsonl:5", "4")):
        sample = find_sample(sources[:1], sources[1:], row_id)
        assert (sample.id, sample.messages[0]["content"][0]["text"]) == (row_id, text)
    with pytest.raises(RowError, match=r"one\.jsonl:5: row: not valid JSON"):
        find_sample(sources[:1], sources[1:], "one.jsonl:5")
    with pytest.raises(UserError, match="no row has the id"):
        find_sample(sources[:1], sources[1:], "two.jsonl:6")


def test_a_row_is_found_by_its_own_id(tmp_path: Path) -> None:
    def row(text: str, **ids: Any) -> str:
        return json.dumps({**ids, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]})

    lines = [row("a", id=7), row("b", id="8"), row("c", question_id="x/9"), row("d", id="twice"), row("e", id="twice"), row("f")]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    source = Source(path=str(tmp_path / "r.jsonl"), template="llava")
    for row_id, text in (("7", "a"), ("8", "b"), ("x/9", "c"), ("r.jsonl:6", "f")):
        assert text_of(find_sample([source], [], row_id).messages[0]) == text
    with pytest.raises(
        UserError, match=r"2 rows have 'twice' in their id field; choose one of the row ids r\.jsonl:4, r\.jsonl:5"
    ):
        find_sample([source], [], "twice")
    with pytest.raises(UserError, match="no row has the id 'None'"):
        find_sample([source], [], "None")


def test_a_row_is_shown_as_a_run_makes_it(tmp_path: Path) -> None:
    """Held-out rows of the same file name do not change the ids of those that train, and with them what is drawn for each."""
    row = {"question": "q", "choices": ["x", "y", "z"], "correct_choice_idx": 1, "image": "a.png", "question_id": "1"}
    for folder in ("train", "held_out"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
        lines = [json.dumps({**row, "question": f"{folder} {number}"}) for number in range(8)]
        (tmp_path / folder / "rows.jsonl").write_text("\n".join(lines))
    template = {
        "description": "d",
        "messages": [
            {"role": "user", "images": ["{{ image }}"], "text": ["ONE {{ question }}", "TWO {{ question }}"]},
            {"role": "assistant", "text": "yes"},
        ],
        "example": row,
    }
    (tmp_path / "t.yaml").write_text(json.dumps(template))
    paths = (tmp_path / folder / "rows.jsonl" for folder in ("train", "held_out"))
    train, held_out = (Source(path=str(path), template=str(tmp_path / "t.yaml")) for path in paths)
    trained = list(IndexedSamples([train]))
    assert {text_of(sample.messages[0])[:3] for sample in trained} == {"ONE", "TWO"}
    for sample in trained:
        assert find_sample([train], [held_out], sample.id) == sample
