"""Conversation scripts: what is valid, what passes, that the model's own answers are the context, the judge, the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.message import Sample, text_of
from mmtune.evaluation.conversations.judge import judge_answers, read_reply
from mmtune.evaluation.conversations.run_script import print_results, run_script, summarize_turns
from mmtune.evaluation.conversations.script import Expectation, question_messages, read_script
from mmtune.utils.errors import UserError
from mmtune.utils.shipped import shipped_dir

SHIPPED = sorted((shipped_dir("data_templates") / "conversations").glob("*.yaml"))


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("expectation", "passing", "failing"),
    [
        ({"contains": "Red"}, ["a RED square"], ["blue", ""]),
        ({"not_contains": "red"}, ["blue", ""], ["REDDISH"]),
        ({"exact": "B"}, [" B\n"], ["b", "B.", "(B)"]),
        ({"regex": r"^\d+$"}, ["12", " 12 "], ["12 cats", ""]),
        ({"metric": "yes_no", "references": ["no"]}, ["No.", "No, it is red"], ["yes", "not sure", ""]),
        ({"metric": "token_f1", "references": ["a red cat"], "at_least": 0.6}, ["red", "the red cat"], ["blue"]),
        ({"metric": "cer", "references": ["abcd"], "at_most": 0.25}, ["abcd", "abc"], ["ab", ""]),
        ({"metric": "numeric", "references": ["3"]}, ["There are 3 cats."], ["3 or 4", "none"]),
    ],
)
def test_what_passes(expectation: dict[str, Any], passing: list[str], failing: list[str]) -> None:
    checked = Expectation(**expectation)
    assert [checked.passes(answer) for answer in passing + failing] == [True] * len(passing) + [False] * len(failing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conversations: []", r"script\.yaml:1: conversations: .*at least 1 item"),
        (
            "conversations:\n  - id: a\n    turns:\n      - usr: hi",
            r":4: conversations\.0\.turns\.0\.user: required key is missing",
        ),
        ("conversations:\n  - id: a\n    turns:\n      - user: hi\n        expct: []", r":5: .*unknown key.*expect"),
        (
            "conversations:\n  - {id: a, turns: [{user: hi, expect: [{contains: x, exact: y}]}]}",
            r"expected one of .*, got contains, exact",
        ),
        ("conversations:\n  - {id: a, turns: [{user: hi, expect: [{regex: '('}]}]}", r"expected a regular expression, got '\('"),
        ("conversations:\n  - {id: a, turns: [{user: hi, expect: [{metric: ciderd, references: [x]}]}]}", r"'ciderd'.*cider_d"),
        (
            "conversations:\n  - {id: a, turns: [{user: hi, expect: [{metric: cer, references: [x]}]}]}",
            r"cer: expected at_most, because lower",
        ),
        (
            "conversations:\n  - {id: a, turns: [{user: hi, expect: [{metric: numeric, references: [x]}]}]}",
            r"references: .*number",
        ),
        ("conversations:\n  - {id: a, turns: [{user: hi, expect: [{metric: numeric}]}]}", r"numeric: expected references"),
        ("conversations:\n  - {id: a, turns: [{user: a}]}\n  - {id: a, turns: [{user: b}]}", r"got 'a' again"),
    ],
)
def test_a_script_that_is_not_valid_is_an_error_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_script(_write(tmp_path, text))


def test_images_stay_in_the_media_root_and_are_opened_first(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    text = "media_root: sub\nconversations:\n  - {id: a, turns: [{user: hi, images: [../a.png]}]}"
    path = _write(tmp_path, text)
    with pytest.raises(UserError, match=r"conversation a, turn 1: .*outside"):
        question_messages(read_script(path), path)
    path = _write(tmp_path, text.replace("media_root: sub\n", "").replace("../a.png", "b.png"))
    with pytest.raises(UserError, match=r"conversation a, turn 1: .*b\.png"):
        question_messages(read_script(path), path)


SCRIPT = """
conversations:
  - id: long
    system: Be brief.
    turns:
      - {user: first, expect: [{contains: first}]}
      - {user: second, expect: [{contains: first}, {judge: good}]}
  - id: short
    turns: [{user: only, expect: [{contains: nothing}]}]
"""


def _run(tmp_path: Path, replies: Sequence[str]) -> tuple[list[list[str]], list[str], dict[str, Any]]:
    """The prompts that the model and the judge get, and the results. The model repeats the first user message."""
    path = _write(tmp_path, SCRIPT)
    script = read_script(path)
    prompts: list[list[str]] = []
    judged: list[str] = []

    def answer(samples: Sequence[Sample]) -> list[str]:
        prompts.extend([text_of(message) for message in sample.messages[:-1]] for sample in samples)
        return [next(text_of(each) for each in sample.messages if each["role"] == "user") for sample in samples]

    def ask(texts: Sequence[str]) -> list[str]:
        judged.extend(texts)
        return list(replies)

    return prompts, judged, summarize_turns(run_script(script, question_messages(script, path), answer, ask))


def test_the_models_own_answers_are_the_context(tmp_path: Path) -> None:
    prompts, judged, summary = _run(tmp_path, ["A", "B"])
    assert prompts == [["Be brief.", "first"], ["only"], ["Be brief.", "first", "first", "second"]]
    assert "System: Be brief.\nUser: first\nAssistant: first\nUser: second\n" in judged[0]
    assert judged[0].index("Answer A:\nfirst") < judged[0].index("Answer B:\ngood")
    assert judged[1].index("Answer A:\ngood") < judged[1].index("Answer B:\nfirst")
    assert (summary["passed"], summary["failed"], summary["unparsed"]) == (3, 1, 0)
    assert summary["judge"] == {"better": 1, "agreement": 1.0}
    low, high = summary["interval"]
    assert low < summary["score"] == 0.75 < high


@pytest.mark.parametrize(
    ("replies", "verdict", "passed"),
    [
        (("A", "B"), "better", True),
        (("tie", "Tie."), "equal", True),
        (("A", "tie"), "better", True),
        (("B", "tie"), "worse", False),
        (("B", "A"), "worse", False),
        (("A", "A"), "contradictory", True),
        (("B", "B"), "contradictory", True),
        (("A", "I think that A is better, but B is close"), "unparsed", None),
        (("", "B"), "unparsed", None),
    ],
)
def test_verdicts_of_both_orders(replies: tuple[str, str], verdict: str, passed: bool | None, tmp_path: Path) -> None:
    [judgement] = judge_answers([("User: hi", "x", "y")], lambda prompts: replies)
    assert judgement.verdict == verdict and judgement.replies == replies
    assert judgement.agrees == (replies in {("A", "B"), ("tie", "Tie."), ("B", "A")})
    _, _, summary = _run(tmp_path, replies)
    [result] = [each for turn in summary["turns"] for each in turn["results"] if each["judgement"]]
    assert result["passed"] is passed


@pytest.mark.parametrize("reply", ["A", " b. ", "**Tie**", "Answer A", "(B)", '"tie"'])
def test_replies_of_one_word_are_read(reply: str) -> None:
    assert read_reply(reply) in ("A", "B", "tie")


@pytest.mark.parametrize("reply", ["A and B", "neither", "AB", "Not A", "A is worse", "tie, but A", "answer", "no tie"])
def test_other_replies_are_not_guessed(reply: str) -> None:
    assert read_reply(reply) is None


def test_hostile_text_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, "conversations: [{id: '[b]a', turns: [{user: '[red]{x}', expect: [{exact: '{0}'}]}]}]")
    script = read_script(path)
    print_results(summarize_turns(run_script(script, question_messages(script, path), lambda samples: ["[/b]" * 99], None)))
    printed = capsys.readouterr().out
    assert "[b]a" in printed and "[red]{x}" in printed and "got '[/b][/b]" in printed and max(map(len, printed.split("\n"))) < 320


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scripts_run_on_the_built_in_model(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The untrained model answers at random, so that expectations fail: exit code 1, with every answer and reply in the file."""
    script = read_script(path)
    judged = any(each.judge for conversation in script.conversations for turn in conversation.turns for each in turn.expect)
    command = ["eval", "builtin:tiny-llava", "--conversation", str(path), "--out", str(tmp_path / "out.jsonl"), "--json"]
    assert entry_point([*command, *["--judge", "builtin:tiny-llava"] * judged]) == 1
    output = capsys.readouterr()
    summary = json.loads(output.out)
    turns = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert turns == json.loads(json.dumps(summary["turns"]))
    assert len(turns) == sum(len(each.turns) for each in script.conversations)
    assert summary["passed"] + summary["failed"] + summary["unparsed"] == summary["expectations"] > 2
    assert f"{path}: {summary['failed']} of {summary['expectations']} expectations" in output.err
    if judged:
        [judgement] = [each["judgement"] for turn in turns for each in turn["results"] if each["judgement"]]
        assert len(judgement["prompts"]) == len(judgement["replies"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "r.yaml"], "--conversation: takes its questions from the script"),
        (["evaluate.batch_size=3"], "--conversation: takes its questions from the script"),
        (["--judge", "builtin:tiny-llava"], "no expectation of"),
        (["--judge-model", "x"], "--judge-model: needs --judge"),
        (["--out", "a.csv"], "--out a.csv: expected a .jsonl file"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, "conversations: [{id: a, turns: [{user: hi, expect: [{contains: x}]}]}]")
    assert entry_point(["eval", "builtin:tiny-llava", "--conversation", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_judge_that_is_needed_or_without_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, SCRIPT)
    assert entry_point(["eval", "builtin:tiny-llava", "--conversation", str(path)]) == 2
    assert "has expectations for a judge; give one: --judge" in capsys.readouterr().err
    assert entry_point(["eval", "builtin:tiny-llava", "--judge", "x"]) == 2
    assert "--judge: needs --conversation FILE.yaml" in capsys.readouterr().err
    assert entry_point(["eval", "builtin:tiny-llava", "--conversation", str(path), "--judge", "http://127.0.0.1:9"]) == 1
    assert "no engine answers there" in capsys.readouterr().err
