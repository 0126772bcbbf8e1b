"""What all layers of one forward pass share: positions, angles, slopes and the caller's options."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from falcon_jax.config import FalconConfig
from falcon_jax.model import positions
from falcon_jax.model.cache import KVCache

REMAT = ("none", "block", "products", "stage")


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How to run the model, as opposed to what it is. Hashable: part of every compilation key.

    alibi: "float32" (exact, and needed past the trained length) or "hf_bf16" (the rounding of transformers).
    attention: `implementation` of the kernels of pallas_kernels (flash_attention, and decode_attention for single
      tokens); None picks the best that works.
    stages: `implementation` of the fused stages (stages.py): "mosaic", "xla" (plain layers), or None for the faster.
    remat: what the backward pass of training computes again instead of keeping it, one of REMAT: "none"; "block", all
      of a block but its input; "products", all but the results of a block's matrix products; "stage", in a pipeline,
      all that a stage does with a micro-batch, and no more of a block.
    num_remat_layers: how many layers, from the first on, that holds for; None: all.
    sums: how the devices of a mesh add up what each has made in a step of decoding: "peers", by the kernels themselves,
      in each other's memory (pallas_kernels/peers); "xla", by all-reduce; None: by the kernels where they can.
    concurrent: whether this is compiled so that what reads nothing of one another runs at the same time, as decoding is
      on one GPU (generate/programs.py). Attention may then run beside the MLP (beside.py).
    """

    alibi: str = "float32"
    attention: str | None = None
    stages: str | None = None
    remat: str = "none"
    num_remat_layers: int | None = None
    sums: str | None = None
    concurrent: bool = False

    def __post_init__(self) -> None:
        if self.alibi not in ("float32", "hf_bf16"):
            raise ValueError(f"alibi={self.alibi!r} is unknown; known are 'float32' and 'hf_bf16'")
        if self.stages not in (None, "mosaic", "xla"):
            raise ValueError(f"stages={self.stages!r} is unknown; known are 'mosaic', 'xla' and None")
        if self.sums not in (None, "peers", "xla"):
            raise ValueError(f"sums={self.sums!r} is unknown; known are 'peers', 'xla' and None")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; known are {', '.join(map(repr, REMAT))}")


@dataclasses.dataclass(frozen=True)
class Step:
    """Computed once a forward pass, read by every layer."""

    num_columns: int  # T, tokens a row
    offsets: Int[Array, " B"]  # position of each row's first token
    ends: Int[Array, " B"]  # position after each row's last real token; the row's offset where it has none
    slopes: Float[Array, " N"] | None  # ALiBi
    rotary: tuple[Float[Array, "B T H"], Float[Array, "B T H"]] | None  # cos and sin at the tokens
    key_rotary: tuple[Float[Array, "B S H"], Float[Array, "B S H"]] | None  # cos and sin at all keys, dynamic RoPE
    reads_cache: bool  # False: the tokens at hand are all the keys there are
    alibi: str
    implementation: str | None
    mesh: Mesh | None
    dropout_keys: Key[Array, " B"] | None = None  # the layer's own, one a row, in training
    starts: Int[Array, "B T"] | None = None  # packed documents: the first position that each token may see

    @classmethod
    def begin(
        cls,
        config: FalconConfig,
        options: ForwardOptions,
        num_columns: int,
        offsets: Array,
        ends: Array,
        cache: KVCache | None = None,
        mesh: Mesh | None = None,
    ) -> Step:
        """For T = `num_columns` tokens a row from position `offsets`, rows ending at `ends`.

        `cache` is the one that attention reads; None where the tokens at hand are all the keys there are.
        """
        capacity = num_columns if cache is None else cache.capacity
        slopes = rotary = key_rotary = None
        if config.rope is None:
            slopes = jnp.asarray(positions.alibi_slopes(config.num_heads))
        else:
            tokens = offsets[:, None] + jnp.arange(num_columns, dtype=jnp.int32)[None, :]
            rotary = positions.rotary_angles(config.rope, config.head_dim, tokens, ends)
            if positions.keeps_unrotated_keys(config):
                keys = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (offsets.shape[0], capacity))
                key_rotary = positions.rotary_angles(config.rope, config.head_dim, keys, ends)
        reads_cache = cache is not None
        return cls(
            num_columns, offsets, ends, slopes, rotary, key_rotary, reads_cache, options.alibi, options.attention, mesh
        )

    def num_keys(self) -> Int[Array, " B"]:
        """What a single token of each row attends to. A row that has ended reads nothing: its garbage would cost as
        much as a living row's keys."""
        return jnp.where(self.ends > self.offsets, self.offsets + 1, 0)

    def attention_arguments(self) -> dict:
        """The keyword arguments that every layer's attention call has in common."""
        return {
            "slopes": self.slopes,
            "alibi": self.alibi,
            "implementation": self.implementation,
            "mesh": self.mesh,
        }


def spans(cache: KVCache | None, batch_size: int, num_columns: int, num_tokens: Array | None) -> tuple[Array, Array]:
    """Each row's first position and the position after its last real token, both [B] int32."""
    offsets = jnp.zeros(batch_size, jnp.int32) if cache is None else cache.lengths
    return offsets, offsets + (num_columns if num_tokens is None else num_tokens.astype(jnp.int32))
