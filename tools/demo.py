"""`make demo`: the main job from end to end on a small model with random weights.

Writes a checkpoint in Hugging Face's format, converts it to the packed form, and generates with the experts streamed
from the packed files.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from random_checkpoint import text_config, write_checkpoint

PROMPT = "Why can a laptop run a model that is larger than its memory?"


def run(folder: str, *arguments: str) -> None:
    """Runs a flash-moe command in ``folder``, after showing it."""
    print(f"\n$ flash-moe {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "flash_moe", *arguments], check=True, cwd=folder)


def main() -> None:
    print(
        "flash_moe demo. The model is small and its weights are RANDOM, so its answer is noise;\n"
        "everything else (formats, conversion, streamed experts, statistics) is the real thing.",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="flash-moe-demo-") as folder:
        text = text_config(
            hidden_size=256, num_hidden_layers=8, num_experts=64, num_experts_per_tok=10,
            moe_intermediate_size=128, shared_expert_intermediate_size=128,
        )  # fmt: skip
        write_checkpoint(Path(folder) / "random-moe", text)
        run(folder, "convert", "random-moe", "random-moe-4bit", "--bits", "4")
        run(folder, "info", "random-moe-4bit")
        run(folder, "verify", "random-moe-4bit")
        run(folder, "generate", "random-moe-4bit", PROMPT, "--max-tokens", "64")
    print("\nThe same with a real model: flash-moe generate ORG/NAME, see README.md")


if __name__ == "__main__":
    main()
