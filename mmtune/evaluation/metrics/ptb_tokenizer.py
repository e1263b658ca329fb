"""Penn Treebank tokenization of captions, as the published scorers of COCO captions do it.

They run the Java program PTBTokenizer of Stanford CoreNLP 3.4.1 with `-preserveLines -lowerCase`, and remove punctuation. The
rules here were found by comparing outputs with that program; the abbreviations by asking it about every text of up to five
letters. Each text is tokenized alone. `tests/evaluation/metrics/write_scorer_fixtures.py` repeats the comparison.
"""

from __future__ import annotations

from functools import lru_cache

import regex

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that the scorers remove. Brackets are lower case by then, and stay: `-lrb-`."""

_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie "
    "cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov "
    "govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut ltd maj mar md messrs mfg mich minn mlle mme mo "
    "mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte pptes ppty pptys pres prof profs pte "
    "ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs "
    "treas tue tues univ va vs vt wed wis wisc wm wyo"
).replace(" ", "|")
_NUMBERED = "art|ca|fig|figs|no|nos|op|pp|prop"
_STARTERS = (
    "a about according additionally after an as at but earlier he her here however if in it last many more now once one "
    "other our she since so some such that the their then there these they this we what when while yet you"
).replace(" ", "|")
_NO_SENTENCE = rf"(?!\s+(?=(?-i:\p{{Lu}}))(?:{_STARTERS})\s)"
_END = r"(?![\p{L}\p{N}])"
_QUOTE = "['\u2019]"
_WORD = r"[\p{L}\p{M}\p{Nd}]+"
_DOMAINS = "com|net|org|edu|gov|mil|uk|us"

_RULES = tuple(
    regex.compile(rule, regex.IGNORECASE)
    for rule in (
        r"</?[a-z!][\w:.-]*(?:\s+[a-z][\w-]*(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s<>\"']+))?)*\s*/?>",
        r"https?://[^\s\"<>|()]+[^\s\"<>|().!?,:;]",
        rf"(?:www\.)?(?:[\p{{L}}\p{{N}}_-]+\.)+(?:{_DOMAINS}){_END}",
        r"<?[a-z0-9][^\s\"<>|(){}]{0,99}@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.,!?]+>?",
        r"[@#]\p{L}[\p{L}\p{N}_]*",
        # Words before a clitic, and clitics. Where a rule has the group `t`, that is the token.
        rf"(?P<t>can)not{_END}|(?P<t>go[nt]|wan|lem|gim)(?:na|ta|me){_END}|(?P<t>more|less){_QUOTE}n{_END}",
        rf"(?P<t>{_QUOTE}t)(?:is|was){_END}|{_QUOTE}n{_QUOTE}|{_QUOTE}n{_END}",
        rf"(?P<t>{_WORD}?)n{_QUOTE}t|n{_QUOTE}t{_END}",
        rf"(?P<t>{_WORD}(?:[-/]{_WORD}){{0,9}}){_QUOTE}(?:[smd]|re|ve|ll){_END}",
        rf"(?P<t>(?:\p{{L}}\.)+){_QUOTE}s{_END}",
        rf"(?P<t>y{_QUOTE})all{_END}",
        rf"{_QUOTE}(?:[smd]|re|ve|ll){_END}",
        rf"{_QUOTE}(?:em|til|till|cause){_END}|{_QUOTE}\d\ds?(?![\p{{L}}\p{{N}}'-])",
        rf"(?:[ldojn]|qu){_QUOTE}\p{{L}}{{2,}}",
        # Numbers and words.
        r"[-+]?\p{Nd}*(?:[.:,]\p{Nd}+)+",
        r"[-+]?\p{Nd}+",
        r"\p{Nd}+\s\p{Nd}{1,2}/\p{Nd}{1,2}",
        r"\(\p{Nd}{2,3}\)\s?\p{Nd}{3}-\p{Nd}{4}",
        rf"{_WORD}(?:-{_WORD})*(?:/{_WORD}(?:-{_WORD})*){{0,2}}",
        rf"{_WORD}(?:[.,]{_WORD})+(?:-{_WORD})+",
        rf"{_WORD}(?:_{_WORD})+",
        r"\p{L}[\p{L}\p{Nd}]*(?:\.\p{L}[\p{L}\p{Nd}]*)+",
        r"(?-i:\p{Lu}+&\p{Lu}+)",
        rf"\p{{L}}\.{_NO_SENTENCE}",
        rf"(?:\p{{L}}\.){{2,}}(?:-{_WORD}(?:-{_WORD})*)?|{_WORD}-(?:\p{{L}}\.){{2,}}",
        rf"(?:{_ABBREVIATIONS})\.",
        rf"(?:{_NUMBERED})\.(?=\s*\p{{Nd}})",
        rf"\p{{L}}[\p{{L}}\p{{Nd}}]*(?:-{_WORD})*\.(?=[,;:])",
        r"ph\.d\.|c\+\+|c#",
        # Symbols.
        r"\.(?:\.\.+|(?: \.){2,})",
        rf"[!?]+|-{{2,}}|\*+|_+|#+|``|''|[:;=]-?[()]|[:;=]-?[dp]{_END}",
        r"(?:us|a|c|nz|hk)?\$",
        r".",
    )
)
_PLAIN = regex.compile(r"(?!(?:cannot|gonna|gotta|wanna|lemme|gimme)\b)[a-z]+(?=\s|$)", regex.IGNORECASE)
"""A word that no other rule matches: most words of a caption."""

_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&nbsp;": " "}
_ASCII = str.maketrans(
    {
        "\ufe0f": None,  # the emoji form of a character
        "\u2026": " ... ",
        "\u2013": " -- ",
        "\u2014": " -- ",
        "\u201c": ' " ',
        "\u201d": ' " ',
        "\u00bd": " 1/2 ",
        "\u00bc": " 1/4 ",
        "\u00be": " 3/4 ",
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELLINGS = {**_BRACKETS, '"': "''", "\u2018": "`", "\u00a3": "#", "\u20ac": "$", "\u00a2": "cents"}


@lru_cache(maxsize=1 << 16)
def ptb_tokens(text: str) -> tuple[str, ...]:
    """The lower-case tokens of a caption, without punctuation."""
    return tuple(token for token in _tokenize(text) if token not in PUNCTUATION)


def _tokenize(text: str) -> list[str]:
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = text.translate(_ASCII)
    tokens, position = [], 0
    while position < len(text):
        if text[position].isspace() or text[position] > "\uffff":
            position += 1
            continue
        if plain := _PLAIN.match(text, position):
            tokens.append(plain[0].lower())
            position = plain.end()
            continue
        matches = [match for rule in _RULES if (match := rule.match(text, position))]
        longest = max(matches, key=lambda match: match.end())
        token = longest.groupdict().get("t") or longest[0]
        tokens.append(_spelling(token))
        position += len(token)
    return tokens


def _spelling(token: str) -> str:
    token = token.lower()
    if token.startswith(".") and set(token) <= {".", " "}:
        return "..." if len(token) > 1 else token
    if token.startswith("--") and set(token) == {"-"}:
        return "--"
    if token in _SPELLINGS:
        return _SPELLINGS[token]
    if regex.fullmatch("\u2019[a-z]*|n\u2019t", token):
        token = token.replace("\u2019", "'")
    return "".join(_BRACKETS.get(character, character) for character in token).replace(" ", "\u00a0")
