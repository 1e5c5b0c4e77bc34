"""Conversations: turns with tools, and saved conversations."""

from .conversation import Conversation

__all__ = ["Conversation"]
