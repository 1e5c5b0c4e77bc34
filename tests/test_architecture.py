"""Who may import whom, and other rules about the source that a test can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_moe
from flash_moe.models import FAMILIES

SRC = Path(__file__).parents[1] / "src"
PACKAGE = SRC / "flash_moe"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = {
    "amounts",
    "bench",
    "checkpoint",
    "checks",
    "closing",
    "config",
    "conversation",
    "evaluation",
    "experts",
    "formats",
    "generation",
    "language_model",
    "loading",
    "machines",
    "model",
    "models",
    "nn",
    "notebook",
    "ops",
    "packing",
    "planning",
    "progress",
    "proofs",
    "record",
    "rope",
    "server",
    "share",
    "shipped",
    "structured",
    "text",
    "user_cache",
    "version",
}

MAY_IMPORT = {
    "cli": EVERYTHING,
    "__main__": {"cli"},
    "__init__": {"notebook", "model", "models", "conversation", "generation", "text", "packing", "progress"},
    "evaluation": {
        "model",
        "loading",
        "models",
        "generation",
        "text",
        "nn.layerwise",
        "nn.linear",
        "nn.network",
        "nn.streaming_options",
        "experts",
        "ops",
        "checkpoint",
    },
    "server": {"model", "generation", "text"},
    "planning": {
        "bench",
        "loading",
        "models",
        "generation",
        "nn.cpu_timed",
        "nn.layer_work",
        "nn.linear",
        "nn.network",
        "nn.timed",
        "ops",
        "experts",
        "checkpoint",
        "formats",
        "record",
    },
    "bench": {"model", "models", "generation", "experts", "checkpoint"},
    "proofs": {"ops", "formats", "record", "rope", "user_cache"},
    "model": {
        "machines",
        "notebook",
        "language_model",
        "progress",
        "conversation",
        "loading",
        "models",
        "generation",
        "text",
        "nn",
        "experts",
        "checkpoint",
    },
    "language_model": {
        "text_generation",
        "progress",
        "generation",
        "structured",
        "text",
        "nn",
        "experts.store",
    },
    "text_generation": {"progress", "generation", "structured", "text"},
    "loading": {"machines", "share", "models", "experts", "progress", "nn", "ops", "proofs", "record"},
    "conversation": {
        "notebook",
        "language_model",
        "structured",
        "generation",
        "progress",
        "text",
        "nn",
    },
    "models": {
        "nn",
        "ops",
        "experts.store",
        "experts.opening",
        "machines",
        "share",
        "checkpoint",
        "config",
        "formats",
        "record",
        "rope",
    },
    "packing": {
        "progress",
        "share",
        "models",
        "text",
        "nn.layerwise",
        "experts",
        "ops",
        "checkpoint",
        "formats",
        "record",
    },
    "generation": {"notebook", "progress", "text", "nn", "experts.store"},
    "nn": {"machines", "share", "ops", "experts.store", "config", "formats", "record"},
    "experts": {"notebook", "checkpoint", "formats", "record", "user_cache"},
    "ops": {"formats", "record", "shipped", "user_cache"},
    "checkpoint": {"share", "progress", "formats", "record", "shipped"},
    "machines": {"share"},
    "share": set(),
    "structured": {"generation.constraint", "text"},
    "text": set(),
    "config": {"record", "rope"},
    "record": {"formats"},
    "formats": set(),
    "rope": set(),
    "shipped": set(),
    "checks": set(),
    "closing": set(),
    "amounts": set(),
    "limits": set(),
    "mlx_cache": set(),
    "dtypes": set(),
    "errors": set(),
    "notebook": {"progress"},
    "progress": set(),
    "user_cache": set(),
}

PUBLIC = [
    "ArgumentError", "CheckpointError", "Chunk", "ConfigError", "Conversation", "ConversationError", "DiskSpaceError",
    "ExpertReadError", "FlashMoEError", "ForkError", "FormatError", "Generation", "HubError", "MemoryLimitError",
    "Model", "ModelClosedError", "NumericalError", "PeerError", "Progress", "PromptError", "Stats", "TokenLogprobs",
    "TokenizerError", "ToolCall", "ToolCallError", "__version__", "convert", "parse_tool_calls", "show",
    "stream_experts", "verify",
]  # fmt: skip

HEAVY = [
    "starlette",
    "uvicorn",
    "transformers",
    "jinja2",
    "huggingface_hub",
    "tokenizers",
    "typer",
    "rich",
    "mlx_lm",
    "torch",
    "matplotlib",
    "numba",
    "llguidance",
    "pydantic",
]


def component(file: Path) -> str:
    """The package of flash_moe, or the module beside them, that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[tuple[int, str]]:
    """Line and dotted name, from flash_moe on, of everything of ours that a file imports, anywhere in it."""
    package = file.relative_to(SRC).parent.parts
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .package import module` names a module, `from .module import name` does not
            found += (
                [(node.lineno, module)] if node.module else [(node.lineno, f"{module}.{a.name}") for a in node.names]
            )
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "flash_moe"]


def test_every_component_has_a_rule() -> None:
    assert {component(file) for file in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_design(file: Path) -> None:
    own = component(file)
    for line, name in imports(file):
        target = name.removeprefix("flash_moe").removeprefix(".")
        top = target.split(".")[0]
        allowed = {own, "errors", "checks", "closing", "amounts", "limits", "mlx_cache", "dtypes"} | MAY_IMPORT[own]
        if own in ("cli", "server") and target in ("", "__version__"):
            continue
        assert top in allowed or target in allowed, f"{file.name}:{line}: {own} may not import {target or 'flash_moe'}"


def test_families_are_named_in_their_files_only() -> None:
    """A family of our own is a file and a line of the registry: nothing else asks which one a model is of."""
    names = {name for family in FAMILIES for name in family.model_types}
    found = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"models/qwen3_5.py", "models/qwen3_next.py"}


def test_the_rules_have_no_cycle() -> None:
    rest = {name: {target.split(".")[0] for target in MAY_IMPORT[name]} for name in MAY_IMPORT}
    while rest:
        leaves = {name for name, targets in rest.items() if not targets & set(rest)}
        assert leaves, f"a cycle among {sorted(rest)}"
        rest = {name: targets for name, targets in rest.items() if name not in leaves}


def test_files_have_names_of_their_own() -> None:
    """But for commands, which are named as what they call, and for the arithmetic, whose packages mirror each other."""
    names = [
        file.name
        for file in FILES
        if file.name != "__init__.py" and component(file) != "cli" and file.parent.name not in ("nn", "cpu")
    ]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_command_line_prints(file: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert component(file) == "cli" or not calls, f"print in lines {calls}"


def test_only_one_place_clears_the_cache_of_mlx() -> None:
    """Elsewhere, a sum over machines could be under way: see there."""
    found = [file.name for file in FILES if "mx.clear_cache()" in file.read_text(encoding="utf-8")]
    assert found == ["mlx_cache.py"]


def test_public_names() -> None:
    assert flash_moe.__all__ == PUBLIC
    assert all(hasattr(flash_moe, name) for name in PUBLIC)


def test_every_public_error_is_ours() -> None:
    errors = [getattr(flash_moe, name) for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(error, flash_moe.FlashMoEError) for error in errors)


def test_importing_the_library_loads_nothing_heavy() -> None:
    code = f"import sys, flash_moe; print(*(name for name in {HEAVY} if name in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.stderr, done.stdout.strip()) == ("", "")
