"""Metrics of closed questions: the letter of an option, yes or no, one of several labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from string import ascii_uppercase as LETTERS
from typing import Any

from mmtune.evaluation.metrics.answer_text import DENIAL, HEDGE, IGNORANCE, RETRACTION, is_question, normalize, plain, sentences
from mmtune.evaluation.metrics.metric import Item, Metric, precision_recall_f1

_NOUN = (
    r"(?:\b(?:answer|ans|option|choice|correct letter|guess|respuesta|opción|opção|alternativa"
    r"|réponse|antwort|risposta|resposta|antwoord|svar\w*|ответ)\b"
    r"|答案|正解|答え|选项|정답은?)"
)
_IS = r"(?:\b(?:is|es|est|ist|lautet|é|è|är|er|would be|should be|must be)\b|是|为|為|は|[:=])"
_ADVERB = r"(?:\b(?:most likely|likely|clearly|definitely|therefore|thus|option|choice)\b[\s:]*)*"
_LEAD = re.compile(
    rf"(?:(?:so|thus|therefore|hence)\b[,\s]*)?(?:(?!(?:yes|no)\b)(?:\w{{2,}}|I)[ \t]+){{0,3}}?{_NOUN}"
    rf"(?:\s+(?:option|choice))?\s*{_IS}?[\s:=-]*{_ADVERB}",
    re.IGNORECASE,
)
_LETTER = r"([A-Z])(?![^\W\u3040-\u9fff\uac00-\ud7af]|'\w)"
_LABEL = rf"[(\[{{\"']?{_LETTER}[)\]}}\"']?"
_SHORT = re.compile(r"[(\[{\"']?([A-Za-z])[)\]}\"']?[.:,]?")
_LEADING = re.compile(r"(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])(?:[)\].:,]+|\s+-\s))\s*(.+)", re.DOTALL)
_MARKED = re.compile(rf"(?<![^\W_])(?:[(\[]?{_LETTER}(?:[)\].:,]+\s*|\s+-\s+)|(?!A\s){_LETTER}\s+\(?)(?:(?i:an?|the)\s+)?")
_STATED = (
    re.compile(
        rf"(?:(?i:{_NOUN}\s*(?:(?:\w+\s+){{0,4}}?{_IS})?|\b(?:it|this|that)(?: is|'s| must be| would be)\b"
        rf"|\b(?:choose|pick|select|go with|I(?:'d| would) (?:say|answer))\b)|[选選])[\s:=-]*(?i:{_ADVERB}){_LABEL}"
        r"(?=\s*(?:[.,;:!)]|$|です|だ|입니다))"
    ),
    re.compile(rf"(?<!\w){_LABEL}(?i:\s+(?:is|must be)\s+(?:the\s+)?(?:\w+\s+)?(?:correct|right|best|answer|option|choice)\b)"),
    re.compile(
        rf"^(?i:(?:so|thus|therefore|hence|definitely|clearly|surely?|most likely|likely|probably|okay)\W+)?{_LABEL}[.,:!]?$"
    ),
)
_REASON = re.compile(r"(?<=.)[,;]?\s+(?:because|since|due to|as it|as the)\b", re.IGNORECASE)
_MENTION = re.compile(rf"(?<![^\W_])(?!A (?!(?:is|was|isn't|can|cannot|can't)\b)[a-z]|I\b){_LETTER}")
_DESCRIPTION = re.compile(r"(?:the|an?|it|its|this|that|there|in|on)\b", re.IGNORECASE)


class MultipleChoice(Metric):
    """The letter of the correct option, from an answer such as `B`, `(B)`, `B. cat`, `The answer is B` or `cat`."""

    def problem(self, item: Item) -> str | None:
        """At most 26 options; every reference must be a letter or the text of an option."""
        options = item.texts("options")
        if len(options) > len(LETTERS):
            return f"expected at most {len(LETTERS)} options, got {len(options)}"
        for reference in item.references:
            if _reference_letter(reference, options) is None:
                return f"expected the letter or the text of an option as reference, got {reference[:80]!r}"
        return None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer names no option, or several."""
        options = item.texts("options")
        letter = read_letter(item.prediction, options)
        return None if letter is None else float(letter in {_reference_letter(each, options) for each in item.references})

    def normalize_class(self, text: str) -> str:
        """The text in upper case."""
        return text.strip().upper()

    def answer_class(self, item: Item) -> str:
        """The letter of the option."""
        return str(read_letter(item.prediction, item.texts("options")))


def read_letter(answer: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the only option that an answer names; None if it names none or several, or denies or doubts it.

    An answer is a letter, the text of an option, both, or text that states a letter, such as `The answer is B because ...`.

    Args:
        options: texts of the options A, B, ..., at most 26; without them, any letter from A to Z is an option.
    """
    if len(options) > len(LETTERS):
        return None
    letters = LETTERS[: len(options)] if options else LETTERS
    texts = [normalize(plain(option)) for option in options]
    text = plain(answer)
    statement = _statement(text)
    whole = [letter for letter, option in zip(letters, options, strict=False) if normalize(option) == normalize(answer) != ""]
    whole = whole or [letter for letter, option in zip(letters, texts, strict=False) if option == normalize(statement) != ""]
    if match := _SHORT.fullmatch(statement):
        whole += [letter for letter in letters if letter == match[1].upper()]
    if whole:  # a letter that is also the text of another option names both
        return whole[0] if len(set(whole)) == 1 else None
    leading = _LEADING.fullmatch(statement)
    if leading and normalize(leading[3]) in texts:  # "B. cat", where cat may be another option
        letter = (leading[1] or leading[2]).upper()
        return letter if letter in letters and texts[letters.index(letter)] == normalize(leading[3]) else None
    return _stated_letter(text, letters, texts)


def _statement(text: str) -> str:
    """A text without `The answer is` at its start."""
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead and not (DENIAL.search(lead[0]) or HEDGE.search(lead[0])) else text


def _reference_letter(reference: str, options: Sequence[str]) -> str | None:
    """As `read_letter`, but a letter that is also the text of another option is the letter: data sets give labels."""
    letter = reference.strip()
    return letter if letter in tuple(LETTERS[: len(options) or len(LETTERS)]) else read_letter(reference, options)


def _stated_letter(text: str, letters: str, texts: Sequence[str]) -> str | None:
    """The letter that the sentences of an answer state, if no other one is stated, or mentioned without a denial."""
    if IGNORANCE.search(text) or RETRACTION.search(text):
        return None
    stated, mentioned, denied = set[str](), set[str](), set[str]()
    for index, sentence in enumerate(dropwhile(is_question, sentences(text))):
        claim, *reason = _REASON.split(" ".join(sentence.split()), maxsplit=1)
        if normalize(sentence) in texts:
            stated.add(letters[texts.index(normalize(sentence))])
            continue
        own, claim = _with_own_text(claim, letters, texts)
        own |= {match[1] for pattern in _STATED for match in pattern.finditer(claim)} & set(letters)
        if index == 0 and (leading := _LEADING.fullmatch(_statement(claim))) and _describes(leading, letters, texts):
            own.add(leading[1] or leading[2])
        others = [option for letter, option in zip(letters, texts, strict=False) if letter not in own]
        if own and (DENIAL.search(claim) or HEDGE.search(claim) or any(_contains(claim, option) for option in others)):
            return None
        stated |= own if not is_question(sentence) else set()
        for part in (claim, *reason):
            mentions = {match[1] for match in _MENTION.finditer(part)} & set(letters)
            (denied if DENIAL.search(part) else mentioned).update(mentions)
    return stated.pop() if len(stated) == 1 and not (mentioned - stated) and not (denied & stated) else None


def _with_own_text(claim: str, letters: str, texts: Sequence[str]) -> tuple[set[str], str]:
    """The letters with the text of their option beside them, as `(B) dog` or `dog (B)`; and the claim without these texts."""
    own = set()
    for letter, option in zip(letters, texts, strict=False):
        for match in _MARKED.finditer(claim):
            end = match.end() + len(option)
            if letter in match.groups() and claim[match.end() : end].casefold() == option and not claim[end : end + 1].isalnum():
                own.add(letter)
                claim = f"{claim[: match.start()]} {letter} {claim[end:]}"
                break
        start = claim.casefold().find(f"{option} ({letter.casefold()})")
        if option and start >= 0:
            own.add(letter)
            claim = f"{claim[:start]} {claim[start + len(option) :]}"
    return own, claim


def _describes(leading: re.Match[str], letters: str, texts: Sequence[str]) -> bool:
    """Whether the text after a label at the start describes its option: `B. The dog`; in `A. Lincoln` A may be part of a name."""
    letter, text = leading[1] or leading[2], leading[3]
    if letter not in letters or not texts:
        return letter in letters
    own, others = texts[letters.index(letter)], [option for option, each in zip(texts, letters, strict=True) if each != letter]
    if any(_contains(text, option) for option in others):
        return False
    is_part = _contains(own, text) and not any(_contains(option, text) for option in others)
    return _contains(text, own) or is_part or bool(leading[1] or _DESCRIPTION.match(text) or leading[0][1] in ")]:")


def _contains(text: str, phrase: str) -> bool:
    """Whether the words of a phrase are in a text, one after the other."""
    words = [" ".join(re.findall(r"[^\s.,;:!?()\[\]\"]+", each.casefold())) for each in (text, phrase)]
    return words[1] != "" and f" {words[1]} " in f" {words[0]} "


class YesNo(Metric):
    """Yes or no: the first word of the answer, also after a question or `Answer:`, or of its conclusion, `the answer is yes`."""

    def problem(self, item: Item) -> str | None:
        """Every reference must be yes or no."""
        wrong = [reference for reference in item.references if read_yes_no(reference) is None]
        return f"expected yes or no as reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer is neither yes nor no, or both."""
        answer = _read_item(item)
        return None if answer is None else float(answer in map(read_yes_no, item.references))

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`precision`, `recall` and `f1` of yes, and `yes_ratio`, the share of yes among all predictions.

        An unparsed answer is neither yes nor no: it lowers the recall of yes, and counts in the denominator of the ratio.
        """
        pairs = Counter((read_yes_no(item.references[0]), _read_item(item)) for item in items)
        said_yes = pairs["yes", "yes"] + pairs["no", "yes"]
        missed = pairs["yes", "no"] + pairs["yes", None]
        precision, recall, f1 = precision_recall_f1(pairs["yes", "yes"], pairs["no", "yes"], missed)
        return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": said_yes / len(items)} if items else {}

    def normalize_class(self, text: str) -> str:
        """Yes or no."""
        return read_yes_no(text) or text

    def answer_class(self, item: Item) -> str:
        """Yes or no."""
        return str(_read_item(item))


_FIRST = re.compile(r"[\"'(]*(yes|no)\b(?![-'/|])[\"')]*(.*)", re.IGNORECASE | re.DOTALL)
_CONCLUSION = re.compile(r"(?:.*\b(?:so|therefore|thus|hence)\b)?(.*)\banswer(?: is)?:?\s*\"?(yes|no)\b\W*$", re.IGNORECASE)
_OPPOSITES = {
    "yes": re.compile(r"(?<!\w)(?:no|nope|nah|nein|non|nee|nej|нет)(?!\w)|いいえ|不是|没有|否", re.IGNORECASE),
    "no": re.compile(r"(?<!\w)(?:yes|yeah|yep|yup|sí|sim|oui|ja|да)(?!\w)|はい|是的", re.IGNORECASE),
}
_ASIDE = re.compile(
    r"\b(?:has|have|had|having|with|wearing|(?<=\w{3} )and) no\b(?= \w{3})|(?<=\w), (?:and |but )?not (?:an?|the|in|on|at)\b"
)
_THING = re.compile(r"\b(?:an?|the|some|two|three|several|many|\d+)\s+\w+", re.IGNORECASE)
_NO_THING = re.compile(r"no (\w{3,})", re.IGNORECASE)
_MEANT = {  # after the word without a comma: `No is wrong`, `No clue what it is`
    "yes": re.compile(r"\?|\s+(?:is|isn't|was|wasn't|would|if|unless|when|only|or|and|but|man|for|in)\b", re.IGNORECASE),
    "no": re.compile(
        r"\?|[.:]?\s*\d|\s+(?:is|isn't|was|wasn't|would|if|unless|or|and|but|can|for|in|one|idea|clue|doubt|way|need|matter|wonder"
        r"|reason|(?:visible )?images?|pictures?|photos?|questions?|information|data|context|answers?|response"
        r"|longer|later|sooner|more|less|fewer)\b",
        re.IGNORECASE,
    ),
}
_ENGLISH = re.compile(
    r"\b(?:is|are|was|were|there|it|he|she|they|the|this|that|not|on|at|of|visible|present|does|any|from|seen)\b|\bin \w+|n't\b"
)


def read_yes_no(answer: str, question: str = "") -> str | None:
    """`yes` or `no`; None for an answer that states neither first nor as its conclusion, states both, or doubts or denies it.

    Args:
        question: with it, `No dog` is an answer to a question about a dog; `No comment` is not.
    """
    parts = sentences(plain(answer))
    questions = [*takewhile(is_question, parts)]  # the question that the answer repeats
    text = _statement("\n".join(parts[len(questions) :]))
    if len(questions) > 1 or any(map(_FIRST.match, questions)) or IGNORANCE.search(text) or RETRACTION.search(text):
        return None
    if match := _FIRST.match(text):
        word = match[1].lower()
        return word if (_means_yes(match[2]) if word == "yes" else _means_no(match[2], question)) else None
    if match := _CONCLUSION.match(text.rpartition("\n")[2]):
        word, others = match[2].lower(), re.sub(r"\bno (?=\w{3})", "", text[: -len(match[0])] + match[1])
        return None if _OPPOSITES[word].search(others) or DENIAL.search(match[1]) or HEDGE.search(match[1]) else word
    return None


def _read_item(item: Item) -> str | None:
    return read_yes_no(item.prediction, str(item.fields.get("question") or ""))


def _means_yes(rest: str) -> bool:
    """Whether the text after `yes` agrees with it."""
    first, *later = sentences(rest) or [""]
    if _MEANT["yes"].match(rest) or HEDGE.search(first) or DENIAL.search(_ASIDE.sub("", first)):
        return False
    for sentence in later:
        for match in _OPPOSITES["yes"].finditer(_ASIDE.sub("", sentence)):
            other = _NO_THING.match(sentence, match.start())  # "Yes, there is a dog. There is no cat."
            if not other or not _THING.search(first) or other[1].lower() in first.lower():
                return False
    return True


def _means_no(rest: str, question: str) -> bool:
    """Whether the text after `no` agrees with it. Without a comma it must be English: `no` is a word of other languages."""
    first = (sentences(rest) or [""])[0]
    if _MEANT["no"].match(rest) or HEDGE.search(first) or _OPPOSITES["no"].search(rest):
        return False
    if not re.match(r"[ \t]+\w", rest):
        return True
    phrase = re.split(r"[,;:]", first)[0].lower()
    asked = {word.removesuffix("s") for word in re.findall(r"\w+", question.lower())}
    return _ENGLISH.search(phrase) is not None or {word.removesuffix("s") for word in re.findall(r"\w+", phrase)} <= asked


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

    def answer_class(self, item: Item) -> str:
        """The label."""
        return str(_label(item.prediction, item.texts("choices")))


def _label(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer is; without choices, the normalized answer."""
    if not choices:
        return normalize(answer)
    return {normalize(choice): choice for choice in choices}.get(normalize(answer))


MULTIPLE_CHOICE = MultipleChoice(
    "multiple_choice",
    "the letter of the correct option",
    "defined by mmtune",
    unparsed="names no option, several options, or one that it denies or doubts",
    proportion=True,
)
YES_NO = YesNo(
    "yes_no",
    "yes or no; with precision, recall and F1 of yes, and the share of yes",
    "POPE (arXiv 2305.10355)",
    unparsed="neither begins with yes or no, nor ends with it after a question or `answer is`; or contradicts or doubts it",
    proportion=True,
)
CLASSIFICATION = Classification(
    "classification",
    "the right label; with macro F1 and the confusion matrix",
    "scikit-learn's accuracy_score and f1_score",
    unparsed="is none of the labels",
    proportion=True,
)
