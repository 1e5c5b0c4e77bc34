"""`flash-moe info` of a repository, `download`, `list` and `remove`, with a hub and a cache of the tests' own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command
from hub_server import HubServer
from huggingface_hub import constants, file_download

from flash_moe.checkpoint.hub_cache import downloaded
from flash_moe.packing.info import describe

REPO = "org/model"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(packed_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer({file.name: file.read_bytes() for file in packed_checkpoint.iterdir()}, REPO) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):  # older versions copy the constant
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def size(files: HubServer) -> int:
    return sum(map(len, files.files.values()))


def test_info_of_a_repository_downloads_nothing(hub: HubServer, cache: Path, packed_checkpoint: Path) -> None:
    found = json.loads(flash_moe_command("info", REPO, "--json").stdout)
    assert found["download"]["free"] > found["download"]["nbytes"] > 0.9 * size(hub)
    expected = vars(describe(packed_checkpoint, 4))
    assert found.items() >= (expected | {"path": REPO, "downloaded": False}).items()
    text = flash_moe_command("info", REPO).stdout
    assert re.search(
        r"\n\nA download of [\d.]+ [kM]B; this disk has .+ free\. It keeps .+ [KM]B in memory and reads ", text
    )
    assert text.startswith(f"repository         {REPO}\n")
    assert text.endswith(f"To download it: flash-moe download {REPO}\n")
    assert not any(cache.rglob("*.safetensors"))


def test_info_of_what_does_not_fit_on_the_disk(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_moe.checkpoint.remote.free_space", lambda folder: 1000)
    assert "does not fit on this disk, which has 1.0 kB free" in flash_moe_command("info", REPO).stdout


def test_plan_says_whether_the_download_fits(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("plan", REPO, "--machine", "M3 Max 48GB")
    assert re.search(r"The download of\s.+\sfits\son\sthis\smachine's\sdisk", flash_moe_command(*command).stdout)
    monkeypatch.setattr("flash_moe.checkpoint.remote.free_space", lambda folder: 1000)
    text = flash_moe_command(*command).stdout
    assert re.search(r"does\snot\sfit\son\sthis\smachine's\sdisk,\swhich\shas\s1.0\skB\sfree", text)
    assert not any(cache.rglob("*.safetensors"))


def test_download_list_and_remove(hub: HubServer, cache: Path, packed_checkpoint: Path) -> None:
    result = flash_moe_command("download", REPO)
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    assert {file.name for file in folder.iterdir()} >= {file.name for file in packed_checkpoint.glob("*.safetensors")}
    assert f"{REPO}: " in result.stderr and "are free" in result.stderr
    assert json.loads(flash_moe_command("info", REPO, "--json").stdout)["path"] == str(folder)  # no longer remote

    listed = json.loads(flash_moe_command("list", "--json").stdout)
    assert listed["cache"] == str(cache)
    assert listed["models"] == [vars(one) for one in downloaded()]
    (one,) = downloaded()
    assert (one.repo, one.path, one.complete) == (REPO, str(folder), True)
    assert one.nbytes == sum(name.stat().st_size for name in folder.iterdir())
    assert flash_moe_command("list").stdout.split()[0] == REPO

    assert "nobody to ask" in failed(flash_moe_command("remove", REPO), code=2)
    assert folder.exists()
    assert f"removed {REPO}" in flash_moe_command("remove", REPO, "--yes").stdout
    assert not folder.exists() and downloaded() == []
    assert "no models in" in flash_moe_command("list").stderr
    assert f"{REPO} is not in {cache}" in failed(flash_moe_command("remove", REPO, "-y"))


def test_what_was_not_finished_is_listed_and_can_be_removed(hub: HubServer, cache: Path) -> None:
    flash_moe_command("download", REPO)
    (shard,) = list(Path(downloaded()[0].path).glob("experts-00002*"))
    blob = shard.resolve()
    shard.unlink()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    (one,) = downloaded()
    assert not one.complete
    assert flash_moe_command("list").stdout.endswith("  incomplete\n")
    assert flash_moe_command("remove", REPO, "--yes").exit_code == 0
    assert not (cache / "models--org--model").exists()


def test_a_repository_that_lost_a_file_is_incomplete_and_can_be_removed(hub: HubServer, cache: Path) -> None:
    flash_moe_command("download", REPO)
    lost = (Path(downloaded()[0].path) / "tokenizer_config.json").resolve()
    size = downloaded()[0].nbytes - lost.stat().st_size
    lost.unlink()
    (one,) = downloaded()
    assert (one.repo, one.complete, one.nbytes) == (REPO, False, size)
    assert flash_moe_command("list").stdout.endswith("  incomplete\n")
    assert flash_moe_command("remove", REPO, "--yes").exit_code == 0
    assert not (cache / "models--org--model").exists()


@pytest.mark.parametrize("command", ["download", "remove"])
def test_what_is_no_repository(command: str, cache: Path) -> None:
    assert "no repository" in failed(flash_moe_command(command, "./folder"), code=2)
