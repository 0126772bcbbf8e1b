"""Falcon's self-attention: the four projections, positions, and the cache write around the attention kernel."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import pallas_kernels.decode_attention as decode_attention
import pallas_kernels.flash_attention as flash_attention
from falcon_jax.config import FalconConfig
from falcon_jax.model import cache as kv_cache
from falcon_jax.model import positions
from falcon_jax.model.linear import Linear, apart
from falcon_jax.model.step import Step
from pallas_kernels.flash_attention.reference import attention_probabilities
from pallas_kernels.rotary import rotate


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention, as K == N, 1 < K < N or K == 1."""

    def __init__(self, config: FalconConfig, weights: str):
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        self.rotates_cached_keys = positions.keeps_unrotated_keys(config)
        self.query = Linear((D,), (N, H), bias=config.bias, weights=weights)
        self.key = Linear((D,), (K, H), bias=config.bias, weights=weights)
        self.value = Linear((D,), (K, H), bias=config.bias, weights=weights)
        self.output = Linear((N, H), (D,), bias=config.bias, weights=weights)

    def __call__(
        self, x: Float[Array, "B T D"], step: Step, slots: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """The attention output and, where `slots` (this layer's cached keys and values) came in, the new ones."""
        # Grouped keys and values are small: to join their products is worth it.
        x, for_key, *more = apart(x, 3 if self.key.outputs == self.query.outputs else 2)
        for_value = more[0] if more else for_key
        q, k = self.rotate(self.query(x), self.key(for_key), step)
        out, slots = self.attend(q, k, self.value(for_value), step, slots)
        return self.output(out), slots

    def attend(
        self,
        q: Float[Array, "rows T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        step: Step,
        slots: tuple[Array, Array] | None,
    ) -> tuple[Float[Array, "rows T N H"], tuple[Array, Array] | None]:
        """What is between the projections. With one token a row, q may have more rows, whose results mean nothing."""
        kept = None
        if slots is not None:
            kept = kv_cache.write(slots[0], k, step.offsets), kv_cache.write(slots[1], v, step.offsets)
        if kept and step.reads_cache:
            return self.attend_to_cache(q, *kept, step)[0], kept
        arguments = step.attention_arguments()
        return flash_attention.attention(q, self._rotate_late(k, step), v, starts=step.starts, **arguments), kept

    def probabilities(self, x: Float[Array, "B T D"], step: Step) -> Float[Array, "B N T T"]:
        """What each query gives to each key, in float32: for looking at, not on any fast path."""
        q, k = self.rotate(self.query(x), self.key(x), step)
        k = self._rotate_late(k, step)
        scale = q.shape[-1] ** -0.5
        return attention_probabilities(q, k, step.offsets, None, step.slopes, step.alibi, scale)

    def attend_to_cache(
        self,
        q: Float[Array, "rows T N H"],
        keys: Float[Array, "B S K H"],
        values: Float[Array, "B S K H"],
        step: Step,
        *,
        counters: Int[Array, " C"] | None = None,
        num_sms: int | None = None,
    ) -> tuple[Float[Array, "rows T N H"], Int[Array, " C"] | None]:
        """Queries at positions offsets[b] + t against all that the cache holds, the tokens at hand included.

        counters, num_sms: as of `decode_attention_in_chain`, which single tokens go through. The counters come back.
        """
        keys, arguments = self._rotate_late(keys, step), step.attention_arguments()
        if q.shape[1] > 1:
            return flash_attention.attention(q, keys, values, query_offset=step.offsets, **arguments), counters
        out, counters = decode_attention.decode_attention_in_chain(
            q[:, 0], keys, values, lengths=step.num_keys(), counters=counters, num_sms=num_sms, **arguments
        )
        return out[:, None], counters

    def rotate(self, q: Array, k: Array, step: Step) -> tuple[Array, Array]:
        """Turns queries and keys by their positions, where the model has RoPE and the cache holds turned keys."""
        if step.rotary is not None:
            cos, sin = step.rotary
            q = rotate(q, _rows(cos, q.shape[0]), _rows(sin, q.shape[0]))
            if not self.rotates_cached_keys:
                k = rotate(k, cos, sin)
        return q, k

    def _rotate_late(self, keys: Array, step: Step) -> Array:
        """Under dynamic scaling, turns all keys of the row by the frequencies of its present length."""
        return rotate(keys, *step.key_rotary) if step.key_rotary is not None else keys


def _rows(angles: Float[Array, "B T H"], num_rows: int) -> Array:
    """With rows added, for those of q that no token stands behind."""
    return jnp.pad(angles, ((0, num_rows - angles.shape[0]), (0, 0), (0, 0)))
