"""Small random checkpoints that many tests share, each written once per session; one of them as a model."""

from __future__ import annotations

import gc
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from random_checkpoint import next_config, text_config, write_checkpoint
from required_tools import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

from flash_moe import Model
from flash_moe.packing.convert import convert

# Machines that run the tests may be slow and busy: time is no property of the code.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
# Where tests begin in the background of a shell, Ctrl-C is ignored, and so it would be in every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# On a machine with a GPU, FLASH_MOE_TEST_DEVICE=cpu has this process run its tests on the CPU.
if os.environ.get("FLASH_MOE_TEST_DEVICE") == "cpu":
    mx.set_default_device(mx.cpu)
# Which store is faster is no property of the code either.
os.environ["FLASH_MOE_EXPERT_IO"] = "slots"


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Leaves what exists out of searches for garbage: many tests ask for one, and of everything it takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint in float32: 4 layers, 16 experts, top-4, two shards."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "float", text_config())


@pytest.fixture(scope="session")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for Qwen3-Next, with one tensor per expert."""
    folder = tmp_path_factory.mktemp("checkpoints") / "next"
    return write_checkpoint(folder, next_config(), prefix="model.", nested_config=False, fused_experts=False)


@pytest.fixture(scope="session")
def mlx_quantize() -> Callable[..., Path]:
    """Quantises a checkpoint with ``mlx_lm.convert``: ``mlx_quantize(source, destination, **options)``."""

    def quantize(source: Path, destination: Path, **options: object) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlx_lm import convert as mlx_convert

            mlx_convert(str(source), str(destination), quantize=True, dtype="float32", **options)
        return destination

    return quantize


@pytest.fixture(scope="session")
def quantized_checkpoint(
    float_checkpoint: Path, mlx_quantize: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``float_checkpoint`` as ``mlx_lm.convert`` quantises it: 4 bits in groups of 32, 8-bit gates."""
    destination = tmp_path_factory.mktemp("checkpoints") / "quantized"
    return mlx_quantize(float_checkpoint, destination, q_bits=4, q_group_size=32)


@pytest.fixture(scope="session")
def packed_checkpoint(quantized_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``quantized_checkpoint`` in packed form."""
    destination = tmp_path_factory.mktemp("checkpoints") / "packed"
    assert convert(quantized_checkpoint, destination) == []
    return destination


@pytest.fixture(scope="module")
def model(packed_checkpoint: Path) -> Iterator[Model]:
    """``packed_checkpoint`` with its own K; generates until ``max_tokens``."""
    with Model.load(packed_checkpoint, experts_per_token=None) as model:
        model.tokenizer.eos_token_ids = frozenset()  # random weights stop at random otherwise
        yield model


@pytest.fixture
def edit_config() -> Callable[[Path, Callable[[dict], None]], None]:
    """Changes the config.json of a checkpoint in place."""

    def edit(folder: Path, change: Callable[[dict], None]) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit
