"""The wiring: a quantised model with every kernel on the emulator against the same model without kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe import Model
from flash_moe.packing.convert import convert

TOKENS = [80, 72, 101]


def token_logits(folder: Path, kernels: bool, expert_io: str) -> np.ndarray:
    cached = expert_io == "slots, all cached"
    options = {"expert_io": "slots", "expert_cache": 1 << 30} if cached else {"expert_io": expert_io}
    with Model.load(folder, experts_per_token=None, dtype="float32", kernels=kernels, **options) as model:
        if cached:
            for layer in range(model.config.num_hidden_layers):
                model._store.fetch(layer, range(model.config.num_experts))
        cache = model._decoder.new_cache()
        rows = [model._decoder.logits(model._decoder(mx.array([token]), cache))[0] for token in TOKENS]
        return np.array(mx.stack(rows))


@pytest.mark.parametrize(
    "head_dim", [32, pytest.param(16, marks=pytest.mark.slow)], ids=["all kernels", "attention left to MLX"]
)
@pytest.mark.parametrize(
    "expert_io",
    ["slots", "slots, all cached", *(pytest.param(io, marks=pytest.mark.slow) for io in ("mapped", "resident"))],
)
def test_kernels_equal_no_kernels(
    expert_io: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: Callable[[], set[str]]
) -> None:
    monkeypatch.setattr(mx, "compile", lambda function: function)  # the emulator evaluates, which a trace cannot
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=8, head_dim=head_dim)
    packed = tmp_path / "packed"
    convert(write_checkpoint(tmp_path / "float", text), packed, bits=4, group_size=32)
    plain = token_logits(packed, False, expert_io)
    assert not used()
    np.testing.assert_allclose(token_logits(packed, True, expert_io), plain, atol=1e-4)
    expected = {"quantized_matvec", "expert_gate_up", "expert_down", "delta_net_step", "router", "add_rms_norm"}
    assert expected <= used()
    assert ("decode_attention" in used()) == (head_dim == 32)


@pytest.mark.parametrize("mode", ["nvfp4", pytest.param("mxfp8", marks=pytest.mark.slow)])
def test_experts_of_other_modes_run_by_kernels(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: Callable[[], set[str]]
) -> None:
    """The shared expert is one more record, stored as the routed ones are."""
    monkeypatch.setattr(mx, "compile", lambda function: function)
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2, **sizes)
    packed = tmp_path / "packed"
    convert(write_checkpoint(tmp_path / "float", text), packed, mode=mode)
    plain = token_logits(packed, False, "slots")
    np.testing.assert_allclose(token_logits(packed, True, "slots"), plain, atol=1e-4)
    assert {"expert_gate_up", "expert_down"} <= used()


@pytest.mark.slow  # test_kernel_rope tests the kernel with its frequencies in every run
def test_yarn_by_kernels_equals_yarn_by_mlx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: Callable[[], set[str]]
) -> None:
    """The last token of a prompt, by MLX's ops, against the same token alone, by kernels."""
    monkeypatch.setattr(mx, "compile", lambda function: function)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 4.0}
    rope = yarn | {"original_max_position_embeddings": 8, "beta_fast": 2.0, "attention_factor": 1.5}
    text = text_config(num_hidden_layers=2, full_attention_interval=1, num_experts=4, rope_parameters=rope)
    folder = write_checkpoint(tmp_path / "model", text)
    tokens = list(range(40))
    with Model.load(folder, experts_per_token=None, dtype="float32", kernels=False) as model:
        expected = np.array(model.logits(tokens))
    with Model.load(folder, experts_per_token=None, dtype="float32", kernels=True) as model:
        cache = model._decoder.new_cache()
        rows = [model._decoder.logits(model._decoder(mx.array([token]), cache))[0] for token in tokens]
        np.testing.assert_allclose(np.array(mx.stack(rows)), expected, atol=1e-4)
    assert "qk_norm_rope" in used()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Names of the kernels that have been launched."""
    from flash_moe.ops.kernel import Kernel

    names: set[str] = set()
    launch = Kernel.__call__

    def noted(self: Kernel, *arguments: object, **options: object) -> object:
        names.add(self.name)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(Kernel, "__call__", noted)
    return lambda: names
