"""`flash-moe eval` prints what the library measures, in a table of 80 columns or as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command
from random_checkpoint import text_config, write_checkpoint

from flash_moe.evaluation import (
    LayerwiseModel,
    TokenScores,
    divergence,
    perplexity,
    read_sequences,
    token_scores,
)
from flash_moe.experts.mapped import MappedStore
from flash_moe.progress import display


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    lines = []
    for number in range(6):
        messages = [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": "?" * (number + 1)},
        ]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    file = tmp_path / "calls.jsonl"
    message = [{"role": "user", "content": "Light, please."}]
    lines = [
        {"messages": message, "tools": [], "calls": expected} for expected in ([], [{"name": "a", "arguments": {}}])
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def scores(folder: Path, file: Path, k: int | None, reference: Path | None = None) -> TokenScores:
    model = LayerwiseModel.open(folder, experts_per_token=k)
    other = None if reference is None else LayerwiseModel.open(reference, experts_per_token=None)
    return token_scores(model, read_sequences(file, model.tokenizer, window=2048), other)


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no work takes long enough for lines of progress."""
    monkeypatch.setattr(display, "DELAY", 1e9)


def test_json_is_what_the_library_measures(packed_checkpoint: Path, chats: Path, calls: Path) -> None:
    result = flash_moe_command(
        "eval", packed_checkpoint, "--text", chats, "-k", 2, "--reference-experts-per-token", "own",
        "--tool-calls", calls, "--max-tokens", 5, "--json",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    expected = scores(packed_checkpoint, chats, 2, packed_checkpoint)
    assistant = expected.of_assistant()
    assert assistant is not None
    for name, part in (("all", expected), ("assistant", assistant)):
        numbers = dataclasses.asdict(perplexity(part)) | {"divergence": dataclasses.asdict(divergence(part))}
        assert found["text"][name] == numbers
    assert found["text"]["file"] == str(chats)
    assert found["model"] == {"path": str(packed_checkpoint), "experts_per_token": 2, "model_experts_per_token": 4}
    assert found["reference"]["experts_per_token"] == 4
    assert found["tool_calls"]["cases"] == 2
    assert found["tool_calls"]["right_functions"]["value"] == 0.5
    assert found["tool_calls"]["file"] == str(calls)


def test_table(packed_checkpoint: Path, float_checkpoint: Path, chats: Path, calls: Path) -> None:
    result = flash_moe_command(
        "eval", packed_checkpoint, "--text", chats, "-k", 2, "--reference", float_checkpoint, "--tool-calls", calls,
        "--max-tokens", 5,
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        f"model{'':19}{packed_checkpoint}, K=2 of its own 4",
        f"reference{'':15}{float_checkpoint}, K=4",
    ]
    assert all(len(line) <= 80 for line in lines if "/" not in line)
    table = {line[:24].rstrip(): re.split(r"  +", line[24:].strip()) for line in lines if line}
    found = scores(packed_checkpoint, chats, 2, float_checkpoint)
    assistant = found.of_assistant()
    assert assistant is not None
    assert table["perplexity"] == [str(perplexity(part).perplexity) for part in (found, assistant)]
    assert table["mean KL, nats"] == [str(divergence(part).kl) for part in (found, assistant)]
    assert table["predicted tokens"] == [str(len(part.nll)) for part in (found, assistant)]
    assert table["same top token"][0].endswith(" %")
    assert table["right functions"] == ["50 ± 35 %"]
    assert table["cut by --max-tokens"] == ["2"]
    assert lines[-1] == "± is one standard error; tokens of a sequence are taken together."


def test_a_plain_text_without_a_reference(packed_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("It was a bright cold day in April. " * 20)
    options = ("--window", 100, "--limit", 3, "--expert-io", "resident")
    text = flash_moe_command("eval", packed_checkpoint, "--text", file, *options).stdout
    assert re.search(r"^sequences +3\npredicted tokens +297\nperplexity +[\d.]+ ± [\d.]+\n\n±", text, re.MULTILINE)
    assert "reference" not in text and "KL" not in text
    found = json.loads(flash_moe_command("eval", packed_checkpoint, "--text", file, *options, "--json").stdout)
    assert found["reference"] is found["tool_calls"] is found["text"]["assistant"] is None
    assert found["text"]["all"]["divergence"] is None
    assert found["text"]["all"]["sequences"] == 3
    assert "±" not in flash_moe_command("eval", packed_checkpoint, "--text", file, *options[:2], "--limit", 1).stdout


@pytest.mark.slow
def test_token_by_token(packed_checkpoint: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedStore, "in_memory", lambda self, layer, experts: [e % 2 == 0 for e in experts])
    options = ("--token-by-token", "--drop-cold-below", 0.3, "--prefer-cached", 0.1, "--expert-io", "mapped")
    common = ("eval", packed_checkpoint, "--text", chats, "--reference-experts-per-token", 4, *options)
    table = flash_moe_command(*common).stdout
    rows = re.findall(r"^(run|experts \w+) +(.+)$", table, re.MULTILINE)
    assert [label for label, _ in rows] == ["run", "experts dropped", "experts swapped"]
    assert rows[0][1] == "token by token"
    share = r"([\d.]+)%, -([\d.]+)% of router mass"
    found = json.loads(flash_moe_command(*common, "--json").stdout)
    assert found["text"]["all"]["divergence"]["kl"]["value"] > 0.001
    assert "token_by_token" not in found["reference"]
    described = found["model"]["token_by_token"]
    (choice,) = described.pop("choices")
    assert described == {"prefetch": False, "drop_cold_below": 0.3, "prefer_cached": 0.1}
    for (_, text), what in zip(rows[1:], ("dropped", "swapped"), strict=True):
        assert (numbers := re.fullmatch(share, text))
        assert float(numbers[1]) == pytest.approx(100 * choice[what] / choice["routed"], abs=0.006) and choice[what]
        assert float(numbers[2]) == pytest.approx(100 * choice[f"router_mass_{what}"], abs=0.006)
    exact = json.loads(flash_moe_command(*common[:-4], "--prefetch", "--json").stdout)
    assert exact["model"]["token_by_token"]["prefetch"] is True


def test_progress(packed_checkpoint: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "DELAY", 0.0)
    result = flash_moe_command("eval", packed_checkpoint, "--text", chats, "--reference-experts-per-token", 1)
    lines = result.stderr.splitlines()
    assert lines[0].startswith("the reference: 25% · 1 of 4 layers")
    assert any(line.startswith("the model: 100% · 4 of 4 layers") for line in lines)
    assert re.match(r"scoring: 100% · (\d+) of \1 tokens", lines[-1])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "nothing to measure"),
        (["--tool-calls", "FILE", "--reference", "x"], 2, "pass --text too"),
        (["--text", "/does/not/exist"], 2, "does not exist"),
        (["--text", "FILE", "-k", "0"], 2, "'--experts-per-token'"),
        (["--text", "FILE", "--reference-experts-per-token", "all"], 2, "'--reference-experts-per-token'"),
        (["--text", "FILE", "--limit", "0"], 2, "--limit"),
        (["--text", "FILE", "--prefer-cached", "0.1"], 2, "pass --token-by-token too"),
        (["--tool-calls", "FILE", "--token-by-token"], 2, "pass --text too"),
        (["--text", "FILE", "--token-by-token", "--drop-cold-below", "7"], 2, "expected a number from 0 to 1"),
        (["--text", "FILE", "--window", "1"], 2, "--window"),
        (["--text", "FILE", "-k", "17"], 2, "expected an integer from 1 to 4"),
        (["--text", "FILE", "--reference", "/does/not/exist"], 1, "does not exist"),
        (["--tool-calls", "FILE"], 2, "line 1: 'calls' is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(packed_checkpoint: Path, chats: Path, options: list[str], code: int, message: str) -> None:
    given = [str(chats) if option == "FILE" else option for option in options]
    assert message in failed(flash_moe_command("eval", packed_checkpoint, *given), code)


def test_a_reference_with_another_vocabulary(packed_checkpoint: Path, chats: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", text_config(vocab_size=320))
    result = flash_moe_command("eval", packed_checkpoint, "--text", chats, "--reference", other)
    assert "same tokenizer" in failed(result, code=2)


def test_wrong_model(chats: Path, tmp_path: Path) -> None:
    assert "does not exist" in failed(flash_moe_command("eval", tmp_path / "nothing", "--text", chats))


def test_help() -> None:
    text = flash_moe_command("eval", "--help").stdout
    assert "flash-moe eval MODEL --text book.txt" in text
    assert max(map(len, text.splitlines())) <= 80
