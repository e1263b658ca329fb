"""Text of answers, as the metrics compare and read it."""

from __future__ import annotations

import re
import unicodedata


def normalize(answer: str) -> str:
    """Text for comparison: NFC, case-folded, whitespace collapsed, and one trailing full stop removed."""
    return " ".join(unicodedata.normalize("NFC", answer.casefold()).split()).removesuffix(".").rstrip()


_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u2013": "-", "\u2014": " - "}
    | {"\u3001": ",", "\u3002": ". ", "\uff01": "! ", "\uff1f": "? ", "\uff1b": "; "}
)
_KEPT = ("<super>", "<sub>", "<fraction>")  # 10² is not 102


def to_ascii(answer: str) -> str:
    """Full-width and other compatibility forms, curly quotes, dashes and full stops as ASCII; superscripts and fractions stay."""
    if answer.isascii():
        return answer
    text = unicodedata.normalize("NFC", answer).translate(_ASCII)
    return "".join(
        each if each.isascii() or unicodedata.decomposition(each).startswith(_KEPT) else unicodedata.normalize("NFKC", each)
        for each in text
    )


_LATEX = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_PAIRED = (
    re.compile(r"(`{1,3})(?:\w+\n)?([^`]+)\1"),
    re.compile(r"(\${1,2})([^$\n]+)\1"),
    re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*]+?)(?<!\s)\1(?![\w*])"),
    re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])([^_]+?)(?<!\s)\1(?!\w)"),
)


def plain(answer: str) -> str:
    """Text for a parser: `to_ascii` without outer quotes, LaTeX's boxes, tags, and markup that is in pairs around words."""
    text = _LATEX.sub(r"\1", _LATEX.sub(r"\1", to_ascii(answer)))  # \boxed{\text{B}}
    for markup in _PAIRED:
        text = markup.sub(r"\2", text)
    return re.sub(r"\$(?=[A-Za-z(])|\\(?=[()\[\]])|</?[A-Za-z]\w*>", "", text).strip().strip("\"'").strip()


_SENTENCE_END = re.compile(r"(?<=[.!?;])(?<!^[A-Za-z]\.)\s+|\n+", re.MULTILINE)  # "B. dog" is one sentence


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [sentence for each in _SENTENCE_END.split(text) if (sentence := each.strip())]


def is_question(sentence: str) -> bool:
    """Whether a sentence ends with a question mark."""
    return sentence.endswith("?")


_DENIALS = """
    no not nor neither none nothing nobody never hardly lacks? absent nope nah avoid discard\\w* disagree
    cannot \\w*n't (?:ca|do|is|are|was|wo|does|did)nt wrong\\w* incorrect\\w* false untrue
    mistaken doubt\\w* except excluding exclude[sd]? eliminat\\w* rul(?:e|es|ed|ing)\\sout unlikely least reject\\w* distractors?
    (?:rather|other)\\sthan instead\\sof (?:any|every)thing\\sbut all\\sbut far\\sfrom
    nunca jamás falso excepto salvo menos tampoco equivocad\\w* descart\\w* elimin\\w*
    não nao nem errad\\w* incorret\\w* exceto non mai sbagliat\\w* errat\\w* tranne
    ne n'\\w* pas nein nee nej jamais aucun\\w* ni faux fausse sauf élimin\\w* nicht kein\\w* nie niemals weder falsch\\w* außer
    niet geen nooit fout onjuist\\w* behalve inte ej icke ingen inget aldrig fel utom ikke ikkje aldri feil
    не нет ни никогда неверн\\w* неправильн\\w* ошиб\\w* кроме değil bukan tidak không ليس नहीं
"""
DENIAL = re.compile(
    rf"(?<!\w)(?:{'|'.join(_DENIALS.split())})(?!\w)|[不没沒无無错錯误誤除未别違否]|非(?!常)|ない|ません|아니|않|틀린",
    re.IGNORECASE,
)
"""A word that denies, in the languages that models answer in."""

_KNOWN = r"(?:determine|tell|say|know|confirm|verify|answer|judge|assess|conclude|infer|sure|certain|clear|possible|enough)"
_NOT = r"(?:cannot|can\snot|not|unable\sto|\w*n't)"
_IGNORANCE = rf"""
    un(?:sure|certain|clear|known|decided) depend(?:s|ing)? insufficient ambiguous (?:hard|difficult|impossible)\sto\s{_KNOWN}
    {_NOT}(?:\s\w+)?\s{_KNOWN} {_NOT}\s(?:see|view|access|open)(?:\s(?:the|any|an|this|your))?\s(?:image|picture|photo)s?
    (?:no|without)\s(?:idea|clue|comment|doubt) no\s(?:image|picture|photo)(?:\s\w+)?\s(?:provided|attached|given|available)
    none\sof\s(?:the|these)\s(?:options|answers|choices) sé segur[oa] pued\w+ determinar sab(?:er|erlo|e|emos) imposible
    depende entiendo comprendo sicur[oa] posso dipende (?:non|lo)\sso imagen imágenes immagin[ei]
"""
IGNORANCE = re.compile(rf"(?<!\w)(?:{'|'.join(_IGNORANCE.split())})(?!\w)|不确定|不知道|わから|分から", re.IGNORECASE)
"""Words which say that the answer is not known."""

_HEDGES = r"""
    maybe perhaps possibly might could if unless otherwise either assuming provided\sthat
    as\slong\sas quizás? tal\svez talvez forse peut-être vielleicht
    misschien kanske måske kanskje возможно может
"""
HEDGE = re.compile(rf"(?<!\w)(?:{'|'.join(_HEDGES.split())})(?!\w)|也许|可能|かもしれ", re.IGNORECASE)
"""A word that leaves an answer open or makes it conditional."""

RETRACTION = re.compile(
    r"(?:^|[.!?;,\n]\s*)(?:wait|correction|scratch that|hold on|on second thought)\b|(?:[.!?;]\s+|\n\s*)(?:actually|sorry)\b"
    r"|(?:[.!?;]\s+|\n\s*)(?:no|nope|not|never)\s*(?:[.!,]|$)|\bmy mistake\b|\bi (?:was|am) (?:wrong|mistaken)\b"
    r"|(?:[.!?;]\s+|\n\s*)(?:that|this|it)(?:'s| is| was) (?:wrong|incorrect|false|not (?:right|correct|true|the answer))\b",
    re.IGNORECASE,
)
"""Words by which an answer takes back what it said before."""
