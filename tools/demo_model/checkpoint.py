"""The state of a training run as one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .batches import Position


@dataclass
class Progress:
    """How far a run is; with the seed it determines every random choice to come."""

    step: int = 0
    elapsed: float = 0.0  # seconds
    tokens: int = 0  # trained on, without padding
    position: Position = field(default_factory=Position)


def save(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Writes everything that a run needs to continue; ``path`` is at any time the old file or the new one."""
    state = {
        "model": model.state_dict(),
        "config": model.config.to_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress) | {"position": tuple(progress.position)},
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def restore(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Puts the saved weights and optimizer states in place.

    Raises:
        ValueError: the checkpoint is of another architecture.
    """
    state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    assign(path, model, state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    progress = state["progress"]
    return Progress(**progress | {"position": Position(*progress["position"])})


def assign(path: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives ``model`` the weights ``state``, which come from ``path``.

    Raises:
        ValueError: they are of another architecture.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shapes != expected:
        other = next(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{path}: {other} is {shapes.get(other)}, expected {expected.get(other)}; it is of another architecture: "
            "train to another folder, from other weights"
        )
    model.load_state_dict(state)
