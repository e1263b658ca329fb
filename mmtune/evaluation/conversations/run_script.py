"""Running a conversation script: the model's answers turn by turn, what passes, and the table of results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mmtune.console.styled_console import StyledConsole
from mmtune.data.message import Message, Sample, text_message
from mmtune.data.templates.template import unanswered_turn
from mmtune.evaluation.conversations.judge import Ask, Judgement, judge_answers
from mmtune.evaluation.conversations.script import Expectation, Script, ScriptedConversation
from mmtune.evaluation.metrics.intervals import confidence_interval
from mmtune.evaluation.metrics.metric_table import METRICS
from mmtune.utils.files import replace_text

SHOWN = 120
"""Characters of a question or an answer on the terminal."""

Answerer = Callable[[Sequence[Sample]], Sequence[str]]
"""Answers to the last questions of samples, whose last message is a placeholder."""


@dataclass(frozen=True)
class Result:
    """What became of an expectation.

    Attributes:
        expected: the expectation as text.
        passed: None for a judge whose replies cannot be parsed; it then counts neither as passed nor as failed.
        judgement: of a judge.
    """

    expected: str
    passed: bool | None
    judgement: Judgement | None = None


@dataclass(frozen=True)
class AnsweredTurn:
    """A question of a script with the model's answer.

    Attributes:
        conversation: the conversation's id.
        turn: its number, from 1.
        images: their names in the script.
    """

    conversation: str
    turn: int
    question: str
    images: tuple[str, ...]
    answer: str
    results: tuple[Result, ...]


def run_script(script: Script, questions: Sequence[Sequence[Message]], answer: Answerer, ask: Ask | None) -> list[AnsweredTurn]:
    """Ask all conversations, turn by turn; the same turn of all of them is answered together.

    Args:
        questions: from `question_messages`.
        answer: the model.
        ask: the judge; None if no expectation needs one.

    Returns:
        Every turn, in the order of the script.
    """
    histories: list[list[Message]] = [_system(each) for each in script.conversations]
    answers: list[list[str]] = [[] for _ in script.conversations]
    for turn in range(max(len(each.turns) for each in script.conversations)):
        asked = [number for number, each in enumerate(script.conversations) if turn < len(each.turns)]
        samples = []
        for number in asked:
            histories[number].append(questions[number][turn])
            samples.append(Sample(f"{script.conversations[number].id}, turn {turn + 1}", [*histories[number], unanswered_turn()]))
        for number, text in zip(asked, answer(samples), strict=True):
            histories[number].append(text_message("assistant", text))
            answers[number].append(text.strip())
    judged = [
        (number, turn, expectation)
        for number, each in enumerate(script.conversations)
        for turn, content in enumerate(each.turns)
        for expectation in content.expect
        if expectation.judge is not None
    ]
    judgements: dict[tuple[int, int, Expectation], Judgement] = {}
    if judged:
        assert ask is not None  # the command requires a judge
        cases = [
            (transcript(script.conversations[number], answers[number], turn), answers[number][turn], str(expectation.judge))
            for number, turn, expectation in judged
        ]
        judgements = dict(zip(judged, judge_answers(cases, ask), strict=True))
    turns = []
    for number, each in enumerate(script.conversations):
        for turn, content in enumerate(each.turns):
            text = answers[number][turn]
            results = tuple(
                _result(expectation, text, judgements.get((number, turn, expectation))) for expectation in content.expect
            )
            turns.append(AnsweredTurn(each.id, turn + 1, content.user, content.images, text, results))
    return turns


def transcript(conversation: ScriptedConversation, answers: Sequence[str], turn: int) -> str:
    """A conversation up to a question, as text for a judge, which sees no images."""
    lines = [] if conversation.system is None else [f"System: {conversation.system}"]
    for number, content in enumerate(conversation.turns[: turn + 1]):
        lines.append(f"User: {'[image] ' * len(content.images)}{content.user}")
        if number < turn:
            lines.append(f"Assistant: {answers[number]}")
    return "\n".join(lines)


def _system(conversation: ScriptedConversation) -> list[Message]:
    text = conversation.system
    return [] if text is None else [text_message("system", text)]


def _result(expectation: Expectation, answer: str, judgement: Judgement | None) -> Result:
    if judgement is None:
        return Result(str(expectation), expectation.passes(answer))
    passed = None if judgement.verdict == "unparsed" else judgement.verdict != "worse"
    return Result(str(expectation), passed, judgement)


def summarize_turns(turns: Sequence[AnsweredTurn]) -> dict[str, Any]:
    """The results as JSON values.

    Returns:
        `expectations`, `passed`, `failed`, `unparsed` (counts); `score`, the share of the parsed ones that passed, and its 95%
        `interval` (Wilson; conversations are clusters); with a judge `judge`: how often each verdict was given, and `agreement`,
        the share of parsed pairs whose orders say the same; `turns`: all questions, answers and results.
    """
    results = [(turn.conversation, result) for turn in turns for result in turn.results]
    counted = [(conversation, result.passed) for conversation, result in results if result.passed is not None]
    passed = sum(value for _, value in counted)
    summary: dict[str, Any] = {
        "expectations": len(results),
        "passed": passed,
        "failed": len(counted) - passed,
        "unparsed": len(results) - len(counted),
        "score": passed / len(counted) if counted else None,
        "interval": _interval(counted),
        "turns": [asdict(turn) for turn in turns],
    }
    judgements = [result.judgement for _, result in results if result.judgement is not None]
    if judgements:
        parsed = [each for each in judgements if each.verdict != "unparsed"]
        agreement = sum(each.agrees for each in parsed) / len(parsed) if parsed else None
        summary["judge"] = {**Counter(each.verdict for each in judgements), "agreement": agreement}
    return summary


def _interval(counted: Sequence[tuple[str, bool]]) -> tuple[float, float] | None:
    if not counted:
        return None
    statistics = np.array([(passed, 1.0) for _, passed in counted], dtype=np.float64)
    return confidence_interval(METRICS["exact_match"], statistics, [conversation for conversation, _ in counted])


def print_results(summary: Mapping[str, Any]) -> None:
    """Print a table of the turns, what did not pass with the answer, and the totals."""
    table = Table(title="Conversations", title_justify="left")
    for name in ("conversation", "turn", "question", "passed"):
        table.add_column(Text(name), justify="right" if name in ("turn", "passed") else "left")
    for turn in summary["turns"]:
        passed = sum(result["passed"] is True for result in turn["results"])
        table.add_row(
            *map(Text, (turn["conversation"], str(turn["turn"]), _short(turn["question"]), f"{passed} of {len(turn['results'])}"))
        )
    StyledConsole().print_table(table)
    for turn in summary["turns"]:
        for result in turn["results"]:
            if not result["passed"]:
                judged = f" ({result['judgement']['verdict']})" if result["judgement"] else ""
                where = f"{turn['conversation']}, turn {turn['turn']}"
                print(f"{where}: expected {_short(result['expected'])}{judged}, got {_short(turn['answer'])!r}")
    if judge := summary.get("judge"):
        counts = ", ".join(f"{count} {name}" for name, count in judge.items() if name != "agreement")
        agreement = "" if judge["agreement"] is None else f"; both orders agree in {judge['agreement']:.0%}"
        print(f"judge: {counts}{agreement}")
    if summary["score"] is not None:
        low, high = summary["interval"]
        unparsed = f", {summary['unparsed']} unparsed by the judge" if summary["unparsed"] else ""
        print(
            f"passed: {summary['passed']} of {summary['passed'] + summary['failed']} expectations ({summary['score']:.1%}, "
            f"95% interval {low:.1%} to {high:.1%}){unparsed}"
        )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def write_turns(turns: Sequence[AnsweredTurn], path: Path) -> None:
    """Replace a file atomically by the turns, one JSON object a line, with the judge's prompts and replies."""
    replace_text(path, "".join(json.dumps(asdict(turn), ensure_ascii=False) + "\n" for turn in turns))
