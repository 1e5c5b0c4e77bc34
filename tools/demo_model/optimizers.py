"""Which optimizer trains which weights, and how fast at which time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .muon import Muon

# Not orthogonalised though they are matrices: look-up tables, routing, and projections to a number per head.
NO_MUON = ("embed_tokens", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d")


def create(model: nn.Module, lr: float, adam_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the large matrices and the experts; AdamW for everything else, without decay for vectors."""
    hidden: list[Tensor] = []
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif any(part in name for part in NO_MUON):
            tables.append(parameter)
        else:
            hidden.append(parameter)
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), fused=vectors[0].is_cuda)
    optimizers = [Muon(hidden, lr, weight_decay=weight_decay), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Sets all learning rates to a share of their peaks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def rate_share(step: int, progress: float, warmup: int, decay: float) -> float:
    """Learning rate over its peak: up over ``warmup`` steps, constant, then to zero over the last ``decay`` of the run.

    Args:
        progress: share of the run's time that has passed, 0 to 1.
    """
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = min(1.0, (1 - progress) / decay) if decay else 1.0
    return max(0.0, min(up, down))
