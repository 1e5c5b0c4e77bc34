"""`python -m flash_moe` is the command `flash-moe`."""

from .cli import main

if __name__ == "__main__":
    main()
