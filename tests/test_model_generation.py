"""Generating: as a stream or at once, side by side, in threads; how it samples and what ends it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from random_checkpoint import STOP

from flash_moe import ArgumentError, Chunk, Generation, Model

PROMPT = list(b"Memory is small and disks are large, so")


@pytest.fixture
def copy(packed_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_checkpoint, tmp_path / "copy"))


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


def test_a_stop_string_ends_the_text_before_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=60, temperature=0).text
    stop = whole[10:13]
    result = model.generate(PROMPT, max_tokens=60, temperature=0, stop=stop)
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason == "stop" and result.stop_string == stop
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


def test_the_context_ends_a_generation(packed_checkpoint: Path, copy: Path, edit_config) -> None:
    edit_config(copy, lambda c: c["text_config"].update(max_position_embeddings=45))
    with Model.load(copy) as small:
        small.tokenizer.eos_token_ids = frozenset()
        result = small.generate(PROMPT, max_tokens=500, temperature=0)
    assert len(PROMPT) + len(result.tokens) == 45
    assert result.finish_reason == "length"


def test_time_that_the_caller_takes_is_no_time_of_the_model(model: Model) -> None:
    usual = model.generate(PROMPT, max_tokens=6, temperature=0).stats
    stream = model.stream([*PROMPT, 1], max_tokens=6, temperature=0)
    wait = 0.3 + usual.prompt_seconds + usual.decode_seconds
    time.sleep(wait)
    for chunk in stream:
        time.sleep(wait)
        stats = chunk.stats
    assert stats.prompt_seconds < wait
    assert stats.time_to_first_token < wait
    assert stats.decode_seconds < 5 * wait
    assert stats.generated_tokens_per_second > 1 / wait
