"""Commands, for families that run on mlx-lm's networks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from command_line import failed, flash_moe_command
from family_checkpoints import checkpoint, plain
from mlx.utils import tree_flatten

from flash_moe import Model
from flash_moe.evaluation import NetworkModel, TokenSequence, open_scored, read_sequences, token_scores
from flash_moe.models import open_checkpoint
from flash_moe.packing.info import describe
from flash_moe.text import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("glm4_moe", tmp_path_factory.mktemp("adapted") / "model", vocab_size=4096)


def run(*arguments: object) -> str:
    result = flash_moe_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info_plan_convert_verify_and_bench(folder: Path, tmp_path: Path) -> None:
    found = json.loads(run("info", folder, "--json"))
    weights = dict(tree_flatten(plain(folder).parameters()))
    experts = {name: array.nbytes for name, array in weights.items() if ".switch_mlp." in name}
    assert found["resident_bytes"] == sum(array.nbytes for array in weights.values()) - sum(experts.values())
    assert (found["model_type"], found["experts"], found["layers"]) == ("glm4_moe", 4, 4)
    assert found["attention_layers"] == 4 and found["experts_per_token"] == found["model_experts_per_token"] == 2
    assert found["expert_bytes"] >= sum(experts.values())
    assert "glm4_moe" in run("info", folder, "-k", "1")

    planned = json.loads(
        run("plan", folder, "--machine", "M3 Max 48GB", "--json", "--context", "100", "--prompt", "50")
    )
    assert planned["memory"]["fits"] and planned["decode"]["warm"]["total"] > 0
    assert planned["expert_bytes_per_token"] == found["bytes_per_token"]

    packed = tmp_path / "packed"
    assert "wrote" in run("convert", folder, packed)
    assert json.loads(run("verify", packed, "--json"))["checksums"] is True
    assert json.loads(run("info", packed, "--json"))["form"] == "packed"
    report = json.loads(run("bench", packed, "--prompt-tokens", "40", "--tokens", "2", "--json"))
    assert {phase["name"] for phase in report["phases"]} == {"prefill", "decode"}
    assert report["experts_per_token"] == 2
    assert "generated" in flash_moe_command("generate", packed, "Hello", "--max-tokens", "3").stderr


@pytest.mark.slow
def test_plan_and_bench_io_on_this_machine(folder: Path) -> None:
    text = run("plan", folder, "--context", "100", "--prompt", "50")
    assert "Layers of mlx-lm's network were not timed" in text
    assert "µs per layer for all other operations" in text
    assert "fits" in text
    assert json.loads(run("bench", "io", folder, "--seconds", "0.5", "--json"))["fetches"]


@pytest.mark.parametrize("name", ["gpt_oss", "kimi_linear", "deepseek_v3", "nemotron_h"])
def test_caches_that_plan_predicts(name: str, tmp_path: Path) -> None:
    """Bytes of keys, values and states are those of a pass that was run."""
    files = open_checkpoint(checkpoint(name, tmp_path / name))
    works = [files.layer_work(i, 4) for i in range(files.dimensions.num_hidden_layers)]
    with Model.load(files.folder) as model:
        cache = model._engine.new_cache()
        for count in (255, 256):  # windows are cut to their length when a token follows
            model._engine.last_logits(list(range(count)), 1, cache)
        predicted = sum(256 * work.kv_per_token + work.state for work in works)
        assert predicted == pytest.approx(sum(array.nbytes for array in cache.arrays), rel=0.01)
    assert sum(work.sparse for work in works) == len(files.records().layouts)
    assert all(work.flops > 0 for work in works)


def test_eval(folder: Path, tmp_path: Path) -> None:
    """Perplexity is that of mlx-lm's logits; a reference of the same K does not differ, and one of another does."""
    text = tmp_path / "text.txt"
    text.write_text("Experts are read when a token asks for them, and not before. " * 4)
    found = json.loads(run("eval", folder, "--text", text, "--window", "40", "--reference", folder, "--json"))
    tokens = Tokenizer.load(folder).encode(text.read_text())
    total = count = 0.0
    for sequence in read_sequences(text, Tokenizer.load(folder), window=40):
        window = list(sequence.tokens)
        logits = np.array(plain(folder)(mx.array([window]))[0], np.float64)[:-1]
        likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= likely[np.arange(len(window) - 1), window[1:]].sum()
        count += len(window) - 1
    scores = found["text"]["all"]
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert scores["divergence"]["kl"]["value"] == pytest.approx(0, abs=1e-9)

    fewer = open_scored(folder, experts_per_token=1)
    assert isinstance(fewer, NetworkModel)
    compared = token_scores(fewer, [TokenSequence(tokens[:30], [False] * 30)], open_scored(folder)).comparison
    assert compared is not None and compared.kl.mean() > 1e-4

    refused = flash_moe_command("eval", folder, "--text", text, "--token-by-token")
    assert "this is for networks of flash_moe's own" in failed(refused)


def test_commands_say_what_does_not_apply(folder: Path, tmp_path: Path) -> None:
    assert "mlx-lm's network, which has no such option" in failed(
        flash_moe_command("generate", folder, "Hello", "--prefetch"), 2
    )
    text = tmp_path / "text.txt"
    text.write_text("A text for a calibration. " * 20)
    asked = flash_moe_command(
        "convert", folder, tmp_path / "new", "--bits", "2", "--calibrate", text, "--group-size", "32"
    )
    assert "a calibration needs one of flash_moe's own" in failed(asked, 2)
    assert describe(folder, 1).experts_per_token == 1
