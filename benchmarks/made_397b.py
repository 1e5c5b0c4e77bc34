"""Makes packed models with the layer sizes of Qwen3.5-397B-A17B and random weights, at the speed of the file system.

Random bytes are cut from one block at random places. Expert files may repeat: a few are written, the layers are hard links
to them, so a model of 209 GB takes 3.6 GB for each file that differs. Checksums are not those of the content: `flash-moe
verify` rejects such a model.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sparse_checkpoint import GATES, QUANTIZATION, write_sparse

from flash_moe.checkpoint.packed import TENSOR, layer_file
from flash_moe.record import Quantization, RecordLayout

_BLOCK = 256 << 20  # random bytes in all
_THREADS = 16
_EMBEDDING_COLUMNS = 1  # of a matrix whose entries are near one, so that the residual stream says which token it is


def make_model(root: Path, name: str, text: dict[str, Any], distinct: int) -> Path:
    """The folder of a model, which is made where it does not exist yet.

    Args:
        root: on one file system, for links; files of experts are shared by all models in it.
        text: the text part of config.json.
        distinct: files of experts that differ; layer i has the content of file i modulo this.
    """
    folder = root / name
    if folder.exists():
        return folder
    unfinished = write_sparse(root / f"{name}.unfinished", text)
    block = np.frombuffer(np.random.Generator(np.random.SFC64(0)).bytes(_BLOCK), np.uint8)
    layers = [unfinished / layer_file(i) for i in range(text["num_hidden_layers"])]
    # one file for each content; those of another model with as many experts of the same size are taken
    sizes = f"{text['num_experts']}-{text['hidden_size']}-{text['moe_intermediate_size']}"
    contents = [root / f"experts-{sizes}-{i}.safetensors" for i in range(min(distinct, len(layers)))]
    new = [i for i, content in enumerate(contents) if not content.exists()]
    for i in new:
        layers[i].rename(contents[i])
    for i, layer in enumerate(layers):
        layer.unlink(missing_ok=True)
        os.link(contents[i % len(contents)], layer)
    with ThreadPoolExecutor(_THREADS) as pool:
        resident = [file for file in unfinished.glob("*.safetensors") if not file.name.startswith("experts-")]
        jobs = [pool.submit(_fill_resident, file, block, seed) for seed, file in enumerate(sorted(resident))]
        for i in new:
            count = text["num_experts"]
            step = -(-count // _THREADS)
            for first in range(0, count, step):
                seed = 1000 * (i + 1) + first
                jobs.append(
                    pool.submit(_fill_records, contents[i], range(first, min(first + step, count)), block, seed)
                )
        for job in jobs:
            job.result()
    return unfinished.rename(folder)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's JSON header, and the byte at which its data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _fill_records(path: Path, experts: range, block: np.ndarray, seed: int) -> None:
    header, start = _header(path)
    layout = RecordLayout.from_json(json.loads(header["__metadata__"]["layout"]))
    start += header[TENSOR]["data_offsets"][0]
    rng = np.random.default_rng(seed)
    record, weights = np.zeros(layout.stride, np.uint8), []
    for name, projection in layout.projections:
        columns = layout.intermediate_size if name == "down_proj" else layout.hidden_size
        weight, *others = projection.parts
        weights.append(weight)
        for part, value in zip(others, _scale_and_bias(columns, QUANTIZATION), strict=True):
            record[part.offset : part.offset + part.nbytes] = _bfloat16(np.full(part.nbytes // 2, value))
    with path.open("r+b") as file:
        for expert in experts:
            for part in weights:
                record[part.offset : part.offset + part.nbytes] = _cut(block, part.nbytes, rng)
            _write(file, start + expert * layout.stride, record)


def _fill_resident(path: Path, block: np.ndarray, seed: int) -> None:
    header, start = _header(path)
    header.pop("__metadata__", None)
    rng = np.random.default_rng(seed)
    with path.open("r+b") as file:
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            _write(file, start + first, _values(name, entry, last - first, header, block, rng))


def _values(
    name: str, entry: dict[str, Any], nbytes: int, header: dict[str, Any], block: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Bytes of a resident tensor: random weights that keep activations near one, ones for norms, zeros for decays."""
    if entry["dtype"] == "U32":
        return _cut(block, nbytes, rng)
    if name.endswith((".scales", ".biases")):
        module = name.rpartition(".")[0]
        q = GATES if module.endswith(("mlp.gate", "shared_expert_gate")) else QUANTIZATION
        columns = header[f"{module}.weight"]["shape"][1] * 32 // q.bits
        scale, bias = _scale_and_bias(_EMBEDDING_COLUMNS if "embed_tokens" in name else columns, q)
        return _bfloat16(np.full(nbytes // 2, scale if name.endswith(".scales") else bias))
    if name.endswith("conv1d.weight"):
        return _bfloat16(0.5 * rng.standard_normal(nbytes // 2))
    return _bfloat16(np.full(nbytes // 2, 0.0 if name.endswith(("A_log", "dt_bias")) else 1.0))


def _scale_and_bias(columns: int, q: Quantization) -> tuple[float, float]:
    """Of a group, for random codes: weights lie within about 2 / √columns of zero, and their mean is zero.

    With another mean, what all activations have in common would grow from layer to layer, and all tokens would go to the
    same experts. So the scale is a power of two, whose bias bfloat16 holds exactly.
    """
    scale = 2.0 ** round(np.log2(columns**-0.5 / (1 << (q.bits - 2))))
    return scale, -scale * ((1 << q.bits) - 1) / 2


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Bytes of values, rounded towards zero."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _cut(block: np.ndarray, nbytes: int, rng: np.random.Generator) -> np.ndarray:
    """So many bytes of the block from a random place, which goes on at its beginning.

    Two matrices may not begin at the same place: an output head that equals the embedding draws each token again.
    """
    start = 4 * int(rng.integers(block.size // 4))
    if start + nbytes <= block.size:
        return block[start : start + nbytes]
    return np.resize(np.roll(block, -start), nbytes)


def _write(file: Any, offset: int, data: np.ndarray) -> None:
    done = 0
    while done < data.nbytes:
        done += os.pwrite(file.fileno(), data[done:].data, offset + done)
