"""Codes found on calibration inputs: they keep the products better than the nearest codes do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import FORMS, QuantizedWeight, dequantize, quantize, quantize_calibrated, storage


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def correlated(num_rows: int, num_inputs: int) -> np.ndarray:
    """Rows that lie near few directions, as a model's hidden states do."""
    strengths = np.random.default_rng(1).uniform(0, 1, (num_inputs, 1)).astype(np.float32) ** 4
    return normal(num_rows, num_inputs, seed=2) @ (strengths * normal(num_inputs, num_inputs, seed=3))


def calibrated(w: np.ndarray, hessian: np.ndarray, form: str = "int4") -> QuantizedWeight:
    return quantize_calibrated(jnp.asarray(w), jnp.asarray(hessian), form)


def product_error(x: np.ndarray, w: np.ndarray, made) -> float:
    return float(np.linalg.norm(x @ (w - np.asarray(dequantize(made, *w.shape)))) / np.linalg.norm(x @ w))


@pytest.mark.parametrize("form", FORMS)
def test_products_with_correlated_inputs_are_closer_than_with_the_nearest_codes(form):
    # Neither is whole tiles: 300 inputs are 2 groups and a half, 200 outputs 3 tiles and a part.
    x, w = correlated(1000, 300), normal(300, 200)
    made, nearest = calibrated(w, x.T @ x, form), quantize(w, form)
    expected = storage(form, 300, 200)
    assert [(part.shape, part.dtype) for part in made] == [(part.shape, part.dtype) for part in expected]
    assert product_error(x, w, made) < 0.5 * product_error(x, w, nearest)


def test_one_group_is_rounded_as_the_formula_says():
    """Against the inverse of H and numpy's float64, code by code."""
    num_inputs, num_outputs = 24, 64
    x, w = correlated(100, num_inputs), normal(num_inputs, num_outputs)
    hessian = x.T @ x
    made = calibrated(w, hessian)
    scales = np.asarray(made.scales)[0, 0].astype(np.float64)
    damped = hessian.astype(np.float64)
    damped += 0.01 * np.diagonal(damped).mean() * np.eye(num_inputs)
    inverse, left, expected = np.linalg.inv(damped), w.astype(np.float64), np.empty(w.shape)
    for i in range(num_inputs):
        expected[i] = np.clip(np.round(left[i] / scales), -8, 7) * scales
        left[i:] -= inverse[i:, i : i + 1] / inverse[i, i] * (left[i] - expected[i])
        # What is left of H without input i, inverted.
        inverse -= inverse[:, i : i + 1] * inverse[i] / inverse[i, i]
    found = np.asarray(dequantize(made, num_inputs, num_outputs))
    assert (np.abs(found - expected) > 1e-6).mean() < 0.002  # where float32 falls on the other side of a half


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_say_nothing_of_one_another_leave_the_nearest_codes(form):
    w = normal(300, 70)
    made, nearest = calibrated(w, 7.5 * np.eye(300, dtype=np.float32), form), quantize(w, form)
    for part, same in zip(made, nearest, strict=True):
        np.testing.assert_array_equal(part, same)


@pytest.mark.parametrize("dead", [[3, 130, 299], range(300)], ids=["some", "all"])
def test_an_input_that_was_always_zero_gets_the_nearest_codes_and_disturbs_no_other(dead):
    x, w = correlated(1000, 300), normal(300, 64)
    x[:, list(dead)] = 0
    made = np.asarray(dequantize(calibrated(w, x.T @ x), 300, 64))
    assert np.isfinite(made).all()
    if len(dead) == 300:
        np.testing.assert_array_equal(made, dequantize(quantize(w, "int4"), 300, 64))
        return
    # Of whole steps of its own group, whose scale may be another than the nearest codes'.
    assert np.all(np.abs(made - w)[list(dead)] <= 0.3 * np.abs(w).max())
    live = np.setdiff1d(np.arange(300), list(dead))
    assert product_error(x, w, calibrated(w, x.T @ x)) < 0.5 * product_error(x, w, quantize(w, "int4"))
    assert np.abs(made - w)[live].max() < 2


def test_fewer_rows_than_inputs_and_huge_outliers_give_finite_codes():
    x = correlated(20, 300)
    x[:, 5] *= 1e4
    x[:, 6] = x[:, 5]
    w = normal(300, 64)
    for hessian in (x.T @ x, 1e12 * (x.T @ x), 1e-12 * (x.T @ x)):
        made = calibrated(w, hessian)
        assert np.isfinite(np.asarray(dequantize(made, 300, 64))).all()
        assert product_error(x, w, made) < 0.8 * product_error(x, w, quantize(w, "int4"))


def test_a_hessian_that_float32_cannot_factor_is_damped_until_it_can():
    hessian = np.eye(128, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 3  # no sum of products: an eigenvalue is -2
    made = dequantize(calibrated(normal(128, 64), hessian), 128, 64)
    assert np.isfinite(np.asarray(made)).all()


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form is 'int3'"):
        calibrated(np.ones((4, 3)), np.eye(4), "int3")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_a_gpu_keeps_the_products_as_well_as_a_cpu_does():
    x, w = correlated(4096, 1024), normal(1024, 512)
    errors = []
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            errors.append(product_error(x, w, quantize_calibrated(jnp.asarray(w), jnp.asarray(x.T @ x))))
    assert errors[0] < 1.02 * errors[1]
