"""Shares of the experts: who holds which, and folders that hold one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flash_moe import ArgumentError, CheckpointError, ExpertReadError, Model
from flash_moe.cli import app
from flash_moe.experts.reader import RecordReader
from flash_moe.experts.resident import ResidentStore
from flash_moe.models import open_model
from flash_moe.packing.convert import convert
from flash_moe.packing.info import describe
from flash_moe.packing.verify import verify
from flash_moe.share import Share


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_every_expert_is_in_one_share(count: int) -> None:
    for layer in range(5):
        owners = np.full(16, -1)
        for index in range(count):
            share = Share(index, count)
            own = share.experts(layer, 16)
            assert (owners[list(own)] == -1).all()
            owners[list(own)] = index
            assert np.flatnonzero(share.owns(layer, np.arange(16))).tolist() == list(own)
            assert [share.place(expert) for expert in own] == list(range(len(own)))
        assert (owners == (np.arange(16) + layer) % count).all()


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "1/0", "a/b", "0/2 ", ""])
def test_texts_that_are_no_share(text: str, packed_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="share"):
        convert(packed_checkpoint, tmp_path / "new", share=text)


@pytest.fixture(scope="module")
def shares(packed_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shares")
    for i in range(3):
        assert convert(packed_checkpoint, folder / str(i), share=f"{i}/3") == []
    return [folder / str(i) for i in range(3)]


def test_shares_hold_the_records_of_the_whole(packed_checkpoint: Path, shares: list[Path]) -> None:
    whole = RecordReader(open_model(packed_checkpoint).records())
    nbytes = 0
    for i, folder in enumerate(shares):
        table = open_model(folder).records(None)
        assert (table.share, table.packed) == (Share(i, 3), True)
        assert table.nbytes == table.count * table.max_stride
        nbytes += table.nbytes
        reader = RecordReader(table)
        for layer in table.layouts:
            for expert in table.experts(layer):
                records = np.zeros((2, table.max_stride), np.uint8)
                for source, record in zip((whole, reader), records, strict=True):
                    source.read_all(layer, (expert,), (record,))
                assert (records[0] == records[1]).all()
                assert records[0].any()
        files = sum(file.stat().st_size for file in folder.glob("experts-*"))
        assert files < table.nbytes + 5 * 16384 * len(table.layouts)
    assert nbytes == whole.table.nbytes


def test_unpacked_sources_and_shards_give_the_same_share(
    quantized_checkpoint: Path, shares: list[Path], tmp_path: Path
) -> None:
    convert(quantized_checkpoint, tmp_path / "share", share="1/3")
    for file in shares[1].glob("experts-*"):
        assert file.read_bytes() == (tmp_path / "share" / file.name).read_bytes()


def test_a_share_alone_does_not_run(packed_checkpoint: Path, shares: list[Path], tmp_path: Path) -> None:
    for use in (Model.load, lambda path: convert(path, tmp_path / "new")):
        with pytest.raises(CheckpointError, match="holds share 1/3 of the experts, but all experts are needed"):
            use(shares[1])
    with pytest.raises(CheckpointError, match="but share 0/3 is needed"):
        convert(shares[1], tmp_path / "new", share="0/3")


def test_records_of_others_are_not_read(packed_checkpoint: Path, shares: list[Path]) -> None:
    for table in (open_model(shares[0]).records(None), open_model(packed_checkpoint).records(Share(0, 3))):
        store = ResidentStore(RecordReader(table))
        assert store.stats.bytes_loaded == table.nbytes
        assert sum(np.array(store._bank_of(layer)).nbytes for layer in table.layouts) == table.nbytes
        with pytest.raises(ArgumentError, match="expert 1 of layer 0 is not in share 0/3"):
            table.extents(0, 1)
        store.close()


def test_verify_and_info_know_shares(shares: list[Path], tmp_path: Path) -> None:
    whole = describe(shares[0])
    assert (whole.share, whole.experts) == ("0/3", 16)
    assert verify(shares[2], progress=False).records == open_model(shares[2]).records(None).count
    damaged = shutil.copytree(shares[2], tmp_path / "damaged")
    table = open_model(damaged).records(None)
    expert = table.experts(1)[2]
    (extent,) = table.extents(1, expert)
    with extent.file.open("r+b") as stream:
        stream.seek(extent.offset + 100)
        stream.write(b"\xff\x00\xff")
    with pytest.raises(ExpertReadError, match=f"expert {expert} of layer 1 .* differ from their checksum"):
        verify(damaged, progress=False)
    manifest = json.loads((damaged / "flash_moe.json").read_text())
    (damaged / "flash_moe.json").write_text(json.dumps(manifest | {"share": "7/3"}))
    with pytest.raises(CheckpointError, match=r"flash_moe\.json is damaged"):
        verify(damaged, progress=False)


def test_the_commands(packed_checkpoint: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["convert", str(packed_checkpoint), str(tmp_path / "share"), "--share", "1/2"])
    assert done.exit_code == 0, done.output
    assert "run it" not in done.output
    shown = run(app, ["info", str(tmp_path / "share")]).output
    assert "share of the experts  1/2" in shown
    assert "experts here" in shown
    assert run(app, ["verify", str(tmp_path / "share")]).output.startswith("OK: 32 expert records")


def test_a_calibration_needs_all_experts(float_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a calibration runs all experts"):
        convert(float_checkpoint, tmp_path / "new", share="0/2", calibration=[[1, 2, 3]])
