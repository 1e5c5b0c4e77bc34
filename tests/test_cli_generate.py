"""`flash-moe generate`: options and prompts reach the model, text goes to stdout and the summary to stderr."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import SUMMARY, failed, flash_moe_command

from flash_moe import Model


def test_generate_streams_the_text_of_generate(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint) as model:
        expected = model.generate("hello", max_tokens=12)
    result = flash_moe_command("generate", packed_checkpoint, "hello", "--max-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout.removesuffix("\n") == expected.text.removesuffix("\n")
    assert (summary := SUMMARY.fullmatch(result.stderr))
    assert summary.groups() == (str(len(expected.tokens)), "4", None, "cut by --max-tokens")


@pytest.mark.parametrize(("k", "shown"), [("2", ("2", " of the model's 4")), ("own", ("4", None)), ("4", ("4", None))])
def test_summary_shows_a_reduced_k(packed_checkpoint: Path, k: str, shown: tuple[str, str | None]) -> None:
    result = flash_moe_command("generate", packed_checkpoint, "hello", "-k", k, "--max-tokens", 5)
    assert (summary := SUMMARY.fullmatch(result.stderr))
    assert summary.groups()[1:3] == shown


def test_options_reach_the_model(packed_checkpoint: Path) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 7}
    with Model.load(packed_checkpoint, expert_io="slots", expert_cache=10**6, dtype="bfloat16") as model:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
        expected = model.generate(messages, max_tokens=10, enable_thinking=False, **sampling)
    options = [word for name, value in sampling.items() for word in ("--" + name.replace("_", "-"), value)]
    options += ["--expert-io", "slots", "--expert-cache", "1MB", "--dtype", "bfloat16", "--system", "Be brief."]
    result = flash_moe_command(
        "generate", packed_checkpoint, "hello", "--json", "--no-thinking", "--max-tokens", 10, *options
    )
    assert json.loads(result.stdout)["tokens"] == list(expected.tokens)


def test_json_holds_everything(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint) as model:
        expected = model.generate("hello", max_tokens=6)
    result = flash_moe_command("generate", packed_checkpoint, "hello", "--max-tokens", 6, "--json")
    reply = json.loads(result.stdout)
    assert result.stderr == ""
    assert set(reply) == {"text", "reasoning", "finish_reason", "tokens", "stats", "model"}
    assert (reply["text"], reply["tokens"]) == (expected.text, list(expected.tokens))
    assert (reply["finish_reason"], reply["model"]) == (expected.finish_reason, str(packed_checkpoint))
    assert set(reply["stats"]) == set(expected.stats.to_dict())


def test_streaming_options_reach_the_model_and_show(packed_checkpoint: Path) -> None:
    options = ("--prefetch", "--drop-cold-below", 0.3, "--prefer-cached", 0.3, "--max-tokens", 12)
    stats = json.loads(flash_moe_command("generate", packed_checkpoint, "hi", *options, "--json").stdout)["stats"]
    assert stats["prefetch"]["decision"] in ("nothing to load", "measuring")
    assert stats["choice"]["routed"] == (stats["generated_tokens"] - 1) * 4 * 4  # layers, K
    summary = flash_moe_command("generate", packed_checkpoint, "hi", *options).stderr
    assert re.search(r"% in memory · prefetch \w+.* · .*(dropped|swapped)", summary)


@pytest.mark.parametrize("prompt", [(), ("-",)], ids=["omitted", "dash"])
def test_prompt_from_stdin(packed_checkpoint: Path, prompt: tuple[str, ...]) -> None:
    options = ("--json", "--max-tokens", 4)
    piped = flash_moe_command("generate", packed_checkpoint, *prompt, *options, stdin="two\nlínes\n")
    given = flash_moe_command("generate", packed_checkpoint, "two\nlínes", *options)
    assert json.loads(piped.stdout)["stats"]["prompt_tokens"] == json.loads(given.stdout)["stats"]["prompt_tokens"]
    assert json.loads(piped.stdout)["tokens"] == json.loads(given.stdout)["tokens"]


def test_raw_leaves_out_the_chat_template(packed_checkpoint: Path) -> None:
    result = flash_moe_command("generate", packed_checkpoint, "hello", "--raw", "--json", "--max-tokens", 2)
    assert json.loads(result.stdout)["stats"]["prompt_tokens"] == len("hello")
    message = failed(flash_moe_command("generate", packed_checkpoint, "hello", "--raw", "--system", "x"), code=2)
    assert "--system" in message


def test_stop_ends_the_text(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint) as model:
        text = model.generate("hello", max_tokens=30).text
    stops = (text[8:10], text[5:7])
    cut = min(text.index(stop) for stop in stops)
    options = [word for stop in stops for word in ("--stop", stop)]
    result = flash_moe_command("generate", packed_checkpoint, "hello", "--max-tokens", 30, "--json", *options)
    reply = json.loads(result.stdout)
    assert (reply["text"], reply["finish_reason"]) == (text[:cut], "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", "0"], "neither a number of 1 or more nor 'own'"),
        (["-k", "many"], "neither a number of 1 or more nor 'own'"),
        (["-k", "99"], "expected an integer from 1 to 4"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--expert-cache", "lots"], "write it as 2GB"),
        (["--expert-io", "magic"], "resident"),
        (["--dtype", "int8"], "bfloat16"),
        (["--threads", "0"], "--threads"),
        (["--temperature", "-1"], "0 or more"),
        (["--top-p", "1.5"], "above 0 and at most 1"),
        (["--min-p", "nan"], "from 0 to 1"),
        (["--drop-cold-below", "-0.1"], "drop_cold_below is -0.1, expected a number from 0 to 1"),
        (["--prefer-cached", "1.5"], "prefer_cached is 1.5, expected a number from 0 to 1"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(packed_checkpoint: Path, options: list[str], message: str) -> None:
    assert message in failed(flash_moe_command("generate", packed_checkpoint, "hello", *options), code=2)


@pytest.mark.parametrize("prompt", [b"", b"\n", b"\xff"], ids=["empty", "line-break", "not-utf-8"])
def test_bad_prompts(packed_checkpoint: Path, prompt: bytes) -> None:
    assert "PROMPT" in failed(flash_moe_command("generate", packed_checkpoint, stdin=prompt), code=2)
