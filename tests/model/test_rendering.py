"""Chat templates of strangers: those that run away end in a sentence, others render as in transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from foveate import FoveateError, load
from foveate.model import rendering
from foveate.model.rendering import bounded
from foveate.model.text import TEMPLATES, chat_template, normalise_messages
from foveate.tiny import tiny_model
from foveate.zoom.asking import message
from foveate.zoom.vlm import VLM
from tests.docs.stand_ins import hf_llava_next
from tests.support import picture

SAID = [{"role": "user", "content": "hello"}]
GROWING = "{% set ns = namespace(s=START) %}{% for i in range(99) %}{% set ns.s = NEXT %}{% endfor %}"


def growing(start: str, following: str, then: str = "") -> str:
    return GROWING.replace("START", start).replace("NEXT", following) + then


RUNAWAYS = {
    "a long text": "{{ 'x' * 10**9 }}",
    "a long text, turned": "{{ 10**9 * 'x' }}",
    "a long list": "{{ [0] * 10**9 }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "a large number of variables": "{% set n = 10 %}{{ n ** (n ** 9) }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a wide % of a filter": "{{ '%1000000000d'|format(1) }}",
    "a width that is given": "{{ '%*d' % (10**9, 1) }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "a format's width that is given": "{{ '{:>{}}'.format(1, 10**9) }}",
    "a format's width by name": "{{ '{x:>{w}}'.format_map({'x': 1, 'w': 10**9}) }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "a filter that pads": "{{ 'x'|center(10**9) }}",
    "a filter of a filter": "{{ ['x']|map('center', 10**9)|list }}",
    "a block's filter": "{% filter center(10**9) %}x{% endfilter %}",
    "a method that pads": "{{ 'x'.ljust(10**9) }}",
    "zeros": "{{ 'x'.zfill(10**9) }}",
    "tabs": "{{ 'x\t'.expandtabs(10**9) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "an indent": "{{ 'x'|indent(10**9, true) }}",
    "JSON's indent": "{{ [1]|tojson(indent=10**9) }}",
    "batches": "{{ [1]|batch(10**9, 0)|list }}",
    "slices": "{{ [1]|slice(10**9)|list }}",
    "digits": "{{ 1.5|round(10**9, 'ceil') }}",
    "a long replacement": "{{ ('a' * 9999).replace('a', 'b' * 999999) }}",
    "a long text between": "{{ range(99999)|join('b' * 99999) }}",
    "a translation": "{{ ('a' * 9999).translate({97: 'b' * 999999}) }}",
    "a sum of lists": "{{ ([[0] * 1000] * 1000)|sum(start=[]) }}",
    "ranges in ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "ranges of which nothing is left": (
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "much text often": "{% for i in range(9999) %}" + "x" * 99999 + "{% endfor %}",
    "a macro of itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a macro twice of itself": (
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}"
    ),
    "a loop of itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "doubling by +": growing("'x'", "ns.s + ns.s"),
    "doubling by ~": growing("'x'", "ns.s ~ ns.s"),
    "doubling by a block": (
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}"
    ),
    "squares": growing("7", "ns.s * ns.s"),
    "lists that hold one twice": growing("['x']", "[ns.s, ns.s]", "{{ ns.s }}"),
    "the same as JSON": growing("['x']", "[ns.s, ns.s]", "{{ ns.s|tojson }}"),
    "the same compared": growing(
        "['x'], t=['x']", "[ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t]", "{{ ns.s == ns.t }}"
    ),
    "the same tested": growing(
        "['x'], t=['x']", "[ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t]", "{{ ns.s is eq(ns.t) }}"
    ),
    "where it is not reached": "{% if false %}{{ 'x' * 10**9 }}{% endif %}",
    "a filter that is not reached": "{% if false %}{{ 'x'|center(10**9) }}{% endif %}",
    "a number that is not reached": "{{ messages or 10 ** (10 ** 10) }}",
    "chance": "{{ [1, 2]|random }}",
    "words of chance": "{{ lipsum() }}",
    "microseconds": "{{ strftime_now('%f') }}",
}


@pytest.fixture
def low_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the real ones, and so reached sooner."""
    for bound in ("STEPS", "SIZE", "TOTAL"):
        monkeypatch.setattr(rendering, bound, getattr(rendering, bound) // 16)


@pytest.mark.parametrize("name", RUNAWAYS)
def test_what_runs_away_is_one_sentence(name: str, low_bounds: None) -> None:
    start = time.monotonic()
    with pytest.raises(FoveateError, match=r"^the chat template runs away: .*; name another template$"):
        bounded([SAID], RUNAWAYS[name])
    assert time.monotonic() - start < 20  # a few seconds of its own


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages", "unexpected end of template"),
        ("{% for x in messages %}", "Unexpected end of template"),
        ("{{ messages.no.no }}", "has no attribute 'no'"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ " + "9" * 5000 + " }}", "4300"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for x in messages %}" * 30 + "{% endfor %}" * 30, "too many statically nested"),
    ],
)
def test_what_is_broken_is_one_sentence(template: str, message: str) -> None:
    with pytest.raises(FoveateError, match=rf"^the chat template is broken: .*{message}") as raised:
        bounded([SAID], template)
    assert "\n" not in str(raised.value)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a place.\nNow.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "required": ["place"],
            },
        },
    }
]
TALK = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Where is it? é 𝄞 "}]},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIn Oslo."},
    {"role": "user", "content": "And the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}],
    },
    {"role": "tool", "name": "weather", "content": '{"sun": true}'},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "Thanks"},
]
# Everything that the templates of well-known models do, in one.
WHOLE = """
{%- macro kind(of, depth) -%}
{%- if of.type == 'object' -%}{ {% for name, inner in of.properties|dictsort %}
{{ '  ' * depth }}{{ name }}{{ '?' if name not in of.required else '' }}: {{ kind(inner, depth + 1) }},
{%- endfor %} }{%- else -%}{{ of.type|default('any') }}{%- endif -%}
{%- endmacro -%}
{{- bos_token }}{%- set ns = namespace(last=-1, seen=[], text='') %}
{%- if tools is defined and tools %}{{ '# Tools\\n' ~ tools|length }}
{%- for tool in tools %}{{ tool.function.name + ': ' + kind(tool.function.parameters, 1) }}
{{ tool|tojson(indent=2) }}{{ tool.function.description.splitlines()|join(' / ') }}{% endfor %}{% endif %}
{%- for message in messages[::-1] if message.role == 'user' %}{% set ns.last = loop.revindex0 %}{% break %}
{%- endfor %}
{%- for message in messages %}
{%- if loop.first and message['role'] == 'system' %}{{ '<<SYS>>' ~ message.content|trim|upper ~ '<</SYS>>' }}
{%- continue %}{% endif %}
{%- if not loop.first and (message.role == 'user') != (loop.previtem.role != 'user') %}{{ '?' }}{% endif %}
{%- set content %}
{%- if message.content is string %}{{ message.content.split('</think>')[-1].lstrip('\\n') }}
{%- else %}{% for part in message.content %}{% if part.type == 'image' %}<image>
{%- else %}{{ part['text']|trim }}{% endif %}{% endfor %}{% endif %}{% endset %}
{%- set ns.text = ns.text ~ content %}{% set ns.seen = ns.seen + [message.role] %}
{{- '%s|%03d' % (message.role, loop.index) }}{{ '{:>5}'.format(loop.length) }}
{%- if message.role == 'assistant' %}{% generation %}{{ content }}{{ eos_token }}{% endgeneration %}
{%- for call in message.tool_calls or [] %}{% set f = call.function %}
{%- for key, value in f.arguments.items() %}{{ key }}={{ value if value is string else value|tojson }}
{%- endfor %}{% endfor %}{% else %}{{ content }}{% endif %}
{%- endfor %}
{{- ns.seen|unique|list|sort|join(',') }}{{ ns.text|length * 2 // 3 - 1 }}{{ 7 / 2 + 2 ** 3 }}
{{- messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|length }}
{{- ns.seen|string|replace("'", '"') }}{{ 'a,b'.replace(',', ';') }}{{ x is undefined }}{{ [1, [2]]|string }}
{{- strftime_now('%Y') }}{{ none }}{{ {'a': 1}|items|list }}{{ 'x' in ns.text and 3 > 2 >= 1 }}
{%- macro twice() %}{{ caller('a') ~ caller('b') }}{% endmacro %}{% call(x) twice() %}{{ x }}{% endcall %}
{%- filter upper %}so{% endfilter %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""


@pytest.mark.parametrize("name", [*TEMPLATES, "whole"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("count", [2, 4, 8, 800])
def test_all_others_render_as_in_transformers(name: str, tools: Any, count: int) -> None:
    """Byte for byte, and with the same spans of answers."""
    template = WHOLE if name == "whole" else chat_template(name)
    said = TALK[:count] if count < 9 else TALK[:1] + TALK[1:3] * (count // 2)
    said = said if name == "whole" else normalise_messages(said)
    names = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools}
    for more in ({}, {"add_generation_prompt": True}, {"return_assistant_tokens_mask": True}):
        expected = render_jinja_template([said], chat_template=template, **names, **more)
        assert bounded([said], template, **names, **more) == expected
        assert len(expected[0][0]) > count


def test_long_messages_are_no_runaways() -> None:
    said = [{"role": "user", "content": "word " * 10**6}, {"role": "assistant", "content": "x" * 10**6}] * 3
    for template in (chat_template("chatml"), WHOLE):
        said = normalise_messages(said)
        assert bounded([said], template)[0] == render_jinja_template([said], chat_template=template)[0]


RUNS_AWAY = RUNAWAYS["ranges in ranges"] + chat_template("vicuna_v1")


def put(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text(RUNS_AWAY)
    return folder


def asking(folder: Path) -> Any:
    tiny_model("llava").save(folder)
    return load(put(folder), device="cpu").ask(picture(9, 9), "What?")


def asking_a_reader(folder: Path) -> Any:
    tiny_model("slime").save(folder)
    return load(put(folder), device="cpu").ask(picture(9, 9), "What?")


def asking_any_vlm(folder: Path) -> Any:
    hf_llava_next(folder)
    return VLM.load(put(folder), "cpu").answer([message(picture(9, 9), "What?")])


def tokenizing(folder: Path) -> Any:
    tiny_model("llava").save(folder)
    processor = load(put(folder), device="cpu").processor
    return processor.apply_chat_template(SAID, tokenize=True, return_dict=True)


def learning(folder: Path) -> Any:
    tiny_model("llava").save(folder)
    said = [*SAID, {"role": "assistant", "content": "A"}]
    return load(put(folder), device="cpu").processor.prompt(said, learn=True)


@pytest.mark.parametrize("door", [asking, asking_a_reader, asking_any_vlm, tokenizing, learning])
def test_every_door_is_bounded(door: Callable[[Path], Any], low_bounds: None, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="the chat template runs away"):
        door(tmp_path / "model")


def test_the_real_bounds_end_a_template_too(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=f"takes more than {2**19} steps, {2**26} characters or 4 seconds"):
        asking(tmp_path / "model")
