"""The whole model with kernels on against kernels off; needs a GPU, or follows the same path without one."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe import Model
from flash_moe.nn import decoder, decoder_layer
from flash_moe.ops import kernel

PROMPT = [80, 72, 101, 108, 108, 111, 32, 119] * 3  # enough for the delta rule in chunks


def run(folder: Path, kernels: bool | None, expert_io: str) -> tuple[tuple[int, ...], np.ndarray]:
    with Model.load(folder, experts_per_token=None, dtype="float32", kernels=kernels, expert_io=expert_io) as model:
        model.tokenizer.eos_token_ids = frozenset()
        tokens = model.generate(PROMPT, max_tokens=60, temperature=0).tokens
        cache = model._decoder.new_cache()
        rows = []
        for token in PROMPT:
            rows.append(np.array(model._decoder.logits(model._decoder(mx.array([token]), cache))[0]))
        return tokens, np.stack(rows)


@pytest.mark.parametrize("expert_io", ["slots", "mapped", "resident"])
@pytest.mark.parametrize("form", ["quantized_checkpoint", "float_checkpoint"])
def test_kernels_change_no_token(form: str, expert_io: str, request: pytest.FixtureRequest) -> None:
    if kernel.back_end() is None:
        pytest.skip("no GPU that MLX can use")
    folder = request.getfixturevalue(form)
    on, off = run(folder, True, expert_io), run(folder, False, expert_io)
    np.testing.assert_allclose(on[1], off[1], atol=2e-3)
    assert on[0] == off[0]


def test_the_traced_decode_path_equals_the_plain_one(
    quantized_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that GPUs take, without tracing, which would need a compiler on the CPU."""
    if kernel.back_end() is not None:
        pytest.skip("taken anyway on a GPU")
    plain = run(quantized_checkpoint, None, "slots")
    monkeypatch.setattr(mx, "compile", lambda function: function)
    for module in (decoder, decoder_layer):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    traced = run(quantized_checkpoint, None, "slots")
    np.testing.assert_allclose(traced[1], plain[1], atol=1e-5)
    assert traced[0] == plain[0]
