"""A checkpoint on the hub without its weights: a folder of files that are as long as the real ones and hold headers."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import HubError
from .files import INDEX
from .hub import HubFile, hub_errors, list_files
from .packed import MANIFEST
from .safetensors import MAX_HEADER_BYTES

_TEXTS = ("config.json", INDEX, MANIFEST)
_FIRST = 256 << 10  # bytes of a file that are asked for first; most headers are shorter
_CONNECTIONS = 8
_TIMEOUT = 30  # seconds


@contextmanager
def headers_only(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> Iterator[Path]:
    """Within, a folder from which :class:`~flash_moe.checkpoint.files.Checkpoint` can be opened.

    Weights are holes in sparse files, which take no space. Nothing is put into the hub's cache, and the folder goes.

    Raises:
        HubError: the repository or a header could not be had.
    """
    with TemporaryDirectory(prefix="flash-moe-headers-") as folder:
        files = list_files(repo, revision=revision, token=token)
        wanted = [file for file in files if file.name in _TEXTS or file.name.endswith(".safetensors")]
        source = _Source(repo, revision, token)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda file: source.copy(file, Path(folder)), wanted))
        yield Path(folder)


class _Source:
    def __init__(self, repo: str, revision: str | None, token: str | bool | None) -> None:
        self._repo, self._revision, self._token = repo, revision, token

    def copy(self, file: HubFile, folder: Path) -> None:
        """Writes a text whole, and of a weight file its header."""
        if file.name in _TEXTS:
            (folder / file.name).write_bytes(self._read(file, 0, file.size))
            return
        data = self._read(file, 0, min(_FIRST, file.size))
        length = 8 + struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        if not 8 < length <= min(file.size, MAX_HEADER_BYTES):
            raise HubError(f"{file.name} of {self._repo} is no safetensors file; choose another repository or revision")
        if length > len(data):
            data += self._read(file, len(data), length)
        path = folder / file.name
        path.write_bytes(data[:length])
        os.truncate(path, file.size)

    def _read(self, file: HubFile, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop`` of a file."""
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
