"""Projections of a new token and its attention in one launch: interpreted with race detection, the machine code, and on
a GPU beside the two launches that it stands for."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels import compat
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.plan import Plan
from pallas_kernels.decode_attention.projected import attend_projected, reason_against
from pallas_kernels.quantized_matmul import Moments, Product, deferred, project
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.stage_cases import normal, product_reference, weight
from tests.pallas_kernels.test_compiled import array, blocks_of_a_multiprocessor, require_no_problems
from tests.pallas_kernels.test_deferred import EPSILON, normalized
from tests.pallas_kernels.tolerance import require_close
from tests.thorough import thorough

H = 64


def arguments(width, num_heads, capacity, length, *, has_biases=True):
    """What the kernel is given, slopes among it, and the norm and x that its rows stand for."""
    x, norm = normal(1, 8, width) + 0.5, (normal(2, width), normal(3, width))
    [rows], moments = deferred.begin(x, [norm], EPSILON)
    size = num_heads * H
    products = [
        Product(rows, weight(10 + i, width, size, "native"), size, normal(20 + i, size) if has_biases else None)
        for i in range(3)
    ]
    keys, values = (normal(30 + i, 1, capacity, num_heads, H) for i in range(2))
    lengths = jnp.array([length], jnp.int32)
    places = jnp.where(lengths > 0, lengths - 1, capacity)
    slopes = 2.0 ** -jnp.arange(1, num_heads + 1, dtype=jnp.float32)
    return (products, moments, keys, values, lengths, places), slopes, (x, norm)


def two_launches(products, moments, keys, values, lengths, places, *, implementation, **options):
    """The same by what it stands for."""
    q, k, v = (y[:1].reshape(1, -1, H) for y in project(products, moments=moments, implementation=implementation))
    keys, values = (cache.at[0, places].set(new, mode="drop") for cache, new in ((keys, k), (values, v)))
    out = decode_attention(q, keys, values, lengths=lengths, implementation=implementation, **options)
    return out.reshape(1, -1), keys, values


def exact(given, slopes, stands_for, **options):
    """In float32, from end to end."""
    products, _, keys, values, lengths, places = given
    x, norm = stands_for
    x = normalized(x.astype(jnp.float32), norm)
    q, k, v = (product_reference(Product(x, p.weight, p.num_outputs, p.bias))[:1].reshape(1, -1, H) for p in products)
    keys, values = (
        cache.astype(jnp.float32).at[0, places].set(new, mode="drop") for cache, new in ((keys, k), (values, v))
    )
    out = decode_attention(q, keys, values, lengths=lengths, slopes=slopes, implementation="xla", **options)
    return out.reshape(1, -1), keys, values


def same_roundings(products, moments, keys, values, lengths, places, **options):
    """The same by plain JAX with the kernel's own roundings: the norm ends in the products, not before them."""
    num_inputs = products[0].x.shape[1]
    means, squares = moments.tiles[:, 0, : num_inputs // 64]
    mean = means.mean()
    variance = (squares + 64 * jnp.square(means - mean)).sum() / num_inputs
    made = []
    for product in products:
        rows = product.x.astype(jnp.float32) @ product.weight.astype(jnp.float32)
        y = (rows[0] - mean * rows[deferred.SCALE_ROW]) * lax.rsqrt(variance + EPSILON) + rows[deferred.SHIFT_ROW]
        y = y.astype(product.x.dtype)
        made.append((y if product.bias is None else y + product.bias).reshape(1, -1, H))
    q, k, v = made
    keys, values = (cache.at[0, places].set(new, mode="drop") for cache, new in ((keys, k), (values, v)))
    out = decode_attention(q, keys, values, lengths=lengths, implementation="xla", **options)
    return out.reshape(1, -1), keys, values


TWO_LAUNCHES = functools.partial(two_launches, implementation="xla")


def require_right(made, given, slopes, stands_for, plain: Callable[..., Any] = TWO_LAUNCHES, **options):
    others = plain(*given, slopes=slopes, **options)
    for some, other, right in zip(made, others, exact(given, slopes, stands_for, **options), strict=True):
        require_close(some[:1], other, right)


# Inputs, heads, slots, length: the new token in a first tile, in a later one, first of a tile, last of all, none.
CASES = [
    (192, 2, 192, 130, True),
    *thorough(
        [
            (192, 1, 128, 1, False),
            (128, 2, 128, 128, True),
            (320, 1, 128, 65, False),
            (128, 1, 64, 0, True),
        ]
    ),
]


@pytest.mark.parametrize(("width", "num_heads", "capacity", "length", "has_biases"), CASES)
def test_interpreted(width, num_heads, capacity, length, has_biases):
    given, slopes, stands_for = arguments(width, num_heads, capacity, length, has_biases=has_biases)
    options = {"alibi": "float32", "scale": H**-0.5}
    with interpreted():
        assert reason_against(given[0], given[2]) is None
        made = jax.block_until_ready(attend_projected(*given, slopes=slopes, **options))
    require_right(made, given, slopes, stands_for, **options)
    require_right(made, given, slopes, stands_for, same_roundings, **options)


def test_interpreted_with_fewer_chunks_of_weights_than_stages():
    given, slopes, stands_for = arguments(128, 1, 256, 200)
    options = {"alibi": "float32", "scale": H**-0.5}
    with interpreted():
        step = functools.partial(attend_projected, plan=Plan(64, 1, 4, 1), slopes=slopes, **options)
        made = jax.block_until_ready(step(*given))
    require_right(made, given, slopes, stands_for, **options)


@pytest.mark.parametrize("num_heads", [32, *thorough([64])])
def test_it_is_one_launch_without_spills(compiler, num_heads):
    width, size = num_heads * H, num_heads * H
    x, bias = array((8, width), "bfloat16"), array((size,), "bfloat16")
    cache = array((1, 4352, num_heads, H), "bfloat16")
    products = [Product(x, array((width, size), "bfloat16"), size, bias) for _ in range(3)]
    moments = Moments(array((2, 8, deferred.padded_tiles(width)), "float32"), EPSILON)
    one, slopes = array((1,), "int32"), array((num_heads,), "float32")
    step = functools.partial(attend_projected, alibi="float32", scale=H**-0.5)
    report = compiler.compile(step, products, moments, cache, cache, one, one, slopes=slopes)
    require_no_problems(report)
    assert [name for name in report.launches if name != "copy"] == ["mosaic_gpu_v2"]
    [kernel] = report.kernels
    # Clusters of four do not all find room unless two blocks share a multiprocessor; clusters of two do.
    assert blocks_of_a_multiprocessor(kernel) == {32: 2, 64: 1}[num_heads]


def test_what_it_does_not_take():
    (products, moments, keys, _, *lengths), slopes, _ = arguments(128, 2, 128, 1)

    def reason(*shape, dtype="bfloat16", **changes):
        changed = [dataclasses.replace(product, **changes) for product in products]
        return str(reason_against(changed, jnp.zeros(shape, dtype)))

    assert "Hopper" in reason(1, 128, 2, H)
    with compat.assume_capability(compat.HOPPER):
        assert "one row of 2 heads" in reason(2, 128, 2, H)
        assert "heads of 128" in reason(1, 128, 1, 128)
        assert "one row of 1 heads" in reason(1, 128, 1, H)
        assert "bfloat16 with keys in float16" in reason(1, 128, 2, H, dtype="float16")
        assert "float32" in reason(1, 128, 2, H, x=products[0].x.astype(jnp.float32))
        assert "weights of 16 bits" in reason(1, 128, 2, H, weight=weight(1, 128, 128, "int8"))
        assert "neither rotates" in reason(1, 128, 2, H, activation="gelu")
        assert "2 heads of such a cache are no clusters" in reason(1, 64, 2, H)
        with pytest.raises(ValueError, match="attend_projected: it takes one row"):
            cache, options = keys[:, :, :1], {"alibi": "float32", "scale": 1.0}
            attend_projected(products, moments, cache, cache, *lengths, slopes=slopes[:1], **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_heads", "capacity", "length", "plain"),
    [
        *[(heads, 4352, length, TWO_LAUNCHES) for heads in (32, 64) for length in (1, 64, 700, 4000, 4352, 0)],
        # Three blocks a head. For this token XLA, which rounds rows before the products, is by chance twice as exact.
        (32, 192, 150, same_roundings),
    ],
)
def test_on_a_gpu_it_is_right_and_always_the_same(num_heads, capacity, length, plain):
    given, slopes, stands_for = arguments(num_heads * H, num_heads, capacity, length)
    options = {"alibi": "float32", "scale": H**-0.5}
    step = jax.jit(functools.partial(attend_projected, slopes=slopes, **options))
    made = jax.block_until_ready(step(*given))
    require_right(made, given, slopes, stands_for, plain, **options)
    differ = jax.jit(lambda some, other: sum((x[:1] != y[:1]).sum() for x, y in zip(some, other, strict=True)))
    assert sum(differ(made, step(*given)) for _ in range(200)) == 0
