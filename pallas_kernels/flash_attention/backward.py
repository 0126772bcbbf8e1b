"""The gradients of causal attention on Hopper: `backward`, and what the kernels need done before and after.

Source: Dao, FlashAttention-2 (2023), for recomputing the weights from the log-sum-exp; Shah et al., FlashAttention-3
(2024), for products with operands in registers and dQ added up by copies.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.flash_attention import backward_keys
from pallas_kernels.flash_attention.backward_order import Problem, heads_per_block
from pallas_kernels.flash_attention.reference import MASKED


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    heads: query heads of those that share K and V that one block works through; None for what fills the GPU.
    """

    heads: int | None = None


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N Tp"],
    dout: Float[Array, "B T N H"],
    query_offset: Int[Array, " B"] | None,
    lengths: Int[Array, " B"] | None,
    slopes: Float[Array, " N"] | None,
    alibi: str,
    scale: float,
    *,
    starts: Int[Array, "B T"] | None = None,
    dlse: Float[Array, "B N Tp"] | None = None,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients with respect to q, k and v, in their dtypes; the same bits every time.

    Args:
      q, k, v, query_offset, lengths, slopes, alibi, scale, starts: what `forward` got.
      out, lse: what it gave. Under vmap no more than these, the cotangents and the inputs above may be batched.
      dout, dlse: the cotangents of `out` and, where somebody used it, of `lse`.
      blocks: None for the tuned ones.

    Memory: a float32 copy of dQ, and of dK and dV for each chunk of heads; nothing that grows with T * S.
    """
    options = {"alibi": None if slopes is None else alibi, "scale": scale, "blocks": blocks or Blocks()}
    options |= {"num_sms": compat.num_sms(), "interpretable": compat.interpreting()}
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    optional = {"offsets": query_offset, "lengths": lengths, "slopes": slopes, "starts": starts, "dlse": dlse}
    return _many(tuple(options.items()))(arrays | {name: x for name, x in optional.items() if x is not None})


def _many(options):
    """`_gradients` as a function of the arrays alone, under vmap a single call with a larger batch.

    Pallas would repeat the kernel for each member instead, but all would share the counters of whose turn it is.
    """

    @custom_vmap
    def run(arrays):
        return _gradients(arrays, **dict(options))

    @run.def_vmap
    def _fold(axis_size, in_batched, arrays):
        (batched,) = in_batched
        if batched.get("slopes"):
            raise NotImplementedError("backward: ALiBi slopes that differ between the members of a vmap")

        def fold(name, x):
            if name == "slopes":
                return x
            if not batched[name]:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded = run({name: fold(name, x) for name, x in arrays.items()})
        return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in folded), (True, True, True)

    return run


# Compiled once a shape: what calls this in every layer would otherwise lower the kernel in every layer.
@functools.partial(jax.jit, static_argnames=("alibi", "scale", "blocks", "num_sms", "interpretable"))
def _gradients(arrays, *, alibi, scale, blocks, num_sms, interpretable):
    B, T, N, H = arrays["q"].shape
    S, K = arrays["k"].shape[1:3]
    # Copies of tiles want the sequence axis in multiples of 8.
    inputs = {name: _padded(arrays[name], 1, 8) for name in ("q", "k", "v", "dout")}
    # 64 x 64 or 128 x 64 scores a warpgroup: what registers hold beside its dK and dV.
    queries = 64 if H == 128 else 128
    problem = Problem(B, inputs["q"].shape[1], inputs["k"].shape[1], N, K, H, queries)
    inputs["stats"] = _stats(arrays, queries, alibi, scale)
    inputs |= {name: arrays[name] for name in ("offsets", "slopes") if name in arrays}
    if "lengths" in arrays:
        inputs["lengths"] = jnp.clip(arrays["lengths"], 0, S)
    elif problem.S != S:
        inputs["lengths"] = jnp.full(B, S, jnp.int32)
    if "starts" in arrays:
        inputs["starts"] = _padded(arrays["starts"].astype(jnp.int32), 1, queries, mode="edge")
        inputs["tile_ends"] = problem.tile_ends(inputs["starts"], *_offsets_and_lengths(inputs, problem))

    heads = blocks.heads or heads_per_block(problem, num_sms)
    settings = backward_keys.Settings(problem, heads, alibi, scale, interpretable)
    outputs = backward_keys.gradients(inputs, settings, num_sms)
    dq = _sum_of_parts(outputs["dq"], problem, inputs) if interpretable else outputs["dq"]
    dq = (dq * scale).astype(inputs["q"].dtype)
    dk, dv = (jnp.sum(outputs[name], axis=0).astype(inputs["k"].dtype) for name in ("dk", "dv"))
    return dq[:, :T], dk[:, :S], dv[:, :S]


def _padded(x, axis, multiple, mode="constant"):
    return jnp.pad(x, [(0, -size % multiple if i == axis else 0) for i, size in enumerate(x.shape)], mode=mode)


def _stats(arrays, queries, alibi, scale):
    """What a query's two accumulators start from, [B, N, 2, Tp]: minus the log-sum-exp, with ALiBi; and minus delta.

    delta is the part of dP that the softmax takes off every weight of a row, sum(P dP) = sum(out dout).
    """
    lse, out, dout = arrays["lse"], arrays["out"], arrays["dout"]
    t = jnp.arange(lse.shape[-1], dtype=jnp.int32)
    seen = (t < out.shape[1]) & (lse > -math.inf)
    start = -lse / scale
    if alibi == "float32":
        # The kernel adds slope * (j - first query of the tile).
        start -= arrays["slopes"][:, None] * lax.rem(t, jnp.int32(queries)).astype(jnp.float32)
    # The barrier keeps XLA from summing up while it stacks, which reads `out` and `dout` two bytes at a time.
    delta = lax.optimization_barrier(jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1))
    delta = _padded(jnp.swapaxes(delta, 1, 2), 2, 128)
    if "dlse" in arrays:
        delta -= arrays["dlse"]
    return jnp.stack([jnp.where(seen, start, MASKED), jnp.where(seen, -delta, 0.0)], axis=2)


def _offsets_and_lengths(inputs, problem):
    """Both [B], also where they are trivial."""
    offsets = inputs["offsets"] if "offsets" in inputs else jnp.zeros(problem.B, jnp.int32)
    lengths = inputs["lengths"] if "lengths" in inputs else jnp.full(problem.B, problem.S, jnp.int32)
    return offsets, lengths


def _sum_of_parts(parts, problem, inputs):
    """dQ of the blocks of keys that wrote theirs side by side: of each tile, the first few did."""
    offsets, lengths = _offsets_and_lengths(inputs, problem)
    tile = jnp.arange(problem.T) // problem.queries
    count = problem.num_key_blocks_of(tile[None], offsets[:, None], lengths[:, None])
    block = jnp.arange(problem.num_key_blocks)[:, None, None]
    written = block < count
    if "starts" in inputs:
        first_start = inputs["starts"][:, tile * problem.queries]
        written &= block >= problem.first_key_block_of(first_start, count)
    return jnp.sum(jnp.where(written[..., None, None], parts, 0.0), axis=0)
