"""Writes a trained demo model as a Hugging Face checkpoint in bfloat16.

    PYTHONPATH=tools python -m demo_model.export RUN/checkpoint.pt FOLDER --tokenizer TOKENIZER_FOLDER

Names, shapes and config.json are those of transformers' `Qwen3_5MoeForCausalLM.save_pretrained`, so transformers and
flash_moe both load the folder, and `flash-moe convert FOLDER PACKED --bits 4` packs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARD = "12MB"


def load(path: Path) -> Qwen3_5MoeForCausalLM:
    """The model of a training checkpoint or of an exported folder, float32, on the CPU.

    Raises:
        ValueError: the folder lacks weights.
    """
    if path.is_dir():
        model, report = Qwen3_5MoeForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{path} lacks {len(missing)} weights, {missing[0]} first; expected all of the model: copy it again"
            )
        return model
    state = torch.load(path, map_location="cpu", weights_only=True)
    return from_state(state["config"], state["model"])


def from_state(config: dict[str, Any], state: dict[str, Tensor]) -> Qwen3_5MoeForCausalLM:
    """A float32 model on the CPU with the weights ``state``."""
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig.from_dict(config)).float()
    model.load_state_dict(state)
    return model


def special_ids(tokenizer: Path) -> dict[str, int]:
    """``eos_token_id`` and ``pad_token_id`` of a tokenizer's folder.

    Raises:
        ValueError: a token that tokenizer_config.json names is not in tokenizer.json.
    """
    from tokenizers import Tokenizer

    names = json.loads((tokenizer / "tokenizer_config.json").read_text())
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = {}
    for role in ("eos_token", "pad_token"):
        number = vocabulary.token_to_id(names[role])
        if number is None:
            raise ValueError(
                f"{tokenizer}: {role} is {names[role]!r}, which is not in tokenizer.json; expected a token of it"
            )
        ids[f"{role}_id"] = number
    return ids


def export(model: Qwen3_5MoeForCausalLM, folder: Path, tokenizer: Path) -> None:
    """Writes shards of at most 12 MB with an index, config.json, and the tokenizer's files.

    Raises:
        FileNotFoundError: the tokenizer's folder lacks a file.
        FileExistsError: the folder holds files already; old shards beside new ones would be read as one model.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; expected a new folder: remove it or name another")
    for name in TOKENIZER_FILES:
        if not (tokenizer / name).exists():
            raise FileNotFoundError(
                f"{tokenizer} lacks {name}; write it with `python -m demo_model.tokenizer {tokenizer}`"
            )
    for key, value in special_ids(tokenizer).items():
        setattr(model.config, key, value)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    compact = json.dumps(
        vocabulary, ensure_ascii=False, separators=(",", ":")
    )  # indented, it takes 2.5 times the bytes
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and its companions")
    options = parser.parse_args()
    export(load(options.checkpoint), options.folder, options.tokenizer)
    for path in sorted(options.folder.iterdir()):
        print(f"{path.stat().st_size:>12,} {path.name}")


if __name__ == "__main__":
    main()
