"""Log probabilities of tokens, with the bytes of each token."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from scripted import ScriptedModel, Step
from starlette.testclient import TestClient
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from flash_moe.generation.sampling import TokenLogprobs
from flash_moe.shipped import shipped
from flash_moe.text import Tokenizer

TEXT = "K is é😀."
Clients = Callable[..., TestClient]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(shipped("models/demo"))


def scripted(tokenizer: Tokenizer) -> ScriptedModel:
    """A model that says TEXT."""
    tokens = tokenizer.encode(TEXT)
    end = min(tokenizer.eos_token_ids)
    steps = [Step(logprobs=TokenLogprobs(token, -0.5, ((token, -0.5), (end, -1.0)))) for token in tokens]
    model = ScriptedModel([*steps, Step(finish_reason="stop", logprobs=TokenLogprobs(end, -0.5, ()))])
    model.tokenizer = tokenizer  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_a_reply(client_of: Clients, tokenizer: Tokenizer, stream: bool) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    response = client_of(scripted(tokenizer)).post("/v1/chat/completions", json=body | {"stream": stream})
    lines = response.text.split("\n") if stream else [response.text]
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    entries: list[Any] = [
        entry for event in found for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == TEXT, "the stop token is not in it"
    assert entries[0]["top_logprobs"][1]["token"] in ("<|im_end|>", "<|endoftext|>")


def test_tokens_of_a_completion(client_of: Clients, tokenizer: Tokenizer) -> None:
    body = {"model": "scripted", "prompt": "Hi", "logprobs": 1}
    answer = client_of(scripted(tokenizer)).post("/v1/completions", json=body).json()
    found = answer["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(tokenizer.encode(TEXT))
    assert "".join(found["tokens"]).startswith("K is ")


def test_bytes_of_other_tokenizers() -> None:
    """Byte-fallback tokens have one byte; a decoder that drops the first space of a text does not drop it here."""
    backend = Backend(models.WordLevel({"\u2581Hi": 0, "<0xC3>": 1, "<0xA9>": 2, "!": 3}, unk_token="!"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    assert [tokenizer.bytes_of(id) for id in range(5)] == [b" Hi", b"\xc3", b"\xa9", b"!", b""]
