"""Parameters as a plain tree of arrays: the only place that splits, merges or initialises Flax modules.

A parameter's path joins the tree's keys with dots, as in "layers.3.attention.query.weight"; checkpoints, sharding
rules and optimizer masks all speak in these paths.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from falcon_jax.config import FalconConfig
from falcon_jax.model import quantize
from falcon_jax.model.decoder import Block, Ends, FalconDecoder
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.quantized_matmul import QuantizedWeight

# Nested dicts with arrays (or ShapeDtypeStructs) as leaves; layers are keyed by their number.
Params = dict[str, Any]


def abstract(config: FalconConfig, dtype: DTypeLike, weights: str = "native") -> Params:
    """The tree with a jax.ShapeDtypeStruct for each parameter. Allocates nothing.

    Args:
      dtype: of all but the arrays of weights in few bits.
      weights: what the blocks' projections are stored as, one of quantize.WEIGHTS, which says what the rest is.
    """

    def described(param: Any) -> jax.ShapeDtypeStruct:
        leaf = param.get_value()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if param.has_own_dtype else jnp.dtype(dtype))

    return unflatten({path: described(param) for path, param in _walk_declared(config, weights)})


def layouts(config: FalconConfig, mesh: Mesh, weights: str = "native") -> dict[str, NamedSharding]:
    """Where each parameter of a tree with such weights lies on a mesh, by dotted path."""
    native = flatten(abstract(config, jnp.bfloat16))
    found = [quantize.layouts(path, leaf.shape, weights, mesh) for path, leaf in native.items()]
    return {path: layout for parts in found for path, layout in parts.items() if layout is not None}


def init(
    config: FalconConfig, key: Array, dtype: DTypeLike, mesh: Mesh | None = None, weights: str = "native"
) -> Params:
    """Random parameters: weights normal with the configured standard deviation, norms one, biases zero.

    Each array is made on its device, laid out over `mesh` where one is given, in `dtype` from the start; weights are
    quantized one by one where `weights` says so, from the numbers that they would have without.
    """
    kinds = {path: param.init for path, param in _walk_declared(config, "native")}
    leaves, made = list(enumerate(flatten(abstract(config, dtype)).items())), {}
    # The largest first: what it takes to make an array comes on top of all that are there.
    for number, (path, leaf) in sorted(leaves, key=lambda item: -item[1][1].size):
        where = quantize.layouts(path, leaf.shape, weights, mesh)
        fill = _filler(kinds[path], leaf.shape, leaf.dtype, config.initializer_range, where.get(path))
        made[path] = quantize.on_device(path, fill(jax.random.fold_in(key, number)), weights, where)
    return unflatten({name: part for _, (path, _) in leaves for name, part in made[path].items()})


def weights_of(params: Params) -> str:
    """What the blocks' projections of a tree, or of a block's, are stored as, one of quantize.WEIGHTS."""
    ends = (quantize.EMBEDDING, quantize.HEAD)  # of 8 bits beside either form
    found = (leaf for path, leaf in _walk(params, "") if path.endswith(".weight.values") and not path.startswith(ends))
    values = next(found, None)
    return "native" if values is None else QuantizedWeight(values, None).form


def cast(params: Params, dtype: DTypeLike) -> Params:
    """All parameters in `dtype`, but the arrays of weights in few bits as they are."""
    own = (".weight.values", ".weight.scales")
    leaves = flatten(params).items()
    return unflatten({path: leaf if path.endswith(own) else leaf.astype(dtype) for path, leaf in leaves})


def bind(
    config: FalconConfig, params: Params, options: ForwardOptions | None = None, mesh: Mesh | None = None
) -> FalconDecoder:
    """The decoder over `params`. Call it inside the jitted function that takes `params` as its argument.

    Args:
      mesh: the one that `params` and the tokens are laid out over; None: one device holds them.

    Raises:
      ValueError: `params` is not the tree that `config` describes.
    """
    graph, state = _declared(config, options or ForwardOptions(), mesh, weights_of(params))
    return _merged(graph, state, params)


def bind_block(config: FalconConfig, params: Params) -> Block:
    """One layer over its own parameters, the tree that lies under "layers.i". Use inside jit, as `bind`.

    Raises:
      ValueError: `params` is not the tree of a layer that `config` describes.
    """
    return _merged(*_declared_block(config, weights_of(params)), params)


def bind_ends(config: FalconConfig, params: Params, mesh: Mesh | None = None) -> Ends:
    """Embedding, final norm and head over their part of `params`, which may lack the layers. Use inside jit, as `bind`.

    Raises:
      ValueError: `params` does not hold what `config` describes.
    """
    ends = {name: part for name, part in params.items() if name != "layers"}
    # Beside layers of either form they are the same.
    weights = "int8" if f"{quantize.EMBEDDING}.values" in flatten(ends) else "native"
    return _merged(*_declared_ends(config, mesh, weights), ends)


def flatten(params: Params) -> dict[str, Any]:
    """Dotted path -> leaf, in the model's order (embedding, layers by number, final norm, head)."""
    return dict(sorted(_walk(params, ""), key=lambda item: _model_order(item[0])))


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The nested tree of dotted paths."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node: dict[Any, Any] = tree
        for parent in parents:
            node = node.setdefault(int(parent) if parent.isdigit() else parent, {})
        node[name] = leaf
    return tree


def num_bytes(params: Params) -> int:
    """Bytes of all arrays together, counting each once whatever its sharding."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


@functools.lru_cache(maxsize=64)
def _declared(config: FalconConfig, options: ForwardOptions, mesh: Mesh | None, weights: str) -> tuple[Any, Any]:
    """The module's graph and its abstract state, made once a configuration."""
    return nnx.split(FalconDecoder(config, options, mesh, weights))


@functools.lru_cache(maxsize=64)
def _declared_ends(config: FalconConfig, mesh: Mesh | None, weights: str) -> tuple[Any, Any]:
    return nnx.split(Ends(config, mesh, weights))


@functools.lru_cache(maxsize=64)
def _declared_block(config: FalconConfig, weights: str) -> tuple[Any, Any]:
    return nnx.split(Block(config, weights))


def _merged(graph: Any, state: Any, params: Params) -> Any:
    """The module over `params`, which must be what was declared."""
    expected, given = flatten(nnx.to_pure_dict(state)), flatten(params)
    wrong = [path for path, leaf in expected.items() if path not in given or given[path].shape != leaf.shape]
    wrong += [path for path in given if path not in expected]
    if wrong:
        raise ValueError(f"these parameters do not fit the configuration: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _walk_declared(config: FalconConfig, weights: str) -> Iterator[tuple[str, Any]]:
    """Dotted path and declaration of each parameter."""
    for path, param in nnx.to_flat_state(_declared(config, ForwardOptions(), None, weights)[1]):
        yield ".".join(map(str, path)), param


@functools.lru_cache(maxsize=64)
def _filler(kind: str, shape: tuple[int, ...], dtype: DTypeLike, std: float, layout: Any):
    """A compiled function key -> array; arrays of one shape share it."""

    def fill(key: Array) -> Array:
        if kind == "normal":
            return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
        return jnp.full(shape, 1 if kind == "ones" else 0, dtype)

    return jax.jit(fill, out_shardings=layout)


def _walk(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, child in node.items():
        path = f"{prefix}{name}"
        if isinstance(child, Mapping):
            yield from _walk(child, f"{path}.")
        else:
            yield path, child


def _model_order(path: str) -> tuple:
    parts = path.split(".")
    sections = {"embed": 0, "layers": 1, "final_norm": 2, "lm_head": 3}
    parts_of_a_layer = {"attention_norm": 0, "mlp_norm": 1, "attention": 2, "mlp": 3}
    if parts[0] == "layers":
        return (1, int(parts[1]), parts_of_a_layer.get(parts[2], 9), *parts[3:])
    return (sections.get(parts[0], 9), *parts[1:])
