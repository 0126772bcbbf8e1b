"""The token vectors: their lookup, and a gradient that adds up in float32. And logits, where a vocabulary is split.

The trap: the transpose of a plain lookup adds each token's gradient to its row in the table's dtype. In bfloat16 a
frequent token's row then stops growing, at some 256 times what is added; and a GPU adds in whatever order its atomic
operations come. Here a row is one sum, in float32 and always in the same order, rounded once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from falcon_jax.config import FalconConfig
from falcon_jax.model.linear import declare
from pallas_kernels.peers import Addresses, add_rows, gather_columns
from pallas_kernels.sharded import HEAD_AXIS, over_axis

# Tokens whose gradients one small product adds up; a multiple of what matrix instructions take.
CHUNK_TOKENS = 128


class Embedding(nnx.Module):
    """Token vectors; with a tied head also the output projection.

    Where the vocabulary is split over "tensor", each device looks up what it has and the results add up: left to itself
    XLA gathers the whole table. The sum is XLA's, or with `peers` a kernel's.
    """

    def __init__(self, config: FalconConfig, mesh: Mesh | None):
        self.weight = declare((config.vocab_size, config.width), "normal")
        self.mesh = mesh

    def __call__(self, token_ids: Int[Array, "B T"], peers: Addresses | None = None) -> Float[Array, "B T D"]:
        table = self.weight[...]
        if not is_split(table.shape[0], self.mesh):
            return look_up(table, token_ids)
        whole, first = PartitionSpec(), PartitionSpec(HEAD_AXIS)
        if peers is None:
            found = over_axis(self._of_shard, HEAD_AXIS, self.mesh, (first, whole), whole)
            return found(table, token_ids)

        def of_device(table: Array, token_ids: Array, mailboxes: Array) -> Array:
            rows = self._own(table, token_ids).reshape(-1, table.shape[1])
            return add_rows(rows, mailboxes.reshape(-1), peers).reshape(*token_ids.shape, -1)

        return over_axis(of_device, HEAD_AXIS, self.mesh, (first, whole, first), whole)(table, token_ids, peers.table)

    @staticmethod
    def _of_shard(table: Float[Array, "rows D"], token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jax.lax.psum(Embedding._own(table, token_ids), HEAD_AXIS)

    @staticmethod
    def _own(table: Float[Array, "rows D"], token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Zeros for tokens that another device has."""
        own = token_ids - jax.lax.axis_index(HEAD_AXIS) * table.shape[0]
        is_here = (own >= 0) & (own < table.shape[0])
        # All others share a row, whose gradient from here is zero.
        return jnp.where(is_here[..., None], look_up(table, jnp.where(is_here, own, 0)), 0)


def is_split(vocab_size: int, mesh: Mesh | None) -> bool:
    """Whether a vocabulary lies over the mesh's tensor axis."""
    count = 1 if mesh is None else mesh.shape.get(HEAD_AXIS, 1)
    return count > 1 and vocab_size % count == 0


def gathered(logits: Float[Array, "*batch V"], mesh: Mesh | None, peers: Addresses) -> Float[Array, "*batch V"]:
    """Whole on all devices, by a kernel."""
    V = logits.shape[-1]
    if not is_split(V, mesh):
        return logits

    def of_device(logits: Array, mailboxes: Array) -> Array:
        return gather_columns(logits, mailboxes.reshape(-1), peers)

    whole, columns = PartitionSpec(), PartitionSpec(None, HEAD_AXIS)
    gather = over_axis(of_device, HEAD_AXIS, mesh, (columns, PartitionSpec(HEAD_AXIS)), whole)
    return gather(logits.reshape(-1, V), peers.table).reshape(logits.shape)


@jax.custom_vjp
def look_up(table: Float[Array, "V D"], token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of `table`; differentiable in it, by `row_sums`. Ids must be those of rows."""
    return table[token_ids]


def _forward(table: Array, token_ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up(table, token_ids), (token_ids, jnp.zeros((0, table.shape[0]), table.dtype))


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    token_ids, like_table = kept
    rows = gradient.reshape(-1, gradient.shape[-1])
    return row_sums(token_ids.reshape(-1), rows, like_table.shape[1], like_table.dtype), None


look_up.defvjp(_forward, _backward)


def row_sums(
    ids: Int[Array, " n"], values: Float[Array, "n D"], num_rows: int, dtype: DTypeLike
) -> Float[Array, "rows D"]:
    """Of each id 0 .. num_rows-1 the sum of its values: added up in float32 in a fixed order, rounded once to `dtype`.

    The values are sorted by id and cut into chunks. In a chunk a product with a matrix of zeros and ones gives each
    value the sum over those of its id; where an id goes on from chunk to chunk, a second one adds the chunks' sums.
    The last value of each id then has all of it, and goes to the id's row.
    """
    n, D = values.shape
    chunk = min(CHUNK_TOKENS, n)
    num_chunks = math.ceil(n / chunk)
    order = jnp.argsort(ids, stable=True)
    padding = num_chunks * chunk - n
    ids = jnp.pad(ids[order], (0, padding), constant_values=num_rows)
    values = jnp.pad(values[order], ((0, padding), (0, 0))).reshape(num_chunks, chunk, D)
    by_chunk = ids.reshape(num_chunks, chunk)
    add = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # else a GPU would round float32 values

    is_same = by_chunk[:, :, None] == by_chunk[:, None, :]
    sums = add("cij,cjd->cid", is_same.astype(values.dtype), values)
    first, last = by_chunk[:, 0], by_chunk[:, -1]
    number = jnp.arange(num_chunks)
    goes_on = (last == first[:, None]) & (number < number[:, None])  # [chunk, an earlier one]
    before = add("ce,ed->cd", goes_on.astype(jnp.float32), sums[:, -1])
    sums += jnp.where((by_chunk == first[:, None])[..., None], before[:, None], 0)

    is_final = ids != jnp.append(ids[1:], num_rows)
    # The others go nowhere, and each to another nowhere: what no two values share needs no atomic operation.
    places = jnp.where(is_final, ids, num_rows + 1 + jnp.arange(ids.size, dtype=ids.dtype))
    made = jnp.zeros((num_rows, D), dtype)
    return made.at[places].set(sums.reshape(-1, D).astype(dtype), mode="drop", unique_indices=True)
