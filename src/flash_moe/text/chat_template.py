"""Renders chat messages into a prompt with the checkpoint's chat template.

Templates are untrusted code from the hub. They run in a sandbox (`sandbox.py`) and get only copies of plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template


_DEEPEST = 100  # levels of nested data in messages and tools; far below the recursion limits of JSON and templates


class ChatTemplate:
    """A checkpoint's chat template, compiled on first use.

    Args:
        source: the Jinja template, or several by name. `"tool_use"` is used if there are tools, otherwise `"default"`.
        special_tokens: variables for the template, such as `bos_token` and `eos_token`.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, Template] = {}

    @classmethod
    def load(cls, path: Path, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate | None:
        """Loads the template of a checkpoint's folder; None if there is none.

        Looks at `chat_template.jinja` (with `additional_chat_templates/*.jinja`), then at `chat_template` in
        `chat_template.json`, then in `tokenizer_config.json`.

        Raises:
            TokenizerError: a file is unreadable, or its `chat_template` has an unknown form.
        """
        files = sorted((path / "additional_chat_templates").glob("*.jinja"))
        named = {file.stem: file for file in files if not file.name.startswith(".")}  # ._x.jinja: macOS's notes
        if (main := path / "chat_template.jinja").is_file():
            return cls({name: _read_text(file) for name, file in {**named, "default": main}.items()}, special_tokens)
        for file in (path / "chat_template.json", path / "tokenizer_config.json"):
            if source := read_json_object(file).get("chat_template"):
                return cls(_named_templates(source, file), special_tokens)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Renders messages into the text of a prompt.

        Args:
            messages: dicts with a string `role` and a `content` that is a string or a list of `{"type": "text", "text":
                ...}`. OpenAI's form is accepted: arguments of `tool_calls` may be JSON text, `reasoning` means
                `reasoning_content`, and keys with the value None are dropped (`content` becomes empty). Other keys are
                passed to the template unchanged. The messages are not modified.
            tools: JSON schemas of the functions the model may call, as in OpenAI's API.
            add_generation_prompt: whether to append the header of the assistant's next message.
            **variables: further variables for the template, such as `enable_thinking`.

        Raises:
            TokenizerError: the messages are malformed, or the template is invalid, forbidden or raises.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        context: dict[str, Any] = {
            **self._special_tokens,
            **{key: _plain(value, f"template variable {key!r}") for key, value in variables.items()},
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            from .sandbox import render

            return render(self._template(name), context)
        except TokenizerError:
            raise
        except Exception as error:  # a template can raise any error
            raise TokenizerError(
                f"the chat template {name!r} failed: {type(error).__name__}: {error}; "
                "check that the messages have the roles, order and fields it expects, or pass a plain string prompt"
            ) from error

    def mentions(self, text: str) -> bool:
        """Returns whether the template contains a text, in its output or in its instructions."""
        return any(text in source for source in self._sources.values())

    def _template(self, name: str) -> Template:
        if name not in self._sources:
            raise TokenizerError(
                f"found the chat templates {sorted(self._sources)}, expected one named {name!r}; "
                "pass a plain string prompt, or add the template to the checkpoint"
            )
        if name not in self._compiled:
            from .sandbox import environment

            self._compiled[name] = environment().from_string(self._sources[name])
        return self._compiled[name]


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; returns an empty one if the file does not exist.

    Raises:
        TokenizerError: the file cannot be read or holds no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a JSON {type(value).__name__}, expected an object; download it again")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{file} could not be read as UTF-8 text: {error}; download the checkpoint again"
        ) from error


def _named_templates(source: object, file: Path) -> dict[str, str]:
    named: dict[Any, Any] = {}
    if isinstance(source, str):
        named = {"default": source}
    elif isinstance(source, dict):
        named = source
    elif isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        named = {entry.get("name"): entry.get("template") for entry in source}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TokenizerError(
            f"chat_template in {file} has an unknown form (type {type(source).__name__}), expected a string "
            'or a list of {"name": ..., "template": ...}; repair the file or pass a plain string prompt'
        )
    return named


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        found = "no messages" if messages == [] else f"messages of type {type(messages).__name__}"
        raise TokenizerError(f'found {found}, expected a list such as [{{"role": "user", "content": "Hi"}}]')
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    remedy = 'write it as {"role": "user", "content": "Hi"}'
    if not isinstance(message, Mapping):
        raise TokenizerError(f"message {index} is of type {type(message).__name__}, expected a dict; {remedy}")
    if not isinstance(message.get("role"), str):
        found = f"the role {message['role']!r}" if "role" in message else f"only the keys {sorted(map(str, message))}"
        raise TokenizerError(f"message {index} has {found}, expected a string 'role'; {remedy}")
    if "content" not in message and message["role"] in ("user", "system", "tool"):
        raise TokenizerError(f"message {index} of role {message['role']} has no content; {remedy}")
    checked = {key: _plain(value, f"message {index}") for key, value in message.items() if value is not None}
    if "content" in message:
        checked.setdefault("content", "")
    if "reasoning" in checked:  # the name in the APIs of OpenAI and others
        checked.setdefault("reasoning_content", checked["reasoning"])
    if isinstance(calls := checked.get("tool_calls"), list):
        for call in calls:
            _parse_arguments(call, index)
    if not isinstance(content := checked.get("content", ""), (str, list)):
        found = type(content).__name__
        raise TokenizerError(f"message {index} has content of type {found}, expected text or a list of parts; {remedy}")
    if isinstance(content, list):
        # Joined here, because text-only templates would drop or print a list.
        checked["content"] = "".join(_text_of(part, index) for part in content)
    return checked


def _parse_arguments(call: Any, index: int) -> None:
    """Parses arguments that are JSON text, as in OpenAI's form: templates need a mapping."""
    call = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(call, dict) and isinstance(arguments := call.get("arguments"), str):
        try:
            parsed = json.loads(arguments or "{}", strict=False)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise TokenizerError(
                f"message {index} calls {call.get('name')!r:.80} with the arguments {arguments!r:.200}, expected a JSON "
                "object; repair them or leave the call out"
            )
        call["arguments"] = parsed


def _text_of(part: object, index: int) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(text := part.get("text"), str):
        return text
    raise TokenizerError(
        f"message {index} has the part {part!r:.80}, but only text is supported: "
        'pass {"type": "text", "text": ...} parts or a plain string'
    )


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Copies JSON-like data, so that a template can neither change the caller's objects nor call their methods."""
    if depth > _DEEPEST:
        raise PromptError(f"{where} holds data more than {_DEEPEST} levels deep; pass it as text")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where, depth + 1): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise TokenizerError(
        f"{where} holds a value of type {type(value).__name__}, expected strings, numbers, lists and dicts; "
        "convert it first"
    )
