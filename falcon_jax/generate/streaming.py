"""The text of one row while the engine makes it.

Owns how much is made before text is shown. Knows the engine's run and the row's text, and no request.
"""

from collections.abc import Callable, Generator, Iterator

from falcon_jax.generate.engine import Generation
from falcon_jax.generate.stopping import RowText

# What a piece should have: few enough to read along.
NUM_TOKENS = 8


class TextStream(Iterator[str]):
    """Pieces of text, none empty, each final. The prompt is read when the first piece of new text is asked for.

    Args:
      start: begins the run of one row.
      text: takes the row's tokens.
      before: the first piece, where it is not empty.
    """

    def __init__(self, start: Callable[[], Generation], text: RowText, before: str = ""):
        self._text = text
        self._run: Generation | None = None
        self._pieces = self._make(start, before)

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those of text that is still held back included."""
        return len(self._text.token_ids)

    @property
    def num_steps(self) -> int:
        """Passes of the model so far, the prompt's, which gives the first token, not counted."""
        return 0 if self._run is None else int(self._run.num_steps[0])

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the stream: no more text comes."""
        self._pieces.close()

    def _make(self, start: Callable[[], Generation], before: str) -> Generator[str, None, None]:
        if before:
            yield before
        run = self._run = start()
        size = 1  # short chunks first, so that text shows at once
        while not run.finished and not self._text.stopped:
            num_before = self.num_steps
            tokens, _ = run.next_chunk(size)
            # With drafts a step may make many tokens: as many steps as would have made 8, going by the last chunk.
            num_steps, num_made = max(self.num_steps - num_before, 1), max(len(tokens[0]), 1)
            size = max(min(2 * size, NUM_TOKENS * num_steps // num_made), 1)
            if piece := self._text.push(tokens[0]):
                yield piece
        if piece := self._text.finish():
            yield piece
