"""Conversations: turns with tools, and files in which they are kept."""

from .conversation import Conversation

__all__ = ["Conversation"]
