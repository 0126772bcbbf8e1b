"""What the engine's jitted functions hand to one another and to the host.

Letters: B batch, S cache length, V vocabulary, C columns of a chunk.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from falcon_jax.config import FalconConfig
from falcon_jax.model.cache import KVCache
from falcon_jax.model.step import ForwardOptions

# The most steps that one call of `decode` makes. The host looks at the tokens only between calls.
CHUNK = 32


class Model(NamedTuple):
    """What is static in every jitted function here; engines with equal ones share executables.

    cuda_graphs: whether XLA may capture kernels in CUDA graphs. True where there is no GPU to do so.
    """

    config: FalconConfig
    options: ForwardOptions
    mesh: Mesh | None
    cuda_graphs: bool = True


class Request(NamedTuple):
    """What the host asks of a call of `decode`.

    num_steps: at most so many.
    stopped: rows that end before it.
    """

    num_steps: Int[Array, ""]
    stopped: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
    """What is known of each row, but for its cache.

    tokens: each row's last token, which the next step feeds.
    done: rows that have ended; they write nothing and keep their length.
    left: how many tokens each may still get; one with none left is done.
    seen: tokens in the prompt or generated; None without a repetition penalty.
    history: each token in the column of its position, prompts and the last ones included; None without speculation.
    """

    tokens: Int[Array, " B"]
    done: Bool[Array, " B"]
    left: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None = None
    history: Int[Array, "B S"] | None = None


class Chunk(NamedTuple):
    """What some steps made: row b's new tokens are its first counts[b] columns. Log probabilities float32.

    steps: how many steps each row took part in.
    """

    tokens: Int[Array, "B C"]
    logprobs: Float[Array, "B C"]
    counts: Int[Array, " B"]
    steps: Int[Array, " B"]

    @classmethod
    def empty(cls, batch_size: int, num_drafted: int = 0) -> "Chunk":
        """With room for what a call makes."""
        zeros = jnp.zeros((batch_size, CHUNK * (1 + num_drafted)), jnp.int32)
        return cls(zeros, zeros.astype(jnp.float32), zeros[:, 0], zeros[:, 0])

    def emptied(self) -> "Chunk":
        """In the same memory: what its columns held stays there and means nothing."""
        none = jnp.zeros_like(self.counts)
        return self._replace(counts=none, steps=none)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeState:
    """What a step reads and writes; donated to every call of `decode`.

    cache: all tokens but each row's last.
    chunk: what the steps of this call, or else of the last one, have made.
    """

    cache: KVCache
    rows: Rows
    chunk: Chunk
