"""Where a completion ends, as text: stop strings, and the text that is certain so far.

Owns matching across token borders. Knows ids and text, no arrays: the end-of-text token is checked on the
device, by the engine. The trap: text that could become a stop string must not be shown before it is known not
to.
"""

from collections.abc import Iterable

from falcon_jax.errors import RequestError
from falcon_jax.tokenizer import IncrementalDecoder, Tokenizer


def check_stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """`stop` as a tuple of strings; one string counts as a tuple of one.

    Raises:
      RequestError: something that is not a string, or the empty string, which would stop everywhere.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for item in stops:
        if not isinstance(item, str) or not item:
            raise RequestError(f"stop={item!r} is not a stop string: each must be a string of at least one character")
    return stops


class StopMatcher:
    """Finds the stop string that completes first in a text that arrives in pieces of any size.

    Of several that complete at the same character, the longest counts. How the text is cut into pieces never
    changes the result.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""  # the longest end of the text that some stop string starts with
        self.matched = False

    def push(self, text: str) -> str:
        """Takes the next piece; returns the text that is certain to come before any stop string."""
        if self.matched:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.matched = True
            self._held = ""
            return text[: min(ends)[1]]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Returns the text still held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


class RowText:
    """The text of one row, token by token, up to its end.

    `token_ids` end with the end-of-text token or with the token that completes a stop string; `text` holds
    neither. Without a tokenizer `text` stays empty, and there can be no stop strings.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: tuple[str, ...], eos_token_ids: tuple[int, ...]):
        self.token_ids: list[int] = []
        self.stopped = False
        self._pieces: list[str] = []
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._eos_token_ids = eos_token_ids

    @property
    def text(self) -> str:
        """All the text returned so far."""
        return "".join(self._pieces)

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens, dropping those after the end; returns the text that they make certain."""
        pieces = [self._push_one(int(token)) for token in token_ids]
        self._pieces.extend(pieces)
        return "".join(pieces)

    def finish(self) -> str:
        """Ends a row that ran out of tokens; returns the text that was held back."""
        piece = "" if self.stopped else self._release()
        self._pieces.append(piece)
        return piece

    def _push_one(self, token: int) -> str:
        if self.stopped:
            return ""
        self.token_ids.append(token)
        if token in self._eos_token_ids:
            self.stopped = True
            return self._release()
        if self._decoder is None:
            return ""
        piece = self._matcher.push(self._decoder.push([token]))
        self.stopped = self._matcher.matched
        return piece

    def _release(self) -> str:
        if self._decoder is None:
            return ""
        return self._matcher.push(self._decoder.flush()) + self._matcher.flush()
