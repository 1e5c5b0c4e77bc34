"""Information from the operating system: machine, memory, and bytes that this process read from disks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from ..limits import memory_limit

_MEMORY = Path("/proc/meminfo")
_IO = Path("/proc/self/io")
_PROCESSORS = Path("/proc/cpuinfo")


def machine_name() -> str:
    """Returns the system, the architecture and the number of cores."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def chip_name() -> str:
    """Returns the GPU that MLX uses, the processor and its number of cores."""
    names = [_processor(), f"{os.cpu_count()} cores"]
    if mx.default_device() != mx.cpu and (gpu := str(mx.device_info().get("device_name", ""))) not in ("", names[0]):
        names.insert(0, gpu)
    return ", ".join(names)


def system_name() -> str:
    """Returns the operating system and its version, the architecture, and Python's version."""
    mac, python = platform.mac_ver()[0], platform.python_version()
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return f"{system}, {platform.machine()}, Python {python}"


def _processor() -> str:
    """Returns the system's name of the processor, or its architecture if there is none."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    else:
        lines = _PROCESSORS.read_text().splitlines() if _PROCESSORS.exists() else []
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.machine()


def available_memory() -> int:
    """Returns the bytes available to programs and the page cache: Linux's estimate, elsewhere three quarters of the
    memory.
    """
    if _MEMORY.exists():
        for line in _MEMORY.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return memory_limit() * 3 // 4


def disk_bytes_read() -> int | None:
    """Returns the bytes that this process has read from disks since its start; None if the system does not count them."""
    if sys.platform != "linux":
        return None
    counters = dict(line.split(": ") for line in _IO.read_text().splitlines())
    return int(counters["read_bytes"])
