"""Runs the command `flash-moe` for `python -m flash_moe`."""

from flash_moe_command import main

if __name__ == "__main__":
    main()
