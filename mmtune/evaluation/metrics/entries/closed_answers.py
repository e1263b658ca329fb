"""Metrics of closed questions: the letter of an option, yes or no, one of several labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from mmtune.evaluation.metrics.answer_text import normalize
from mmtune.evaluation.metrics.entries.text_match import plain
from mmtune.evaluation.metrics.metric import Item, Metric, precision_recall_f1

_IS = r"(?:[:=]|\b(?i:is|es|est|ist|é|är|è|option|choice)\b|是|为|選|选)"
_DENIAL = re.compile(r"(?:\b(?:not|no|nicht|pas|nunca|neither|except)|n't|不|非)\s*$", re.IGNORECASE)
_LABEL = re.compile(r"(?<![^\W_])(?:[(\[]([A-Z])[)\]]|([A-Z])[.):,](?!\w))")
_ANSWER_IS = re.compile(
    r"(?:the )?(?:correct |right |best |final )?\b(?:answer|option|choice)\b(?: is|:)*\s*(?!(?:not|no)\b)", re.IGNORECASE
)
_SHORT = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_ENDING = re.compile(
    rf"{_IS}\s*[(\[]?([A-Z])[)\]]?(?=\s*(?:[.。!,;\n]|$|\b(?:because|since|is (?:the )?(?:correct|right|best))\b))"
)
_MENTION = re.compile(r"(?<![^\W_])(?!A [a-z]|I\b)([A-Z])(?![\w'])")
_LEADING = re.compile(r"[(\[]?([A-Za-z])(?:[)\]]|[.):,])+\s*(.+)", re.DOTALL)


class MultipleChoice(Metric):
    """The letter of the correct option, from an answer such as `B`, `(B)`, `B. cat`, `The answer is B` or `cat`."""

    def problem(self, item: Item) -> str | None:
        """Every reference must be a letter or the text of an option."""
        for reference in item.references:
            if read_letter(reference, item.texts("options")) is None:
                return f"expected the letter or the text of an option as reference, got {reference[:80]!r}"
        return None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer names no option, or several."""
        options = item.texts("options")
        letter = read_letter(item.prediction, options)
        return None if letter is None else float(letter in {read_letter(each, options) for each in item.references})

    def normalize_class(self, text: str) -> str:
        """The text in upper case."""
        return text.strip().upper()


def read_letter(answer: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the only option that an answer names; None if it names none or several, or denies it.

    Args:
        options: texts of the options A, B, ...; without them, any letter from A to Z is an option.
    """
    letters = LETTERS[: len(options)] if options else LETTERS
    text, texts = plain(answer), [normalize(plain(option)) for option in options]
    statement = _ANSWER_IS.sub("", text, count=1) if _ANSWER_IS.match(text) else text
    if match := _SHORT.fullmatch(statement):
        letter = match[1].upper()
        return letter if letter in letters else None
    if texts.count(normalize(statement)) == 1:
        return letters[texts.index(normalize(statement))]
    leading = _LEADING.fullmatch(statement)
    if leading and normalize(leading[2]) in texts:  # "B. cat", where cat may be another option
        letter = leading[1].upper()
        return letter if letter in letters and texts[letters.index(letter)] == normalize(leading[2]) else None
    labels = [match for match in _LABEL.finditer(text) if (match[1] or match[2]) in letters]
    if any(_DENIAL.search(text[max(0, match.start() - 20) : match.start()]) for match in labels):
        return None
    # "The answer is B": the letter ends its sentence.
    names = {match[1] or match[2] for match in labels} | {match[1] for match in _ENDING.finditer(text) if match[1] in letters}
    mentioned = {match[1] for match in _MENTION.finditer(text) if match[1] in letters}
    if len(names) != 1 or mentioned - names:
        return None
    return names.pop()


class YesNo(Metric):
    """Yes or no: the first word, the last word after a question or `answer is`, or the whole answer."""

    def problem(self, item: Item) -> str | None:
        """Every reference must be yes or no."""
        wrong = [reference for reference in item.references if read_yes_no(reference) is None]
        return f"expected yes or no as reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer is neither yes nor no, or both."""
        answer = read_yes_no(item.prediction)
        return None if answer is None else float(answer in map(read_yes_no, item.references))

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`precision`, `recall` and `f1` of yes, and `yes_ratio`, the share of yes among all predictions.

        An unparsed answer is neither yes nor no: it lowers the recall of yes, and counts in the denominator of the ratio.
        """
        pairs = Counter((read_yes_no(item.references[0]), read_yes_no(item.prediction)) for item in items)
        said_yes = pairs["yes", "yes"] + pairs["no", "yes"]
        missed = pairs["yes", "no"] + pairs["yes", None]
        precision, recall, f1 = precision_recall_f1(pairs["yes", "yes"], pairs["no", "yes"], missed)
        return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": said_yes / len(items)} if items else {}

    def normalize_class(self, text: str) -> str:
        """Yes or no."""
        return read_yes_no(text) or text


_YES_NO = re.compile(
    r"\"?(yes|no)\b(?!')(?!\s*(?:/|or\b|and\b)\s*(?:yes|no)\b)(?!\s+(?:one|idea|way|problem)\b)(?!.*[.!?]\s*(?:yes|no)\W*$)",
    re.IGNORECASE | re.DOTALL,
)
_CONCLUSION = re.compile(r"\banswer(?: is)?:?\s*\"?(yes|no)\"?[.!]?$", re.IGNORECASE)


def read_yes_no(answer: str) -> str | None:
    """`yes` or `no`; None for an answer that does not begin with one of them, also after a question, or conclude with it."""
    text = plain(answer)
    match = _YES_NO.match(text) or _YES_NO.match(text.rpartition("?")[2].lstrip()) or _CONCLUSION.search(text)
    return match[1].lower() if match else None


class Classification(Metric):
    """The label of the row, among the labels in `choices` where the row gives them."""

    def problem(self, item: Item) -> str | None:
        """Every reference must be one of the row's choices."""
        choices = item.texts("choices")
        wrong = [reference for reference in item.references if choices and _label(reference, choices) is None]
        return f"expected a reference among the choices ({', '.join(choices)[:200]}), got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer is not one of the choices."""
        choices = item.texts("choices")
        label = _label(item.prediction, choices)
        return None if label is None else float(label in {_label(reference, choices) for reference in item.references})

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`macro_f1`, the mean F1 of all labels in references and predictions; `confusion`, counts by reference and prediction.

        An unparsed answer is in no label's predictions; in `confusion` it is the label `unparsed`.
        """
        pairs: Counter[tuple[str, str | None]] = Counter()
        for item, score in zip(items, scores, strict=True):
            choices = item.texts("choices")
            predicted = None if score is None else _label(item.prediction, choices)
            pairs[_label(item.references[0], choices) or "", predicted] += 1
        labels = sorted({label for pair in pairs for label in pair if label is not None})
        f1 = []
        for label in labels:
            guesses = sum(count for (_, prediction), count in pairs.items() if prediction == label)
            actual = sum(count for (reference, _), count in pairs.items() if reference == label)
            right = pairs[label, label]
            f1.append(precision_recall_f1(right, guesses - right, actual - right)[2])
        confusion: dict[str, dict[str, int]] = {}
        for (reference, prediction), count in sorted(pairs.items(), key=lambda pair: (pair[0][0], pair[0][1] or "")):
            confusion.setdefault(reference, {})["unparsed" if prediction is None else prediction] = count
        return {"macro_f1": sum(f1) / len(f1), "confusion": confusion} if labels else {}

    def normalize_class(self, text: str) -> str:
        """The text as it is compared."""
        return normalize(text)


def _label(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer is; without choices, the normalized answer."""
    if not choices:
        return normalize(answer)
    return {normalize(choice): choice for choice in choices}.get(normalize(answer))


MULTIPLE_CHOICE = MultipleChoice(
    "multiple_choice",
    "the letter of the correct option",
    "defined by mmtune",
    unparsed="names no option, several options, or denies one",
    proportion=True,
)
YES_NO = YesNo(
    "yes_no",
    "yes or no; with precision, recall and F1 of yes, and the share of yes",
    "POPE (arXiv 2305.10355)",
    unparsed="neither begins with yes or no, nor ends with it after a question or `answer is`",
    proportion=True,
)
CLASSIFICATION = Classification(
    "classification",
    "the right label; with macro F1 and the confusion matrix",
    "scikit-learn's accuracy_score and f1_score",
    unparsed="is none of the labels",
    proportion=True,
)
