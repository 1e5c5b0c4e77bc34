"""The gated delta rule in chunks of 64 tokens, as matrix products that a GPU likes.

Per head, S <- g S; S <- S + beta k (v - S^T k)^T; o = S^T q, with keys and queries of unit length. Within a chunk the
writes u solve a unit lower triangular system (docs/how-it-works.md, "The chunked delta rule"), whose inverse is applied to
the values and to the keys of all chunks at once. Only the state goes from chunk to chunk in a loop.

T tokens, N = T / 64 chunks, Hk key heads, H value heads, D their width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64


class ChunkTerms(NamedTuple):
    """What a chunk contributes, whatever the state before it; [N, H, 64, D] unless stated."""

    query: Tensor  # scaled and decayed: reads the state before the chunk
    key: Tensor  # decayed to the chunk's end: writes the state after it
    value: Tensor  # what the chunk writes if the state before it is zero
    correction: Tensor  # times the state before: what to subtract from ``value``
    attention: Tensor  # [N, H, 64, 64]: what each token reads of its own chunk
    decay: Tensor  # [N, H, 1, 1]: of the state over the whole chunk


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 of strictly lower triangular matrices A [..., n, n], n a power of two.

    Blocks on the diagonal are inverted in pairs, from 1 x 1 to n x n: with X the inverse of the diagonal blocks and L
    the blocks below them within each pair, the next X is X - X L X. No power of A appears, so nothing grows.
    """

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        inverse = torch.eye(size, dtype=lower.dtype, device=lower.device) - lower * _below_pairs(lower, 1)
        block = 2
        while block < size:
            inverse = inverse - inverse @ (lower * _below_pairs(lower, block)) @ inverse
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ gradient @ transposed).tril(-1)


def _below_pairs(matrix: Tensor, block: int) -> Tensor:
    """Mask [n, n] of the lower left block of each diagonal pair of blocks."""
    index = torch.arange(matrix.shape[-1], device=matrix.device) // block
    return (index[:, None] % 2 == 1) & (index[:, None] == index[None, :] + 1)


def chunk_terms(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> ChunkTerms:
    """The part of the delta rule that knows no state, for all chunks at once.

    Args:
        query, key: [T, Hk, D], of any length; T a multiple of 64.
        value: [T, H, D]; value head h uses key head h // (H / Hk).
        log_decay, beta: [T, H]; log_decay <= 0.

    Returns:
        Terms in float32 (float64 if the inputs are).
    """
    groups = value.shape[1] // key.shape[1]
    query, key, value = _chunks(_unit(query) * query.shape[-1] ** -0.5), _chunks(_unit(key)), _chunks(value)
    beta, log_decay = _chunks(beta[..., None]), _chunks(log_decay[..., None]).squeeze(-1)  # [N, H, 64, 1], [N, H, 64]
    of_keys, of_queries = (_per_value_head(x @ key.transpose(-1, -2), groups) for x in (key, query))
    query, key = _per_value_head(query, groups), _per_value_head(key, groups)

    total = log_decay.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=key.device).tril()
    between = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~later, -torch.inf))
    inverse = UnitLowerInverse.apply((of_keys * between * beta).tril(-1))
    since_start, until_end = torch.exp(total)[..., None], torch.exp(total[..., -1:] - total)[..., None]
    return ChunkTerms(
        query=query * since_start,
        key=key * until_end,
        value=inverse @ (value * beta),
        correction=inverse @ (key * beta * since_start),
        attention=of_queries * between,
        decay=since_start[:, :, -1:],
    )


def scan(terms: ChunkTerms, rows: int) -> Tensor:
    """Carries the state through the chunks of ``rows`` sequences of equal length; the outputs [T, H, D].

    The chunks of a sequence are consecutive; every sequence starts from a zero state.
    """
    outputs: list[Tensor] = []
    state = None
    for chunk in zip(*(term.unflatten(0, (rows, -1)).unbind(1) for term in terms), strict=True):
        query, key, value, correction, attention, decay = chunk
        if state is None:
            outputs.append(attention @ value)
            state = key.transpose(-1, -2) @ value
        else:
            value = value - correction @ state
            outputs.append(query @ state + attention @ value)
            state = state * decay + key.transpose(-1, -2) @ value
    return torch.stack(outputs, 1).transpose(2, 3).flatten(0, 2)  # [rows, N / rows, H, 64, D] -> [T, H, D]


def _chunks(x: Tensor) -> Tensor:
    """[T, H, D] as [N, H, 64, D] in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, CHUNK)).transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _per_value_head(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=1)
