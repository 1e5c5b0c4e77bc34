"""Maps tensor names in checkpoints to the canonical names of the network.

The canonical name of a tensor is its path in the decoder, without a prefix: ``layers.3.self_attn.q_proj.weight``,
``embed_tokens.weight``, ``norm.weight``, ``lm_head.weight``. Routed experts are named by :class:`ExpertTensor`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_IGNORED = ("mtp.", "visual.", "vision_tower.", "multi_modal_projector.")
_EXPERT = re.compile(
    r"layers\.(?P<layer>\d+)\.mlp\.(?:switch_mlp|experts(?:\.(?P<expert>\d+))?)\."
    r"(?P<projection>gate_proj|up_proj|down_proj|gate_up_proj)(?:\.(?P<part>weight|scales|biases|global_scale))?$"
)
_LONGEST_NAME = 255  # maximum bytes of a file name on all common file systems
_MODULE_PARTS = (".weight", ".scales", ".biases", ".bias", ".global_scale")


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of routed experts, for all experts of a layer (``expert`` is None) or for one expert."""

    layer: int
    expert: int | None
    projection: str
    part: str


def canonical_name(name: str) -> str | None:
    """Returns the name without its prefix; None for tensors that text decoding does not need (vision, MTP)."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return None if name.startswith(_IGNORED) or ".mtp." in name else name


def expert_tensor(canonical: str) -> ExpertTensor | None:
    """Parses the canonical name of a tensor of routed experts; returns None for a resident tensor."""
    if (match := _EXPERT.match(canonical)) is None:
        return None
    expert = match["expert"]
    return ExpertTensor(
        int(match["layer"]), None if expert is None else int(expert), match["projection"], match["part"] or "weight"
    )


def expert_module(layer: int, projection: str) -> str:
    """Returns the canonical path of a projection of a layer's routed experts."""
    return f"layers.{layer}.mlp.switch_mlp.{projection}"


def expert_modules(layer: int, projection: str, *, fused: bool) -> list[str]:
    """Returns paths of a projection in config.json, the most specific first; it may be fused there."""
    names = ["gate_up_proj", "gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
    if projection in ("gate_proj", "up_proj"):
        names = ["gate_up_proj", projection] if fused else [projection, "gate_up_proj"]
    return [expert_module(layer, name) for name in names]


def is_file_name(value: object) -> bool:
    """Returns whether a value from a checkpoint is the name of a file in its own folder, not a path outside it."""
    if not isinstance(value, str) or Path(value).name != value or value == ".." or "\0" in value:
        return False
    return len(value.encode(errors="replace")) <= _LONGEST_NAME and value.isprintable()


def module_path(canonical: str) -> str:
    """Returns the path of the module that owns a tensor: ``layers.0.mlp.gate.weight`` belongs to ``layers.0.mlp.gate``."""
    for part in _MODULE_PARTS:
        if canonical.endswith(part):
            return canonical[: -len(part)]
    return canonical


def is_stacked(name: str) -> bool:
    """Returns whether a stored name is mlx-lm's name for a projection of all experts."""
    return ".switch_mlp." in name
