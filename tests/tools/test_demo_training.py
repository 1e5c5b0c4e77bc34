"""The demo model's training: for developers, since CI installs no torch."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import batches, delta_rule, export, metrics, model, muon, optimizers, sample, tool_calls, train  # noqa: E402
from demo_model.network import Network  # noqa: E402
from demo_runs import TOKENS, options, tiny, write_shard  # noqa: E402
from random_checkpoint import write_tokenizer  # noqa: E402
from torch import Tensor  # noqa: E402

from flash_moe import Model  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def perturbed() -> Any:
    """A tiny model without zeros or ones among its weights."""
    made = model.create(tiny(), seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return made


def random_ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, 288, (rows, length), generator=torch.Generator().manual_seed(3))


# The parts


def delta_rule_operands(rows: int, length: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    key = normal(rows, length, 2, 16)
    key[:, 70:90] = key[:, 70:71]  # a repeated token: the system's powers would grow without bound
    return {
        "query": normal(rows, length, 2, 16),
        "key": key,
        "value": normal(rows, length, 4, 8),
        "g": -torch.rand(rows, length, 4, generator=make, dtype=torch.float64),
        "beta": torch.rand(rows, length, 4, generator=make, dtype=torch.float64),
    }


def token_by_token(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The recurrence as it is written in the definition, [rows, length, heads, width]."""
    groups = value.shape[2] // key.shape[2]
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query, key = (x.repeat_interleave(groups, 2) for x in (query * query.shape[-1] ** -0.5, key))
    state = torch.zeros(*key.shape[::2], key.shape[-1], value.shape[-1], dtype=key.dtype)
    outputs = []
    for t in range(key.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        error = value[:, t] - (state * key[:, t, :, :, None]).sum(-2)
        state = state + key[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append((state * query[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1)


def chunked(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    rows = query.shape[0]
    terms = delta_rule.chunk_terms(*(x.flatten(0, 1) for x in (query, key, value, g, beta)))
    return delta_rule.scan(terms, rows).unflatten(0, (rows, -1))


def with_gradients(function: Any, operands: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in operands.items()}
    output = function(**leaves)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves.values())]


def test_delta_rule_and_its_gradients_equal_the_recurrence() -> None:
    operands = delta_rule_operands(rows=2, length=192)
    for ours, theirs in zip(with_gradients(chunked, operands), with_gradients(token_by_token, operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_delta_rule_equals_transformers_recurrent_form() -> None:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_recurrent_gated_delta_rule

    operands = {name: x.float() for name, x in delta_rule_operands(rows=1, length=128).items()}
    repeated = {name: operands[name].repeat_interleave(2, 2) for name in ("query", "key")}
    theirs, _ = torch_recurrent_gated_delta_rule(**operands | repeated, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(chunked(**operands), theirs, rtol=1e-4, atol=1e-5)


def test_inverse_of_repeated_keys_is_exact_in_float32() -> None:
    lower = torch.full((64, 64), 0.99).tril(-1)
    inverse = delta_rule.UnitLowerInverse.apply(lower)
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + lower.double())
    torch.testing.assert_close(inverse.double(), exact, rtol=1e-4, atol=1e-5)


def test_logits_and_gradients_equal_transformers(perturbed: Any) -> None:
    ids = random_ids(3, 128)
    ours = Network(perturbed, torch.float32).logits(ids).unflatten(0, ids.shape)
    theirs = perturbed(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours).cos()
    names, parameters = zip(*perturbed.named_parameters(), strict=True)
    for name, one, other in zip(
        names,
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((theirs * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_experts_equal_transformers_at_every_k(perturbed: Any, k: int) -> None:
    from demo_model.experts import sparse_moe

    block = perturbed.model.layers[0].mlp
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    ours, balance, shares = sparse_moe(
        x,
        torch.ones(50, dtype=torch.bool),
        torch.tensor(k),
        torch.zeros(64),
        block.gate.weight,
        block.experts.gate_up_proj,
        block.experts.down_proj,
        block.shared_expert.gate_proj.weight,
        block.shared_expert.up_proj.weight,
        block.shared_expert.down_proj.weight,
        block.shared_expert_gate.weight,
        1e-6,
        torch.float32,
    )
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    own, block.gate.top_k = block.gate.top_k, k
    theirs = block(normed[None])[0]
    block.gate.top_k = own
    torch.testing.assert_close(ours - x, theirs, rtol=1e-4, atol=1e-5)
    assert 0.9 < float(balance.detach()) < 12
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))


def test_padding_changes_nothing_before_it(perturbed: Any) -> None:
    ids = random_ids(2, 128)
    network = Network(perturbed, torch.float32)
    padded = torch.nn.functional.pad(ids[:, :100], (0, 92))
    one, other = (network.logits(x).unflatten(0, x.shape)[:, :100] for x in (ids, padded))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_balance_loss_ignores_padding_and_is_one_when_even() -> None:
    from demo_model.experts import balance

    probabilities = torch.full((6, 4), 0.25)
    chosen = torch.eye(4, dtype=torch.bool)[[0, 1, 2, 3, 0, 0]]
    loss, shares = balance(probabilities, chosen, torch.tensor([True] * 4 + [False] * 2))
    assert float(loss) == pytest.approx(1)
    assert shares.tolist() == pytest.approx([0.25] * 4)
    assert metrics.load_summary(shares[None]) == "1.0/1.00"


@pytest.mark.parametrize("shape", [(3, 8, 24), (24, 8), (16, 16)])
def test_muon_makes_updates_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(matrices))
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.3


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    def share(step: int, progress: float) -> float:
        return optimizers.rate_share(step, progress, warmup=10, decay=0.4)

    assert share(0, 0.0) == pytest.approx(0.1)
    assert share(9, 0.1) == share(500, 0.6) == 1
    assert share(500, 0.8) == pytest.approx(0.5)
    assert share(900, 1.0) == 0


# The data


def test_batches_hold_every_conversation_once_with_shifted_targets(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, conversations=200, longest=1024)
    conversations = batches.Conversations.load([shard])
    chosen = batches.plan(conversations, TOKENS, np.random.default_rng(0))
    assert sorted(np.concatenate(chosen)) == list(range(200))
    for rows in chosen:
        batch = batches.assemble(conversations, rows, TOKENS)
        assert batch.ids.size == TOKENS
        for i, ids, targets, kinds in zip(rows, *batch, strict=False):
            start, end = conversations.offsets[i : i + 2]
            n = end - start
            assert np.array_equal(ids[:n], conversations.ids[start:end])
            assert np.array_equal(targets[: n - 1], ids[1:n])
            assert np.array_equal(kinds[: n - 1], 1 + conversations.mask[start + 1 : end])
            assert not kinds[n - 1 :].any()


def test_stream_continues_anywhere_and_visits_all_shards(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path, number)
    stream = batches.ShardStream(tmp_path, TOKENS, seed=5, pool=2)
    walk = stream.batches(batches.Position())
    seen = [next(walk) for _ in range(12)]
    for cut in (2, 5):
        again = stream.batches(seen[cut][1])
        for batch, position in seen[cut + 1 :]:
            repeated, same = next(again)
            assert same == position
            assert all(np.array_equal(a, b) for a, b in zip(batch, repeated, strict=True))
    assert {path.name for path in stream._paths(0, None) + stream._paths(1, None)} == {
        f"shard-0000{i}.npz" for i in range(3)
    }


def test_late_and_half_written_shards_are_replaced_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_shard(tmp_path, 0)
    (tmp_path / "shard-00001.npz").write_bytes((tmp_path / "shard-00000.npz").read_bytes()[:500])
    stream = batches.ShardStream(tmp_path, TOKENS, seed=0, shards=3, pool=2, patience=0.3)
    next(stream.batches(batches.Position()))
    said = caplog.text
    assert "waiting for" in said and "shard-00001.npz did not come" in said and "shard-00000.npz instead" in said


def test_wrong_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no shard"):
        batches.ShardStream(tmp_path, TOKENS, seed=0)
    long = batches.Conversations.load([write_shard(tmp_path, 0, longest=3000)])
    with pytest.raises(ValueError, match="at most 1024"):
        batches.plan(long, TOKENS, np.random.default_rng(0))
    with pytest.raises(ValueError, match="multiple of 1024"):
        batches.plan(long, 1000, np.random.default_rng(0))


# Runs


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    for number in range(2):
        write_shard(tmp_path / "data", number)
    architecture = tiny()
    monkeypatch.setattr(train.model, "config", lambda: architecture)
    return tmp_path


def test_a_run_learns_and_an_interrupted_one_ends_the_same(data: Path) -> None:
    whole = train.Trainer(options(data, "--out", str(data / "whole"), "--steps", "10", "--fewer-experts", "0.5"))
    before = metrics.evaluate(whole.network, whole.held_out, whole.device)["loss"]
    whole.run()
    after = metrics.evaluate(whole.network, whole.held_out, whole.device)["loss"]
    assert after < before - 0.3

    words = ["--out", str(data / "parts"), "--steps", "10", "--fewer-experts", "0.5"]
    first = train.Trainer(options(data, *words))
    step = first.step

    def interrupted(batch: batches.Batch) -> Any:
        if first.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(batch)

    first.step = interrupted  # type: ignore[method-assign]
    first.run()
    assert first.progress.step == 4
    second = train.Trainer(options(data, *words))
    assert second.progress.step == 4
    second.run()
    for (name, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    lines = [json.loads(line) for line in (data / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "norm" in line] == list(range(1, 11))
    assert any("held_out" in line for line in lines)


def test_a_run_ends_on_time_and_another_architecture_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--out", str(data / "run"), "--minutes", "0.02"]
    trainer = train.Trainer(options(data, *words))
    trainer.run()
    assert 1.2 <= trainer.progress.elapsed < 6
    larger = type(trainer.model.config).from_dict(trainer.model.config.to_dict() | {"num_experts": 16})
    monkeypatch.setattr(train.model, "config", lambda: larger)
    with pytest.raises(ValueError, match=r"expected \(16, 64\)"):
        train.Trainer(options(data, *words))


def test_what_does_not_compile_runs_without(
    data: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = train.Trainer(options(data, "--out", str(data / "run"), "--steps", "1"))

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    trainer.network.compiled, trainer.network._sparse_moe = True, broken
    trainer.compile()
    assert not trainer.network.compiled
    assert "NOT COMPILED" in caplog.text and "no compiler" in capsys.readouterr().err
    trainer.run()
    assert trainer.progress.step == 1


# What comes out


@pytest.fixture
def exported(perturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import copy

    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(export, "SHARD", "200KB")
    export.export(copy.deepcopy(perturbed), tmp_path / "model", tmp_path / "tokenizer")
    return tmp_path / "model"


def test_export_has_equal_logits_in_transformers_and_here(exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 1
    config = json.loads((exported / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["dtype"]) == (258, 256, "bfloat16")
    ids = random_ids(1, 64)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(ids).logits[0].detach().numpy()
    with Model.load(exported, experts_per_token=None) as loaded:
        ours = np.array(loaded.logits(ids[0].tolist()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_export_refuses_a_folder_with_files(perturbed: Any, exported: Path) -> None:
    with pytest.raises(FileExistsError, match="expected a new folder"):
        export.export(perturbed, exported, exported)


def test_greedy_sampling_equals_one_prompt_at_a_time(perturbed: Any) -> None:
    network = Network(perturbed, torch.float32)
    prompts = [[(7 * i) % 288 for i in range(n)] for n in (5, 70, 63)]
    together = sample.greedy(network, prompts, stop=-1, new=4, top_k=None, device="cpu")
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(4):
            ids.append(int(perturbed(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    several = next(i for i, answer in enumerate(together) if answer[1] != answer[0])
    (cut,) = sample.greedy(network, prompts[several : several + 1], together[several][1], 4, None, "cpu")
    assert cut == together[several][:1]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lights.set",
            "parameters": {"type": "object", "properties": {"room": {"type": "string"}, "level": {"type": "integer"}}},
        },
    }
]
CALL = (
    "<tool_call>\n<function=lights.set>\n<parameter=room>\n{}\n</parameter>\n"
    "<parameter=level>\n{}\n</parameter>\n</function>\n</tool_call>"
)


def test_tool_calls_are_compared_by_value_and_type() -> None:
    expected = [{"name": "lights.set", "arguments": {"level": 3, "room": "12"}}]
    assert tool_calls.right(f"Sure.\n{CALL.format('12', '3')}", TOOLS, expected)
    assert not tool_calls.right(CALL.format("12", "3.0"), TOOLS, expected)
    assert not tool_calls.right(CALL.format("12", "three"), TOOLS, expected)
    assert not tool_calls.right(CALL.format("12", "3").replace("</function>\n", ""), TOOLS, expected)
    assert not tool_calls.right("The lights are on.", TOOLS, expected)
    assert tool_calls.right("The lights are on.", TOOLS, [])
