from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from flash_moe import CheckpointError, ConfigError, ExpertReadError, FlashMoEError
from flash_moe.models import open_model
from flash_moe.packing.verify import Verification, verify

STRIDE = 16384


@pytest.fixture
def copy(small_packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_packed, tmp_path / "packed"))


def flip(file: Path, position: int, bit: int = 0) -> None:
    """Flips one bit of the byte at ``position``."""
    with file.open("r+b") as stream:
        stream.seek(position)
        (value,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([value ^ 1 << bit]))


def test_intact_packed_checkpoint(small_packed: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(small_packed, lambda progress: seen.append((progress.done, progress.total)))
    resident = list(small_packed.glob("model-*.safetensors"))
    total = 8 * STRIDE + sum(file.stat().st_size for file in resident)
    assert result == Verification(records=8, files=len(resident), nbytes=total, checksums=True)
    assert seen == sorted(seen) and seen[-1] == (total, total)


@pytest.mark.parametrize("form", ["small_float", "small_quantized"])
def test_checkpoint_without_checksums(request: pytest.FixtureRequest, form: str) -> None:
    folder = request.getfixturevalue(form)
    table = open_model(folder).records()
    assert verify(folder) == Verification(records=8, files=0, nbytes=table.nbytes, checksums=False)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bit_in_a_record(copy: Path, seed: int) -> None:
    rng = random.Random(seed)
    layer, expert = rng.randrange(2), rng.randrange(4)
    (extent,) = open_model(copy).records().extents(layer, expert)
    flip(extent.file, extent.offset + rng.randrange(STRIDE), rng.randrange(8))
    with pytest.raises(ExpertReadError, match=r"differ from their checksum; copy or convert it again") as caught:
        verify(copy)
    assert (caught.value.file, caught.value.layer, caught.value.expert) == (str(extent.file), layer, expert)


def test_first_of_several_bad_records_is_named(copy: Path) -> None:
    table = open_model(copy).records()
    for layer, expert in ((1, 0), (0, 3), (0, 2), (1, 1)):
        (extent,) = table.extents(layer, expert)
        flip(extent.file, extent.offset + STRIDE - 1)
    with pytest.raises(ExpertReadError) as caught:
        verify(copy)
    assert (caught.value.layer, caught.value.expert) == (0, 2)


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bit_in_a_resident_file(copy: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = rng.choice(sorted(copy.glob("model-*.safetensors")))
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, rng.randrange(start, file.stat().st_size), rng.randrange(8))
    with pytest.raises(CheckpointError, match="differs from its checksum; copy or convert it again") as caught:
        verify(copy)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["model-resident-00000.safetensors", "experts-00001.safetensors"])
def test_flipped_bits_anywhere_in_a_header(copy: Path, name: str) -> None:
    file, rng = copy / name, random.Random(name)
    intact = file.read_bytes()
    length = 8 + int.from_bytes(intact[:8], "little")
    used = len(intact[:length].rstrip(b" "))
    for position in [*range(9), *rng.sample(range(used), 60), *rng.sample(range(used, length), min(5, length - used))]:
        flip(file, position, rng.randrange(8))
        with pytest.raises(CheckpointError):
            verify(copy)
        file.write_bytes(intact)
    verify(copy)


def test_flipped_bits_anywhere_in_the_manifest(copy: Path) -> None:
    file, rng = copy / "flash_moe.json", random.Random(1)
    intact = file.read_bytes()
    for position in rng.sample(range(len(intact)), 150):
        flip(file, position, rng.randrange(8))
        try:
            same = json.loads(file.read_bytes()) == json.loads(intact)
        except ValueError:
            same = False
        if not same:  # another kind of white space is no damage
            with pytest.raises(CheckpointError):
                verify(copy)
        file.write_bytes(intact)
    verify(copy)


def test_swapped_layers(copy: Path) -> None:
    """Each file is whole and of the right shape, only not the right one."""
    first, second = copy / "experts-00000.safetensors", copy / "experts-00001.safetensors"
    first.rename(copy / "other")
    second.rename(first)
    (copy / "other").rename(second)
    with pytest.raises(
        CheckpointError, match=r"experts-00000.safetensors holds the experts of layer 1, .* says layer 0"
    ):
        open_model(copy).records()
    for file, layer in ((first, 1), (second, 0)):  # as written before files stated their layer
        file.write_bytes(file.read_bytes().replace(f',"layer":"{layer}"'.encode(), b" " * 12))
    with pytest.raises(ExpertReadError, match="expert 0 of layer 0"):
        verify(copy)


@pytest.mark.parametrize("name", ["flash_moe.json", "model.safetensors.index.json"])
def test_lost_descriptions_are_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {name}.*; copy that file .*again, or convert") as caught:
        verify(copy)
    assert "remove" not in str(caught.value)


@pytest.mark.parametrize("name", ["model-resident.safetensors", "experts-00001.safetensors"])
@pytest.mark.parametrize("keep", [None, 0, -1], ids=["missing", "empty", "one byte short"])
def test_missing_and_truncated_files(copy: Path, name: str, keep: int | None) -> None:
    file = copy / name
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=name):
        verify(copy)


def test_resident_file_that_the_index_forgot(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if f != "model-resident-00001.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"does not name model-resident-00001.safetensors"):
        verify(copy)


def test_resident_file_that_was_added(copy: Path) -> None:
    manifest = copy / "flash_moe.json"
    content = json.loads(manifest.read_text())
    content["resident"].pop("model-resident.safetensors")
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model-resident.safetensors is not in the manifest"):
        verify(copy)


def test_config_that_does_not_fit_the_weights(copy: Path) -> None:
    """Each file with a checksum is whole, but no model can be loaded."""
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["shared_expert_intermediate_size"] *= 2
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json and weights do not belong together"):
        verify(copy)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        verify(tmp_path)
    assert isinstance(caught.value, FlashMoEError)
