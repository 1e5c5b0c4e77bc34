"""Runs the command `flash-moe` for `python -m flash_moe`."""

import sys

try:
    from .cli import main
except KeyboardInterrupt:  # importing takes a second
    sys.exit(130)

if __name__ == "__main__":
    main()
