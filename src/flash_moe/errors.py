"""The tree of errors that flash_moe raises.

    FlashMoEError
    ├── ConfigError          config.json is missing or unreadable, or of an unsupported model
    ├── CheckpointError      a file is missing, truncated or malformed, or a tensor misfits
    │   └── ExpertReadError  an expert could not be read; names file, layer and expert
    ├── DiskSpaceError       not enough free disk space for a download or a conversion
    ├── MemoryLimitError     the model needs more memory than the process may use
    ├── HubError             a download failed, or offline mode forbids it
    ├── TokenizerError       no usable tokenizer, or a chat template that fails
    ├── ToolCallError        a reply holds a tool call that is cut, malformed or not offered
    ├── FormatError          a reply does not fit the requested format
    ├── ConversationError    a saved conversation is damaged, or of another model or settings
    ├── ArgumentError        an argument is out of range; also a ValueError
    │   └── PromptError      the prompt is empty or too long, or has an unknown token id
    ├── NumericalError       the network produced NaN where a decision depends on it
    ├── PeerError            another machine of a group failed, hangs or has other settings
    ├── ModelClosedError     the model was closed, before or during the call
    ├── ForkError            the model was loaded before a fork, and is used in the child
    └── Cancelled            the caller cancelled the work

Each message says what was found, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any


class FlashMoEError(Exception):
    """Base of every error raised by flash_moe."""


class ConfigError(FlashMoEError):
    """The configuration is missing, malformed, or describes an unsupported model."""


class CheckpointError(FlashMoEError):
    """A file of a checkpoint is missing, truncated or malformed, or a tensor has the wrong shape."""


class ExpertReadError(CheckpointError):
    """The record of one expert could not be read.

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


class MemoryLimitError(FlashMoEError):
    """The process may use less memory than the model needs, so the system would end it."""


class HubError(FlashMoEError):
    """A checkpoint could not be obtained from the Hugging Face hub."""


class TokenizerError(FlashMoEError):
    """The tokenizer or the chat template is missing or cannot be used."""


class ToolCallError(FlashMoEError):
    """A tool call in a reply is cut or malformed, or does not fit the schema of its function.

    Attributes:
        calls: the well-formed calls of the reply.
    """

    def __init__(self, message: str, calls: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.calls = calls


class FormatError(FlashMoEError):
    """A reply does not fit the requested format: it was cut, or its parser rejected it."""


class ConversationError(FlashMoEError):
    """A saved conversation is damaged, or was saved with another checkpoint or other settings."""


class ArgumentError(FlashMoEError, ValueError):
    """An argument is outside its valid range."""


class PromptError(ArgumentError):
    """A prompt is empty, longer than the model's maximum, or holds an invalid token id."""


class NumericalError(FlashMoEError):
    """The network produced NaN where a routing or sampling decision depends on it, or weights are not finite."""


class PeerError(FlashMoEError):
    """Another rank of a group of machines stopped, hangs, failed, or has different settings."""


class ModelClosedError(FlashMoEError):
    """The model was closed. A running generation ends with this error."""

    def __init__(self) -> None:
        super().__init__("the model was closed and cannot be used any more; load it again")


class ForkError(FlashMoEError):
    """A model is loaded or used in a fork of a process that loaded one; its threads do not exist there."""

    def __init__(self, process: int) -> None:
        super().__init__(
            f"a model was loaded in process {process}, and this is a fork of it, in which MLX and the threads that read "
            "experts do not run; start processes with the method 'spawn' of multiprocessing, and load the model there"
        )


class Cancelled(FlashMoEError):
    """The caller cancelled the work."""
