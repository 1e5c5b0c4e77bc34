"""A small byte-level BPE tokenizer in the manner of Qwen, trained on a few sentences of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flash_moe.text import Tokenizer

SENTENCES = [
    "The experts sleep on the disk until the router calls their names.",
    "A token asks for eight of them, and only eight wake up.",
    "Wie schön, dass die Straße über den Fluß führt: 12345 Schritte!",
    "def fetch(layer, ids):\n    return [records[layer][i] for i in ids]\n",
    "天气很好,我们去公园散步吧。专家在磁盘上睡觉。",
    "Кто читает мало, тот быстро отвечает. 👩‍👩‍👧 ❤️ 🇩🇪 नमस्ते",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

# Written for these tests in the shape of Qwen's: macro, namespace, loop controls, tools, thinking.
TEMPLATE = r"""
{%- macro text_of(content, who) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable -%}
        {%- for part in content -%}
            {%- if 'text' in part -%}{{- part.text -}}
            {%- else -%}{{- raise_exception('cannot show a part of ' ~ who) -}}{%- endif -%}
        {%- endfor -%}
    {%- elif content is none or content is undefined -%}{{- '' -}}
    {%- else -%}{{- raise_exception('strange content') -}}{%- endif -%}
{%- endmacro -%}
{%- if not messages %}{{- raise_exception('no messages') }}{% endif %}
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\nsorted: ' ~ (tools | tojson(indent=2, sort_keys=true)) }}
    {{- '\ncompact: ' ~ (tools | tojson(separators=(',', ':'), ensure_ascii=true)) }}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1, turns=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role != 'user' %}{%- continue %}{%- endif %}
    {%- set ns.last_query = messages | length - 1 - loop.index0 %}
    {%- break %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = text_of(message.content, message.role) | trim %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{- raise_exception('the system message must come first') }}{%- endif %}
        {{- '<|im_start|>system\n' ~ content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'user' %}
        {%- set ns.turns = ns.turns + 1 %}
        {{- '<|im_start|>user\n' ~ content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- set secret = 'stays inside' %}
        {%- if message.reasoning_content is string and loop.index0 > ns.last_query %}
            {{- '<think>\n' ~ message.reasoning_content.strip('\n') ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n<function=' ~ call.name ~ '>\n' }}
            {%- for name, value in call.arguments | items %}
                {{- '<parameter=' ~ name ~ '>\n' }}
                {{- (value | string if value is string else value | tojson) ~ '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- eos_token ~ '\n' }}
        {%- endgeneration %}
        {{- secret }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}
        {{- raise_exception('unexpected role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if dated is defined %}{{- strftime_now('%Y') ~ dict(a=ns.turns)['a'] ~ '\n' }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}
"""


def _train() -> Backend:
    backend = Backend(models.BPE())
    words = r"'s|'t| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return backend


@pytest.fixture(scope="session")
def backend() -> Backend:
    return _train()


@pytest.fixture(scope="session")
def tokenizer_json(backend: Backend) -> str:
    return backend.to_str()


@pytest.fixture
def write_checkpoint(tmp_path: Path, tokenizer_json: str) -> Callable[..., Path]:
    """Write a checkpoint's text files; keyword `config` means `config.json`, and None leaves a file out."""

    def write(**files: Any) -> Path:
        defaults = {
            "tokenizer": tokenizer_json,
            "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}},
        }
        for name, content in {**defaults, **files}.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture(scope="session")
def qwen(tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Our tokenizer (`ours`) and transformers' (`theirs`) for the same files."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("qwen")
    (path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    return SimpleNamespace(ours=Tokenizer.load(path), theirs=theirs, path=path)
