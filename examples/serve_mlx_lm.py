"""mlx-lm's own server, its experts streamed: python serve_mlx_lm.py --model FOLDER, and all options of mlx_lm.server"""

from typing import Any

import mlx_lm
from mlx_lm import server

import flash_moe


def load(folder: str, **options: Any) -> Any:
    """As ``mlx_lm.load``, with experts that are read when a token asks for them."""
    loaded = mlx_lm.load(folder, lazy=True, **options)
    flash_moe.stream_experts(loaded[0], folder)
    return loaded


server.load = load
server.main()
