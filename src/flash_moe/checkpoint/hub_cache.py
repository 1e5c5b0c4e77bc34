"""Lists and removes the models in the cache of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, HubError
from .folder import has_all_weights
from .hub import REPO, cache_folder, hub_errors


@dataclass(frozen=True)
class Downloaded:
    """A repository in the hub's cache.

    Attributes:
        repo: ``org/name``.
        path: the folder of its newest revision.
        nbytes: bytes of all its revisions on the disk, including unfinished files.
        complete: whether the newest revision has all of its weights.
    """

    repo: str
    path: str
    nbytes: int
    complete: bool


def downloaded() -> list[Downloaded]:
    """Lists the models in the hub's cache by name: those with safetensors files or unfinished downloads."""
    from huggingface_hub import scan_cache_dir

    cache = cache_folder()
    found = []
    for repo in scan_cache_dir(cache).repos if cache.is_dir() else ():
        if repo.repo_type != "model" or not repo.revisions:
            continue
        path = max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
        unfinished = any(repo.repo_path.glob("blobs/*.incomplete"))
        if unfinished or any(path.glob("*.safetensors")):
            blobs = [file for file in (repo.repo_path / "blobs").glob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in blobs) or repo.size_on_disk
            found.append(Downloaded(repo.repo_id, str(path), size, has_all_weights(path)))
    return sorted(found, key=lambda one: one.repo)


def remove(repo: str) -> Downloaded:
    """Removes all revisions of a repository from the hub's cache, and returns a description of them.

    Raises:
        ArgumentError: the argument is not the name of a repository.
        HubError: the repository is not in the cache, or cannot be removed.
    """
    if not REPO.fullmatch(repo):
        raise ArgumentError(f"{repo!r} is no repository of the hub; expected org/name. Folders are yours to remove.")
    known = {one.repo: one for one in downloaded()}
    if repo not in known:
        raise HubError(f"{repo} is not in {cache_folder()}; there: {', '.join(known) or 'no models'}")
    from huggingface_hub import scan_cache_dir

    with hub_errors(repo, None):
        found = scan_cache_dir(cache_folder())
        hashes = [r.commit_hash for one in found.repos if one.repo_id == repo for r in one.revisions]
        found.delete_revisions(*hashes).execute()
    if Path(known[repo].path).exists():
        raise HubError(f"{known[repo].path} could not be removed; check whose files these are, and remove the folder")
    return known[repo]
