"""Interpretation itself: it runs a kernel as written, and does not pass over threads that get in each other's way."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.interpreted import interpreted

ROWS = 8


def run(*, in_order: bool) -> jax.Array:
    """One warpgroup leaves twice x in shared memory, and the other takes it from there."""
    x = jnp.arange(ROWS * 128, dtype=jnp.float32).reshape(ROWS, 128)

    @functools.partial(
        plgpu.kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={"smem": plgpu.SMEM(x.shape, x.dtype), "left": plgpu.Barrier(num_arrivals=1)},
        num_threads=2,
        thread_name="warpgroup",
    )
    def kernel(x, out, *, smem, left):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _leave():
            smem[...] = 2.0 * x[...]
            plgpu.barrier_arrive(left)

        @pl.when(warpgroup == 1)
        def _take():
            if in_order:
                plgpu.barrier_wait(left)
            out[...] = smem[...]
            if not in_order:
                plgpu.barrier_wait(left)

    with interpreted():
        return jax.block_until_ready(kernel(x))


def test_a_kernel_is_run():
    assert jnp.array_equal(run(in_order=True), 2.0 * jnp.arange(ROWS * 128).reshape(ROWS, 128))


def test_a_data_race_fails():
    with pytest.raises(AssertionError, match="a data race"):
        run(in_order=False)
