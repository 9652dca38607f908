"""Chat templates are untrusted programs: each fault of one is an error in time that names it."""

from __future__ import annotations

import threading
import time
from datetime import datetime

import pytest

from model import template
from model.template import ChatTemplate, TemplateStopped
from model.terminal import visible

NOW = datetime(2026, 1, 1)
MESSAGES = [{"role": "user", "content": "I have 12345678 apples."}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, "checkpoint", NOW).render(100, messages=MESSAGES, **variables)


DOUBLED = (
    "{{% set n = namespace(s='ab') %}}{{% for i in range(99) %}}{{% set n.s = {} %}}{{% endfor %}}"
)
HOSTILE = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "recursion that branches": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(90) }}",
    "doubled by +": DOUBLED.format("n.s + n.s"),
    "doubled by ~": DOUBLED.format("n.s ~ n.s"),
    "doubled by *": DOUBLED.format("n.s * 2"),
    "doubled by join": DOUBLED.format("[n.s, n.s] | join"),
    "doubled by a method": DOUBLED.format("n.s.join([n.s, n.s])"),
    "squared by replace": DOUBLED.format("n.s.replace('a', n.s)"),
    "squared by a filter": DOUBLED.format("n.s | replace('a', n.s)"),
    "doubled numbers": DOUBLED.replace("'ab'", "3").format("n.s * n.s"),
    "long output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a long list": "{{ ([0] * 1000000) * 1000000 }}",
    "a long text": "{{ 'x' * 1000000000 }}",
    "a large power": "{{ 9 ** (9 ** 9) }}",
    "a wide field": "{{ 'x'.center(10000000000) }}",
    "a wide filter": "{{ 'x' | center(10000000000) }}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a wide format filter": "{{ '%10000000000d' | format(1) }}",
    "a wide format method": "{{ '{:>10000000000}'.format(1) }}",
    "many slices": "{{ messages | slice(1000000000) | list }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_asks_for_too_much_is_stopped(monkeypatch, source):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    begun = time.thread_time()
    with pytest.raises(TemplateStopped, match="the checkpoint chat template was stopped: it "):
        render(source)
    assert time.thread_time() - begun < 10


def test_the_time_limit_holds_in_any_thread_and_begins_anew_with_each_rendering(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    made = ChatTemplate(HOSTILE["a loop in a loop"], "checkpoint", NOW)
    stopped = []

    def work():
        for _ in range(2):
            try:
                made.render(1)
            except TemplateStopped as error:
                stopped.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(stopped) == 2
    assert all("ran for more than 0.2 seconds" in text for text in stopped)
    assert ChatTemplate("{{ 1 + 1 }}", "checkpoint", NOW).render(1) == "2"


FAILING = {
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "TypeError": "{{ messages[0] + 1 }}",
    "AttributeError": "{{ messages[0].content.encode('utf-8').decode(3) }}",
    "KeyError": "{{ '%(a)s' % {} }}",
    "IndexError": "{{ '{}'.format() }}",
    "ValueError": "{{ '%q' % 1 }}",
    "LookupError": "{{ 'a'.encode('nonesuch') }}",
    "UnicodeEncodeError": "{{ 'é'.encode('ascii') }}",
    "OverflowError": "{{ (10 ** 300 * 10 ** 10) / 1.5 }}",
    "RecursionError": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize(("kind", "source"), FAILING.items(), ids=FAILING)
def test_any_exception_of_a_template_is_a_value_error_that_names_it(kind, source):
    fails = "the checkpoint chat template fails at this conversation"
    with pytest.raises(ValueError, match=fails) as error:
        render(source)
    assert type(error.value) is ValueError and "\n" not in str(error.value)


def test_a_template_that_cannot_be_compiled_is_named():
    for source in (
        "{% for %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ 1 | nonesuch }}",
    ):
        with pytest.raises(ValueError, match="the checkpoint chat template (is not valid|refuses)"):
            render(source)


def test_control_characters_of_a_template_are_escaped():
    with pytest.raises(ValueError) as error:
        render("{{ raise_exception('no\x1b[31mred\x07\u202e way\nsecond line') }}")
    assert r"no\x1b[31mred\x07\u202e way second line" in str(error.value)
    assert visible("Größe 漢字") == "Größe 漢字"
    with pytest.raises(ValueError) as error:
        render("{{ raise_exception('x' * 9000) }}")
    assert len(str(error.value)) < 700


def test_an_ordinary_template_gives_the_text_that_jinja_gives():
    """Loops, filters and operators are counted, and give what Jinja gives."""
    source = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length }}{{ loop.last }}"
        "{{ '%s' | format(m.content) }}{{ '%s' % m.content }}{{ '{}'.format(m.content) }}"
        "{{ none ~ 1 }}{{ undefined_name ~ 'x' }}{% endfor %}"
        "{{ messages | map(attribute='role') | join(', ') }}{{ [1] + [2] }}{{ 7 % 4 }}"
        "{{ 'a' * 3 }}{{ 2 ** 10 }}{{ ', '.join(['a', 'b']) }}{{ 'abc' | replace('b', 'x') }}"
        "{% for k, v in {'a': 1}.items() recursive %}{{ k }}{{ v }}{% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}none{% endfor %}{% for x in missing %}{% endfor %}"
        "{{ 1700000000 | string | length }}"
    )
    apples = MESSAGES[0]["content"]
    assert render(source) == (
        f"1/1True{apples}{apples}{apples}None1xuser[1, 2]3aaa1024a, baxca1none10"
    )


def test_a_long_conversation_has_a_larger_budget():
    text = "word " * 400_000
    source = "{% for m in messages %}{{ m.role + ': ' + m.content | trim ~ '\n' }}{% endfor %}"
    made = ChatTemplate(source, "checkpoint", NOW)
    messages = [{"role": "user", "content": text}] * 20
    assert len(made.render(20 * len(text), messages=messages)) > 39_000_000
