"""Runs Mixture-of-Experts models far larger than memory: routed experts are streamed from files.

from flash_moe import Model

model = Model.load("demo")
print(model.generate("What is flash_moe?"))
"""

from typing import TYPE_CHECKING, Any

try:
    import mlx.core as _mlx  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"flash_moe needs MLX, which cannot be imported ({error}). MLX has no back end on Linux until one is chosen: "
        'pip install "flash-moe[cpu]", or "flash-moe[cuda13]" for an NVIDIA GPU. A Mac needs Apple silicon.',
        name="mlx",
    ) from error

from .conversation import Conversation
from .errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ConversationError,
    DiskSpaceError,
    ExpertReadError,
    FlashMoEError,
    ForkError,
    FormatError,
    HubError,
    MemoryLimitError,
    ModelClosedError,
    NumericalError,
    PeerError,
    PromptError,
    TokenizerError,
    ToolCallError,
)
from .generation.result import Chunk, Generation
from .generation.sampling import TokenLogprobs
from .generation.stats import Stats
from .model import Model
from .notebook.live import show
from .progress import Progress
from .text.call_reader import ToolCall
from .text.tool_calls import parse_tool_calls

if TYPE_CHECKING:
    from .models.adapted import stream_experts
    from .packing.convert import convert
    from .packing.verify import verify

__version__ = "0.2.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "Conversation",
    "ConversationError",
    "DiskSpaceError",
    "ExpertReadError",
    "FlashMoEError",
    "ForkError",
    "FormatError",
    "Generation",
    "HubError",
    "MemoryLimitError",
    "Model",
    "ModelClosedError",
    "NumericalError",
    "PeerError",
    "Progress",
    "PromptError",
    "Stats",
    "TokenLogprobs",
    "TokenizerError",
    "ToolCall",
    "ToolCallError",
    "__version__",
    "convert",
    "parse_tool_calls",
    "show",
    "stream_experts",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that ``import flash_moe`` stays fast."""
    if name == "convert":
        from .packing.convert import convert

        return convert
    if name == "stream_experts":
        from .models.adapted import stream_experts

        return stream_experts
    if name == "verify":
        from .packing.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
