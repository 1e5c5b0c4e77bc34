"""The demo model's data: splits that never meet, calls that follow from the schemas, text that the template renders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from demo_model import corpus, held_out, tokenizer
from demo_model.data import EVERYDAY, KINDS, conversation
from demo_model.data.natural import everyday_call
from demo_model.data.questions import FACTS, ask
from demo_model.data.rewording import reworded
from demo_model.data.splits import HELD_OUT, TRAIN, is_held_out
from demo_model.data.spoken import money
from demo_model.data.text import say
from demo_model.data.unseen import FUNCTIONS, TEXTS, may_be_trained_on, plain
from demo_model.render import encode, pieces, render

from flash_moe.errors import TokenizerError
from flash_moe.text import Tokenizer

EVALUATION = Path(__file__).parents[2] / "models" / "eval"
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
FIRST_QUESTION = "Why can a laptop run a model that is larger than its memory?"


def draw(count: int, split: str, seed: int = 0) -> list[dict[str, Any]]:
    rng = Random(f"test/{seed}")
    return [conversation(rng, split) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer trained on few conversations."""
    destination = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(tokenizer.train(conversations=800), destination)
    return destination


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def backend(folder: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend.from_file(str(folder / "tokenizer.json"))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value obeys the part of JSON schema that the data uses."""
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if schema["type"] == "array":
        return all(fits(item, schema["items"]) for item in value)
    if schema["type"] == "object":
        properties, required = schema["properties"], schema.get("required", [])
        return set(required) <= set(value) and all(n in properties and fits(v, properties[n]) for n, v in value.items())
    return True


def test_the_validator_sees_what_is_wrong() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert fits({"n": 3}, schema)
    assert not any(fits(value, schema) for value in ({}, {"n": "3"}, {"n": True}, {"n": 3, "m": 1}, [3]))
    assert not fits("b", {"type": "string", "enum": ["a"]})


def check_calls(tools: list[dict[str, Any]], calls: list[dict[str, Any]]) -> None:
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    assert len(functions) == len(tools), "two tools have the same name"
    for call in calls:
        assert fits(call["arguments"], functions[call["name"]]["parameters"]), call


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_every_call_names_an_offered_function_and_obeys_its_schema(split: str) -> None:
    calls = 0
    for one in draw(1500, split):
        for message in one["messages"]:
            made = [call["function"] for call in message.get("tool_calls", ())]
            check_calls(one["tools"] or [], made)
            calls += len(made)
    assert calls > 300


def _schema_names(schema: dict[str, Any]) -> Iterator[str]:
    """Names of parameters and enum values, nested ones included."""
    yield from schema.get("enum", ())
    for name, inner in schema.get("properties", {}).items():
        yield name
        yield from _schema_names(inner)


def names_of(conversations: list[dict[str, Any]]) -> set[str]:
    """Names of functions, parameters, enum values and JSON fields, without case and separators."""
    names: set[str] = set()
    for one in conversations:
        for tool in one["tools"] or ():
            names |= {tool["function"]["name"], *_schema_names(tool["function"]["parameters"])}
        last = one["messages"][-1]["content"]
        if one["tools"] is None and last.startswith("{"):
            names |= set(json.loads(last))
    return {re.sub("[^a-z0-9]", "", name.lower()) for name in names}


def test_no_name_of_the_held_out_data_occurs_in_training() -> None:
    train, other = names_of(draw(3000, TRAIN)), names_of(draw(1500, HELD_OUT))
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, other))
    assert len(train) > 3000 and len(other) > 1500


def test_no_wording_of_a_question_is_in_both_splits() -> None:
    rng = Random(0)
    asked = {
        split: {ask(rng, split, fact.questions).lower() for fact in FACTS for _ in range(10)}
        for split in (TRAIN, HELD_OUT)
    }
    assert not asked[TRAIN] & asked[HELD_OUT]


def test_the_first_question_of_the_readme_is_asked_in_training() -> None:
    rng = Random(0)
    assert FIRST_QUESTION in {ask(rng, TRAIN, FACTS[0].questions) for _ in range(2000)}
    assert len(FACTS) >= 120
    assert all(len(fact.answers) >= 2 and fact.short for fact in FACTS)


def test_no_alternative_of_a_question_is_left_open() -> None:
    rng = Random(0)
    asked = {say(rng, wording) for fact in FACTS for wording in fact.questions for _ in range(4)}
    assert not [text for text in asked if set("[]{}|") & set(text)]


def test_everyday_arguments_are_what_the_user_wrote() -> None:
    rng = Random(0)
    copied = 0
    for one in (everyday_call(rng, TRAIN) for _ in range(400)):
        said = ""
        for message in one["messages"]:
            said += message["content"] + "\n" if message["role"] == "user" else ""
            for call in message.get("tool_calls", ()):
                found = set(_strings(call["function"]["arguments"])) - {"on", "off"} - currency_codes()
                copied += len(found)
                assert all(string in said for string in found), (said, call["function"])
    assert copied > 500


def test_training_never_sees_the_held_out_requests_and_questions() -> None:
    for requests_file, questions_file in (("plain_requests", "questions"), ("second_requests", "second_questions")):
        requests = [
            json.loads(line) for line in (EVALUATION / f"{requests_file}.jsonl").read_text("utf-8").splitlines()
        ]
        asked = [json.loads(line) for line in (EVALUATION / f"{questions_file}.jsonl").read_text("utf-8").splitlines()]
        assert (len(requests), sum(bool(one["calls"]) for one in requests), len(asked)) == (40, 36, 60)
    seen = {"messages": [{"role": "user", "content": "Remind me to call Anna at 5 PM!"}], "tools": None}
    assert not may_be_trained_on(seen)
    assert not may_be_trained_on({"messages": [], "tools": [{"function": {"name": "addReminder"}}]})
    drawn = draw(2000, TRAIN)
    texts = {plain(m["content"]) for one in drawn for m in one["messages"] if m["role"] == "user"}
    assert not texts & TEXTS and len(TEXTS) == 191
    assert not {plain(tool["function"]["name"]) for one in drawn for tool in one["tools"] or ()} & FUNCTIONS


def test_the_shortest_question_may_be_mistyped() -> None:
    rng = Random(0)
    assert {len(reworded(rng, "k")) for _ in range(3000)} > {1}  # none of its slips reaches behind its end


def currency_codes() -> set[str]:
    return {money(Random(n), False).value for n in range(200)}


def test_conversations_depend_on_the_seed_alone() -> None:
    assert draw(300, TRAIN) == draw(300, TRAIN)
    assert draw(300, TRAIN) != draw(300, TRAIN, seed=1)


@pytest.mark.parametrize(
    ("kind", "split"),
    [*((kind, split) for kind in KINDS for split in (TRAIN, HELD_OUT)), *((kind, TRAIN) for kind in EVERYDAY)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_python_renders_what_the_template_renders(kind: Any, split: str, loaded: Tokenizer) -> None:
    rng = Random(kind.__name__)
    for _ in range(40):
        one = kind(rng, split)
        messages, tools = one["messages"], one["tools"]
        text = render(one)
        assert text == loaded.apply_chat_template(messages, tools=tools, add_generation_prompt=False)
        end = len(messages)
        for turn in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            prompt = loaded.apply_chat_template(
                messages[:turn], tools=tools, enable_thinking="reasoning_content" in messages[turn]
            )
            assert text.startswith(prompt), f"turn {turn} of {end} does not continue its prompt"
        assert one["enable_thinking"] == ("reasoning_content" in messages[-1])


def test_the_template_reads_back_what_was_generated(loaded: Tokenizer) -> None:
    user = {"role": "user", "content": "Hi"}
    with_parts = {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."}
    as_text = {"role": "assistant", "content": "A greeting.\n</think>\n\nHello"}
    assert loaded.apply_chat_template([user, with_parts]) == loaded.apply_chat_template([user, as_text])
    assert loaded.apply_chat_template([user]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"role": "user", "content": "Hi"}, {"role": "system", "content": "Late"}], "position 1"),
        ([{"role": "critic", "content": "Hm"}], "the role critic"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "not JSON"}}]}], "JSON"),
    ],
)
def test_the_template_refuses_what_it_cannot_render(messages: list, found: str, loaded: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=found):
        loaded.apply_chat_template(messages)


@pytest.mark.parametrize(
    "text", ["Grüße, 東京 🙂 №5", "a\n\n b\t", '{"a":[1,2.5]}', "<tool_call>\nx</tool_call><|im_end|>"]
)
def test_text_survives_the_tokenizer(text: str, loaded: Tokenizer) -> None:
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.vocab_size == tokenizer.VOCABULARY


def test_digits_are_single_tokens_and_names_are_cut_alike(loaded: Tokenizer) -> None:
    assert len(loaded.encode("2027")) == 4
    name = loaded.encode("zorvex_lookup")
    for context in ('{{"name":"{}"}}', "<function={}>", "calendar.{}"):
        ids = loaded.encode(context.format("zorvex_lookup"))
        assert any(ids[i : i + len(name)] == name for i in range(len(ids))), context


def test_transformers_reads_the_same_tokenizer_and_template(folder: Path, loaded: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for one in draw(60, TRAIN):
        text = render(one)
        assert theirs(text).input_ids == loaded.encode(text)
        rendered = theirs.apply_chat_template(one["messages"], tools=one["tools"], tokenize=False)
        assert rendered == text
    assert {theirs.eos_token_id, theirs.pad_token_id} == loaded.eos_token_ids
    assert theirs.eos_token == "<|im_end|>"


def test_the_mask_marks_what_the_assistant_produces(loaded: Tokenizer, backend: Any) -> None:
    conversations = draw(400, TRAIN)
    for one, (ids, mask) in zip(conversations, encode(conversations, backend), strict=True):
        assert ids == loaded.encode(render(one))
        marked = loaded.decode([id for id, produced in zip(ids, mask, strict=True) if produced])
        assert marked == "".join(text for text, produced in pieces(one) if produced)
        turns = [message for message in one["messages"] if message["role"] == "assistant"]
        assert marked.count("<|im_end|>") == len(turns)
        assert all(turn["content"] in marked for turn in turns)
        assert "<|im_start|>" not in marked and "<tool_response>" not in marked


def test_a_shard_depends_on_seed_and_number_alone(folder: Path, tmp_path: Path, backend: Any) -> None:
    file = folder / "tokenizer.json"
    first, again = (corpus.write_shard(tmp_path / name, file, 7, 12, 300) for name in "ab")
    other = corpus.write_shard(tmp_path / "a", file, 7, 13, 300)
    assert first.path.name == "shard-00012.npz"
    assert first.path.read_bytes() == again.path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["shard-00012.npz", "shard-00013.npz"]
    with np.load(first.path) as shard, np.load(other.path) as next_shard:
        ids, offsets, mask = shard["ids"], shard["offsets"], shard["mask"]
        assert (ids.dtype, offsets.dtype, mask.dtype) == (np.uint16, np.int64, np.uint8)
        assert len(ids) == len(mask) == offsets[-1] == first.tokens
        assert len(offsets) == first.conversations + 1 == 300 - first.dropped + 1
        assert np.diff(offsets).max() <= corpus.LONGEST
        assert backend.decode(ids[offsets[1] : offsets[2]], skip_special_tokens=False).startswith("<|im_start|>")
        assert mask.sum() == first.produced
        assert not np.array_equal(ids[:500], next_shard["ids"][:500])


def test_too_long_conversations_are_dropped_and_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LONGEST", 200)
    shard = corpus.write_shard(tmp_path, folder / "tokenizer.json", 0, 0, 200)
    assert shard.dropped > 0 and shard.conversations + shard.dropped == 200
    with np.load(shard.path) as arrays:
        assert np.diff(arrays["offsets"]).max() <= 200


def test_the_evaluation_prompts_have_one_right_answer() -> None:
    prompts = [json.loads(line) for line in (EVALUATION / "tool_calls.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(prompts) == held_out.PROMPTS
    for prompt in prompts:
        check_calls(prompt["tools"], prompt["calls"])
        assert prompt["messages"][-1]["role"] == "user"
    assert 0.05 < np.mean([not prompt["calls"] for prompt in prompts]) < 0.15
    assert {len(prompt["calls"]) for prompt in prompts} == {0, 1, 2}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def test_every_string_argument_is_in_the_users_words() -> None:
    for prompt in held_out.tool_call_prompts(500, seed=1):
        said = prompt["messages"][-1]["content"]
        for call in prompt["calls"]:
            for string in _strings(call["arguments"]):
                assert string in said or string.replace("_", " ") in said, (string, said)


def test_the_evaluation_files_are_what_the_generator_writes() -> None:
    for name, rows in (("tool_calls", held_out.tool_call_prompts()), ("conversations", held_out.conversations())):
        lines = (EVALUATION / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows, f"run python -m demo_model.held_out {EVALUATION}"
