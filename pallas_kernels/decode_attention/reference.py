"""Decode attention in plain JAX: the version that every kernel must equal, and the floor where no kernel runs.

Row b's one query sits at position lengths[b] - 1 and sees the keys j = 0 .. lengths[b] - 1:

    out[b, n] = sum_j softmax_j((q[b, n] . k[b, j, n // G] + bias[n, j]) * scale) v[b, j, n // G]

with key j of row b in slot j of the cache's row b, or, in pages, in slot j % 64 of page page_table[b, j // 64].
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.reference import attention_one_token, attention_reference

PAGE = 64  # slots of a page


def gather_pages(
    pages: Float[Array, "num_pages 64 K H"], page_table: Int[Array, "B max_pages"], lengths: Int[Array, " B"]
) -> Float[Array, "B S K H"]:
    """Each row's pages side by side, S = 64 max_pages. Entries past the row's last page are not followed."""
    B, max_pages = page_table.shape
    _, _, K, H = pages.shape
    live = jnp.arange(max_pages, dtype=jnp.int32) * PAGE < lengths[:, None]
    return pages[jnp.where(live, page_table, 0)].reshape(B, max_pages * PAGE, K, H)


def decode_reference(
    q: Float[Array, "B N H"],
    keys: Float[Array, "_ _ K H"],
    values: Float[Array, "_ _ K H"],
    lengths: Int[Array, " B"],
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    page_table: Int[Array, "B max_pages"] | None = None,
) -> Float[Array, "B N H"]:
    """The formula at the top of this file, by `attention_reference` for a single query."""
    if page_table is not None:
        keys, values = (gather_pages(x, page_table, lengths) for x in (keys, values))
    return attention_reference(q[:, None], keys, values, lengths - 1, lengths, slopes, alibi, scale)[:, 0]


def decode_xla(
    q: Float[Array, "B N H"],
    keys: Float[Array, "_ _ K H"],
    values: Float[Array, "_ _ K H"],
    lengths: Int[Array, " B"],
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    page_table: Int[Array, "B max_pages"] | None = None,
) -> Float[Array, "B N H"]:
    """`decode_reference` in the order of operations that XLA runs best; pages are copied together first."""
    if page_table is not None:
        keys, values = (gather_pages(x, page_table, lengths) for x in (keys, values))
    return attention_one_token(q[:, None], keys, values, lengths - 1, lengths, slopes, alibi, scale)[:, 0]
