"""Whole models through the kernels of the CPU: as through MLX, whatever the store and the number of threads."""

from __future__ import annotations

import gc
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import next_config, text_config, write_checkpoint
from sparse_checkpoint import write_sparse

from flash_moe import ArgumentError, ExpertReadError, Model
from flash_moe.experts.choosing import Reading, Work
from flash_moe.nn.cpu_choice import _hint
from flash_moe.packing.convert import convert

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="kernels of the CPU")

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 256, 60).tolist()
SHAPES = {
    "plain": text_config(),
    "uneven": text_config(
        attention_bias=True, linear_num_value_heads=6, head_dim=48, num_experts=7, num_experts_per_tok=3,
        shared_expert_intermediate_size=96, tie_word_embeddings=True,
    ),
    "next": next_config(mlp_only_layers=[1]),
}  # fmt: skip


def load(folder: Path, **options: object) -> Model:
    return Model.load(folder, experts_per_token=None, **({"kernels": True} | options))  # type: ignore[arg-type]


def logits(model: Model) -> np.ndarray:
    """Of a prompt, of single tokens behind it, and of a few more together."""
    decoder, rows, start = model._decoder, [], 0
    cache = decoder.new_cache()
    for count in (11, 1, 1, 1, 5, 1, 40):
        tokens = mx.array(TOKENS[start : start + count], dtype=mx.int32)
        rows.append(np.array(decoder.logits(decoder(tokens, cache))))
        start += count
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def big_groups(mlx_quantize: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bits in groups of 64, bfloat16 scales, packed."""
    folder = tmp_path_factory.mktemp("cpu")
    source = write_checkpoint(folder / "float", text_config(hidden_size=128))
    assert convert(mlx_quantize(source, folder / "mlx", q_bits=4, q_group_size=64), folder / "packed") == []
    return folder / "packed"


@pytest.mark.parametrize("shape", SHAPES)
def test_float_checkpoints_as_through_mlx(tmp_path: Path, shape: str) -> None:
    nested = shape != "next"
    options = {} if nested else {"prefix": "model.", "nested_config": False, "fused_experts": False}
    folder = write_checkpoint(tmp_path / shape, SHAPES[shape], **options)
    with load(folder) as model, load(folder, kernels=False) as reference:
        found, expected = logits(model), logits(reference)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def resident(big_groups: Path) -> np.ndarray:
    with load(big_groups, expert_io="resident") as model:
        assert model._decoder.runs_on_cpu_kernels
        return logits(model)


def test_quantised_as_through_mlx(big_groups: Path, resident: np.ndarray) -> None:
    with load(big_groups, kernels=False) as reference:
        assert not reference._decoder.runs_on_cpu_kernels
        assert np.abs(logits(reference) - resident).max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"expert_io": "mapped"}, {"expert_io": "slots"}, {"expert_io": "slots", "expert_cache": 1 << 20},
        {"expert_io": "resident", "threads": 1}, {"expert_io": "mapped", "threads": 3}, {"expert_io": "slots", "prefetch": True},
        {"expert_io": "mapped", "prefetch": True},
    ],
    ids=str,
)  # fmt: skip
def test_same_bits_whatever_the_store_and_the_threads(
    big_groups: Path, resident: np.ndarray, options: dict[str, object]
) -> None:
    with load(big_groups, **options) as model:
        assert np.array_equal(logits(model).view(np.uint32), resident.view(np.uint32))


def test_small_fetches_change_nothing(big_groups: Path, resident: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose experts are fetched in several groups."""
    with load(big_groups, expert_io="mapped") as model:
        model.expert_store.capacity = 5
        assert np.array_equal(logits(model).view(np.uint32), resident.view(np.uint32))


def test_marks_survive_what_changes_in_place(big_groups: Path) -> None:
    with load(big_groups) as model:
        decoder = model._decoder

        def run(tokens: list[int], cache: object) -> np.ndarray:
            hidden = decoder(mx.array(tokens, dtype=mx.int32), cache)
            cache.tokens.extend(tokens)
            return np.array(hidden)

        cache = decoder.new_cache()
        cache.mark([7, 12])
        run(TOKENS[:10], cache)
        first = [run([token], cache) for token in TOKENS[10:20]]
        for mark in (12, 12, 7):
            cache.cut_back(mark)
            between = TOKENS[mark:10]
            if between:
                run(between, cache)
            again = [run([token], cache) for token in TOKENS[max(mark, 10) : 20]]
            for a, b in zip(first[max(mark, 10) - 10 :], again, strict=True):
                assert np.abs(a - b).max() < (1e-5 if between else 1e-30)


@pytest.mark.parametrize("options", [{"drop_cold_below": 0.9}, {"prefer_cached": 0.9}], ids=str)
def test_options_about_missing_experts(big_groups: Path, options: dict[str, object]) -> None:
    """With the page cache empty for every token, as through MLX: the same experts are dropped and swapped."""
    with load(big_groups, expert_io="mapped", **options) as model:
        reference = load(big_groups, expert_io="mapped", kernels=False, **options)
        with reference:
            for one in (model, reference):
                one.generate(TOKENS[:5], max_tokens=1)
            assert model._decoder.choice.counters.routed == reference._decoder.choice.counters.routed == 0
            cache = model._decoder.new_cache()
            other = reference._decoder.new_cache()
            for token in TOKENS[:4]:
                ids = mx.array([token], dtype=mx.int32)
                found = np.array(model._decoder(ids, cache))
                expected = np.array(reference._decoder(ids, other))
                assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
            assert model._decoder.choice.counters.routed == reference._decoder.choice.counters.routed > 0


def test_a_record_that_cannot_be_read(big_groups: Path, tmp_path: Path) -> None:
    """No token, and the cache is dropped."""
    copy = shutil.copytree(big_groups, tmp_path / "copy")
    with load(copy, expert_io="slots") as model:
        model.generate(TOKENS[:5], max_tokens=2)
        for file in copy.glob("experts-00002*.safetensors"):
            with file.open("r+b") as stream:
                stream.truncate(1000)
        with pytest.raises(ExpertReadError):
            model.generate(TOKENS[:9], max_tokens=2)


def test_small_models_stay_with_mlx(big_groups: Path) -> None:
    with load(big_groups, kernels=None) as model:
        assert not model._decoder.runs_on_cpu_kernels


def test_without_numba(big_groups: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Everything works as before, with one hint in all."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _hint.cache_clear()
    for _ in range(2):
        with caplog.at_level(logging.WARNING), load(big_groups) as model:
            assert not model._decoder.runs_on_cpu_kernels
    assert len([r.message for r in caplog.records if "flash-moe[cpu]" in r.message]) == 1


@pytest.mark.parametrize("kernels", [True, False])
def test_auto_measures_what_these_kernels_do(big_groups: Path, monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    asked = []

    def choose(table: object, k: int, measure: object, work: Work, by_part: bool) -> str:
        asked.append(isinstance(work, Reading))
        return "slots"

    monkeypatch.setattr("flash_moe.experts.opening.choose", choose)
    load(big_groups, kernels=kernels).close()
    assert asked == [kernels]


def test_threads_end_with_the_last_model(big_groups: Path) -> None:
    gc.collect()
    before = kernel_threads()
    one, other = load(big_groups, threads=3), load(big_groups, threads=3)
    assert kernel_threads() == before + 2  # they share a pool
    one.close()
    assert kernel_threads() == before + 2
    assert other.generate(TOKENS[:5], max_tokens=2).tokens
    other.close()
    del one, other
    gc.collect()
    for _ in range(200):
        if kernel_threads() == before:
            return
        time.sleep(0.01)
    raise AssertionError(f"{kernel_threads() - before} threads are left")


def kernel_threads() -> int:
    return sum(thread.name == "flash-moe-cpu" for thread in threading.enumerate())


def test_models_and_generations_at_once_are_right(big_groups: Path) -> None:
    """Two models, each generating in two threads, with pools that differ and one that they share."""
    prompts = [TOKENS[start : start + 9] for start in (0, 3, 6)]
    with load(big_groups, expert_io="slots") as model:
        expected = [model.generate(prompt, max_tokens=12, temperature=0).tokens for prompt in prompts]
    for threads in ((2, 2), (1, 3)):
        models = [load(big_groups, expert_io=io, threads=n) for io, n in zip(("slots", "mapped"), threads, strict=True)]
        with models[0], models[1], ThreadPoolExecutor(4) as pool:
            running = [
                pool.submit(model.generate, prompt, max_tokens=12, temperature=0)
                for model in models
                for prompt in prompts
            ]
            assert [done.result().tokens for done in running] == expected * 2


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_are_checked(big_groups: Path, threads: object) -> None:
    with pytest.raises(ArgumentError, match="threads"):
        load(big_groups, threads=threads)


def test_scales_keep_their_dtype(tmp_path: Path) -> None:
    """Always-read weights take no more memory than they are stored in."""
    with load(write_sparse(tmp_path / "sparse", text_config(hidden_size=128, moe_intermediate_size=128))) as model:
        layer = model._decoder.layers[0].mixer.out_proj
        assert layer.scales.dtype == layer.biases.dtype == mx.bfloat16
        assert np.isfinite(logits(model)).all()
