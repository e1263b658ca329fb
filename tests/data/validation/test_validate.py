"""Validation reports exactly the issues of each hostile row, and agrees with training on the rows that cannot train."""

from __future__ import annotations

import ast
import copy
import io
import json
from pathlib import Path
from typing import Any

import hostile_rows as hostile
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmtune import data
from mmtune.cli.main import entry_point
from mmtune.data import processes
from mmtune.data.encoding.encode import encode_sample
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import MediaRules, open_image
from mmtune.data.message import RowError
from mmtune.data.sources.reader import SourceReader
from mmtune.data.templates.prompts import PromptSettings
from mmtune.data.templates.template import load_data_template, shipped_templates
from mmtune.data.validation.issues import ISSUE_TYPES, Issue
from mmtune.data.validation.validate import IssueSummary, ValidationSettings, Validator, guess_template
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError

CASES = hostile.cases()
ERRORS = {name for name, kind in ISSUE_TYPES.items() if kind.severity == "error"}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("hostile")
    return Source(path=str(hostile.write(folder)), template="llava", media_root=str(folder / "media"))


@pytest.fixture(scope="session")
def issues(corpus: Source) -> dict[str, list[Issue]]:
    return by_row(Validator([corpus]).issues())


def by_row(issues: Any) -> dict[str, list[Issue]]:
    rows: dict[str, list[Issue]] = {}
    for each in issues:
        rows.setdefault(each.row, []).append(each)
    return rows


def outcome(reader: SourceReader, index: int, processor: Any) -> str | None:
    """The kind of fault for which training would quarantine a row; None for one that trains."""
    try:
        encode_sample(reader.sample(*reader.open()[index]), processor)
    except RowError as error:
        return error.issue
    return None


# --------------------------------------------------------------------------------------------------------------- corpus


def test_the_corpus_is_large_and_each_case_its_own() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_hostile_row_has_only_the_expected_issues(issues: dict[str, list[Issue]], number: int) -> None:
    row_issues = issues.get(f"hostile.jsonl:{number + 1}", [])
    assert tuple((each.field, each.issue) for each in row_issues if each.issue != "field_unknown") == CASES[number].issues
    assert all(each.detail and each.fix for each in row_issues)


@pytest.mark.slow
def test_a_row_has_an_error_exactly_if_it_cannot_train(corpus: Source, untrained: tuple[Any, Any]) -> None:
    processor, reader = untrained[1], SourceReader(corpus)
    issues_by_row = by_row(Validator([corpus], settings=ValidationSettings(processor)).issues())
    for number, case in enumerate(CASES):
        refused = [each.issue for each in issues_by_row.get(f"hostile.jsonl:{number + 1}", []) if each.issue in ERRORS]
        assert len(refused) <= 1, case.name
        trained = outcome(reader, number, processor)
        if case.decoding:
            assert (refused, trained) == ([], case.decoding), case.name
        else:
            assert (refused != []) == (trained is not None), (case.name, refused, trained)


def test_decoding_reports_the_remaining_issues(corpus: Source) -> None:
    issues_by_row = by_row(Validator([corpus], settings=ValidationSettings(decode=True)).issues())
    for number, case in enumerate(CASES):
        if case.decoding:
            assert [each.issue for each in issues_by_row[f"hostile.jsonl:{number + 1}"]] == [case.decoding], case.name


def test_rows_are_checked_in_several_processes_as_in_one(
    corpus: Source, issues: dict[str, list[Issue]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "CHUNK", 16)
    assert by_row(Validator([corpus]).issues(processes=2)) == issues


@pytest.mark.parametrize("others", [0, 1])
def test_a_model_error_stops_the_check_with_one_message(corpus: Source, untrained: tuple[Any, Any], others: int) -> None:
    processor = copy.deepcopy(untrained[1])
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^model: its processor has no chat template; set model\.chat_template$"):
        list(Validator([corpus], settings=ValidationSettings(processor)).issues(processes=others))


# ------------------------------------------------------------------------------------------------------- between the rows


def _rows(path: Path, *rows: Any) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path), template="llava")


def _talk(question: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def test_repetitions_are_within_a_source_and_name_the_first(tmp_path: Path) -> None:
    one = _rows(tmp_path / "one.jsonl", _talk("a", id=1), _talk("b", id=2), _talk("a", id=1), _talk("c", id=2), _talk("a", id=1))
    two = _rows(tmp_path / "two.jsonl", _talk("a", id=1), _talk("d"), _talk("e"), _talk("f", id="1"))
    issues = [(each.row, each.issue, each.detail.split()[-1]) for each in Validator([one, two]).issues()]
    assert issues == [
        ("one.jsonl:3", "duplicate_row", "one.jsonl:1"),
        ("one.jsonl:5", "duplicate_row", "one.jsonl:1"),
        ("one.jsonl:4", "duplicate_id", "one.jsonl:2"),
    ]


def test_the_same_path_under_another_root_is_another_image(tmp_path: Path) -> None:
    sources = []
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / "a.png")
        sources.append(_rows(tmp_path / name / f"{name}.jsonl", _talk("<image>\nWhat?", image="a.png")))
    assert list(Validator(sources[:1], sources[1:]).issues()) == []


def test_an_unread_field_is_reported_once(tmp_path: Path) -> None:
    source = _rows(tmp_path / "r.jsonl", _talk("a"), _talk("b", imgae="x"), _talk("c", imgae="y"), _talk("d", id=4))
    issues = list(Validator([source]).issues())
    assert [(each.row, each.field, each.issue) for each in issues] == [("r.jsonl:2", "imgae", "field_unknown")]
    assert "2 rows" in issues[0].detail


@pytest.mark.parametrize("name", shipped_templates())
def test_a_template_knows_the_fields_that_it_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is not among them can go, and the sample stays the same."""
    monkeypatch.setattr("mmtune.data.templates.row_media.resolve_media", lambda value, rules: Path(str(value)))
    monkeypatch.setattr("mmtune.data.templates.region_declaration.image_size", lambda media: (1000, 1000))
    template = load_data_template(name)
    words = {"0": "cat", "1": "dog", "2": "bird", "3": "fish", "7": "horse"} if template.verbalizer else None
    rules, prompting = MediaRules(Path()), PromptSettings(words=words)
    whole = template.sample("r", template.example, rules, prompting)
    read = template.fields_read
    assert read & template.example.keys()
    for field in template.example.keys() - read - {"joined"}:
        less = {key: value for key, value in template.example.items() if key != field}
        assert template.sample("r", less, rules, prompting) == whole, field


# ---------------------------------------------------------------------------------------------------- the model's own limits


@pytest.mark.parametrize(("policy", "kind"), [("error", "too_long"), ("drop_sample", "too_long_by_policy")])
def test_a_long_row_fails_a_run_unless_the_recipe_drops_it(
    tmp_path: Path, untrained: tuple[Any, Any], policy: str, kind: str
) -> None:
    source = _rows(tmp_path / "r.jsonl", _talk("short"), _talk("long " * 50))
    length = encode_sample(SourceReader(source).sample("r", _talk("short")), untrained[1])["input_ids"].shape[1]
    issues = list(Validator([source], settings=ValidationSettings(untrained[1], length, policy)).issues())
    assert [(each.row, each.issue) for each in issues] == [("r.jsonl:2", kind)]


# ---------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("kind", "frames"),
    [("JPEG", 1), ("PNG", 1), ("GIF", 1), ("WEBP", 1), ("BMP", 1), ("TIFF", 1), ("PNG", 2), ("GIF", 2), ("WEBP", 2), ("TIFF", 2)],
)
def test_a_truncated_file_is_reported_exactly_if_training_cannot_open_it(tmp_path: Path, kind: str, frames: int) -> None:
    """All of these formats say where they end, so for every length the header scan knows what decoding would find."""
    buffer = io.BytesIO()
    image = hostile.NOISE.resize((16, 12))
    several = {"save_all": True, "append_images": [ImageOps.invert(image)]} if frames > 1 else {}
    image.save(buffer, kind, **several)
    whole = buffer.getvalue()
    path = tmp_path / "cut"
    for length in sorted({*range(0, len(whole), 7), *range(len(whole) - 16, len(whole) + 1)}):
        path.write_bytes(whole[:length])
        errors = [name for name, _ in inspect_image(path).issues if name in ERRORS]
        try:
            open_image(path)
        except ValueError:
            assert errors in (["image_truncated"], ["image_unreadable"], ["image_empty"]), length
        else:
            assert errors == [], length


FILES = [content for case in hostile.images() for content in case.files.values() if len(content) < 20_000]
[SIDEWAYS_JPEG] = [content for case in hostile.images() if case.name == "a JPEG on its side" for content in case.files.values()]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whole=st.sampled_from(FILES),
    cut=st.integers(0, 20_000),
    flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 255)), max_size=6),
)
@example(whole=FILES[0], cut=0, flips=[])
@example(whole=SIDEWAYS_JPEG, cut=0, flips=[(30, 1)])  # an unknown byte order in the EXIF data
def test_no_image_crashes_and_every_fault_is_reported(
    tmp_path: Path, whole: bytes, cut: int, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(whole[: len(whole) - cut % (len(whole) + 1)] if cut % 2 else whole)
    for place, bits in flips:
        if content:
            content[place % len(content)] ^= bits
    path = tmp_path / "fuzzed"
    path.write_bytes(content)
    scan, decoded = inspect_image(path), inspect_image(path, decode=True)
    errors = [name for name, _ in decoded.issues if name in ERRORS]
    assert {name for name, _ in scan.issues} <= {name for name, _ in decoded.issues}
    try:
        image = open_image(path)
    except ValueError:
        assert len(errors) == 1
    else:
        assert errors == [] and image.mode == "RGB" and image.size == scan.size == decoded.size


# ------------------------------------------------------------------------------------------------------------ fuzzed rows

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["human", "gpt", "system", "<image>", "good.png", "../x", "\ud800", "\0", "{{ x }}", "<|end|>", "https://a/b.png"]
    )
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3))
GOOD = _talk("<image>\nWhat is it?", "Noise.", image="good.png", id="7", task="see", bbox=[0, 0, 5, 5])


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in _places(each, (*path, key)))]


def _mutated(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _mutated(value[place[0]], place[1:], by)
    return copy


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(_places(GOOD)), JSON), min_size=1, max_size=2))
def test_no_row_crashes_and_validation_agrees_with_training(
    tmp_path: Path, corpus: Source, untrained: tuple[Any, Any], changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    row: Any = GOOD
    for place, by in changes:
        if place in _places(row):
            row = _mutated(row, place, by)
    source = _rows(tmp_path / "fuzz.jsonl", row).model_copy(update={"media_root": corpus.media_root})
    issues = list(Validator([source], settings=ValidationSettings(untrained[1])).issues())
    refused = [each.issue for each in issues if each.issue in ERRORS]
    assert (refused == []) == (outcome(SourceReader(source), 0, untrained[1]) is None), (row, issues)
    json.dumps([each.as_json() for each in issues])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), bits=st.integers(1, 255), cut=st.booleans())
def test_no_line_of_bytes_crashes(tmp_path: Path, place: int, bits: int, cut: bool) -> None:
    line = bytearray(json.dumps(_talk("what?", "this\u00e9", id=3), ensure_ascii=False).encode())
    line[place % len(line)] ^= bits
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(json.dumps(_talk("first")).encode() + b"\n" + bytes(line[: place % len(line)] if cut else line) + b"\n")
    summary = IssueSummary(rows=1)
    for each in Validator([Source(path=str(path), template="llava")]).issues():
        summary.add(each)
        assert each.severity in ("error", "warning", "note")


# ---------------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_issues_and_fails_for_errors_only(
    tmp_path: Path, corpus: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "issues.jsonl"
    arguments = ["data", "check", corpus.path, "--media-root", str(corpus.media_root), "--template", "llava", "--out", str(out)]
    assert entry_point(arguments) == 1
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert all(list(line) == ["row", "field", "issue", "detail", "fix"] for line in lines)
    written = [(line["row"], line["issue"]) for line in lines if line["issue"] != "field_unknown"]
    assert sorted(written) == sorted(
        (f"hostile.jsonl:{number}", kind) for number, case in enumerate(CASES, start=1) for _, kind in case.issues
    )
    shown = capsys.readouterr()
    faulty = sum(any(kind in ERRORS for _, kind in case.issues) for case in CASES)
    assert f"checked: {len(CASES)} rows, {faulty} cannot train" in shown.out and "image_truncated" in shown.out
    assert f"{faulty} of {len(CASES)} rows cannot train" in shown.err

    assert entry_point([*arguments[:-2], "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["issues"] == lines and report["rows"] == len(CASES) and report["faulty_rows"] == faulty


def test_warnings_do_not_fail_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _rows(tmp_path / "r.jsonl", _talk("a"), _talk("a"))
    assert entry_point(["data", "check", source.path, "--template", "llava"]) == 0
    assert "1 warning" in capsys.readouterr().out


def test_a_recipe_is_checked_with_its_processor(make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_recipe()
    recipe = str(tmp_path / "recipe.yaml")
    assert entry_point(["data", "check", recipe]) == 0
    assert "12 rows, 0 cannot train: 0 errors" in capsys.readouterr().out
    assert entry_point(["data", "check", recipe, "data.max_tokens=8", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["counts"] == {"too_long": 12}
    assert entry_point(["data", "check", recipe, "--template", "llava"]) == 2
    assert entry_point(["data", "check", recipe, "--out", str(tmp_path / "no" / "such")]) == 2


@pytest.mark.parametrize("name", ["llava", "messages", "vqa", "alpaca"])
def test_the_template_of_a_file_is_guessed_from_its_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(load_data_template(name).example) + "\n")
    assert guess_template(str(tmp_path / "r.jsonl")) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n', "cannot choose a data template"),
        ("not JSON", r"r\.jsonl:1: row: not valid JSON"),
        (
            '{"conversations": [{"from": "hum',
            r"r\.jsonl:1: row: not valid JSON: Unterminated string starting at character \d+ of",
        ),
    ],
)
def test_a_file_without_a_matching_template_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        guess_template(str(tmp_path / "r.jsonl"))


# --------------------------------------------------------------------------------------------------------------- kinds


def _faults_raised() -> list[tuple[str, ast.expr | None]]:
    """Every RowError and DataIssueError that the package makes: where, and the expression that gives its kind."""
    faults = []
    for path in sorted(Path(data.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            if name == "RowError" and isinstance(node, ast.Call) and not isinstance(node.args[0], ast.Name | ast.Attribute):
                continue
            if name in ("RowError", "DataIssueError") and isinstance(node, ast.Call):
                place = 3 if name == "RowError" else 0
                faults.append((f"{path.name}:{node.lineno}", node.args[place] if len(node.args) > place else None))
    return faults


def test_every_error_is_raised_with_a_known_issue_type() -> None:
    faults = _faults_raised()
    assert len(faults) > 50
    for where, kind in faults:
        assert kind is not None, f"{where} does not say what kind of fault it is"
        named = [node.value for node in ast.walk(kind) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert set(named) - {"assistant"} <= set(ISSUE_TYPES), f"{where} says {named}"
