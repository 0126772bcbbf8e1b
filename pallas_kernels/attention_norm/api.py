"""`attention_norm`: what models call. Checks the arguments, picks the implementation, runs it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch
from pallas_kernels.attention_norm.reference import Norm, attention_norm_xla


def attention_norm(
    xs: Sequence[Float[Array, "*rows _"]],
    weights: Sequence[Any],
    residual: Float[Array, "*rows D"],
    norms: Sequence[Norm],
    *,
    biases: Sequence[Float[Array, " D"]] = (),
    epsilon: float,
    counter: Int[Array, "1"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows D"], list[Float[Array, "*rows D"]], Int[Array, "1"]]:
    """What a layer's output projections add to the residual, and the layer norms that the next stage reads.

    Args:
      xs, weights: one or several inputs [..., I] with their weights [I, D], or QuantizedWeights; all of one form.
      norms: scale and shift [D] of each norm, one or more.
      biases: as many as `xs`, or none.
      counter: what the call before returned, or None for the first of a chain: where blocks of the kernel meet.
      implementation: "mosaic" (Hopper GPUs, bfloat16, up to 64 rows), "xla", or None for the first that takes the call.

    Returns:
      The new residual, a normalized copy for each norm, in the residual's dtype; and the counter for the next call.

    Raises:
      ValueError: shapes that do not fit, or an unknown `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    D = residual.shape[-1]
    if not norms or len(xs) != len(weights) or len(biases) not in (0, len(xs)):
        given = f"{len(xs)} inputs, {len(weights)} weights, {len(biases)} biases and {len(norms)} norms"
        raise ValueError(f"attention_norm: {given}; it takes as many of the first two, and at least one norm")
    if counter is None:
        counter = jnp.zeros(1, jnp.int32)
    candidates = {"mosaic": lambda: _mosaic_reason(xs, weights, D), "xla": lambda: None}
    if dispatch.choose("attention_norm", implementation, candidates) == "xla":
        return *attention_norm_xla(xs, weights, biases, residual, norms, epsilon), counter

    from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic
    from pallas_kernels.quantized_matmul.stream import in_eights

    out, normed, counter = attention_norm_mosaic(
        [in_eights(x) for x in xs], weights, biases, in_eights(residual), norms, counter, epsilon=epsilon
    )
    num_rows = residual.size // D

    def back(x: Array) -> Array:
        return x[:num_rows].reshape(residual.shape)

    return back(out), [back(x) for x in normed], counter


def _mosaic_reason(xs: Sequence[Array], weights: Sequence[Any], num_outputs: int) -> str | None:
    if (reason := compat.mosaic_reason()) is not None:
        return reason
    from pallas_kernels.quantized_matmul.stream import form_of, reason_against

    if len({form_of(weight) for weight in weights}) > 1:
        return "it takes weights of one form"
    reasons = [reason_against(x, weight, num_outputs) for x, weight in zip(xs, weights, strict=True)]
    return next(filter(None, reasons), None)
