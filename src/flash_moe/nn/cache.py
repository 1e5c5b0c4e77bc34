"""The caches of a sequence: each layer has keys and values, or a recurrent state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np

from ..config import FULL_ATTENTION, ModelConfig

KV_STEP = 256  # the capacity of a KV cache is a multiple of this number


class KVCache:
    """The keys and values of all tokens so far, in memory that grows in steps.

    Shape:
        keys, values: [1, Hkv, capacity, D], of which the first ``length`` tokens are valid.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        self._shape = (1, config.num_key_value_heads, KV_STEP, config.head_dim)
        self._dtype = dtype
        self.keys = self.values = mx.zeros((*self._shape[:2], 0, self._shape[3]), dtype=dtype)
        self.length = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values [1, Hkv, T, D], and returns those of all tokens, [1, Hkv, S, D]."""
        start = self.length
        self._lengthen(keys.shape[2])
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _lengthen(self, tokens: int) -> None:
        self.length += tokens
        if self.length > self.keys.shape[2]:
            room = mx.zeros((*self._shape[:2], self._more(), self._shape[3]), dtype=self._dtype)
            self.keys = mx.concatenate([self.keys, room], axis=2)
            self.values = mx.concatenate([self.values, room], axis=2)

    def extend(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes room for further tokens, whose keys and values the caller writes in place.

        Returns:
            The keys and values, [Hkv, capacity, D], in the memory of the cache.
        """
        self._lengthen(tokens)
        mx.eval(self.keys, self.values)
        return np.array(self.keys, copy=False)[0], np.array(self.values, copy=False)[0]

    def _more(self) -> int:
        """Returns the number of tokens to add: those needed, or at least an eighth of the length."""
        capacity = self.keys.shape[2]
        return -(-max(self.length - capacity, capacity // 8) // KV_STEP) * KV_STEP

    def undo(self) -> Callable[[], None]:
        """Returns a function that removes the tokens that are added from now on.

        Their keys and values are then written again.
        """
        return partial(self.cut_back, self.length)

    def cut_back(self, length: int) -> None:
        """Truncates the cache to its first ``length`` tokens."""
        self.length = length

    def fork(self, length: int) -> KVCache:
        """Returns a copy of the cache with the first ``length`` tokens."""
        other = copy.copy(self)
        # Evaluated now and never a view, because the memory of this cache may be written in place later.
        other.length, other.keys, other.values = length, self.keys[:, :, :length] * 1, self.values[:, :, :length] * 1
        mx.eval(other.keys, other.values)
        return other

    def holds(self, length: int) -> bool:
        """Returns whether the cache can be truncated to ``length``."""
        return length <= self.length

    @property
    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values]


class DeltaCache:
    """The recurrent state of a Gated DeltaNet layer. Its size does not depend on the number of tokens.

    A state cannot be truncated, so copies at certain lengths, the marks, are kept.

    Shape:
        conv: [taps - 1, C], the last inputs of the convolution.
        state: [Hv, Dv, Dk] float32.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        channels = 2 * config.key_dim + config.value_dim
        heads, dv, dk = config.linear_num_value_heads, config.linear_value_head_dim, config.linear_key_head_dim
        self.conv = mx.zeros((config.linear_conv_kernel_dim - 1, channels), dtype=dtype)
        self.state = mx.zeros((heads, dv, dk), dtype=mx.float32)
        self.length = 0
        self._changes_in_place = False
        self.wanted: Collection[int] = ()
        self.marks: dict[int, tuple[mx.array, mx.array]] = {}

    def spans(self, tokens: int) -> list[int]:
        """Returns the lengths of the spans into which marks divide the next ``tokens`` tokens."""
        cuts = [cut for length in sorted(self.wanted) if 0 < (cut := length - self.length) < tokens]
        return [end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)]

    def in_place(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the convolution and recurrent states in memory that the caller updates in place for further tokens.

        Until the caller calls :meth:`changed`, the length is greater than that of the states, so that an interrupted
        update is detected.
        """
        if not self._changes_in_place:
            self.conv, self.state = mx.array(np.array(self.conv)), mx.array(np.array(self.state))
            self._changes_in_place = True
        mx.eval(self.conv, self.state)
        self.length += tokens
        return np.array(self.conv, copy=False), np.array(self.state, copy=False)

    def kept(self) -> tuple[mx.array, mx.array]:
        """Returns the current states for keeping. Later updates in place change a copy of them."""
        self._changes_in_place = False
        return self.conv, self.state

    def changed(self) -> None:
        """Ends an update in place, and keeps a copy of the states if a mark is requested at this length."""
        if self.length in self.wanted:
            self.marks[self.length] = mx.array(np.array(self.conv)), mx.array(np.array(self.state))

    def advance(self, tokens: int, conv: mx.array, state: mx.array) -> None:
        """Replaces the states by those after further tokens."""
        self.conv, self.state, self.length = conv, state, self.length + tokens
        self._changes_in_place = False
        if self.length in self.wanted:
            self.marks[self.length] = conv, state

    def undo(self) -> Callable[[], None]:
        """Returns a function that removes the tokens added from now on. It keeps the old states in memory."""
        before = *self.kept(), self.length

        def restore() -> None:
            self.conv, self.state, self.length = before

        return restore

    def cut_back(self, length: int) -> None:
        """Truncates the cache to a mark."""
        (self.conv, self.state), self.length = self.marks[length], length
        self._changes_in_place = False

    def fork(self, length: int) -> DeltaCache:
        """Returns a copy of the cache with the first ``length`` tokens: all of them, or those up to a mark."""
        self.kept()
        other = copy.copy(self)
        other.marks = {mark: states for mark, states in self.marks.items() if mark <= length}
        if length < self.length:
            other.cut_back(length)
        return other

    def holds(self, length: int) -> bool:
        """Returns whether the cache can be truncated to ``length``."""
        return length in self.marks

    @property
    def arrays(self) -> list[mx.array]:
        return [self.conv, self.state]


def layer_cache(config: ModelConfig, layer: int, dtype: mx.Dtype) -> KVCache | DeltaCache:
    """Returns an empty cache of the kind that a layer needs."""
    return (KVCache if config.layer_types[layer] == FULL_ATTENTION else DeltaCache)(config, dtype)


class SequenceCache:
    """The caches of all layers of one sequence.

    Attributes:
        tokens: the token ids in the caches.
        marks: lengths to which the caches can be truncated.
    """

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        self.layers = [layer_cache(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.tokens: list[int] = []
        self.marks: list[int] = []

    @property
    def length(self) -> int:
        """The number of tokens in the layers."""
        return self.layers[0].length

    @property
    def sound(self) -> bool:
        """Whether all layers hold the same number of tokens, which is not the case after a failed pass."""
        return all(layer.length == len(self.tokens) for layer in self.layers)

    def mark(self, lengths: Sequence[int]) -> None:
        """Requests marks at the current length or at greater ones, and drops all other marks."""
        self.marks = sorted(lengths)
        for layer in self._delta_layers:
            layer.wanted = frozenset(lengths)
            layer.marks = {length: layer.marks[length] for length in lengths if length in layer.marks}
            if layer.length in lengths:
                layer.marks[layer.length] = layer.kept()

    def reach(self, length: int) -> int:
        """Returns the greatest length, at most ``length``, to which the cache can be truncated; 0 if there is none."""
        return max((mark for mark in self.marks if mark <= length), default=0)

    def cut_back(self, length: int) -> None:
        """Truncates all caches to ``length``, which is a mark."""
        for layer in self.layers:
            layer.cut_back(length)
        del self.tokens[length:]
        self.mark([mark for mark in self.marks if mark <= length])

    def fork(self, length: int) -> SequenceCache:
        """Returns a copy of the cache with the first ``length`` tokens: all of them, or those up to a mark."""
        other = copy.copy(self)
        other.layers, other.tokens = [layer.fork(length) for layer in self.layers], self.tokens[:length]
        other.mark([mark for mark in self.marks if mark <= length])
        return other

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Restores the cache if the pass inside the block fails. Old recurrent states stay in memory meanwhile."""
        count, undoing = len(self.tokens), [layer.undo() for layer in self.layers]
        try:
            yield
        except BaseException:
            del self.tokens[count:]
            for undo in undoing:
                undo()
            raise

    def recover(self) -> bool:
        """Repairs a cache after a failed pass: truncates it to a mark that all layers hold.

        Returns:
            Whether there is such a mark.
        """
        if self.sound:
            return True
        if held := self.held:
            self.cut_back(held[-1])
        return bool(held)

    @property
    def held(self) -> list[int]:
        """Returns the lengths to which the cache can be truncated now, ascending."""
        marks = [mark for mark in self.marks if mark <= len(self.tokens) and all(x.holds(mark) for x in self.layers)]
        return [*marks, len(self.tokens)] if self.sound else marks

    @property
    def _delta_layers(self) -> list[DeltaCache]:
        return [layer for layer in self.layers if isinstance(layer, DeltaCache)]

    @property
    def arrays(self) -> list[mx.array]:
        """Returns all arrays, to evaluate or measure them."""
        return [array for layer in self.layers for array in layer.arrays]

    @property
    def marked_arrays(self) -> list[mx.array]:
        """Returns the arrays of the marks."""
        return [array for layer in self._delta_layers for mark in layer.marks.values() for array in mark]

    @property
    def nbytes(self) -> int:
        """The bytes of all caches and marks."""
        return sum(array.nbytes for array in self.arrays + self.marked_arrays)
