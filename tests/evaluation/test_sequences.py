"""Files become the tokens that the model would read, and malformed ones an error with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_moe import ArgumentError, TokenizerError
from flash_moe.evaluation import conversation, read_sequences, read_tool_call_cases, windows
from flash_moe.text import Tokenizer

MESSAGES = [
    {"role": "user", "content": "Wie spät?"},
    {"role": "assistant", "content": "Acht\nUhr."},
    {"role": "user", "content": "assistant\nDanke."},
    {"role": "assistant", "content": "Gern 🙂"},
]


@pytest.fixture(scope="module")
def tokenizer(float_checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(float_checkpoint)


def written(folder: Path, *lines: Any, name: str = "chats.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return file


def test_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = written(
        tmp_path, {"messages": MESSAGES}, "", {"messages": MESSAGES[:1], "tools": None}, {"messages": MESSAGES}
    )
    first, second, third = read_sequences(file, tokenizer)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert tokenizer.decode(first.tokens) == expected
    assert first == third
    assert tokenizer.decode(second.tokens) == "<|im_start|>user\nWie spät?<|im_end|>\n"
    assert read_sequences(file, tokenizer, limit=2) == [first, second]
    marked = [token for token, own in zip(first.tokens, first.assistant, strict=True) if own]
    assert tokenizer.decode(marked) == "Acht\nUhr.<|im_end|>Gern 🙂<|im_end|>"
    assert not any(second.assistant)


def test_tools_and_thinking_reach_the_template(qwen_like: Tokenizer, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    lines = [{"messages": MESSAGES, "tools": tools}, {"messages": MESSAGES, "enable_thinking": False}]
    found = read_sequences(written(tmp_path, *lines), qwen_like, enable_thinking=True)
    texts = [qwen_like.decode(sequence.tokens) for sequence in found]
    assert [text.partition("|")[0] for text in texts] == ["clock True", " False"]
    marked = [token for token, own in zip(found[0].tokens, found[0].assistant, strict=True) if own]
    assert qwen_like.decode(marked) == "Acht\nUhr.<|im_end|>Gern 🙂<|im_end|>"


@pytest.fixture(scope="module")
def qwen_like(tokenizer: Tokenizer, float_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A template that shows its variables, and that adds more than a header for a reply."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((float_checkpoint / file).read_bytes())
    template = (float_checkpoint / "chat_template.jinja").read_text()
    template = "{{ tools[0].function.name if tools }} {{ enable_thinking }}|" + template.replace(
        "assistant\n{%", "assistant\n<think>\n{%"
    )
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


def test_without_headers_or_ends_nothing_is_the_assistants(tokenizer: Tokenizer, qwen_like: Tokenizer) -> None:
    endless = Tokenizer(tokenizer._backend, chat_template=tokenizer.chat_template)
    assert not any(conversation(endless, MESSAGES).assistant)
    assert any(conversation(tokenizer, MESSAGES).assistant)


def test_plain_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = written(tmp_path, "Zwei Zeilen,", "ein Rest.", name="book.txt")
    tokens = tokenizer.encode("Zwei Zeilen,\nein Rest.\n")
    found = read_sequences(file, tokenizer, window=5)
    assert [list(sequence.tokens) for sequence in found] == [tokens[i : i + 5] for i in range(0, 20, 5)]
    assert not any(any(sequence.assistant) for sequence in found)
    assert read_sequences(file, tokenizer, window=5, limit=3) == found[:3]
    assert [list(sequence.tokens) for sequence in read_sequences(file, tokenizer)] == [tokens]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [5]), (9, [5]), (10, [5, 5])])
def test_windows(count: int, sizes: list[int]) -> None:
    assert [len(sequence.tokens) for sequence in windows(range(count), 5)] == sizes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ("[]", "line 2 holds a JSON list, expected an object"),
        ("{}", r"line 2: 'messages' is missing, expected a list"),
        ('{"messages": []}', r"'messages' is \[\], expected a list"),
        ('{"messages": ["Hi"]}', r"'messages' is \[\"Hi\"\], expected a list"),
        ('{"messages": [{}], "tools": {}}', r"'tools' is {}, expected a list of objects"),
        ('{"messages": [{}], "enable_thinking": 1}', "'enable_thinking' is 1, expected true or false"),
    ],
)
def test_malformed_lines(tokenizer: Tokenizer, tmp_path: Path, line: str, message: str) -> None:
    file = written(tmp_path, {"messages": MESSAGES}, line)
    with pytest.raises(ArgumentError, match=message) as caught:
        read_sequences(file, tokenizer)
    assert str(caught.value).startswith(f"{file}, line 2")
    assert len(str(caught.value)) < 300 + len(str(file))


def test_messages_that_do_not_fit_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = written(tmp_path, {"messages": MESSAGES}, {"messages": [{"content": "no role"}]})
    with pytest.raises(TokenizerError, match=r"line 2: message 0 .*role"):
        read_sequences(file, tokenizer)


def test_files_without_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).touch()
        with pytest.raises(ArgumentError, match="holds no text"):
            read_sequences(tmp_path / name, tokenizer)
    (tmp_path / "latin").write_bytes("Köln".encode("latin-1"))
    with pytest.raises(ArgumentError, match="not UTF-8"):
        read_sequences(tmp_path / "latin", tokenizer)
    with pytest.raises(FileNotFoundError):
        read_sequences(tmp_path / "nothing", tokenizer)


@pytest.mark.parametrize("options", [{"window": 1}, {"limit": 0}])
def test_bad_options(tokenizer: Tokenizer, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="expected at least 2 tokens and 1 sequence"):
        read_sequences(written(tmp_path, "x", name="x.txt"), tokenizer, **options)


def test_tool_call_cases(tmp_path: Path) -> None:
    call = {"name": "clock", "arguments": {"zone": "CET"}}
    line = {"messages": MESSAGES, "tools": [{"name": "clock"}], "calls": [call], "enable_thinking": False}
    file = written(tmp_path, line, {"messages": MESSAGES, "calls": []})
    first, second = read_tool_call_cases(file)
    assert vars(first) == line
    assert vars(second) == {"messages": MESSAGES, "tools": None, "calls": [], "enable_thinking": None}
    assert read_tool_call_cases(file, limit=1) == [first]


@pytest.mark.parametrize("calls", [None, {}, [1], [{}], [{"name": "a"}], [{"name": "a", "arguments": "{}"}]])
def test_malformed_calls(tmp_path: Path, calls: Any) -> None:
    with pytest.raises(ArgumentError, match="line 1: 'calls' is"):
        read_tool_call_cases(written(tmp_path, {"messages": MESSAGES, "calls": calls}))


def test_no_cases(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is empty"):
        read_tool_call_cases(written(tmp_path, ""))
