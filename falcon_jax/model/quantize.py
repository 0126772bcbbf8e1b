"""Which parameters have a form of 8 or 4 bits, and how a tree with them is made of one without.

Those of the blocks' projections do: nearly all bytes that a decoding step reads. Embedding, head, norms and biases
keep the model's dtype. A quantized weight at path p is two arrays, p.values and p.scales, tiles of a matrix whose rows
are the projection's inputs, all of them, and whose columns its outputs (pallas_kernels/quantized_matmul/formats.py).
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.quantized_matmul import FORMS, TILE_OUTPUTS, QuantizedWeight, quantize, storage

WEIGHTS = ("native", *FORMS)
_PROJECTION = re.compile(r"layers\.\d+\.(attention\.(query|key|value|output)|mlp\.(up|down))\.weight")
# Of a host's array at a time, whole tiles: what is computed in float32 stays small beside the tensor.
_HOST_COLUMNS = 4 * TILE_OUTPUTS


def require_weights(weights: str) -> str:
    """Raises ValueError for an unknown kind of weights."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; supported: {', '.join(map(repr, WEIGHTS))}")
    return weights


def is_quantizable(path: str) -> bool:
    """Whether the parameter at that path of a native tree is stored in few bits by the other kinds of weights."""
    return _PROJECTION.fullmatch(path) is not None


def matrix_shape(path: str, shape: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of a projection's weight [*inputs, *outputs]."""
    num_input_axes = 2 if path.endswith("attention.output.weight") else 1
    return math.prod(shape[:num_input_axes]), math.prod(shape[num_input_axes:])


def named(path: str, weight: QuantizedWeight) -> dict[str, Any]:
    """The arrays (or what stands for them) by their own paths."""
    return {f"{path}.{name}": array for name, array in weight._asdict().items()}


def described(path: str, shape: Sequence[int], dtype: Any, weights: str) -> dict[str, jax.ShapeDtypeStruct]:
    """What becomes of one native parameter: itself, or the arrays of its quantized form."""
    if weights == "native" or not is_quantizable(path):
        return {path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))}
    return named(path, storage(weights, *matrix_shape(path, shape)))


def on_device(path: str, array: jax.Array, weights: str, layouts: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A native parameter's arrays by path, quantized where it lies and laid out as `layouts` says of those paths."""
    if weights == "native" or not is_quantizable(path):
        return {path: array}
    wanted = QuantizedWeight(*(layouts[f"{path}.{name}"] for name in QuantizedWeight._fields))
    return named(path, _quantizer(weights, matrix_shape(path, array.shape), wanted)(array))


def on_host(path: str, array: np.ndarray, weights: str) -> dict[str, np.ndarray]:
    """The same for a host's array, some columns at a time on a CPU device."""
    if weights == "native" or not is_quantizable(path):
        return {path: array}
    matrix = array.reshape(matrix_shape(path, array.shape))
    made = QuantizedWeight(*(np.empty(part.shape, part.dtype) for part in storage(weights, *matrix.shape)))
    cpu = jax.local_devices(backend="cpu")[0]
    for first in range(0, matrix.shape[1], _HOST_COLUMNS):
        columns = np.ascontiguousarray(matrix[:, first : first + _HOST_COLUMNS])
        part = quantize(jax.device_put(columns, cpu), weights)
        tile = first // TILE_OUTPUTS
        for whole, some in zip(made, part, strict=True):
            whole[tile : tile + len(some)] = np.asarray(some)
    return named(path, made)


@functools.lru_cache(maxsize=64)
def _quantizer(weights: str, shape: tuple[int, int], layouts: QuantizedWeight):
    return jax.jit(lambda array: quantize(array.reshape(shape), weights), out_shardings=layouts)
