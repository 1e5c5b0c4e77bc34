"""Every error flash_moe raises on purpose.

    FlashMoEError
    ├── ConfigError          config.json is missing, unreadable, or describes a model we cannot run
    ├── CheckpointError      the files are not what they should be: missing, truncated, malformed, wrong shape
    │   └── ExpertReadError  the bytes of one expert could not be read (names file, layer and expert)
    ├── DiskSpaceError       not enough free space for what was about to be written
    ├── HubError             a download failed, or offline mode forbids it
    ├── TokenizerError       no usable tokenizer, or a chat template that fails
    ├── ToolCallError        a reply holds a tool call that is cut, malformed or not offered
    ├── FormatError          a reply is not in the format that was asked for, or cannot be kept to it
    ├── ArgumentError        an argument is out of range; also a ValueError
    │   └── PromptError      the prompt is empty, too long, or holds a token id outside the vocabulary
    └── NumericalError       the network produced NaN where a decision depends on it

Messages say what was found, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any


class FlashMoEError(Exception):
    """Base of every error raised by flash_moe."""


class ConfigError(FlashMoEError):
    """The configuration is missing, malformed, or describes an unsupported model."""


class CheckpointError(FlashMoEError):
    """A checkpoint's files are missing, truncated, malformed or of the wrong shape."""


class ExpertReadError(CheckpointError):
    """The record of one expert could not be brought into view.

    Attributes:
        file: path of the file that was read.
        layer: index of the decoder layer.
        expert: index of the expert within the layer.
    """

    def __init__(self, file: str, layer: int, expert: int, reason: str) -> None:
        super().__init__(f"expert {expert} of layer {layer} could not be read from {file}: {reason}")
        self.file = file
        self.layer = layer
        self.expert = expert


class DiskSpaceError(FlashMoEError):
    """There is not enough free disk space; nothing was written."""


class HubError(FlashMoEError):
    """A checkpoint could not be obtained from the Hugging Face hub."""


class TokenizerError(FlashMoEError):
    """The tokenizer or the chat template is missing or cannot be used."""


class ToolCallError(FlashMoEError):
    """A tool call in a model's reply is cut, malformed, or not as the functions' schemas say.

    Attributes:
        calls: the well-formed calls of the reply.
    """

    def __init__(self, message: str, calls: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.calls = calls


class FormatError(FlashMoEError):
    """A reply does not fit the format that was asked for: it was cut, or what reads it refuses it."""


class ArgumentError(FlashMoEError, ValueError):
    """An argument is outside its valid range."""


class PromptError(ArgumentError):
    """A prompt is empty, longer than the model's maximum, or holds an invalid token id."""


class NumericalError(FlashMoEError):
    """The network produced NaN where a routing or sampling decision depends on it."""
