"""`quantized_matmul`: what models call. Checks the arguments, picks the implementation, runs it."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.quantized_matmul.formats import QuantizedWeight, storage
from pallas_kernels.quantized_matmul.reference import matmul_xla


def quantized_matmul(
    x: Float[Array, "*rows I"], weight: QuantizedWeight, num_outputs: int, *, implementation: str | None = None
) -> Float[Array, "*rows O"]:
    """x times a weight of 8 or 4 bits (formats.py), added up in float32.

    Differentiable with respect to x.

    Args:
      num_outputs: O, which the weight's tiles tell only up to a multiple of 64.
      implementation: "xla", or None for the first that takes the call.

    Returns:
      [..., O] in x's dtype.

    Raises:
      ValueError: arrays that are no weight [I, O], or an unknown `implementation`.
    """
    expected = storage(weight.form, x.shape[-1], num_outputs)
    if (weight.values.shape, weight.scales.shape) != (expected.values.shape, expected.scales.shape):
        found = f"values {weight.values.shape} with scales {weight.scales.shape}"
        wanted = f"{expected.values.shape} with {expected.scales.shape}"
        raise ValueError(
            f"quantized_matmul: {weight.form} {found} do not fit x {x.shape} and {num_outputs} outputs, which take "
            f"{wanted}"
        )
    dispatch.choose("quantized_matmul", implementation, {"xla": lambda: None})
    return matmul_xla(x, weight, num_outputs)
