"""Kernels of two GPUs that add up and gather in each other's memory, thousands of launches in one CUDA graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from falcon_jax import sharding
from falcon_jax.generate.programs import WITH_LOOPS_IN_CUDA_GRAPHS
from pallas_kernels import peers
from pallas_kernels.attention_norm import attention_norm, attention_norm_deferred
from pallas_kernels.quantized_matmul import deferred, quantize
from pallas_kernels.quantized_matmul.sharded import output_layout
from tests.pallas_kernels.test_on_gpu import normal
from tests.pallas_kernels.tolerance import require_close

pytestmark = pytest.mark.gpu
WHOLE, FIRST, COLUMNS = PartitionSpec(), PartitionSpec("tensor"), PartitionSpec(None, "tensor")
EPSILON = 1e-5


@pytest.fixture
def mesh():
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    made = sharding.make_mesh(tensor=2)
    if (reason := peers.reason_against(made)) is not None:
        pytest.skip(reason)
    return made


def put(mesh, x, spec=WHOLE):
    return jax.device_put(x, NamedSharding(mesh, spec))


def bits(x):
    """On each device."""
    return [np.asarray(shard.data).view(np.uint8) for shard in x.addressable_shards]


# Width, form, rows, rows that mean something, whether norms are deferred.
STAGES = [
    (8192, "native", 8, 1, True), (8192, "native", 16, 16, False), (8192, "int8", 8, 4, True),
    (4544, "native", 8, 1, False), (2048, "native", 8, 2, True), (4544, "int4", 8, 3, True),
    (14848, "int8", 16, 9, False), (8192, "int4", 64, 64, False),
]  # fmt: skip


@pytest.mark.parametrize(("width", "form", "rows", "num_rows", "defers"), STAGES)
def test_output_stages_that_add_up_over_devices(mesh, width, form, rows, num_rows, defers):
    def weight(seed, num_inputs):
        w = normal(seed, num_inputs, width) * num_inputs**-0.5
        w = w if form == "native" else quantize(w, form)
        return jax.tree.map(functools.partial(put, mesh), w, output_layout(w, True))

    xs = [put(mesh, normal(i, rows, size), COLUMNS) for i, size in enumerate((4096, 8192))]
    weights = [weight(2, 4096), weight(3, 8192)]
    residual, norms = put(mesh, normal(4, rows, width)), [(put(mesh, normal(5, width)), put(mesh, normal(6, width)))]
    biases = [put(mesh, normal(7, width)), put(mesh, normal(8, width))]
    mailboxes = peers.Mailboxes(mesh, rows, width)

    def stage(xs, weights, residual, norms, biases, meeting=None, addresses=None):
        options = {"biases": biases, "epsilon": EPSILON, "mesh": mesh, "are_split": [True, True]}
        options |= {"peers": addresses, "num_rows": num_rows}
        if addresses is not None and defers:
            out, (scaled,), moments = attention_norm_deferred(xs, weights, residual, norms, **options)
            return out[:num_rows], deferred.finish(scaled, moments)[:num_rows], None
        out, (normed,), meeting = attention_norm(xs, weights, residual, norms, meeting=meeting, **options)
        return out[:num_rows], normed[:num_rows], meeting

    @functools.partial(jax.jit, compiler_options=WITH_LOOPS_IN_CUDA_GRAPHS)
    def repeat(xs, weights, residual, norms, biases, addresses):
        first = stage(xs, weights, residual, norms, biases, None, addresses)

        def again(_, carry):
            wrong, meeting = carry
            # Each pass reads the count, which is never below zero: none of them can be left out.
            same = residual + jnp.minimum(wrong, 0).astype(residual.dtype)
            made = stage(xs, weights, same, norms, biases, meeting, addresses)
            return wrong + (jnp.any(made[0] != first[0]) | jnp.any(made[1] != first[1])), made[2]

        wrong, _ = jax.lax.fori_loop(0, 10_000, again, (jnp.int32(0), first[2]))
        return first[0], first[1], wrong

    arguments = xs, weights, residual, norms, biases
    out, normed, wrong = repeat(*arguments, mailboxes.addresses)
    assert [int(shard.data) for shard in wrong.addressable_shards] == [0, 0]
    for made in (out, normed):
        one, other = bits(made)
        np.testing.assert_array_equal(one, other)
    plain_out, plain_normed, _ = jax.jit(stage)(*arguments)
    exact_arguments = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    exact_arguments = (exact_arguments[0], weights, *exact_arguments[2:])
    exact_out, exact_normed, _ = jax.jit(stage)(*exact_arguments)
    require_close(out, plain_out, exact_out)
    require_close(normed, plain_normed, exact_normed)


@pytest.mark.parametrize(("rows", "share"), [(1, 32512), (16, 25152), (3, 12576), (64, 8128)])
def test_rows_are_added_and_columns_gathered(mesh, rows, share):
    sums, columns = peers.Mailboxes(mesh, rows, 8192), peers.Mailboxes(mesh, rows, share)
    x = put(mesh, jax.random.normal(jax.random.key(0), (rows, 2 * share)), COLUMNS)
    parts = put(mesh, normal(1, 2, rows, 8192), FIRST)
    over = functools.partial(jax.shard_map, mesh=mesh, out_specs=WHOLE, check_vma=False)

    @functools.partial(over, in_specs=(COLUMNS, FIRST))
    def gather(x, table):
        return peers.gather_columns(x, table.reshape(-1), columns.addresses)

    @functools.partial(over, in_specs=(FIRST, FIRST))
    def add(part, table):
        return peers.add_rows(part[0], table.reshape(-1), sums.addresses)

    @functools.partial(jax.jit, compiler_options=WITH_LOOPS_IN_CUDA_GRAPHS)
    def repeat(x, parts, of_sums, of_columns):
        def again(i, carry):
            wrong, parts = carry
            exact = (parts[0].astype(jnp.float32) + parts[1].astype(jnp.float32)).astype(parts.dtype)
            moved = x + jnp.float32(i)
            differs = jnp.any(add(parts, of_sums) != exact) | jnp.any(gather(moved, of_columns) != moved)
            return wrong + differs, -parts

        return jax.lax.fori_loop(0, 1000, again, (jnp.int32(0), parts))[0]

    wrong = repeat(x, parts, sums.addresses.table, columns.addresses.table)
    assert [int(shard.data) for shard in wrong.addressable_shards] == [0, 0]
