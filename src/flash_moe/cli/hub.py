"""The commands `flash-moe download`, `list` and `remove` for models in the cache of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer
from typer import Argument, Option

from .arguments import JsonOption, RevisionOption, VerboseOption
from .console import print_json, say

_REPO = Argument(metavar="REPO", help="A repository on the Hugging Face hub: org/name.", show_default=False)
DOWNLOAD_EXAMPLES = """\b
Examples:
  flash-moe info ORG/NAME      what it is and how large, before a download
  flash-moe download ORG/NAME
  flash-moe download ORG/NAME --revision v1.0"""
LIST_EXAMPLES = """\b
Examples:
  flash-moe list
  flash-moe list --json | jq -r '.models[].repo'"""
REMOVE_EXAMPLES = """\b
Examples:
  flash-moe remove ORG/NAME
  flash-moe remove ORG/NAME --yes"""


def download(
    repo: Annotated[str, _REPO],
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Download a model from the Hugging Face hub.

    It downloads only the files that are needed to run the model, to the hub's cache (HF_HUB_CACHE). You can stop it at
    any time and run the same command again to continue. Other commands accept a repository too, and download it if
    necessary.
    """
    from ..amounts import format_bytes
    from ..checkpoint.hub import REPO, cache_folder, free_space, list_files, resolve
    from ..errors import ArgumentError

    if not REPO.fullmatch(repo):
        raise ArgumentError(f"{repo!r} is no repository of the hub; expected org/name")
    size = sum(file.size for file in list_files(repo, revision=revision))
    free = free_space(cache_folder())
    say(f"{repo}: {format_bytes(size)} to {cache_folder()}, where {format_bytes(free)} are free")
    folder = resolve(repo, revision=revision)
    if as_json:
        print_json({"repo": repo, "path": str(folder), "bytes": size})
    else:
        print(folder)


def list_models(as_json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """List the models in the hub's cache.

    Shows the size of each model on the disk, and whether it is complete.
    """
    from ..amounts import format_bytes
    from ..checkpoint.hub import cache_folder
    from ..checkpoint.hub_cache import downloaded

    found = downloaded()
    if as_json:
        print_json({"cache": str(cache_folder()), "models": [dataclasses.asdict(one) for one in found]})
        return
    width = max((len(one.repo) for one in found), default=0)
    for one in found:
        print(f"{one.repo:{width}}  {format_bytes(one.nbytes):>9}{'' if one.complete else '  incomplete'}")
    if not found:
        say(f"no models in {cache_folder()}")


def remove(
    repo: Annotated[str, _REPO],
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove a model from the hub's cache, after asking."""
    from ..amounts import format_bytes
    from ..checkpoint.hub_cache import downloaded
    from ..checkpoint.hub_cache import remove as remove_from_cache

    known = next((one for one in downloaded() if one.repo == repo), None)
    if known is not None and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("there is nobody to ask; pass it to remove the model.", param_hint="'--yes'")
        typer.confirm(f"Remove {repo}, {format_bytes(known.nbytes)}?", abort=True, err=True)
    gone = remove_from_cache(repo)
    if as_json:
        print_json({"repo": gone.repo, "bytes": gone.nbytes})
    else:
        print(f"removed {gone.repo}: {format_bytes(gone.nbytes)} are free again")
