"""Runs the command `flash-moe` for `python -m flash_moe`."""

from .cli import main

if __name__ == "__main__":
    main()
