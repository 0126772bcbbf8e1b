"""Which parameters have a form of 8 or 4 bits, and how a tree with them is made of one without.

The blocks' projections have the form that is asked for. Embedding and head have 8 bits beside either, which falcon-nano
does not notice; with a head in bfloat16 a step of 4 bits takes 2 % longer (benchmarks/LOG.md). Norms and biases keep
the model's dtype.

A quantized weight at path p is two arrays, p.values and p.scales, tiles of a matrix [inputs, outputs]
(pallas_kernels/quantized_matmul/formats.py). Of a projection the rows are all its inputs and the columns its outputs;
of the embedding the columns are the tokens, as of the head, which it may be.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_jax import sharding
from pallas_kernels.quantized_matmul import FORMS, TILE_OUTPUTS, QuantizedWeight, quantize, storage
from pallas_kernels.quantized_matmul.formats import GROUP

WEIGHTS = ("native", *FORMS)
EMBEDDING, HEAD = "embed.weight", "lm_head.weight"
_PROJECTION = re.compile(r"layers\.\d+\.(attention\.(query|key|value|output)|mlp\.(up|down))\.weight")
# Of a host's array at a time, whole tiles: what is computed in float32 stays small beside the tensor.
_HOST_COLUMNS = 4 * TILE_OUTPUTS


def require_weights(weights: str) -> str:
    """Raises ValueError for an unknown kind of weights."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; supported: {', '.join(map(repr, WEIGHTS))}")
    return weights


def form_of(path: str, weights: str) -> str:
    """What the parameter at that path of a native tree is stored as in one with such weights: "native" or a form."""
    if weights == "native":
        return "native"
    if path in (EMBEDDING, HEAD):
        return "int8"
    return weights if _PROJECTION.fullmatch(path) else "native"


def matrix_shape(path: str, shape: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of a native weight: [*inputs, *outputs], or the embedding's [tokens, width]."""
    if path == EMBEDDING:
        return shape[1], shape[0]
    first_output = _num_input_axes(path)
    return math.prod(shape[:first_output]), math.prod(shape[first_output:])


def _num_input_axes(path: str) -> int:
    return 2 if path.endswith("attention.output.weight") else 1


def _matrix(array: Any, shape: tuple[int, int], is_transposed: bool) -> Any:
    """A native weight as a matrix of that shape."""
    return array.T if is_transposed else array.reshape(shape)


def named(path: str, weight: QuantizedWeight) -> dict[str, Any]:
    """The arrays (or what stands for them) by their own paths."""
    return {f"{path}.{name}": array for name, array in weight._asdict().items()}


def described(path: str, shape: Sequence[int], dtype: Any, weights: str) -> dict[str, jax.ShapeDtypeStruct]:
    """What becomes of one native parameter: itself, or the arrays of its quantized form."""
    form = form_of(path, weights)
    if form == "native":
        return {path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))}
    return named(path, storage(form, *matrix_shape(path, shape)))


def layouts(path: str, shape: Sequence[int], weights: str, mesh: Mesh | None) -> dict[str, NamedSharding | None]:
    """Where what becomes of one native parameter lies, by path; None without a mesh.

    Arrays of few bits lie as the native weight would, heads whole, as far as each device then has whole tiles.
    """
    form = form_of(path, weights)
    if form == "native":
        return {path: None if mesh is None else sharding.param_sharding(path, shape, mesh)}
    parts = storage(form, *matrix_shape(path, shape))
    if mesh is None:
        return named(path, QuantizedWeight(None, None))
    axes = sharding.axes_by_dimension(sharding.param_sharding(path, shape, mesh).spec)
    # Of each side of the matrix the first dimension alone is ever split: heads, not what is in them.
    inputs, outputs = (axes[1], axes[0]) if path == EMBEDDING else (axes[0], axes[_num_input_axes(path)])
    of_tiles = [
        () if size % (tile * math.prod(mesh.shape[axis] for axis in over)) else over
        for size, tile, over in zip(matrix_shape(path, shape), (GROUP, TILE_OUTPUTS), (inputs, outputs), strict=True)
    ]
    inputs, outputs = (over or None for over in of_tiles)
    scales = (outputs, inputs) if parts.scales.ndim == 3 else (outputs,)
    specs = QuantizedWeight(PartitionSpec(outputs, inputs), PartitionSpec(*scales))
    return named(path, QuantizedWeight(*(NamedSharding(mesh, spec) for spec in specs)))


def on_device(path: str, array: jax.Array, weights: str, layouts: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A native parameter's arrays by path, quantized where it lies and laid out as `layouts` says of those paths."""
    form = form_of(path, weights)
    if form == "native":
        return {path: array}
    wanted = QuantizedWeight(*(layouts[f"{path}.{name}"] for name in QuantizedWeight._fields))
    return named(path, _quantizer(form, matrix_shape(path, array.shape), path == EMBEDDING, wanted)(array))


def on_host(path: str, array: np.ndarray, weights: str) -> dict[str, np.ndarray]:
    """The same for a host's array, some columns at a time on a CPU device."""
    form = form_of(path, weights)
    if form == "native":
        return {path: array}
    matrix = _matrix(array, matrix_shape(path, array.shape), path == EMBEDDING)
    made = QuantizedWeight(*(np.empty(part.shape, part.dtype) for part in storage(form, *matrix.shape)))
    cpu = jax.local_devices(backend="cpu")[0]
    for first in range(0, matrix.shape[1], _HOST_COLUMNS):
        columns = np.ascontiguousarray(matrix[:, first : first + _HOST_COLUMNS])
        part = quantize(jax.device_put(columns, cpu), form)
        tile = first // TILE_OUTPUTS
        for whole, some in zip(made, part, strict=True):
            whole[tile : tile + len(some)] = np.asarray(some)
    return named(path, made)


@functools.lru_cache(maxsize=64)
def _quantizer(form: str, shape: tuple[int, int], is_transposed: bool, layouts: QuantizedWeight):
    return jax.jit(lambda array: quantize(_matrix(array, shape, is_transposed), form), out_shardings=layouts)
