"""Text of answers, as the metrics compare and read it."""

from __future__ import annotations

import unicodedata


def normalize(answer: str) -> str:
    """Text for comparison: NFC, case-folded, whitespace collapsed, and one trailing full stop removed."""
    return " ".join(unicodedata.normalize("NFC", answer.casefold()).split()).removesuffix(".").rstrip()


_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u3001": ","}
)
_KEPT = ("<super>", "<sub>", "<fraction>")  # 10² is not 102


def to_ascii(answer: str) -> str:
    """Full-width and other compatibility forms, curly quotes and dashes as ASCII; superscripts and fractions stay."""
    if answer.isascii():
        return answer
    text = unicodedata.normalize("NFC", answer).translate(_ASCII)
    return "".join(
        each if each.isascii() or unicodedata.decomposition(each).startswith(_KEPT) else unicodedata.normalize("NFKC", each)
        for each in text
    )
