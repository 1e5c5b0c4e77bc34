"""The network that trains the demo model is that of transformers, in training and in sampling."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import metrics, sample  # noqa: E402
from demo_model.network import Network  # noqa: E402
from demo_runs import random_ids  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
