"""Conversations: turns with tools, and files in which they are kept."""

from .chat import Conversation

__all__ = ["Conversation"]
