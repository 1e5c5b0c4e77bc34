"""The command `flash-moe chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from ..checks import resolve_experts_per_token
from ..errors import ArgumentError, FlashMoEError
from ..machines.interrupts import handled_by
from .arguments import (
    MODEL_HELP,
    ExpertsPerToken,
    ThinkingOption,
    experts_per_token,
)
from .console import DIM, described, fail, say, shown, write
from .loading import Loader, loads
from .user_tools import confirm, read_tools

if TYPE_CHECKING:
    from ..conversation.conversation import Conversation
    from ..model import Model

EXAMPLES = """\b
Examples:
  flash-moe chat MODEL
  flash-moe chat MODEL -k own --system "Answer in one sentence."
  flash-moe chat MODEL --open talk.flashmoe
  flash-moe chat MODEL --tools my_functions.py"""

HELP = """\
/help            this list
/save FILE       save the conversation, with what the model has read of it
/open FILE       continue a saved conversation
/undo            take the last message and its reply back
/clear           begin a new conversation
/system TEXT     begin a new conversation with a system message
/k N|own         load the model again with N experts per token
/tools FILE      functions of a Python file, or schemas in a JSON file, as
                 tools; /tools alone removes them
/stats           statistics of the last reply
/exit            leave, as Ctrl-D does
Alt-Enter adds a line, Ctrl-C stops a reply and keeps the conversation."""


@loads
def command(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    k: ExpertsPerToken = None,
    system: Annotated[str | None, Option(metavar="TEXT", help="A system message.")] = None,
    open_file: Annotated[
        Path | None, Option("--open", metavar="FILE", help="Continue a conversation that /save has saved.")
    ] = None,
    tools: Annotated[
        Path | None, Option(metavar="FILE", help="A Python file whose functions the model may call; it asks first.")
    ] = None,
    thinking: ThinkingOption = None,
    max_tokens: Annotated[int, Option(metavar="N", min=1, help="Maximum number of tokens of a reply.")] = 2048,
    *,
    loading: Loader,
) -> None:
    """Talk to a model in the terminal.

    It remembers the conversation and runs only new text.

    Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.
    """
    options = {"max_tokens": max_tokens, "enable_thinking": thinking}
    talk = Talk(lambda wanted: loading(model, wanted), k, system, read_tools(tools) if tools else [], options)
    try:
        if open_file is not None:
            talk.open(str(open_file))
        talk.run()
    finally:
        talk.model.close()


class Talk:
    """A conversation in a terminal: reads lines, runs commands, and shows replies."""

    def __init__(
        self,
        loaded: Callable[[str | None], Model],
        k: str | None,
        system: str | None,
        tools: list[Any],
        options: dict[str, Any],
    ) -> None:
        self._loaded, self._system, self._tools, self._options = loaded, system, tools, options
        self.model = loaded(k)
        self._chat: Conversation = self._new()
        self._stats: Any = None

    def _new(self, messages: Sequence[Any] = ()) -> Conversation:
        return self.model.chat(self._system, self._tools, confirm=confirm, messages=messages, **self._options)

    def run(self) -> None:
        """Reads and answers messages until the input ends."""
        say(f"{self.model!r}", style=DIM)
        if sys.stdin.isatty():
            say("/help lists the commands; Ctrl-D leaves.", style=DIM)
        for line in _lines():
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not self._obey(line):
                        return
                else:
                    self._answer(line)
            except (FlashMoEError, OSError) as error:
                fail(described(error))
            except BadParameter as error:
                fail(error.format_message())

    def _answer(self, text: str) -> None:
        cancel = threading.Event()
        thinking, ends_line, reason = False, True, None
        with handled_by(lambda *_: cancel.set()):  # Ctrl-C cancels the reply
            for chunk in self._chat.stream(text, cancel=cancel):
                if chunk.reasoning:
                    thinking = True
                    write(chunk.reasoning, style=DIM)
                    ends_line = chunk.reasoning.endswith("\n")
                if chunk.text:
                    if thinking:
                        write("" if ends_line else "\n")
                        thinking = False
                    write(chunk.text)
                    ends_line = chunk.text.endswith("\n")
                for call in chunk.tool_calls:
                    write("" if ends_line else "\n")
                    say(shown(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})"), label="call")
                    ends_line = True
                if (result := chunk.tool_result) is not None:
                    say(shown(result.content), label="error" if result.failed else "result")
                self._stats, reason = chunk.stats, chunk.finish_reason or reason
        write("" if ends_line else "\n")
        note = "cut by --max-tokens or by the context" if reason == "length" else None
        if cancel.is_set():
            note = "stopped"
        say(" · ".join(filter(None, (str(self._stats), note))), style=DIM)

    def _obey(self, line: str) -> bool:
        """Runs a command. Returns False for the command that ends the conversation."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        commands: dict[str, Callable[[], None]] = {
            "help": lambda: print(HELP),
            "save": lambda: self._save(argument),
            "open": lambda: self.open(argument),
            "undo": self._undo,
            "clear": self._clear,
            "system": lambda: self._set_system(argument),
            "k": lambda: self._set_k(argument),
            "tools": lambda: self._set_tools(argument),
            "stats": lambda: print(self._stats if self._stats is not None else "no reply yet"),
        }
        if name in ("exit", "quit"):
            return False
        if name not in commands:
            fail(f"there is no command /{shown(name)}; /help lists them")
        else:
            commands[name]()
        return True

    def _save(self, argument: str) -> None:
        if not argument:
            fail("name a file: /save FILE")
            return
        path = _path(argument)
        self._chat.save(path)
        say(f"saved {len(self._chat.messages)} messages to {path}", style=DIM)

    def open(self, argument: str) -> None:
        """Continues a saved conversation."""
        if not argument:
            fail("name a file: /open FILE")
            return
        self._chat = self.model.open_chat(_path(argument), self._tools or None, confirm=confirm)
        first = self._chat.messages[0] if self._chat.messages else {}
        self._system = first.get("content") if first.get("role") == "system" else None
        say(f"{len(self._chat.messages)} messages", style=DIM)

    def _undo(self) -> None:
        self._chat.undo()
        say(f"{len(self._chat.messages)} messages are left", style=DIM)

    def _clear(self) -> None:
        self._chat = self._new()
        say("a new conversation", style=DIM)

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._clear()

    def _set_k(self, text: str) -> None:
        if text:
            wanted = experts_per_token(text, "/k")
            resolve_experts_per_token(wanted, self.model.config.num_experts_per_tok)  # before the model is closed
            self.model.close()
            self.model = self._loaded(text)
            self._chat = self._new(self._said())
        say(f"{self.model!r}", style=DIM)

    def _said(self) -> list[Any]:
        """Returns the messages without the system message, which a new conversation gets separately."""
        return [message for message in self._chat.messages if message["role"] != "system"]

    def _set_tools(self, argument: str) -> None:
        self._tools = read_tools(_path(argument)) if argument else []
        self._chat = self._new(self._said())
        say("1 tool" if len(self._tools) == 1 else f"{len(self._tools)} tools", style=DIM)


def _path(argument: str) -> Path:
    try:
        parts = shlex.split(argument)
    except ValueError:  # a single quote, as in it's.flashmoe
        parts = [argument]
    return Path(parts[0] if len(parts) == 1 else argument).expanduser()


def _lines() -> Iterator[str]:
    """Yields the lines that the user types until Ctrl-D, or the lines of stdin if it is not a terminal."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings
    except ModuleNotFoundError as error:
        raise ArgumentError(f"chat needs {error.name}; install it: pip install 'flash-moe[chat]'") from error
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys, prompt_continuation="  ")
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
