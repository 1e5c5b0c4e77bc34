"""The command `flash-moe info`: describes a checkpoint in numbers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from ..amounts import format_bytes, format_memory
from .arguments import (
    MODEL_HELP,
    ExpertsPerToken,
    JsonOption,
    RevisionOption,
    VerboseOption,
    experts_per_token,
)
from .console import print_json

if TYPE_CHECKING:
    from ..checkpoint.remote import Download
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
    """Describe a checkpoint, and show how many bytes a token reads.

    It reads only headers, so it is fast for a model of any size, and downloads nothing.
    """
    wanted = experts_per_token(k)

    from ..checkpoint.remote import local_or_headers
    from ..packing.info import describe

    with local_or_headers(model, revision=revision) as (folder, download):
        found = describe(folder, wanted)
    if download is not None:
        found = dataclasses.replace(found, path=model)
    if as_json:
        facts = {} if download is None else {"downloaded": False, "download": dataclasses.asdict(download)}
        print_json(dataclasses.asdict(found) | facts)
        return
    rows = _rows(found) if download is None else [("repository", model), *_rows(found)[1:]]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    if download is not None:
        print(f"\n{_sentence(model, found, download)}")


def _sentence(model: str, info: Info, download: Download) -> str:
    """Returns sentences about the download, the disk and the memory."""
    size, free = format_bytes(download.nbytes), format_bytes(download.free)
    memory = f"It keeps {format_memory(info.resident_bytes)} in memory and reads its experts from the disk."
    if not download.fits:
        return (
            f"A download of {size} does not fit on this disk, which has {free} free. Free some space, or name a folder "
            f"on a larger disk with HF_HUB_CACHE. {memory}"
        )
    return (
        f"A download of {size}; this disk has {free} free. {memory}\n"
        f"Will it be fast enough? flash-moe plan {model}\nTo download it: flash-moe download {model}"
    )


def _rows(info: Info) -> list[tuple[str, str]]:
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
        ("resident weights", format_memory(info.resident_bytes)),
        ("experts in all" if info.share is None else "experts here", format_bytes(info.expert_bytes)),
        *([] if info.share is None else [("share of the experts", f"{info.share}; run all shares as one group")]),
        ("experts per token", per_token),
    ]
