"""The whole model for training: the weights of transformers' `Qwen3_5MoeForCausalLM`, run by our own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM

from .delta_rule import scan
from .experts import sparse_moe
from .layers import (
    attention_inputs,
    attention_outputs,
    delta_net_inputs,
    delta_net_outputs,
    linear,
    rms_norm,
)


class Scores(NamedTuple):
    """Of each of T tokens, how well the next was foreseen, and how the experts were used."""

    loss: Tensor  # [T] float32, negative log-likelihood in nats
    correct: Tensor  # [T] bool: the most probable token was the next
    balance: Tensor  # [] float32, mean load-balance loss of the layers
    shares: Tensor  # [layers, E] float32, shares of assignments


class Network:
    """Runs batches of right-padded sequences through a model.

    Args:
        model: with float32 weights, of which gradients are taken.
        dtype: of the matrix products; norms, routing and the delta rule take float32 at least.
        compiled: let torch.compile fuse the parts. Shapes are constant while ``rows x length`` is.
    """

    def __init__(self, model: Qwen3_5MoeForCausalLM, dtype: torch.dtype, compiled: bool = False) -> None:
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._constants: dict[int, Tensor] = {}  # on the device: an upload would make the host wait
        self.compile(compiled)

    def compile(self, compiled: bool) -> None:
        """Chooses compiled or plain functions for all later calls."""

        def prepare(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

        self.compiled = compiled
        self._delta_net_inputs = prepare(delta_net_inputs)
        self._delta_net_outputs = prepare(delta_net_outputs)
        self._attention_inputs = prepare(attention_inputs)
        self._attention_outputs = prepare(attention_outputs)
        self._sparse_moe = prepare(sparse_moe)
        self._score = prepare(_score)

    def scores(self, ids: Tensor, targets: Tensor, valid: Tensor, top_k: int | None = None) -> Scores:
        """Scores of ``targets`` after ``ids``; both int64 [rows, length], length a multiple of 64.

        Args:
            valid: bool [rows, length], false on padding, which the load-balance loss leaves out.
            top_k: experts per token; None means the model's own.
        """
        x, balance, shares = self._hidden(ids, valid, top_k)
        loss, correct = self._score(x, self._final_norm, self._head, targets.flatten(), self._eps, self.dtype)
        return Scores(loss, correct, balance, shares)

    def logits(self, ids: Tensor, top_k: int | None = None, at: Tensor | None = None) -> Tensor:
        """Logits [rows x length, V] of the tokens after ``ids``; with ``at`` (int64 [rows]) only of one place a row [rows, V]."""
        x, _, _ = self._hidden(ids, torch.ones_like(ids, dtype=torch.bool), top_k)
        if at is not None:
            x = x.unflatten(0, ids.shape)[torch.arange(ids.shape[0], device=ids.device), at]
        return linear(rms_norm(x, self._final_norm, self._eps).to(self.dtype), self._head)

    @property
    def _eps(self) -> float:
        return self.config.rms_norm_eps

    @property
    def _final_norm(self) -> Tensor:
        return self.model.model.norm.weight

    @property
    def _head(self) -> Tensor:
        return self.model.lm_head.weight

    def _hidden(self, ids: Tensor, valid: Tensor, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, length = ids.shape
        positions = self._positions.get((rows, length))
        if positions is None:
            positions = self._positions[rows, length] = torch.arange(length, device=ids.device).repeat(rows)
        k = self._constant(top_k or self.config.num_experts_per_tok, ids.device)
        x = F.embedding(ids.flatten(), self.model.model.embed_tokens.weight)
        balances, shares = [], []
        for layer in self.model.model.layers:
            mix = self._delta_net if hasattr(layer, "linear_attn") else self._attention
            x, balance, share = self._experts(layer, mix(layer, x, positions, rows), valid.flatten(), k)
            balances.append(balance)
            shares.append(share)
        return x, torch.stack(balances).mean(), torch.stack(shares).detach()

    def _constant(self, value: int, device: torch.device) -> Tensor:
        if value not in self._constants:
            self._constants[value] = torch.tensor(value, device=device)
        return self._constants[value]

    def _delta_net(self, layer: Any, x: Tensor, positions: Tensor, rows: int) -> Tensor:
        mixer = layer.linear_attn
        terms, gate = self._delta_net_inputs(
            x,
            positions,
            layer.input_layernorm.weight,
            mixer.in_proj_qkv.weight,
            mixer.in_proj_z.weight,
            mixer.in_proj_a.weight,
            mixer.in_proj_b.weight,
            mixer.conv1d.weight,
            mixer.A_log,
            mixer.dt_bias,
            self.config.linear_num_key_heads,
            self.config.linear_key_head_dim,
            self._eps,
            self.dtype,
        )
        read = scan(terms, rows)
        return self._delta_net_outputs(x, read, gate, mixer.norm.weight, mixer.out_proj.weight, self._eps, self.dtype)

    def _attention(self, layer: Any, x: Tensor, positions: Tensor, rows: int) -> Tensor:
        mixer = layer.self_attn
        rope = self.config.rope_parameters
        *operands, gate = self._attention_inputs(
            x,
            positions,
            layer.input_layernorm.weight,
            mixer.q_proj.weight,
            mixer.k_proj.weight,
            mixer.v_proj.weight,
            mixer.q_norm.weight,
            mixer.k_norm.weight,
            int(self.config.head_dim * rope["partial_rotary_factor"]),
            rope["rope_theta"],
            self._eps,
            self.dtype,
        )
        query, key, value = (operand.unflatten(0, (rows, -1)).transpose(1, 2) for operand in operands)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        read = read.transpose(1, 2).contiguous().flatten(0, 1)  # other strides would be compiled anew
        return self._attention_outputs(x, read, gate, mixer.o_proj.weight)

    def _experts(self, layer: Any, x: Tensor, valid: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mlp = layer.mlp
        return self._sparse_moe(
            x,
            valid,
            top_k,
            layer.post_attention_layernorm.weight,
            mlp.gate.weight,
            mlp.experts.gate_up_proj,
            mlp.experts.down_proj,
            mlp.shared_expert.gate_proj.weight,
            mlp.shared_expert.up_proj.weight,
            mlp.shared_expert.down_proj.weight,
            mlp.shared_expert_gate.weight,
            self._eps,
            self.dtype,
        )


def _score(
    x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [T] of ``targets`` [T] and whether they were most probable [T], bool."""
    logits = linear(rms_norm(x, norm, eps).to(dtype), head)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
