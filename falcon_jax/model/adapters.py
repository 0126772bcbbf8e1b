"""Low-rank adapters: y = Linear(x) + (x A) B scale, beside projections whose own weights are never touched.

Adapters are a tree of their own, apart from the parameters: "layers.0.mlp.up.a" [*inputs, r] and "layers.0.mlp.up.b"
[r, *outputs]. A projection has one where the tree has one. The target "query_key_value" stands for Hugging Face's fused
matrix: query, key and value each have their b, and share "layers.0.attention.query_key_value.a". One A for the three is
all that a matrix of rank r over the fused rows can mean, so such adapters travel to PEFT and back bit by bit at their
own rank (checkpoint/peft_files.py), and what is trained is what peft would train.

Owns what adapters are, how a decoder gets them, and how they are added to weights for good. Knows nothing of files.

The trap: a merged weight is rounded to its dtype, so `unmerge` gives the first one back to within a rounding or two.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021), equation 3; for the other scale
Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (2023), theorem 3.2.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import FalconDecoder
from falcon_jax.model.linear import LowRank
from falcon_jax.model.params import Params

FUSED = "query_key_value"
FUSED_PARTS = ("query", "key", "value")
# Each target's projections by their place in a layer, and where its a lies.
_TARGETS = {
    FUSED: (tuple(f"attention.{name}" for name in FUSED_PARTS), f"attention.{FUSED}"),
    **{name: ((f"attention.{name}",), f"attention.{name}") for name in (*FUSED_PARTS, "output")},
    **{name: ((f"mlp.{name}",), f"mlp.{name}") for name in ("up", "down")},
}
TARGETS = tuple(_TARGETS)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What adapters a model gets. Hashable: part of a compilation key.

    rank: of each; a read adapter may have others here and there, see checkpoint/peft_files.py.
    alpha: what is added is scaled by alpha / rank.
    targets: which projections, of TARGETS. "query_key_value" is query, key and value with one a; by their own names
      each has its own.
    rank_stabilized: scales by alpha / sqrt(rank).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (FUSED,)
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA's rank is {self.rank}; it must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"LoRA's alpha is {self.alpha}; it must be a number above 0")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"LoRA's targets are {list(self.targets)}; take each once, of {', '.join(TARGETS)}")
        apart = [name for name in self.targets if name in FUSED_PARTS]
        if FUSED in self.targets and apart:
            raise ConfigError(f"LoRA's targets have both {FUSED} and {apart[0]}, which is part of it: drop one of them")

    @property
    def scale(self) -> float:
        """What (x A) B is multiplied by, whatever an adapter's own rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def abstract(config: FalconConfig, lora: LoRA) -> Params:
    """The tree with a float32 jax.ShapeDtypeStruct for each array. Allocates nothing."""
    leaves = {}
    for layer in range(config.num_layers):
        for target in lora.targets:
            for path, shape in shapes(config, layer, target, lora.rank).items():
                leaves[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return model_params.unflatten(leaves)


def shapes(config: FalconConfig, layer: int, target: str, rank: int) -> dict[str, tuple[int, ...]]:
    """The arrays that one target has in one layer, by path."""
    D, F, H = config.width, config.mlp_width, config.head_dim
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    inputs = {"output": (config.num_heads, H), "down": (F,)}
    outputs = {"up": (F,)} | {name: (number, H) for name, number in heads.items()}
    projections, first = _TARGETS[target]
    found = {f"layers.{layer}.{first}.a": (*inputs.get(target, (D,)), rank)}
    for projection in projections:
        found[f"layers.{layer}.{projection}.b"] = (rank, *outputs.get(projection.split(".")[1], (D,)))
    return found


def init(config: FalconConfig, lora: LoRA, key: Key[Array, ""], mesh: Mesh | None = None) -> Params:
    """Fresh adapters in float32, which change nothing yet: each b is zero.

    Each a is normal with variance 1 / (3 I) for I inputs, that of peft's own start, so that learning rates carry over.
    """
    leaves = model_params.flatten(abstract(config, lora))
    placed = None if mesh is None else sharding.params_sharding(leaves, mesh)

    def make(key: Array) -> dict[str, Array]:
        made = {}
        for number, (path, leaf) in enumerate(leaves.items()):
            if path.endswith(".b"):
                made[path] = jnp.zeros(leaf.shape, jnp.float32)
                continue
            std = (3 * math.prod(leaf.shape[:-1])) ** -0.5
            made[path] = std * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
        return made

    return model_params.unflatten(jax.jit(make, out_shardings=placed)(key))


def bind(decoder: FalconDecoder, adapters: Params, lora: LoRA) -> FalconDecoder:
    """Gives a decoder its adapters and returns it. Call it inside jit, after `params.bind`.

    They are rounded to the dtype of what they are multiplied with; gradients come back in their own.

    Raises:
      ConfigError: they do not fit the decoder.
    """
    for projection, pair in pairs(adapters).items():
        part, name = projection.split(".")[2:]
        layer = int(projection.split(".")[1])
        linear = getattr(getattr(decoder.layers[layer], part), name) if layer < len(decoder.layers) else None
        if linear is None or not _fits(pair, linear.inputs, linear.outputs):
            raise ConfigError(
                f"the adapter of {projection}, {_shape(pair.a)} and {_shape(pair.b)}, does not fit the model"
            )
        linear.adapter = LowRank(pair.a, pair.b, lora.scale)
    decoder.has_adapters = True
    return decoder


def merge(params: Params, adapters: Params, lora: LoRA, *, donate: bool = False) -> Params:
    """Parameters that do by themselves what they do with the adapters: W + A B scale, in float32, rounded to W's dtype.

    Weights in few bits are refused: rounding them a second time would lose most of what the adapters say. Merge into
    the native weights, and quantize those.

    Args:
      donate: adapted weights are given up as they are replaced; else both are in memory.

    Raises:
      ConfigError: a weight is in few bits, or adapters and parameters do not fit.
    """
    return _added(params, adapters, lora.scale, donate)


def unmerge(params: Params, adapters: Params, lora: LoRA, *, donate: bool = False) -> Params:
    """`merge`'s inverse, W - A B scale: up to the rounding of the merged weight and of the result to W's dtype."""
    return _added(params, adapters, -lora.scale, donate)


class Pair(NamedTuple):
    """One projection's adapter. a: [*inputs, r], which others may share; b: [r, *outputs]."""

    a: Any
    b: Any


def pairs(adapters: Params) -> dict[str, Pair]:
    """Adapters by the path of their projection ("layers.0.attention.query"), in the model's order.

    Raises:
      ConfigError: an a without a b, a b without an a, or a path of no projection.
    """
    leaves = model_params.flatten(adapters)
    found, used = {}, set()
    for path, b in leaves.items():
        if not path.endswith(".b"):
            continue
        owner = next((name for name in _places_of_a(path.removesuffix(".b")) if name in leaves), None)
        if owner is None:
            raise ConfigError(f"the adapter {path} has no a beside it")
        used |= {owner, path}
        found[path.removesuffix(".b")] = Pair(leaves[owner], b)
    unused = [path for path in leaves if path not in used]
    if unused:
        raise ConfigError(f"{unused[0]} is half an adapter, or none of a Falcon's projections")
    return found


def _places_of_a(projection: str) -> Iterator[str]:
    """Where the a of a projection may lie; nowhere if that is no projection."""
    matched = re.fullmatch(r"(layers\.\d+)\.(\w+\.\w+)", projection)
    for projections, first in _TARGETS.values():
        if matched and matched[2] in projections:
            yield f"{matched[1]}.{first}.a"


def _fits(pair: Pair, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> bool:
    rank = pair.a.shape[-1]
    return pair.a.shape == (*inputs, rank) and pair.b.shape == (rank, *outputs)


def _shape(array: Any) -> list[int]:
    return list(array.shape)


def _added(params: Params, adapters: Params, scale: float, donate: bool) -> Params:
    leaves = model_params.flatten(params)
    for projection, (a, b) in pairs(adapters).items():
        path = f"{projection}.weight"
        if f"{path}.values" in leaves:
            what = "adapters are merged into native weights, which may be quantized afterwards"
            raise ConfigError(f"{path} is in few bits: {what}")
        if path not in leaves:
            raise ConfigError(f"there is an adapter of {projection}, which the model does not have")
        weight = leaves[path]
        if (*a.shape[:-1], *b.shape[1:]) != weight.shape or a.shape[-1] != b.shape[0]:
            raise ConfigError(
                f"the adapter of {projection}, {_shape(a)} and {_shape(b)}, does not fit {_shape(weight)}"
            )
        where = None if isinstance(weight, jax.core.Tracer) else weight.sharding
        leaves[path] = _adder(where, donate)(weight, a, b, scale)
    return model_params.unflatten(leaves)


@functools.lru_cache(maxsize=64)
def _adder(where: Any, donate: bool):
    return jax.jit(_add, out_shardings=where, donate_argnums=0 if donate else ())


def _add(weight: Float[Array, "*shape"], a: Array, b: Array, scale: Array) -> Float[Array, "*shape"]:
    over_rank = (((a.ndim - 1,), (0,)), ((), ()))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jax.lax.dot_general(a, b, over_rank, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + product * scale).astype(weight.dtype)
