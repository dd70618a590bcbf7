"""Chat templates: what Hugging Face gives them, and what a hostile or broken one cannot do."""

from __future__ import annotations

import pytest

from headrace.errors import TokenizerError
from headrace.text.template import ChatTemplate

TALK = [{"role": "user", "content": "hi"}]


def render(source: str, **marks: object) -> str:
    return ChatTemplate(source).render(TALK, ask=True, marks=marks)


# As transformers: each with the text that it gives, worked out by hand.
RENDERED = {
    "tools and documents are there, and nothing": (
        "{{ tools is defined }} {{ tools is none }} {{ documents is none }}{% if tools %}!{% endif %}",
        "True True True",
    ),
    "marks that the vocabulary lacks are undefined": ("{{ pad_token is defined }}[{{ pad_token }}]", "False[]"),
    "json": ("{{ {'b': '<百>', 'a': [1]} | tojson }}", '{"b": "<百>", "a": [1]}'),
    "json, sorted and indented": ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}",
                                  '{\n "a": 2,\n "b": 1\n}'),
    "indent": ("{{ 'a\\nb' | indent(2) }}", "a\n  b"),
    "indent by text": ("{{ 'a\\nb' | indent('> ', first=true) }}", "> a\n> b"),
    "wordwrap": ("{{ 'the river runs' | wordwrap(9) }}", "the river\nruns"),
    "center": ("[{{ 'a' | center(5) }}]", "[  a  ]"),
    "format": ("{{ '%s-%03d' | format('a', 7) }}", "a-007"),
    "other filters": (
        "{{ ['b', 'a'] | sort | join('+') }} {{ 'x' | default('y') }} {{ none | default('y', true) }} "
        "{{ [{'n': 1}, {'n': 2}] | map(attribute='n') | sum }} {{ 'ab' | replace('a', 'cc') | upper }}",
        "a+b x y 3 CCB",
    ),
    "joined": ("{{ 'a' ~ 1 ~ none }}", "a1None"),
    "joiner and cycler": (
        "{% set j = joiner(',') %}{% set c = cycler('x', 'y') %}"
        "{% for i in range(3) %}{{ j() }}{{ c.next() }}{% endfor %}",
        "x,y,x",
    ),
    "a namespace and a macro": (
        "{% macro twice(t) %}{{ t }}{{ t }}{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ twice(ns.n) }}",
        "22",
    ),
    "a loop's own names": (
        "{% for i in [1, 2, 3] %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }} {% endfor %}",
        "0False3 1False3 2True3 ",
    ),
    "a loop that goes down a tree": (
        "{% for i in [[1, [2, 3]], 4] recursive %}{% if i is iterable %}({{ loop(i) }}){% else %}{{ i }}{% endif %}"
        "{% endfor %}",
        "(1(23))4",
    ),
    "a loop with a test, left early": (
        "{% for i in range(9) if i % 2 %}{% if i > 5 %}{% break %}{% endif %}{{ i }}{% endfor %}", "135",
    ),
    "nothing to loop over": ("{% for i in nothing %}{{ i }}{% else %}none{% endfor %}", "none"),
    "what is marked for training": ("{% generation %}{{ 'a' }}{% endgeneration %}b", "ab"),
    "blocks take no lines": ("{% if true %}\n  {% set x = 1 %}\nok\n{% endif %}\n", "ok\n"),
}  # fmt: skip


@pytest.mark.parametrize("what", RENDERED)
def test_what_templates_can_use(what: str) -> None:
    source, expected = RENDERED[what]
    assert render(source) == expected


def test_every_standard_filter_is_there() -> None:
    from jinja2.filters import FILTERS

    from headrace.text.sandbox import UNWANTED, SandboxEnvironment

    assert SandboxEnvironment().filters.keys() == FILTERS.keys() - set(UNWANTED)


def test_the_date_and_the_marks() -> None:
    assert render("{{ strftime_now('%Y')[:2] }}{{ bos_token }}", bos_token="<s>") == "20<s>"


HOSTILE = {
    "says no": ("{{ raise_exception('Roles\n must alternate') }}", "Roles must alternate"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "changes its input": ("{{ messages.append(1) }}", "unsafe|not safely"),
    "counts far": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "take more than 300000 steps",
    ),
    "counts too far": ("{{ range(10**9) }}", "powers are not allowed"),
    "repeats": ("{{ 'a' * 999999999 }}", "repeats something"),
    "repeats a list": ("{{ 999999999 * [1] }}", "repeats something"),
    "pads": ("{{ 'a'.ljust(999999999) }}", "pads text"),
    "pads by keyword-like method": ("{{ 'a'.zfill(999999999) }}", "pads text"),
    "formats": ("{{ '%999999999d' % 1 }}", "width in its format"),
    "formats otherwise": ("{{ '{:999999999}'.format(1) }}", "width in its format"),
    "formats by argument": ("{{ '{:{}}'.format(1, 999999999) }}", "width in its format"),
    "formats a number by argument": ("{{ '%*d' % (999999999, 1) }}", "width in its format"),
    "replaces": (
        "{% set ns = namespace(t='a' * 100000) %}{{ ns.t.replace('a', ns.t) }}",
        "makes more than",
    ),
    "replaces by filter": (
        "{% set ns = namespace(t='a' * 100000) %}{{ ns.t | replace('a', ns.t) }}",
        "makes more than",
    ),
    "doubles": (
        "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "makes more than",
    ),
    "doubles by joining": (
        "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "makes more than",
    ),
    "doubles by blocks": (
        "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set t %}{{ ns.t }}{{ ns.t }}{% endset %}"
        "{% set ns.t = t %}{% endfor %}",
        "makes more than",
    ),
    "doubles a list": (
        "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "makes more than",
    ),
    "joins": ("{% set t = 'a' * 1000000 %}{{ t.join([t] * 100000) }}", "makes more than"),
    "joins by filter": ("{% set t = 'a' * 1000000 %}{{ ([t] * 1000000) | join(t) }}", "makes more than"),
    "joins long texts": ("{% set t = 'a' * 1000000 %}{{ ([t] * 1000000) | join }}", "makes more than"),
    "joins long texts by method": ("{% set t = 'a' * 1000000 %}{{ ''.join([t] * 1000000) }}", "makes more than"),
    "writes a list of long texts": ("{% set t = 'a' * 1000000 %}{{ [t] * 1000000 }}", "makes more than"),
    "writes a list of lists of lists": (
        "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
        "makes more than",
    ),
    "translates": ("{% set t = 'a' * 1000000 %}{{ t.translate({97: t}) }}", "pads text"),
    "pads by filter": ("{{ 'a' | center(999999999) }}", "pads text"),
    "indents": ("{{ 'a\\nb' | indent(999999999) }}", "pads text"),
    "formats by filter": ("{{ '%999999999d' | format(1) }}", "width in its format"),
    "loops over long lists": (
        "{% for i in [1] * 1000000 %}{% for j in [1] * 1000000 %}{% endfor %}{% endfor %}",
        "more than",
    ),
    "calls itself": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
    "calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "more than",
    ),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "misses a name": ("{{ nothing.at.all }}", "nothing"),
    "multiplies": ("{% set ns = namespace(n=9999999999) %}{{ ns.n * ns.n * ns.n * ns.n }}", "numbers are too large"),
    "wraps": ("{{ ('a ' * 10000) | wordwrap(1, true, 'b' * 100000) }}", "pads text"),
    "wraps much": ("{{ ('a' * 1000000) | wordwrap(1) }}", "wraps more than"),
    "compares lists that are in themselves often": (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
        "makes more than",
    ),
    "hashes such a list": (
        "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}"
        "{{ {ns.a: 1} | length }}",
        "makes more than",
    ),
    "makes it of a macro's arguments": (
        "{% set ns = namespace(a=(1,)) %}{% macro f() %}{% set ns.a = varargs %}{% endmacro %}"
        "{% for i in range(60) %}{{ f(ns.a, ns.a) }}{% endfor %}{{ {ns.a: 1} | length }}",
        "makes more than",
    ),
    "makes it of a call's arguments": (
        "{% set ns = namespace(a={'x': 1}, b={'x': 1}) %}{% for i in range(60) %}{% set ns.a = dict(x=ns.a, y=ns.a) %}"
        "{% set ns.b = dict(x=ns.b, y=ns.b) %}{% endfor %}{{ ns.a == ns.b }}",
        "makes more than",
    ),
    "makes it by a filter": (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = (ns.a * 2) | batch(9) | list %}"
        "{% set ns.b = (ns.b * 2) | batch(9) | list %}{% endfor %}{{ ns.a == ns.b }}",
        "(makes|takes) more than",
    ),
    "hashes what is too deep": (
        "{% set ns = namespace(a=()) %}{% for i in range(99999) %}{% set ns.a = (ns.a,) %}{% endfor %}"
        "{% for i in range(99999) %}{% set ns.a = (ns.a,) %}{% endfor %}{{ {ns.a: 1} | length }}",
        "lists into lists",
    ),
    "searches long lists in a filter": (
        "{% set t = range(99999) | list %}{{ t | select('in', t | reverse | list) | list | length }}",
        "more than",
    ),
    "adds up lists": ("{{ ([[1]] * 99999) | sum(start=[]) }}", "adds up what are no numbers"),
    "adds up lists by place": ("{{ ([[1]] * 99999) | sum(none, []) }}", "adds up what are no numbers"),
    "reads a long number": ("{{ ('f' * 1000000) | int(0, 16) // 3 }}", "numbers are too large"),
    "spells a long number": ("{{ 0x" + "f" * 99 + " // 3 }}", "numbers are too large"),
    "strips tags": ("{{ ('<' * 1000000) | striptags }}", "No filter named"),
    "writes much": (
        "{% set t = 'a' * 1000000 %}{% for i in range(99999) %}{{ t }}{% endfor %}",
        "makes more than",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_broken_template_is_one_line(what: str) -> None:
    template, message = HOSTILE[what]
    with pytest.raises(TokenizerError, match=f"^the model's chat template failed: .*({message})") as caught:
        render(template)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("use --raw to go without")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ 'a' | no_such(9) }}",
        "{% include 'x' %}{% end %}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_a_template_that_does_not_compile(template: str) -> None:
    with pytest.raises(TokenizerError, match="the model's chat template failed"):
        ChatTemplate(template)


def test_a_template_of_absurd_length() -> None:
    with pytest.raises(TokenizerError, match="has 300000 characters; expected at most"):
        ChatTemplate("a" * 300_000)
