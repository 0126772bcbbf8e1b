"""The manifest of a converted folder: its configuration, and each array's shape, dtype and checksum.

Owns the names inside such a folder and the rule that a folder without a manifest is not a checkpoint: it is written
last, by one rename. The layout:

  manifest.json      this
  params/            the orbax checkpoint
  unfinished/        while a conversion runs, or after it was interrupted
  config.json, generation_config.json, tokenizer files: the source's own, as they were
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from falcon_jax.checkpoint.hf_files import read_json
from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError

MANIFEST_FILE, PARAMS_FOLDER, UNFINISHED_FOLDER = "manifest.json", "params", "unfinished"
FORMAT, VERSION = "falcon_jax checkpoint", 1
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
# What weights of few bits are made of, beside these.
STORED_DTYPES = DTYPES | {"int32": np.dtype(np.int32)}
# What transformers and tokenizers keep beside the weights, copied as it is.
CARRIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ArrayRecord:
    shape: tuple[int, ...]
    dtype: str
    checksum: str

    def abstract(self, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, STORED_DTYPES[self.dtype], sharding=sharding)


@dataclass(frozen=True)
class Manifest:
    """What a converted folder holds."""

    config: FalconConfig
    arrays: Mapping[str, ArrayRecord]  # by dotted path, in the model's order
    settings: Mapping[str, Any]  # what the conversion was asked for, and its source's fingerprint

    @property
    def weights(self) -> str:
        """What the projections are stored as, one of quantize.WEIGHTS."""
        return self.settings["weights"]

    @property
    def calibrated(self) -> bool:
        """Whether the projections' codes were found on calibration text; else they are the nearest ones."""
        return self.settings.get("calibration") is not None

    def write(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_hf(),
            "settings": dict(self.settings),
            "arrays": {path: record_to_json(record) for path, record in self.arrays.items()},
        }
        content["digest"] = _digest(content)
        write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks `manifest.json`.

        Raises:
          CheckpointError: the folder's conversion was interrupted, or its manifest is missing, damaged, or of
            another version.
        """
        path = folder / MANIFEST_FILE
        if not path.exists() and (folder / UNFINISHED_FOLDER).exists():
            raise CheckpointError(f"{folder}: its conversion was interrupted: run it again, it goes on from there")
        content = read_json(path)
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            found = f"{content.get('format')!r}, version {content.get('version')!r}"
            raise CheckpointError(f"{path} is {found}, expected {FORMAT!r}, version {VERSION}: convert again")
        if content.pop("digest", None) != _digest(content):
            raise CheckpointError(f"{path} has changed since the conversion: convert again")
        arrays = {name: record_from_json(record) for name, record in content["arrays"].items()}
        return cls(FalconConfig.from_hf(content["config"]), arrays, content["settings"])


def is_converted(folder: Path) -> bool:
    """Whether the folder is, or was becoming, one of ours."""
    return (folder / MANIFEST_FILE).exists() or (folder / UNFINISHED_FOLDER).exists()


def record_to_json(record: ArrayRecord) -> dict[str, Any]:
    return {"shape": list(record.shape), "dtype": record.dtype, "checksum": record.checksum}


def record_from_json(content: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord(tuple(content["shape"]), content["dtype"], content["checksum"])


def require_dtype(dtype: Any) -> np.dtype | None:
    """The numpy dtype of a name or a dtype; None stays None.

    Raises:
      ValueError: it is none of float16, bfloat16 and float32.
    """
    if dtype is None:
        return None
    try:
        found = np.dtype(DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}, or None for the stored one")
    return found


def carry_files(source: Path, destination: Path, *, besides: tuple[str, ...] = ()) -> None:
    """Copies the configuration and the tokenizer files, each appearing whole; not those named in `besides`."""
    for name in CARRIED_FILES:
        if name not in besides and (source / name).is_file():
            partial = destination / f"{name}.part"
            shutil.copyfile(source / name, partial)
            os.replace(partial, destination / name)


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all, also after a power failure."""
    partial = path.with_name(f"{path.name}.part")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames within the folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
