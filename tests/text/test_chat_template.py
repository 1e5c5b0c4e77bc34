"""`ChatTemplate` renders what transformers renders, refuses bad messages, and keeps templates in their box."""

from __future__ import annotations

import copy
import itertools
import json
import time
from types import MappingProxyType, SimpleNamespace

import pytest

from flash_moe.errors import TokenizerError
from flash_moe.text import ChatTemplate, Tokenizer

USER = {"role": "user", "content": " Wie ist das Wetter in Köln? <b>&</b> 'quoted' "}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 3, "units": ["°C", None]}}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}],
    "empty content": [{"role": "user", "content": ""}, {"role": "assistant", "content": []}],
    "history": [USER, {"role": "assistant", "content": "Sonnig.", "reasoning_content": "\nhm\n"}, USER],
    "thought": [USER, {"role": "assistant", "content": "Sonnig.", "reasoning_content": "\nhm\n"}],
    "call": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}, CALL]},
        {"role": "tool", "content": "12 °C"},
        {"role": "tool", "content": [{"type": "text", "text": "13 °C"}]},
    ],
    "answered": [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "Kalt 🥶."},
    ],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather for a città, <now> & later",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
VARIABLES = {"plain": {}, "off": {"enable_thinking": False}, "on": {"enable_thinking": True}, "dated": {"dated": 1}}


TEXTS = [{"type": "text", "text": "Sonnig"}, {"type": "text", "text": ", warm."}]


@pytest.mark.parametrize("arguments", ['{"city": "Köln", "days": [1, null]}', '{\n "city": "a\\nb"\n}', "{}"])
def test_history_in_openais_form_renders_as_its_equivalent(qwen: SimpleNamespace, arguments: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    parsed = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.loads(arguments)}}
    given = [
        USER,
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": TEXTS},
        {"role": "assistant", "content": TEXTS, "refusal": None, "reasoning_content": "so"},
    ]
    equivalent = [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [parsed]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sonnig, warm."},
        {"role": "assistant", "content": "Sonnig, warm.", "reasoning_content": "so"},
    ]
    theirs = qwen.theirs.apply_chat_template(equivalent, tokenize=False, add_generation_prompt=False)
    assert qwen.ours.apply_chat_template(given, add_generation_prompt=False) == theirs
    assert given[1]["tool_calls"][0]["function"]["arguments"] is arguments


@pytest.mark.parametrize(
    "arguments", ["{", "[1]", "3", "null", "[" * 100_000], ids=["cut", "list", "number", "null", "deep"]
)
def test_arguments_that_are_no_object_are_an_error(qwen: SimpleNamespace, arguments: str) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    with pytest.raises(TokenizerError, match="message 1 calls 'weather' with the arguments"):
        qwen.ours.apply_chat_template([USER, message])


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("variables", VARIABLES)
def test_renders_like_transformers(qwen, name, variables):
    messages = CONVERSATIONS[name]
    for tools, prompt in itertools.product([None, [], [TOOL], [TOOL, TOOL]], [True, False]):
        kwargs = {"tools": tools, "add_generation_prompt": prompt, **VARIABLES[variables]}
        expected = qwen.theirs.apply_chat_template(messages, tokenize=False, **kwargs)
        assert qwen.ours.apply_chat_template(messages, **kwargs) == expected


def test_enable_thinking_is_undefined_unless_given(write_checkpoint):
    template = "{{ 'none' if enable_thinking is undefined else enable_thinking }}"
    tokenizer = Tokenizer.load(write_checkpoint(tokenizer_config={"chat_template": template}))
    assert tokenizer.apply_chat_template([USER]) == "none"
    assert tokenizer.apply_chat_template([USER], enable_thinking=None) == "none"
    assert tokenizer.apply_chat_template([USER], enable_thinking=False) == "False"


def test_special_tokens_are_variables(write_checkpoint):
    config = {
        "eos_token": {"content": "<|im_end|>", "special": True},
        "bos_token": None,
        "add_bos_token": True,
        "extra_special_tokens": {"image_token": "<img>"},
        "chat_template": "{{ eos_token }}{{ pad_token }}{{ image_token }}{{ bos_token }}{{ add_bos_token }}",
    }
    path = write_checkpoint(tokenizer_config=config, special_tokens_map={"pad_token": "<pad>", "eos_token": "old"})
    assert Tokenizer.load(path).apply_chat_template([USER]) == "<|im_end|><pad><img>"
    assert Tokenizer.load(path).apply_chat_template([USER], bos_token="<s>") == "<|im_end|><pad><img><s>"


def test_sources_in_order(tmp_path):
    def render(**kwargs):
        return ChatTemplate.load(tmp_path).render([USER], **kwargs)

    assert ChatTemplate.load(tmp_path) is None
    named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert (render(), render(tools=[TOOL])) == ("config", "config tools")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert (render(), render(tools=[TOOL])) == ("json", "json")
    (tmp_path / "chat_template.jinja").write_text("jinja ü", encoding="utf-8")
    assert (render(), render(tools=[TOOL])) == ("jinja ü", "jinja ü")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert (render(), render(tools=[TOOL])) == ("jinja ü", "more")


@pytest.mark.parametrize("source", [7, [1], [{"name": "default"}], {"default": 3}], ids=str)
def test_malformed_source(tmp_path, source):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(TokenizerError, match=r"chat_template in .*unknown form.*plain string prompt"):
        ChatTemplate.load(tmp_path)


def test_template_that_is_not_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="could not be read as UTF-8"):
        ChatTemplate.load(tmp_path)


def test_no_template(write_checkpoint):
    with pytest.raises(TokenizerError, match=r"no chat template.*pass a plain string prompt"):
        Tokenizer.load(write_checkpoint()).apply_chat_template([USER])


def test_no_default_among_named_templates():
    with pytest.raises(TokenizerError, match=r"\['rag', 'tool_use'\].*named 'default'"):
        ChatTemplate({"rag": "", "tool_use": "tools"}).render([USER])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hi", "type str, expected a list"),
        (USER, "type dict, expected a list"),
        (None, "type NoneType, expected a list"),
        ([], "found no messages"),
        ([USER, "Hi"], "message 1 is of type str, expected a dict"),
        ([USER, {"role": "user"}], "message 1 of role user has no content; write it as"),
        ([{"content": "Hi"}], r"message 0 has only the keys \['content'\], expected a string 'role'"),
        ([USER, {"role": 3, "content": "Hi"}], "message 1 has the role 3"),
        ([{"role": "user", "content": 3}], "message 0 has content of type int"),
        ([{"role": "user", "content": {"text": "Hi"}}], "message 0 has content of type dict"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "'type': 'image', .* only text is supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "only text is supported"),
        ([{"role": "user", "content": ["Hi"]}], "the part 'Hi', but only text is supported"),
        ([{"role": "user", "content": "Hi", "image": object()}], "message 0 holds a value of type object"),
        ([USER, SYSTEM], "TemplateError: the system message must come first"),
        ([{"role": "wizard", "content": "Hi"}], "unexpected role wizard"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "TypeError"),
    ],
)
def test_bad_messages(qwen, messages, match):
    with pytest.raises(TokenizerError, match=match):
        qwen.ours.apply_chat_template(messages)


def test_bad_tools_and_variables(qwen):
    with pytest.raises(TokenizerError, match="tools holds a value of type function"):
        qwen.ours.apply_chat_template([USER], tools=[test_no_template])
    with pytest.raises(TokenizerError, match="variable 'when' holds a value of type object"):
        qwen.ours.apply_chat_template([USER], when=object())


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update(role='root') }}",
        "{{ messages[0].content.__class__.__bases__ }}",
        "{{ eos_token.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/hostname' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ undefined.attribute }}",
        "{{ messages | tojson(indent={}) }}",
        "{% if %}",
        "{{ 'unclosed",
        "{% generation %}",
        "{{ raise_exception('no') }}",
        "{{ 1 | nofilter }}",
    ],
)
def test_forbidden_and_failing_templates(template):
    with pytest.raises(TokenizerError, match=r"chat template 'default' failed: .*plain string prompt"):
        ChatTemplate(template, {"eos_token": "<|im_end|>"}).render([USER])


ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges in a filter": "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "nested loops": "{% for a in x %}{% for a in x %}{% for a in x %}{% endfor %}{% endfor %}{% endfor %}",
    "tests of loops": "{% for a in x %}{% for a in x %}{% for a in x if false %}{% endfor %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "filters": "{% for a in x %}{% for a in x %}{% for a in x | sort | map('string') %}{% endfor %}{% endfor %}{% endfor %}",
    "text": "{% for a in range(99999) %}" + 600 * "x" + "{% endfor %}",
    "text in a macro": "{% macro f() %}{% for a in range(99999) %}" + 600 * "x" + "{% endfor %}{% endmacro %}{{ f() }}",
    "values": "{% set s = 'x' * 9999 %}{% for a in range(9999) %}{{ s }}{% endfor %}",
    "constants": "{% for a in range(99999) %}{{ '" + 600 * "x" + "' }}{% endfor %}",
    "product": "{{ 'x' * 50000000 }}",
    "product of a list": "{% set x = 10**9 * [1] %}",
    "sum": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "concatenation": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "laughs": "{% set n = namespace(s=[]) %}{% for a in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "laughs as JSON": "{% set n = namespace(s=[]) %}{% for a in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
    "{{ n.s | tojson }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "powers": "{% set n = namespace(s=3) %}{% for a in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format by argument": "{{ '{:>{}}'.format(1, 10**9) }}",
    "format of a mapping": "{{ '{a:{w}}'.format_map({'a': 1, 'w': 10**9}) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "justified": "{{ 'x'.ljust(10**9) }}",
    "centred": "{{ 'x' | center(10**9) }}",
    "indented": "{{ ('x\n' * 10000) | indent(10**6) }}",
    "batch": "{% set x = [1] | batch(10**9, 0) | list %}",
    "replaced": "{% set s = 'x' * 10**6 %}{% set s = s.replace('x', s) %}",
    "joined": "{% set s = ('x' * 10**6).join(range(99999) | list) %}",
    "lorem ipsum": "{{ lipsum(n=10**6) }}",
}


SECONDS_EACH = "nested loops", "tests of loops"


@pytest.mark.parametrize(
    "template",
    [pytest.param(text, id=name, marks=[pytest.mark.slow] * (name in SECONDS_EACH)) for name, text in ENDLESS.items()],
)
def test_templates_without_end_are_an_error(template):
    begin = time.process_time()
    with pytest.raises(TokenizerError, match=r"the chat template 'default' failed: (Template|Undefined)Error"):
        ChatTemplate(template).render([{"role": "user", "content": "Hi"}], x=list(range(300)))
    assert time.process_time() - begin < 60  # without bounds hours


def test_computing_time_of_templates_is_bounded(monkeypatch):
    monkeypatch.setattr("flash_moe.text.sandbox.MAX_SECONDS", 0.0)
    with pytest.raises(TokenizerError, match="or 0 seconds"):
        ChatTemplate("{% for m in messages %}{% endfor %}").render([{"role": "user", "content": "Hi"}])


def test_bounds_leave_room_for_long_conversations(qwen):
    messages = [{"role": role, "content": 2000 * "text "} for role in ("user", "assistant")] * 1000
    text = qwen.ours.apply_chat_template(messages)
    assert text.count("<|im_start|>") == len(messages) + 1
    assert text == qwen.theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_nothing_of_the_caller_is_modified(qwen):
    messages, tools = copy.deepcopy(CONVERSATIONS["call"]), [copy.deepcopy(TOOL)]
    qwen.ours.apply_chat_template(messages, tools=tools)
    assert (messages, tools) == (CONVERSATIONS["call"], [TOOL])


def test_subclasses_are_reduced_to_plain_data(qwen):
    class Text(str):
        def __str__(self):
            return "changed"

    class Number(int):
        pass

    class Real(float):
        pass

    messages = ({"role": Text("user"), "content": Text("Hi")},)
    expected = qwen.ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert qwen.ours.apply_chat_template(messages) == expected
    assert qwen.ours.apply_chat_template([MappingProxyType(messages[0])]) == expected
    numbers = {"a": Number(3), "b": Real(0.5), "c": (True, None)}
    rendered = ChatTemplate("{{ x | tojson }}").render([USER], x=numbers)
    assert rendered == '{"a": 3, "b": 0.5, "c": [true, null]}'
