"""Runs of the demo model's training that are small enough for tests."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_model import model, train
from torch import Tensor

TOKENS = 3072


def tiny(**changes: Any) -> Any:
    sizes = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2} | {
        "num_key_value_heads": 1,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "num_experts": 12,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    }
    return model.config(**sizes | changes)


def random_ids(rows: int, length: int) -> Tensor:
    """Token ids of :func:`tiny`'s vocabulary, int64 [rows, length], always the same."""
    return torch.randint(0, 288, (rows, length), generator=torch.Generator().manual_seed(3))


def write_shard(folder: Path, number: int, conversations: int = 40, longest: int = 120) -> Path:
    """A shard of conversations that count upwards, the second half of each the assistant's."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(20, longest + 1, conversations)
    ids = [(rng.integers(0, 280) + np.arange(n)) % 280 for n in lengths]
    mask = [np.arange(n) >= n // 2 for n in lengths]
    path = folder / f"shard-{number:05d}.npz"
    np.savez(
        path,
        ids=np.concatenate(ids).astype(np.uint16),
        mask=np.concatenate(mask).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return path


def options(folder: Path, *words: str) -> argparse.Namespace:
    fixed = ["--data", str(folder / "data"), "--tokens", str(TOKENS), "--device", "cpu", "--warmup", "2", "--pool", "2"]
    return train.arguments(
        [*fixed, "--eval-data", str(folder / "data" / "shard-00000.npz"), "--log-seconds", "0", *words]
    )
