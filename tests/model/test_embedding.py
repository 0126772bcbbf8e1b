"""The lookup of token vectors, and what its gradient adds up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.model.embedding import CHUNK_TOKENS, look_up, row_sums
from falcon_jax.model.linear import plus_bias

V, D = 50, 16
IDS = {
    "all different": np.random.default_rng(0).permutation(V)[:40],
    "one": np.array([7]),
    "one id alone": np.full(3 * CHUNK_TOKENS + 5, 3),
    "few ids, each over many chunks": np.random.default_rng(1).integers(0, 4, 9 * CHUNK_TOKENS),
    "ends where chunks end": np.repeat([4, 9, 2, 49], CHUNK_TOKENS),
    "as text has them": np.minimum(np.random.default_rng(2).zipf(1.3, 2000) - 1, V - 1),
}


@pytest.mark.parametrize("case", IDS)
def test_row_sums_are_those_of_a_loop(case):
    ids = IDS[case]
    values = np.random.default_rng(3).standard_normal((len(ids), D), np.float32)
    expected = np.zeros((V, D), np.float64)
    np.add.at(expected, ids, values.astype(np.float64))
    found = jax.jit(row_sums, static_argnums=(2, 3))(jnp.asarray(ids, jnp.int32), values, V, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)


def test_the_tables_gradient_is_that_of_a_plain_lookup():
    table = jax.random.normal(jax.random.key(0), (V, D))
    ids = jnp.asarray(IDS["as text has them"].reshape(4, 500), jnp.int32)
    weights = jax.random.normal(jax.random.key(1), (4, 500, D))
    plain = jax.grad(lambda table: (table[ids] * weights).sum())(table)
    ours = jax.jit(jax.grad(lambda table: (look_up(table, ids) * weights).sum()))(table)
    np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-4)


def test_a_frequent_token_gets_all_of_its_gradient_in_bfloat16():
    count = 4096
    table = jnp.zeros((V, D), jnp.bfloat16)
    ids = jnp.zeros((1, count), jnp.int32)
    gradient = jax.jit(jax.grad(lambda table: look_up(table, ids).astype(jnp.float32).sum()))(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient[0], np.float32), count)
    assert not np.asarray(gradient[1:], np.float32).any()


def test_a_bias_gets_all_of_its_gradient_in_bfloat16():
    count = 4096
    x = jnp.zeros((2, count // 2, 2, 8), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda bias: plus_bias(x, bias).astype(jnp.float32).sum()))(
        jnp.zeros((2, 8), jnp.bfloat16)
    )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), count)
