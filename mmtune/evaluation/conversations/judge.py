"""A judge: another model that compares an answer with a good one. It is asked in both orders, and what it says is kept.

Judges prefer the answer that they read first or last (Zheng et al., arXiv 2306.05685, section 3.3). Opposite preferences in the
two orders count as none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "equal", "worse", "contradictory", "unparsed"]

PROMPT = """Two assistants answered a user's last question. Which answer is better?
Consider whether it is right and answers the question. Do not consider its length or the order of the answers.

{conversation}

Answer A:
{first}

Answer B:
{second}

Reply with one word: A, B, or tie."""

_REPLY = re.compile(r"\W*(?:answer\s+)?(?P<word>a|b|tie)\W*", re.IGNORECASE)

Ask = Callable[[Sequence[str]], Sequence[str]]
"""Replies to prompts, in their order."""


@dataclass(frozen=True)
class Judgement:
    """What a judge said about an answer.

    Attributes:
        verdict: of the model's answer against the good one. `contradictory`: the judge prefers the one that it reads first, or
            second, in both orders. `unparsed`: a reply is not A, B or tie; it is not guessed.
        prompts, replies: of both orders: the model's answer as A, then as B.
    """

    verdict: Verdict
    prompts: tuple[str, str]
    replies: tuple[str, str]

    @property
    def agrees(self) -> bool:
        """Whether both orders say the same: better twice, equal twice or worse twice."""
        return (read_reply(self.replies[0]), read_reply(self.replies[1])) in (("A", "B"), ("tie", "tie"), ("B", "A"))


def judge_answers(cases: Sequence[tuple[str, str, str]], ask: Ask) -> list[Judgement]:
    """Judge answers in both orders.

    Args:
        cases: for each answer the conversation before it as text, the answer, and the good answer.
        ask: the judge.
    """
    prompts = []
    for conversation, answer, good in cases:
        for first, second in ((answer, good), (good, answer)):
            prompts.append(PROMPT.format(conversation=conversation, first=first, second=second))
    replies = list(ask(prompts))
    judgements = []
    for index in range(0, len(prompts), 2):
        pair = (replies[index], replies[index + 1])
        verdict = _verdict(read_reply(pair[0]), read_reply(pair[1]))
        judgements.append(Judgement(verdict, (prompts[index], prompts[index + 1]), pair))
    return judgements


def read_reply(reply: str) -> Literal["A", "B", "tie"] | None:
    """What a judge's reply says; None if it is not exactly A, B or tie, apart from punctuation."""
    match = _REPLY.fullmatch(reply.strip())
    if match is None:
        return None
    word = match["word"].lower()
    return "A" if word == "a" else "B" if word == "b" else "tie"


def _verdict(answer_first: str | None, answer_second: str | None) -> Verdict:
    if answer_first is None or answer_second is None:
        return "unparsed"
    gain = {"A": 1, "tie": 0, "B": -1}[answer_first] + {"B": 1, "tie": 0, "A": -1}[answer_second]
    if gain == 0:
        return "equal" if answer_first == "tie" else "contradictory"
    return "better" if gain > 0 else "worse"
