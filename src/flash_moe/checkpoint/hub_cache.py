"""Lists and removes the models in the cache of the Hugging Face hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
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
        complete: whether the newest revision has all of its weights, and lost none of its files.
    """

    repo: str
    path: str
    nbytes: int
    complete: bool


def downloaded() -> list[Downloaded]:
    """Lists the models in the hub's cache by name: those with safetensors files or unfinished downloads."""
    from huggingface_hub import scan_cache_dir

    cache = cache_folder()
    found: list[Downloaded | None] = []
    scanned = set()
    for repo in scan_cache_dir(cache).repos if cache.is_dir() else ():
        scanned.add(repo.repo_path.name)
        if repo.repo_type == "model" and repo.revisions:
            path = max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
            found.append(_described(repo.repo_id, repo.repo_path, path, repo.size_on_disk))
    for folder in cache.glob("models--*"):  # the hub's client leaves out repositories with a lost file
        snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
        if folder.name not in scanned and snapshots:
            newest = max(snapshots, key=lambda path: path.stat().st_mtime)
            repo_id = folder.name.removeprefix("models--").replace("--", "/")
            one = _described(repo_id, folder, newest, 0)
            found.append(None if one is None else replace(one, complete=False))
    return sorted((one for one in found if one is not None), key=lambda one: one.repo)


def _described(repo: str, folder: Path, snapshot: Path, nbytes: int) -> Downloaded | None:
    """Describes the folder of a repository, which has ``nbytes`` bytes if it has no blobs; None if it is no model."""
    if not any(folder.glob("blobs/*.incomplete")) and not any(snapshot.glob("*.safetensors")):
        return None
    blobs = [file for file in (folder / "blobs").glob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in blobs) or nbytes
    return Downloaded(repo, str(snapshot), size, has_all_weights(snapshot))


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
        if hashes:
            found.delete_revisions(*hashes).execute()
        else:  # a repository with a lost file
            shutil.rmtree(Path(known[repo].path).parents[1], ignore_errors=True)
    if Path(known[repo].path).exists():
        raise HubError(f"{known[repo].path} could not be removed; check whose files these are, and remove the folder")
    return known[repo]
