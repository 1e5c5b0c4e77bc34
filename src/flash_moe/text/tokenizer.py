"""The tokenizer of a checkpoint, through the `tokenizers` library."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .chat_template import ChatTemplate, read_json_object
from .detokenizer import Detokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_log = logging.getLogger(__name__)


class Tokenizer:
    """Converts text to token ids and back, and applies the checkpoint's chat template.

    Args:
        backend: tokenizer of the `tokenizers` library; its truncation and padding are switched off.
        eos_token_ids: ids that end a generation.
        chat_template: None if the checkpoint has none.

    Attributes:
        eos_token_ids: ids that end a generation; empty if the checkpoint names none.
        chat_template: the checkpoint's chat template, or None.
        vocab_size: number of tokens, including added tokens. The model's output may be wider (padding).
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # Some files contain the limits of their training, which would truncate or pad prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        byte_ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_ids = frozenset(id for id in byte_ids if id is not None)
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Loads the tokenizer from a checkpoint's folder.

        Reads `tokenizer.json`. Without that file, transformers (if installed) builds the tokenizer from older files.
        The ids that end a generation come from `generation_config.json`, or else from `config.json`. The tokenizer's
        `eos_token` is added, because the files of a fine-tuned chat model may name only the end of a document.

        Args:
            path: folder of the checkpoint.

        Raises:
            TokenizerError: there is no usable tokenizer, or one of its files is malformed.
        """
        path = Path(path)
        backend = _load_backend(path)
        special_tokens = _special_tokens(path)
        return cls(
            backend,
            eos_token_ids=_eos_token_ids(path, backend, special_tokens.get("eos_token")),
            chat_template=ChatTemplate.load(path, special_tokens),
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Encodes text. Special tokens in the text, such as `<|im_start|>`, become single ids.

        Args:
            text: any text without lone surrogates.
            add_special_tokens: whether to add the tokens that the tokenizer puts around a text, such as a BOS token.

        Raises:
            TokenizerError: the text cannot be encoded.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:
            raise TokenizerError(f"found text that cannot be encoded ({error}), expected valid Unicode") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decodes a list of token ids. Ids outside the vocabulary have no text; invalid UTF-8 becomes U+FFFD.

        Raises:
            TokenizerError: an id is negative or not an integer.
        """
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise TokenizerError(f"found ids that are no token ids ({error}); pass a list of integers >= 0") from error

    def is_special(self, id: int) -> bool:
        """Returns whether the token is special. `<think>` and `<tool_call>` are added tokens, but not special."""
        return id in self._special_ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """Renders chat messages into the text of a prompt; see `ChatTemplate.render`.

        Args:
            messages: dicts with `role` and `content`.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: whether to end with the header of the assistant's next message.
            enable_thinking: passed to the template; None leaves the choice to the template.
            **variables: further variables for the template.

        Raises:
            TokenizerError: there is no chat template, it fails, or the messages are malformed.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "found no chat template in the checkpoint (chat_template.jinja, chat_template.json or chat_template in "
                "tokenizer_config.json), expected one for a list of messages; pass a plain string prompt instead"
            )
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def detokenizer(self) -> Detokenizer:
        """Returns a new streaming decoder that skips special tokens, like `decode(ids, skip_special_tokens=True)`."""
        return Detokenizer(self.decode, silent=self._is_silent, bytewise=self._byte_ids)

    def token_bytes(self, size: int) -> tuple[list[bytes], list[int]] | None:
        """Returns the bytes of every token, and the ids of tokens that are markers such as ``<tool_call>``.

        Args:
            size: length of the list. Entries of ids that the tokenizer does not know are empty.

        Returns:
            None if the tokenizer does not use byte-level BPE.
        """
        if not self._is_byte_level():
            return None
        tokens = [b""] * size
        for text, id in self._backend.get_vocab(with_added_tokens=True).items():
            if id < size and id not in self._added:
                tokens[id] = _spelled(text)
        for id, text in self._added.items():
            if id < size:
                tokens[id] = text.encode()
        return tokens, sorted(self._added)

    def bytes_of(self, id: int) -> bytes:
        """Returns the bytes of one token; empty if the tokenizer does not know the id.

        The bytes of consecutive tokens, joined, are the text in UTF-8. Those of one token can be a part of a character.
        """
        text = self._backend.id_to_token(id)
        if text is None:
            return b""
        if id in self._added:
            return self._added[id].encode()
        if self._is_byte_level():
            return _spelled(text)
        if id in self._byte_ids:
            return bytes.fromhex(text[3:5])
        # some decoders drop the space at the start of a text
        return self.decode([id, id]).removeprefix(self.decode([id])).encode()

    def _is_byte_level(self) -> bool:
        from tokenizers.decoders import ByteLevel

        return isinstance(self._backend.decoder, ByteLevel)

    def to_json(self) -> str:
        """Returns the tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    def token_id(self, text: str) -> int | None:
        """Returns the id of the token with exactly this text, or None."""
        return self._backend.token_to_id(text)

    def _is_silent(self, id: int) -> bool:
        return id in self._special_ids or (id >= 0 and self._backend.id_to_token(id) is None)


def _byte_characters() -> list[str]:
    """Returns the characters for bytes 0 to 255 in byte-level BPE (GPT-2's table). Printable ones represent themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTES = {ord(character): chr(byte) for byte, character in enumerate(_byte_characters())}


def _spelled(text: str) -> bytes:
    """Returns the bytes of a token of byte-level BPE."""
    spelled = text.translate(_BYTES)
    return spelled.encode("latin-1") if spelled.isascii() or max(spelled) < "\u0100" else text.encode()


def _load_backend(path: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    file = path / "tokenizer.json"
    if not file.is_file():
        return _convert_backend(path)
    try:
        return Backend.from_file(str(file))
    except BaseException as error:  # the library raises bare Exception, and its panics are not subclasses of Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{file} is not a tokenizer that the tokenizers library can read ({error}); "
            "download it again, or upgrade `tokenizers` if the file is newer than the library"
        ) from error


def _convert_backend(path: Path) -> Backend:
    """Builds the tokenizer from files other than tokenizer.json, through transformers."""
    if not path.is_dir():
        raise TokenizerError(f"expected a folder with tokenizer.json at {path}, found no such folder; check the path")
    missing = f"expected tokenizer.json in {path}, found {sorted(file.name for file in path.iterdir())}"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TokenizerError(
            f"{missing}; download the complete checkpoint, or `pip install transformers` to convert older formats"
        ) from error
    _log.info("no tokenizer.json in %s: converting the tokenizer with transformers", path)
    try:
        converted = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of errors
        reason = " ".join(str(error).split())
        raise TokenizerError(
            f"{missing}, from which transformers cannot build a tokenizer ({reason}); download the complete checkpoint"
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"{missing}; {type(converted).__name__} has no tokenizer.json form, use another checkpoint"
        )
    return backend


def _special_tokens(path: Path) -> dict[str, str]:
    """Returns the named special tokens: `{"eos_token": "<|im_end|>", ...}`. tokenizer_config.json has priority."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json_object(path / name)
        extra = values.get("extra_special_tokens")
        for key, value in {**values, **(extra if isinstance(extra, dict) else {})}.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _eos_token_ids(path: Path, backend: Backend, eos_token: str | None) -> frozenset[int]:
    named = _named_eos_ids(path / "generation_config.json") or _named_eos_ids(path / "config.json")
    id = None if eos_token is None else backend.token_to_id(eos_token)
    return named | (frozenset() if id is None else {id})


def _named_eos_ids(file: Path) -> frozenset[int]:
    config = read_json_object(file)
    text_config = config.get("text_config")
    value = config.get("eos_token_id")
    if value is None and isinstance(text_config, dict):
        value = text_config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise TokenizerError(
            f"eos_token_id in {file} is {value!r}, expected a token id or a list of them; repair the file"
        )
    return frozenset(ids)
