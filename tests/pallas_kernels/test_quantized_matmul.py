"""Weights of 8 and 4 bits: what they stand for, how they are packed, and products with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import (
    FORMS,
    Product,
    QuantizedWeight,
    dequantize,
    output_rows,
    project,
    quantize,
    quantized_matmul,
    storage,
)
from pallas_kernels.quantized_matmul.formats import dequantize_transposed, pack, unpack
from pallas_kernels.quantized_matmul.reference import matmul_reference
from tests.pallas_kernels.tolerance import require_close

# 4544 / 128 is 35.5: the last group of falcon-7b's projections is half full.
SHAPES = [(128, 8), (64, 3), (200, 5), (4544, 16), (1, 1)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def some_codes(form: str, *shape: int) -> np.ndarray:
    lowest, highest = (-127, 127) if form == "int8" else (-8, 7)
    return np.random.default_rng(0).integers(lowest, highest + 1, shape).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_weights_come_back_within_half_a_step(form, shape):
    w = normal(*shape)
    made = quantize(jnp.asarray(w), form)
    expected = storage(form, *shape)
    assert (made.form, made.values.shape, made.scales.shape) == (form, expected.values.shape, expected.scales.shape)
    assert (made.values.dtype, made.scales.dtype) == (expected.values.dtype, expected.scales.dtype)
    error = np.abs(np.asarray(dequantize(made, *shape)) - w)
    if form == "int8":
        assert np.all(error <= 0.5001 * np.abs(w).max(axis=0) / 127)
    else:
        # Half a step, or what the search for a scale cut off: at most a quarter of the largest, and the side of -8.
        groups = np.pad(np.abs(w), ((0, -shape[0] % 128), (0, 0))).reshape(-1, 128, shape[1])
        largest = np.repeat(groups.max(axis=1), 128, axis=0)[: shape[0]]
        assert np.all(error <= 0.36 * largest)
        assert np.sqrt((error**2).mean()) <= 0.11 * np.sqrt((w**2).mean()) + 1e-6 or shape[0] < 64


def test_searching_for_a_scale_loses_to_no_fixed_one():
    w = normal(256, 64)
    groups = w.reshape(2, 128, 64)
    step = np.abs(groups).max(axis=1, keepdims=True) / 7
    plain = np.clip(np.round(groups / step), -8, 7) * step
    error = np.asarray(dequantize(quantize(jnp.asarray(w), "int4"), 256, 64)) - w
    assert (error**2).mean() < 0.85 * ((plain - groups) ** 2).mean()


@pytest.mark.parametrize("form", FORMS)
def test_packing_keeps_every_code(form):
    codes = some_codes(form, 192, 256)
    values = pack(jnp.asarray(codes), form)
    assert (values.shape, values.dtype) == ((3, 2, 2048 if form == "int8" else 1024), jnp.int32)
    np.testing.assert_array_equal(unpack(values), codes)


@pytest.mark.parametrize("form", FORMS)
def test_a_code_lies_where_the_thread_that_multiplies_it_reads_it(form):
    """The formulas of formats.py, bit by bit; those of outputs and inputs are PTX's for wgmma.m64nNk16."""
    codes = some_codes(form, 192, 256)
    values = np.asarray(pack(jnp.asarray(codes), form)).view(np.uint32)
    rng = np.random.default_rng(1)
    for _ in range(500):
        tile_q, tile_p, warp, g, q, s = (int(rng.integers(size)) for size in (3, 2, 4, 8, 4, 8))
        r, h, e = (int(bit) for bit in rng.integers(0, 2, 3))
        code = int(codes[64 * tile_q + 16 * warp + 8 * r + g, 128 * tile_p + 16 * s + 8 * h + 2 * q + e])
        j = s if form == "int4" else 2 * s + r
        word = int(values[tile_q, tile_p, (j // 4) * 512 + 4 * (32 * warp + 4 * g + q) + j % 4])
        if form == "int4":
            assert (word >> 4 * (2 * h + r + 4 * e)) & 15 == code + 8
        else:
            assert (word >> 8 * (2 * h + e)) & 255 == code + 128


@pytest.mark.parametrize("shape", [(200, 5), (4544, 16), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_what_fills_the_last_tiles_counts_as_zero(form, shape):
    made = quantize(jnp.asarray(normal(*shape)), form)
    whole = np.asarray(dequantize_transposed(made))
    assert whole.shape == (64 * -(-shape[1] // 64), 128 * -(-shape[0] // 128))
    np.testing.assert_array_equal(whole[: shape[1], : shape[0]].T, dequantize(made, *shape))
    assert not np.any(whole[shape[1] :]) and not np.any(whole[:, shape[0] :])
    assert np.all(np.isfinite(made.scales))


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form):
    made = quantize(jnp.zeros((130, 4)), form)
    np.testing.assert_array_equal(dequantize(made, 130, 4), np.zeros((130, 4)))
    assert np.all(np.isfinite(made.scales))


@pytest.mark.parametrize("rows", [(), (1,), (3, 5), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(200, 24), (4544, 16)])
@pytest.mark.parametrize("form", FORMS)
def test_products(form, shape, dtype, rows):
    weight = quantize(jnp.asarray(normal(*shape)), form)
    x = jnp.asarray(normal(*rows, shape[0], seed=1), dtype)
    exact = matmul_reference(x.astype(jnp.float32), weight, shape[1])
    plain = x @ dequantize(weight, *shape).astype(dtype)
    made = jax.jit(quantized_matmul, static_argnames="num_outputs")(x, weight, num_outputs=shape[1])
    assert (made.dtype, made.shape) == (x.dtype, (*rows, shape[1]))
    if dtype == "float32":  # the plain version is the exact one
        np.testing.assert_allclose(made, exact, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(exact))))
    else:
        require_close(made, plain, exact)


@pytest.mark.parametrize("form", FORMS)
def test_results_may_be_float32_where_x_is_not(form):
    weight = quantize(jnp.asarray(normal(200, 24)), form)
    x = jnp.asarray(normal(3, 200, seed=1), "bfloat16")
    made = quantized_matmul(x, weight, 24, dtype="float32")
    assert made.dtype == jnp.float32
    # As the weight is multiplied: its codes, or what is rounded to x's dtype.
    plain = dequantize(weight, 200, 24)
    plain = plain if form == "int8" else plain.astype(x.dtype).astype(jnp.float32)
    np.testing.assert_allclose(made, x.astype(jnp.float32) @ plain, rtol=1e-5, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(quantized_matmul(x, weight, 24, dtype="float32") ** 2))(x)
    assert gradient.dtype == x.dtype
    expected = 2 * made @ plain.T
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), expected, rtol=0, atol=0.02 * float(jnp.abs(expected).max())
    )


def test_results_of_another_dtype_are_bare_products_in_float32():
    weight, x = quantize(jnp.asarray(normal(64, 64)), "int8"), jnp.zeros((3, 64), "bfloat16")
    for wrong in (
        Product(x, weight, 64, dtype="float16"),
        Product(x, weight, 64, bias=jnp.zeros(64, "bfloat16"), dtype="float32"),
        Product(x, weight, 64, activation="gelu", dtype="float32"),
    ):
        with pytest.raises(ValueError, match="bare products alone come in another dtype, in float32"):
            project([wrong])


@pytest.mark.parametrize("shape", [(200, 70), (4544, 16), (128, 192)])
def test_rows_of_some_outputs_are_those_of_the_whole_weight(shape):
    weight = quantize(jnp.asarray(normal(*shape)), "int8")
    outputs = jnp.asarray(np.random.default_rng(1).integers(0, shape[1], (3, 5)), jnp.int32).at[0, 0].set(shape[1] - 1)
    made = jax.jit(output_rows)(weight, outputs)
    assert made.shape == (3, 5, 128 * -(-shape[0] // 128))
    np.testing.assert_array_equal(made[..., : shape[0]], dequantize(weight, *shape).T[outputs])
    assert not np.any(made[..., shape[0] :])
    with pytest.raises(ValueError, match="takes a weight of 'int8', not 'int4'"):
        output_rows(quantize(jnp.asarray(normal(*shape)), "int4"), outputs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_and_vmap_see_the_weight_that_it_stands_for(form):
    weight = quantize(jnp.asarray(normal(200, 8)), form)
    x = jnp.asarray(normal(3, 200, seed=2))
    gradient = jax.grad(lambda x: jnp.sum(quantized_matmul(x, weight, 8) ** 2))(x)
    plain = dequantize(weight, 200, 8)
    np.testing.assert_allclose(gradient, 2 * (x @ plain) @ plain.T, rtol=1e-4, atol=1e-3)
    each = jax.vmap(lambda row: quantized_matmul(row, weight, 8))(x)
    np.testing.assert_allclose(each, quantized_matmul(x, weight, 8), rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_named():
    weight = quantize(jnp.asarray(normal(200, 8)), "int4")
    found = r"int4 values \(1, 2, 1024\) with scales \(1, 2, 64\)"
    with pytest.raises(ValueError, match=found + r" do not fit x \(3, 300\) and 8 outputs, .* \(1, 3, 1024\) with"):
        quantized_matmul(jnp.zeros((3, 300)), weight, 8)
    with pytest.raises(ValueError, match=found + r" do not fit x \(3, 200\) and 65 outputs, .* \(2, 2, 1024\) with"):
        quantized_matmul(jnp.zeros((3, 200)), weight, 65)
    with pytest.raises(ValueError, match="'int3'; known are 'int8', 'int4'"):
        quantize(jnp.zeros((4, 4)), "int3")
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        quantized_matmul(jnp.zeros((3, 200)), weight, 8, implementation="fast")
    with pytest.raises(ValueError, match="do not fit"):
        quantized_matmul(jnp.zeros((3, 200)), QuantizedWeight(weight.values, weight.scales[:, :1]), 8)
    for values in (weight.values[..., :1000], weight.values[0]):
        with pytest.raises(ValueError, match=r"values are .*; the last of their three axes is 2048 or 1024"):
            quantized_matmul(jnp.zeros((3, 200)), QuantizedWeight(values, weight.scales), 8)
