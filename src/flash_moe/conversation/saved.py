"""Saves and loads conversations: messages, tokens, caches, and a fingerprint of the model.

A file has the safetensors format. Its metadata holds everything except arrays, and a digest of the whole content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import ConversationError
from ..language_model import LanguageModel
from ..nn.cache import KVCache, SequenceCache
from ..nn.decoder import Decoder

_KIND, _VERSION = "flash_moe conversation", 1
_SMALL = 64 << 20  # the digest covers the content of files up to this size, and size and time of larger ones


def save(path: str | os.PathLike[str], model: LanguageModel, state: Any, caches: Sequence[Any]) -> None:
    """Saves a conversation. Writes a temporary file first, which then replaces the target.

    Args:
        state: the parts of the conversation that are JSON data.
        caches: the caches of the conversation; only the last one is saved.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    _own(model)
    tokens, marks, arrays = (caches[-1].tokens, caches[-1].marks, _arrays(caches[-1])) if caches else ([], [], {})
    mx.eval(list(arrays.values()))
    content = json.dumps({"state": state, "tokens": tokens, "marks": marks, "made by": fingerprint(model)})
    metadata = {"kind": _KIND, "version": str(_VERSION), "content": content, "digest": _digest(content, arrays)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        temporary.touch()  # raises the error of the system, which MLX replaces
        mx.save_safetensors(str(temporary), arrays or {"none": mx.zeros(1)}, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: LanguageModel) -> tuple[Any, SequenceCache | None]:
    """Returns the state and the caches of a saved conversation.

    Raises:
        ConversationError: the file is damaged or is not a saved conversation, or the conversation was saved with
            another model or other settings.
        OSError: the file cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length <= size else b"")
        metadata = header.pop("__metadata__")
        end = max(value["data_offsets"][1] for value in header.values())
        if metadata["kind"] != _KIND:
            raise ValueError(f"it is {metadata['kind']!r}")
        if metadata["version"] == str(_VERSION) and size != 8 + length + end:
            raise ValueError(f"it has {size} bytes, expected {8 + length + end}")
        version, text, digest = (metadata[name] for name in ("version", "content", "digest"))
        arrays: dict[str, mx.array] = {}
        if version == str(_VERSION):
            arrays = cast("dict[str, mx.array]", mx.load(str(path), format="safetensors"))
            arrays.pop("none", None)
            if _digest(text, arrays) != digest:
                raise ValueError("its content does not have the digest it was saved with")
            content = json.loads(text)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can cause any error
        raise ConversationError(
            f"{path} is damaged, or no conversation saved by flash_moe ({type(error).__name__}: {error}); "
            "restore it from a copy"
        ) from error
    if version != str(_VERSION):
        raise ConversationError(f"{path} was saved in format {version}, expected {_VERSION}; update flash_moe")
    _require_same(path, content["made by"], fingerprint(model))
    decoder = _own(model)
    alone = decoder is model._decoder  # other machines did not save their caches, so the tokens run again
    return content["state"], _restored(content, arrays, decoder.new_cache()) if arrays and alone else None


def _own(model: LanguageModel) -> Decoder:
    decoder = getattr(model._decoder, "network", model._decoder)  # in a group of machines, the cache of this one
    if not isinstance(decoder, Decoder):
        raise ConversationError(
            "conversations of a model that runs on mlx-lm's network cannot be saved, nor opened; keep their messages instead"
        )
    return decoder


def fingerprint(model: LanguageModel) -> dict[str, Any]:
    """Returns everything except the tokens that determines the caches: the checkpoint, and settings by name."""
    decoder = _own(model)
    return {
        "checkpoint": _checkpoint(model.path),
        "experts_per_token": model.experts_per_token,
        "dtype": str(decoder.dtype).rpartition(".")[2],
        "drop_cold_below": decoder.streaming.drop_cold_below,
        "prefer_cached": decoder.streaming.prefer_cached,
        "device": str(mx.default_device().type).rpartition(".")[2],
    }


def _require_same(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if saved.get(name) == value:
            continue
        if name == "checkpoint":
            raise ConversationError(
                f"{path} belongs to another checkpoint, or the checkpoint has changed since; load the one it was saved "
                "with, or start anew from its messages"
            )
        raise ConversationError(
            f"{path} was saved with {name}={saved.get(name)!r}, this model has {value!r}; load it alike"
        )


def _checkpoint(folder: Path) -> str:
    """Returns a digest of a checkpoint's files: the content of small ones, size and modification time of large ones."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".flashmoe"):
        status = file.stat()
        found.update(f"{file.relative_to(folder)} {status.st_size} ".encode())
        small = status.st_size <= _SMALL and file.suffix in (".json", ".jinja", ".txt")
        found.update(file.read_bytes() if small else str(status.st_mtime_ns).encode())
    return found.hexdigest()


def _digest(content: str, arrays: Mapping[str, mx.array]) -> str:
    found = hashlib.blake2b(content.encode(), digest_size=32)
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name} {array.shape} {array.dtype}".encode())
        found.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()


def _arrays(cache: SequenceCache) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, KVCache):
            arrays |= {f"{i}.keys": layer.keys[:, :, : layer.length], f"{i}.values": layer.values[:, :, : layer.length]}
        else:
            states = {"now": (layer.conv, layer.state)} | {str(mark): pair for mark, pair in layer.marks.items()}
            for name, (conv, state) in states.items():
                arrays |= {f"{i}.{name}.conv": conv, f"{i}.{name}.state": state}
    return arrays


def _restored(content: Mapping[str, Any], arrays: Mapping[str, mx.array], cache: SequenceCache) -> SequenceCache:
    cache.tokens = list(content["tokens"])
    for i, layer in enumerate(cache.layers):
        layer.length = len(cache.tokens)
        if isinstance(layer, KVCache):
            layer.keys, layer.values = arrays[f"{i}.keys"], arrays[f"{i}.values"]
        else:
            layer.conv, layer.state = arrays[f"{i}.now.conv"], arrays[f"{i}.now.state"]
            held = [mark for mark in content["marks"] if f"{i}.{mark}.state" in arrays]
            layer.marks = {mark: (arrays[f"{i}.{mark}.conv"], arrays[f"{i}.{mark}.state"]) for mark in held}
    cache.mark(content["marks"])
    return cache
