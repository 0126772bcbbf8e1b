"""An engine's run taken to its end."""

from falcon_jax.generate.engine import Generation
from falcon_jax.generate.state import CHUNK


def drain(generation: Generation, chunk: int = CHUNK) -> tuple[list[list[int]], list[list[float]]]:
    """All new tokens a row, and their log probabilities, made in chunks of that many steps."""
    tokens: list[list[int]] = [[] for _ in range(generation.num_rows)]
    logprobs: list[list[float]] = [[] for _ in range(generation.num_rows)]
    while not generation.finished:
        for row, (new, new_logprobs) in enumerate(zip(*generation.next_chunk(chunk))):
            tokens[row] += new
            logprobs[row] += new_logprobs
    return tokens, logprobs
