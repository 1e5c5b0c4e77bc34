from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from damage import edit_json, remove_tensor, replace_tensor
from expected_records import expected_records

from flash_moe import CheckpointError
from flash_moe.checkpoint.records import RecordTable
from flash_moe.models import open_model

Copy = Callable[[str], Path]


def assemble(table: RecordTable, layer: int, expert: int) -> bytes:
    """A record, put together from its extents as they are documented."""
    record = bytearray(table.layouts[layer].stride)
    for extent in table.extents(layer, expert):
        with extent.file.open("rb") as stream:
            stream.seek(extent.offset)
            record[extent.at : extent.at + extent.nbytes] = stream.read(extent.nbytes)
    return bytes(record)


def refused(folder: Path, *words: str) -> None:
    checkpoint = open_model(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.records()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("form", "origin", "extents"),
    [("fused", "fused", 3), ("separate", "separate", 3), ("quantized", "quantized", 9), ("packed", "quantized", 1)],
    ids=["fused", "separate", "quantized", "packed"],
)
def test_extents_hold_the_bytes_of_the_tensors(
    tiny_checkpoints: dict[str, Path], form: str, origin: str, extents: int
) -> None:
    table = open_model(tiny_checkpoints[form]).records()
    expected = expected_records(tiny_checkpoints[origin])
    assert set(expected) == set(product(table.layouts, range(table.num_experts)))
    for key, record in expected.items():
        assert len(table.extents(*key)) == extents
        assert assemble(table, *key) == record
    assert table.packed == (form == "packed")
    assert table.max_stride == max(map(len, expected.values()))
    assert table.nbytes == sum(map(len, expected.values()))


def test_qwen3_next_with_a_tensor_per_expert(next_checkpoint: Path) -> None:
    table = open_model(next_checkpoint).records()
    for key, record in expected_records(next_checkpoint).items():
        assert assemble(table, *key) == record


def test_mixed_bits_within_a_record(
    tiny_checkpoints: dict[str, Path], mlx_quantize: Callable[..., Path], tmp_path: Path
) -> None:
    def predicate(path: str, module: object) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": 6, "group_size": 64} if "down_proj" in path else {"bits": 3, "group_size": 32}

    folder = mlx_quantize(tiny_checkpoints["fused"], tmp_path / "mixed", quant_predicate=predicate)
    table = open_model(folder).records()
    formats = table.layouts[0].formats
    assert [formats[p].quantization.bits for p in formats] == [3, 3, 6]  # type: ignore[union-attr]
    for key, record in expected_records(folder).items():
        assert assemble(table, *key) == record


def test_layers_without_routed_experts_have_no_records(tmp_path: Path) -> None:
    from random_checkpoint import next_config, write_checkpoint

    config = next_config(num_hidden_layers=3, num_experts=2, num_experts_per_tok=1, mlp_only_layers=[1])
    folder = write_checkpoint(tmp_path / "dense", config, prefix="model.", nested_config=False)
    assert list(open_model(folder).records().layouts) == [0, 2]


@pytest.mark.parametrize("expert", [0, 3])
def test_missing_expert(tiny_copy: Copy, expert: int) -> None:
    folder = tiny_copy("separate")
    remove_tensor(folder, f"layers.1.mlp.experts.{expert}.up_proj.weight")
    refused(folder, f"up_proj of expert {expert} in layer 1", "incomplete", "finish the download")


@pytest.mark.parametrize(
    ("form", "ending", "words"),
    [
        ("fused", "layers.0.mlp.experts.down_proj", "weight of down_proj"),
        ("fused", "layers.0.mlp.experts.gate_up_proj", "weight of gate_proj"),
        ("quantized", "layers.0.mlp.switch_mlp.up_proj.weight", "weight of up_proj"),
        ("quantized", "layers.0.mlp.switch_mlp.up_proj.biases", "biases of up_proj"),
    ],
    ids=["down", "fused gate and up", "stacked weight", "biases"],
)
def test_missing_projection(tiny_copy: Copy, form: str, ending: str, words: str) -> None:
    folder = tiny_copy(form)
    remove_tensor(folder, ending)
    refused(folder, words, "layer 0", "finish the download")


def test_missing_scales(tiny_copy: Copy) -> None:
    folder = tiny_copy("quantized")
    remove_tensor(folder, "layers.0.mlp.switch_mlp.up_proj.scales")
    refused(folder, "switch_mlp.up_proj.weight", "is U32", "scales")


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ("fused", "layers.1.mlp.experts.gate_up_proj"),
        ("fused", "layers.1.mlp.experts.down_proj"),
        ("separate", "layers.1.mlp.experts.2.gate_proj.weight"),
        ("quantized", "layers.1.mlp.switch_mlp.down_proj.weight"),
        ("quantized", "layers.1.mlp.switch_mlp.down_proj.scales"),
        ("quantized", "layers.1.mlp.switch_mlp.down_proj.biases"),
    ],
)
class TestExpertTensor:
    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t[1:],
            lambda t: t[..., 1:],
            lambda t: t[..., None],
            lambda t: t[0],
            lambda t: t.swapaxes(0, -1)[:1],
        ],
        ids=["fewer rows", "fewer columns", "higher rank", "lower rank", "transposed"],
    )
    def test_of_the_wrong_shape(
        self, tiny_copy: Copy, form: str, ending: str, change: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        folder = tiny_copy(form)
        file = replace_tensor(folder, ending, change)
        refused(folder, str(file), ending, "config.json asks for", "do not belong together")

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "float64"])
    def test_of_the_wrong_dtype(self, tiny_copy: Copy, form: str, ending: str, dtype: str) -> None:
        folder = tiny_copy(form)
        file = replace_tensor(folder, ending, lambda tensor: tensor.astype(dtype))
        refused(folder, str(file), ending)


def test_projections_may_differ_in_precision(tiny_copy: Copy) -> None:
    folder = tiny_copy("fused")
    replace_tensor(folder, "layers.0.mlp.experts.down_proj", lambda tensor: tensor.astype("float16"))
    table = open_model(folder).records()
    assert {name: fmt.dtype for name, fmt in table.layouts[0].formats.items()} == {
        "gate_proj": "F32", "up_proj": "F32", "down_proj": "F16"
    }  # fmt: skip
    for key, record in expected_records(folder).items():
        assert assemble(table, *key) == record


def test_experts_of_one_layer_agree_in_precision(tiny_copy: Copy) -> None:
    folder = tiny_copy("separate")
    file = replace_tensor(folder, "layers.0.mlp.experts.2.up_proj.weight", lambda tensor: tensor.astype("float16"))
    refused(folder, str(file), "experts.2.up_proj.weight", "F16", "F32")


def test_dimensions_of_another_model(tiny_copy: Copy) -> None:
    folder = tiny_copy("quantized")
    edit_json(folder / "config.json", lambda config: config["text_config"].update(moe_intermediate_size=128))
    refused(folder, "config.json asks for", "do not belong together")


def test_more_experts_than_there_are(tiny_copy: Copy) -> None:
    folder = tiny_copy("separate")
    edit_json(folder / "config.json", lambda config: config["text_config"].update(num_experts=5))
    refused(folder, "of expert 4 in layer 0", "finish the download")
