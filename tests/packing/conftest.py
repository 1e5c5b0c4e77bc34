"""A tiny float checkpoint, the same one quantised by mlx_lm, its undisturbed conversion; a way to interrupt others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import Interrupted
from random_checkpoint import text_config, write_checkpoint

from flash_moe.packing.convert import convert


@pytest.fixture(scope="session")
def small_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers (one of attention), four experts."""
    text = text_config(num_hidden_layers=2, full_attention_interval=2, num_experts=4, num_experts_per_tok=2)
    return write_checkpoint(tmp_path_factory.mktemp("small") / "float", text)


@pytest.fixture(scope="session")
def small_quantized(
    small_float: Path, mlx_quantize: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """4 bits in groups of 64, by ``mlx_lm.convert``."""
    return mlx_quantize(small_float, tmp_path_factory.mktemp("small") / "quantized", q_bits=4, q_group_size=64)


@pytest.fixture(scope="session")
def small_packed(small_quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "packed"
    convert(small_quantized, folder)
    return folder


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[..., None]]:
    """``interrupt(n)`` makes the n-th step from now fail; returns what to pass as ``progress``, itself a step."""
    left = 0

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted

    def stepping(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            step()
            return real(*arguments, **keywords)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (os, "fsync"),
        (shutil, "copyfile"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, stepping(getattr(owner, name)))

    def begin(number: int) -> Callable[..., None]:
        nonlocal left
        left = number
        return step

    return begin
