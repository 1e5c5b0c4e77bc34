"""A stand-in for the Hugging Face hub on 127.0.0.1: the endpoints a download uses, and faults on request.

It serves one repository and advertises no xet storage, so clients use plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubServer:
    """Serves `files` as repository `repo`; use as a context manager.

    Attributes:
        token: bearer token that every request must carry, if any.
        gated: file requests are refused, while the listing is public, as on the hub.
        faults: for a file, what its GETs in turn do: a number of bytes after which the connection is cut, or a
            three-digit HTTP error status as a string. Later GETs are served.
        log: every request, in order of arrival.
    """

    files: dict[str, bytes]
    repo: str = "org/model"
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    gated: bool = False
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def commit(self) -> str:
        return _oid(repr([(name, _oid(data)) for name, data in self.files.items()]).encode())

    def downloads(self) -> Counter[str]:
        """How often each file was asked for with GET."""
        return Counter(r.path.split("/", 5)[5] for r in self.log if r.method == "GET" and "/resolve/" in r.path)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        hub.log.append(Request(self.command, unquote(path), self.headers["Range"], token))
        api, pages = f"/api/models/{hub.repo}", f"/{hub.repo}/resolve/"
        if not (path == api or path.startswith((api + "/", pages))) or (hub.token and token != hub.token):
            return self._refuse(401, "RepoNotFound")
        if path.startswith(pages):
            revision, _, name = path.removeprefix(pages).partition("/")
        else:
            what, _, rest = path.removeprefix(api).strip("/").partition("/")
            revision, name = rest or "main", ""
        revision = unquote(revision)
        if revision not in (*hub.revisions, hub.commit):
            return self._refuse(404, "RevisionNotFound")
        if name:
            return self._file(name)
        return self._json(self._tree() if what == "tree" else self._info())

    do_HEAD = do_GET

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]} for f in self._tree()]
        return {"id": self.hub.repo, "sha": self.hub.commit, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        files = self.hub.files.items()
        return [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files]

    def _file(self, name: str) -> None:
        if self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if name not in self.hub.files:
            return self._refuse(404, "EntryNotFound")
        data, start = self.hub.files[name], 0
        faults = self.hub.faults.get(name) if self.command == "GET" else None
        fault = faults.pop(0) if faults else len(data)
        if isinstance(fault, str):
            return self._refuse(int(fault), "")
        size = len(data)
        if wanted := self.headers["Range"]:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, data = int(first), data[: int(last) + 1] if last else data
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        self._body(data[start:], fault)

    def _json(self, answer: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._body(json.dumps(answer).encode())

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self._body(b"")

    def _body(self, data: bytes, limit: int | None = None) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[:limit])
        self.close_connection = self.close_connection or (limit is not None and limit < len(data))

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""


@cache
def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Point huggingface_hub, which reads HF_ENDPOINT when it is imported, at another address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # older versions copy the constant
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
