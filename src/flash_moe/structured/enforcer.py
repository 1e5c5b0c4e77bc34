"""Decides which format is enforced, from the request, the chat template and the installed packages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..generation.constraint import AfterReasoning, Constraint
from ..text import Tokenizer
from .grammar import CallForm, reply_grammar
from .matcher import GrammarConstraint, Grammars, installed, require
from .response_formats import ResponseFormat, Specification, response_format

_log = logging.getLogger(__name__)
_FREE_CHOICES = ("auto", "none")


@dataclass(frozen=True)
class Enforced:
    """The enforced format of a reply.

    Attributes:
        name: ``"tools"``, ``"json"``, ``"regex"``, ``"choices"``, or two of them (``"tools or json"``); empty if no
            format is enforced.
        grammar: the grammar; None if no format is enforced.
        format: the requested format of the text; None if there is none.
        forbidden: tokens that must not occur.
    """

    name: str = ""
    grammar: GrammarConstraint | None = None
    format: ResponseFormat | None = None
    forbidden: tuple[int, ...] = ()


class Enforcer:
    """Enforces formats and schemas of tools in the replies of one model.

    Args:
        tokenizer: tokenizer of the model.
        size: width of the model's logits.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size
        self._grammars = Grammars(tokenizer, size)
        self._told: set[str] = set()  # reasons that were logged already
        self._tags = self._pair("<tool_call>", "</tool_call>")
        self._reasoning = self._pair("<think>", "</think>")

    def enforce(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str,
        strict_tools: bool | None,
        wanted: Specification | None,
    ) -> Enforced:
        """Decides which format to enforce, and starts to compile its grammar in a thread.

        Args:
            tools, tool_choice, strict_tools: as in :meth:`flash_moe.Model.stream`.
            wanted: the argument ``response_format``.

        Raises:
            ArgumentError: the arguments are invalid, contradict each other or cannot be enforced.
        """
        format = response_format(wanted)
        if format is not None:
            require("response_format")
        if tool_choice not in _FREE_CHOICES and not tools:
            raise ArgumentError(f"tool_choice is {tool_choice!r}, expected tools to choose from; pass tools=[...]")
        calls = bool(tools) and tool_choice != "none"
        if not calls or tools is None:
            grammar = (
                None if format is None else self._grammars.constraint(reply_grammar((), "auto", "text", None, format))
            )
            opening = self._tokenizer.token_id("<tool_call>") if tools else None
            return Enforced(
                "" if format is None else format.kind, grammar, format, () if opening is None else (opening,)
            )
        needed = self._needed(tool_choice, strict_tools, format)
        if not needed and (strict_tools is False or not installed()):
            return Enforced()
        try:
            grammar = self._grammars.constraint(reply_grammar(tools, tool_choice, self._form(), self._tags, format))
        except ArgumentError as error:
            if needed:
                raise
            if str(error) not in self._told:
                self._told.add(str(error))
                _log.warning("tool calls are not held to their schemas (strict_tools=None): %s", error)
            return Enforced()
        return Enforced("tools" if format is None else f"tools or {format.kind}", grammar, format)

    def constraint(self, enforced: Enforced, prompt: Sequence[int], begun: str = "") -> Constraint | None:
        """Returns the constraint for the reply to a prompt.

        Reasoning before the constrained part is not constrained.

        Args:
            begun: the text of the reply that the prompt contains already, without reasoning.

        Raises:
            ArgumentError: this text does not fit the format.
        """
        if enforced.grammar is None:
            return None
        enforced.grammar.end = next((token for token in reversed(prompt) if token in self._grammars.ends), None)
        if begun and not self.thinks(prompt):
            if enforced.format is None:  # only calls are enforced; the text before a call is free
                begun = begun[begun.find("<tool_call>") :] if "<tool_call>" in begun else ""
            if not enforced.grammar.begin(self._tokenizer.encode(begun)):
                raise ArgumentError(f"the prefill {begun!r} does not fit the format of the reply; change or drop it")
            return enforced.grammar
        if self._reasoning is None:
            return enforced.grammar
        opening, closing = self._reasoning
        inside = self.thinks(prompt)
        template = self._tokenizer.chat_template
        may_open = (
            self._last(prompt, closing) < 0 and not inside and template is not None and template.mentions("<think>")
        )
        if not inside and not may_open:
            return enforced.grammar
        gap = [self._tokenizer.encode(text)[0] for text in ("\n", "\n\n")]
        return AfterReasoning(
            enforced.grammar, opening if may_open else None, closing, gap, self._grammars.ends, self._size, inside
        )

    def thinks(self, prompt: Sequence[int]) -> bool:
        """Returns whether a prompt ends inside reasoning."""
        return self._reasoning is not None and self._last(prompt, self._reasoning[0]) > self._last(
            prompt, self._reasoning[1]
        )

    def _needed(self, choice: str, strict: bool | None, format: ResponseFormat | None) -> str:
        """Returns the name of the argument that requires a grammar of calls, if there is one."""
        if strict:
            needed = "strict_tools=True"
        elif choice != "auto":
            needed = f"tool_choice={choice!r}"
        else:
            needed = "response_format beside tools" if format is not None else ""
        if needed:
            if strict is False:
                raise ArgumentError(
                    f"{needed} holds calls to their schemas, which strict_tools=False switches off; drop it"
                )
            require(needed)
        return needed

    def _form(self) -> CallForm:
        """Returns the form of tool calls in the chat template."""
        template = self._tokenizer.chat_template
        if template is not None and self._tags is not None and template.mentions("<tool_call>"):
            if template.mentions("<function="):
                return "text"
            if template.mentions('"arguments"'):
                return "json"
        raise ArgumentError(
            "found no form of tool calls in the chat template that can be enforced, expected <function=NAME> or "
            '{"name": ..., "arguments": ...} inside <tool_call>; pass strict_tools=False'
        )

    def _pair(self, opening: str, closing: str) -> tuple[int, int] | None:
        first, last = self._tokenizer.token_id(opening), self._tokenizer.token_id(closing)
        return None if first is None or last is None else (first, last)

    def _last(self, prompt: Sequence[int], wanted: int) -> int:
        """Returns the last position of a token in the last message of a prompt; -1 if it does not occur."""
        for position in range(len(prompt) - 1, -1, -1):
            if prompt[position] == wanted:
                return position
            if prompt[position] in self._grammars.ends:
                break
        return -1
