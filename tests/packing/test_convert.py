"""What a conversion writes: records, resident weights, manifest, and everything else that a checkpoint needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conversions import contents, packed_records
from expected_records import PROJECTIONS, expected_records, stored_tensors
from safetensors.numpy import load_file

from flash_moe import CheckpointError, Model, NumericalError
from flash_moe.checkpoint.names import canonical_name
from flash_moe.packing.convert import convert
from flash_moe.packing.info import describe
from flash_moe.packing.verify import verify


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


class TestResult:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    @pytest.mark.parametrize("group_size", [32, 64])
    def test_floats_become_what_mlx_makes_of_them(
        self, small_float: Path, tmp_path: Path, bits: int, group_size: int
    ) -> None:
        assert convert(small_float, tmp_path / "packed", bits=bits, group_size=group_size, rounding="nearest") == []
        tensors = {}
        for file in small_float.glob("*.safetensors"):
            tensors |= load_file(file)
        for (layer, expert), record in packed_records(tmp_path / "packed").items():
            prefix = f"model.language_model.layers.{layer}.mlp.experts."
            gate, up = np.split(tensors[prefix + "gate_up_proj"][expert], 2)
            expected = b""
            for weight in (gate, up, tensors[prefix + "down_proj"][expert]):
                for part in mx.quantize(mx.array(weight), group_size=group_size, bits=bits):
                    expected += padded(np.array(part).tobytes(), 64)
            assert record == padded(expected, 16384)

    def test_floats_become_what_mlx_lm_makes_of_them(
        self, small_float: Path, small_packed: Path, tmp_path: Path
    ) -> None:
        """Records and resident weights equal those of `mlx_lm.convert` followed by packing."""
        convert(small_float, tmp_path / "packed", rounding="nearest")
        assert packed_records(tmp_path / "packed") == packed_records(small_packed)
        assert stored_tensors(tmp_path / "packed") == stored_tensors(small_packed)

    def test_folders_beside_the_tokenizer_are_not_copied(
        self, small_quantized: Path, small_packed: Path, tmp_path: Path
    ) -> None:
        source = shutil.copytree(small_quantized, tmp_path / "source")
        for name in ("tokenizer_backup", "LICENSES"):
            (source / name).mkdir()
        convert(source, tmp_path / "packed")
        assert contents(tmp_path / "packed") == contents(small_packed)

    def test_quantised_experts_are_copied(self, small_quantized: Path, small_packed: Path) -> None:
        assert packed_records(small_packed) == expected_records(small_quantized)

    def test_resident_weights_are_copied(self, small_quantized: Path, small_packed: Path) -> None:
        source = {n: t for n, t in stored_tensors(small_quantized).items() if ".switch_mlp." not in n}
        packed = {n: t for n, t in stored_tensors(small_packed).items() if n != "experts"}
        assert packed == source

    def test_every_file_is_ordinary_safetensors(self, small_packed: Path) -> None:
        index = json.loads((small_packed / "model.safetensors.index.json").read_text())["weight_map"]
        for file in small_packed.glob("model-*.safetensors"):
            assert sorted(load_file(file)) == sorted(name for name, owner in index.items() if owner == file.name)

    def test_tokenizer_and_settings_come_along(self, small_quantized: Path, small_packed: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (small_packed / name).read_bytes() == (small_quantized / name).read_bytes()

    def test_qwen3_next_with_a_tensor_per_expert(
        self, next_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path
    ) -> None:
        quantized = mlx_quantize(next_checkpoint, tmp_path / "quantized", q_bits=8, q_group_size=64)
        convert(next_checkpoint, tmp_path / "direct", bits=8, rounding="nearest")
        assert packed_records(tmp_path / "direct") == expected_records(quantized)
        convert(quantized, tmp_path / "packed")
        with Model.load(tmp_path / "direct") as direct, Model.load(tmp_path / "packed") as packed:
            np.testing.assert_array_equal(direct.logits([5, 6, 7]), packed.logits([5, 6, 7]))

    def test_group_size_applies_to_experts_and_resident_weights(self, small_float: Path, tmp_path: Path) -> None:
        convert(small_float, tmp_path / "packed", group_size=32)
        manifest = json.loads((tmp_path / "packed" / "flash_moe.json").read_text())
        for layer in manifest["layers"].values():
            assert {p["group_size"] for p in layer["layout"]["projections"].values()} == {32}
        assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]["group_size"] == 32

    def test_rounding_twice_warns(self, small_quantized: Path, small_float: Path, tmp_path: Path) -> None:
        (warning,) = convert(small_quantized, tmp_path / "twice", bits=2)
        assert "from 4 to 2 bits" in warning and "bf16" in warning
        assert convert(small_float, tmp_path / "once", bits=2) == []
        assert convert(small_quantized, tmp_path / "same", bits=4) == []

    def test_requantised_records_are_those_of_the_dequantised_weights(
        self, small_quantized: Path, tmp_path: Path
    ) -> None:
        convert(small_quantized, tmp_path / "packed", bits=2, rounding="nearest")
        tensors = load_file(small_quantized / "model.safetensors")
        for (layer, expert), record in packed_records(tmp_path / "packed").items():
            expected = b""
            for projection in PROJECTIONS:
                name = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}."
                stored = [mx.array(tensors[name + part][expert]) for part in ("weight", "scales", "biases")]
                weights = mx.dequantize(*stored, group_size=64, bits=4)
                for part in mx.quantize(weights, group_size=64, bits=2):
                    expected += padded(np.array(part).tobytes(), 64)
            assert record == padded(expected, 16384)

    def test_packed_checkpoint_as_source(self, small_packed: Path, small_quantized: Path, tmp_path: Path) -> None:
        assert convert(small_packed, tmp_path / "again") == []
        assert contents(tmp_path / "again") == contents(small_packed)
        (warning,) = convert(small_packed, tmp_path / "fewer", bits=2)
        assert "from 4 to 2 bits" in warning
        convert(small_quantized, tmp_path / "direct", bits=2)
        assert packed_records(tmp_path / "fewer") == packed_records(tmp_path / "direct")

    def test_progress_ends_at_the_total(self, small_quantized: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        convert(
            small_quantized, tmp_path / "packed", progress=lambda progress: seen.append((progress.done, progress.total))
        )
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]
        stored = sum(len(data) for _, _, data in stored_tensors(tmp_path / "packed").values())
        assert seen[-1][1] <= stored + 8 * 16384 and len({total for _, total in seen}) == 1

    def test_memory_stays_below_the_size_of_the_model(self, tmp_path: Path) -> None:
        """What one step has read must be let go before the next."""
        from random_checkpoint import text_config, write_checkpoint

        text = text_config(hidden_size=256, num_hidden_layers=12, num_experts=2, num_experts_per_tok=1)
        source = write_checkpoint(tmp_path / "source", text)
        resident = sum(len(d) for n, (_, _, d) in stored_tensors(source).items() if ".experts." not in n)
        before, held = mx.get_active_memory(), []
        convert(source, tmp_path / "packed", progress=lambda *_: held.append(mx.get_active_memory() - before))
        assert max(held) < resident / 3

    @pytest.mark.parametrize("wrong", [{"bits": 7}, {"bits": 4, "group_size": 48}, {"group_size": 128}], ids=str)
    def test_impossible_options(self, small_float: Path, tmp_path: Path, wrong: dict[str, int]) -> None:
        with pytest.raises(CheckpointError, match=r"expected one of|group"):
            convert(small_float, tmp_path / "packed", **wrong)
        assert list(tmp_path.iterdir()) == []


LAYER = "model.language_model.layers."
BROKEN = {
    "no head": ("lm_head.weight", None),
    "no final norm": ("model.language_model.norm.weight", None),
    "no attention": (f"{LAYER}1.self_attn.o_proj.weight", None),
    "gate of two experts": (f"{LAYER}0.mlp.gate.weight", lambda array: array[:2]),
    "transposed": (f"{LAYER}0.mlp.shared_expert.down_proj.weight", lambda array: mx.contiguous(array.T[:32])),
}


@pytest.mark.parametrize(("name", "change"), BROKEN.values(), ids=BROKEN)
def test_resident_weights_that_no_model_could_load_are_refused_at_the_beginning(
    small_float: Path, tmp_path: Path, name: str, change: Callable[[mx.array], mx.array] | None
) -> None:
    source = edited(small_float, tmp_path / "source", name, change)
    for use in (lambda: convert(source, tmp_path / "packed"), lambda: verify(source), lambda: describe(source)):
        with pytest.raises(CheckpointError, match=canonical_name(name)):
            use()
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("name", [f"{LAYER}2.mlp.gate.weight", "lm_head.weight", "foo.weight"])
def test_weights_that_the_network_does_not_use_are_not_counted(small_float: Path, tmp_path: Path, name: str) -> None:
    source = edited(small_float, tmp_path / "source", name, lambda _: mx.zeros((288, 64)))
    if name == "lm_head.weight":
        config = json.loads((source / "config.json").read_text())
        config["text_config"]["tie_word_embeddings"] = True
        (source / "config.json").write_text(json.dumps(config))
    without = edited(source, tmp_path / "without", name, None)
    assert describe(source).resident_bytes == describe(without).resident_bytes
    convert(source, tmp_path / "packed")
    assert name.rpartition("language_model.")[2] not in (tmp_path / "packed/model.safetensors.index.json").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [(f"{LAYER}0.mlp.experts.down_proj", mx.nan), (f"{LAYER}0.linear_attn.out_proj.weight", mx.inf),
     ("model.language_model.norm.weight", mx.nan)],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"rounding": "nearest"}, {"mode": "mxfp8"}], ids=str)
def test_weights_that_are_not_finite_are_refused(
    name: str, value: float, options: dict, small_float: Path, tmp_path: Path
) -> None:
    source = edited(
        small_float, tmp_path / "source", name, lambda old: mx.where(mx.arange(old.shape[-1]) == 5, value, old)
    )
    with pytest.raises(NumericalError, match="NaN"):
        convert(source, tmp_path / "packed", **options)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", [f"{LAYER}0.mlp.experts.down_proj", f"{LAYER}0.linear_attn.out_proj.weight"])
def test_weights_that_are_too_small_for_nvfp4_warn(name: str, small_float: Path, tmp_path: Path) -> None:
    source = edited(
        small_float, tmp_path / "source", name, lambda old: 0.002 * mx.random.normal(old.shape, key=mx.random.key(0))
    )
    (warning,) = convert(source, tmp_path / "nvfp4", mode="nvfp4")
    module = "down_proj of an expert" if "experts" in name else "layers.0.linear_attn.out_proj.weight"
    assert f"the weights of {module} by 9" in warning and "mxfp4" in warning
    assert convert(source, tmp_path / "mxfp4", mode="mxfp4") == []
    assert convert(small_float, tmp_path / "usual", mode="nvfp4") == []


def edited(source: Path, folder: Path, name: str, change: Callable[[mx.array], mx.array] | None) -> Path:
    """Copies a checkpoint; ``change`` makes another array of one with this name, and None removes it."""
    shutil.copytree(source, folder)
    weights: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    old = weights.pop(name, mx.zeros(0))
    if change is not None:
        weights[name] = change(old)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder
