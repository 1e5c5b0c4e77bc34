"""Model.load of families that run on mlx-lm's network."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_checkpoints import FAMILIES, OWN, checkpoint, plain
from mlx_lm.models.cache import make_prompt_cache

from flash_moe import ArgumentError, CheckpointError, ConfigError, ExpertReadError, Model
from flash_moe.errors import ConversationError
from flash_moe.experts.opening import ExpertIO
from flash_moe.models import open_model
from flash_moe.models.adapted import library
from flash_moe.shipped import shipped

PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]
KINDS = ("glm4_moe", "gpt_oss", "qwen2_moe", "kimi_linear", "nemotron_h", "deepseek_v32", "llama4")


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """See test_stream_experts."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def expected_tokens(folder: Path, prompt: list[int], count: int, **changed: Any) -> list[int]:
    """What mlx-lm itself says, greedily."""
    model = plain(folder)
    cache, tokens, new = make_prompt_cache(model), list[int](), prompt
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([new]), cache=cache)[0, -1])))
        new = tokens[-1:]
    return tokens


def generate(model: Model, prompt: list[int], count: int = 8) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt were reused."""
    model.tokenizer.eos_token_ids = frozenset()
    reply = model.generate(prompt, max_tokens=count, temperature=0.0)
    return list(reply.tokens), reply.stats.reused_tokens


@pytest.mark.parametrize("name", KINDS)
def test_conversations_continue(name: str, tmp_path: Path) -> None:
    """A longer prompt, and one that parts from the reply, reuse what they share and give mlx-lm's tokens."""
    folder = checkpoint(name, tmp_path / name)
    with Model.load(folder) as model:
        first, reused = generate(model, PROMPT)
        assert (first, reused) == (expected_tokens(folder, PROMPT, 8), 0)
        longer = PROMPT + first + [9, 8, 7]
        assert generate(model, longer) == (expected_tokens(folder, longer, 8), len(PROMPT) + 7)
        other = [*PROMPT, 1, 2, 3, 4]
        tokens, reused = generate(model, other)
        assert tokens == expected_tokens(folder, other, 8)
        assert len(PROMPT) - 1 <= reused <= len(PROMPT)


@pytest.mark.parametrize("store", ["slots", "mapped", "resident"])
def test_stores_count_and_agree(store: ExpertIO, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    with Model.load(folder, expert_io=store) as model:
        assert (model.experts_per_token, model.config.num_experts) == (4, 16)
        assert model.expert_store.stats.bytes_requested == 0
        assert generate(model, PROMPT)[0] == expected_tokens(folder, PROMPT, 8)
        reply = model.generate(PROMPT, max_tokens=4)
        assert reply.stats.expert_bytes_requested > 0
        assert "16 experts" in repr(model)


def test_logits_equal_mlx_lm(tmp_path: Path) -> None:
    folder = checkpoint("glm4_moe", tmp_path / "model")
    expected = np.array(plain(folder)(mx.array([PROMPT]))[0])
    with Model.load(folder) as model:
        np.testing.assert_array_equal(np.array(model.logits(PROMPT)), expected)
        np.testing.assert_allclose(np.array(model.logits(PROMPT, last=3)), expected[-3:], atol=1e-5)


def test_fewer_experts_per_token(tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    fewer = json.loads((folder / "config.json").read_text()) | {"num_experts_per_tok": 2}
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text(json.dumps(fewer))
    with Model.load(folder, experts_per_token=2) as model:
        assert (model.experts_per_token, model.config.num_experts_per_tok) == (2, 4)
        assert generate(model, PROMPT)[0] == expected_tokens(other, PROMPT, 8) != expected_tokens(folder, PROMPT, 8)
    with pytest.raises(ArgumentError, match=r"experts_per_token is 5.*the model's own"):
        Model.load(folder, experts_per_token=5)
    del fewer["num_experts_per_tok"]
    unknown = checkpoint("phimoe", tmp_path / "phimoe")
    with pytest.raises(ArgumentError, match="does not say by a known name"):
        Model.load(unknown, experts_per_token=1)


@pytest.mark.parametrize(
    "option", [{"prefetch": True}, {"drop_cold_below": 0.1}, {"prefer_cached": 0.5}, {"kernels": True}, {"threads": 2}]
)
def test_options_that_need_our_network_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(option))} is .*mlx-lm's network"):
        Model.load(checkpoint("qwen3_moe", tmp_path / "model"), **option)


def test_a_failed_read_makes_no_token_and_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("nemotron_h", tmp_path / "model")
    expected = expected_tokens(folder, PROMPT, 8)
    with Model.load(folder) as model:
        generate(model, PROMPT[:9], 1)
        fetch, calls = model.expert_store.fetch, []

        def fails_once(layer: int, experts: Any, meanwhile: Any = None) -> Any:
            calls.append(layer)
            if len(calls) == 2:
                raise ExpertReadError("file", layer, 0, "for a test")
            return fetch(layer, experts, meanwhile)

        monkeypatch.setattr(model.expert_store, "fetch", fails_once)
        with pytest.raises(ExpertReadError, match="for a test"):
            generate(model, PROMPT)
        tokens, reused = generate(model, PROMPT)
        assert tokens == expected
        assert reused in (8, 9)


def test_cancelled(tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    cancel = threading.Event()
    with Model.load(folder) as model:
        model.tokenizer.eos_token_ids = frozenset()
        for number, _ in enumerate(chunks := model.stream(PROMPT, max_tokens=200, cancel=cancel)):
            if number == 3:
                cancel.set()
        assert number < 10
        del chunks
        assert generate(model, PROMPT)[0] == expected_tokens(folder, PROMPT, 8)


def test_two_generations_at_a_time(tmp_path: Path) -> None:
    folder = checkpoint("qwen2_moe", tmp_path / "model")
    prompts = [PROMPT, PROMPT[::-1], PROMPT[3:]]
    with Model.load(folder) as model:
        found: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: generate(model, prompts[i])[0]})) for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: expected_tokens(folder, prompt, 8) for i, prompt in enumerate(prompts)}


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())

    def load_as(**changed: Any) -> Model:
        (folder / "config.json").write_text(json.dumps(raw | changed))
        return Model.load(folder)

    with pytest.raises(ConfigError, match=r"'nobodys_moe', which neither flash_moe .* nor the installed mlx-lm knows"):
        load_as(model_type="nobodys_moe")
    with pytest.raises(ConfigError, match="model_type is None"):
        load_as(model_type=None)
    with pytest.raises(CheckpointError, match="mlx-lm cannot load"):
        load_as(hidden_size=96)
    with pytest.raises(CheckpointError, match="custom module"):
        load_as(model_file="evil.py")
    load_as().close()
    with pytest.raises(ConfigError, match="this is for networks of flash_moe's own"):
        open_model(folder)
    monkeypatch.setattr(library, "version", lambda _: "0.31.3")
    with pytest.raises(ConfigError, match="too old"):
        load_as()
    monkeypatch.undo()
    monkeypatch.setattr(library.importlib, "import_module", _missing)
    with pytest.raises(ConfigError, match=r"needs mlx-lm.*pip install"):
        load_as()


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}")


def test_a_conversation_goes_on_but_is_not_saved(tmp_path: Path) -> None:
    folder = checkpoint("gpt_oss", tmp_path / "model", vocab_size=4096)
    shutil.copy(shipped("models/demo") / "chat_template.jinja", folder)
    with Model.load(folder) as model:
        chat = model.chat(max_tokens=8)
        chat.send("Hello")
        assert chat.send("And again").stats.reused_tokens > 0
        with pytest.raises(ConversationError, match="cannot be saved"):
            chat.save(tmp_path / "talk.flashmoe")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OWN])
def test_every_family_loads(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / name)
    plain_model = plain(folder)
    expected = np.array(plain_model(mx.array([PROMPT]), cache=make_prompt_cache(plain_model))[0])
    with Model.load(folder) as model:
        assert model.expert_store.stats.bytes_requested == 0
        np.testing.assert_array_equal(np.array(model.logits(PROMPT)), expected)
        assert model.generate(PROMPT, max_tokens=2).stats.expert_bytes_requested > 0
