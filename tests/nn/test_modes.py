"""MLX's quantisation modes and mixtures of them: the network against mlx-lm, streamed against resident."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from expected_records import rewrite
from test_mlx_lm import TOKENS, mlx_lm_logits, our_logits

from flash_moe import ArgumentError, CheckpointError, Model
from flash_moe.formats import GLOBAL_SCALE
from flash_moe.packing.convert import convert
from flash_moe.packing.info import describe
from flash_moe.packing.verify import verify

MODES = ("nvfp4", "mxfp4", "mxfp8")
STORES = ("slots", "mapped", "resident")


def mixed(path: str, module: object) -> bool | dict[str, object]:
    """Another mode for every kind of module, as recipes have it."""
    if not hasattr(module, "to_quantized"):
        return False
    for part, mode in (
        ("switch_mlp.gate_proj", {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
        ("switch_mlp.up_proj", {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
        ("switch_mlp.down_proj", {"group_size": 32, "bits": 3}),
        ("embed_tokens", {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
        ("lm_head", {"group_size": 64, "bits": 6, "mode": "affine"}),
        ("mlp.gate", {"group_size": 64, "bits": 8}),
        ("shared_expert.", {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
    ):
        if part in path:
            return mode
    return "layers.1." not in path  # of which the rest stays as it is


RECIPES = {mode: {"q_mode": mode} for mode in MODES} | {
    f"mixed over {mode}": {"q_mode": mode, "quant_predicate": mixed} for mode in ("nvfp4", "affine")
}


@pytest.fixture(scope="module", params=[*RECIPES, "nvfp4 of qwen3_next", "mixed over affine of qwen3_next"])
def quantized(
    request: pytest.FixtureRequest,
    float_checkpoint: Path,
    next_checkpoint: Path,
    mlx_quantize: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    recipe, _, family = request.param.partition(" of ")
    destination = tmp_path_factory.mktemp("modes") / "quantized"
    return mlx_quantize(next_checkpoint if family else float_checkpoint, destination, **RECIPES[recipe])


def greedy(folder: Path, **options: object) -> tuple[int, ...]:
    with Model.load(folder, experts_per_token=None, **options) as model:
        model.tokenizer.eos_token_ids = frozenset()
        return model.generate(TOKENS, max_tokens=8, temperature=0).tokens


def mlx_lm_greedy(folder: Path) -> tuple[int, ...]:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    tokens = list(TOKENS)
    for _ in range(8):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tuple(tokens[len(TOKENS) :])


def test_logits_and_tokens_equal_mlx_lm_and_every_store_gives_the_same(quantized: Path, tmp_path: Path) -> None:
    expected = mlx_lm_logits(quantized)
    found = our_logits(quantized, expert_io="resident")
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)
    tokens = greedy(quantized, expert_io="resident")
    assert tokens == mlx_lm_greedy(quantized)
    assert convert(quantized, tmp_path / "packed") == []
    for folder in (quantized, tmp_path / "packed"):
        for store in STORES:
            np.testing.assert_array_equal(our_logits(folder, expert_io=store), found)
    assert greedy(tmp_path / "packed", expert_io="mapped") == tokens
    by_kernels = our_logits(quantized, expert_io="resident", kernels=True)
    np.testing.assert_allclose(by_kernels, expected, atol=2e-3, rtol=0)
    np.testing.assert_array_equal(our_logits(tmp_path / "packed", expert_io="slots", kernels=True), by_kernels)
    assert verify(tmp_path / "packed").checksums


@pytest.mark.parametrize("mode", MODES)
def test_floats_are_quantised_as_mlx_does(
    mode: str, float_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path
) -> None:
    from expected_records import expected_records

    quantized = mlx_quantize(float_checkpoint, tmp_path / "mlx", q_mode=mode)
    convert(float_checkpoint, tmp_path / "packed", mode=mode)
    records = expected_records(quantized)
    for layer in range(4):
        with (tmp_path / "packed" / f"experts-{layer:05d}.safetensors").open("rb") as stream:
            content = stream.read()
        assert content.endswith(b"".join(records[layer, expert] for expert in range(16)))
    assert describe(tmp_path / "packed").expert_formats == {mode: 4}


def test_a_mode_takes_no_bits(float_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="'nvfp4' has bits of its own"):
        convert(float_checkpoint, tmp_path / "packed", mode="nvfp4", bits=4)
    with pytest.raises(ArgumentError, match="mode is 'fp4', expected None or one of affine, mxfp4, nvfp4, mxfp8"):
        convert(float_checkpoint, tmp_path / "packed", mode="fp4")  # type: ignore[arg-type]


def test_from_one_mode_to_another(float_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path) -> None:
    quantized = mlx_quantize(float_checkpoint, tmp_path / "nvfp4", q_mode="nvfp4")
    (warning,) = convert(quantized, tmp_path / "affine", expert_bits=8)
    assert "requantised from nvfp4 to 8 bits" in warning
    np.testing.assert_allclose(our_logits(tmp_path / "affine"), our_logits(quantized), atol=0.05)


@pytest.fixture(scope="module")
def scaled(
    float_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint with a scale for each expert, and one with the weights that it stands for as floats."""
    folder = tmp_path_factory.mktemp("scaled")
    scaled, plain = mlx_quantize(float_checkpoint, folder / "scaled", q_mode="nvfp4"), folder / "plain"
    shutil.copytree(scaled, plain)
    rng = np.random.default_rng(5)
    config = json.loads((scaled / "config.json").read_text())
    for file in scaled.glob("*.safetensors"):
        weights = dict(mx.load(str(file)))
        floats = dict(weights)
        for name in [name for name in weights if name.endswith("_proj.scales") and "switch_mlp" in name]:
            module = name.removesuffix(".scales")
            scales = mx.array(rng.uniform(1000, 5000, 16).astype(np.float32))
            weights[f"{module}.global_scale"] = scales
            config["quantization"][module] = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
            w = mx.dequantize(floats.pop(f"{module}.weight"), floats.pop(name), group_size=16, bits=4, mode="nvfp4",
                              dtype=mx.float32)  # fmt: skip
            floats[f"{module}.weight"] = w * (scales / GLOBAL_SCALE)[:, None, None]
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
        mx.save_safetensors(str(plain / file.name), floats, metadata={"format": "mlx"})
    (scaled / "config.json").write_text(json.dumps(config))
    for each in (scaled, plain):
        (each / "model.safetensors.index.json").unlink()
    return scaled, plain


class TestGlobalScale:
    def test_it_belongs_to_all_rows_of_an_interleaved_projection(
        self, next_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path: Path
    ) -> None:
        scaled, plain = mlx_quantize(next_checkpoint, tmp_path / "scaled", q_mode="nvfp4"), tmp_path / "plain"
        shutil.copytree(scaled, plain)
        config = json.loads((scaled / "config.json").read_text())
        (file,) = scaled.glob("*.safetensors")
        weights = dict(mx.load(str(file)))
        floats = dict(weights)
        for name in [name for name in weights if name.endswith((".in_proj_qkvz.scales", ".in_proj_ba.scales"))]:
            module = name.removesuffix(".scales")
            q = config["quantization"].get(module) or {"group_size": 16, "bits": 4, "mode": "nvfp4"}
            if q.get("mode") != "nvfp4":
                continue
            weights[f"{module}.global_scale"] = mx.array([GLOBAL_SCALE / 4])
            config["quantization"][module] = q | {"global_scale": True}
            w = mx.dequantize(floats.pop(f"{module}.weight"), floats.pop(name), **q, dtype=mx.float32)
            floats[f"{module}.weight"] = w / 4
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
        mx.save_safetensors(str(plain / file.name), floats, metadata={"format": "mlx"})
        (scaled / "config.json").write_text(json.dumps(config))
        for each in (scaled, plain):
            (each / "model.safetensors.index.json").unlink()
        assert len(floats) < len(weights)
        expected = our_logits(plain)
        convert(scaled, tmp_path / "packed")
        for folder in (scaled, tmp_path / "packed"):
            np.testing.assert_allclose(our_logits(folder), expected, atol=2e-3, rtol=0)

    @pytest.mark.parametrize("expert_io", STORES)
    def test_it_is_multiplied_in(self, scaled: tuple[Path, Path], expert_io: str, tmp_path: Path) -> None:
        expected = mlx_lm_logits(scaled[1])
        convert(scaled[0], tmp_path / "packed")
        for folder in (scaled[0], tmp_path / "packed"):
            for kernels in (False, True):
                found = our_logits(folder, expert_io=expert_io, kernels=kernels)
                np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)
            assert greedy(folder, expert_io=expert_io) == mlx_lm_greedy(scaled[1])
        assert describe(tmp_path / "packed").expert_formats == {"nvfp4 with a global scale": 4}

    def test_it_is_missed_where_config_json_states_it(self, scaled: tuple[Path, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(scaled[0], tmp_path / "lost"))
        (file,) = folder.glob("*.safetensors")
        rewrite(file, lambda t: t.pop("language_model.model.layers.2.mlp.switch_mlp.up_proj.global_scale"))
        with pytest.raises(CheckpointError, match="the global_scale of up_proj of expert 0 in layer 2 is in no file"):
            Model.load(folder)


@pytest.mark.parametrize("mode", MODES)
class TestTheRouterTrap:
    """mlx-lm writes no mode where it quantises the router affinely under a default that is not affine."""

    def test_it_is_still_set(self, mode: str, float_checkpoint: Path, mlx_quantize: Callable, tmp_path: Path) -> None:
        folder = mlx_quantize(float_checkpoint, tmp_path / "quantized", q_mode=mode)
        section = json.loads((folder / "config.json").read_text())["quantization"]
        assert (section["mode"], section["language_model.model.layers.0.mlp.gate"]) == (
            mode,
            {"group_size": 64, "bits": 8},
        )
        with Model.load(folder) as model:
            gate = model._decoder.layers[0].mlp.gates.groups[0]  # type: ignore[attr-defined]
        assert (gate.quantization.mode, gate.quantization.bits, gate.biases is None) == ("affine", 8, False)

    def test_what_contradicts_the_tensors_is_refused(
        self, mode: str, float_checkpoint: Path, mlx_quantize: Callable, edit_config: Callable, tmp_path: Path
    ) -> None:
        folder = mlx_quantize(float_checkpoint, tmp_path / "quantized", q_mode=mode)
        own = json.loads((folder / "config.json").read_text())

        def refused(change: Callable[[dict], object], words: str) -> None:
            edit_config(folder, lambda config: (config.clear(), config.update(json.loads(json.dumps(own)))))
            edit_config(folder, lambda config: [change(config[key]) for key in ("quantization", "quantization_config")])
            with pytest.raises(CheckpointError, match=words):
                Model.load(folder)

        gate = "language_model.model.layers.0.mlp.gate"
        refused(lambda q: q[gate].update(mode="mxfp8", group_size=32), "of affine, but config.json says")
        refused(
            lambda q: q[gate].update(mode="mxfp8"), "gate is quantised in mode mxfp8 to .* expected 8 bits in groups"
        )
        refused(lambda q: q[gate].update(mode="int4"), "expected one of affine, mxfp4")
        refused(lambda q: q.update(mode="affine", group_size=64), "of dtype U8, but config.json says")
        expert = "language_model.model.layers.1.mlp.switch_mlp.up_proj"
        other = {"nvfp4": ("mxfp4", 32, 4), "mxfp4": ("mxfp8", 32, 8), "mxfp8": ("nvfp4", 16, 4)}[mode]
        stated = dict(zip(("mode", "group_size", "bits"), other, strict=True))
        refused(lambda q: q.update({expert: stated}), f"of {mode}, but config.json says .*{other[0]}")
