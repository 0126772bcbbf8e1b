"""From a folder to parameters on device: converted folders at the disk's speed, Hugging Face's tensor by tensor.

Owns the choice between the two and the order of reading, checking and casting. Arrays go straight to the devices
that their sharding names; the whole model is never in host memory beside them.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from falcon_jax import sharding
from falcon_jax.checkpoint import hf_files, hub, mapping
from falcon_jax.checkpoint.checksum import finish_checksum, start_checksum
from falcon_jax.checkpoint.convert import require_tied_head, stored_shapes
from falcon_jax.checkpoint.manifest import PARAMS_FOLDER, Manifest, is_converted, require_dtype
from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError
from falcon_jax.model import quantize
from falcon_jax.model.params import Params, layouts, unflatten
from falcon_jax.tokenizer import TOKENIZER_FILE

# What one read asks for: large enough for the disk, small beside the model; the next is read while one is checked.
_BATCH_BYTES = 1 << 30


class LoadedCheckpoint(NamedTuple):
    config: FalconConfig
    params: Params
    tokenizer_folder: Path | None  # None where the checkpoint has no tokenizer.json


def read_config(source: str | os.PathLike[str]) -> FalconConfig:
    """The configuration of a checkpoint, without its weights. Raises: as `load`."""
    folder = hub.local_folder(source)
    return Manifest.read(folder).config if is_converted(folder) else FalconConfig.from_hf(folder)


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    weights: str = "native",
    mesh: Mesh | None = None,
    verify: bool = True,
    allow_pickle: bool = False,
) -> LoadedCheckpoint:
    """Loads a checkpoint's parameters onto the device, or sharded over a mesh.

    Args:
      source: a folder made by `convert`, a Hugging Face folder, or a model on the hub such as "tiiuae/falcon-7b".
      dtype: "float16", "bfloat16" or "float32", cast on the device; None keeps what is stored.
      weights: "native", "int8" or "int4": what the blocks' projections are kept as, embedding and head in 8 bits beside
        either of the latter. Those stored natively are rounded as they come; a folder converted to another kind than
        that is refused.
      mesh: lays each parameter out by `sharding.PARAMETER_TABLE`; None puts all on the default device.
      verify: compare the checksums of a converted folder. Hugging Face folders have none.
      allow_pickle: also read pytorch_model*.bin (needs torch >= 2.10); only from a source that you trust.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged or half made, it is no Falcon of its config, or its
        weights are of another kind in few bits.
      ConfigError: its config.json is none of a Falcon.
      ValueError: an unknown dtype or kind of weights.
    """
    cast = require_dtype(dtype)
    quantize.require_weights(weights)
    folder = hub.local_folder(source, allow_pickle=allow_pickle)
    if is_converted(folder):
        config, arrays = _load_converted(folder, cast, weights, mesh, verify)
    else:
        config, arrays = _load_hf(folder, cast, weights, mesh, allow_pickle)
    tokenizer_folder = folder if (folder / TOKENIZER_FILE).is_file() else None
    return LoadedCheckpoint(config, unflatten(arrays), tokenizer_folder)


def _load_converted(
    folder: Path, cast: np.dtype | None, weights: str, mesh: Mesh | None, verify: bool
) -> tuple[FalconConfig, dict[str, jax.Array]]:
    # Late: orbax takes half a second to import, and a Hugging Face folder needs none of it.
    from falcon_jax.checkpoint.store import ArrayFolder

    manifest = Manifest.read(folder)
    records = manifest.arrays
    if manifest.weights not in ("native", weights):
        raise CheckpointError(
            f"{folder} holds {manifest.weights} weights, and weights={weights!r} was asked for: give "
            f"weights={manifest.weights!r}, or convert the source again"
        )
    if {path: record.shape for path, record in records.items()} != stored_shapes(manifest.config, manifest.weights):
        raise CheckpointError(f"{folder}: its manifest does not list the arrays of its configuration: convert again")
    stored = ArrayFolder(folder / PARAMS_FOLDER)
    where = layouts(manifest.config, mesh, manifest.weights) if mesh is not None else {}
    targets = {path: record.abstract(where.get(path) or _default_device()) for path, record in records.items()}
    arrays, started, native = {}, {}, mapping.shapes(manifest.config)
    for batch in _prefetched(stored.read_device, _batches(targets)):
        for path, array in batch.items():
            if verify:
                started[path] = start_checksum(array)
            # An array that no native checkpoint has is part of a weight in few bits already.
            arrays |= _kept(path, array, cast, weights, mesh) if path in native else {path: array}
    for path, words in started.items():
        if finish_checksum(words) != records[path].checksum:
            raise CheckpointError(
                f"{folder / PARAMS_FOLDER / path} has changed since the conversion (checksum "
                f"{finish_checksum(words)}, expected {records[path].checksum}): convert again"
            )
    return manifest.config, {path: arrays[path] for path in stored_shapes(manifest.config, weights)}


def _load_hf(
    folder: Path, cast: np.dtype | None, weights: str, mesh: Mesh | None, allow_pickle: bool
) -> tuple[FalconConfig, dict[str, jax.Array]]:
    tensors = hf_files.open_folder(folder, allow_pickle=allow_pickle)
    plan = mapping.plan(FalconConfig.from_hf(folder), tensors.tensors)
    require_tied_head(tensors, plan)
    arrays = {}

    def read(entry: mapping.Entry) -> dict[str, np.ndarray]:
        return entry.from_hf(tensors.read(entry.hf_name))

    for batch in _prefetched(read, plan.entries):
        for path, array in batch.items():
            layout = _default_device() if mesh is None else sharding.param_sharding(path, array.shape, mesh)
            arrays |= _kept(path, _to_device(array, layout), cast, weights, mesh)
    return plan.config, {path: arrays[path] for path in stored_shapes(plan.config, weights)}


def _default_device() -> jax.sharding.Sharding:
    default = jax.config.jax_default_device or jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(jax.devices(default)[0] if isinstance(default, str) else default)


def _to_device(array: np.ndarray, layout: jax.sharding.Sharding) -> jax.Array:
    # Each device is given its own part; device_put would compare the whole array across processes.
    return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])


def _kept(path: str, array: jax.Array, cast: np.dtype | None, weights: str, mesh: Mesh | None) -> dict[str, jax.Array]:
    """What stays of a native parameter: cast, and in few bits where it is to be."""
    array = _cast(path, array, cast)
    where = quantize.layouts(path, array.shape, weights, mesh)
    return quantize.on_device(path, array, weights, {name: one or _default_device() for name, one in where.items()})


def _cast(path: str, array: jax.Array, dtype: np.dtype | None) -> jax.Array:
    if dtype is None or array.dtype == dtype:
        return array
    narrowed = array.astype(dtype)
    if dtype == np.float16 and bool(jnp.any(jnp.isinf(narrowed) & jnp.isfinite(array))):
        raise CheckpointError(f"{path} holds numbers beyond float16's 65504: load it as bfloat16 or float32")
    return narrowed


def _batches(targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    batch: dict[str, jax.ShapeDtypeStruct] = {}
    filled = 0
    for path, target in targets.items():
        num_bytes = target.size * target.dtype.itemsize
        if batch and filled + num_bytes > _BATCH_BYTES:
            yield batch
            batch, filled = {}, 0
        batch[path] = target
        filled += num_bytes
    if batch:
        yield batch


def _prefetched(read, requests) -> Iterator[dict[str, Any]]:
    """read(request) for each request, the next one already under way in a thread."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = None
        for request in requests:
            following = reader.submit(read, request)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
