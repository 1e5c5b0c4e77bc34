"""`flash-moe info`: a checkpoint in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import resolve_experts_per_token
from ..errors import HubError
from .arguments import (
    MODEL_HELP,
    ExpertsPerToken,
    JsonOption,
    RevisionOption,
    VerboseOption,
    experts_per_token,
    local_checkpoint,
)
from .console import print_json

if TYPE_CHECKING:
    from ..packing.info import Info

EXAMPLES = """\b
Examples:
  flash-moe info MODEL
  flash-moe info MODEL -k own
  flash-moe info ORG/NAME           of a repository that was not downloaded
  flash-moe info MODEL --json | jq .bytes_per_token"""


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    k: ExpertsPerToken = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a checkpoint is, and how many bytes a token reads.

    Only headers are read, so it is quick however large the model is, and nothing is downloaded.
    """
    wanted = experts_per_token(k)

    from ..packing.info import describe

    with _folder(model, revision) as (folder, remote):
        found = _at(describe(folder), wanted)
    if as_json:
        print_json(dataclasses.asdict(found) | remote)
        return
    rows = _rows(found) if not remote else [("repository", model), *_rows(found)[1:], *_download_rows(remote)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    if remote and remote["download_bytes"] > remote["free_bytes"]:
        print("It does not fit on this disk: free some space, or name a larger disk with HF_HUB_CACHE.")
    elif remote:
        print(f"To download it: flash-moe download {model}")


@contextmanager
def _folder(model: str, revision: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Within, a folder with the headers of a checkpoint; and what is to be known of one that is not on this machine."""
    try:
        folder = local_checkpoint(model, revision)
    except HubError:
        from ..checkpoint.hub import list_files
        from ..checkpoint.hub_cache import cache_folder, free_space
        from ..checkpoint.remote import headers_only

        size = sum(file.size for file in list_files(model, revision=revision))
        free = free_space(cache_folder())
        with headers_only(model, revision=revision) as folder:
            yield folder, {"path": model, "downloaded": False, "download_bytes": size, "free_bytes": free}
    else:
        yield folder, {}


def _download_rows(remote: dict[str, Any]) -> list[tuple[str, str]]:
    from ..generation.summary import format_bytes

    size, free = format_bytes(remote["download_bytes"]), format_bytes(remote["free_bytes"])
    return [("download", f"{size}, not on this machine yet; {free} are free where it would go")]


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
