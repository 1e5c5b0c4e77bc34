"""Enforces a grammar through llguidance, which is imported on first use."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import lru_cache
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import ArgumentError, FormatError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 16  # number of compiled grammars to keep; a conversation uses the same tools in every turn
_FUEL = 20_000_000  # work of the lexer between two masks; the default of 200,000 ended replies after 5 ms of work


class Vocabulary(Protocol):
    """The methods of a tokenizer that a grammar uses; :class:`~flash_moe.text.Tokenizer` has it."""

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    def token_bytes(self, size: int) -> tuple[list[bytes], list[int]] | None: ...

    def encode(self, text: str) -> list[int]: ...

    def to_json(self) -> str: ...


def installed() -> bool:
    """Returns whether llguidance can be imported."""
    return importlib.util.find_spec("llguidance") is not None


def require(what: str) -> None:
    """Raises ArgumentError if llguidance, which enforces `what`, is not installed."""
    if not installed():
        raise ArgumentError(f"{what} needs llguidance, which is not installed: pip install 'flash-moe[structured]'")


@lru_cache(256)
def is_empty(terminal: str) -> bool:
    """Returns whether a valid terminal of a grammar matches no text; False without llguidance."""
    if not installed():
        return False
    from llguidance import LLMatcher, LLTokenizer

    grammar = f"%llguidance {{}}\nstart: T\nT: {terminal}"
    if LLMatcher.validate_grammar(grammar):
        return False
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    matcher.compute_bitmask()
    return matcher.is_error() and "NoExtensionBias" in matcher.get_error()


class Grammars:
    """Compiles grammars for one vocabulary in background threads.

    The tables of a vocabulary of 250,000 tokens take seconds. They are computed once, for the first grammar.

    Args:
        vocabulary: the tokenizer.
        size: width of the logits, including padding.
    """

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        self._vocabulary, self.size = vocabulary, size
        self.ends = frozenset(vocabulary.eos_token_ids)
        self._tables: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock = Lock()

    def constraint(self, grammar: str) -> GrammarConstraint:
        """Checks a grammar, starts to compile it, and returns a constraint for one reply.

        Raises:
            ArgumentError: llguidance rejects the grammar.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            from llguidance import LLMatcher

            if problem := LLMatcher.validate_grammar(grammar):
                raise ArgumentError(f"the format cannot be enforced: {_reason(problem)}")
            with self._lock:
                tables = self._tables = self._tables or _in_thread(self._make_tables)
                compiled = self._compiled[grammar] = _in_thread(lambda: _compile(tables.result(), grammar))
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        else:
            with self._lock:
                self._compiled.move_to_end(grammar)
        return GrammarConstraint(compiled, self.ends, self.size)

    def _make_tables(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(self.ends) or None
        found = self._vocabulary.token_bytes(self.size)
        if found is None:
            return LLTokenizer(self._vocabulary.to_json(), n_vocab=self.size, eos_token=ends)
        wrapper = TokenizerWrapper(_Tokens(*found, self._vocabulary.encode, min(self.ends, default=0)))
        return LLTokenizer(wrapper, n_vocab=self.size, eos_token=ends)


class GrammarConstraint:
    """The state of one reply in its grammar; a :class:`~flash_moe.generation.constraint.Constraint`.

    Attributes:
        end: the token that ends the reply if no other token can follow; None leaves the choice to the model.
    """

    def __init__(self, compiled: Future[LLMatcher], ends: frozenset[int], size: int) -> None:
        self._compiled, self._ends, self._size = compiled, ends, size
        self._own: LLMatcher | None = None
        self.end: int | None = None
        self._bits = np.zeros((size + 31) // 32, np.int32)

    def prepare(self) -> None:
        """Waits until the grammar is compiled."""
        self._matcher()

    def begin(self, tokens: Sequence[int]) -> bool:
        """Advances the state by the tokens of a prefill. Returns whether they fit; if not, the state is unchanged."""
        matcher = self._matcher()
        return matcher.validate_tokens(list(tokens)) == len(tokens) and matcher.consume_tokens(list(tokens))

    def allows(self, token: int) -> bool:
        """Returns whether a token may come next. This is much faster than :meth:`allowed`."""
        matcher = self._matcher()
        # If only the end can follow, validate_tokens() rejects even the end.
        return matcher.validate_tokens([token]) == 1 or (token in self._ends and matcher.is_accepting())

    def allowed(self) -> np.ndarray:
        """Returns a mask of the tokens that may come next, [V] bool.

        Raises:
            FormatError: llguidance cannot continue.
        """
        matcher = self._matcher()
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check(matcher)
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._size].view(bool)

    def accept(self, token: int) -> None:
        """Advances the state by an allowed token.

        Raises:
            FormatError: llguidance cannot continue.
        """
        if token not in self._ends:
            matcher = self._matcher()
            matcher.consume_token(token)
            self._check(matcher)

    def forced(self) -> list[int]:
        """Returns the only tokens that can come next, including the end of the reply; empty if there is a choice."""
        matcher = self._matcher()
        if matcher.is_stopped():
            return [] if self.end is None else [self.end]
        return list(matcher.compute_ff_tokens())

    def _matcher(self) -> LLMatcher:
        if self._own is None:
            self._own = self._compiled.result().deep_copy()
        return self._own

    @staticmethod
    def _check(matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise FormatError(f"the reply cannot be kept to its format any longer: {_reason(matcher.get_error())}")


class _Tokens:
    """A tokenizer with the interface that llguidance expects."""

    def __init__(
        self, tokens: list[bytes], special: list[int], encode: Callable[[str], Sequence[int]], end: int
    ) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = end, None
        self._encode = encode
        markers = [re.escape(tokens[id].decode()) for id in special if tokens[id]]
        self._marker = re.compile(f"(?={'|'.join(markers)})" if markers else "(?!)")

    def __call__(self, text: str) -> list[int]:
        """Encodes text that the grammar forces, without special tokens: a marker in it is cut after its first character."""
        cuts = [0, *(match.start() + 1 for match in self._marker.finditer(text)), len(text)]
        return [token for a, b in itertools.pairwise(cuts) if a < b for token in self._encode(text[a:b])]


def _compile(tables: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(step_lexer_fuel=_FUEL)
    matcher = LLMatcher(tables, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ArgumentError(f"the format cannot be enforced: {_reason(matcher.get_error())}")
    return matcher


def _reason(message: str) -> str:
    """Shortens a message of llguidance: removes the state and the grammar that it quotes."""
    text = " ".join(re.split(r"\n\s*\d+ \||\n?<state>", message)[0].split())
    return re.sub(r"oneOf constraints are not supported.*", "the schemas of a oneOf overlap; use anyOf", text)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="flash_moe grammar", daemon=True).start()
    return future
