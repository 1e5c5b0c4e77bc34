"""Progress of long work: reports for callers, and bars and log lines for people."""

from .display import Display, ask, following
from .progress import Callback, Progress, ProgressOption

__all__ = ["Callback", "Display", "Progress", "ProgressOption", "ask", "following"]
