from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer, use
from huggingface_hub import constants, errors

import flash_moe.checkpoint.hub
from flash_moe.checkpoint.downloading import Watch
from flash_moe.checkpoint.hub import HubFile, hub_errors, list_files, resolve
from flash_moe.errors import CheckpointError, ConfigError, DiskSpaceError, HubError
from flash_moe.models.config_json import read_config
from flash_moe.progress import Progress

SRC = Path(__file__).parents[2] / "src"
WEIGHTS = bytes(range(256)) * 8192  # 2 MiB: more than the socket buffers hold
NEEDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
    "model-1.safetensors": WEIGHTS,
    "model-2.safetensors": WEIGHTS[::-1],
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
}
INDEX = "model.safetensors.index.json"
UNWANTED = {
    "README.md": b"# model",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "weights.pt": b"pickle too",
    "logo.png": b"picture",
    "original/model.safetensors": b"again",
    "original/config.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(NEEDED | UNWANTED) as server:
        use(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)  # what a cut connection can lose
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tokens(hub: HubServer) -> set[str | None]:
    """The tokens sent with requests for the repository; the client also asks about itself, without one."""
    return {r.token for r in hub.log if hub.repo in r.path}


def closed_port() -> str:
    with HubServer({}) as server:
        return server.url


# Local paths


def test_directory_is_returned_as_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == Path("org/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/model") == tmp_path / "org" / "model"


def test_directory_needs_no_hub_client(tmp_path: Path) -> None:
    code = "import sys; from flash_moe.checkpoint.hub import resolve; resolve(sys.argv[1]); "
    code += "assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": str(SRC)}, check=True)


@pytest.mark.parametrize(
    "path",
    ["", "model", "./org/model", "/org/model", "~/no such", "~nobody-here/x", "org\\model", "a/b/c", "org/", "org/m l"],
)
def test_path_typo(path: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"does not exist; expected a directory .* org/name .* or demo. Check the spell"
    ):
        resolve(path)


@pytest.mark.parametrize("path", ["Demo", "dmeo", "./demo"])
def test_misspelt_demo(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; .* Did you mean demo\?$"):
        resolve(path)


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"model.gguf' is a GGUF file, which is not supported; use a checkpoint"):
        resolve(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="holds GGUF files, which are not supported; use a checkpoint"):
        read_config(tmp_path)


def test_path_object_is_never_a_repository() -> None:
    with pytest.raises(CheckpointError, match="'org/model' does not exist"):
        resolve(Path("org/model"))


def test_file_is_not_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; expected a directory"):
        resolve("org/model.safetensors")


# Downloads


def test_only_needed_files_and_only_once(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "flash_moe"):
        folder = resolve("org/model", cache_dir=tmp_path)
    assert contents(folder) == NEEDED
    assert hub.downloads() == dict.fromkeys(NEEDED, 1)
    assert f"downloading org/model: 6 files, 4.2 MB, to {tmp_path} (" in caplog.text
    assert capfd.readouterr() == ("", "")  # no progress bars where nobody looks

    hub.log.clear()
    caplog.clear()
    assert resolve("org/model", cache_dir=tmp_path) == folder
    assert not hub.downloads()
    assert not caplog.text


def test_list_files(hub: HubServer) -> None:
    files = list_files("org/model")
    assert {(f.name, f.size) for f in files} == {(name, len(data)) for name, data in NEEDED.items()}
    assert all(isinstance(f, HubFile) and f.blob for f in files)
    assert not hub.downloads()


def test_update_fetches_only_what_changed(hub: HubServer, tmp_path: Path) -> None:
    resolve("org/model", cache_dir=tmp_path)
    hub.log.clear()
    hub.files = {**hub.files, "config.json": b'{"new": 1}'}
    folder = resolve("org/model", cache_dir=tmp_path)
    assert contents(folder) == {**NEEDED, "config.json": b'{"new": 1}'}
    assert hub.downloads() == {"config.json": 1}


def test_cut_connection_is_resumed_where_it_broke(hub: HubServer, tmp_path: Path) -> None:
    hub.faults = {"model-1.safetensors": [1_000_000]}
    with contextlib.suppress(HubError):  # older clients leave the rest to the next call
        resolve("org/model", cache_dir=tmp_path)
    assert contents(resolve("org/model", cache_dir=tmp_path)) == NEEDED
    (start,) = (int(r.range.removeprefix("bytes=").removesuffix("-")) for r in hub.log if r.range)
    assert 900_000 < start <= 1_000_000


def test_interrupted_download_is_continued_by_the_next_call(hub: HubServer, tmp_path: Path) -> None:
    hub.faults = {"model-1.safetensors": [1_000_000, "500"]}
    with pytest.raises(HubError, match=r"could not get .*/org/model .* call again: finished files are kept"):
        resolve("org/model", cache_dir=tmp_path)
    finished = {p.read_bytes() for p in (tmp_path / "models--org--model" / "snapshots").rglob("*") if p.is_file()}
    assert finished and WEIGHTS not in finished

    hub.faults.clear()
    hub.log.clear()
    assert contents(resolve("org/model", cache_dir=tmp_path)) == NEEDED
    assert hub.downloads() == {name: 1 for name, data in NEEDED.items() if data not in finished}


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3"])
def test_revision_and_token_reach_the_server(hub: HubServer, tmp_path: Path, revision: str) -> None:
    hub.revisions, hub.token = (revision,), "hf_secret"
    folder = resolve("org/model", revision=revision, token="hf_secret", cache_dir=tmp_path)
    assert contents(folder) == NEEDED
    assert tokens(hub) == {"hf_secret"}
    assert f"/api/models/org/model/revision/{revision}" in {r.path for r in hub.log}
    assert resolve("org/model", revision=revision, cache_dir=tmp_path, local_files_only=True) == folder


# Free space


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=10**12 - size, free=size))


def test_free_space_is_checked_before_any_download(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "not" / "there"
    needed = sum(map(len, NEEDED.values()))
    free(monkeypatch, needed - 1)
    with pytest.raises(DiskSpaceError, match=rf"needs 4\.2 MB more in {cache}, where 4\.2 MB are free.*HF_HUB_CACHE"):
        resolve("org/model", cache_dir=cache)
    assert not hub.downloads() and not cache.exists()
    free(monkeypatch, needed)
    assert contents(resolve("org/model", cache_dir=cache)) == NEEDED


def test_cached_files_need_no_space(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("org/model", cache_dir=tmp_path)
    free(monkeypatch, 12)
    resolve("org/model", cache_dir=tmp_path)
    hub.files = {**hub.files, "config.json": b'{"thirteen":1}'}
    with pytest.raises(DiskSpaceError, match=r"needs 14 B more .* 12 B are free"):
        resolve("org/model", cache_dir=tmp_path)


# Offline


def test_listing_files_offline() -> None:
    message = r"^cannot get .*/org/model, because HF_HUB_OFFLINE is set; call again without"
    with pytest.raises(HubError, match=message), hub_errors("org/model", None):
        raise errors.OfflineModeIsEnabled("a long text")


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder = resolve("org/model", cache_dir=tmp_path / "full")
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    assert resolve("org/model", cache_dir=tmp_path / "full", local_files_only=how == "argument") == folder
    with pytest.raises(HubError, match=r"no complete copy of org/model .*offline mode .* Call once without"):
        resolve("org/model", cache_dir=tmp_path / "empty", local_files_only=how == "argument")
    with pytest.raises(HubError, match=r"revision v2"):
        resolve("org/model", revision="v2", cache_dir=tmp_path / "full", local_files_only=how == "argument")
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(HubError, match="no complete copy"):
        resolve("org/model", cache_dir=tmp_path / "full", local_files_only=how == "argument")
    assert not hub.log


def test_offline_an_incomplete_snapshot_serves_if_all_that_is_needed_is_there(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "mtp.c": "mtp.safetensors"}}'
    hub.files = {**NEEDED, INDEX: index, "mtp.safetensors": WEIGHTS[:100], "merges.txt": b"", "vocab.json": b"{}"}
    folder = resolve("org/model", cache_dir=tmp_path)
    for name in ("mtp.safetensors", "merges.txt", "chat_template.jinja"):
        (folder / name).unlink()
    assert resolve("org/model", cache_dir=tmp_path, local_files_only=True) == folder
    for name in ("model-2.safetensors", "config.json", INDEX):
        moved = (folder / name).rename(tmp_path / name)
        if name == INDEX:
            (folder / INDEX).write_text("{")
        with pytest.raises(HubError, match="no complete copy"):
            resolve("org/model", cache_dir=tmp_path, local_files_only=True)
        moved.rename(folder / name)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").unlink()
    with pytest.raises(HubError, match="no complete copy"):
        resolve("org/model", cache_dir=tmp_path, local_files_only=True)


def test_standard_environment(hub: HubServer, tmp_path: Path) -> None:
    code = "from flash_moe.checkpoint.hub import resolve; print(resolve('org/model'))"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"PYTHONPATH": str(SRC), "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path), "HF_TOKEN": "hf_env"}
    printed = []
    for offline, expected in (("0", {"hf_env"}), ("1", set())):
        hub.log.clear()
        env["HF_HUB_OFFLINE"] = offline
        printed.append(subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip())
        assert tokens(hub) == expected
    assert printed[0] == printed[1]
    assert contents(Path(printed[0])) == NEEDED


# What the hub refuses


def test_no_connection(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = resolve("org/model", cache_dir=tmp_path / "full")
    use(monkeypatch, closed_port())
    with pytest.raises(HubError, match=r"could not get http://127.* Check the connection") as caught:
        resolve("org/model", cache_dir=tmp_path / "empty")
    assert caught.value.__cause__ is not None
    assert resolve("org/model", cache_dir=tmp_path / "full") == folder
    assert "using the cached copy" in caplog.text


def test_gated(hub: HubServer, tmp_path: Path) -> None:
    hub.gated = True
    with pytest.raises(
        HubError, match=rf"org/model is gated .* Accept its terms at {hub.url}/org/model.*hf auth login"
    ):
        resolve("org/model", cache_dir=tmp_path)


def test_repository_not_found(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no local directory 'org/modle', and no model .* Check the spelling"):
        resolve("org/modle", cache_dir=tmp_path)


def test_wrong_token(hub: HubServer, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubError, match="a private repository needs `hf auth login` or token="):
        resolve("org/model", token="hf_other", cache_dir=tmp_path)


def test_revision_not_found(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="org/model has no revision 'v9'; expected a branch, tag or commit"):
        resolve("org/model", revision="v9", cache_dir=tmp_path)


def test_invalid_name(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"org/a--b"):
        resolve("org/a--b", cache_dir=tmp_path)


@pytest.mark.parametrize(("files", "found"), [({}, "no files"), (UNWANTED, r"README.md, modeling.py, .*model.bin")])
def test_no_safetensors(hub: HubServer, tmp_path: Path, files: dict[str, bytes], found: str) -> None:
    hub.files = files
    with pytest.raises(HubError, match=rf"org/model holds {found}.*; expected \*\.safetensors"):
        resolve("org/model", cache_dir=tmp_path)
    assert not hub.downloads()


# Progress


def test_a_download_tells_bytes_files_place_and_room(hub: HubServer, tmp_path: Path) -> None:
    seen: list[Progress] = []
    resolve("org/model", cache_dir=tmp_path, progress=seen.append)
    total = sum(map(len, NEEDED.values()))
    assert {(p.stage, p.total, p.unit) for p in seen} == {("download", total, "bytes")}
    assert seen[0].done < total == seen[-1].done
    assert seen[0].note.startswith(f"org/model: 6 files, 4.2 MB, to {tmp_path} (") and seen[0].note.endswith("free)")
    seen.clear()
    resolve("org/model", cache_dir=tmp_path, progress=seen.append)
    assert not seen, "nothing was downloaded"


def test_bytes_of_unfinished_files_count(tmp_path: Path) -> None:
    (tmp_path / "abc.1f2e.incomplete").write_bytes(bytes(30))
    (tmp_path / "def").write_bytes(bytes(7))
    seen: list[Progress] = []
    with Watch(tmp_path, [("abc", 40), ("def", 7), ("fed", 5)], "", seen.append):
        pass
    assert (seen[-1].done, seen[-1].total) == (37, 52)


def test_a_callback_that_raises_ends_the_download(hub: HubServer, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        resolve("org/model", cache_dir=tmp_path, progress=stop)
    assert contents(resolve("org/model", cache_dir=tmp_path)) == NEEDED


@pytest.mark.parametrize(("answer", "asked"), [(False, True), (True, True), (False, False)], ids=["no", "yes", "quiet"])
def test_a_large_download_is_asked_for(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool, asked: bool
) -> None:
    questions: list[str] = []
    monkeypatch.setattr(flash_moe.checkpoint.hub, "_ASK_BYTES", 1e6)
    monkeypatch.setattr(flash_moe.checkpoint.hub, "ask", lambda question: questions.append(question) or answer)
    if asked and not answer:
        with pytest.raises(HubError, match="not wanted; nothing was downloaded"):
            resolve("org/model", cache_dir=tmp_path)
        assert not hub.downloads()
    else:
        assert contents(resolve("org/model", cache_dir=tmp_path, progress=asked)) == NEEDED
    assert len(questions) == asked
    assert all(q.startswith(f"Download org/model: 6 files, 4.2 MB, to {tmp_path}") for q in questions)
