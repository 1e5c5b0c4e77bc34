"""Plans that measure this machine, of folders and of repositories on a hub of which nothing is downloaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from hub_server import HubServer
from huggingface_hub import constants, file_download

from flash_moe import ArgumentError, HubError
from flash_moe.checkpoint import remote
from flash_moe.models import open_model
from flash_moe.planning.chips import parse_machine
from flash_moe.planning.plan import STATES, Plan, plan
from flash_moe.planning.probe import made_up_array, made_up_records

MACHINE = parse_machine("M4 16GB")
FORMS = ["packed", "quantized", "float", "next"]


@pytest.fixture
def repository(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    with HubServer({file.name: file.read_bytes() for file in folder.iterdir()}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def without_names(found: Plan) -> dict[str, object]:
    return {key: value for key, value in found.to_dict().items() if key not in ("model", "expert_io", "download")}


@pytest.mark.parametrize("repository", FORMS, indirect=True)
def test_a_repository_is_planned_from_its_headers(
    repository: HubServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "_FIRST", 100)
    form = request.node.callspec.params["repository"]
    local = plan(str(request.getfixturevalue(f"{form}_checkpoint")), experts_per_token=4, machine=MACHINE)
    found = plan("org/model", experts_per_token=4, machine=MACHINE)
    assert without_names(found) == without_names(local)
    assert local.download is None
    size = sum(len(data) for name, data in repository.files.items() if name.endswith(".safetensors"))
    assert size < found.download.nbytes <= sum(map(len, repository.files.values()))
    assert found.download.fits and found.to_dict()["download"]["free"] == found.download.free
    asked = [r for r in repository.log if r.method == "GET" and r.path.endswith(".safetensors")]
    assert asked
    assert all(r.range for r in asked)
    assert max(int(r.range.split("-")[1]) for r in asked) < 1 << 17  # headers; the files are longer
    assert not any(r.path.endswith("tokenizer.json") for r in repository.log)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("repository", ["packed"], indirect=True)
def test_measuring_for_a_repository_leaves_out_the_disk(repository: HubServer) -> None:
    found = plan("org/model", experts_per_token=4, prompt=32)
    assert found.costs.reads is None
    assert (found.decode["cold"], found.prefill["cold"]) == (None, None)
    assert found.decode["warm"].total > 0
    assert json.loads(json.dumps(found.to_dict()))["decode"]["cold"] is None


@pytest.mark.parametrize("repository", ["packed"], indirect=True)
def test_files_that_are_not_what_they_should_be(repository: HubServer) -> None:
    name = next(file for file in repository.files if file.endswith(".safetensors"))
    for damaged, message in [(b"\xff" * 1000, "is no safetensors file"), (b"1", "is no safetensors file")]:
        repository.files[name] = damaged
        with pytest.raises(HubError, match=message):
            plan("org/model", experts_per_token=4, machine=MACHINE)


@pytest.mark.parametrize("repository", ["packed"], indirect=True)
def test_a_hub_that_sends_too_little(repository: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.HubFile, "size", property(lambda self: 1 << 30), raising=False)
    with pytest.raises(HubError, match="expected the 262144 that were asked for"):
        plan("org/model", experts_per_token=4, machine=MACHINE)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with HubServer({}) as server:
        url = server.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError):
        plan("org/model", experts_per_token=4, machine=MACHINE)


@pytest.mark.parametrize("form", FORMS)
def test_this_machine(form: str, request: pytest.FixtureRequest) -> None:
    found = plan(str(request.getfixturevalue(f"{form}_checkpoint")), experts_per_token=2, prompt=64, expert_io="slots")
    assert found.measured
    assert found.shares["warm"].decode == found.shares["expected"].decode == 1  # a tiny model fits
    for seconds in (*found.decode.values(), *found.prefill.values()):
        assert seconds is not None
        terms = list(seconds.__dict__.values())
        assert all(term >= 0 and math.isfinite(term) for term in terms)
        assert seconds.total == pytest.approx(sum(terms))
    assert found.decode["cold"].ssd > 0
    assert found.decode["warm"].ssd == 0
    assert set(json.loads(json.dumps(found.to_dict()))["decode"]) == set(STATES)


@pytest.mark.parametrize("expert_io", ["slots", "mapped", "resident"])
def test_this_machine_with_kernels_of_the_cpu(
    packed_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, expert_io: str
) -> None:
    """What is timed is what would run."""
    pytest.importorskip("numba")
    from flash_moe.nn import cpu_timed

    used = set()
    for name in ("__call__", "front", "experts"):
        inner = getattr(cpu_timed.CpuTimedLayer, name)
        monkeypatch.setattr(
            cpu_timed.CpuTimedLayer, name, lambda *args, name=name, inner=inner: (used.add(name), inner(*args))[1]
        )
    monkeypatch.setenv("FLASH_MOE_KERNELS", "on")
    found = plan(str(packed_checkpoint), experts_per_token=2, prompt=64, expert_io=expert_io)
    assert used == ({"__call__", "front", "experts"} if mx.default_device() == mx.cpu else set())
    for seconds in (*found.decode.values(), *found.prefill.values()):
        assert seconds is not None and 0 < seconds.total < math.inf


def test_everything_resident_is_always_warm(packed_checkpoint: Path) -> None:
    found = plan(str(packed_checkpoint), experts_per_token=4, prompt=16, expert_io="resident")
    assert set(found.shares.values()) == {(1.0, 1.0, 1.0)}
    assert found.decode["cold"] == found.decode["warm"]
    assert found.memory.slots == found.needs.experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 0}, "a prompt of 0 tokens"),
        ({"prompt": 5000}, "expected 1 to 4096, the model's context"),
        ({"context": 5000}, "a context of 5000"),
        ({"skew": -1.0}, "skew is -1.0, expected 0"),
        ({"experts_per_token": 17}, "experts_per_token is 17"),
    ],
    ids=str,
)
def test_argument_errors(packed_checkpoint: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan(str(packed_checkpoint), **{"experts_per_token": 4, "machine": MACHINE} | options)


@pytest.mark.parametrize("dtype", ["U32", "F32", "BF16", "F16"])
def test_made_up_arrays_are_finite(dtype: str) -> None:
    array = made_up_array(dtype, (300, 400))
    assert array.shape == (300, 400)
    assert mx.isfinite(array.astype(mx.float32)).all().item()
    assert array.dtype == {"U32": mx.uint32, "F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[dtype]


def test_made_up_records_have_the_layout(packed_checkpoint: Path) -> None:
    layout = open_model(packed_checkpoint).records().layouts[0]
    bank = made_up_records(layout, 3)
    assert (bank.shape, bank.dtype) == ((3, layout.stride // 4), mx.uint32)
