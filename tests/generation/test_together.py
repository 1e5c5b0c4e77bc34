"""Several prompts at once give the replies that they give alone, and fetch the experts of a layer once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from flash_moe import FlashMoEError, Model, Progress
from flash_moe.generation.engine import Engine
from flash_moe.text.prompt import several

PROMPTS = [[10, 20, 30], [40, 50], [10, 20, 31, 32], [7]]


@pytest.fixture(params=[False, True], ids=["mlx", "numba"])
def model(request: pytest.FixtureRequest, packed_checkpoint: Path) -> Model:
    if request.param:
        pytest.importorskip("numba")
    loaded = Model.load(packed_checkpoint, experts_per_token=None, kernels=request.param)
    loaded.tokenizer.eos_token_ids = frozenset()
    request.addfinalizer(loaded.close)
    return loaded


def test_the_same_tokens_as_one_by_one(model: Model) -> None:
    alone = [model.generate(prompt, max_tokens=8 + 3 * i, temperature=0).tokens for i, prompt in enumerate(PROMPTS)]
    model.forget()
    replies = model.generate(PROMPTS, max_tokens=17, temperature=0)
    assert [reply.tokens[: len(tokens)] for reply, tokens in zip(replies, alone, strict=True)] == alone
    assert [len(reply.tokens) for reply in replies] == [17] * 4
    again = model.generate([*PROMPTS[0], *replies[0].tokens, 9], max_tokens=5, temperature=0)
    assert again.stats.reused_tokens > len(PROMPTS[0]), "what ran together continues alone"
    model.forget()
    assert model.generate([*PROMPTS[0], *replies[0].tokens, 9], max_tokens=5, temperature=0).tokens == again.tokens


def test_experts_of_a_layer_are_fetched_once_for_all(model: Model) -> None:
    model.generate(PROMPTS, max_tokens=1, temperature=0)
    before = model.expert_store.stats.fetches
    replies = model.generate(PROMPTS, max_tokens=6, temperature=0)
    alone = model.expert_store.stats.fetches - before
    assert alone <= 6 * 4 * 2, "prompts and five steps through four layers; a union may take more than one fetch"
    assert all(reply.stats.generated_tokens == 6 for reply in replies)


def test_replies_that_end_early_leave_the_others(model: Model) -> None:
    alone = [model.generate(prompt, max_tokens=12, temperature=0) for prompt in PROMPTS]
    model.tokenizer.eos_token_ids = frozenset({alone[0].tokens[4], alone[2].tokens[7]})
    expected = [model.generate(prompt, max_tokens=12, temperature=0) for prompt in PROMPTS]
    seen: list[Progress] = []
    model.forget()
    replies = model.generate(PROMPTS, max_tokens=12, temperature=0, progress=seen.append)
    assert [(r.tokens, r.finish_reason) for r in replies] == [(r.tokens, r.finish_reason) for r in expected]
    assert len({len(reply.tokens) for reply in replies}) > 1
    read, done = ([p for p in seen if p.stage == stage] for stage in ("prompt", "generate"))
    assert [p.done for p in done] == sorted(p.done for p in done) and seen[-1] == Progress("generate", 4, 4, "replies")
    assert [p.done for p in read] == sorted(p.done for p in read) and read[-1] == Progress("prompt", 10, 10, "tokens")
    assert len(read) == model.config.num_hidden_layers, "by layer, and all prompts together"


def test_a_shared_beginning_runs_once(model: Model) -> None:
    base = list(range(1, 41))
    prompts = [[7, 8, 9], *([*base, 50 + i, 60] for i in range(4)), base[:30]]
    alone = []
    for prompt in prompts:
        model.forget()
        alone.append(model.generate(prompt, max_tokens=6, temperature=0).tokens)
    model.forget()
    replies = model.generate(prompts, max_tokens=6, temperature=0)
    assert [reply.tokens for reply in replies] == alone
    ran = [reply.stats.prompt_tokens - reply.stats.reused_tokens for reply in replies]
    assert sorted(ran) == [3, 13, 13, 13, 13, 30], "29 tokens run once; the last one of a prompt always runs"


def test_more_prompts_than_fit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some run, and the others begin as those end; prompts that are longer than a chunk run in pieces."""
    prompts = [[*range(1, 9 + 5 * i), 100 + i] for i in range(7)]
    alone = [model.generate(prompt, max_tokens=10, temperature=0) for prompt in prompts]
    model.tokenizer.eos_token_ids = frozenset({alone[0].tokens[2], alone[3].tokens[6]})
    alone = [model.generate(prompt, max_tokens=10, temperature=0) for prompt in prompts]
    counts: list[int] = []
    run = Engine.run_together

    def counted(self: Engine, tokens: Any, *rest: Any) -> Any:
        counts.append(len(tokens))
        return run(self, tokens, *rest)

    monkeypatch.setattr(Engine, "run_together", counted)
    monkeypatch.setattr(Engine, "most_together", 3)
    monkeypatch.setattr(model._engine, "_chunk", 8)
    model.forget()
    replies = model.generate(prompts, max_tokens=10, temperature=0)
    assert [(r.tokens, r.finish_reason) for r in replies] == [(r.tokens, r.finish_reason) for r in alone]
    assert max(counts) == 3


def test_strings_are_prompts_and_lists_of_messages_too(model: Model) -> None:
    assert several(["a", "b"]) and several([[{"role": "user", "content": "a"}]])
    assert (
        not several("ab")
        and not several([1, 2])
        and not several([{"role": "user", "content": "a"}])
        and not several([])
    )
    replies = model.generate(["hello", "you"], max_tokens=3, temperature=0)
    assert [r.text for r in replies] == [model.generate(p, max_tokens=3, temperature=0).text for p in ("hello", "you")]


def test_cancelling_ends_all_with_what_they_have(model: Model) -> None:
    cancel, steps = threading.Event(), []

    def count(tokens: object, logits: object) -> object:
        steps.append(1)
        if len(steps) == 10:
            cancel.set()
        return logits

    replies = model.generate(PROMPTS, max_tokens=50, cancel=cancel, logits_processors=[count])
    assert {reply.finish_reason for reply in replies} == {"cancelled"}
    assert all(2 <= len(reply.tokens) <= 4 for reply in replies)
    assert len(model.generate(PROMPTS[0], max_tokens=3).tokens) == 3


def test_a_failed_read_leaves_the_model_usable(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [reply.tokens for reply in model.generate(PROMPTS, max_tokens=6, temperature=0)]
    model.forget()
    store, arrive, calls = model.expert_store, model.expert_store._arrive, []

    def broken(layer: int, experts: list[int]) -> object:
        calls.append(layer)
        if len(calls) > 12 and layer == 2:
            raise FlashMoEError("the disk is gone")
        return arrive(layer, experts)

    with monkeypatch.context() as context:
        context.setattr(store, "_arrive", broken)
        with pytest.raises(FlashMoEError, match="gone"):
            model.generate(PROMPTS, max_tokens=6, temperature=0)
    assert [reply.tokens for reply in model.generate(PROMPTS, max_tokens=6, temperature=0)] == expected
