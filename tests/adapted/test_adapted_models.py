"""Model.load of families that run on mlx-lm's network."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from family_checkpoints import FAMILIES, OWN, USUAL, checkpoint, plain, utils
from family_table import HEAD, PAGE, row
from mlx_lm.models.cache import make_prompt_cache

from flash_moe import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ExpertReadError,
    MemoryLimitError,
    Model,
    Progress,
    loading,
)  # fmt: skip
from flash_moe.errors import ConversationError
from flash_moe.experts.opening import ExpertIO
from flash_moe.models import open_checkpoint, open_model
from flash_moe.models.adapted import library
from flash_moe.shipped import shipped

PROMPT = [17, 250, 3, 99, 140, 8, 8, 61, 230, 77, 5, 44, 91, 12, 0, 201]
ROWS = ("mixtral", "nemotron_h")
KINDS = ("glm4_moe", "gpt_oss", "qwen2_moe", "kimi_linear", "nemotron_h", "deepseek_v32", "llama4")


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
    with pytest.raises(ConfigError, match="'switch_layers', which neither"):  # a file of mlx-lm's, but no family
        load_as(model_type="switch_layers")
    with pytest.raises(ConfigError, match="model_type is None"):
        load_as(model_type=None)
    with pytest.raises(CheckpointError, match="mlx-lm cannot load"):
        load_as(hidden_size=96)
    with pytest.raises(CheckpointError, match="quantised by 'fp8'; run `flash-moe convert` first"):
        load_as(hidden_size=96, quantization_config={"quant_method": "fp8"})
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


def test_experts_that_are_in_no_switch_modules(tmp_path: Path) -> None:
    """mlx-lm knows dbrx, whose experts are modules of their own, and llama, which has none."""
    small = {"vocab_size": 256, "num_hidden_layers": 1, "hidden_size": 32}
    dbrx = {
        "model_type": "dbrx", "vocab_size": 256, "d_model": 32, "n_layers": 1, "n_heads": 2, "attn_config":
        {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2,
        "moe_top_k": 1},
    }  # fmt: skip
    llama = {"model_type": "llama", "intermediate_size": 32, "num_attention_heads": 2, "rms_norm_eps": 1e-5, **small}
    for config in (dbrx, llama):
        folder = tmp_path / config["model_type"]
        folder.mkdir()
        model_class, args_class = utils._get_classes(config)
        utils.save_model(folder, model_class(args_class.from_dict(dict(config))))
        (folder / "config.json").write_text(json.dumps(config))
        for file in shipped("models/demo").glob("*token*"):
            shutil.copy(file, folder)
        for use in (Model.load, open_checkpoint):
            with pytest.raises(ConfigError, match=rf"{config['model_type']} has no expert modules of mlx-lm's kinds"):
                use(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for number, file in enumerate(files):
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in sorted(weights)[number::3]})
    (folder / "model.safetensors").unlink()
    index = {name: files[number % 3] for number, name in enumerate(sorted(weights))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    Model.load(folder).close()
    (folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"disagree about {files[1]}; finish the download"):
        Model.load(folder)


def test_memory_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("qwen3_moe", tmp_path / "model")
    monkeypatch.setattr(loading, "group_limit", lambda: 1_000_000)
    with pytest.raises(MemoryLimitError, match="of resident weights"):
        Model.load(folder)


def test_progress_of_a_prompt_by_layer(tmp_path: Path) -> None:
    folder = checkpoint("nemotron_h", tmp_path / "model")
    seen: list[Progress] = []
    with Model.load(folder) as model:
        model.generate(PROMPT, max_tokens=1, progress=seen.append)
        modules = len(model.expert_store.layouts)
    done = [p.done for p in seen if p.stage == "prompt"]
    assert done == sorted(done) and done[0] >= 0 and done[-1] <= len(PROMPT)
    assert len(done) >= modules


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


def test_the_table_of_the_docs_has_every_family() -> None:
    lines = PAGE.read_text(encoding="utf-8").split(HEAD)[1].splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in FAMILIES if name not in OWN]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ROWS else pytest.mark.slow) for name in FAMILIES if name not in OWN],
)
def test_the_table_of_the_docs_is_true(name: str, tmp_path: Path) -> None:
    """Runs a family, and compares with its line; written anew with ``python tests/adapted/family_table.py NAME``."""
    found = row(name, tmp_path)
    assert found in PAGE.read_text(encoding="utf-8")
    assert f"| {name} | {USUAL.get(name, 'affine')} | yes | 0 | equal |" in found
    assert "differ by 0 |" in found.removeprefix("| not tried")
