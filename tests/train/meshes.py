"""Losses and gradients over a mesh against one device's. By hand, every mesh of up to 16 devices:

python -m tests.train.meshes            # 70 meshes, a variant of the model each; some minutes on two cores
python -m tests.train.meshes --all      # each with all seven: an hour
"""

import dataclasses
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import step as train_step
from falcon_jax.train.step import StepOptions
from tests import models

SEPARATOR = 3
OPTIONS = StepOptions(compute_dtype="float32", z_loss=0.1, separator=SEPARATOR, loss_chunk_tokens=24)
LENGTH = 12
ALONE = (1, 1, 1, 1)


def all_meshes(max_devices: int) -> list[tuple[int, int, int, int]]:
    """Sizes of data, fsdp, tensor and stage, powers of two."""
    sizes = [2**n for n in range(max_devices.bit_length())]
    return [shape for shape in itertools.product(sizes, repeat=4) if math.prod(shape) <= max_devices]


def tokens_of(config: FalconConfig, num_micro_batches: int, num_rows: int) -> np.ndarray:
    """[A, R, T+1] with document borders at random places."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(SEPARATOR + 1, config.vocab_size, (num_micro_batches, num_rows, LENGTH + 1))
    return np.where(generator.random(tokens.shape) < 0.15, SEPARATOR, tokens).astype(np.uint16)


def gradients(
    config: FalconConfig,
    mesh: Mesh | None,
    tokens: np.ndarray,
    options: StepOptions = OPTIONS,
    forward: ForwardOptions = ForwardOptions(),  # noqa: B008
) -> tuple[dict[str, np.ndarray], float]:
    """The model's gradients by path, and the loss with its z-loss."""
    state = train_step.init_state(config, options, 0, mesh, models.random_params(config))
    batch = jnp.asarray(tokens, jnp.int32)
    if mesh is not None:
        batch = jax.device_put(batch, sharding.micro_batches_sharding(mesh))
    key = train_step.dropout_key(options, jnp.zeros((), jnp.int32))
    compute = jax.jit(train_step.make_gradients(config, options, forward, mesh))
    found, (loss, z_loss) = compute(state["params"], batch, key, None)
    if mesh is not None:
        for leaf, place in zip(jax.tree.leaves(found), jax.tree.leaves(state["params"]), strict=True):
            assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim), (leaf.sharding, place.sharding)
    whole = jax.tree.map(np.asarray, found)
    flat = model_params.flatten(train_step.model_of(whole, mesh))
    return {path: np.asarray(leaf) for path, leaf in flat.items()}, float(loss + z_loss)


def largest_gap(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Largest difference of a gradient, as a share of the largest entry of its leaf.

    Or of a hundredth of the largest of all: a bias that all keys share has no gradient but rounding.
    """
    assert one.keys() == other.keys()
    floor = 1e-2 * max(np.abs(leaf).max() for leaf in one.values())
    return max(float(np.abs(one[path] - other[path]).max() / max(floor, np.abs(one[path]).max())) for path in one)


def config_of(variant: str, stages: int, rounds: int) -> FalconConfig:
    # With the wider weights of other tests an ulp in a weight moves gradients by 2e-5 of their largest entry.
    return models.tiny(variant, num_layers=max(2, stages * rounds), initializer_range=0.1)


def compare(variant: str, shape: tuple[int, int, int, int], rounds: int = 1, **changes) -> float:
    """The gap between the mesh's gradients and one device's; the losses are compared here."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices("cpu"))
    forward = ForwardOptions(remat=changes.pop("remat", "none"))
    options = dataclasses.replace(OPTIONS, pipeline_rounds=rounds, **changes)
    config = config_of(variant, shape[3], rounds)
    tokens = tokens_of(config, num_micro_batches=max(2, shape[3]), num_rows=shape[0] * shape[1])
    expected, loss = gradients(config, None, tokens, options)
    found, found_loss = gradients(config, mesh, tokens, options, forward)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    return largest_gap(expected, found)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 16)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    worst, variants = 0.0, list(models.VARIANTS)
    for number, shape in enumerate(all_meshes(16)):
        for variant in variants if "--all" in sys.argv else [variants[number % len(variants)]]:
            gap = compare(variant, shape, dropout=0.3)
            worst = max(worst, gap)
            print(f"{shape} {variant}: {gap:.1e}", flush=True)
    print(f"largest gap {worst:.1e}")
    sys.exit(worst > 3e-5)


if __name__ == "__main__":
    main()
