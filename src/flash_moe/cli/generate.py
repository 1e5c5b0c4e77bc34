"""The command `flash-moe generate`: streams a reply to stdout and a summary to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .arguments import (
    MODEL_HELP,
    ExpertsPerToken,
    JsonOption,
    ThinkingOption,
    read_prompt,
)
from .console import DIM, INTERRUPTED, at_terminal, print_json, say, write
from .loading import Loader, loads

if TYPE_CHECKING:
    from ..generation.result import Chunk
    from ..model import Model

EXAMPLES = """\b
Examples:
  flash-moe generate MODEL "Why is the sky blue?"
  flash-moe generate MODEL < question.txt
  flash-moe generate MODEL -k own --temperature 0.7 --top-p 0.95 "A haiku"
  flash-moe generate MODEL --raw --stop ";" "SELECT name FROM"
  flash-moe generate MODEL --json "Hi" | jq .stats"""


@loads
def command(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    prompt: Annotated[
        str | None, Argument(metavar="PROMPT", help="The prompt; '-' or nothing reads stdin.", show_default=False)
    ] = None,
    k: ExpertsPerToken = None,
    max_tokens: Annotated[int, Option(metavar="N", min=1, help="Maximum number of tokens to generate.")] = 512,
    system: Annotated[str | None, Option(metavar="TEXT", help="A system message.")] = None,
    thinking: ThinkingOption = None,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt without a chat template.")] = False,
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="End before this text; may be repeated.")] = None,
    as_json: JsonOption = False,
    temperature: Annotated[
        float | None,
        Option(
            metavar="T", help="0 takes the most probable token (greedy); 1 samples from the model's own distribution."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        Option(metavar="P", help="Sample from the most probable tokens whose sum reaches P (above 0, at most 1)."),
    ] = None,
    top_k: Annotated[
        int | None, Option(metavar="N", help="Sample from the N most probable tokens; 0: from all.")
    ] = None,
    min_p: Annotated[
        float | None,
        Option(metavar="P", help="Sample from tokens at least P times as probable as the top token (0 to 1)."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, Option(metavar="X", help="Above 1 makes repetition less likely; 1 is off.")
    ] = None,
    seed: Annotated[int | None, Option(metavar="N", help="Makes sampling repeatable.")] = None,
    *,
    loading: Loader,
) -> None:
    """Answer a prompt, and stream the text.

    The last line, on stderr, gives the speed, the number of experts per token and the bytes read per token. Sampling
    options that are not given come from the checkpoint; if it has none, decoding is greedy.
    """
    if raw and (system is not None or thinking is not None):
        raise typer.BadParameter(
            "it leaves out the chat template, which --system and --thinking need.", param_hint="'--raw'"
        )
    text = read_prompt(prompt)
    sampling: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    options = {"max_tokens": max_tokens, "stop": stop or (), "enable_thinking": thinking, "raw": raw, **sampling}

    from ..generation.sampling import Sampling

    Sampling(**{name: value for name, value in sampling.items() if value is not None})  # before a long load
    messages: Any = text
    if system is not None:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    with loading(model, k) as loaded:
        _reply(loaded, messages, options, as_json)


def _reply(model: Model, messages: Any, options: dict[str, Any], as_json: bool) -> None:
    from ..progress import Progress, following

    chunks: list[Chunk] = []
    interrupted = False
    try:
        with following(at_terminal()) as show:
            for chunk in model.stream(messages, progress=at_terminal(), **options):
                chunks.append(chunk)
                if not as_json:
                    write(chunk.raw_text)
                elif show is not None:
                    show(Progress("generate", len(chunks), options["max_tokens"], "tokens at most"))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if not as_json and chunks and not _ends_line(chunks):
            write("\n")
    _finish(model, chunks, interrupted, options["max_tokens"], as_json)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _ends_line(chunks: list[Chunk]) -> bool:
    return next((chunk.raw_text for chunk in reversed(chunks) if chunk.raw_text), "").endswith("\n")


def _finish(model: Model, chunks: list[Chunk], interrupted: bool, max_tokens: int, as_json: bool) -> None:
    if not chunks:
        say("interrupted before the first token", style=DIM)
        return
    last = chunks[-1]
    reason = "interrupted" if interrupted else last.finish_reason
    if as_json:
        reply = {
            "text": "".join(chunk.text for chunk in chunks),
            "reasoning": "".join(chunk.reasoning for chunk in chunks) or None,
            "finish_reason": reason,
            "tokens": [chunk.token for chunk in chunks],
            "stats": last.stats.to_dict(),
            "model": str(model.path),
        }
        print_json(reply)
        return
    limit = "cut by --max-tokens" if len(chunks) == max_tokens else "the context is full"
    note = {"interrupted": "interrupted", "length": limit}.get(reason or "")
    say(" · ".join(filter(None, (str(last.stats), note))), style=DIM)
