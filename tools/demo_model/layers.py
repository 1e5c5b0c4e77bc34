"""The parts of a layer as pure functions of flat tokens [T, H], so that each is compiled once for all shapes of a batch.

They compute what transformers' modules compute, from the same weights. The residual stream x is float32; products
take the dtype of ``dtype``. Which row a token belongs to shows only in ``positions``: a batch of 96 sequences of 1,024
tokens and one of 768 of 128 run through the same compiled code.

T tokens, H hidden size, E experts, I and S widths of routed and shared experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta_rule import ChunkTerms, chunk_terms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMS norm over the last dimension, in float32 at least: the family's convention."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., n] times the rows of weight [m, n], in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


def causal_conv(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Depthwise causal convolution and SiLU: x [T, C], weight [C, 1, width]; nothing crosses the start of a row."""
    width = weight.shape[-1]
    taps = weight[:, 0].to(x.dtype)
    total = x * taps[:, -1]
    for back in range(1, width):
        earlier = F.pad(x, (0, 0, back, 0))[: x.shape[0]]
        total = total + torch.where((positions >= back)[:, None], earlier, 0) * taps[:, -1 - back]
    return F.silu(total)


def delta_net_inputs(
    x: Tensor,
    positions: Tensor,
    norm: Tensor,
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    key_heads: int,
    key_dim: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[ChunkTerms, Tensor]:
    """A Gated DeltaNet up to the recurrence: its terms, and the output gate [T, heads x width]."""
    heads = dt_bias.shape[0]
    weights = (qkv, z, a, b)
    projected = linear(rms_norm(x, norm, eps).to(dtype), torch.cat(weights))
    mixed, gate, a_, b_ = projected.split([weight.shape[0] for weight in weights], dim=-1)
    keys = key_heads * key_dim
    mixed = causal_conv(mixed, conv, positions)
    query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], dim=-1)
    work = torch.promote_types(dtype, torch.float32)
    log_decay = -a_log.exp() * F.softplus(a_.to(work) + dt_bias)
    terms = chunk_terms(
        query.unflatten(-1, (key_heads, key_dim)),
        key.unflatten(-1, (key_heads, key_dim)),
        value.unflatten(-1, (heads, -1)),
        log_decay,
        b_.to(work).sigmoid(),
    )
    return terms, gate


def delta_net_outputs(
    x: Tensor, read: Tensor, gate: Tensor, norm: Tensor, out: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The residual stream after a Gated DeltaNet that read ``read`` [T, heads, width] from its states."""
    normed = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + eps) * norm
    gated = normed * F.silu(gate.unflatten(-1, read.shape[1:]).to(read.dtype))
    return x + linear(gated.flatten(1).to(dtype), out)


def attention_inputs(
    x: Tensor,
    positions: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rotary_dims: int,
    theta: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gated attention up to the products of queries and keys: query, key, value [T, heads, D] and the gate [T, heads, D]."""
    width = q_norm.shape[0]
    projected = linear(rms_norm(x, norm, eps).to(dtype), torch.cat((q, k, v)))
    query_gate, key, value = projected.split([q.shape[0], k.shape[0], v.shape[0]], dim=-1)
    query, gate = query_gate.unflatten(-1, (-1, 2 * width)).chunk(2, dim=-1)
    key, value = key.unflatten(-1, (-1, width)), value.unflatten(-1, (-1, width))
    query = rope(rms_norm(query, q_norm, eps), positions, rotary_dims, theta).to(dtype)
    key = rope(rms_norm(key, k_norm, eps), positions, rotary_dims, theta).to(dtype)
    groups = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), gate


def rope(x: Tensor, positions: Tensor, dims: int, theta: float) -> Tensor:
    """Rotates the first ``dims`` dimensions of x [T, heads, D]: dimension i with dimension i + dims / 2."""
    frequency = theta ** (torch.arange(0, dims, 2, dtype=x.dtype, device=x.device) / -dims)
    angle = positions[:, None, None].to(x.dtype) * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right, rest = x.split([dims // 2, dims // 2, x.shape[-1] - dims], dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


def attention_outputs(x: Tensor, read: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """The residual stream after attention that read ``read`` [T, heads, D]."""
    return x + linear((read * gate.sigmoid()).flatten(1), out)
