"""Ways to damage a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from expected_records import rewrite, stored_tensors

INDEX = "model.safetensors.index.json"


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Lets ``change`` alter the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def full_name(folder: Path, ending: str) -> str:
    """The name of the one tensor whose name ends so."""
    (name,) = [name for name in stored_tensors(folder) if name.endswith(ending)]
    return name


def replace_tensor(folder: Path, ending: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Changes one tensor; returns its file."""
    name = full_name(folder, ending)
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    rewrite(file, lambda tensors: tensors.update({name: change(tensors[name])}))
    return file


def remove_tensor(folder: Path, ending: str, *, from_index: bool = True) -> str:
    """Removes one tensor from its file, and from the index unless that is to disagree; returns its name."""
    name = full_name(folder, ending)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    rewrite(folder / weight_map[name], lambda tensors: tensors.pop(name))
    if from_index:
        edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return name
