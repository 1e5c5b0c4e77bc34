"""Mixture of Experts with all experts computed: few and narrow ones are cheapest as two large matrix products.

Experts that the router did not choose have weight zero. Against computing the chosen ones alone this takes E / K times
the operations and none of the sorting, gathering and scattering.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import linear, rms_norm


def route(logits: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routing weights of the ``top_k`` (an integer tensor []) most probable experts, renormalised to sum to one.

    Args:
        logits: [T, E]

    Returns:
        weights [T, E], zero where not chosen; probabilities [T, E]; chosen [T, E], bool.
    """
    probabilities = logits.softmax(-1)
    rank = (probabilities[:, None, :] > probabilities[:, :, None]).sum(-1)
    chosen = rank < top_k
    kept = torch.where(chosen, probabilities, 0)
    return kept / kept.sum(-1, keepdim=True), probabilities, chosen


def balance(probabilities: Tensor, chosen: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The Switch Transformer's load-balance loss [] and the share [E] of assignments of each expert.

    The loss is E times the sum over experts of share times mean probability: 1 when balanced, E when one expert gets
    everything. Tokens that are not ``valid`` [T] do not count.
    """
    valid = valid[:, None].to(probabilities.dtype)
    assigned = (chosen * valid).sum(0)
    share = assigned / assigned.sum()
    mean = (probabilities * valid).sum(0) / valid.sum()
    return probabilities.shape[-1] * (share * mean).sum(), share


def sparse_moe(
    x: Tensor,
    valid: Tensor,
    top_k: Tensor,
    norm: Tensor,
    router: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    shared_switch: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream [T, H] after the experts, the load-balance loss [] and the experts' shares [E].

    Args:
        gate_up, down: [E, 2 I, H], gate rows first, and [E, H, I].
        shared_gate, shared_up, shared_down: [S, H], [S, H], [H, S]: the shared expert, a further one with its own switch.
        shared_switch: [1, H]
    """
    normed = rms_norm(x, norm, eps)
    weights, probabilities, chosen = route(F.linear(normed, router), top_k)
    switch = F.linear(normed, shared_switch).sigmoid()
    width = down.shape[-1]
    gates = torch.cat((gate_up[:, :width].flatten(0, 1), shared_gate))  # [E I + S, H]
    ups = torch.cat((gate_up[:, width:].flatten(0, 1), shared_up))
    downs = torch.cat((down.transpose(0, 1).flatten(1), shared_down), dim=1)  # [H, E I + S]
    gate, up = linear(normed.to(dtype), torch.cat((gates, ups))).chunk(2, dim=-1)
    scale = torch.cat((weights.repeat_interleave(width, 1), switch.expand(-1, shared_gate.shape[0])), dim=1)
    x = x + linear((F.silu(gate) * up * scale).to(dtype), downs)
    return x, *balance(probabilities, chosen, valid)
