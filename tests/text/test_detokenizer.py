"""A stream of pieces equals the one-shot decode, and no piece shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from flash_moe.text import Detokenizer, Tokenizer

PARTS = [
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "❤️",
    "é",
    "é",
    "नमस्ते",
    "你好",
    "ي",
    "\u200d",
    "\ufffd",
    " ",
    "\n",
    "a",
    "𝔘",
    "</think>",
    "<|im_end|>",
]
unicode = st.lists(st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"])).map("".join)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.add(id) for id in ids), detokenizer.finish()]


@given(text=unicode)
@example(text="\ufffd" * 20)
@example(text="👩‍👩‍👧‍👦" * 5)
def test_text_comes_out_whole(qwen, text):
    ids = qwen.ours.encode(text)
    pieces = stream(qwen.ours, ids)
    assert "".join(pieces) == qwen.theirs.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
def test_any_ids_equal_one_shot(qwen, data):
    size = qwen.ours.vocab_size
    # The lowest ids are single bytes, most of them invalid UTF-8 on their own; the highest are the added tokens.
    ids = data.draw(st.lists(st.integers(0, 255) | st.integers(size - 8, size + 3) | st.integers(0, size), max_size=60))
    assert "".join(stream(qwen.ours, ids)) == qwen.ours.decode(ids, skip_special_tokens=True)


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """One token for every byte: bytes without a symbol of their own are written as U+0100 and following."""
    symbols = set(ByteLevel.alphabet())
    others = [byte for byte in range(256) if chr(byte) not in symbols]
    return [
        tokenizer._backend.token_to_id(chr(256 + others.index(byte)) if byte in others else chr(byte)) for byte in raw
    ]


@given(
    raw=st.lists(
        st.sampled_from(
            [b"\xf0\x9f\x98\x80", b"\xe4\xbd", b"\xa0", b"\xff", b"\xf0\x9f", b"\xc3", b"a", b"\xef\xbf\xbd"]
        )
    )
)
def test_bytes_decode_as_python_does(qwen, raw):
    raw = b"".join(raw)
    assert "".join(stream(qwen.ours, byte_ids(qwen.ours, raw))) == raw.decode("utf-8", errors="replace")


def test_a_character_appears_with_its_last_byte(qwen):
    ids = byte_ids(qwen.ours, "a👍b".encode())
    assert stream(qwen.ours, ids) == ["a", "", "", "", "👍", "b", ""]


def test_invalid_bytes_come_out_one_token_later(qwen):
    assert stream(qwen.ours, byte_ids(qwen.ours, b"\xff\xff\xffa")) == ["", "\ufffd", "\ufffd", "\ufffda", ""]


def test_an_unfinished_character_comes_out_at_the_end(qwen):
    assert stream(qwen.ours, byte_ids(qwen.ours, b"a\xf0\x9f")) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_skipped_and_others_kept(qwen):
    ids = qwen.ours.encode("<|im_start|><think>ok</think><|im_end|><tool_call></tool_call>")
    assert "".join(stream(qwen.ours, ids)) == "<think>ok</think><tool_call></tool_call>"


def test_finish_starts_afresh(qwen):
    detokenizer = qwen.ours.detokenizer()
    for text in ("The experts", " sleep"):
        assert "".join([*map(detokenizer.add, qwen.ours.encode(text)), detokenizer.finish()]) == text
    assert detokenizer.finish() == ""


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    words = ["▁", "▁▁", "▁Hello", "▁world", "wor", "ld", "!", "你", "a", "\ufffd", "x▁"]
    vocab = {word: id for id, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Backend(models.WordLevel(vocab, unk_token="!"))
    backend.decoder = decoder
    return Tokenizer(backend)


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
DECODERS = {
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "llama": LLAMA,
    "suffix": decoders.BPEDecoder(suffix="d"),
    "wordpiece": decoders.WordPiece(prefix="w"),
    "fuse": decoders.Fuse(),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
@given(ids=st.lists(st.integers(0, 10) | st.sampled_from([11 + b for b in "你é👍\n".encode() + b"\xff"]), max_size=40))
def test_decoders_that_mind_the_neighbours(decoder, ids):
    tokenizer = sentencepiece(decoder)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_leading_space_only_at_the_start():
    assert stream(sentencepiece(decoders.Metaspace()), [2, 3, 4, 5]) == ["Hello", " world", "wor", "ld", ""]


def test_byte_fallback_run_is_decoded_as_a_whole():
    ids = [2, *(11 + byte for byte in "你".encode()), 6]
    assert stream(sentencepiece(LLAMA), ids) == ["Hello", "", "", "", "你!", ""]


@pytest.mark.parametrize("byte", [b"\xff", b"\x80", b"a"], ids=["invalid", "continuation", "letter"])
def test_the_window_stays_short(qwen, byte):
    lengths = set()

    def decode(ids: list[int]) -> str:
        lengths.add(len(ids))
        return qwen.ours.decode(ids)

    ids = byte_ids(qwen.ours, byte) * 2000
    detokenizer = Detokenizer(decode)
    pieces = [*map(detokenizer.add, ids), detokenizer.finish()]
    assert "".join(pieces) == qwen.ours.decode(ids)
    assert max(lengths) <= 5
