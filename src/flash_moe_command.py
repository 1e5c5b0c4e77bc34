"""The program `flash-moe`: a module beside the package, since the package cannot be imported without MLX."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; without MLX it says how to install it."""
    try:
        from flash_moe.cli import main as run
    except ImportError as error:
        if error.name != "mlx":
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # importing takes a second
        sys.exit(130)
    run()
