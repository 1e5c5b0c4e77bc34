from __future__ import annotations

import pytest

from flash_moe.checkpoint.names import ExpertTensor, canonical_name, expert_tensor, module_path
from flash_moe.models import FAMILIES, Family


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model.", "language_model."])
@pytest.mark.parametrize("name", ["layers.3.self_attn.q_proj.weight", "embed_tokens.scales", "norm.weight"])
def test_prefixes_are_removed(prefix: str, name: str) -> None:
    assert canonical_name(prefix + name) == name


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_output_head(name: str) -> None:
    assert canonical_name(name) == "lm_head.weight"


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.mlp.gate.weight",
        "model.mtp.norm.weight",
        "language_model.mtp.fc.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "visual.patch_embed.proj.weight",
        "vision_tower.blocks.0.norm1.weight",
        "multi_modal_projector.linear.weight",
    ],
)
def test_tensors_that_text_does_not_need_are_ignored(name: str) -> None:
    assert canonical_name(name) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.12.mlp.switch_mlp.up_proj.scales", ExpertTensor(12, None, "up_proj", "scales")),
        ("layers.0.mlp.experts.gate_up_proj", ExpertTensor(0, None, "gate_up_proj", "weight")),
        ("layers.0.mlp.experts.down_proj", ExpertTensor(0, None, "down_proj", "weight")),
        ("layers.7.mlp.experts.511.gate_proj.weight", ExpertTensor(7, 511, "gate_proj", "weight")),
        ("layers.7.mlp.experts.3.down_proj.biases", ExpertTensor(7, 3, "down_proj", "biases")),
    ],
)
def test_routed_experts(name: str, expected: ExpertTensor) -> None:
    assert expert_tensor(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp.gate.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.shared_expert.up_proj.weight",
        "layers.0.mlp.shared_expert_gate.weight",
        "layers.0.mlp.experts.0.gate_proj.weight_scale_inv",
        "layers.0.mlp.experts.gate_up_proj.extra",
    ],
)
def test_everything_else_is_resident(name: str) -> None:
    assert expert_tensor(name) is None


@pytest.mark.parametrize("part", ["weight", "scales", "biases", "bias"])
def test_module_of_a_tensor(part: str) -> None:
    assert module_path(f"layers.0.mlp.gate.{part}") == "layers.0.mlp.gate"


def test_bare_parameters_are_their_own_module() -> None:
    assert module_path("layers.0.linear_attn.A_log") == "layers.0.linear_attn.A_log"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
@pytest.mark.parametrize("name", ["lm_head.weight", "norm.weight", "layers.0.mlp.gate.scales"])
def test_names_for_mlx_lead_back(family: Family, name: str) -> None:
    assert canonical_name(family.mlx_name(name)) == name
