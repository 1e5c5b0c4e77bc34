"""Generations that are cancelled from another thread or with their asyncio task: they end, and the model stays usable."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import aclosing
from typing import Any

import pytest

from flash_moe import ArgumentError, Model

PROMPT = list(b"Memory is small and disks are large, so") * 3
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


class After:
    """An event that is set when it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_at_any_moment_the_reply_so_far_stays(model: Model) -> None:
    """Every moment at which a generation looks, one after the other: layers of the prompt, reads, tokens."""
    expected = model.generate(PROMPT, **GREEDY)
    looks = 0
    while True:
        model.forget()
        reply = model.generate(PROMPT, cancel=After(looks), **GREEDY)
        assert reply.tokens == expected.tokens[: len(reply.tokens)]
        if reply.finish_reason != "cancelled":
            break
        assert expected.raw_text.startswith(reply.raw_text)
        again = model.generate(PROMPT, **GREEDY)
        assert again.tokens == expected.tokens
        looks += 1 if looks < 6 else 11
    assert looks > 25


def test_what_was_cancelled_is_continued(model: Model) -> None:
    expected = model.generate(PROMPT, **GREEDY)
    model.forget()
    event = threading.Event()
    stream = model.stream(PROMPT, cancel=event, **GREEDY)
    chunks = [next(stream) for _ in range(5)]
    event.set()
    chunks += stream
    assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + ["cancelled"]
    assert chunks[-1].token is None
    tokens = [chunk.token for chunk in chunks[:-1]]
    rest = model.generate([*PROMPT, *tokens], temperature=0, max_tokens=7)
    assert rest.stats.reused_tokens == len(PROMPT) + 4
    assert (*tokens, *rest.tokens) == expected.tokens


def test_while_another_generation_has_its_turn(model: Model) -> None:
    event, turn = threading.Event(), model._engine._turn
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(model.generate(PROMPT, cancel=event, **GREEDY)))
    with turn:
        thread.start()
        time.sleep(0.05)
        event.set()
        thread.join(5)
        assert not thread.is_alive()
    assert (found[0].finish_reason, found[0].text) == ("cancelled", "")


def test_before_it_begins(model: Model) -> None:
    event = threading.Event()
    event.set()
    reply = model.generate(PROMPT, cancel=event)
    assert (reply.finish_reason, reply.text, reply.tokens) == ("cancelled", "", ())


@pytest.mark.parametrize("cancel", [True, object(), threading.Event], ids=["bool", "object", "class"])
def test_what_cannot_be_asked(model: Model, cancel: Any) -> None:
    if cancel is threading.Event:
        with pytest.raises(TypeError):  # is_set is there, and fails as it does for its caller
            model.generate(PROMPT, cancel=cancel)
        return
    with pytest.raises(ArgumentError, match="cancel"):
        model.stream(PROMPT, cancel=cancel)


def test_async_gives_the_same(model: Model) -> None:
    async def main() -> tuple[Any, Any]:
        whole = await model.agenerate(PROMPT, **GREEDY)
        chunks = [chunk async for chunk in model.astream(PROMPT, **GREEDY)]
        return whole, chunks

    expected = model.generate(PROMPT, **GREEDY)
    whole, chunks = asyncio.run(main())
    assert whole.tokens == expected.tokens == tuple(chunk.token for chunk in chunks)
    assert whole.text == expected.text == "".join(chunk.text for chunk in chunks)


def test_async_checks_arguments_at_once(model: Model) -> None:
    with pytest.raises(ArgumentError):
        model.astream(PROMPT, max_tokens=0)


def test_tasks_take_turns(model: Model) -> None:
    prompts = [[*PROMPT, i] for i in range(4)]
    alone = [model.generate(prompt, **GREEDY).tokens for prompt in prompts]

    async def main() -> list[Any]:
        return await asyncio.gather(*(model.agenerate(prompt, **GREEDY) for prompt in prompts))

    assert [reply.tokens for reply in asyncio.run(main())] == alone


def test_errors_reach_the_task(model: Model) -> None:
    def broken(now: object) -> None:
        raise KeyError("a fault of the caller")

    with pytest.raises(KeyError):
        asyncio.run(model.agenerate(PROMPT, progress=broken))


def test_a_cancelled_task_stops_the_work_before_it_ends(model: Model) -> None:
    async def main() -> None:
        for _ in range(6):
            model.forget()
            task = asyncio.create_task(model.agenerate(PROMPT, max_tokens=1000, temperature=0))
            await asyncio.sleep(random.random() * 0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not [t for t in threading.enumerate() if t.name.startswith("flash_moe astream")]
        async with aclosing(model.astream(PROMPT, max_tokens=1000, temperature=0)) as chunks:
            async for _ in chunks:
                break
        assert not [t for t in threading.enumerate() if t.name.startswith("flash_moe astream")]

    asyncio.run(main())
    assert len(model.generate(PROMPT, **GREEDY).tokens) == 12


def cancel_at_random(model: Model, times: int) -> None:
    draw = random.Random(times)
    expected = model.generate(PROMPT, **GREEDY).tokens
    start = time.perf_counter()
    model.forget()
    model.generate(PROMPT, **GREEDY)
    usual = time.perf_counter() - start
    before = threading.active_count()
    for number in range(times):
        if draw.random() < 0.5:
            model.forget()
        moment = draw.random() * usual
        if number % 2:
            event = threading.Event()
            timer = threading.Timer(moment, event.set)
            timer.start()
            tokens = model.generate(PROMPT, cancel=event, **GREEDY).tokens
            timer.cancel()
            timer.join()
            assert tokens == expected[: len(tokens)]
        else:

            async def main(moment: float = moment) -> None:
                task = asyncio.create_task(model.agenerate(PROMPT, **GREEDY))
                await asyncio.sleep(moment)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            asyncio.run(main())
        if number % 10 == 9:
            assert model.generate(PROMPT, **GREEDY).tokens == expected
    assert model.generate(PROMPT, **GREEDY).tokens == expected
    assert threading.active_count() <= before


def test_random_moments(model: Model) -> None:
    cancel_at_random(model, 10)


@pytest.mark.slow
def test_a_thousand_random_moments(model: Model) -> None:
    cancel_at_random(model, 1000)
