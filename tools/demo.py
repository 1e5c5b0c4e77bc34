"""`make demo`: the main job from end to end, on the small model that comes with the library.

Inspects and verifies its packed files, asks it two questions and has it call a tool; experts are streamed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
ASKED = (
    ["How much memory do I need for Qwen3.5-397B?"],
    ["Why can a laptop run a model that is larger than its memory?", "--experts-per-token", "own"],
)


def run(shown: str, *arguments: str) -> None:
    """Runs Python with these arguments, after showing what a user would type."""
    print(f"\n$ {shown}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def main() -> None:
    for command in (["info", "demo"], ["verify", "demo"], *(["generate", "demo", *asked] for asked in ASKED)):
        run(f"flash-moe {shlex.join(command)}", "-m", "flash_moe", *command)
    run("python examples/tool_calls.py", str(EXAMPLES / "tool_calls.py"))
    print("\nThe same with a large model: flash-moe generate ORG/NAME, see README.md")


if __name__ == "__main__":
    main()
