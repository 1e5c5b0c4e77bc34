"""`Tokenizer` against transformers on the same files, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import TokenizerError
from flash_moe.text import Tokenizer

TEXTS = [
    "",
    " ",
    "The experts sleep.",
    "  two spaces\n\n\tand a tab ",
    "你好,世界 👩‍👩‍👧‍👦 नमस्ते é é",
    "<|im_start|>user\nHi<|im_end|>\n<think>hm</think><tool_call>{}</tool_call>",
    "<|im_start|><|im_start|>not <|special",
    "nul \x00 and \ufffd",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("skip", [False, True], ids=["keep", "skip"])
def test_encode_and_decode_agree_with_transformers(qwen, text, skip):
    ids = qwen.ours.encode(text)
    assert ids == qwen.theirs.encode(text, add_special_tokens=False)
    assert qwen.ours.decode(ids, skip_special_tokens=skip) == qwen.theirs.decode(ids, skip_special_tokens=skip)
    assert qwen.ours.decode(ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode(qwen, text):
    assert qwen.ours.decode(qwen.ours.encode(text)) == text


def test_special_tokens_are_single_ids(qwen):
    assert qwen.ours.encode("<|im_start|>") == [qwen.theirs.convert_tokens_to_ids("<|im_start|>")]
    assert qwen.ours.vocab_size == len(qwen.theirs)
    special = {id for id in range(qwen.ours.vocab_size) if qwen.ours.is_special(id)}
    assert special == {qwen.ours.encode(token)[0] for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}


def test_ids_outside_the_vocabulary_decode_to_nothing(qwen):
    assert qwen.ours.decode([qwen.ours.vocab_size + 7]) == ""
    assert qwen.ours.detokenizer().add(qwen.ours.vocab_size + 7) == ""


@pytest.mark.parametrize("bad", [-1, 2**40, "x"], ids=str)
def test_decode_refuses_what_is_no_id(qwen, bad):
    with pytest.raises(TokenizerError, match="pass a list of integers"):
        qwen.ours.decode([bad])


def test_encode_refuses_lone_surrogates(qwen):
    with pytest.raises(TokenizerError, match="expected valid Unicode"):
        qwen.ours.encode("a\ud800b")


def test_truncation_and_padding_of_the_file_are_ignored(write_checkpoint, tokenizer_json):
    limits = {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    }
    tokenizer = Tokenizer.load(write_checkpoint(tokenizer=json.loads(tokenizer_json) | limits))
    text = "A token asks for eight of them, and only eight wake up."
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": 4}}, {3, "<|im_end|>"}),
        ({"generation_config": {"eos_token_id": [3, 5]}}, {3, 5, "<|im_end|>"}),
        ({"generation_config": {"temperature": 1.0}, "config": {"eos_token_id": 4}}, {4, "<|im_end|>"}),
        ({"config": {"text_config": {"eos_token_id": [4, 6]}}}, {4, 6, "<|im_end|>"}),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": 0}}}, {0, "<|im_end|>"}),
        ({"config": {"model_type": "qwen3_5_moe"}}, {"<|im_end|>"}),
        ({"tokenizer_config": {"eos_token": {"content": "<|endoftext|>"}}}, {"<|endoftext|>"}),
        ({"tokenizer_config": None, "special_tokens_map": {"eos_token": "<|endoftext|>"}}, {"<|endoftext|>"}),
        ({"tokenizer_config": {"eos_token": "<absent>"}}, set()),
        ({"tokenizer_config": None}, set()),
    ],
)
def test_eos_token_ids(write_checkpoint, files, expected):
    tokenizer = Tokenizer.load(write_checkpoint(**files))
    assert tokenizer.eos_token_ids == {tokenizer.encode(t)[0] if isinstance(t, str) else t for t in expected}


@pytest.mark.parametrize("value", ["</s>", True, [1, "2"], -1, 1.5, {}], ids=str)
def test_malformed_eos_token_ids(write_checkpoint, value):
    with pytest.raises(TokenizerError, match=r"generation_config\.json.*expected a token id or a list"):
        Tokenizer.load(write_checkpoint(generation_config={"eos_token_id": value}))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"model": null}', '{"version": "9.0"}'])
def test_malformed_tokenizer_json(write_checkpoint, content):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer.*download"):
        Tokenizer.load(write_checkpoint(tokenizer=content))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"])
@pytest.mark.parametrize("content", ["{", "[1]", "null", "[" * 100_000], ids=["cut", "list", "null", "deep"])
def test_malformed_json_beside_it(write_checkpoint, name, content):
    with pytest.raises(TokenizerError, match=rf"{name}\.json"):
        Tokenizer.load(write_checkpoint(**{name: content}))


def test_a_panic_in_the_library_is_an_error_too(write_checkpoint, monkeypatch):
    class PanicException(BaseException):
        pass

    class Backend:
        @staticmethod
        def from_file(file):
            raise PanicException("range end index 7 out of range")

    monkeypatch.setattr("tokenizers.Tokenizer", Backend)
    with pytest.raises(TokenizerError, match="out of range"):
        Tokenizer.load(write_checkpoint())


def test_without_tokenizer_json_transformers_builds_it(write_checkpoint, tokenizer_json, qwen):
    model = json.loads(tokenizer_json)["model"]
    path = write_checkpoint(
        tokenizer=None,
        vocab=model["vocab"],
        tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"},
    )
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (path / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    text = "The experts sleep on the disk"
    assert tokenizer.encode(text) == qwen.ours.encode(text)
    assert tokenizer.eos_token_ids == {tokenizer.encode("<|endoftext|>")[0]}


def test_no_tokenizer_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json in .*found \['config\.json'\].*download"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="no such folder"):
        Tokenizer.load(tmp_path / "nowhere")


def test_no_tokenizer_json_and_no_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json.*pip install transformers"):
        Tokenizer.load(tmp_path)


def test_importing_the_package_imports_no_library():
    code = "import sys, flash_moe.text; print({'tokenizers', 'jinja2', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
