"""What the attention functions ask of their arguments, said once."""

import math

from jaxtyping import Array

ALIBI_ROUNDINGS = ("float32", "hf_bf16")


def check(kernel: str, *, num_heads: int, num_kv_heads: int, alibi: str) -> None:
    """Raises ValueError, in the name of `kernel`, where the heads cannot be shared or the rounding is unknown."""
    if num_heads % num_kv_heads:
        heads = f"{num_heads} query heads cannot share {num_kv_heads} key/value heads"
        raise ValueError(f"{kernel}: {heads}; K must divide N")
    if alibi not in ALIBI_ROUNDINGS:
        raise ValueError(f"{kernel}: alibi={alibi!r} is unknown; known are {', '.join(ALIBI_ROUNDINGS)}")


def default_scale(q: Array) -> float:
    """1 / sqrt(H), of queries [..., H]."""
    return 1.0 / math.sqrt(q.shape[-1])
