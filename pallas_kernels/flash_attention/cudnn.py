"""cuDNN's fused attention, given ALiBi without a bias tensor.

cuDNN takes ALiBi only as a whole [N, T, S] array. Here the bias rides inside the product instead: slope * j equals
the inner product of extra query columns with extra key columns, exactly, because the softmax ignores what is constant
along a row, a key position splits into two integers below 256 (exact in bfloat16), and the slope into three bfloat16
parts. Eight more columns hold it (source: Press et al., Train Short, Test Long, 2022, for the bias itself).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import compat

EXTRA_COLUMNS = 8
MAX_HEAD_DIM = 128
AMPERE = 8  # compute capability


def reason_against(
    q: Array,
    k: Array,
    *,
    query_offset: object,
    lengths: object,
    starts: object,
    slopes: object,
    alibi: str,
    return_lse: bool,
    mesh: Mesh | None,
) -> str | None:
    """Why cuDNN cannot take these arguments on the device that the call would run on, or None where it can."""
    capability = compat.capability(mesh)
    if capability is None:
        return f"it needs an NVIDIA GPU, and this would run on {compat.device(mesh).platform!r}"
    generation = capability.partition(".")[0]
    if not generation.isdecimal() or int(generation) < AMPERE:
        return f"it needs a GPU of compute capability {AMPERE}.0 or newer, and this one's is {capability}"
    if return_lse:
        return "it does not return the log-sum-exp of the scores"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {q.dtype}"
    if query_offset is not None or lengths is not None or q.shape[1] != k.shape[1]:
        return "it takes queries and keys of one whole sequence (no cache, no lengths)"
    if starts is not None:
        return "it takes one document a row (no starts)"
    if slopes is not None and alibi != "float32":
        return f"it computes ALiBi exactly, not with the rounding alibi={alibi!r}"
    columns = q.shape[-1] + (EXTRA_COLUMNS if slopes is not None else 0)
    if columns > MAX_HEAD_DIM or columns % 8:
        return f"it takes {MAX_HEAD_DIM} columns a head at most and multiples of 8, and this call needs {columns}"
    if slopes is not None and k.shape[1] > 65536:
        return f"positions past 65,536 do not split into two bfloat16 integers, and there are {k.shape[1]} keys"
    return None


def alibi_columns(
    slopes: Float[Array, " N"], num_positions: int, dtype: DTypeLike
) -> tuple[Float[Array, "N 8"], Float[Array, "S 8"]]:
    """Columns a[n], c[j] with a[n] . c[j] == slopes[n] * j to float32 accuracy, all representable in `dtype`."""
    parts, rest = [], slopes
    for _ in range(3):
        part = rest.astype(jnp.bfloat16).astype(jnp.float32)
        parts.append(part)
        rest = rest - part
    zeros = jnp.zeros_like(slopes)
    query_columns = jnp.stack([p for part in parts for p in (256 * part, part)] + [zeros, zeros], axis=-1)
    j = np.arange(num_positions, dtype=np.int32)
    high, low = (j // 256).astype(np.float32), (j % 256).astype(np.float32)
    key_columns = np.stack([high, low] * 3 + [0 * low, 0 * low], axis=-1)
    return query_columns.astype(dtype), jnp.asarray(key_columns, dtype)


def attention_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    slopes: Float[Array, " N"] | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Causal attention over whole sequences through `jax.nn.dot_product_attention`."""
    H = q.shape[-1]
    if slopes is not None:
        query_columns, key_columns = alibi_columns(slopes, k.shape[1], q.dtype)
        q = jnp.concatenate([q, jnp.broadcast_to(query_columns, (*q.shape[:-1], EXTRA_COLUMNS))], axis=-1)
        key_columns = jnp.broadcast_to(key_columns[None, :, None], (*k.shape[:-1], EXTRA_COLUMNS))
        k = jnp.concatenate([k, key_columns], axis=-1)
        # cuDNN wants q, k and v of one width.
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, EXTRA_COLUMNS)))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., :H]
