"""`flash-moe info`: a checkpoint in numbers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import resolve_experts_per_token
from .arguments import LOCAL_HELP, ExpertsPerToken, JsonOption, VerboseOption, experts_per_token, local_checkpoint
from .console import print_json

if TYPE_CHECKING:
    from ..packing.info import Info

EXAMPLES = """\b
Examples:
  flash-moe info MODEL
  flash-moe info MODEL -k own
  flash-moe info MODEL --json | jq .bytes_per_token"""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=LOCAL_HELP, show_default=False)],
    k: ExpertsPerToken = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a checkpoint is, and how many bytes a token reads.

    Only headers are read, so it is quick however large the model is.
    """
    wanted = experts_per_token(k)

    from ..packing.info import describe

    found = _at(describe(local_checkpoint(model)), wanted)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    rows = _rows(found)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _at(info: Info, wanted: int | None) -> Info:
    """The same at another K."""
    k = resolve_experts_per_token(wanted, info.model_experts_per_token)
    per_expert = info.bytes_per_token // info.experts_per_token
    return dataclasses.replace(info, experts_per_token=k, bytes_per_token=k * per_expert)


def _rows(info: Info) -> list[tuple[str, str]]:
    from ..amounts import format_bytes

    k, own = info.experts_per_token, info.model_experts_per_token
    one = len(info.expert_formats) == 1
    formats = [text if one else f"{text} ({n} layers)" for text, n in info.expert_formats.items()]
    per_token = f"{format_bytes(info.bytes_per_token)} at K={k}"
    if k != own:
        per_token += f", {format_bytes(info.bytes_per_token // k * own)} at the model's own {own}"
    return [
        ("path", info.path),
        ("model type", info.model_type),
        ("form", info.form),
        ("layers", f"{info.layers}, {info.attention_layers} of them with full attention"),
        ("hidden size", f"{info.hidden_size:,}"),
        ("vocabulary", f"{info.vocab_size:,} tokens"),
        ("context", f"{info.context:,} tokens"),
        ("experts per layer", f"{info.experts}, the model's own K is {own}"),
        *(("expert format" if i == 0 else "", text) for i, text in enumerate(formats)),
        ("bits per weight", f"{info.bits_per_weight:.2f} in the experts, with scales and biases"),
        ("expert record", format_bytes(info.record_bytes)),
        ("always in memory", format_bytes(info.resident_bytes)),
        ("experts in all", format_bytes(info.expert_bytes)),
        ("experts per token", per_token),
    ]
