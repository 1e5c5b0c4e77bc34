"""A checkpoint folder: its shards, and all needed tensors by canonical name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..errors import CheckpointError
from ..record import ExpertShape
from .foreign import adopted, foreign_section
from .integers import IntegerForm
from .names import (
    ExpertTensor,
    canonical_name,
    expert_modules,
    expert_tensor,
    is_file_name,
    is_stacked,
    module_path,
)
from .packed import MANIFEST, Manifest, refuse_lost_manifest
from .quantization import QuantizationMap, StatedQuantization, is_quantized_by_others, refuse_foreign_tensors
from .safetensors import TensorInfo, read_header

_log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
Opened = TypeVar("Opened", bound="Checkpoint")
Names: TypeAlias = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a checkpoint. Opening it reads only headers.

    Tensors that text decoding does not need (vision, MTP) are ignored, and so are files that contain no other tensors.

    Attributes:
        raw_config: the content of config.json.
        shape: what its routed experts are like.
        resident: the tensors of all weights except the routed experts, by canonical name.
        experts: the tensors of the routed experts, by layer, projection, part and expert.
        metadata: the safetensors metadata of each file.
    """

    folder: Path
    raw_config: Mapping[str, Any]
    shape: ExpertShape
    quantization: QuantizationMap
    resident: Mapping[str, TensorInfo]
    experts: Mapping[ExpertTensor, TensorInfo]
    metadata: Mapping[Path, Mapping[str, str]]

    @classmethod
    def open(
        cls: type[Opened],
        folder: Path,
        raw: Mapping[str, Any],
        shape: ExpertShape,
        *,
        names: Names = canonical_name,
        adopt: bool = False,
        **own: Any,
    ) -> Opened:
        """Reads the headers of all shards.

        Args:
            raw: the content of config.json. shape: what its routed experts are like.
            names: function that maps a name in a file to the canonical name, or to None if the tensor is not needed.
            adopt: whether to accept weights that other libraries have quantised (see :mod:`.foreign`).
            own: additional attributes of a subclass.

        Raises:
            CheckpointError: a shard is missing, truncated or malformed, or the index disagrees with the shards.
        """
        foreign = foreign_section(raw) if adopt else None
        form = None if foreign is None else IntegerForm.of(foreign)
        stated = None if form is None else StatedQuantization(form.bits, None)
        quantization = QuantizationMap.from_config(raw, names) if foreign is None else QuantizationMap(stated, {})
        resident: dict[str, TensorInfo] = {}
        experts: dict[ExpertTensor, TensorInfo] = {}
        metadata = {}
        found: dict[str, Path] = {}
        needed: dict[str, TensorInfo] = {}
        refuse_lost_manifest(folder)
        files, index = _weight_files(folder, names)
        for file in files:
            header = read_header(file, lambda name: names(name) is not None)
            metadata[file] = header.metadata
            for name, info in header.tensors.items():
                if (canonical := names(name)) is None:
                    continue
                if name in found:
                    raise CheckpointError(f"tensor {name!r} is in {found[name]} and in {file}; remove the stale file")
                found[name] = file
                if (twin := needed.get(canonical)) is not None:
                    raise _twins(twin, info)
                needed[canonical] = info
        _check_index(index, found)
        if adopt and (foreign is not None or is_quantized_by_others(needed.values())):
            needed, quantization = adopted(needed, foreign or {}), replace(quantization, shapes_decide=True)
        else:
            refuse_foreign_tensors(needed.values())
        for canonical, info in needed.items():
            if (expert := expert_tensor(canonical)) is None:
                resident[canonical] = info
            elif (twin := experts.setdefault(expert, info)) is not info:
                raise _twins(twin, info)
        scales = [([module_path(name)], info) for name, info in resident.items() if name.endswith(".scales")]
        scales += [
            (expert_modules(expert.layer, expert.projection, fused=False), info)
            for expert, info in experts.items()
            if expert.part == "scales"
        ]
        quantization.check_default(scales)
        return cls(folder, raw, shape, quantization, resident, experts, metadata, **own)

    @property
    def follows_mlx(self) -> bool:
        """Whether weights have the form of mlx-lm, as opposed to that of Hugging Face.

        The names of the experts decide: only mlx-lm stacks them under ``switch_mlp``. Packed checkpoints have the form
        of mlx-lm. For models without routed experts, the metadata of the files decides.
        """
        if self.experts:
            return any(is_stacked(info.name) for info in self.experts.values())
        packed = (self.folder / MANIFEST).exists()
        return packed or any(metadata.get("format") == "mlx" for metadata in self.metadata.values())


def _twins(one: TensorInfo, other: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{one.name!r} of {one.file} and {other.name!r} of {other.file} are the same weight; remove the stale one"
    )


def has_all_weights(folder: Path) -> bool:
    """Returns whether all weight files of the index or manifest exist, or any weight file if there is neither."""
    try:
        _weight_files(folder)
        manifest = Manifest.load(folder)
    except CheckpointError:
        return False
    packed = [] if manifest is None else [layer.file for layer in manifest.layers.values()]
    return all(is_file_name(file) and (folder / file).is_file() for file in packed)


def _weight_files(folder: Path, names: Names = canonical_name) -> tuple[list[Path], Mapping[str, str]]:
    """Returns the files to read, and the part of the index for them (empty if the index is stale).

    These are the files of the index with needed tensors or, without an index, all *.safetensors files.
    """
    index = _read_index(folder)
    if not index and (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is packed but lacks {INDEX}; copy that file again, or convert the model again")
    needed = {name: file for name, file in index.items() if names(name) is not None}
    held = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))  # ._x: macOS's notes
    if not needed:
        if not held:
            raise CheckpointError(f"{folder} holds no *.safetensors file; expected the weights of a model there")
        return held, {}
    files = sorted(set(needed.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return [folder / file for file in files], needed if len(files) > 1 else {}  # one file cannot mix two sets
    if others := _instead_of_index(
        needed, missing == files, [file for file in held if file.name not in index.values()]
    ):
        _log.warning("%s names files that are not there; reading %s instead", folder / INDEX, others[0].name)
        return others, {}
    raise CheckpointError(
        f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} names, first {missing[0]}; "
        "finish the download"
    )


def _instead_of_index(needed: Mapping[str, str], all_missing: bool, others: list[Path]) -> list[Path]:
    """Returns the files to read instead of those of a stale index: one file with all tensors, or all other files."""
    if all_missing and not any((file.parent / MANIFEST).exists() for file in others):
        return others
    for file in others:
        with suppress(CheckpointError):
            if needed.keys() <= read_header(file, needed.__contains__).tensors.keys():
                return [file]
    return []


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        valid = isinstance(weight_map, dict) and all(map(is_file_name, weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}); download it again") from error
    if not valid:
        raise CheckpointError(f"{path}: weight_map must name a file of this folder for each tensor; download it again")
    return weight_map


def _check_index(index: Mapping[str, str], found: Mapping[str, Path]) -> None:
    for name, file in index.items():
        if name not in found or found[name].name != file:
            raise CheckpointError(f"{INDEX} says that {file} holds {name!r}, but it does not; download {file} again")
