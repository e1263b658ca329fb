"""The prediction for one question: an answer, and what it was chosen from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from mmtune.evaluation.answers import final_answer


@dataclass(frozen=True)
class Prediction:
    """The prediction for one question.

    Attributes:
        text: the answer; of several sampled answers, the most frequent one.
        near_tie: whether rounding could change it: the two largest logits of one of its tokens, or the log-likelihoods of the two
            most likely choices, differ by less than `NEAR_TIE`.
        answers: all answers if several were sampled.
        scores: the log-likelihood of each choice.
        tokens: the number of tokens of each choice, end of turn included.
    """

    text: str
    near_tie: bool = False
    answers: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


def vote(prediction: Prediction, marker: str | None) -> Prediction:
    """The prediction whose text is the most frequent of several answers; of equally frequent ones, the first.

    Answers are compared by the text after the last `marker`, without case and white space around words. Answers
    without it have no vote.
    """
    if not prediction.answers:
        return prediction
    finals = [(text, final_answer(text, marker)) for text in prediction.answers]
    votes = [(text, " ".join(final.casefold().split())) for text, final in finals if final is not None]
    if not votes:
        return replace(prediction, text=prediction.answers[0])
    [(winner, _)] = Counter(key for _, key in votes).most_common(1)  # of equal counts, the one counted first
    return replace(prediction, text=next(text for text, key in votes if key == winner))
