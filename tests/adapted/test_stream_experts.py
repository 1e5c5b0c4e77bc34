"""Experts of mlx-lm's networks, streamed: the same bits as mlx-lm itself gives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from family_checkpoints import FAMILIES, checkpoint, plain, write
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from published import PUBLISHED

from flash_moe import ArgumentError, CheckpointError, ConfigError, stream_experts
from flash_moe.experts.opening import ExpertIO
from flash_moe.models.adapted import library

QUICK = (
    "qwen3_moe", "glm4_moe", "deepseek_v3", "kimi_k2", "minimax_m2", "gpt_oss", "mixtral", "olmoe", "hunyuan",
    "bailing_moe", "nemotron_h", "llama4",
)  # fmt: skip
PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]


def families() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def published() -> list[Any]:
    quick = ("qwen3_moe", "mixtral", "gpt_oss", "llama4", "qwen3_5_moe", "nemotron_h")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in PUBLISHED]


def greedy(model: Any, count: int = 6) -> tuple[np.ndarray, list[int]]:
    """Logits of a prompt and of each greedy token after it, and these tokens."""
    cache = make_prompt_cache(model)
    rows = [model(mx.array([PROMPT]), cache=cache)[0]]
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(mx.argmax(rows[-1][-1])))
        rows.append(model(mx.array([tokens[-1:]]), cache=cache)[0])
    return np.array(mx.concatenate(rows).astype(mx.float32)), tokens


@pytest.mark.parametrize("name", families())
def test_streamed_equals_mlx_lm(name: str, tmp_path: Path) -> None:
    folder = write(name, tmp_path / name)
    expected, expected_tokens = greedy(plain(folder))
    model = plain(folder)
    store = stream_experts(model, folder)
    left = [path for path, _ in tree_flatten(model.parameters()) if ".switch_mlp." in path or ".experts." in path]
    logits, tokens = greedy(model)
    np.testing.assert_array_equal(logits, expected)
    assert (tokens, left) == (expected_tokens, [])
    assert store.stats.bytes_requested > 0
    store.close()


@pytest.mark.parametrize("name", published())
def test_published_names(name: str, tmp_path: Path) -> None:
    """Experts come from the files as the hub has them, and loading reads none of them."""
    folder = write(name, tmp_path / name, "mxfp4" if name == "gpt_oss" else None, published=True)
    expected, expected_tokens = greedy(plain(folder))
    model = plain(folder)
    store = stream_experts(model, folder)
    assert store.stats.bytes_requested == 0
    logits, tokens = greedy(model)
    np.testing.assert_array_equal(logits, expected)
    assert tokens == expected_tokens
    assert store.stats.bytes_requested > 0


def test_tools_of_mlx_lm(tmp_path: Path) -> None:
    """mlx_lm.generate, stream_generate and batch_generate give the text that they give without streaming."""
    folder = checkpoint("qwen3_moe", tmp_path / "model", vocab_size=4096)
    prompts = ["Why is the sky blue?", "Experts are read from files. " * 9, "One, two"]

    def texts(model: Any, tokenizer: Any) -> list[Any]:
        one = mlx_lm.generate(model, tokenizer, prompts[0], max_tokens=8)
        chunks = [chunk.token for chunk in mlx_lm.stream_generate(model, tokenizer, prompts[1], max_tokens=8)]
        small = [
            chunk.token
            for chunk in mlx_lm.stream_generate(
                model, tokenizer, prompts[1], max_tokens=8, prefill_step_size=5, kv_bits=8
            )
        ]
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        return [one, chunks, small, mlx_lm.batch_generate(model, tokenizer, ids, max_tokens=8).texts]

    expected = texts(*mlx_lm.load(str(folder)))
    model, tokenizer = mlx_lm.load(str(folder), lazy=True)[:2]
    store = stream_experts(model, folder)
    assert texts(model, tokenizer) == expected
    assert store.stats.bytes_requested > 0


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model", vocab_size=4096)
    example = Path(__file__).parents[2] / "examples" / "stream_mlx_lm.py"
    assert len(example.read_text().splitlines()) <= 30
    bare = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert bare.returncode == 2
    assert bare.stderr.startswith("usage:")
    command = [sys.executable, str(example), str(folder), "What is flash_moe?"]
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1"}  # see not_compiled
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8", env=environment)
    assert "GB of experts asked for" in done.stdout, done.stderr


@pytest.mark.parametrize("store", ["slots", "mapped", "resident"])
def test_stores_and_capacities(store: ExpertIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("qwen3_moe", tmp_path / "model")
    expected, _ = greedy(plain(folder))
    for capacity in (1, 3, 16):
        model = plain(folder)
        opened = stream_experts(model, folder, expert_io=store, expert_cache=200_000 if store == "slots" else 0)
        opened.capacity = min(capacity, opened.capacity)
        np.testing.assert_array_equal(greedy(model)[0], expected)


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_modes_and_dtypes(mode: str | None, dtype: mx.Dtype, tmp_path: Path) -> None:
    if mode is None and dtype == mx.bfloat16:
        pytest.skip("MLX's gather_mm takes float32 only on the CPU")
    folder = write("gpt_oss", tmp_path / "model", mode)
    model, streamed = plain(folder), plain(folder)
    model.set_dtype(dtype)
    streamed.set_dtype(dtype)
    stream_experts(streamed, folder)
    np.testing.assert_array_equal(greedy(streamed)[0], greedy(model)[0])


def test_a_streamed_model_differs_where_experts_do(tmp_path: Path) -> None:
    """The comparison can fail: experts of another checkpoint give other logits."""
    folder, other = write("glm4_moe", tmp_path / "a"), write("glm4_moe", tmp_path / "b", seed=1)
    model = plain(folder)
    stream_experts(model, other)
    assert np.abs(greedy(model)[0] - greedy(plain(folder))[0]).max() > 0.01


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the process reads as Linux does")
def test_loading_reads_no_expert(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path / "model", None, moe_intermediate_size=1024, hidden_size=128)
    model = plain(folder)
    before = bytes_read()
    store = stream_experts(model, folder)
    read = bytes_read() - before
    assert store.stats.bytes_requested == 0
    assert read < 3_000_000 < 90_000_000 < sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_threads_take_turns(tmp_path: Path) -> None:
    """Two threads run one network at a time, and what one left unevaluated does not disturb the other."""
    folder = write("qwen3_moe", tmp_path / "model")
    _, expected = greedy(plain(folder), 12)
    model = plain(folder)
    store = stream_experts(model, folder, expert_cache=1)
    store.capacity = 4
    found: list[Any] = []

    def run() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            left = model(mx.array([PROMPT]))
            found.append(greedy(model, 12)[1])
            del left

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_refusals(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path / "model")
    model = plain(folder)
    with pytest.raises(ArgumentError, match="expert_io"):
        stream_experts(model, folder, expert_io="disk")  # type: ignore[arg-type]
    stream_experts(model, folder)
    with pytest.raises(ArgumentError, match="already"):
        stream_experts(model, folder)
    with pytest.raises(CheckpointError, match=r"gives .*, but the model has"):
        stream_experts(plain(folder), write("qwen3_moe", tmp_path / "other", None))
    with pytest.raises(CheckpointError, match="is in no file"):
        stream_experts(plain(folder), write("mixtral", tmp_path / "mixtral"))
    with pytest.raises(ConfigError, match="no expert modules"):
        stream_experts(nn.Linear(2, 2), folder)


def test_experts_that_are_computed_at_load_are_refused(tmp_path: Path) -> None:
    folder = write("deepseek_v3", tmp_path / "fp8", None, published=True)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    for name in [name for name in weights if ".mlp.experts." in name]:
        weights[f"{name}_scale_inv"] = mx.ones((1, 1))
        weights[name] = mx.to_fp8(weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"FromFP8.*convert the checkpoint with mlx_lm.convert"):
        stream_experts(plain(folder), folder)

    folder = write("qwen3_moe", tmp_path / "sum", None)
    model = plain(folder)
    type(model).sanitize, original = lambda self, weights: {k: 2 * v for k, v in weights.items()}, type(model).sanitize
    try:
        with pytest.raises(CheckpointError, match=r"computes .*switch_mlp.* while loading .*Multiply.*mlx_lm.convert"):
            stream_experts(model, folder)
    finally:
        type(model).sanitize = original


def test_mlx_lm_missing_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("qwen3_moe", tmp_path / "model")
    model = plain(folder)
    monkeypatch.setattr(library, "version", lambda _: "0.31.3")
    with pytest.raises(ConfigError, match=r"mlx-lm 0.31.3 is too old.*pip install"):
        stream_experts(model, folder)
    monkeypatch.setitem(sys.modules, "mlx_lm.models.switch_layers", None)
    with pytest.raises(ConfigError, match=r"cannot be imported.*pip install"):
        stream_experts(model, folder)
