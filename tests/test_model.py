"""The facade: loading, logits, K, statistics, and their errors."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from flash_moe import ArgumentError, Model, NumericalError, Progress
from flash_moe.generation.engine import Engine
from flash_moe.nn.sparse_moe import SparseMoE

PROMPT = list(b"Memory is small and disks are large, so")


@pytest.mark.parametrize("length", [1, 2, 33, 70])
def test_one_shot_chunked_and_token_by_token_agree(model: Model, length: int) -> None:
    tokens = [(7 * i + 3) % 256 for i in range(length)]
    decoder = model._decoder
    expected = np.array(model.logits(tokens))
    for chunk in (1, 5, 16, 64):
        engine = Engine(decoder, prefill_chunk=chunk)
        np.testing.assert_allclose(np.array(engine.all_logits(tokens)), expected, atol=1e-4, err_msg=f"chunk {chunk}")
        last = engine.prefill(tokens, decoder.new_cache())
        np.testing.assert_allclose(np.array(last), expected[-1], atol=1e-4)


def test_a_sequence_continues_from_any_cache_state(model: Model) -> None:
    tokens = [(5 * i + 1) % 256 for i in range(300)]
    expected = np.array(model.logits(tokens))
    cache, start = model._decoder.new_cache(), 0
    for step in (1, 64, 1, 1, 190, 3, 40):
        piece = tokens[start : start + step]
        hidden = model._decoder(mx.array(piece), cache)
        np.testing.assert_allclose(
            np.array(model._decoder.logits(hidden)), expected[start : start + step], atol=1e-4, err_msg=f"at {start}"
        )
        start += step
    assert start == len(tokens) == cache.length


def test_generation_follows_the_teacher_forced_logits(model: Model) -> None:
    result = model.generate(PROMPT, max_tokens=30, temperature=0)
    logits = np.array(model.logits([*PROMPT, *result.tokens]))
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=-1).tolist() == list(result.tokens)


def test_logits_shape_and_dtype(model: Model) -> None:
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 288)
    assert logits.dtype == mx.float32


def test_k_is_capped_shown_and_checked(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint, experts_per_token=2) as model:
        assert model.experts_per_token == 2
        assert "experts_per_token=2 of the model's 4" in repr(model)
        stats = model.generate(PROMPT, max_tokens=2).stats
        assert (stats.experts_per_token, stats.model_experts_per_token) == (2, 4)
    for k in (0, -1, 17, 2.0, True):
        with pytest.raises(ArgumentError, match="from 1 to 4"):
            Model.load(packed_checkpoint, experts_per_token=k)


def test_the_default_k_is_capped_at_the_models_own(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "k2", text_config(num_hidden_layers=1, num_experts_per_tok=2))
    with Model.load(folder) as model:
        assert model.experts_per_token == 2


def test_unknown_dtype(packed_checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match="float64"):
        Model.load(packed_checkpoint, dtype="float64")


@pytest.mark.parametrize("expert_io", ["mapped", "slots", "resident"])
def test_statistics(packed_checkpoint: Path, expert_io: str) -> None:
    with Model.load(packed_checkpoint, experts_per_token=3, expert_io=expert_io) as model:
        model.tokenizer.eos_token_ids = frozenset()
        stats = model.generate(PROMPT, max_tokens=11, temperature=0).stats
        stride, layers = model._store.layouts[0].stride, model.config.num_hidden_layers
    assert stats.prompt_tokens == len(PROMPT)
    assert stats.generated_tokens == 11
    assert stats.decode_bytes_requested == 10 * 3 * layers * stride
    assert stats.expert_bytes_per_token == 3 * layers * stride
    prefill = stats.expert_bytes_requested - stats.decode_bytes_requested
    assert 3 * layers * stride <= prefill <= 16 * layers * stride, "each expert at most once per layer"
    assert 0 <= stats.expert_bytes_missing <= stats.expert_bytes_requested
    assert 0 <= stats.hit_rate <= 1
    assert 0 < stats.time_to_first_token < 60
    assert stats.prompt_seconds + stats.decode_seconds > stats.fetch_seconds
    assert stats.peak_memory_bytes > 0
    assert json.dumps(stats.to_dict())


def test_reads_begin_before_the_shared_expert_is_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = next(layer.mlp for layer in model._decoder.layers if isinstance(layer.mlp, SparseMoE))
    x, ids, weights = mx.ones((1, model.config.hidden_size)), mx.array([[0, 1]], dtype=mx.uint32), mx.full((1, 2), 0.5)
    a = mx.full((1200, 1200), 1e-3)
    mx.eval(x, ids, weights, a)
    rest = x + (a @ a).sum()  # stands in for a shared expert that takes long
    began, arrive = [], model._store._arrive
    monkeypatch.setattr(model._store, "_arrive", lambda *of: began.append(time.perf_counter()) or arrive(*of))
    start = time.perf_counter()
    mx.eval(moe.experts(x, ids + 0, weights + 0, rest))
    assert began[0] - start < 0.5 * (time.perf_counter() - start)


def test_prefill_reads_each_touched_expert_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    fetch = model._store._arrive
    monkeypatch.setattr(
        model._store, "_arrive", lambda layer, ids: asked.extend((layer, e) for e in ids) or fetch(layer, ids)
    )
    monkeypatch.setattr(model._store, "capacity", 3)
    expected = np.array(model.logits(PROMPT))
    assert len(asked) == len(set(asked))
    assert asked == sorted(asked), "layer by layer, experts in order"
    monkeypatch.undo()
    np.testing.assert_allclose(np.array(model.logits(PROMPT)), expected, atol=1e-4)


def test_progress_of_loading_and_prefill(packed_checkpoint: Path) -> None:
    seen: list[Progress] = []
    with Model.load(packed_checkpoint, expert_io="resident", progress=seen.append) as model:
        assert Progress("layers", 4, 4, "layers") in seen
        assert [s for s in seen if s.stage == "experts"][-1] == Progress("experts", 64 * 16384, 64 * 16384, "bytes")
        steps: list[Progress] = []
        model._engine = Engine(model._decoder, prefill_chunk=1024)
        model.generate([1] * 2100, max_tokens=1, progress=steps.append)
        done = [256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2061, 2074, 2087, 2100]
        assert steps == [Progress("prompt", tokens, 2100, "tokens") for tokens in done], "layer by layer"
        steps.clear()
        model.generate([1] * 2108, max_tokens=1, progress=steps.append)
        assert [step.done for step in steps] == [2102, 2104, 2106, 2108], "what is reused counts as done"
        steps.clear()
        model.generate([1] * 2100, max_tokens=3, progress=False)
        assert not steps


def test_nan_in_router_logits_is_an_error(float_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(float_checkpoint, tmp_path / "nan"))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.2.mlp.gate.weight"):
                tensors[name][3, 5] = np.nan
        save_file(tensors, file)
    with Model.load(folder) as model:
        for prompt in ([1], [1, 2, 3] * 10):
            with pytest.raises(NumericalError, match="layer 2"):
                model.generate(prompt)
