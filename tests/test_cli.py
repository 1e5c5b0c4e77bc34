"""The command line: in this process where only text matters, as a process where exit codes, pipes and signals do."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import failed, flash_moe_command, process

import flash_moe.packing.convert
from flash_moe import Model, __version__
from flash_moe.checkpoint.packed import layer_file
from flash_moe.cli import progress
from flash_moe.cli.arguments import size
from flash_moe.packing.info import describe

SUMMARY = re.compile(
    r"\d+ prompt tokens at [\d.]+ tok/s · (\d+) generated at [\d.]+ tok/s · K=(\d+)( of the model's 4)?"
    r" · [\d.]+ [kM]B of experts per token · \d+% in memory(?: · (.+))?\n"
)


@pytest.fixture
def endless_checkpoint(packed_checkpoint: Path, tmp_path: Path) -> Path:
    """``packed_checkpoint`` without end-of-sequence tokens."""
    folder = shutil.copytree(packed_checkpoint, tmp_path / "endless")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


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
    assert set(reply) == {"text", "finish_reason", "tokens", "stats", "model"}
    assert (reply["text"], reply["tokens"]) == (expected.text, list(expected.tokens))
    assert (reply["finish_reason"], reply["model"]) == (expected.finish_reason, str(packed_checkpoint))
    assert set(reply["stats"]) == set(expected.stats.to_dict())


def test_streaming_options_reach_the_model_and_show(packed_checkpoint: Path) -> None:
    options = ("--prefetch", "--drop-cold-below", 0.3, "--prefer-cached", 0.3, "--max-tokens", 12)
    stats = json.loads(flash_moe_command("generate", packed_checkpoint, "hi", *options, "--json").stdout)["stats"]
    assert stats["prefetch"]["decision"] in ("nothing missing", "measuring")
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


@pytest.mark.parametrize("command", ["generate", "info", "verify", "convert"])
def test_wrong_path(command: str, tmp_path: Path) -> None:
    rest = {"generate": ["hello"], "convert": [tmp_path / "new"]}.get(command, [])
    assert "does not exist" in failed(flash_moe_command(command, tmp_path / "nothing", *rest))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-k", "0"], 2, "neither a number of 1 or more nor 'own'"),
        (["-k", "many"], 2, "neither a number of 1 or more nor 'own'"),
        (["-k", "99"], 1, "expected 1 to 16"),
        (["--max-tokens", "0"], 2, "--max-tokens"),
        (["--expert-cache", "lots"], 2, "write it as 2GB"),
        (["--expert-io", "magic"], 2, "resident"),
        (["--dtype", "int8"], 2, "bfloat16"),
        (["--temperature", "-1"], 1, "expected 0 or more"),
        (["--top-p", "1.5"], 1, "above 0 and at most 1"),
        (["--min-p", "nan"], 1, "from 0 to 1"),
        (["--drop-cold-below", "-0.1"], 1, "drop_cold_below is -0.1, expected a number from 0 to 1"),
        (["--prefer-cached", "1.5"], 1, "prefer_cached is 1.5, expected a number from 0 to 1"),
        (["--nonsense"], 2, "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(packed_checkpoint: Path, options: list[str], code: int, message: str) -> None:
    assert message in failed(flash_moe_command("generate", packed_checkpoint, "hello", *options), code)


@pytest.mark.parametrize("prompt", [b"", b"\n", b"\xff"], ids=["empty", "line-break", "not-utf-8"])
def test_bad_prompts(packed_checkpoint: Path, prompt: bytes) -> None:
    assert "PROMPT" in failed(flash_moe_command("generate", packed_checkpoint, stdin=prompt), code=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1000", 1000), ("2GB", 2 * 10**9), ("512 mb", 512 * 10**6), ("1.5GiB", 3 << 29), ("3k", 3000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text, "--expert-cache") == expected


def test_info_table(packed_checkpoint: Path) -> None:
    found = describe(packed_checkpoint, 2)
    lines = flash_moe_command("info", packed_checkpoint, "-k", 2).stdout.splitlines()
    table = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)
    assert len({line.index(value) for line, value in zip(lines, table.values(), strict=True)}) == 1
    assert table["layers"] == "4, 1 of them with full attention"
    assert table["form"] == "packed"
    assert table["expert format"] == "4-bit, groups of 32"
    assert table["vocabulary"] == "288 tokens"
    kilobytes = found.bytes_per_token / 1000
    assert table["experts per token"] == f"{kilobytes:.0f} kB at K=2, {2 * kilobytes:.0f} kB at the model's own 4"


@pytest.mark.parametrize(("k", "expected"), [("3", 3), ("own", 4), (None, 4)])
def test_info_json(float_checkpoint: Path, k: str | None, expected: int) -> None:
    result = flash_moe_command("info", float_checkpoint, "--json", *(["-k", k] if k else []))
    found = json.loads(result.stdout)
    assert found == vars(describe(float_checkpoint, expected))


def test_info_of_a_repository_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "hf download some/model" in failed(flash_moe_command("info", "some/model"))
    assert not any(tmp_path.iterdir())


def test_info_k_beyond_the_experts(packed_checkpoint: Path) -> None:
    assert "expected 1 to 16" in failed(flash_moe_command("info", packed_checkpoint, "-k", 17))


def test_convert_verify_and_damage(quantized_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    packed = tmp_path / "new model"
    result = flash_moe_command("convert", quantized_checkpoint, packed)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1] == f"run it: flash-moe generate '{packed}' \"Why is the sky blue?\""
    assert re.match(rf"wrote {re.escape(str(packed))}: [\d.]+ MB in [\d.]+ s", result.stdout)
    lines = result.stderr.splitlines()
    assert 5 <= len(lines) <= 10
    assert all(re.match(r"converting: \d+% · [\d.]+ [kM]B of [\d.]+ MB", line) for line in lines)

    result = flash_moe_command("verify", packed)
    assert (result.exit_code, result.stdout.split(" (")[0]) == (
        0, f"OK: 64 expert records and {len(list(packed.glob('*.safetensors'))) - 4} other weight files match their checksums"
    )  # fmt: skip

    stride = describe(packed).record_bytes
    path = packed / layer_file(2)
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size - 3 * stride + 100)  # the third expert from the end
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    result = flash_moe_command("verify", packed)
    assert result.exit_code == 1
    assert "error: expert 13 of layer 2" in result.stderr


def test_verify_is_honest_without_checksums(quantized_checkpoint: Path) -> None:
    result = flash_moe_command("verify", quantized_checkpoint)
    assert result.exit_code == 0
    assert "OK" not in result.stdout
    assert "all 64 experts" in result.stdout and "no checksums" in result.stdout


def test_convert_warns_of_requantising(quantized_checkpoint: Path, tmp_path: Path) -> None:
    result = flash_moe_command("convert", quantized_checkpoint, tmp_path / "two", "--bits", 2, "--group-size", 32)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the experts were requantised from 4 to 2 bits")


def test_convert_refuses_an_existing_folder(packed_checkpoint: Path, tmp_path: Path) -> None:
    assert "exists already" in failed(flash_moe_command("convert", packed_checkpoint, tmp_path))


@pytest.mark.parametrize("options", [("--bits", 7), ("--group-size", 16)], ids=["bits", "group-size"])
def test_convert_bad_formats(float_checkpoint: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    message = failed(flash_moe_command("convert", float_checkpoint, tmp_path / "x", *options), code=2)
    assert "is not one of" in message


def test_convert_interrupted_and_resumed(
    quantized_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "packed"
    write_layer = flash_moe.packing.convert._Conversion._write_layer

    def interrupted(self: object, reader: object, layer: int, *rest: object) -> list[str]:
        if layer == 2:
            raise KeyboardInterrupt
        return write_layer(self, reader, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(flash_moe.packing.convert._Conversion, "_write_layer", interrupted)
        result = flash_moe_command("convert", quantized_checkpoint, destination)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted; run the same command again to continue\n"
    result = flash_moe_command("convert", quantized_checkpoint, destination)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"continuing in {destination}.partial")
    assert flash_moe_command("verify", destination).stdout.startswith("OK")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["flash-moe info MODEL", "flash-moe convert SRC DST", 'flash-moe generate DST "Hello"', "-v, --verbose"]),
        (
            ["generate"],
            ['flash-moe generate MODEL "Why is the sky blue?"', "-k own", "--max-tokens N", "--no-thinking"],
        ),
        (["info"], ["flash-moe info MODEL --json", "-k, --experts-per-token"]),
        (["convert"], ["flash-moe convert ./qwen-mlx-4bit ./qwen-packed", "--bits 2|3|4|5|6|8", "DST.partial"]),
        (["verify"], ["flash-moe verify ./qwen-packed && echo good"]),
        (["plan"], ['flash-moe plan org/name --machine "M3 Max 48GB"', "--context N"]),
        (["bench"], ["flash-moe bench io MODEL --seconds 10", "is short for"]),
        (["bench", "model"], ["--plot FILE", "flash-moe bench MODEL --json -"]),
        (["bench", "io"], ["PATH", "--seconds S"]),
    ],
    ids=["app", "generate", "info", "convert", "verify", "plan", "bench", "bench model", "bench io"],
)
def test_help(command: list[str], words: list[str]) -> None:
    result = flash_moe_command(*command, "--help")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in words)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not re.search(r"[a-z]\.\.\.$", result.stdout, re.MULTILINE)  # a description that was cut


def test_version() -> None:
    assert flash_moe_command("--version").stdout == f"flash-moe {__version__}\n"


def test_verbose_shows_the_log(quantized_checkpoint: Path, tmp_path: Path) -> None:
    result = flash_moe_command("-v", "convert", quantized_checkpoint, tmp_path / "packed")
    assert "flash_moe.packing.convert: packing the experts of layer 3" in result.stderr


def test_process_failure() -> None:
    started = process("generate", "/does/not/exist", "hello")
    stdout, stderr = started.communicate(timeout=20)
    assert (started.returncode, stdout) == (1, b"")
    assert stderr.startswith(b"error: '/does/not/exist' does not exist") and stderr.count(b"\n") == 1


def test_ctrl_c_ends_a_stream(endless_checkpoint: Path) -> None:
    started = process("generate", endless_checkpoint, "hello", "--max-tokens", 4000)
    assert started.stdout is not None
    assert started.stdout.read(3)  # the stream has begun
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=20)
    assert started.returncode == 130
    assert stdout.endswith(b"\n")
    assert (summary := SUMMARY.fullmatch(stderr.decode()))
    assert summary[4] == "interrupted"


def test_closed_pipe_ends_quietly(endless_checkpoint: Path) -> None:
    started = process("generate", endless_checkpoint, "hello", "--max-tokens", 4000)
    assert started.stdout is not None and started.stderr is not None
    assert started.stdout.read(3)
    started.stdout.close()
    assert started.stderr.read() == b""
    started.stderr.close()
    assert started.wait(timeout=20) == 141


def test_text_that_stdout_cannot_encode(endless_checkpoint: Path) -> None:
    started = process(
        "generate",
        endless_checkpoint,
        "hello",
        "--max-tokens",
        20,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    stdout, stderr = started.communicate(timeout=20)
    assert started.returncode == 0
    assert b"?" in stdout and b"Traceback" not in stderr


def test_on_a_terminal(endless_checkpoint: Path) -> None:
    parent, child = pty.openpty()
    try:
        started = process(
            "generate", endless_checkpoint, "hello", "--max-tokens", 40, stdin=child, stdout=child, stderr=child
        )
        assert started.wait(timeout=20) == 0
        missing = process("generate", endless_checkpoint, stdin=child, stdout=child, stderr=subprocess.PIPE)
        stderr = missing.communicate(timeout=20)[1]
        time.sleep(0.05)
        output = os.read(parent, 1 << 16).decode()
    finally:
        os.close(child)
        os.close(parent)
    text, _, summary = output.rpartition("\x1b[2m")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)  # a model cannot drive the terminal
    assert SUMMARY.fullmatch(re.sub(r"\s+", " ", summary.replace("\x1b[0m", "")).strip() + "\n")
    assert missing.returncode == 2
    assert b"pipe it in" in stderr
