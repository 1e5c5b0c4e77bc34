"""What a training run reports: held-out scores, and how evenly the experts are used."""

from __future__ import annotations

import torch
from torch import Tensor

from .batches import ASSISTANT, CONTEXT, PADDING, Batch
from .network import Network


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets and kinds of a batch on the device, without waiting for it."""
    tensors = (torch.from_numpy(array) for array in batch)
    if device.type == "cuda":
        tensors = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    ids, targets, kinds = tensors
    return ids, targets, kinds


def evaluate(
    network: Network, batches: list[Batch], device: torch.device, top_k: int | None = None
) -> dict[str, float]:
    """Mean loss in nats of the assistant's tokens and of the others, and the share of the assistant's foreseen."""
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        ids, targets, kinds = to_device(batch, device)
        # With gradients, though none is taken: compiled code for inference would have to be made first.
        scores = network.scores(ids, targets, kinds != PADDING, top_k)
        assistant, context = kinds.flatten() == ASSISTANT, kinds.flatten() == CONTEXT
        loss = scores.loss.detach()
        values = (loss * assistant, scores.correct & assistant, assistant, loss * context, context)
        sums += torch.stack([value.sum(dtype=torch.float64) for value in values])
        del scores  # and the activations that it keeps
    assistant_loss, correct, assistant_tokens, context_loss, context_tokens = sums.tolist()
    return {
        "loss": assistant_loss / max(assistant_tokens, 1),
        "accuracy": correct / max(assistant_tokens, 1),
        "context_loss": context_loss / max(context_tokens, 1),
    }


def load_summary(shares: Tensor) -> str:
    """Per layer, the busiest expert's share over the mean, and the entropy over that of even use; from shares [layers, E]."""
    experts = shares.shape[-1]
    peak = shares.max(-1).values * experts
    entropy = -(shares * shares.clamp_min(1e-9).log()).sum(-1) / torch.tensor(float(experts)).log().item()
    return " ".join(f"{p:.1f}/{e:.2f}" for p, e in zip(peak.tolist(), entropy.tolist(), strict=True))
