"""Text to token ids and back.

Owns the one use of the `tokenizers` library for reading text; training a vocabulary lives in `train/`.
Knows nothing of models, batches or arrays. The trap: a byte-level token may hold a part of a character,
so text must never be decoded token by token; `IncrementalDecoder` is the way to print while generating.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from falcon_jax.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\ufffd"
# A character has four bytes at most, so three may be there without being one; some decoders show each as U+FFFD.
MAX_PARTIAL = 3


class Tokenizer:
    """A `tokenizer.json`, with exactly the calls that the rest of the package needs."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # Files from fine-tunes often carry the padding and truncation of their training run; a prompt wants
        # neither.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json` in `folder`.

        Raises:
          CheckpointError: the file is missing or is not a tokenizer.
        """
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: a tokenizer folder holds a {TOKENIZER_FILE}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with whatever the file's own post-processor adds (nothing, for Falcon)."""
        return self._tokenizer.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on as many threads as there are cores; another Python thread can run meanwhile."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`.

        Special tokens such as `<|endoftext|>` give no text unless `skip_special` is off.
        Bytes that are not UTF-8 become U+FFFD, as everywhere.
        """
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(Path(folder) / TOKENIZER_FILE))


class IncrementalDecoder:
    """Turns a growing list of ids into text, piece by piece, never half a character.

    The pieces joined, `flush()` last, are `tokenizer.decode` of all the ids. A character of several tokens is held
    back until it is whole. So are up to three U+FFFD at the very end of the text, since a whole one and the first
    bytes of another character decode alike there; the next characters, or `flush`, let them out.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Decoding restarts at the last token border that is also a character border, with the tokens before
        # it as context (some decoders drop a leading space), so the work a token does not grow with the text.
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._num_emitted = 0  # characters of the pending text that are out already

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that became certain with them, possibly empty."""
        self._pending.extend(token_ids)
        text = self._pending_text()
        num_doubtful = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_PARTIAL)
        certain = text[: len(text) - num_doubtful]
        piece = certain[self._num_emitted :]
        if text and not num_doubtful:
            self._context, self._pending = self._pending, []
            self._context_text = self._tokenizer.decode(self._context)
            self._num_emitted = 0
        else:
            self._num_emitted = max(self._num_emitted, len(certain))
        return piece

    def flush(self) -> str:
        """Returns what is still held back, half characters as U+FFFD, and starts anew."""
        piece = self._pending_text()[self._num_emitted :]
        self._context, self._context_text, self._pending, self._num_emitted = [], "", [], 0
        return piece

    def _pending_text(self) -> str:
        if not self._pending:
            return ""
        return self._tokenizer.decode(self._context + self._pending)[len(self._context_text) :]
