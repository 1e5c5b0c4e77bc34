"""Writes the table "Which model on which Mac" into README.md and docs/choosing.md, as `flash-moe plan` predicts it.

    python tools/which_model.py [--check]

No network: the headers follow from the dimensions in the models' config.json, and all weights are holes in sparse files.
With ``--check`` it fails where a page differs from what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from random_checkpoint import tensor_shapes, text_config, write_tokenizer
from sparse_checkpoint import FULL_SIZE, nbytes, stored, write_holes

from flash_moe.checkpoint.folder import INDEX
from flash_moe.checkpoint.safetensors import build_header
from flash_moe.formats import ProjectionFormat, Quantization, part_shapes
from flash_moe.planning.chips import parse_machine
from flash_moe.planning.plan import Plan, plan

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/choosing.md")
BEGIN, END = "<!-- made by tools/which_model.py -->", "<!-- end -->"
MACHINES = ("M4 16GB", "M4 Pro 24GB", "M3 Max 48GB", "M5 Max 128GB")
PROMPT = 1000  # tokens
AFFINE = Quantization(4, 64)

# Dimensions: config.json of Qwen/Qwen3.6-35B-A3B, Qwen3.5-122B-A10B and Qwen3.5-397B-A17B on the Hugging Face hub.
_SMALL = FULL_SIZE | {"num_experts": 256, "num_experts_per_tok": 8}


class Known(NamedTuple):
    """A repository and the text part of its config.json."""

    repo: str
    config: dict[str, Any]


MODELS = (
    Known(
        "mlx-community/Qwen3.6-35B-A3B-4bit",
        _SMALL
        | text_config(
            vocab_size=248_320, hidden_size=2048, num_hidden_layers=40, num_attention_heads=16, num_key_value_heads=2,
            head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
            linear_value_head_dim=128, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
            shared_expert_intermediate_size=512, max_position_embeddings=262_144,
        ),
    ),
    Known("mlx-community/Qwen3.5-122B-A10B-4bit", _SMALL | {"hidden_size": 3072, "num_hidden_layers": 48}),
    Known("mlx-community/Qwen3.5-397B-A17B-4bit", FULL_SIZE),
)  # fmt: skip


def write_headers(folder: Path, text: dict[str, Any]) -> None:
    """Writes an MLX checkpoint whose weights are holes: 4 bits in groups of 64, gates 8 bits."""
    folder.mkdir()
    section: dict[str, Any] = {"group_size": AFFINE.group_size, "bits": AFFINE.bits, "mode": "affine"}
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}

    def add(file: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        files.setdefault(file, {})[name] = (dtype, shape)
        weight_map[name] = file

    experts, hidden, inner = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    for name, shape in tensor_shapes(text).items():
        file = f"model-{name.split('.')[1] if name.startswith('layers.') else 'rest'}.safetensors"
        if ".experts." not in name:
            for stored_name, dtype, stored_shape in stored(name, shape, section, AFFINE):
                add(file, stored_name, dtype, stored_shape)
    for layer in range(text["num_hidden_layers"]):
        for projection, (rows, columns) in {
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)
        }.items():  # fmt: skip
            for kind, (dtype, part) in part_shapes(rows, columns, ProjectionFormat("BF16", AFFINE)).items():
                name = f"language_model.model.layers.{layer}.mlp.switch_mlp.{projection}.{kind}"
                add(f"model-{layer}.safetensors", name, dtype, (experts, *part))
    for file, tensors in files.items():
        write_holes(folder / file, build_header(tensors, metadata={"format": "mlx"}), nbytes(tensors))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "qwen3_5_moe", "text_config": text, "quantization": section}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def cell(found: Plan) -> str:
    """Tokens per second, and seconds to the first token, with the share of experts that memory should hold."""
    decode, prefill = found.decode["expected"], found.prefill["expected"]
    if not found.memory.fits or decode is None or prefill is None:
        return "does not fit"
    rate, wait = 1 / decode.total, prefill.total
    return f"{rate:.0f} tok/s, {wait:.0f} s" if rate >= 9.5 else f"{rate:.1f} tok/s, {wait:.0f} s"


def row(model: Known, folder: Path, k: int | None) -> str:
    """One line of the table: a model at one K, on every machine."""
    plans = [
        plan(str(folder), experts_per_token=k, machine=parse_machine(name), prompt=PROMPT, context=4096)
        for name in MACHINES
    ]
    needs, own = plans[0].needs, plans[0].to_dict()["model_experts_per_token"]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    exact = "yes" if needs.experts_per_token == own else "no"
    cells = " | ".join(cell(found) for found in plans)
    sizes = f"{size / 1e9:.0f} GB | {needs.resident / 2**30:.1f} GiB"
    return f"| `{model.repo}` | {sizes} | {needs.experts_per_token} | {exact} | {cells} |"


def table() -> str:
    """The whole table in Markdown."""
    names = [parse_machine(name).name for name in MACHINES]
    lines = ["| repository | disk | memory | K | exact | " + " | ".join(names) + " |", "|---" * (5 + len(names)) + "|"]
    with tempfile.TemporaryDirectory() as temporary:
        for model in MODELS:
            folder = Path(temporary) / model.repo.rpartition("/")[2]
            write_headers(folder, model.config)
            lines += [row(model, folder, k) for k in (4, None)]
    # No unit begins a line of its own.
    return re.sub(r"(?<=\d) (?=(?:GB|tok/s|s)\b)", "\N{NO-BREAK SPACE}", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    check, made = parser.parse_args().check, table()
    for page in PAGES:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        text = f"{before}{BEGIN}\n{made}\n{END}{rest.split(END, 1)[1]}"
        if not check:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.name} is out of date; run python tools/which_model.py")
    print(made)


if __name__ == "__main__":
    main()
