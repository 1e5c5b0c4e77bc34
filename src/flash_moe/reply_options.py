"""Names and types of the options of a reply, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .generation.cancelling import Event
from .generation.sampling import LogitsProcessor
from .progress import ProgressOption
from .structured import Specification
from .text.function_tools import Tool


class ReplyOptions(TypedDict, total=False):
    """The options of :meth:`flash_moe.Model.generate` beside the prompt; :meth:`flash_moe.Model.stream` describes them."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    tools: Sequence[Tool] | None
    tool_choice: str
    strict_tools: bool | None
    response_format: Specification | None
    logits_processors: Sequence[LogitsProcessor]
    logprobs: int | None
    enable_thinking: bool | None
    reasoning_budget: int | None
    template_variables: Mapping[str, Any] | None
    prefill: str
    raw: bool
    cancel: Event | None
    progress: ProgressOption
