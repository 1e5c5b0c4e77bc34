"""The facade: prompts, streams, stopping, statistics, and its errors."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import STOP, text_config, write_checkpoint
from safetensors.numpy import load_file, save_file

from flash_moe import ArgumentError, Chunk, Generation, Model, NumericalError, PromptError, TokenizerError
from flash_moe.generation.engine import Engine

PROMPT = list(b"Memory is small and disks are large, so")


@pytest.fixture(scope="module")
def model(packed_checkpoint: Path) -> Iterator[Model]:
    with Model.load(packed_checkpoint, experts_per_token=None) as model:
        model.tokenizer.eos_token_ids = frozenset()  # random weights stop at random otherwise
        yield model


@pytest.fixture
def copy(packed_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_checkpoint, tmp_path / "copy"))


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


def test_a_string_is_a_users_message(model: Model) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert model.encode("Hi") == model.encode(messages)
    text = model.tokenizer.decode(model.encode("Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_raw_text_is_continued_as_it_is(model: Model) -> None:
    assert model.encode("Hi", raw=True) == model.tokenizer.encode("Hi")


def test_token_ids_may_be_numpy_integers(model: Model) -> None:
    assert model.encode(list(np.array([1, 2], np.int64))) == [1, 2]


@pytest.mark.parametrize("prompt", ["", [], ()], ids=repr)
def test_an_empty_prompt_is_an_error(model: Model, prompt: object) -> None:
    with pytest.raises(PromptError, match="empty"):
        model.generate(prompt)


@pytest.mark.parametrize("prompt", [5, None, b"bytes", {"role": "user"}], ids=repr)
def test_a_prompt_of_another_kind_is_an_error(model: Model, prompt: object) -> None:
    with pytest.raises(PromptError, match="expected a string, chat messages or token ids"):
        model.generate(prompt)


@pytest.mark.parametrize("token", [-1, 288, 10**9, "a", 1.5, True], ids=repr)
def test_a_token_id_out_of_range_is_an_error(model: Model, token: object) -> None:
    with pytest.raises(PromptError, match=r"position 1|element 1"):
        model.generate([1, token])
    with pytest.raises(PromptError):
        model.logits([1, token])


def test_malformed_messages_are_an_error(model: Model) -> None:
    with pytest.raises(TokenizerError, match="role"):
        model.generate([{"content": "no role"}])


def test_a_prompt_longer_than_the_context_is_an_error(model: Model) -> None:
    context = model.config.max_position_embeddings
    for tokens in ([1] * context, [1] * (context + 1)):
        with pytest.raises(PromptError, match=f"{len(tokens)} tokens.*{context}"):
            model.stream(tokens)
    with pytest.raises(PromptError, match="context"):
        model.logits([1] * (context + 1))


def test_the_context_ends_a_generation(packed_checkpoint: Path, copy: Path, edit_config) -> None:
    edit_config(copy, lambda c: c["text_config"].update(max_position_embeddings=45))
    with Model.load(copy) as small:
        small.tokenizer.eos_token_ids = frozenset()
        result = small.generate(PROMPT, max_tokens=500, temperature=0)
    assert len(PROMPT) + len(result.tokens) == 45
    assert result.finish_reason == "length"


def test_stream_and_generate_give_the_same(model: Model) -> None:
    chunks = list(model.stream(PROMPT, max_tokens=40, temperature=0))
    whole = model.generate(PROMPT, max_tokens=40, temperature=0)
    assert isinstance(chunks[0], Chunk)
    assert isinstance(whole, Generation)
    assert "".join(c.text for c in chunks) == whole.text == str(whole)
    assert tuple(c.token for c in chunks) == whole.tokens
    assert [c.finish_reason for c in chunks] == [None] * 39 + ["length"]


def test_arguments_are_checked_before_the_first_token(model: Model) -> None:
    for options in ({"max_tokens": 0}, {"temperature": -1}, {"stop": [""]}, {"top_p": 3}, {"max_tokens": 1.5}):
        with pytest.raises(ArgumentError):
            model.stream(PROMPT, **options)


def test_a_cancelled_stream_leaves_the_model_usable(model: Model) -> None:
    expected = model.generate(PROMPT, max_tokens=20, temperature=0).tokens
    for count in range(4):
        stream = model.stream([9, 8, 7], max_tokens=50, temperature=0)
        for _ in range(count):
            next(stream)
        stream.close()
        assert model.generate(PROMPT, max_tokens=20, temperature=0).tokens == expected


def test_streams_may_take_turns(model: Model) -> None:
    prompts = [PROMPT, [5, 6, 7], [200] * 70]
    alone = [model.generate(p, max_tokens=25, temperature=0).tokens for p in prompts]
    streams = [model.stream(p, max_tokens=25, temperature=0) for p in prompts]
    together = list(zip(*(tuple(c.token for c in step) for step in zip(*streams, strict=True)), strict=True))
    assert together == alone


def test_threads_may_share_a_model(model: Model) -> None:
    prompts = [PROMPT, [5, 6, 7]]
    alone = [model.generate(p, max_tokens=25, temperature=0).tokens for p in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def run(i: int) -> None:
        found[i] = model.generate(prompts[i], max_tokens=25, temperature=0).tokens

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == alone


def test_a_stop_string_ends_the_text_before_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=60, temperature=0).text
    stop = whole[10:13]
    result = model.generate(PROMPT, max_tokens=60, temperature=0, stop=stop)
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop"
    assert len(result.tokens) < 60


def test_eos_from_generation_config_ends_the_generation(packed_checkpoint: Path, copy: Path) -> None:
    with Model.load(packed_checkpoint) as model:
        model.tokenizer.eos_token_ids = frozenset()
        tokens = model.generate(PROMPT, max_tokens=40, temperature=0).tokens
    eos = tokens[12]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 257]}))
    with Model.load(copy) as model:
        result = model.generate(PROMPT, max_tokens=40, temperature=0)
    assert result.tokens == tokens[: tokens.index(eos) + 1]
    assert result.finish_reason == "stop"
    assert STOP not in result.text


def test_recommended_sampling_is_the_default_and_can_be_overridden(copy: Path) -> None:
    config = {"do_sample": True, "temperature": 1.5, "top_k": 50, "eos_token_id": 287}
    (copy / "generation_config.json").write_text(json.dumps(config))
    with Model.load(copy) as model:
        draws = {model.generate(PROMPT, max_tokens=10, seed=seed).tokens for seed in range(4)}
        assert len(draws) > 1
        assert (
            model.generate(PROMPT, max_tokens=10, seed=1).tokens == model.generate(PROMPT, max_tokens=10, seed=1).tokens
        )
        greedy = {model.generate(PROMPT, max_tokens=10, temperature=0, seed=seed).tokens for seed in range(4)}
        assert len(greedy) == 1


def test_k_is_capped_shown_and_checked(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint, experts_per_token=2) as model:
        assert model.experts_per_token == 2
        assert "experts_per_token=2 of the model's 4" in repr(model)
        stats = model.generate(PROMPT, max_tokens=2).stats
        assert (stats.experts_per_token, stats.model_experts_per_token) == (2, 4)
    for k in (0, -1, 17, 2.0, True):
        with pytest.raises(ArgumentError, match="1 to 16"):
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


def test_prefill_reads_each_touched_expert_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    fetch = model._store._fetch
    monkeypatch.setattr(
        model._store, "_fetch", lambda layer, ids: asked.extend((layer, e) for e in ids) or fetch(layer, ids)
    )
    monkeypatch.setattr(model._store, "capacity", 3)
    expected = np.array(model.logits(PROMPT))
    assert len(asked) == len(set(asked))
    assert asked == sorted(asked), "layer by layer, experts in order"
    monkeypatch.undo()
    np.testing.assert_allclose(np.array(model.logits(PROMPT)), expected, atol=1e-4)


def test_progress_of_loading_and_prefill(packed_checkpoint: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with Model.load(packed_checkpoint, expert_io="resident", progress=lambda *a: seen.append(a)) as model:
        assert ("layers", 4, 4) in seen
        assert [s for s in seen if s[0] == "expert bytes"][-1][1:] == (64 * 16384, 64 * 16384)
        steps: list[tuple[int, int]] = []
        model._engine = Engine(model._decoder, prefill_chunk=1024)
        model.generate([1] * 2100, max_tokens=1, progress=lambda *a: steps.append(a))
        assert steps == [(1024, 2100), (2048, 2100), (2100, 2100)]
        model.generate([1] * 2110, max_tokens=1, progress=lambda *a: steps.append(a))
        assert steps[3:] == [(2110, 2110)]


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


def test_logits_shape_and_dtype(model: Model) -> None:
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 288)
    assert logits.dtype == mx.float32


def test_large_records_in_any_thread_and_store(monkeypatch: pytest.MonkeyPatch, packed_checkpoint: Path) -> None:
    """Records that are computed on streams of their own: the same tokens from every store, in threads, too."""
    from flash_moe.ops import experts

    monkeypatch.setattr(experts, "_LARGE", 1)
    found = []
    for expert_io in ("slots", "mapped", "resident"):
        with Model.load(packed_checkpoint, expert_io=expert_io) as model:
            worker = threading.Thread(
                target=lambda: found.append(model.generate(PROMPT, max_tokens=30, temperature=0).tokens)
            )
            worker.start()
            worker.join()
            found.append(model.generate(PROMPT, max_tokens=30, temperature=0).tokens)
    assert len(found) == 6 and len(set(found)) == 1
