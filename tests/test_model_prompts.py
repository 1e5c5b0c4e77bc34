"""What a model takes as a prompt, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from flash_moe import Model, PromptError, TokenizerError


def test_a_string_is_a_users_message(model: Model) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert model.encode("Hi") == model.encode(messages)
    text = model.tokenizer.decode(model.encode("Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_raw_text_is_continued_as_it_is(model: Model) -> None:
    assert model.encode("Hi", raw=True) == model.tokenizer.encode("Hi")


def test_token_ids_may_be_numpy_integers(model: Model) -> None:
    assert model.encode(list(np.array([1, 2], np.int64))) == [1, 2]


@pytest.mark.parametrize("prompt", ["", [], ()], ids=repr)
def test_an_empty_prompt_is_an_error(model: Model, prompt: object) -> None:
    with pytest.raises(PromptError, match="empty"):
        model.generate(prompt)


@pytest.mark.parametrize("prompt", [5, None, b"bytes", {"role": "user"}], ids=repr)
def test_a_prompt_of_another_kind_is_an_error(model: Model, prompt: object) -> None:
    with pytest.raises(PromptError, match="expected a string, chat messages or token ids"):
        model.generate(prompt)


@pytest.mark.parametrize("token", [-1, 288, 10**9, "a", 1.5, True], ids=repr)
def test_a_token_id_out_of_range_is_an_error(model: Model, token: object) -> None:
    with pytest.raises(PromptError, match=r"position 1|element 1"):
        model.generate([1, token])
    with pytest.raises(PromptError):
        model.logits([1, token])


def test_malformed_messages_are_an_error(model: Model) -> None:
    with pytest.raises(TokenizerError, match="role"):
        model.generate([{"content": "no role"}])


def test_a_prompt_longer_than_the_context_is_an_error(model: Model) -> None:
    context = model.config.max_position_embeddings
    for tokens in ([1] * context, [1] * (context + 1)):
        with pytest.raises(PromptError, match=f"{len(tokens)} tokens.*{context}"):
            model.stream(tokens)
    with pytest.raises(PromptError, match="context"):
        model.logits([1] * (context + 1))
