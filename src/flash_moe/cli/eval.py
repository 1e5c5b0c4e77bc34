"""The command `flash-moe eval`: measures the quality of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .arguments import (
    MODEL_HELP,
    OWN,
    DropColdOption,
    DtypeOption,
    ExpertIOChoice,
    ExpertIOOption,
    ExpertsPerToken,
    JsonOption,
    PreferCachedOption,
    PrefetchOption,
    RevisionOption,
    ThinkingOption,
    VerboseOption,
    experts_per_token,
)
from .console import print_json
from .loading import load

if TYPE_CHECKING:
    from ..evaluation import LayerwiseModel, ToolCallCase, ToolCallScore

EXAMPLES = """\b
Examples:
  flash-moe eval MODEL --text book.txt
  flash-moe eval MODEL --text chats.jsonl --reference-experts-per-token own
  flash-moe eval MODEL --text chats.jsonl --reference MODEL2 --json
  flash-moe eval MODEL --tool-calls calls.jsonl --no-thinking"""
_REFERENCE_K = "--reference-experts-per-token"
_STAGES = {
    "reference layers": ("the reference", "layers"),
    "layers": ("the model", "layers"),
    "decoded tokens": ("the model", "tokens"),
    "tokens": ("scoring", "tokens"),
}


def command(
    model: Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    text: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help='Score a text: plain UTF-8, or conversations, which are .jsonl with "messages" and, if you like, '
            '"tools" and "enable_thinking".',
        ),
    ] = None,
    tool_calls: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help='Score tool calls: .jsonl with "messages", "tools" and the "calls" that should follow, each with '
            '"name" and "arguments"; [] for none.',
        ),
    ] = None,
    k: ExpertsPerToken = None,
    reference: Annotated[
        str | None,
        Option(metavar="MODEL2", help="Compare with this checkpoint on the text; it needs the same tokenizer."),
    ] = None,
    reference_k: Annotated[
        str | None,
        Option(
            _REFERENCE_K,
            metavar="N|own",
            help="K of the reference, which is MODEL itself if --reference is not given.  [default: own]",
        ),
    ] = None,
    window: Annotated[int, Option(metavar="N", min=2, help="Tokens per window of a plain text.")] = 2048,
    limit: Annotated[
        int | None, Option(metavar="N", min=1, help="Use only the first N conversations, windows and tool calls.")
    ] = None,
    max_tokens: Annotated[int, Option(metavar="N", min=1, help="Maximum number of tokens for a tool call.")] = 1024,
    thinking: ThinkingOption = None,
    token_by_token: Annotated[
        bool,
        Option(
            "--token-by-token",
            help="Score the text as generation runs it, a token at a time: slow, but the options below take effect.",
        ),
    ] = False,
    prefetch: PrefetchOption = False,
    drop_cold_below: DropColdOption = 0.0,
    prefer_cached: PreferCachedOption = 0.0,
    as_json: JsonOption = False,
    expert_io: ExpertIOOption = ExpertIOChoice.auto,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure quality: perplexity, KL divergence, tool calls.

    The whole text passes through one layer after the other. So memory holds only one layer, and every expert is read
    once. A reference (another K, other bits) runs in the same way, and both are compared token by token. Tool calls are
    generated greedily.
    """
    if text is None and tool_calls is None:
        raise typer.BadParameter(
            "there is nothing to measure; pass one or both.", param_hint="'--text' / '--tool-calls'"
        )
    compared = reference is not None or reference_k is not None
    if text is None and compared:
        raise typer.BadParameter("a reference is compared on a text; pass --text too.", param_hint="'--reference'")
    streaming: dict[str, Any] = {
        "prefetch": prefetch,
        "drop_cold_below": drop_cold_below,
        "prefer_cached": prefer_cached,
    }
    if text is not None and any(streaming.values()) and not token_by_token:
        raise typer.BadParameter(
            "they act on single tokens; pass --token-by-token too to score a text.",
            param_hint="'--prefetch' / '--drop-cold-below' / '--prefer-cached'",
        )
    if text is None and token_by_token:
        raise typer.BadParameter("it says how a text is scored; pass --text too.", param_hint="'--token-by-token'")
    wanted = experts_per_token(k)
    reference_wanted = experts_per_token(OWN if reference_k is None else reference_k, f"'{_REFERENCE_K}'")
    options: dict[str, Any] = {"expert_io": expert_io.value, "dtype": None if dtype is None else dtype.value}

    from ..machines.joining import launched

    if text is not None and launched():
        raise typer.BadParameter(
            "it is scored on one machine; start the command without mlx.launch, or score --tool-calls alone.",
            param_hint="'--text'",
        )
    from ..evaluation import DecodedModel, open_scored, read_sequences, read_tool_call_cases, token_scores
    from ..nn.streaming_options import StreamingOptions
    from ..progress import Display, Progress
    from .eval_report import Report

    given = {"experts_per_token": wanted, "revision": revision, **options}
    if token_by_token:
        own: LayerwiseModel = DecodedModel.open(model, streaming=StreamingOptions(**streaming), **given)
    else:
        own = open_scored(model, **given)
    folder = own.checkpoint.folder
    other = scores = called = None
    if compared:
        other = open_scored(reference or folder, experts_per_token=reference_wanted, **options)
    cases = None if tool_calls is None else read_tool_call_cases(tool_calls, limit)
    if text is not None:
        sequences = read_sequences(text, own.tokenizer, window=window, limit=limit, enable_thinking=thinking)
        with Display() as show:

            def told(stage: str, done: int, total: int) -> None:
                what, unit = _STAGES[stage]
                show(Progress(what, done, total, unit))

            scores = token_scores(own, sequences, other, told)
    if cases is not None:
        called = _call_tools(folder, {"experts_per_token": wanted, **options, **streaming}, cases, max_tokens, thinking)
    report = Report(own, other, text, scores, tool_calls, called)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)


def _call_tools(
    folder: Path, options: dict[str, Any], cases: list[ToolCallCase], max_tokens: int, thinking: bool | None
) -> ToolCallScore:
    from ..evaluation import greedy, tool_call_score
    from ..progress import Display, Progress

    with load(str(folder), None, options) as model, Display() as show:
        generate = greedy(model, max_tokens, thinking)
        return tool_call_score(cases, generate, lambda done, total: show(Progress("tool calls", done, total, "cases")))
