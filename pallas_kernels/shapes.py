"""The one list of cases for the attention kernels: what tests interpret and compile, and what benchmarks time.

Toy cases sit around the edges of blocks (64 and 128 queries or keys) and are few, since interpreting one kernel takes
one to three seconds each; cases for GPUs have the head layouts of the published models. The trap: the arrays drawn here
hold real numbers everywhere, also past a row's length, so that a kernel which reads too far gives a wrong answer.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

PAGE_SIZE = 64
# What fills pages that belong to no row: finite, as in a cache, and far from anything else.
SPARE = 1e4
# Keys and values of one decode case on a GPU stay below this.
MAX_CACHE_BYTES = 4 * 2**30


class Heads(NamedTuple):
    """Query heads, key/value heads, head dim, and how ALiBi is computed (None where positions are rotated)."""

    N: int
    K: int
    H: int
    alibi: str | None


HEADS = {
    "falcon-rw-1b": Heads(32, 32, 64, "float32"),
    "falcon-rw-7b": Heads(64, 64, 64, "float32"),
    "falcon-7b": Heads(71, 1, 64, None),
    "falcon-40b": Heads(128, 8, 64, None),
    "falcon-180b": Heads(232, 8, 64, None),
    "falcon2-11b": Heads(32, 8, 128, None),
    "falcon-40b-alibi": Heads(64, 1, 128, "float32"),
}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of `attention`. `offsets` and `lengths` hold one number a row; None is what `attention` takes it for."""

    name: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "bfloat16"
    alibi: str | None = None
    offsets: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.H)

    def draw(self, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of `attention`, normally distributed."""
        keys = jax.random.split(jax.random.key(seed), 3)
        return {
            "q": jax.random.normal(keys[0], (self.B, self.T, self.N, self.H), self.dtype),
            "k": jax.random.normal(keys[1], (self.B, self.S, self.K, self.H), self.dtype),
            "v": jax.random.normal(keys[2], (self.B, self.S, self.K, self.H), self.dtype),
            "query_offset": _integers(self.offsets),
            "lengths": _integers(self.lengths),
            "slopes": None if self.alibi is None else geometric_slopes(self.N),
            "alibi": self.alibi or "float32",
        }


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call of `decode_attention`: one query a row against the first `lengths` of S keys (None: all of them).

    paged: the cache lies in pages of 64 keys, shuffled, in a pool that has pages to spare.
    """

    name: str
    B: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "bfloat16"
    alibi: str | None = None
    lengths: tuple[int, ...] | None = None
    paged: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.H)

    @property
    def cache_bytes(self) -> int:
        """Bytes of K and V that a call must read."""
        num_keys = self.B * self.S if self.lengths is None else sum(self.lengths)
        return 2 * num_keys * self.K * self.H * jnp.dtype(self.dtype).itemsize

    def draw(self, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of `decode_attention`, normally distributed."""
        keys = jax.random.split(jax.random.key(seed), 3)
        cache = [jax.random.normal(key, (self.B, self.S, self.K, self.H), self.dtype) for key in keys[:2]]
        page_table = None
        if self.paged:
            page_table = shuffled_pages(self.B, self.S, seed)
            cache = [to_pages(x, page_table) for x in cache]
        return {
            "q": jax.random.normal(keys[2], (self.B, self.N, self.H), self.dtype),
            "keys": cache[0],
            "values": cache[1],
            "lengths": _integers(self.lengths or (self.S,) * self.B),
            "slopes": None if self.alibi is None else geometric_slopes(self.N),
            "alibi": self.alibi or "float32",
            "page_table": page_table,
        }


def geometric_slopes(num_heads: int) -> Float[Array, " N"]:
    """2^(-8/N), 2^(-16/N), ... 2^-8: ALiBi slopes of the size that models have."""
    return jnp.asarray(2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads), jnp.float32)


def shuffled_pages(batch: int, num_keys: int, seed: int) -> Int[Array, "B P"]:
    """Where each row's pages lie: distinct ones, in no order, of a pool with one page a row more than needed."""
    pages_a_row = -(-num_keys // PAGE_SIZE)
    order = np.random.default_rng(seed).permutation(batch * (pages_a_row + 1))
    return jnp.asarray(order[: batch * pages_a_row].reshape(batch, pages_a_row), jnp.int32)


def to_pages(cache: Float[Array, "B S K H"], page_table: Int[Array, "B P"]) -> Float[Array, "num_pages 64 K H"]:
    """The pool in which row b's keys 64 p .. 64 p + 63 lie in page page_table[b, p]; the last page filled up."""
    B, S, K, H = cache.shape
    pages_a_row = page_table.shape[1]
    filled = jnp.pad(cache, ((0, 0), (0, pages_a_row * PAGE_SIZE - S), (0, 0), (0, 0)), constant_values=SPARE)
    pages = filled.reshape(B * pages_a_row, PAGE_SIZE, K, H)
    pool = jnp.full((B * (pages_a_row + 1), PAGE_SIZE, K, H), SPARE, cache.dtype)
    return pool.at[page_table.reshape(-1)].set(pages)


def attention_case(model: str, tokens: int, batch: int = 1, dtype: DTypeLike = "bfloat16") -> AttentionCase:
    """A whole prompt of `tokens` through one layer of `model`."""
    heads = HEADS[model]
    name = f"{model} T={tokens}" + (f" B={batch}" if batch > 1 else "")
    shape = (batch, tokens, tokens, heads.N, heads.K, heads.H)
    return AttentionCase(name, *shape, dtype=jnp.dtype(dtype).name, alibi=heads.alibi)


def decode_case(model: str, context: int, batch: int = 1, paged: bool = False) -> DecodeCase:
    """One more token after `context` keys in one layer of `model`."""
    heads = HEADS[model]
    name = f"{model} S={context} B={batch}" + (" paged" if paged else "")
    return DecodeCase(name, batch, context, heads.N, heads.K, heads.H, alibi=heads.alibi, paged=paged)


def _integers(values: tuple[int, ...] | None) -> Int[Array, " B"] | None:
    return None if values is None else jnp.asarray(values, jnp.int32)


# Interpreted on a CPU. Head layouts: multi-head, grouped, and three heads that share one K and V, no power of two.
TOY_ATTENTION = (
    AttentionCase("one tile", 1, 64, 64, 2, 2, 64),
    AttentionCase("one query", 1, 1, 1, 3, 1, 64, alibi="float32"),
    AttentionCase("seven queries", 1, 7, 7, 3, 1, 128),
    AttentionCase("alibi, odd", 1, 101, 101, 3, 1, 64, alibi="float32"),
    AttentionCase("grouped, past a tile of 128", 1, 130, 130, 4, 2, 64, alibi="float32"),
    AttentionCase("shared, past a tile of 128", 1, 130, 130, 3, 1, 128, alibi="float32"),
    AttentionCase("several tiles a block", 1, 257, 257, 2, 1, 128),
    AttentionCase("rows of different length", 3, 70, 70, 3, 1, 64, alibi="float32", lengths=(70, 0, 33)),
    AttentionCase("grouped rows, one of them empty", 2, 66, 66, 4, 2, 128, lengths=(0, 65)),
    AttentionCase("chunk", 1, 33, 130, 3, 1, 64, alibi="float32", offsets=(97,)),
    AttentionCase(
        "chunks at different places", 2, 40, 150, 4, 2, 128, alibi="float32", offsets=(3, 110), lengths=(40, 150)
    ),
    AttentionCase("one query after many keys", 2, 1, 140, 2, 2, 64, offsets=(139, 64)),
    AttentionCase("fewer keys than queries", 1, 130, 70, 2, 1, 64),
    AttentionCase("hf_bf16", 1, 100, 100, 3, 1, 128, alibi="hf_bf16"),
    AttentionCase("hf_bf16 where neighbours round alike", 1, 20, 300, 3, 1, 64, alibi="hf_bf16", offsets=(280,)),
    AttentionCase("float16", 1, 96, 96, 2, 1, 128, dtype="float16", alibi="float32"),
)

# Capacities are those of caches, multiples of 8; lengths are any.
TOY_DECODE = (
    DecodeCase("one page of keys", 1, 64, 2, 2, 64),
    DecodeCase("one key", 1, 1, 3, 1, 64, alibi="float32"),
    DecodeCase("odd", 1, 104, 3, 1, 128, alibi="float32", lengths=(101,)),
    DecodeCase("71 heads share one", 1, 136, 71, 1, 64, lengths=(130,)),
    DecodeCase("grouped, rows of different length", 3, 136, 4, 2, 64, alibi="float32", lengths=(136, 0, 65)),
    DecodeCase("rows of different length", 3, 264, 3, 1, 128, lengths=(1, 257, 129)),
    DecodeCase("hf_bf16", 2, 304, 3, 1, 128, alibi="hf_bf16", lengths=(300, 64)),
    DecodeCase("float16", 1, 96, 4, 2, 128, dtype="float16", alibi="float32"),
    DecodeCase("paged", 2, 192, 3, 1, 128, alibi="float32", lengths=(192, 65), paged=True),
    DecodeCase("paged, grouped, last pages part full", 3, 150, 4, 2, 64, lengths=(150, 0, 64), paged=True),
    DecodeCase("paged, multi-head, hf_bf16", 1, 100, 2, 2, 64, alibi="hf_bf16", paged=True),
)

# Run on a GPU, at full size.
GPU_ATTENTION = (
    *(attention_case(model, 4096) for model in HEADS),
    *(attention_case(model, 16384) for model, heads in HEADS.items() if heads.H == 128),
    *(attention_case(model, 4001) for model in HEADS),
    *(
        dataclasses.replace(attention_case(model, 2048, batch=2), name=f"{model} ragged", lengths=(2048, 701))
        for model in HEADS
    ),
    *(
        dataclasses.replace(
            attention_case(model, 4096), name=f"{model} chunk", T=512, offsets=(3501,), lengths=(3501 + 512,)
        )
        for model in HEADS
    ),
    *(
        dataclasses.replace(attention_case(model, 1000), name=f"{model} hf_bf16", alibi="hf_bf16")
        for model, heads in HEADS.items()
        if heads.alibi
    ),
    *(attention_case(model, 1000, dtype="float16") for model in ("falcon-rw-1b", "falcon-40b-alibi")),
)


def _ragged(case: DecodeCase) -> DecodeCase:
    """Rows from full down to nearly empty, at odd lengths."""
    lengths = tuple(max(1, case.S - row * (case.S // case.B + 3)) for row in range(case.B))
    return dataclasses.replace(case, lengths=lengths)


GPU_DECODE = tuple(
    _ragged(case)
    for model in HEADS
    for context in (512, 4096, 32768, 131072)
    for batch in (1, 4, 16)
    for paged in (False, True)
    if (case := decode_case(model, context, batch, paged)).cache_bytes <= MAX_CACHE_BYTES
)
