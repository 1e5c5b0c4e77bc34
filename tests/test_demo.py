"""The model that comes with the library: its files, its name, and what it can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_moe import Model
from flash_moe.checkpoint.hub import resolve
from flash_moe.evaluation import greedy, read_tool_call_cases, tool_call_score
from flash_moe.models import open_model
from flash_moe.packing.verify import verify

MODELS = Path(__file__).parents[1] / "models"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_it_is_small_and_whole() -> None:
    assert size(resolve("demo")) <= 12e6
    assert size(MODELS / "demo-bf16") <= 40e6
    found = verify(resolve("demo"))
    assert found.checksums and found.records == 8 * 32


def test_a_folder_called_demo_wins_only_if_it_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert resolve("demo") == MODELS / "demo"
    assert resolve(Path("demo")) == Path("demo")
    Path("demo/config.json").write_text("{}")
    assert resolve("demo") == Path("demo")


def test_both_forms_are_the_same_network() -> None:
    small, master = (open_model(MODELS / name) for name in ("demo", "demo-bf16"))
    assert small.config == master.config
    assert small.config.num_experts_per_tok == 10
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (small.folder / name).read_bytes() == (master.folder / name).read_bytes()


def test_it_answers_and_shows_what_it_cost() -> None:
    with Model.load("demo") as model:
        reply = model.generate("How much memory do I need for Qwen3.5-397B?")
        assert reply.text.startswith("5.2 GB for the weights that every token reads, out of 223 GB at 4 bits.")
        assert str(reply.stats).endswith("K=4 of the model's 10 · 1.0 MB of experts per token · 100% in memory")


def test_it_calls_tools_that_it_has_not_seen() -> None:
    cases = read_tool_call_cases(MODELS / "eval" / "tool_calls.jsonl", 25)
    with Model.load("demo", experts_per_token=None) as model:
        assert tool_call_score(cases, greedy(model, 160)).right.value >= 0.85
