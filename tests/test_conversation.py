"""Conversations: turns with tools, what is run, what is kept when something fails, and files."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flash_moe import ArgumentError, Conversation, ConversationError, Model, PromptError, TokenizerError, ToolCallError
from flash_moe.conversation.messages import unanswered

ASK = "What is the weather like in Oslo for 3 days?"


def get_weather(city: str, days: int = 1) -> dict[str, object]:
    """Returns the weather of a city for some days.

    Args:
        city: where.
        days: how many.
    """
    return {"condition": "windy", "temperature": 5 + days}


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    with Model.load("demo", experts_per_token=None) as model:
        yield model


def talk(model: Model, tools: Any = (get_weather,), **options: Any) -> Conversation:
    return model.chat(tools=tools, **{"temperature": 0, "max_tokens": 100} | options)


def roles(chat: Conversation) -> list[str]:
    return [message["role"] for message in chat.messages]


def new_tokens(reply: Any) -> int:
    return reply.stats.prompt_tokens - reply.stats.reused_tokens


def test_functions_are_called_and_answered(demo: Model) -> None:
    chat = talk(demo)
    reply = chat.send(ASK)
    assert roles(chat) == ["user", "assistant", "tool", "assistant"]
    call = chat.messages[1]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 3}
    assert json.loads(chat.messages[2]["content"]) == get_weather("Oslo", 3)
    assert chat.messages[2]["tool_call_id"] == call["id"]
    assert reply.finish_reason == "stop" and "windy" in reply.text
    assert chat.messages[3] == reply.message
    assert new_tokens(reply) < 60


def test_every_step_is_in_the_stream(demo: Model) -> None:
    chunks = list(talk(demo).stream(ASK))
    results = [chunk.tool_result for chunk in chunks if chunk.tool_result is not None]
    assert [(result.call.arguments, result.failed) for result in results if result.call] == [
        ({"city": "Oslo", "days": 3}, False)
    ]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls", "stop"]
    assert "windy" in "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("turns", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_two_conversations_in_turn_run_only_new_tokens(turns: int, demo: Model) -> None:
    """What a turn adds: the end of the reply before, and the new message with its header."""
    chats = [talk(demo, (), max_tokens=6), talk(demo, (), max_tokens=7)]
    for turn in range(turns):
        for number, chat in enumerate(chats):
            question = f"Question {turn} of {number}: how large is it?"
            reply = chat.send(question)
            added = demo.encode([{"role": "user", "content": question}])
            if turn:
                assert new_tokens(reply) <= len(added) + 3, turn  # the last token, <|im_end|> and a line break
            else:
                assert reply.stats.reused_tokens == 0
    prompt = demo.encode(chats[0].messages[:-1])
    assert demo.generate(prompt, temperature=0, max_tokens=6).text == chats[0].messages[-1]["content"]


def test_undo_and_fork(demo: Model) -> None:
    chat = talk(demo, ())
    chat.send("What is flash_moe?")
    other = chat.fork()
    second = chat.send("What does K mean?")
    assert other.send("What does K mean?").tokens == second.tokens
    taken = chat.undo()
    assert [message["role"] for message in taken] == ["user", "assistant"] and len(chat.messages) == 2
    again = chat.send("What does K mean?")
    assert again.tokens == second.tokens and new_tokens(again) < 30
    chat.undo()
    chat.undo()
    with pytest.raises(PromptError, match="nothing to take back"):
        chat.undo()
    assert len(other.messages) == 4


def test_a_prefill_is_continued(demo: Model) -> None:
    chat = talk(demo, ())
    reply = chat.send("What is flash_moe?", prefill="A library")
    assert chat.messages[-1]["content"] == "A library" + reply.text
    assert new_tokens(chat.send("Why?")) < 20


def weather(result: Any) -> Any:
    """A function that does what `result()` does, and looks like `get_weather`."""

    def function(city: str, days: int = 1) -> Any:
        return result()

    function.__name__, function.__doc__ = get_weather.__name__, get_weather.__doc__
    return function


RESULTS = {
    "raises": (lambda: 1 // 0, "ZeroDivisionError"),
    "returns what JSON cannot hold": (object, "PydanticSerializationError"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_faults_of_functions_are_told_to_the_model(demo: Model, name: str) -> None:
    function, error = RESULTS[name]
    chat = talk(demo, (weather(function),))
    chat.send(ASK)
    assert error in json.loads(chat.messages[2]["content"])["error"]
    assert roles(chat)[-1] == "assistant"


def test_a_call_does_not_run_if_the_turn_is_cancelled_while_the_user_is_asked(demo: Model) -> None:
    cancel = threading.Event()

    def confirm(call: object) -> bool:
        cancel.set()
        return True

    ran: list[str] = []

    def get_weather(city: str) -> str:
        """Get the weather of a city."""
        ran.append(city)
        return "sunny"

    chat = demo.chat(tools=[get_weather], confirm=confirm)
    results = [chunk.tool_result for chunk in chat.stream("What is the weather in Paris?", cancel=cancel)]
    (result,) = [found for found in results if found is not None]
    assert result.failed and "cancelled" in result.content and not ran


def test_confirm_is_asked(demo: Model) -> None:
    asked = []
    chat = talk(demo, confirm=lambda call: asked.append(call.name))
    chat.send(ASK)
    assert asked == ["get_weather"] and "declined" in chat.messages[2]["content"]


def test_rounds_are_bounded(demo: Model) -> None:
    chat = talk(demo, max_rounds=0)
    reply = chat.send(ASK)
    assert reply.finish_reason == "tool_calls" and "limit" in chat.messages[2]["content"]
    chat.send("And now?")
    for rounds in (-1, 1.5):
        with pytest.raises(ArgumentError, match="max_rounds"):
            talk(demo, max_rounds=rounds)


def test_calls_of_schemas_are_left_to_the_caller(demo: Model) -> None:
    from flash_moe.text.function_tools import tool_schemas

    chat = talk(demo, tool_schemas([get_weather]))
    (call,) = chat.send(ASK).tool_calls
    with pytest.raises(PromptError, match="no results yet"):
        chat.send("Well?")
    assert roles(chat) == ["user", "assistant"]
    reply = chat.send({"role": "tool", "tool_call_id": call.id, "content": '{"condition": "windy"}'})
    assert "windy" in reply.text


def test_a_malformed_call_is_told_to_the_model(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_moe.text.call_reader import CallReader

    read, failed = CallReader._text_call, []

    def once(self: CallReader, *arguments: Any, **options: Any) -> Any:
        if not failed:
            failed.append(True)
            raise ToolCallError("days is missing")
        return read(self, *arguments, **options)

    monkeypatch.setattr(CallReader, "_text_call", once)
    chat = talk(demo, strict_tools=False)
    chat.send(ASK)
    assert "<tool_call>" in chat.messages[1]["content"] and "days is missing" in chat.messages[2]["content"]
    assert roles(chat)[-1] == "assistant"


def test_an_error_leaves_the_conversation_as_it_was(demo: Model) -> None:
    def broken(progress: object) -> None:
        raise KeyError

    def interrupted() -> None:
        raise KeyboardInterrupt

    chat = talk(demo, (weather(interrupted),))
    for error, options in ((KeyError, {"progress": broken}), (KeyboardInterrupt, {}), (ArgumentError, {"cancel": 3})):
        with pytest.raises(error):
            chat.send(ASK, **options)
        assert chat.messages == []
    for content in ([], 5, [5], {"role": "nobody", "content": "x"}):
        with pytest.raises((PromptError, TokenizerError)):
            chat.send(content)  # type: ignore[arg-type]
        assert chat.messages == []


def test_leaving_a_stream_keeps_the_reply_so_far(demo: Model) -> None:
    chat = talk(demo, ())
    stream = chat.stream("What is flash_moe?")
    said = "".join(next(stream).text for _ in range(9))
    stream.close()
    assert roles(chat) == ["user", "assistant"] and chat.messages[-1]["content"].startswith(said.strip()) and said
    assert new_tokens(chat.send("Go on.")) < 30
    for steps in (0, 1, 35, 37, 39, 50):
        chat = talk(demo, max_tokens=60)
        stream = chat.stream(ASK)
        if all(next(stream, None) is not None for _ in range(steps)):
            stream.close()
        assert chat.messages == [] or roles(chat)[-1] in ("assistant", "tool")
        assert not unanswered(chat.messages)


def test_cancelling_while_a_function_runs(demo: Model) -> None:
    event, release = threading.Event(), threading.Event()

    def late() -> str:
        event.set()
        release.wait(20)
        return "late"

    chat = talk(demo, (weather(late),))
    start = time.perf_counter()
    reply = chat.send(ASK, cancel=event)
    release.set()
    assert reply.finish_reason == "cancelled" and time.perf_counter() - start < 15
    assert "cancelled" in chat.messages[-1]["content"]
    chat.send("Never mind.")
    for thread in threading.enumerate():
        if thread.name == "flash_moe tool":
            thread.join(5)
            assert not thread.is_alive()


def test_cancelling_before_a_word_is_said(demo: Model) -> None:
    event = threading.Event()
    event.set()
    chat = talk(demo)
    assert chat.send(ASK, cancel=event).finish_reason == "cancelled"
    assert chat.messages == []


def test_async_turns_are_the_same(demo: Model) -> None:
    async def main() -> tuple[Any, list[Any]]:
        whole, parts = talk(demo), talk(demo)
        reply = await whole.asend(ASK)
        return reply, [chunk async for chunk in parts.astream(ASK)]

    chat = talk(demo)
    expected = chat.send(ASK)
    reply, chunks = asyncio.run(main())
    assert reply.tokens == expected.tokens
    assert [chunk.tool_result.failed for chunk in chunks if chunk.tool_result is not None] == [False]
    assert "".join(chunk.text for chunk in chunks).endswith(expected.text)
    with pytest.raises(PromptError):
        talk(demo).astream([])
    with pytest.raises(ArgumentError, match="cancel"):
        talk(demo).astream(ASK, cancel=True)  # type: ignore[arg-type]


def cancel_turns(model: Model, times: int) -> None:
    """Turns with a slow function, cancelled at any moment: the conversation stays one that goes on."""
    draw = random.Random(times)
    busy = threading.Event()

    def get_weather(city: str, days: int = 1) -> dict[str, object]:
        """Returns the weather.

        Args:
            city: where.
            days: how many.
        """
        busy.set()
        time.sleep(0.05)
        return {"condition": "windy", "temperature": 5 + days}

    chat = talk(model, (get_weather,))
    start = time.perf_counter()
    chat.send(ASK)
    usual, in_tools = time.perf_counter() - start, 0
    for number in range(times):
        if number % 20 == 0:
            chat = talk(model, (get_weather,))
        before, moment = copy.deepcopy(chat.messages), draw.random() * usual
        busy.clear()
        if number % 2:
            event = threading.Event()
            timer = threading.Timer(moment, event.set)
            timer.start()
            reply = chat.send(ASK, cancel=event)
            timer.cancel()
            timer.join()
            assert event.is_set() or reply.finish_reason == "stop"  # The event may be set after the last token, too.
        else:

            async def main(chat: Conversation = chat, moment: float = moment) -> None:
                task = asyncio.create_task(chat.asend(ASK))
                await asyncio.sleep(moment)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            asyncio.run(main())
        in_tools += busy.is_set()
        assert chat.messages[: len(before)] == before and not unanswered(chat.messages)
        assert all(m.get("role") != "user" for m in chat.messages[-1:]), (
            "a turn in which nothing was said is taken back"
        )
        assert not [t for t in threading.enumerate() if t.name.startswith("flash_moe astream")]
        if number % 20 == 19:
            chat.undo()
            assert chat.send(ASK).finish_reason == "stop"
    assert 0 < in_tools < times or times < 10
    deadline = time.monotonic() + 5
    while any(t.name == "flash_moe tool" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name == "flash_moe tool"]


def test_turns_cancelled_at_random_moments(demo: Model) -> None:
    cancel_turns(demo, 4)


@pytest.mark.slow
def test_many_turns_cancelled_at_random_moments(demo: Model) -> None:
    cancel_turns(demo, 200)


CONTINUE = """
import sys
from flash_moe import Model
with Model.load(sys.argv[1], experts_per_token=None) as model:
    reply = model.open_chat(sys.argv[2]).send("Why?")
    print(reply.stats.prompt_tokens - reply.stats.reused_tokens, list(reply.tokens))
"""


def test_a_saved_conversation_goes_on_in_another_process(demo: Model, tmp_path: Path) -> None:
    chat = talk(demo, (), max_tokens=12, seed=3, logit_bias={5: -1.0})
    chat.send("What is flash_moe?")
    chat.save(tmp_path / "talk.flashmoe")
    assert [file.name for file in tmp_path.iterdir()] == ["talk.flashmoe"]
    expected = chat.send("Why?")
    command = [sys.executable, "-c", CONTINUE, str(demo.path), str(tmp_path / "talk.flashmoe")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1) == [str(new_tokens(expected)), f"{list(expected.tokens)}\n"]
    assert new_tokens(expected) < 20


def test_tools_of_a_saved_conversation(demo: Model, tmp_path: Path) -> None:
    chat = talk(demo)
    chat.save(tmp_path / "new")
    assert demo.open_chat(tmp_path / "new").send(ASK).finish_reason == "tool_calls"
    assert "windy" in demo.open_chat(tmp_path / "new", tools=[get_weather]).send(ASK).text
    chat.send(ASK)
    chat.save(tmp_path / "new")
    opened = demo.open_chat(tmp_path / "new")
    assert opened.messages == chat.messages
    assert opened.undo() and new_tokens(opened.send(ASK)) < len(demo.encode(ASK)) + 10  # tools are not run again


@pytest.fixture
def saved(demo: Model, tmp_path: Path) -> Path:
    chat = talk(demo, (), max_tokens=2)
    chat.send("Hi")
    chat.save(tmp_path / "talk")
    return tmp_path / "talk"


def test_a_damaged_file_is_a_clear_error(demo: Model, saved: Path) -> None:
    content = saved.read_bytes()
    for position in [0, 7, 9, 200, len(content) // 3, len(content) // 2, len(content) - 1]:
        saved.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ConversationError, match="damaged"):
            demo.open_chat(saved)
        saved.write_bytes(content[:position])
        with pytest.raises(ConversationError, match="damaged"):
            demo.open_chat(saved)
    saved.write_bytes(content)
    assert demo.open_chat(saved).messages
    with pytest.raises(FileNotFoundError):
        demo.open_chat(saved.with_name("none"))


def test_another_checkpoint_or_setting_refuses_it(demo: Model, saved: Path, tmp_path: Path) -> None:
    for options, name in (({"experts_per_token": 2}, "experts_per_token"), ({"dtype": "float16"}, "dtype"),
                          ({"prefer_cached": 0.5}, "prefer_cached")):  # fmt: skip
        with (
            Model.load("demo", **{"experts_per_token": None} | options) as other,
            pytest.raises(ConversationError, match=name),
        ):
            other.open_chat(saved)
    folder = Path(shutil.copytree(demo.path, tmp_path / "copy", copy_function=shutil.copy2))
    with Model.load(folder, experts_per_token=None) as same:
        assert same.open_chat(saved).messages
        file = next(folder.glob("experts-00003*"))
        file.write_bytes(file.read_bytes())
        with pytest.raises(ConversationError, match="checkpoint"):
            same.open_chat(saved)


def test_saving_that_fails_leaves_the_old_file(demo: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved.read_bytes()
    chat = demo.open_chat(saved)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        chat.save(saved)
    assert saved.read_bytes() == content and [file.name for file in saved.parent.iterdir()] == ["talk"]


@pytest.mark.slow
def test_opening_costs_little_of_what_running_does(demo: Model, tmp_path: Path) -> None:
    chat = talk(demo, (), max_tokens=2)
    first = chat.send("Count: " + " ".join(map(str, range(900))))
    assert first.stats.prompt_tokens > 3000
    chat.save(tmp_path / "talk")
    expected = chat.send("Why?")
    start = time.perf_counter()
    opened = demo.open_chat(tmp_path / "talk")
    reply = opened.send("Why?")
    seconds = time.perf_counter() - start - reply.stats.decode_seconds
    assert reply.tokens == expected.tokens
    assert seconds < 0.05 * first.stats.prompt_seconds
