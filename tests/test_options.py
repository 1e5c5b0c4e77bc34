"""Options as users pass them: obeyed, or ArgumentError and nothing else."""

from __future__ import annotations

import decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe import ArgumentError, Model

PROMPT = list(b"Memory is small")


class Odd:
    """Fails whatever is asked of it."""

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


OBEYED: list[dict[str, Any]] = [
    {"stop": None}, {"stop": ()}, {"stop": {"zzz"}}, {"stop": np.array(["zzz"])}, {"temperature": 1e-320, "seed": 1},
    {"temperature": np.float32(0.5), "seed": np.int64(3)}, {"temperature": Fraction(1, 2)}, {"top_k": np.int32(5)},
    {"top_k": 10**30, "temperature": 1}, {"max_tokens": np.int64(2)}, {"max_tokens": 2}, {"seed": 10**400, "temperature": 1},
    {"repetition_penalty": np.float64(1.1)}, {"top_p": np.float16(0.5), "temperature": 1},
]  # fmt: skip
REFUSED: list[dict[str, Any]] = [
    {name: value}
    for name in ("max_tokens", "seed", "top_k", "temperature", "top_p", "min_p", "repetition_penalty")
    for value in ("1", float("nan"), float("inf"), -1, True, 1j, [], [1], np.array([1, 2]), b"1", Odd(), decimal.Decimal(1), {})
] + [
    {"seed": 1.5}, {"max_tokens": 2.0}, {"max_tokens": 0}, {"max_tokens": None}, {"top_k": 1.0}, {"temperature": 10**400},
    {"repetition_penalty": 0}, {"repetition_penalty": 1e-320}, {"repetition_penalty": 1e300}, {"top_p": 0},
    {"stop": 5}, {"stop": [5]}, {"stop": [""]}, {"stop": b"ab"}, {"stop": [None]}, {"stop": Odd()},
]  # fmt: skip


@pytest.mark.parametrize("options", OBEYED, ids=lambda o: "-".join(o))
def test_is_obeyed(model: Model, options: dict[str, Any]) -> None:
    found = model.generate(PROMPT, **{"max_tokens": 2} | options)
    assert len(found.tokens) == 2


def test_a_tiny_temperature_is_greedy(model: Model) -> None:
    greedy = model.generate(PROMPT, max_tokens=8, temperature=0).tokens
    assert model.generate(PROMPT, max_tokens=8, temperature=1e-320, seed=0).tokens == greedy


@pytest.mark.parametrize("options", REFUSED, ids=lambda o: f"{next(iter(o))}-{type(next(iter(o.values()))).__name__}")
def test_is_refused_before_the_first_token(model: Model, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        model.stream(PROMPT, **options)


@pytest.mark.parametrize(
    "prompt", [np.array(PROMPT), np.array(PROMPT, np.uint8), mx.array(PROMPT), tuple(PROMPT)], ids=repr
)
def test_arrays_of_token_ids(model: Model, prompt: Any) -> None:
    assert model.encode(prompt) == PROMPT
    assert model.logits(prompt, last=1).shape == (1, model.config.vocab_size)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": [value]}
    return value


def itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [nested(100_000), nested(600), itself()], ids=["deep", "rather deep", "itself"])
def test_deep_data_is_refused(model: Model, value: Any) -> None:
    message = {"role": "user", "content": "Hi"}
    tool = {"type": "function", "function": {"name": "f", "parameters": value}}
    bare = [1, value]
    for prompt, tools in (([message | {"extra": value}], None), ([message], [tool]), (bare, None)):
        with pytest.raises(ArgumentError):
            model.generate(prompt, tools=tools, max_tokens=1)


@pytest.mark.parametrize("prompt", [np.array([[1, 2]]), np.array([1.5]), mx.array(1.0), np.array([]), {1, 2}], ids=repr)
def test_arrays_that_are_no_token_ids(model: Model, prompt: Any) -> None:
    with pytest.raises(ArgumentError):
        model.generate(prompt)


@pytest.mark.parametrize("k", [0, 5, 4.0, 17, "4", True, np.float32(2)], ids=repr)
def test_k_that_the_model_does_not_have(packed_checkpoint: Path, k: Any) -> None:
    with pytest.raises(ArgumentError, match="experts_per_token"):
        Model.load(packed_checkpoint, experts_per_token=k)


def test_k_cannot_be_changed_later(model: Model) -> None:
    with pytest.raises(AttributeError):
        model.experts_per_token = 2  # type: ignore[misc]


def test_k_may_be_a_numpy_integer(packed_checkpoint: Path) -> None:
    with Model.load(packed_checkpoint, experts_per_token=np.int64(2)) as model:
        assert type(model.experts_per_token) is int and model.experts_per_token == 2
