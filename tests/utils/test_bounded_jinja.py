"""Bounded Jinja: hostile templates stop with an error, and other templates have the output of plain Jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mmtune.chat_templates.jinja_rendering import ChatTemplateError, render_template
from mmtune.chat_templates.rendering import render_text
from mmtune.chat_templates.resolving import TEMPLATES, resolve_chat_template
from mmtune.data.message import RowError
from mmtune.data.templates.expressions import check_jinja, evaluate_expression, render_expression
from mmtune.utils import bounded_jinja
from mmtune.utils.errors import UserError

WORDS = [f"w{number}" for number in range(100)]
ROW: dict[str, Any] = {"words": WORDS, "wide": 10**9}
NESTED = "{% set a = (1,) %}{% set b = (1,) %}" + "{% set a = (a, a) %}{% set b = (b, b) %}" * 60
"""Two tuples of 60 levels, each of which holds the next twice: to write or compare one takes 2^60 steps."""
LONG = "{% set s = 'x' * 9000000 %}"


def loops(body: str, depth: int = 5) -> str:
    return "{% for w in words %}" * depth + body + "{% endfor %}" * depth


HOSTILE = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ [0] * 10**10 }}",
    "{{ 2**(10**9) }}",
    "{{ 9**(9**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (wide, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "{{ '%% %s %-+1000000000d' % (1, 1) }}",
    "{{ '{:1{}0}'.format(1, 100000000) }}",
    NESTED + "{{ '%*d' % a }}",
    "{{ words * 9999999 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, wide) }}",
    "{{ '{:{w}}'.format_map({'w': wide}) }}",
    "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
    "{{ ('{:1000000000}' | attr('format'))(1) }}",
    "{{ 'x'.center(wide) }}",
    "{{ 'x'.ljust(width=wide) }}",
    "{{ 'x'.rjust(wide) }}",
    "{{ '1'.zfill(wide) }}",
    "{{ ('\\t' * 1000).expandtabs(10**8) }}",
    "{{ 'x' | center(wide) }}",
    "{{ words | map('center', wide) | list }}",
    "{{ 'x' | indent(wide, true) }}",
    "{{ words | batch(wide, 'x') | list }}",
    "{{ words | slice(wide) | list }}",
    "{{ words | tojson(indent=wide) }}",
    "{{ 1 | round(wide, 'ceil') }}",
    "{{ (5).to_bytes(wide, 'big') }}",
    "{{ ('a' * 3000000) | replace('a', 'b' * 3000) }}",
    "{{ ('a' * 30000).replace('a', 'b' * 30000) }}",
    "{{ 'a'.translate({97: 'b' * 1000000}).translate({98: 'c' * 1000000}) }}",
    "{{ ('x' * 5000).join('y' * 1000000) }}",
    "{{ ('x' * 5000000) | join('y' * 1000000) }}",
    "{{ (['a'] * 100000) | sum(start=[]) }}",
    "{{ ('<!---->' * 100000) | striptags }}",
    "{{ ('<!---->' * 100000) | safe | striptags }}",
    "{{ ('a' * 1000000) | wordwrap(1) }}",
    "{{ ('w' * 1000000) | urlize }}",
    "{{ ('a' * 1000000) | list | commonest }}",
    loops("x"),
    loops("{{ w }}"),
    loops("{% for w in words if false %}{% endfor %}"),
    LONG + loops("{{ s }}"),
    LONG + loops("{{ s[1:] | length }}"),
    LONG + loops("{{ s.upper() | length }}"),
    LONG + loops("{{ s ~ s }}"),
    LONG + loops("{% if 'y' in s %}{% endif %}"),
    LONG + loops("{% set t %}{{ s }}{% endset %}"),
    loops("y" * 10_000),
    "{% for w in words recursive %}{{ loop(words) }}{% endfor %}",
    "{% set s = 'x' * 100 %}" + "{% set s = s ~ s %}" * 40 + "{{ s | length }}",
    "{% set s = 'x' * 100 %}" + "{% set s = s + s %}" * 40 + "{{ s | length }}",
    "{% set s = 'x' * 100 %}" + "{% set s = '%s%s' % (s, s) %}" * 40 + "{{ s | length }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    NESTED + "{{ a | string }}",
    NESTED + "{{ a ~ '' }}",
    NESTED + "{{ '%s' % (a,) }}",
    NESTED + "{{ a == b }}",
    NESTED + "{{ a is eq(b) }}",
    NESTED + "{{ a in [b] }}",
    NESTED + "{{ a | tojson }}",
    NESTED + "{{ {a: 1} }}",
    NESTED + "{{ words[a] }}",
    NESTED + "{{ {'a': a}.items() ~ '' }}",
    NESTED + "{{ [a, b] | unique | list }}",
    "{{ 1e400 }}",
    "{{ 1 // 0 }}",
    "{% include 'x' %}",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_data_template_is_an_error_with_its_line(template: str) -> None:
    check_jinja(template)
    begun = "MemoryError"  # the work is counted before it is begun
    with pytest.raises(RowError, match=rf"^r: messages\[0\]: the template fails at line 3: (?!{begun}).{{1,400}}$"):
        render_expression("r", "messages[0]", f"\n\n{template}", ROW, ROW)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("template", ["{{ 'x' * 10**10 }}", "{{ words * wide }}", "{{ words | batch(wide, 'x') }}"])
def test_the_value_of_an_expression_is_bounded(template: str) -> None:
    with pytest.raises(RowError, match=r"^r: boxes: the template fails at line 1: it does more work") as failed:
        evaluate_expression("r", "boxes", template, ROW, ROW)
    assert failed.value.issue == "template_fails"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{% if " + "not " * 5000 + "a %}{% endif %}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 5000 + " }}",
    ],
    ids=["parentheses", "brackets", "not", "loops", "digits"],
)
def test_compile_errors_are_reported(template: str) -> None:
    with pytest.raises(ValueError, match=r"^not valid Jinja.{1,700}$"):
        check_jinja(template)
    with pytest.raises(ChatTemplateError, match=r"^the chat template is not valid Jinja.{1,400}$"):
        render_text([], template, _tokenizer())


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% set ns = namespace(s='x' * 1000) %}{% for a in range(99999) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = dict(a=ns, b=ns.l) %}{% endfor %}{{ ns ~ '' }}",
        "{% for a in range(99999) %}{% generation %}" + "y" * 1000 + "{% endgeneration %}{% endfor %}",
        "{% set d = dict(a='{:1000000000}') %}{{ d.a.format(1) }}",
        "{{ messages | tojson(indent=1000000000) }}",
    ],
)
def test_a_hostile_chat_template_is_an_error_with_its_line(template: str) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    with pytest.raises(ChatTemplateError, match="the chat template fails on this conversation at line 2: it does more work"):
        render_text(talk, f"\n{template}", _tokenizer())


def test_a_hostile_chat_template_is_named_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("<image>\n{{ 'x' * 10**10 }}")
    with pytest.raises(UserError, match=r"model\.chat_template: .*mine\.jinja: .* fails on this conversation at line 2"):
        resolve_chat_template(str(file), _tokenizer())


def test_more_input_allows_more_work() -> None:
    row = {"words": ["w" * 60_000] * 200}
    assert render_expression("r", "m", "{% for w in words %}{{ w | upper }}{% endfor %}", row, row) == "W" * 12_000_000


HONEST = [
    "{{ '5551234567 or 99999999999: %s, %%, %5.2f, %(a)s' | replace('%(a)s', '') % ('x', 2.5) }}",
    "{{ '%(a)s 9999999999' % {'a': 1} }}",
    "{{ '9999999999 {} {:>4} {a[0]} {{}}'.format(1, 'x', a=[2]) }}",
    "{{ 'a' ~ 1 ~ none ~ 2.5 }}|{{ 3 * 'ab' }}|{{ 7 // 2 }}|{{ 2 ** 10 }}|{{ 7 % 3 }}|{{ '%05.1f' % 2.25 }}|{{ -5 % 3 }}",
    "{% for w in words if w != 'w3' %}{{ loop.index }}/{{ loop.length }}:{{ w }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for w in words[::-1][:5] %}{{ loop.cycle('a', 'b') }}{{ loop.changed(w) }}{{ w[1:] }}{% else %}none{% endfor %}",
    "{{ words | map('upper') | join('-') }} {{ words | select('in', ['w1']) | list }} {{ words | batch(30) | list | length }}",
    "{{ words | sort(reverse=true) | first }} {{ words | length }} {{ words | last }} {{ words | reverse | list | first }}",
    "{{ '{:>6}|{a!r}'.format('x', a=[1]) }} {{ 'a,b'.split(',') }} {{ 'abc'.replace('b', 'xy') }} {{ 'x'.center(5) }}",
    "{{ talk | tojson }} {{ talk | selectattr('role', 'equalto', 'user') | map(attribute='text') | list }}",
    "{% macro say(who, n=2) %}{{ who * n }}{{ caller() if caller else '' }}{% endmacro %}{% call say('z') %}!{% endcall %}",
    "{% set t %}{{ words[0] }}{% endset %}{% filter upper %}{{ t }}{% endfilter %}{{ '<b>x</b> y' | striptags | wordwrap(3) }}",
    "{{ talk | groupby('role') | map(attribute=0) | list }}",
    "{{ [1, 2] | sum }} {{ [[1], [2]] | sum(start=[]) }} {{ 2.5 | round }}",
    "{{ 'w1' in words }} {{ words == words }} {{ 1 < 2 < 3 }}",
    "{{ {'a': 1}['a'] }} {{ {'a': 1, 2: 3} | items | list }} {{ wide is number }}",
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}{{ words | random in words }}{{ x | default('d') }}",
]


@pytest.mark.parametrize("template", HONEST)
def test_a_harmless_template_gives_the_output_of_plain_jinja(template: str) -> None:
    values = {**ROW, "talk": [{"role": "user", "text": "a\u00e9"}, {"role": "assistant", "text": "b"}]}
    ours = bounded_jinja.BoundedEnvironment()
    ours.bound()
    written = "".join(bounded_jinja.render_bounded(ours.from_string(template), values))
    assert written == ImmutableSandboxedEnvironment().from_string(template).render(values)


def test_errors_are_those_of_jinja() -> None:
    ours = bounded_jinja.BoundedEnvironment(undefined=StrictUndefined)
    ours.bound()
    theirs = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    for template in ("{{ nothing }}", "{{ words.__class__ }}", "{{ words.append(1) }}", "{{ words + 'x' }}", "{{ 'x' | nope }}"):
        faults = []
        for write in (
            lambda env, t: "".join(bounded_jinja.render_bounded(env.from_string(t), ROW)),
            lambda env, t: env.from_string(t).render(ROW),
        ):
            with pytest.raises((TemplateError, TypeError)) as caught:
                write(ours if not faults else theirs, template)
            faults.append((caught.type, str(caught.value)))
        assert faults[0] == faults[1]


def _published() -> list[Path]:
    return sorted([*TEMPLATES.glob("*.jinja"), *(Path(trl.__file__).parent / "chat_templates").glob("*.jinja")])


@pytest.mark.parametrize("file", _published(), ids=lambda file: file.stem)
def test_chat_templates_give_the_output_of_transformers(file: Path) -> None:
    """The texts, the spans of `{% generation %}`, and the words of a refusal."""
    template, tokenizer = file.read_text("utf-8"), _tokenizer()
    talks: list[list[dict[str, Any]]] = [
        [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=False)]
        for contents in (
            ["Hello", "Hi", "Again?", "<think>\nhm\n</think>\n\nYes"],
            [[{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}], [{"type": "text", "text": "A cat."}]],
        )
    ]
    for talk in [*talks, [{"role": "system", "content": "Be brief."}, *talks[0]]]:
        for prompt in (False, True):
            settings: dict[str, Any] = dict(tokenizer.special_tokens_map)
            try:
                texts, spans = render_jinja_template(
                    [talk],
                    chat_template=template,
                    return_assistant_tokens_mask="endgeneration" in template,
                    add_generation_prompt=prompt,
                    **settings,
                )
            except (TemplateError, TypeError, ValueError, LookupError) as error:
                with pytest.raises(ChatTemplateError, match=r"^the chat template ") as caught:
                    render_template(talk, template, tokenizer, prompt)
                assert str(error)[:200] in str(caught.value)
            else:
                assert render_template(talk, template, tokenizer, prompt) == (texts[0], spans[0] if spans else [])


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "x": 2}, "x")), bos_token="<s>", eos_token="</s>"
    )
