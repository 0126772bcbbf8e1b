"""Back to a Hugging Face folder that transformers loads, one tensor at a time.

Owns the writing of safetensors files, shards and index. The names are transformers' own, whatever the source of the
conversion called its tensors, and a tied head is left out, as transformers leaves it.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from falcon_jax.checkpoint import hf_files, mapping
from falcon_jax.checkpoint.checksum import host_checksum
from falcon_jax.checkpoint.manifest import (
    CARRIED_FILES,
    DTYPES,
    PARAMS_FOLDER,
    Manifest,
    carry_files,
    is_converted,
    require_dtype,
    write_text,
)
from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError, ConfigError
from falcon_jax.model.params import Params, flatten

MAX_SHARD_BYTES = 5_000_000_000
# A file under this ending is half made; the ending goes when all files are whole. The marker goes last of all.
_PARTIAL = ".part"
_MARKER = "export.part"
_GENERATION_FILE = "generation_config.json"
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAFETENSORS_NAMES = {dtype: name for name, dtype in hf_files.FLOAT_TYPES.items()}
_Reader = Callable[[Iterable[str]], Mapping[str, np.ndarray]]


def export(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a converted checkpoint as a Hugging Face folder, its tensors bit by bit those it was converted from.

    Peak memory is twice the largest tensor. The source's own config.json is kept where it still describes the
    model and transformers reads it; its tokenizer files are kept as they were.

    Args:
      checkpoint: a folder made by `convert`.
      destination: a folder to make, or an empty one.
      max_shard_bytes: bytes of tensors a file; a larger model gets several files and an index.

    Returns:
      The destination.

    Raises:
      CheckpointError: the checkpoint is half made or damaged, its weights are in few bits, or the destination is not
        empty.
      ValueError: max_shard_bytes is not positive.
    """
    from falcon_jax.checkpoint.store import ArrayFolder  # late, as in load.py

    folder = Path(checkpoint).expanduser()
    if not folder.is_dir() or not is_converted(folder):
        what = "is no folder made by falcon_jax.convert" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: export takes such a folder")
    manifest = Manifest.read(folder)
    if manifest.weights != "native":
        raise CheckpointError(
            f"{folder} holds {manifest.weights} weights, which no Hugging Face Falcon has: export a native conversion"
        )
    stored = ArrayFolder(folder / PARAMS_FOLDER)

    def read(paths: Iterable[str]) -> Mapping[str, np.ndarray]:
        arrays = stored.read_host({path: manifest.arrays[path].abstract() for path in paths})
        for path, array in arrays.items():
            if host_checksum(array) != manifest.arrays[path].checksum:
                raise CheckpointError(
                    f"{folder / PARAMS_FOLDER / path} has changed since the conversion: convert again"
                )
        return arrays

    dtypes = {path: DTYPES[record.dtype] for path, record in manifest.arrays.items()}
    keys = _config_keys(folder, manifest)
    return _write_folder(Path(destination), manifest.config, dtypes, read, keys, folder, max_shard_bytes)


def export_params(
    config: FalconConfig,
    params: Params,
    destination: str | os.PathLike[str],
    *,
    dtype: Any = None,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes parameters that are on device as a Hugging Face folder, fetching one tensor at a time.

    generation_config.json, where none comes along, says which tokens begin and end a text.

    Args:
      dtype: what they are stored as; None keeps theirs.
      tokenizer_folder: whose tokenizer files, and generation_config.json, go along.

    Raises:
      CheckpointError: the parameters do not fit the configuration, or the destination is not empty.
      ValueError: an unknown dtype, or max_shard_bytes is not positive.
    """
    cast = require_dtype(dtype)
    leaves = flatten(params)
    shapes = mapping.shapes(config)
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if found != shapes:
        wrong = {path for path in shapes.keys() | found.keys() if shapes.get(path) != found.get(path)}
        raise CheckpointError(f"the parameters do not fit the configuration: {', '.join(sorted(wrong)[:4])}")
    dtypes = {path: np.dtype(leaf.dtype) if cast is None else cast for path, leaf in leaves.items()}
    for path, found in dtypes.items():
        if found not in _SAFETENSORS_NAMES:
            raise CheckpointError(f"{path} is {found.name}: give a dtype to store it as")

    def read(paths: Iterable[str]) -> Mapping[str, np.ndarray]:
        return {path: np.asarray(jax.numpy.asarray(leaves[path]).astype(dtypes[path])) for path in paths}

    keys = config.to_hf()
    if len(set(dtypes.values())) == 1:
        keys["dtype"] = next(iter(dtypes.values())).name
    generation = {name: keys[name] for name in _GENERATION_KEYS if keys[name] is not None}
    carried = None if tokenizer_folder is None else Path(tokenizer_folder)
    return _write_folder(Path(destination), config, dtypes, read, keys, carried, max_shard_bytes, generation)


def _write_folder(
    destination: Path,
    config: FalconConfig,
    dtypes: Mapping[str, np.dtype],
    read: _Reader,
    keys: Mapping[str, Any],
    carried: Path | None,
    max_shard_bytes: int,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    destination = destination.expanduser()
    _prepare(destination)
    shards = _shards(config, dtypes, max_shard_bytes)
    names = [hf_files.SAFETENSORS_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, entries in zip(names, shards):
        _write_safetensors(destination / (name + _PARTIAL), entries, dtypes, read)
    for name in names:
        os.replace(destination / (name + _PARTIAL), destination / name)
    if len(shards) > 1:
        placed = {entry.hf_name: name for name, entries in zip(names, shards) for entry in entries}
        total = sum(_num_bytes(entry, dtypes) for entries in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        write_text(destination / hf_files.SAFETENSORS_INDEX, json.dumps(index, indent=2) + "\n")
    if carried is not None:
        carry_files(carried, destination, besides=(hf_files.CONFIG_FILE,))
    if generation and not (destination / _GENERATION_FILE).exists():
        write_text(destination / _GENERATION_FILE, json.dumps(generation, indent=2) + "\n")
    # Last: without it nothing takes the folder for a checkpoint.
    write_text(destination / hf_files.CONFIG_FILE, json.dumps(keys, indent=2) + "\n")
    (destination / _MARKER).unlink()
    return destination


def _prepare(destination: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: give a folder to make")
    destination.mkdir(parents=True, exist_ok=True)
    if (destination / _MARKER).exists():  # an export was interrupted; begin again
        for path in destination.iterdir():
            ours = path.name in (hf_files.SAFETENSORS_INDEX, *CARRIED_FILES)
            if ours or path.name.endswith(_PARTIAL) or path.match("model*.safetensors"):
                path.unlink()
    if any(destination.iterdir()):
        raise CheckpointError(f"{destination} is not empty: give another destination")
    (destination / _MARKER).touch()


def _shards(config: FalconConfig, dtypes: Mapping[str, np.dtype], max_shard_bytes: int) -> list[list[mapping.Entry]]:
    shards: list[list[mapping.Entry]] = [[]]
    filled = 0
    for entry in mapping.table(config):
        num_bytes = _num_bytes(entry, dtypes)
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += num_bytes
    return shards


def _num_bytes(entry: mapping.Entry, dtypes: Mapping[str, np.dtype]) -> int:
    return math.prod(entry.hf_shape) * dtypes[entry.parts[0].path].itemsize


def _write_safetensors(path: Path, entries: list[mapping.Entry], dtypes: Mapping[str, np.dtype], read: _Reader) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        kinds = {dtypes[part.path] for part in entry.parts}
        if len(kinds) > 1:
            raise CheckpointError(f"{entry.parts[0].path} and its siblings, one tensor there, differ in dtype")
        end = start + _num_bytes(entry, dtypes)
        header[entry.hf_name] = {
            "dtype": _SAFETENSORS_NAMES[kinds.pop()],
            "shape": list(entry.hf_shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.to_hf(read([part.path for part in entry.parts]))
            file.write(tensor.reshape(-1).view(np.uint8).data)
            del tensor  # before the next is read
        file.flush()
        os.fsync(file.fileno())


def _config_keys(folder: Path, manifest: Manifest) -> Mapping[str, Any]:
    """The source's own config.json where it says the same and transformers has the model; else ours."""
    try:
        original = hf_files.read_json(folder / hf_files.CONFIG_FILE)
        describes = FalconConfig.from_hf(original) == manifest.config
    except (CheckpointError, ConfigError):
        return manifest.config.to_hf()
    if not describes or original.get("model_type") != "falcon" or manifest.settings.get("dtype") is not None:
        return manifest.config.to_hf()
    # auto_map names Python files that are not here.
    return {key: value for key, value in original.items() if key != "auto_map"}
