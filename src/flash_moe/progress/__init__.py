"""How far long work is: what callers are told, and bars and lines for people who wait."""

from .display import Display, ask, following
from .report import Callback, Progress, ProgressOption

__all__ = ["Callback", "Display", "Progress", "ProgressOption", "ask", "following"]
