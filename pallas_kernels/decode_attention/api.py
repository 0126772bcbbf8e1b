"""`decode_attention`: what models call. Checks the arguments, picks the implementation, runs it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import arguments, compat, dispatch, sharded
from pallas_kernels.decode_attention.reference import PAGE, decode_xla


def decode_attention(
    q: Float[Array, "R N H"],
    keys: Float[Array, "rows slots K H"],
    values: Float[Array, "rows slots K H"],
    *,
    lengths: Int[Array, " B"],
    slopes: Float[Array, " N"] | None = None,
    alibi: str = "float32",
    scale: float | None = None,
    page_table: Int[Array, "B max_pages"] | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    batch_axes: Sequence[str] = sharded.BATCH_AXES,
    head_axis: str = sharded.HEAD_AXIS,
) -> Float[Array, "R N H"]:
    """Attention of each row's newest token, at position lengths[b] - 1, to its keys 0 .. lengths[b] - 1.

    Args:
      q: query head n reads key/value head n // (N / K). There may be more rows than `lengths` has: a chain of kernels
        that work on eight rows at a time need not cut them off. What the result holds for them means nothing.
      keys, values: [B, S, K, H], row b's key j in slot j; or, with `page_table`, a pool [num_pages, 64, K, H]. Slots
        that belong to no key may hold any number, but no infinity or NaN.
      lengths: keys of each row, 0 to S.
      slopes: ALiBi slopes in float32, or None. The biased scores are (q . k + slope * (j - (length - 1))) * scale.
      alibi: "float32", or "hf_bf16" for the rounding that transformers applies.
      scale: None is 1 / sqrt(H).
      page_table: key j of row b lies in slot j % 64 of page page_table[b, j // 64]. Entries past the row's last page
        are not looked at.
      implementation: "mosaic" (Hopper GPUs, bfloat16 and float16), "xla", or None for the first that takes the call.
        "cudnn", which `attention` knows, takes none.
      mesh: what the call runs on, where that is more than the default device. The kernel then runs on each device's
        share: rows split over `batch_axes`, heads over `head_axis`, each where it divides. Pools hold the pages of all
        rows and are split by heads alone. XLA splits its own as it sees fit.

    Returns:
      As q. Rows of length 0 give zeros.

    Raises:
      ValueError: shapes that do not fit, an unknown `alibi` or `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    out, _ = decode_attention_in_chain(
        q, keys, values, lengths=lengths, counters=None, slopes=slopes, alibi=alibi, scale=scale,
        page_table=page_table, implementation=implementation, mesh=mesh,
        batch_axes=batch_axes, head_axis=head_axis,
    )  # fmt: skip
    return out


def decode_attention_in_chain(
    q: Float[Array, "R N H"],
    keys: Float[Array, "rows slots K H"],
    values: Float[Array, "rows slots K H"],
    *,
    lengths: Int[Array, " B"],
    counters: Int[Array, " C"] | None,
    num_sms: int | None = None,
    slopes: Float[Array, " N"] | None = None,
    alibi: str = "float32",
    scale: float | None = None,
    page_table: Int[Array, "B max_pages"] | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    batch_axes: Sequence[str] = sharded.BATCH_AXES,
    head_axis: str = sharded.HEAD_AXIS,
) -> tuple[Float[Array, "R N H"], Int[Array, " C"] | None]:
    """`decode_attention` for one layer after another, without a launch of its own that sets counters to zero in each.

    Args:
      counters: at least B x N zeros for the first layer, and then what the layer before returned: where blocks of the
        kernel meet. Layers whose calls could run at the same time need counters of their own.
      num_sms: on one device with counters, how many of its multiprocessors the kernel may have; it leaves the others
        to what runs beside it. None for all.

    Returns:
      As `decode_attention`; and the counters for the next layer.

    Raises:
      ValueError: as `decode_attention`; or too few counters, or no multiprocessor for the kernel.
    """
    N, K = q.shape[1], keys.shape[2]
    arguments.check("decode_attention", num_heads=N, num_kv_heads=K, alibi=alibi)
    if keys.shape != values.shape or q.shape[-1] != keys.shape[-1]:
        found = f"keys {keys.shape}, values {values.shape} and q {q.shape}"
        raise ValueError(f"decode_attention: {found} must have one head dim, and keys and values one shape")
    B = lengths.shape[0]
    if counters is not None and counters.size < B * N:
        raise ValueError(f"decode_attention: {B} rows of {N} heads need {B * N} counters, not {counters.size}")
    if q.shape[0] < B or (page_table is None and keys.shape[0] != B):
        found = f"{q.shape[0]} rows of queries and {keys.shape[0]} of keys"
        raise ValueError(f"decode_attention: {B} lengths need as many rows of keys and no fewer queries, not {found}")
    if page_table is not None and keys.shape[1] != PAGE:
        raise ValueError(f"decode_attention: pages hold {PAGE} slots, not {keys.shape[1]}")
    if scale is None:
        scale = arguments.default_scale(q)

    candidates = {
        "mosaic": lambda: _mosaic_reason(q, keys, scale, mesh),
        "cudnn": lambda: "it takes queries and keys of one whole sequence, not a cache",
        "xla": lambda: None,
    }
    arrays = (q, keys, values, lengths, slopes, page_table)
    if dispatch.choose("decode_attention", implementation, candidates) == "xla":
        out = decode_xla(q[:B], keys, values, lengths, slopes, alibi, scale, page_table)
        return jnp.pad(out, ((0, q.shape[0] - B), (0, 0), (0, 0))), counters

    from pallas_kernels.decode_attention import mosaic

    if counters is not None and (mesh is None or mesh.size == 1):
        return mosaic.decode_in_chain_mosaic(*arrays, counters=counters, alibi=alibi, scale=scale, num_sms=num_sms)

    def run(q, keys, values, lengths, slopes, page_table):
        return mosaic.decode_mosaic(q, keys, values, lengths, slopes, alibi, scale, page_table)

    cache = "B S K H" if page_table is None else "P S K H"
    letters = ("B N H", cache, cache, "B", "N", "B M")
    out = sharded.over_mesh(run, mesh, arrays, letters, "B N H", batch_axes=batch_axes, head_axis=head_axis)
    return out, counters


def _mosaic_reason(q: Array, keys: Array, scale: float, mesh: Mesh | None) -> str | None:
    if (reason := compat.mosaic_reason(mesh)) is not None:
        return reason
    # Not at the top: Pallas takes half a second to import, and only Hopper runs it.
    from pallas_kernels.decode_attention import mosaic

    return mosaic.reason_against(q, keys, scale)
