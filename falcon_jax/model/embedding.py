"""The token vectors: their lookup, and a gradient that adds up in float32. And logits, where a vocabulary is split.

The trap: the transpose of a plain lookup adds each token's gradient to its row in the table's dtype. In bfloat16 a
frequent token's row then stops growing, at some 256 times what is added; and a GPU adds in whatever order its atomic
operations come. Here a row is one sum, in float32 and always in the same order, rounded once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from falcon_jax.config import FalconConfig
from falcon_jax.model import quantize
from falcon_jax.model.linear import Quantized, declare
from pallas_kernels.peers import Addresses, add_rows, gather_columns
from pallas_kernels.quantized_matmul import TILE_OUTPUTS, QuantizedWeight, output_rows
from pallas_kernels.sharded import HEAD_AXIS, over_axis

# Tokens whose gradients one small product adds up; a multiple of what matrix instructions take.
CHUNK_TOKENS = 128


class Embedding(nnx.Module):
    """Token vectors; with a tied head also the output projection.

    Where the vocabulary is split over "tensor", each device looks up what it has and the results add up: left to itself
    XLA gathers the whole table. The sum is XLA's, or with `peers` a kernel's.

    Args:
      weights: what the model's projections are stored as, one of quantize.WEIGHTS. A table of few bits is the weight
        [width, tokens] of the head that it may be, and is not differentiable.
    """

    def __init__(self, config: FalconConfig, mesh: Mesh | None, weights: str = "native"):
        V, D = config.vocab_size, config.width
        form = quantize.form_of(quantize.EMBEDDING, weights)
        self.weight: Any = declare((V, D), "normal") if form == "native" else Quantized(D, V, form)
        self.width, self.mesh, self.is_split = D, mesh, is_split(V, mesh, weights)

    def __call__(
        self, token_ids: Int[Array, "B T"], dtype: DTypeLike, peers: Addresses | None = None
    ) -> Float[Array, "B T D"]:
        """dtype: of the vectors."""
        table = self.weight.arrays() if isinstance(self.weight, Quantized) else self.weight[...]

        def own(table: Array | QuantizedWeight, token_ids: Array) -> Float[Array, "B T D"]:
            """Zeros for tokens that another device has."""
            num_rows = _num_rows(table)
            row = token_ids - jax.lax.axis_index(HEAD_AXIS) * num_rows
            is_here = (row >= 0) & (row < num_rows)
            # All others share a row, whose gradient from here is zero.
            found = self._look_up(table, jnp.where(is_here, row, 0), dtype)
            return jnp.where(is_here[..., None], found, 0)

        if not self.is_split:
            return self._look_up(table, token_ids, dtype)
        whole, first = PartitionSpec(), PartitionSpec(HEAD_AXIS)
        if peers is None:
            found = over_axis(
                lambda *given: jax.lax.psum(own(*given), HEAD_AXIS), HEAD_AXIS, self.mesh, (first, whole), whole
            )
            return found(table, token_ids)

        def of_device(table: Array | QuantizedWeight, token_ids: Array, mailboxes: Array) -> Array:
            rows = own(table, token_ids).reshape(-1, self.width)
            return add_rows(rows, mailboxes.reshape(-1), peers).reshape(*token_ids.shape, -1)

        return over_axis(of_device, HEAD_AXIS, self.mesh, (first, whole, first), whole)(table, token_ids, peers.table)

    def _look_up(
        self, table: Array | QuantizedWeight, token_ids: Int[Array, "B T"], dtype: DTypeLike
    ) -> Float[Array, "B T D"]:
        if isinstance(table, QuantizedWeight):
            return output_rows(table, token_ids)[..., : self.width].astype(dtype)
        return look_up(table, token_ids).astype(dtype)


def _num_rows(table: Array | QuantizedWeight) -> int:
    """Tokens that a table has; of one in few bits in whole tiles."""
    return table.values.shape[0] * TILE_OUTPUTS if isinstance(table, QuantizedWeight) else table.shape[0]


def is_split(vocab_size: int, mesh: Mesh | None, weights: str) -> bool:
    """Whether a vocabulary, the embedding's and the head's, lies over the mesh's tensor axis."""
    count = 1 if mesh is None else mesh.shape.get(HEAD_AXIS, 1)
    tile = 1 if weights == "native" else TILE_OUTPUTS
    return count > 1 and vocab_size % (tile * count) == 0


def gathered(logits: Float[Array, "*batch V"], mesh: Mesh | None, peers: Addresses) -> Float[Array, "*batch V"]:
    """Logits of a split vocabulary, whole on all devices, by a kernel."""
    V = logits.shape[-1]

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
