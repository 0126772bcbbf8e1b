"""Who computes the attention of one new token in JAX, as a model does it: layer after layer, each with its own cache.

A program is a loop of dependent calls over several caches, so that launches follow one another as in decoding and no
cache is read twice in a row. Where the caches together would stay in the GPU's second-level cache, a filler is read
between rounds, as a model's weights would be; its own time is measured beside and taken off.

Two traps. XLA moves what does not change out of a loop and computes equal things once, hence a barrier before each
call. And a program's first round records its graph anew (some 7 us a launch), and every round costs the host some
36 us, neither of which is the layer's: hence many rounds, and many calls in one that no filler's time makes up for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.kernel_prefill import CUDNN, OURS, PLAIN
from benchmarks.kernel_turns import Entry, Group, Program, prepare
from pallas_kernels import compat, shapes
from pallas_kernels.flash_attention import attention

PAGED = f"{OURS}, paged"
HOT = f"{OURS}, same cache again"
FILLER = "filler"
# What `decode_attention` calls the kernel that is measured.
IMPLEMENTATION = "mosaic"
NUM_CACHES = 16
MAX_CACHES_BYTES = 8 * 2**30
MAX_ROUNDS = 32
MAX_READ_BYTES = 16 * 2**30  # in a program
PASSES_WITHOUT_FILLER = 4  # over the caches, in a round
# More than twice the second-level cache of an H100 (50 MB) or an H200 (60 MB); of no use on a CPU.
ROTATION_BYTES = {"cpu": 2**20, "gpu": 128 * 2**20}
# Up to here a cache could stay in the second-level cache from one call to the next.
MAX_HOT_BYTES = 40 * 2**20

Cache = tuple[Array, Array]
Attend = Callable[..., Float[Array, "B N H"]]


def num_caches(case: shapes.DecodeCase) -> int:
    return max(2, min(NUM_CACHES, MAX_CACHES_BYTES // case.cache_bytes))


def filler_bytes(case: shapes.DecodeCase) -> int:
    """What is read between rounds so that each round starts from memory."""
    return max(0, ROTATION_BYTES.get(jax.default_backend(), 0) - num_caches(case) * case.cache_bytes)


def contestants(case: shapes.DecodeCase, quick: bool) -> list[Entry]:
    """Compiled and checked, their caches on the device; a runner's call is the whole loop."""
    drawn = [case.draw(seed) for seed in range(num_caches(case))]
    caches = [(inputs["keys"], inputs["values"]) for inputs in drawn]
    q, lengths, slopes = (drawn[0][name] for name in ("q", "lengths", "slopes"))
    num_floats = filler_bytes(case) // 4
    filler = jax.random.uniform(jax.random.key(0), (num_floats // 1024, 1024)) if num_floats else None

    def make(
        name: str, attend: Attend, caches: Sequence[Cache] = caches, filler: Array | None = filler,
        checked: bool = True, **options: Any,
    ) -> Program:  # fmt: skip
        run = _loop(attend, calls_a_round(case), num_rounds(case))
        return Program(name, run, (q, caches, filler, lengths), num_checked=int(checked), **options)

    def one_query(q: Array, k: Array, v: Array, lengths: Array) -> Array:
        given = {"query_offset": lengths - 1, "lengths": lengths, "slopes": slopes}
        return attention(q[:, None], k, v, scale=case.scale, implementation="xla", **given)[:, 0]

    def exact(q: Array, caches: Sequence[Cache], filler: Array | None, lengths: Array) -> tuple[Array, ...]:
        q, k, v = (x.astype(jnp.float32) for x in (q, *caches[0]))
        with jax.default_matmul_precision("highest"):
            return (one_query(q, k, v, lengths),)

    mine: dict[str, Any] = {"ours": True, "reason": compat.mosaic_reason()}
    ours = functools.partial(_ours, slopes=slopes)
    page_table = shapes.shuffled_pages(case.B, case.S, 0)
    to_pages = jax.jit(shapes.to_pages)
    pools = [(to_pages(k, page_table), to_pages(v, page_table)) for k, v in caches]
    programs = [
        make(OURS, ours, **mine),
        make(PAGED, functools.partial(ours, page_table=page_table), pools, **mine),
        make(PLAIN, one_query),
    ]
    if case.cache_bytes <= MAX_HOT_BYTES:
        programs.append(make(HOT, ours, caches[:1], None, **mine))
    no_gpu = None if jax.default_backend() == "gpu" else "it needs an NVIDIA GPU"
    programs.append(make(CUDNN, _cudnn, checked=slopes is None, reason=no_gpu))
    if not quick:
        attend = functools.partial(_pallas_triton, grouped=case.K > 1)
        programs.append(make("JAX's Pallas-Triton example", attend, checked=slopes is None, reason=no_gpu))
    if filler is not None:
        programs.append(Program(FILLER, _loop(None, 0, num_rounds(case)), (q, [], filler, lengths)))
    return prepare(Group(programs, Program("float32", exact, (q, caches, None, lengths)), PLAIN))


def calls_a_round(case: shapes.DecodeCase) -> int:
    return num_caches(case) * (1 if filler_bytes(case) else PASSES_WITHOUT_FILLER)


def num_rounds(case: shapes.DecodeCase) -> int:
    return max(2, min(MAX_ROUNDS, MAX_READ_BYTES // (calls_a_round(case) * case.cache_bytes)))


def num_calls(case: shapes.DecodeCase) -> int:
    """Calls of one layer in a loop."""
    return 1 + num_rounds(case) * calls_a_round(case)


def _loop(attend: Attend | None, calls_a_round: int, num_rounds: int) -> Callable[..., tuple[Array, ...]]:
    """The first call's result, to be checked, and the last one's."""
    # One function that is called again and again: a Mosaic kernel is then traced and compiled once, not 17 times: 4 s
    # and not 50.
    layer = None if attend is None else jax.jit(attend)

    def run(q: Array, caches: Sequence[Cache], filler: Array | None, lengths: Int[Array, " B"]) -> tuple[Array, ...]:
        def one_round(_: Any, q: Array) -> Array:
            if filler is not None:
                q, read = jax.lax.optimization_barrier((q, filler))
                q = jnp.where(jnp.max(read) > 1, jnp.zeros_like(q), q)  # never so, and XLA cannot know
            for index in range(calls_a_round):
                q, cache, ends = jax.lax.optimization_barrier((q, caches[index % len(caches)], lengths))
                assert layer is not None
                q = layer(q, *cache, ends).astype(q.dtype)
            return q

        first = q if layer is None else layer(q, *caches[0], lengths)
        return first, jax.lax.fori_loop(0, num_rounds, one_round, first)

    return run


def _ours(
    q: Array, keys: Array, values: Array, lengths: Array, *, slopes: Array | None, page_table: Array | None = None
) -> Array:
    from pallas_kernels.decode_attention import decode_attention

    given = {"lengths": lengths, "slopes": slopes, "page_table": page_table}
    return decode_attention(q, keys, values, implementation=IMPLEMENTATION, **given)


def _cudnn(q: Array, keys: Array, values: Array, lengths: Array) -> Array:
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q[:, None], keys, values, key_value_seq_lengths=lengths)[:, 0]


def _pallas_triton(q: Array, keys: Array, values: Array, lengths: Array, *, grouped: bool) -> Array:
    from jax.experimental.pallas.ops.gpu import decode_attention

    block_k = 128
    options = {"block_k": block_k, "k_splits": max(1, min(16, keys.shape[1] // block_k))}
    if grouped:
        return decode_attention.gqa(q, keys, values, kv_seq_len=lengths, **options)
    return decode_attention.mqa(q, keys[:, :, 0], values[:, :, 0], kv_seq_len=lengths, **options)
