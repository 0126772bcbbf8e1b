"""Codes found on calibration text: each input's rounding error is made up for by the inputs that come after it.

With x the rows of inputs that a projection sees, and H = sum over rows of x x^T, rounding W to W' changes the outputs
by a squared error of trace((W - W')^T H (W - W')). Inputs are rounded one by one; what the rounding of input i does to
the outputs is taken back, as far as it can be, by the weights of the inputs behind i. With H^-1 = U^T U, U upper
triangular, the best way is

    e = (W[i] - W'[i]) / U[i, i]        W[j] -= U[i, j] e    for all j > i

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022),
section 3.3. The formats are those of formats.py, and so is the search of scales, but that it weighs each input's error
by what it costs: falcon-nano at 4 bits loses a tenth less than without (benchmarks/results/falcon-nano-quantized.json).

The trap: U is not computed by inverting H. H = R R^T with R upper triangular (Cholesky's factorization from the last
input to the first) gives U = R^-1: one factorization and one triangular inverse, whose condition is the square root
of H's, so that float32 is enough.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.formats import (
    GROUP,
    TILE_OUTPUTS,
    QuantizedWeight,
    best_scales,
    pack,
    require_form,
)

DAMPING = 0.01  # of the mean of H's diagonal, added to it; as in the paper
_MAX_DAMPING = 1e4


def quantize_calibrated(
    weight: Float[Array, "I O"], hessian: Float[Array, "I I"], form: str = "int4"
) -> QuantizedWeight:
    """Codes that keep the products with the inputs that `hessian` tells of; `quantize`'s where it is c times identity.

    Memory: a few float32 copies of the weight and of the hessian. An input that was always zero (its row and column
    of the hessian are) is rounded to the nearest code, and no other input makes up for it.

    Args:
      weight: of any float dtype.
      hessian: float32, the sum (or mean: its scale does not matter) of x x^T over rows of inputs x. Finite.
      form: "int4": a group's scales are searched when its turn comes, on weights that already make up for the inputs
        before it. "int8": each output's scale is that of `quantize`.

    Raises:
      ValueError: an unknown form.
    """
    require_form(form)
    num_inputs, num_outputs = weight.shape
    pad_in, pad_out = -num_inputs % GROUP, -num_outputs % TILE_OUTPUTS
    w = jnp.pad(weight.astype(jnp.float32), ((0, pad_in), (0, pad_out)))
    return _rounded(w, _feedback(jnp.pad(hessian.astype(jnp.float32), ((0, pad_in), (0, pad_in)))), form)


@jax.jit
def _feedback(hessian: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """U, upper triangular, of the damped hessian H: H^-1 = U^T U.

    Where float32 cannot factor it, tenfold damping is tried, and so on.
    """
    diagonal = jnp.diagonal(hessian)
    is_live = diagonal > 0
    mean = jnp.sum(jnp.where(is_live, diagonal, 0)) / jnp.maximum(jnp.sum(is_live), 1)
    # Of mean diagonal 1, and the identity where an input was always zero.
    scaled = hessian / jnp.where(mean > 0, mean, 1.0) + jnp.diag(jnp.where(is_live, 0.0, 1.0))
    identity = jnp.eye(len(hessian), dtype=jnp.float32)

    def factored(damping: Array) -> Array:
        # The last input first: its lower factor, turned round again, is the upper one.
        return jnp.linalg.cholesky((scaled + damping * identity)[::-1, ::-1], symmetrize_input=True)

    def is_broken(state: tuple[Array, Array]) -> Array:
        damping, factor = state
        return ~jnp.all(jnp.isfinite(jnp.diagonal(factor))) & (damping < _MAX_DAMPING)

    def try_more(state: tuple[Array, Array]) -> tuple[Array, Array]:
        damping = state[0] * 10
        return damping, factored(damping)

    first = jnp.float32(DAMPING)
    _, factor = lax.while_loop(is_broken, try_more, (first, factored(first)))
    inverse = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    return inverse[::-1, ::-1]


@functools.partial(jax.jit, static_argnames="form")
def _rounded(w: Float[Array, "I O"], feedback: Float[Array, "I I"], form: str) -> QuantizedWeight:
    """Whole tiles, by U."""
    if form == "int8":
        largest = jnp.max(jnp.abs(w), axis=0)
        scales = jnp.where(largest > 0, largest / 127, 1.0)
        codes, _ = _round_groups(w, feedback, lambda group, importance: scales, (-127, 127))
        return QuantizedWeight(pack(codes.T, form), scales.reshape(-1, TILE_OUTPUTS))
    codes, scales = _round_groups(w, feedback, _searched, (-8, 7))
    return QuantizedWeight(pack(codes.T, form), scales.reshape(len(scales), -1, TILE_OUTPUTS).swapaxes(0, 1))


def _searched(group: Float[Array, "128 O"], importance: Float[Array, " 128"]) -> Float[Array, " O"]:
    return best_scales(group[None], importance[None])[0]


def _round_groups(
    w: Float[Array, "I O"],
    feedback: Float[Array, "I I"],
    scales_of: Callable[[Float[Array, "128 O"], Float[Array, " 128"]], Float[Array, " O"]],
    limits: tuple[int, int],
) -> tuple[Float[Array, "I O"], Float[Array, "P O"]]:
    """Codes of whole groups, and each group's scales."""

    def round_group(w: Float[Array, "I O"], group: Array) -> tuple[Float[Array, "I O"], Float[Array, " O"]]:
        first = group * GROUP
        mine = lax.dynamic_slice_in_dim(w, first, GROUP)
        to_all = lax.dynamic_slice_in_dim(feedback, first, GROUP)
        to_mine = lax.dynamic_slice_in_dim(to_all, first, GROUP, axis=1)
        # e^2 is what an input's error costs once the inputs behind it have made up for it.
        cost = 1 / jnp.square(jnp.diagonal(to_mine))
        scales = scales_of(mine, cost / jnp.max(cost))
        codes, errors = _round_inputs(mine, to_mine, scales.astype(jnp.float32), limits)
        # Rows before this group hold codes: U is zero there, and they stay what they are. The group's own are replaced.
        w = w - jnp.matmul(to_all.T, errors, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(w, codes, first, axis=0), scales

    return lax.scan(round_group, w, jnp.arange(len(w) // GROUP))


def _round_inputs(
    w: Float[Array, "128 O"], feedback: Float[Array, "128 128"], scales: Float[Array, " O"], limits: tuple[int, int]
) -> tuple[Float[Array, "128 O"], Float[Array, "128 O"]]:
    """One input after the other: codes, and errors by U's diagonal, which the inputs behind the group make up for."""

    def round_input(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        w, errors = state
        codes = jnp.clip(jnp.round(w[i] / scales), *limits)
        error = (w[i] - codes * scales) / feedback[i, i]
        # U[i] is zero before i: codes that stand there stay.
        w = w - feedback[i][:, None] * error
        return w.at[i].set(codes), errors.at[i].set(error)

    return lax.fori_loop(0, GROUP, round_input, (w, jnp.zeros_like(w)))
