"""Parameters with their declarations, the linear projection and the layer norm."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.attention_norm import layer_norm
from pallas_kernels.quantized_matmul import Product, QuantizedWeight, quantized_matmul, storage


def declare(shape: tuple[int, ...], init: str, dtype: DTypeLike | None = None) -> nnx.Param:
    """A parameter's one declaration: its shape, and how `params.init` fills it.

    Modules are built without arrays; `params.bind` puts the real ones in.

    Args:
      init: "normal", "ones" or "zeros"; "quantized" where it is part of a weight that is made as a whole.
      dtype: None for the model's.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype or jnp.float32), init=init, has_own_dtype=dtype is not None)


def multiply(
    x: Float[Array, "*rows I"],
    weight: Float[Array, "I O"] | Float[Array, "O I"],
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*rows O"]:
    """x times a weight [I, O] ([O, I] if `transposed`), accumulated in float32 and rounded to `dtype` (None: x's)."""
    contract = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))

    def plain(x: Array, weight: Array) -> Array:
        return jax.lax.dot_general(x, weight, contract, preferred_element_type=dtype)

    def twice(x: Array, weight: Array) -> Array:
        return plain(jnp.concatenate([x, x], axis=-2), weight)[..., :1, :]

    if x.ndim < 2 or x.size != x.shape[-1] or x.dtype != jnp.bfloat16:
        return plain(x, weight)
    # XLA's CPU compiler has a bfloat16 product for two rows and more. For one it keeps a float32 copy of the weight,
    # made anew in every call: a second, larger model in memory, and twice the time (benchmarks/LOG.md).
    return jax.lax.platform_dependent(x, weight, cpu=twice, default=plain)


def apart(x: Array, count: int) -> tuple[Array, ...]:
    """`x` as several values, for products with weights too large to be joined.

    XLA joins products of one value up to a size that is far too large for us: in every call it copies their weights
    side by side first (benchmarks/LOG.md).
    """
    return jax.lax.optimization_barrier((x,) * count)


@jax.custom_vjp
def apart_backward(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, whose gradient is a value of its own, though that of another summand is the same: as `apart`, backward."""
    return x


apart_backward.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


@jax.custom_vjp
def plus_bias(x: Float[Array, "..."], bias: Float[Array, "*outputs"]) -> Float[Array, "..."]:
    """x + bias. The bias's gradient, a sum over all rows, adds up in float32; as the transpose of a plain addition it
    would in x's dtype."""
    return x + bias


def _plus_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    rows = tuple(range(gradient.ndim - bias.ndim))
    # Without the barrier XLA would keep the gradient in float32 as well, four bytes a number of the widest arrays.
    gradient = jax.lax.optimization_barrier(gradient)
    return gradient, jnp.sum(gradient, axis=rows, dtype=jnp.float32).astype(bias.dtype)


plus_bias.defvjp(lambda x, bias: (x + bias, bias), _plus_bias_backward)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """(x a) b scale: what an adapter adds to a projection (adapters.py)."""

    a: Float[Array, "*inputs r"]
    b: Float[Array, "r *outputs"]
    scale: float

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """In x's dtype, as are a and b where they are multiplied; sums in float32."""
        rank = self.b.shape[0]
        low = multiply(x, self.a.reshape(-1, rank).astype(x.dtype)) * self.scale
        return multiply(low, self.b.reshape(rank, -1).astype(x.dtype))


class Linear(nnx.Module):
    """A product with a weight of any shape [*inputs, *outputs], then the bias [*outputs], then what an adapter adds.

    As in FalconLinear of modeling_falcon.py the product is rounded to the model's dtype before the bias is added.

    Args:
      weights: "native", or the form of a weight of 8 or 4 bits, whose arrays are those of a matrix (quantize.py).
    """

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, bias: bool, weights: str = "native"):
        self.inputs, self.outputs = inputs, outputs
        self.weight: Any
        if weights == "native":
            self.weight = declare((*inputs, *outputs), "normal")
        else:
            self.weight = Quantized(math.prod(inputs), math.prod(outputs), weights)
        if bias:
            self.bias = declare(outputs, "zeros")
        self.adapter: LowRank | None = None  # see adapters.bind

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        leading = x.shape[: x.ndim - len(self.inputs)]
        # One plain matrix product, whatever the shapes: XLA has its fast paths for those.
        x = x.reshape(*leading, math.prod(self.inputs))
        if isinstance(self.weight, Quantized):
            product = quantized_matmul(x, self.weight.arrays(), self.num_outputs)
        else:
            product = multiply(x, self._native_matrix())
        product = product.reshape(*leading, *self.outputs)
        if hasattr(self, "bias"):
            product = plus_bias(product, self.bias[...])
        return product if self.adapter is None else product + self.adapter(x).reshape(product.shape)

    def matrix(self) -> Float[Array, "I O"] | QuantizedWeight:
        """The weight as kernels take it."""
        if isinstance(self.weight, Quantized):
            return self.weight.arrays()
        return self._native_matrix()

    def _native_matrix(self) -> Float[Array, "I O"]:
        return self.weight[...].reshape(math.prod(self.inputs), self.num_outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the native weight: inputs and outputs."""
        return (*self.inputs, *self.outputs)

    @property
    def num_outputs(self) -> int:
        return math.prod(self.outputs)

    def product(self, x: Any, activation: str | None = None, **rest: Any) -> Product:
        """What the projection is of rows x, for a launch that computes several. `x`, `rest`: as Product has them."""
        bias = self.bias[...].reshape(self.num_outputs) if hasattr(self, "bias") else None
        return Product(x, self.matrix(), self.num_outputs, bias, activation, **rest)


class Quantized(nnx.Module):
    """A weight [I, O] of 8 or 4 bits, as two parameters. shape: of the values."""

    def __init__(self, num_inputs: int, num_outputs: int, form: str):
        values, scales = storage(form, num_inputs, num_outputs)
        self.shape = values.shape
        self.values = declare(values.shape, "quantized", values.dtype)
        self.scales = declare(scales.shape, "quantized", scales.dtype)

    def arrays(self) -> QuantizedWeight:
        return QuantizedWeight(self.values[...], self.scales[...])


class LayerNorm(nnx.Module):
    """Layer norm over the last axis: statistics and affine in float32, rounded once to the input's dtype."""

    def __init__(self, width: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = declare((width,), "ones")
        self.bias = declare((width,), "zeros")

    def affine(self) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """Scale and shift."""
        return self.scale[...], self.bias[...]

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return layer_norm(x, self.affine(), self.epsilon)
