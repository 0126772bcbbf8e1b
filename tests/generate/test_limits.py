"""What the cache can hold, by count and by memory."""

import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.errors import RequestError
from falcon_jax.generate import limits
from falcon_jax.model.cache import cache_bytes
from tests import models

CONFIG = models.tiny("falcon-40b")
DTYPE = np.dtype(np.float32)


def check(num_rows: int = 1, num_tokens: int = 100, **options) -> None:
    limits.check_cache(CONFIG, num_rows=num_rows, num_tokens=num_tokens, capacity=num_tokens, dtype=DTYPE, **options)


def test_default_bound_on_a_row_is_generous_and_finite():
    check(num_tokens=limits.ROW_TOKENS)
    with pytest.raises(RequestError, match=r"cannot hold 32769 tokens a row.*max_cache_tokens is 32768"):
        check(num_tokens=limits.ROW_TOKENS + 1)


def test_own_bound_replaces_the_default():
    check(num_tokens=limits.ROW_TOKENS + 1, max_cache_tokens=10**6)


def test_bytes_of_all_rows_must_fit():
    num_bytes = cache_bytes(CONFIG, 4, 100, DTYPE)
    check(num_rows=4, max_cache_bytes=num_bytes)
    with pytest.raises(RequestError, match=r"4 rows take .* GiB"):
        check(num_rows=4, max_cache_bytes=num_bytes - 1)


def test_a_mesh_divides_the_bytes(cpu_devices):
    mesh = sharding.make_mesh(data=2, tensor=2, devices=cpu_devices)
    check(num_rows=4, max_cache_bytes=cache_bytes(CONFIG, 1, 100, DTYPE), mesh=mesh)


def test_a_host_without_that_much_memory_refuses():
    with pytest.raises(RequestError, match="GiB are there"):
        check(num_rows=10**7, num_tokens=10**6, max_cache_tokens=10**7)


def test_free_memory_is_known_here(cpu_devices):
    free = limits.free_bytes()
    assert free is not None and free > 0
    shared = limits.free_bytes(sharding.make_mesh(data=8, devices=cpu_devices))
    assert shared is not None and shared < free
