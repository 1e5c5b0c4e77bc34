"""The chunked gated delta rule of the demo model's training: the recurrence's values and gradients."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: training the demo model is for developers")
pytest.importorskip("transformers", reason="transformers is not installed: training the demo model is for developers")

from demo_model import delta_rule  # noqa: E402
from torch import Tensor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
