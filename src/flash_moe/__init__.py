"""Run Mixture-of-Experts models far larger than memory: routed experts are streamed from files.

from flash_moe import Model

model = Model.load("demo")
print(model.generate("What is flash_moe?"))
"""

try:
    import mlx.core as _mlx  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"flash_moe needs MLX, which cannot be imported ({error}). MLX has no back end on Linux until one is chosen: "
        'pip install "flash-moe[cpu]", or "flash-moe[cuda13]" for an NVIDIA GPU. A Mac needs Apple silicon.',
        name="mlx",
    ) from error

from .errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    ExpertReadError,
    FlashMoEError,
    HubError,
    NumericalError,
    PromptError,
    TokenizerError,
)
from .generation.result import Chunk, Generation
from .model import Model

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DiskSpaceError",
    "ExpertReadError",
    "FlashMoEError",
    "Generation",
    "HubError",
    "Model",
    "NumericalError",
    "PromptError",
    "TokenizerError",
    "__version__",
]
