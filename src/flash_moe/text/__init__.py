"""Converts text to token ids and back: tokenizer, chat template and streaming detokenizer."""

from .chat_template import ChatTemplate
from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer"]
