"""Prompt settings: seeded choices of phrasings, options and examples; verbalized labels; joined and selected rows."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from PIL import Image

from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.sources.reader import SourceReader
from mmtune.data.templates.prompts import PromptSettings, draw, shuffled
from mmtune.data.templates.template import DataTemplate
from mmtune.recipe.recipe import Source, load_recipe, recipe_schema
from mmtune.utils.errors import UserError

RULES = MediaRules(Path())


def _template(user: Any, assistant: Any = "x", **parts: Any) -> DataTemplate:
    turns = [{"role": "user", "text": user}, {"role": "assistant", "text": assistant}]
    return DataTemplate.model_validate({"description": "d", "messages": turns, "example": {}, **parts})


def _texts(sample: Sample) -> list[str]:
    return [text_of(message) for message in sample.messages]


def test_a_draw_is_the_hash_of_its_names() -> None:
    digest = hashlib.blake2b(b"7\x1frows.json[3]\x1fphrasing", digest_size=8).hexdigest()
    assert draw(7, "rows.json[3]", "phrasing") == (int(digest, 16) >> 11) / 2**53
    assert all(0 <= draw(seed, "r") < 1 for seed in range(200))
    draw(0, "\ud800")  # a file name that is no UTF-8


def test_a_draw_is_the_same_in_another_process() -> None:
    code = "from mmtune.data.templates.prompts import draw, shuffled; print(draw(1, 'a'), shuffled(range(9), 1, 'a'))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}
    )
    assert process.stdout == f"{draw(1, 'a')} {shuffled(range(9), 1, 'a')}\n"


def test_every_phrasing_is_drawn_about_as_often_and_by_the_row_alone() -> None:
    template = _template(["a {{ n }}", "b {{ n }}", "c {{ n }}"], ["1", "2", "3"])
    first = [_texts(template.sample(f"r[{n}]", {"n": n}, RULES)) for n in range(600)]
    again = [_texts(template.sample(f"r[{n}]", {"n": n}, RULES)) for n in reversed(range(600))]
    assert again[::-1] == first
    counts = Counter(question[0] for question, _ in first)
    assert set(counts) == set("abc") and min(counts.values()) > 150  # 200 expected, with a deviation of 12
    # Phrasings of equal number go together.
    assert {question[0]: answer for question, answer in first} == {"a": "1", "b": "2", "c": "3"}
    other = [_texts(template.sample(f"r[{n}]", {"n": n}, RULES, PromptSettings(seed=1))) for n in range(600)]
    assert other != first


def test_picking_and_the_commonest() -> None:
    template = _template("{{ many | pick }}", "{{ many | commonest }}")
    rows = [template.sample(f"r[{n}]", {"many": ["b", "a", "a", "b", "c"]}, RULES) for n in range(60)]
    assert {_texts(row)[0] for row in rows} == {"a", "b", "c"}
    assert {_texts(row)[1] for row in rows} == {"b"}
    for row in ({"many": []}, {"many": 3}, {"many": None}):
        with pytest.raises(RowError, match=r"^r: messages\[0\]: "):
            template.sample("r", row, RULES)


def test_a_system_message_is_for_rows_without_one() -> None:
    assert _texts(_template("q").sample("r", {}, RULES, PromptSettings(system="s"))) == ["s", "q", "x"]
    turns = [{"role": "system", "text": "own"}, {"role": "user", "text": "q"}, {"role": "assistant", "text": "x"}]
    own = DataTemplate.model_validate({"description": "d", "messages": turns, "example": {}})
    assert _texts(own.sample("r", {}, RULES, PromptSettings(system="s"))) == ["own", "q", "x"]


OPTIONS = {"choices": "{{ choices }}", "answer": "{{ right }}"}


def test_options_keep_their_answer_in_any_order() -> None:
    template = _template("{{ options }}", "{{ letter }}: {{ option }}", options=OPTIONS)
    row = {"choices": ["ant", "bee", 3, "dog"], "right": 1}
    plain = template.sample("r", row, RULES)
    assert _texts(plain) == ["A. ant\nB. bee\nC. 3\nD. dog", "B: bee"]
    assert plain.choices == ("A: ant", "B: bee", "C: 3", "D: dog")
    orders = set()
    letters: Counter[str] = Counter()
    for number in range(400):
        sample = template.sample(f"r[{number}]", row, RULES, PromptSettings(shuffle_options=True))
        lines, answer = _texts(sample)
        shown = dict(line.split(". ") for line in lines.splitlines())
        assert list(shown) == list("ABCD") and sorted(shown.values()) == ["3", "ant", "bee", "dog"]
        letter, option = answer.split(": ")
        assert option == "bee" == shown[letter]
        assert sample.choices == tuple(f"{name}: {text}" for name, text in shown.items())
        orders.add(lines)
        letters[letter] += 1
    assert len(orders) == 24 and min(letters.values()) > 60  # 100 expected, with a deviation of 9


@pytest.mark.parametrize(
    ("choices", "right", "field", "reason"),
    [
        (["a"], 0, "choices", r"a list of 2 to 26 options, got \['a'\]"),
        ("ab", 0, "choices", "got 'ab'"),
        (["a"] * 27, 0, "choices", "2 to 26"),
        (["a", None], 0, "choices", "expected text or a number, got null"),
        (["a", "b"], 2, "answer", "the correct option, 0 to 1, got 2"),
        (["a", "b"], -1, "answer", "got -1"),
        (["a", "b"], "1", "answer", "got '1'"),
        (["a", "b"], True, "answer", "got True"),
        (["a", "b"], None, "answer", "got None"),
    ],
)
def test_invalid_options_are_errors(choices: Any, right: Any, field: str, reason: str) -> None:
    template = _template("{{ options }}", "{{ letter }}", options=OPTIONS)
    with pytest.raises(RowError, match=rf"^r: options\.{field}: .*{reason}"):
        template.sample("r", {"choices": choices, "right": right}, RULES)


def test_options_can_be_optional_and_written_in_other_lines() -> None:
    options = {"choices": "{{ choices | parse_list }}", "answer": "{{ right }}", "line": "({letter}) {option}", "optional": True}
    template = _template("{{ options if closed else 'Why?' }}", "{{ letter if closed else 'So.' }}", options=options)
    closed = template.sample("r", {"choices": "['{letter}', \"it's\"]", "right": 1, "closed": True}, RULES)
    assert (_texts(closed), closed.options) == (["(A) {letter}\n(B) it's", "B"], ("{letter}", "it's"))
    opened = template.sample("r", {"choices": "[]", "right": None, "closed": False}, RULES)
    assert (_texts(opened), opened.options, opened.choices) == (["Why?", "So."], (), ())
    for choices in ("a, b", "[a]", "{}", "", "9" * 5000, "[" * 500, 3, None):
        with pytest.raises(RowError, match=r"^r: options\.choices: "):
            template.sample("r", {"choices": choices, "right": 0, "closed": True}, RULES)
    for line in ("{letter}", "{option}", "{letter} {option} {option}"):
        with pytest.raises(ValueError, match=r"\{letter\} and \{option\} once each"):
            _template("q", "a", options={**OPTIONS, "line": line})


def test_numbered_images_stand_where_the_text_names_them(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    turns = [
        {"role": "user", "images": ["{{ images }}"], "numbered": "<image {number}>", "text": "{{ text }}"},
        {"role": "assistant", "text": "x"},
    ]
    template = DataTemplate.model_validate({"description": "d", "messages": turns, "example": {}})

    def blocks(text: str) -> list[str]:
        row = {"images": ["a.png", "b.png", "c.png"], "text": text}
        content = template.sample("r", row, MediaRules(tmp_path)).messages[0]["content"]
        return [block["text"] if block["type"] == "text" else block["image"].stem for block in content]

    assert blocks("Is <image 3> in <image 1>?") == ["b", "Is ", "c", " in ", "a", "?"]
    assert blocks("<image 2><image 2>") == ["a", "c", "b", "b"]
    assert blocks("<image 12 > image 1") == ["a", "b", "c", "<image 12 > image 1"]
    for number in (0, 4):
        with pytest.raises(RowError, match=rf"the text names image {number}; expected 1 to 3"):
            blocks(f"<image {number}>")
    turns[0]["numbered"] = "<image>"
    with pytest.raises(ValueError, match="once"):
        DataTemplate.model_validate({"description": "d", "messages": turns, "example": {}})


def test_a_task_can_be_written_in_jinja() -> None:
    template = _template("q", "a", task="{{ id.split('_')[1:-1] | join('_') }}")
    assert template.sample("r", {"id": "validation_Art_Theory_1"}, RULES).task == "Art_Theory"
    assert "id" in template.fields_read
    with pytest.raises(RowError, match=r"^r: task: "):
        template.sample("r", {"name": "x"}, RULES)


def test_labels_are_put_into_words() -> None:
    verbalizer = {"label": "{{ label }}", "words": {"0": "no", "1": "yes", "true": "yes", "2": "no"}}
    template = _template("{{ candidates | join(' or ') }}?", "It is {{ verbalized }}.", verbalizer=verbalizer)
    for label, answer in {0: "no", 1: "yes", "1": "yes", 2: "no"}.items():
        sample = template.sample("r", {"label": label}, RULES)
        assert _texts(sample) == ["no or yes?", f"It is {answer}."]
        assert sample.choices == ("It is no.", "It is yes.")
    assert _texts(template.sample("r", {"label": True}, RULES))[1] == "It is yes."
    other = PromptSettings(words={"0": "cat", "1": "dog"})
    assert _texts(template.sample("r", {"label": 1}, RULES, other)) == ["cat or dog?", "It is dog."]
    for label, reason in {"10": "no words for the label '10'; did you mean '1'", None: "got null"}.items():
        with pytest.raises(RowError, match=rf"^r: verbalizer\.label: .*{reason}"):
            template.sample("r", {"label": label}, RULES)


OWN_WORDS = {"label": "{{ label }}"}


def test_word_labels_need_no_verbalizer() -> None:
    template = _template("{{ candidates | join(' or ') }}?", "It is {{ verbalized }}.", verbalizer=OWN_WORDS)
    for label in ("cat", "T-shirt", "Boeing 737", "7up", "\u732b\u72ac", "apple_pie"):
        sample = template.sample("r", {"label": label}, RULES)
        assert _texts(sample) == ["?", f"It is {label}."] and sample.choices == ()
    for label in (0, 3.5, True, "3", "-1", "n02123045", "class_3", "LABEL-0", "Q42", "A", "", "7.5", "false"):
        with pytest.raises(
            RowError, match=r"^r: verbalizer\.label: .* got the number or id .*: verbalizer: \{'.*': WORDS, \.\.\.\}"
        ):
            template.sample("r", {"label": label}, RULES)
    listed = PromptSettings(words={"0": "cat", "1": "dog"})  # verbalizer: [cat, dog]
    sample = template.sample("r", {"label": "dog"}, RULES, listed)
    assert _texts(sample) == ["cat or dog?", "It is dog."] and sample.choices == ("It is cat.", "It is dog.")
    with pytest.raises(RowError, match="no words for the label 'dogs'; did you mean 'dog'"):
        template.sample("r", {"label": "dogs"}, RULES, listed)


# Sources.

ROWS = [{"id": n, "split": "train" if n % 3 else "test", "q": f"q{n}", "a": f"a{n}"} for n in range(12)]
OWN = """
description: mine
messages: [{role: user, images: ["{{ image | default([]) }}"], text: "{{ q }}"}, {role: assistant, text: "{{ a }}"}]
example: {q: q, a: a}
"""


def _source(folder: Path, rows: list[dict[str, Any]] | None = None, template: str = OWN, **settings: Any) -> Source:
    (folder / "rows.json").write_text(json.dumps(ROWS if rows is None else rows), encoding="utf-8")
    (folder / "mine.yaml").write_text(template, encoding="utf-8")
    return Source.model_validate({"path": str(folder / "rows.json"), "template": str(folder / "mine.yaml"), **settings})


def _all(reader: SourceReader) -> list[Sample]:
    rows = reader.open()
    return [reader.sample(*rows[index]) for index in range(len(rows))]


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ({"split": "test"}, [0, 3, 6, 9]),
        ({"id": [1, 3, 99]}, [1, 3]),
        ({"split": "test", "id": [0, 1]}, [0]),
        ({"none": None, "id": 5}, [5]),
    ],
)
def test_rows_are_chosen_under_their_own_ids(tmp_path: Path, where: dict[str, Any], chosen: list[int]) -> None:
    reader = SourceReader(_source(tmp_path, where=where))
    assert [sample.id for sample in _all(reader)] == [f"rows.json[{n}]" for n in chosen]
    assert [parse()[1]["id"] for parse in reader.stream()] == chosen
    first = SourceReader(_source(tmp_path, where=where, limit=1))
    assert [sample.id for sample in _all(first)] == [f"rows.json[{chosen[0]}]"]
    assert [parse()[1]["id"] for parse in first.stream()] == chosen[:1]


def test_no_row_chosen_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.json: no row matches `where: id: '1'`"):
        SourceReader(_source(tmp_path, where={"id": "1"})).open()


def test_few_shot_examples_are_other_rows_of_the_same_file(tmp_path: Path) -> None:
    source = _source(tmp_path, shots={"count": 3, "path": str(tmp_path / "rows.json"), "where": {"split": "train"}}, system="s")
    samples = _all(SourceReader(source))
    assert samples == _all(SourceReader(source))
    used: Counter[str] = Counter()
    for number, sample in enumerate(samples):
        texts = _texts(sample)
        assert texts[0] == "s" and texts[-2:] == [f"q{number}", f"a{number}"]
        questions, answers = texts[1:-2:2], texts[2:-2:2]
        assert len(questions) == 3 == len(set(questions)) and f"q{number}" not in questions
        assert [answer.replace("a", "q") for answer in answers] == questions
        assert all(int(question[1:]) % 3 for question in questions)
        used.update(questions)
    assert len(used) == 8  # every row of the split serves
    assert _all(SourceReader(source.model_copy(update={"limit": 2}))) == samples[:2]  # and so it does beside fewer rows
    other = _all(SourceReader(source.model_copy(update={"seed": 1})))
    assert [_texts(sample)[-1] for sample in other] == [_texts(sample)[-1] for sample in samples] and other != samples


def test_as_many_rows_as_examples_are_enough_from_another_split(tmp_path: Path) -> None:
    train = {"count": 8, "path": str(tmp_path / "rows.json"), "where": {"split": "train"}}
    samples = _all(SourceReader(_source(tmp_path, where={"split": "test"}, shots=train)))
    assert {len(sample.messages) for sample in samples} == {18}


def test_few_shot_examples_of_another_file_bring_their_images(tmp_path: Path, media: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"image": "b.png", "question": "which?", "answer": "this"}), encoding="utf-8")
    settings = {"count": 1, "path": str(shots), "template": "vqa", "media_root": str(media)}
    [first, *_] = _all(SourceReader(_source(tmp_path, shots=settings)))
    assert first.images == [media.resolve() / "b.png"]
    assert [message["role"] for message in first.messages] == ["user", "assistant"] * 2
    assert _texts(first)[1:] == ["this", "q0", "a0"]


def test_a_row_is_not_its_own_example_in_a_copy_of_the_file(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1]]
    source = _source(tmp_path, rows)
    (tmp_path / "copy.json").write_text(json.dumps(rows), encoding="utf-8")
    shots = {"count": 1, "path": str(tmp_path / "copy.json")}
    samples = _all(SourceReader(Source.model_validate({**source.model_dump(exclude_none=True), "shots": shots})))
    assert [_texts(sample)[0] for sample in samples] == ["q1", "q0"]


def test_a_few_shot_example_is_not_about_the_image_of_the_row(tmp_path: Path, media: Path) -> None:
    rows = [{"image": f"{name}.png", "question": f"q{n}", "answer": f"a{n}"} for n, name in enumerate("aab")]
    (tmp_path / "images.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {"path": str(tmp_path / "images.json"), "template": "vqa", "media_root": str(media)}
    samples = _all(SourceReader(Source.model_validate({**settings, "shots": {"count": 1, "path": settings["path"]}})))
    assert [_texts(sample)[1] for sample in samples][:2] == ["a2", "a2"]
    assert all(len(set(sample.images)) == 2 for sample in samples)
    two = Source.model_validate({**settings, "shots": {"count": 2, "path": settings["path"]}})
    with pytest.raises(RowError, match=r"expected 2 rows that differ from this one and are about other images, got 1"):
        SourceReader(two).sample("r", rows[0])
    assert two.shots is not None
    same = two.model_copy(update={"shots": two.shots.model_copy(update={"same_image": True})})
    assert len(SourceReader(same).sample("r", rows[0]).messages) == 6


def test_missing_examples_are_errors(tmp_path: Path) -> None:
    same = {"count": 2, "path": str(tmp_path / "rows.json")}
    with pytest.raises(UserError, match=r"shots: .*rows\.json: expected at least 3 rows for 2 examples, got 2"):
        SourceReader(_source(tmp_path, ROWS[:2], shots=same))
    twins = SourceReader(_source(tmp_path, [ROWS[0], ROWS[0], ROWS[1]], shots=same))
    with pytest.raises(RowError, match=r"^rows\.json\[0\]: shots: .*rows\.json: expected 2 rows that differ .*, got 1"):
        _all(twins)
    broken = SourceReader(_source(tmp_path, [ROWS[0], {**ROWS[1], "a": ""}], shots={**same, "count": 1}))
    with pytest.raises(RowError, match=r"^rows\.json\[0\]: shots: few-shot example: rows\.json\[1\]: messages\[1\]: .*empty"):
        _all(broken)


JOINED = """
description: mine
join: {by: id, rows: more}
messages: [{role: user, text: "{{ q }}"}, {role: assistant, text: "{{ joined.a }}"}]
example: {q: q, id: 1, joined: {id: 1, a: a}}
"""


def _joined(folder: Path, ids: list[Any], partners: list[dict[str, Any]]) -> SourceReader:
    (folder / "more.json").write_text(json.dumps({"more": partners}), encoding="utf-8")
    rows = [{"q": "q", "id": value} for value in ids]
    return SourceReader(_source(folder, rows, JOINED, join=str(folder / "more.json")))


def test_partners_are_joined_by_value(tmp_path: Path) -> None:
    reader = _joined(tmp_path, ["1", 2, 1, 2], [{"id": 2, "a": "two"}, {"id": 1, "a": "one"}, {"id": "1", "a": "text"}])
    assert [_texts(sample)[1] for sample in _all(reader)] == ["text", "two", "one", "two"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "expected one row with id: 3 in .*more.json, found no row"),
        (1.0, "expected an integer or text that identifies a row of .*more.json, got 1.0"),
        (True, "got True"),
        (None, "got None"),
        ([1], r"got \[1\]"),
        (7, "expected one row with id: 7 in .*more.json, found several rows"),
    ],
)
def test_a_row_without_its_partner_is_named(tmp_path: Path, value: Any, reason: str) -> None:
    partners = [{"id": 1, "a": "one"}, {"id": 7, "a": "x"}, {"id": 7, "a": "y"}, {"id": [1]}, {}]
    reader = _joined(tmp_path, [value], partners)
    with pytest.raises(RowError, match=rf"^rows\.json\[0\]: id: .*{reason}"):
        _all(reader)


def test_a_row_cannot_supply_its_own_partner(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text('{"more": [{"id": 1, "a": "true"}]}', encoding="utf-8")
    rows = [{"q": "q", "id": 1, "joined": {"id": 1, "a": "false"}}]
    with pytest.raises(RowError, match=r"^rows\.json\[0\]: joined: the row already has a field `joined`"):
        _all(SourceReader(_source(tmp_path, rows, JOINED, join=str(tmp_path / "more.json"))))


@pytest.mark.parametrize(
    ("template", "settings", "reason"),
    [
        (JOINED, {}, "joins a second file; add a line to the source: join: FILE"),
        (OWN, {"join": "rows.json"}, "does not join a second file; remove the line"),
        (OWN, {"shuffle_options": True}, "has no `options` section"),
        (OWN, {"verbalizer": ["a", "b"]}, "has no `verbalizer` section"),
        ("vqa", {"image_placeholder": "add"}, "needs a template with `conversation` and `images`, and vqa does not have both"),
        ("alpaca", {"image_placeholder": "add"}, "needs a template with `conversation` and `images`, and alpaca does not"),
        (OWN, {"values": {"images": "x"}}, "unknown value 'images' of the template .*; the template has no `values` section"),
        (
            "vqa_v2",
            {"values": {"image": "x"}, "join": "rows.json"},
            "unknown value 'image' of the template vqa_v2; did you mean 'images'",
        ),
        (OWN, {"shots": {"count": 1, "path": "none.json"}}, "no such file or folder: none.json"),
        (OWN, {"shots": {"count": 1, "path": "rows.json", "template": "lava"}}, "did you mean 'llava'"),
        (OWN, {"shots": {"count": 1, "path": "rows.json", "join": "more.json"}}, "does not join a second file; remove the line"),
    ],
)
def test_settings_that_the_template_does_not_support_are_errors(
    tmp_path: Path, template: str, settings: dict[str, Any], reason: str
) -> None:
    source = _source(tmp_path, template=template if "\n" in template else OWN)
    if "\n" not in template:
        settings = {**settings, "template": template}
    with pytest.raises(UserError, match=reason):
        SourceReader(Source.model_validate({**source.model_dump(exclude_none=True), **settings}))


RECIPE = """
model: {base: b}
data:
  train:
    - path: rows.json
      template: classification
      %s
output_dir: o
"""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("where: split", "data.train.0.where: expected a mapping of fields to values, got 'split'"),
        ("where: {}", "data.train.0.where: expected a mapping of fields to values"),
        ("where: {split: {a: b}}", "data.train.0.where.split: expected a value or a list of values"),
        ("where: {split: []}", "data.train.0.where.split: expected a value or a list of values"),
        ("verbalizer: yes", "data.train.0.verbalizer: expected a mapping of labels to words or a list of words"),
        ("verbalizer: []", "data.train.0.verbalizer: expected a mapping of labels to words or a list of words"),
        ("verbalizer: [cat, 1]", "data.train.0.verbalizer.1: expected words, got 1"),
        ("verbalizer: {'0': ' '}", "data.train.0.verbalizer.0: expected words"),
        ("values: [a]", "data.train.0.values: expected a mapping of names to text"),
        ("values: {images: 1}", "data.train.0.values.images: expected a string, got 1"),
        ("shots: 3", "data.train.0.shots: expected a mapping"),
        ("shots: {path: a.json}", "data.train.0.shots.count: required, and not given"),
        ("shots: {path: a.json, count: 0}", "data.train.0.shots.count: expected at least 1"),
        ("shots: {path: a.json, count: 1, where: 1}", "data.train.0.shots.where: expected a mapping"),
        ("seed: 1.5", "data.train.0.seed: expected an integer"),
        ("shuffle_options: 1", "data.train.0.shuffle_options: expected true or false"),
        ("system: ''", "data.train.0.system: expected a string that is not empty"),
    ],
)
def test_a_wrong_key_of_a_source_is_named_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "x.yaml").write_text(RECIPE % line, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "x.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'x.yaml'}:") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_resolved_recipe_has_the_same_prompt_settings(tmp_path: Path) -> None:
    keys = "{where: {split: [a, 1, null]}, verbalizer: [no, 'yes'], values: {a: b}, system: s, seed: 3, "
    keys += "shots: {count: 2, path: p, where: {split: b}}}"
    (tmp_path / "x.yaml").write_text(RECIPE.replace("%s", "<<: " + keys.replace("[no,", "['no',")), encoding="utf-8")
    recipe = load_recipe(tmp_path / "x.yaml")
    [source] = recipe.data.train
    assert source.verbalizer == {"0": "no", "1": "yes"} and source.where == {"split": ["a", 1, None]}
    (tmp_path / "y.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "y.yaml")
    assert again == recipe and hash(again) == hash(recipe)
    errors = Draft202012Validator(recipe_schema()).iter_errors(yaml.safe_load((tmp_path / "x.yaml").read_text()))
    assert not list(errors)
