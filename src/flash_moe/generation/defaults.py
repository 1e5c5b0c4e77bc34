"""Reads the sampling options that a checkpoint recommends in generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Returns arguments for Sampling: those of the file if it has ``do_sample``, else greedy decoding.

    Raises:
        ConfigError: the file is malformed.
    """
    path = folder / "generation_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again, or delete it") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path} holds {type(config).__name__}, expected a JSON object; download it again, or delete it"
        )
    found = {name: config[name] for name in _NAMES if config.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path}: {name} is {value!r}, expected a number; repair or delete the file")
    if config.get("do_sample"):
        return {"temperature": 1.0, **found}
    return {name: value for name, value in found.items() if name == "repetition_penalty"}
