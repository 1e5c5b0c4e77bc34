"""A conversion that is killed at its n-th step.

    python interrupted.py SOURCE DESTINATION N [OPTIONS]

A step is a change of the file system below the folder of DESTINATION, or a report of progress. Without being killed it
prints how many steps there were. OPTIONS are further arguments of ``convert``, as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from flash_moe.packing.convert import convert

source, destination, deadline = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
steps = 0


def step() -> None:
    global steps
    steps += 1
    if steps == deadline:
        os.kill(os.getpid(), signal.SIGKILL)


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(destination.parent) in str(
        arguments[0]
    ):
        step()


sys.addaudithook(hook)
options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
convert(source, destination, progress=lambda progress: step(), **options)
print(steps)
