"""Formats numbers for people."""

from __future__ import annotations


def percent(share: float) -> str:
    """Formats a share from 0 to 1 for people: only 1 is "100%", and only 0 is "0%"."""
    if 0 < share < 1:
        return "<1%" if share < 0.01 else f"{min(round(100 * share), 99)}%"
    return f"{share:.0%}"


def format_bytes(count: float) -> str:
    """Formats a number of bytes for people: 7,077,888 is "7.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_memory(count: float) -> str:
    """Formats a size of memory as Apple does, in units of 1,024: 51,539,607,552 bytes are "48 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1023.95:
            return f"{count:.1f}".removesuffix(".0") + f" {unit}"
        count /= 1024
    return f"{count:.1f}".removesuffix(".0") + " TB"


def format_seconds(seconds: float) -> str:
    """Formats a time for people: "0.42 s", "12 s", "3:20 min", "1:02:03 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
