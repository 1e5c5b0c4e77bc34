"""Reads config.json, with typed look-ups. The families interpret its entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.hub import NO_GGUF
from ..errors import ConfigError

MAX_DIMENSION = 1 << 30  # far above any model; only a damaged file has more


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of ``folder/config.json`` unchanged."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(folder.glob("*.gguf")):
            raise ConfigError(f"{folder} holds GGUF files, which are not supported; {NO_GGUF}") from None
        raise ConfigError(
            f"{path} does not exist; expected a folder with config.json and *.safetensors files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected a JSON object; download it again")
    return raw


class Reader:
    """Typed look-ups in config.json. Errors name the key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_DIMENSION) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"config.json: {key} is {value!r}, expected an integer of at least {least}")
        if value > most:
            raise ConfigError(
                f"config.json: {key} is {value!r:.20}, expected at most {most}; restore the original file"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e38:
            raise ConfigError(f"config.json: {key} is {value!r}, expected a positive, finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}; is it that of a model of this type? Download it again")
        return value
