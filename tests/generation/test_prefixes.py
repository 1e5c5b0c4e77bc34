"""Prompts that share a beginning: only what is new is run, and nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import text_config, write_checkpoint

from flash_moe import ArgumentError, Model
from flash_moe.errors import FlashMoEError
from flash_moe.generation.engine import Engine
from flash_moe.generation.prefixes import MARKS, boundaries, shared
from flash_moe.nn.cache import DeltaCache
from flash_moe.progress import Progress

SYSTEM = {"role": "system", "content": "You are terse."}
FIRST = {"role": "user", "content": "Which experts does a token use?"}


@pytest.fixture
def model(packed_checkpoint: Path) -> Iterator[Model]:
    with Model.load(packed_checkpoint) as model:
        yield model


def fresh(folder: Path, prompt: list, **options: object) -> tuple[int, ...]:
    with Model.load(folder) as model:
        return model.generate(prompt, **options).tokens


def test_a_conversation_goes_on_where_it_was(model: Model, packed_checkpoint: Path) -> None:
    prompt = [10, 20, 30, 40, 50]
    first = model.generate(prompt, max_tokens=6, temperature=0)
    assert first.stats.reused_tokens == 0
    longer = [*prompt, *first.tokens, 60, 70]
    second = model.generate(longer, max_tokens=12, temperature=0)
    assert second.stats.reused_tokens == len(prompt) + len(first.tokens) - 1  # the last token was drawn, not run
    assert second.tokens == fresh(packed_checkpoint, longer, max_tokens=12, temperature=0)


def test_another_question_after_the_same_system_prompt(model: Model, packed_checkpoint: Path) -> None:
    model.generate([SYSTEM, FIRST], max_tokens=4)
    prompt = [SYSTEM, {"role": "user", "content": "And why?"}]
    reply = model.generate(prompt, max_tokens=12, temperature=0)
    assert reply.stats.reused_tokens == boundaries(model.encode(prompt), model.tokenizer.eos_token_ids)[0]
    assert reply.tokens == fresh(packed_checkpoint, prompt, max_tokens=12, temperature=0)


def test_a_reply_that_the_template_rewrites_is_run_again_but_not_what_came_before(model: Model) -> None:
    model.generate([SYSTEM, FIRST], max_tokens=4)
    later = [SYSTEM, FIRST, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Always?"}]
    reused = model.generate(later, max_tokens=4).stats.reused_tokens
    assert reused == boundaries(model.encode([SYSTEM, FIRST]), model.tokenizer.eos_token_ids)[-1]


@pytest.mark.parametrize("prompt", [[10, 20, 30, 40, 50], [SYSTEM, FIRST]], ids=["tokens", "chat"])
def test_the_same_prompt_again(model: Model, prompt: list) -> None:
    first = model.generate(prompt, max_tokens=20, temperature=0)
    again = model.generate(prompt, max_tokens=20, temperature=0)
    assert again.tokens == first.tokens
    assert again.stats.reused_tokens == boundaries(model.encode(prompt), model.tokenizer.eos_token_ids)[-1]


def test_logits_after_a_mark_equal_those_of_a_fresh_pass(model: Model) -> None:
    tokens = [(7 * i + 3) % 200 for i in range(70)]
    cache = model._decoder.new_cache()
    cache.mark([1, 33])
    model._engine.prefill(tokens[:50], cache)
    for length in (33, 1):
        cache.cut_back(length)
        assert cache.sound and cache.tokens == tokens[:length] and cache.marks[-1] == length
        rest = model._engine.prefill(tokens, cache)
        np.testing.assert_allclose(np.array(rest), np.array(model.logits(tokens))[-1], atol=1e-4)


def test_streams_at_the_same_time_do_not_share(model: Model, packed_checkpoint: Path) -> None:
    prompt = [10, 20, 30, 40, 50]
    model.generate(prompt, max_tokens=2)
    one, other = (model.stream([*prompt, 60 + i], max_tokens=8, temperature=0) for i in range(2))
    tokens = [(a.token, b.token) for a, b in zip(one, other, strict=True)]
    for i, column in enumerate(zip(*tokens, strict=True)):
        assert column == fresh(packed_checkpoint, [*prompt, 60 + i], max_tokens=8, temperature=0)


def test_leaving_a_stream_early_keeps_what_was_run(model: Model) -> None:
    prompt = [10, 20, 30, 40, 50]
    stream = model.stream(prompt, max_tokens=20, temperature=0)
    first = next(stream)
    stream.close()
    assert model.generate([*prompt, first.token, 7], max_tokens=1).stats.reused_tokens == len(prompt)


def test_a_failed_pass_is_not_continued(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [10, 20, 30, 40, 50]
    store, fetch = model._store, model._store.fetch

    def broken(layer: int, experts: list[int], *rest: object) -> object:
        if layer == 2:
            raise FlashMoEError("the disk is gone")
        return fetch(layer, experts, *rest)

    monkeypatch.setattr(store, "fetch", broken)
    with pytest.raises(FlashMoEError, match="gone"):
        model.generate(prompt, max_tokens=2)
    monkeypatch.undo()
    assert model.generate([*prompt, 60], max_tokens=2).stats.reused_tokens == 0


def test_a_failed_token_costs_no_more_than_the_reply(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [10, 20, 30, 40, 50]
    stream = model.stream(prompt, max_tokens=9, temperature=0)
    next(stream)
    next(stream)
    store, fetch = model._store, model._store.fetch

    def broken(layer: int, experts: list[int], *rest: object) -> object:
        if layer == 2:
            raise FlashMoEError("the disk is gone")
        return fetch(layer, experts, *rest)

    monkeypatch.setattr(store, "fetch", broken)
    with pytest.raises(FlashMoEError, match="gone"):
        next(stream)
    monkeypatch.undo()
    again = model.generate([*prompt, 60], max_tokens=12, temperature=0)
    assert again.stats.reused_tokens == 4
    assert again.tokens == fresh(model.path, [*prompt, 60], max_tokens=12, temperature=0)


@pytest.mark.parametrize("chunk", [1, 2], ids=["first", "second"])
def test_a_failed_chunk_of_a_prompt_costs_only_itself(
    model: Model, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Fails in the progress callback, or by a read inside the next chunk: what is done stays."""
    model._engine = Engine(model._decoder, prefill_chunk=16)
    prompt = [(7 * i + 3) % 200 for i in range(60)]
    store, fetch, done = model._store, model._store.fetch, []

    def report(progress: Progress) -> None:
        done.append(progress.done)
        if progress.done == 16 * chunk:
            monkeypatch.setattr(store, "fetch", broken)

    def broken(layer: int, experts: list[int], *rest: object) -> object:
        if layer == 3:
            raise FlashMoEError("the disk is gone")
        return fetch(layer, experts, *rest)

    with pytest.raises(FlashMoEError, match="gone"):
        model.generate(prompt, max_tokens=2, progress=report)
    monkeypatch.undo()
    again = model.generate(prompt, max_tokens=12, temperature=0)
    assert again.stats.reused_tokens == 16 * chunk
    assert again.tokens == fresh(model.path, prompt, max_tokens=12, temperature=0)


def test_an_exception_in_a_callback_loses_nothing(model: Model) -> None:
    first = model.generate([10, 20, 30], max_tokens=5, temperature=0)
    longer = [10, 20, 30, *first.tokens, 7, 8, 9]

    def broken(progress: Progress) -> None:
        raise KeyError("a fault of the caller")

    with pytest.raises(KeyError):
        model.generate(longer, progress=broken)
    again = model.generate(longer, max_tokens=8, temperature=0)
    assert again.stats.reused_tokens == len(longer) - 4  # the chunk that was under way is taken back
    assert again.tokens == fresh(model.path, longer, max_tokens=8, temperature=0)


@pytest.mark.parametrize("shared_system", [False, True], ids=["own system prompts", "the same system prompt"])
def test_conversations_in_turn_run_only_what_is_new(model: Model, shared_system: bool) -> None:
    talks = [[9] * 20 + [300 - 13 - who] for who in range(3)] if shared_system else [[who] * 9 for who in (1, 2, 3)]
    alone = []
    for talk in talks:
        tokens = list(talk)
        for turn in range(4):
            tokens += model.generate(tokens, max_tokens=5, temperature=0).tokens
            tokens += [turn, 7]
        alone.append(tokens)
    model.forget()
    together = [list(talk) for talk in talks]
    for turn in range(4):
        for tokens in together:
            reply = model.generate(tokens, max_tokens=5, temperature=0)
            new = 3 if turn else (1 if shared_system and tokens is not together[0] else len(tokens))
            assert reply.stats.prompt_tokens - reply.stats.reused_tokens == new
            tokens += [*reply.tokens, turn, 7]
    assert together == alone


@pytest.fixture(params=[None, True], ids=["MLX", "CPU kernels"])
def any_model(packed_checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    """Through MLX, and through the kernels of the CPU, which change states in place."""
    with Model.load(packed_checkpoint, kernels=request.param) as model:
        assert model._decoder.runs_on_cpu_kernels == bool(request.param)
        yield model


def test_another_turn_after_the_one_before_was_taken_back(any_model: Model) -> None:
    model, options = any_model, {"max_tokens": 12, "temperature": 0}
    tokens = [10, 20, 30, 40, 50]
    tokens += [*model.generate(tokens, **options).tokens, 60, 70]
    for end in (tokens, [*tokens[:-2], 80, 90, 100]):
        reply = model.generate(end, **options)
        assert reply.stats.reused_tokens == len(tokens) - 3
        model.forget() if end is not tokens else None
    assert model.generate(end, **options).tokens == reply.tokens


def test_a_fork_is_independent(any_model: Model) -> None:
    model, prompt = any_model, [(7 * i + 3) % 200 for i in range(40)]
    cache = model._prefixes.take(prompt)
    model._engine.prefill(prompt, cache)
    fork = cache.fork(len(prompt))
    for changed, kept in ((cache, fork), (fork, cache)):
        before = [np.array(array) for array in kept.fork(len(kept.tokens)).arrays]
        for token in range(5):
            model._engine._run([token], changed, 0)
        for a, b in zip(kept.fork(len(kept.tokens)).arrays, before, strict=True):
            np.testing.assert_array_equal(np.array(a), b)


def test_a_chunk_that_fails_leaves_no_trace(any_model: Model) -> None:
    model, prompt = any_model, [(7 * i + 3) % 200 for i in range(40)]
    cache = model._prefixes.take(prompt)
    model._engine.prefill(prompt[:20], cache)
    with pytest.raises(KeyError), cache.undone_on_error():
        model._decoder(mx.array(prompt[20:]), cache)
        raise KeyError
    assert cache.sound and len(cache.tokens) == 20
    found = np.array(model._engine.prefill(prompt, cache))
    model.forget()
    np.testing.assert_allclose(found, np.array(model._engine.prefill(prompt, model._engine.new_cache())), atol=1e-4)


def test_what_a_rewritten_reply_leaves_behind_goes_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.generate([1] * 9, max_tokens=1)
    model.generate([SYSTEM, FIRST], max_tokens=4)
    model.generate([SYSTEM, FIRST, {"role": "assistant", "content": "Four."}, FIRST], max_tokens=4)
    one, other, current = model._prefixes._kept
    assert (other.tokens[0], len(one.tokens) < len(current.tokens)) == (1, True)


def test_a_large_sequence_is_cut_back_in_place(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.generate([1] * 9, max_tokens=1)
    (cache,) = model._prefixes._kept
    monkeypatch.setattr(model._prefixes, "_limit", 2 * cache.nbytes - 1)
    model.generate([1] * 9, max_tokens=1)
    assert model._prefixes._kept == [cache]


def test_kept_sequences_are_bounded_in_bytes(packed_checkpoint: Path) -> None:
    prompts = [[i] * 40 for i in range(1, 6)]
    with Model.load(packed_checkpoint) as model:
        model.generate(prompts[0], max_tokens=1)
        size = model._prefixes._kept[0].nbytes
    for room, expected in ((0, 0), (size // 2, 0), (3 * size, 3)):
        with Model.load(packed_checkpoint, prompt_cache=room) as model:
            for prompt in prompts:
                model.generate(prompt, max_tokens=1)
            kept = model._prefixes._kept
            assert sum(cache.nbytes for cache in kept) <= room
            assert [cache.tokens[0] for cache in kept] == [5, 4, 3, 2, 1][:expected][::-1]
    with pytest.raises(ArgumentError, match="prompt_cache"):
        Model.load(packed_checkpoint, prompt_cache=-1)


def test_the_last_sequence_is_kept_however_large(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model._prefixes, "_limit", 1)
    for prompt in ([1] * 9, [2] * 9):
        model.generate(prompt, max_tokens=1)
    assert [cache.tokens[0] for cache in model._prefixes._kept] == [2]


def test_the_one_used_longest_ago_goes_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (1, 2, 3):
        model.generate([first] * 9, max_tokens=1)
    model.generate([1] * 10, max_tokens=1)
    monkeypatch.setattr(model._prefixes, "_limit", 1)
    monkeypatch.setattr(model._prefixes, "_least", 2)
    model._prefixes.put(model._prefixes.take([3] * 10))
    assert [cache.tokens[0] for cache in model._prefixes._kept] == [1, 3]


def test_memory_of_marks_is_bounded(model: Model) -> None:
    messages = [SYSTEM]
    for turn in range(6):
        messages += [{"role": "user", "content": f"Turn {turn}"}, {"role": "assistant", "content": "Yes."}]
        model.generate(messages[:-1], max_tokens=1)
    cache = model._prefixes._kept[-1]
    assert len(cache.marks) == MARKS
    assert cache.marks[0] == boundaries(model.encode([SYSTEM, FIRST]), model.tokenizer.eos_token_ids)[0]
    assert all(len(layer.marks) == MARKS for layer in cache.layers if isinstance(layer, DeltaCache))
    model.forget()
    assert model.generate(messages[:-1], max_tokens=1).stats.reused_tokens == 0


def test_a_model_without_delta_layers(tmp_path: Path) -> None:
    text = text_config(num_hidden_layers=2, full_attention_interval=1)
    folder = write_checkpoint(tmp_path / "attention", text)
    prompt = [10, 20, 30, 40, 50]
    with Model.load(folder) as model:
        model.generate(prompt, max_tokens=3)
        again = model.generate(prompt, max_tokens=8, temperature=0)
        assert again.stats.reused_tokens == 4
    assert again.tokens == fresh(folder, prompt, max_tokens=8, temperature=0)


def test_arithmetic() -> None:
    assert shared([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared([1, 2], [1, 2, 3]) == 2
    assert shared([], [1]) == 0
    for length in range(70):
        a = list(range(70))
        assert shared(a, [*a[:length], -1, *a[length + 1 :]]) == length
    assert boundaries([5, 9, 6, 9, 7, 8], {9}) == [2, 4]
    assert boundaries([5, 6, 9], {9}) == [2]  # the last token is run anyway
    assert boundaries([5], {9}) == []


def test_an_end_of_a_message_that_was_passed_without_a_mark_is_none(model: Model) -> None:
    """A sequence that went on past such a token, as measurements have it do, has no state to go back to there."""
    end = next(iter(model.tokenizer.eos_token_ids))
    cache = model._prefixes.take([10, 20, 30])
    model._engine.prefill([10, 20, 30, end, 40, 50], cache)
    model._prefixes.put(cache)
    taken = model._prefixes.take([10, 20, 30, end, 40, 50, 60])
    assert len(taken.tokens) == 6 and taken.marks == [2, 6]
    model._prefixes.put(taken)
    assert len(model._prefixes.take([10, 20, 30, end, 41]).tokens) == 2


def test_mark_of_a_token_by_token_pass(model: Model) -> None:
    cache = model._decoder.new_cache()
    cache.mark([2])
    for token in (5, 6, 7):
        model._decoder(mx.array([token]), cache)
        cache.tokens.append(token)
    cache.cut_back(2)
    assert cache.sound
