"""Opens a checkpoint on the hub with only headers, or with some of its weight files."""

from __future__ import annotations

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import HubError
from .folder import INDEX
from .hub import HubFile, cache_folder, commit_of, free_space, hub_errors, list_files, resolve
from .integers import check_order
from .packed import MANIFEST
from .safetensors import MAX_HEADER_BYTES

_TEXTS = ("config.json", INDEX, MANIFEST)
_FIRST = 256 << 10  # bytes of the first request for a file; most headers are shorter
_CONNECTIONS = 8
_TIMEOUT = 30  # seconds
_BLOCK = 16 << 20  # bytes of each request for a whole file
_PARTIAL = ".download"


@dataclass(frozen=True)
class Download:
    """A repository that is not on this machine.

    Attributes:
        nbytes: bytes of the files to download.
        free: free bytes on the disk of the hub's cache.
    """

    nbytes: int
    free: int

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.free


@contextmanager
def local_or_headers(model: str, *, revision: str | None = None) -> Iterator[tuple[Path, Download | None]]:
    """Opens a checkpoint without downloading it.

    For a checkpoint on this machine, it yields its folder and None. Otherwise it yields a temporary folder with the
    headers of the repository's files, and the size of the download. The files there are sparse: their weights are holes
    that take no space. The hub's cache does not change.

    Args:
        model: a folder, a repository on the hub (``org/name``) or ``demo``.

    Raises:
        CheckpointError: the folder does not exist.
        HubError: the repository or a header could not be read.
    """
    try:
        local = resolve(model, revision=revision, local_files_only=True)
    except HubError:
        files = list_files(model, revision=revision)
        download = Download(sum(file.size for file in files), free_space(cache_folder()))
        wanted = [file for file in files if file.name in _TEXTS or file.name.endswith(".safetensors")]
        with TemporaryDirectory(prefix="flash-moe-headers-") as folder:
            _Source(model, revision, None).copy_all(wanted, Path(folder))
            yield Path(folder), download
    else:
        yield Path(local), None


class ShardFolder(ABC):
    """A folder with weight files on request. The other files are sparse files with their headers.

    Attributes:
        folder: the folder.
        store: the folder for the files that are present.
        sizes: size of each file in bytes, by name.
        headers_of: the bytes of each file before its data, by name.
    """

    folder: Path
    store: Path
    sizes: Mapping[str, int]
    headers_of: Mapping[str, bytes]

    @abstractmethod
    def number(self, name: str) -> int:
        """Returns the index of a weight file in the sorted list."""

    @abstractmethod
    def get(self, names: Sequence[str]) -> None:
        """Adds these files to the store."""

    def keep_in(self, beside: Callable[[str], Path]) -> None:
        """Selects the folder for files; ``beside`` creates a folder with a name."""
        self.store = beside("source")

    def space(self, names: Collection[str]) -> int:
        """Returns the bytes that these files need on the disk."""
        return sum(self.sizes[name] for name in names)

    def bring(self, names: Collection[str]) -> None:
        """Removes other weight files and gets these. Complete and partial files are reused.

        Raises:
            HubError: a file could not be downloaded; call again to continue.
            CheckpointError: a file has integers in an order that MLX does not support.
        """
        for path in self.store.iterdir():
            if path.name.removesuffix(_PARTIAL) not in names:
                if path.name in self.sizes:
                    self.make_hole(path.name)
                path.unlink()
        self.get([name for name in sorted(names) if not (self.store / name).exists()])
        for name in names:
            (self.folder / name).unlink()
            (self.folder / name).symlink_to(self.store / name)
            check_order(self.store / name)

    def make_hole(self, name: str) -> None:
        """Replaces a file of the folder by a sparse file with its header."""
        hole = self.folder / name
        hole.unlink(missing_ok=True)
        hole.write_bytes(self.headers_of[name])
        os.truncate(hole, self.sizes[name])


class Shards(ShardFolder):
    """The weight files of a repository, which are downloaded on request.

    Args:
        repo, revision, token: as for :func:`.hub.resolve`. All files come from the current commit of the revision.

    Raises:
        HubError: the repository could not be read.
    """

    def __init__(self, repo: str, *, revision: str | None, token: str | bool | None) -> None:
        self._repo, self._commit = repo, commit_of(repo, revision=revision, token=token)
        self._files = list_files(repo, revision=self._commit, token=token)
        self._source = _Source(repo, self._commit, token)
        self.sizes = {file.name: file.size for file in self._files if file.name.endswith(".safetensors")}
        self._names = sorted(self.sizes)

    def identity(self) -> dict[str, Any]:
        """Returns data that identifies this source."""
        return {"source": self._repo, "commit": self._commit}

    def number(self, name: str) -> int:
        """Returns the index of a weight file in the repository."""
        return self._names.index(name)

    @contextmanager
    def headers(self) -> Iterator[Path]:
        """Yields the folder, with all text files and weight files."""
        with TemporaryDirectory(prefix="flash-moe-headers-") as folder:
            self.folder = Path(folder)
            self._source.copy_all(self._files, self.folder)
            self.headers_of = {name: _header(self.folder / name) for name in self._names}
            yield self.folder

    def get(self, names: Sequence[str]) -> None:
        """Downloads these files. Partial files are reused. Raises HubError if a download fails."""
        for name in names:
            self._download(name)

    def _download(self, name: str) -> None:
        temporary, size = self.store / f"{name}{_PARTIAL}", self.sizes[name]
        file = next(file for file in self._files if file.name == name)
        with temporary.open("ab") as stream, ThreadPoolExecutor(_CONNECTIONS) as pool:
            starts = range(stream.tell(), size, _BLOCK)
            for batch in (starts[i : i + _CONNECTIONS] for i in range(0, len(starts), _CONNECTIONS)):
                blocks = pool.map(lambda start: self._source.read(file, start, min(start + _BLOCK, size)), batch)
                for block in blocks:
                    stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.store / name)


def _header(path: Path) -> bytes:
    """Returns the beginning of a weight file up to the end of its header."""
    with path.open("rb") as stream:
        prefix = stream.read(8)
        return prefix + stream.read(struct.unpack("<Q", prefix)[0])


class _Source:
    def __init__(self, repo: str, revision: str | None, token: str | bool | None) -> None:
        self._repo, self._revision, self._token = repo, revision, token

    def copy_all(self, files: Sequence[HubFile], folder: Path) -> None:
        """Writes complete text files, and the headers of weight files."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda file: self._copy(file, folder), files))

    def _copy(self, file: HubFile, folder: Path) -> None:
        if not file.name.endswith(".safetensors"):
            (folder / file.name).write_bytes(self.read(file, 0, file.size))
            return
        data = self.read(file, 0, min(_FIRST, file.size))
        length = 8 + struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        if not 8 < length <= min(file.size, MAX_HEADER_BYTES):
            raise HubError(f"{file.name} of {self._repo} is no safetensors file; choose another repository or revision")
        if length > len(data):
            data += self.read(file, len(data), length)
        path = folder / file.name
        path.write_bytes(data[:length])
        os.truncate(path, file.size)

    def read(self, file: HubFile, start: int, stop: int) -> bytes:
        """Returns the bytes from ``start`` to ``stop`` of a file."""
        if start == stop:
            return b""
        with hub_errors(self._repo, self._revision):
            from huggingface_hub import hf_hub_url
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            headers = build_hf_headers(token=self._token) | {"Range": f"bytes={start}-{stop - 1}"}
            url = hf_hub_url(self._repo, file.name, revision=self._revision)
            answer = get_session().get(url, headers=headers, timeout=_TIMEOUT)
            hf_raise_for_status(answer)
            if len(answer.content) != stop - start:
                raise HubError(
                    f"{url} sent {len(answer.content)} bytes, expected the {stop - start} that were asked for; try again"
                )
            return answer.content
