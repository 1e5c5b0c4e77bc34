"""Resolves a model name to a folder: a local path, the demo model, or a repository that is downloaded from the hub.

The environment variables of `huggingface_hub` (`HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN`) work as
usual. That package is imported only for a repository.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from ..amounts import format_bytes
from ..errors import CheckpointError, DiskSpaceError, FlashMoEError, HubError
from ..progress import ProgressOption, ask, following
from ..shipped import shipped
from .downloading import Watch
from .folder import has_all_weights

logger = logging.getLogger(__name__)

NEEDED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "flash_moe.json"]
NEEDED += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
NEEDED += ["merges.txt", "chat_template.jinja", "chat_template.json"]
SUBFOLDERS = "*/*"  # excluded, because for fnmatch original/a.safetensors matches *.safetensors

DEMO = "demo"
NO_GGUF = "use a checkpoint of the same model with *.safetensors files, for instance from mlx-community on the hub"
_ASK_BYTES = 50e9  # a larger download needs a confirmation in a terminal
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


class HubFile(NamedTuple):
    """A file of a repository: its name, its size in bytes, and the name of its blob in the hub's cache."""

    name: str
    size: int
    blob: str


def resolve(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    progress: ProgressOption = True,
) -> Path:
    """Returns the folder of a checkpoint. Downloads it from the Hugging Face hub if necessary.

    Only files that are needed to run the model are downloaded. If a download is interrupted, finished files are kept;
    call again to continue. If the hub cannot be reached, a complete cached copy is used with a warning.

    Args:
        path_or_repo: a local directory, `"demo"`, or `org/name` on the hub. A local directory has priority, but one
            that is called demo must contain a config.json.
        revision: branch, tag or commit of the repository; None means its default branch. Ignored for local directories.
        token: access token for the hub. None or True uses the token that `hf auth login` stored; False sends none.
        cache_dir: folder of the hub's cache; None means the standard folder.
        local_files_only: whether to use only the cache and no network, as with `HF_HUB_OFFLINE=1`.
        progress: whether to report the progress of a download, see :func:`~flash_moe.progress.following`. With True in
            a terminal, a download of more than 50 GB needs a confirmation. A callable may be called in another thread.

    Raises:
        CheckpointError: the argument is neither a directory nor the name of a repository.
        DiskSpaceError: the missing files do not fit on the disk of the cache. Nothing was downloaded.
        HubError: the repository could not be downloaded, is not cached in offline mode, or the user declined the
            download.
    """
    name = os.fspath(path_or_repo)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for an unknown ~user)
    if path_or_repo == DEMO and not (path / "config.json").exists():
        return shipped(f"models/{DEMO}")
    if name and path.is_dir():
        return path
    if not isinstance(path_or_repo, str) or not REPO.fullmatch(name) or path.exists():
        if path.suffix == ".gguf":
            raise CheckpointError(f"{name!r} is a GGUF file, which is not supported; {NO_GGUF}")
        similar = get_close_matches(name.lower(), [DEMO])
        hint = f"Did you mean {DEMO}?" if similar else "Check the spelling and the current directory."
        raise CheckpointError(
            f"{name!r} {'is a file' if path.is_file() else 'does not exist'}; expected a directory that holds "
            f"config.json and *.safetensors, org/name on the hub, or demo. {hint}"
        )
    with hub_errors(name, revision):
        from huggingface_hub import constants
    cache = cache_folder(cache_dir)
    if local_files_only or constants.HF_HUB_OFFLINE:
        with hub_errors(name, revision):
            if cached := _cached(name, revision, cache):
                return cached
        raise HubError(
            f"no complete copy of {name} (revision {revision or 'main'}) in {cache}, and offline mode forbids the "
            "network. Call once without HF_HUB_OFFLINE and local_files_only, or pass a local directory."
        )
    try:
        files = list_files(name, revision=revision, token=token)
    except HubError as error:
        with hub_errors(name, revision):
            cached = _cached(name, revision, cache)
        if cached is None:
            raise
        logger.warning("using the cached copy in %s: %s", cached, error)
        return cached
    return _download(name, revision, token, cache, files, progress)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder of the hub's cache: ``HF_HUB_CACHE``, unless another is given."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()


def free_space(folder: Path) -> int:
    """Returns the free bytes of the disk that a folder is on, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _download(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache: Path,
    files: list[HubFile],
    progress: ProgressOption,
) -> Path:
    blobs = cache / f"models--{repo.replace('/', '--')}" / "blobs"
    # A partly downloaded file counts in full, because recent versions of huggingface_hub restart it.
    missing = [file for file in files if not (blobs / file.blob).is_file()]
    needed = sum(file.size for file in missing)
    free = free_space(cache)
    if needed > free:
        raise DiskSpaceError(
            f"{repo} needs {format_bytes(needed)} more in {cache}, where {format_bytes(free)} are free. "
            "Free some space, or name a larger disk with HF_HUB_CACHE."
        )
    note = f"{repo}: {len(missing)} files, {format_bytes(needed)}, to {cache} ({format_bytes(free)} free)"
    if missing:
        logger.info("downloading %s", note)
    if needed > _ASK_BYTES and progress is True and not ask(f"Download {note}?"):
        raise HubError(f"the download of {repo} was not wanted; nothing was downloaded")
    sizes = [(file.blob, file.size) for file in missing]
    with following(progress) as report, Watch(blobs, sizes, note, report) as watch, hub_errors(repo, revision):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import tqdm

        class Silent(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                watch.check()
                return super().update(n)

        folder = HfApi(token=token).snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=NEEDED,
            ignore_patterns=[SUBFOLDERS],
            max_workers=4,  # an interruption can lose every unfinished file
            tqdm_class=Silent,
        )
        return Path(folder)


def commit_of(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> str:
    """Returns the current commit of a revision of a hub repository.

    Raises:
        HubError: the repository could not be read.
    """
    with hub_errors(repo, revision):
        from huggingface_hub import HfApi

        return str(HfApi(token=token).model_info(repo, revision=revision, timeout=30).sha)


def list_files(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> list[HubFile]:
    """Lists the files of a hub repository that are needed to run the model, without downloading them.

    Raises:
        HubError: the repository could not be read, or contains no safetensors files.
    """
    with hub_errors(repo, revision):
        from huggingface_hub import HfApi

        siblings = (
            HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=30).siblings or []
        )
    files = [
        HubFile(s.rfilename, s.size or 0, (s.lfs.sha256 if s.lfs else s.blob_id) or "")
        for s in siblings
        if not fnmatch(s.rfilename, SUBFOLDERS) and any(fnmatch(s.rfilename, pattern) for pattern in NEEDED)
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        found = ", ".join(s.rfilename for s in siblings[:8]) or "no files"
        raise HubError(f"{repo} holds {found}; expected *.safetensors at its top level. Choose another repository.")
    return files


def _cached(repo: str, revision: str | None, cache: Path) -> Path | None:
    """Returns the cached snapshot if it contains all files that are needed to run the model, else None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", cache_dir=cache, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return folder if tokenizer and has_all_weights(folder) else None


@contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Converts errors of the hub's client to a HubError that says what to do."""
    try:
        yield
    except FlashMoEError:
        raise
    except Exception as error:  # broad: the client's errors have no common base
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{repo}"
        if isinstance(error, errors.GatedRepoError):
            message = f"{repo} is gated and this account has no access. Accept its terms at {page}, then log in with "
            message += "`hf auth login` or pass token=."
        elif isinstance(error, errors.RepositoryNotFoundError):
            message = f"there is no local directory {repo!r}, and no model to be seen at {page}. Check the spelling; "
            message += "a private repository needs `hf auth login` or token=."
        elif isinstance(error, errors.OfflineModeIsEnabled):
            message = f"cannot get {page}, because HF_HUB_OFFLINE is set; call again without it."
        elif isinstance(error, errors.RevisionNotFoundError):
            message = f"{repo} has no revision {revision!r}; expected a branch, tag or commit listed at {page}."
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
            message = (
                f"could not get {page} ({reason}). Check the connection, then call again: finished files are kept."
            )
        raise HubError(message) from error
