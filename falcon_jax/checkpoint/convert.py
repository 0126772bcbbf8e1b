"""From a Hugging Face folder to a converted one, one tensor at a time, resumable.

Owns the order of things: everything that can be wrong with the source is found before the first byte is written; a
tensor counts as finished once its line stands in the journal; the manifest comes last. So a process killed at any
point leaves either a whole checkpoint or one that does not load and goes on where it stopped.

Weights that are found on calibration text (calibrate.py) are made a layer at a time, after all other tensors. Going on,
the text is taken through the layers that are finished already, as they are stored.

The trap: memory. A tensor is read, turned into ours (a second copy, the first is dropped) and handed to orbax, which
makes a copy: never more than two of the largest at once.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from falcon_jax.checkpoint import hf_files, hub, mapping
from falcon_jax.checkpoint.calibrate import LayerCalibration, read_text
from falcon_jax.checkpoint.checksum import host_checksum
from falcon_jax.checkpoint.manifest import (
    CARRIED_FILES,
    MANIFEST_FILE,
    PARAMS_FOLDER,
    UNFINISHED_FOLDER,
    ArrayRecord,
    Manifest,
    carry_files,
    is_converted,
    record_from_json,
    record_to_json,
    require_dtype,
    sync_folder,
    write_text,
)
from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError
from falcon_jax.model import quantize
from pallas_kernels.quantized_matmul import QuantizedWeight

# Small tensors are written together: a write costs about 20 ms whatever its size.
GROUP_BYTES = 16 << 20
_SPARE_BYTES = 64 << 20  # for descriptions, journal and tokenizer


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: Any = None,
    weights: str = "native",
    calibration: str | os.PathLike[str] | None = None,
    calibration_rows: int = 128,
    calibration_row_tokens: int = 2048,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Converts a Hugging Face checkpoint into a folder that loads fast, checked by checksums.

    Peak memory is twice the largest tensor, whatever the model's size; with calibration a layer, the hidden states of
    the rows, and what calibrate.py says. Interrupted, it is run again with the same arguments and goes on where it
    stopped.

    Args:
      source: a Hugging Face folder (safetensors, sharded or not), or a model on the hub such as "tiiuae/falcon-7b".
      destination: a folder to make; it may exist if it is empty or holds this conversion, interrupted.
      dtype: "float16", "bfloat16" or "float32"; None keeps what is stored.
      weights: "native", or "int8" or "int4" for the blocks' projections (pallas_kernels/quantized_matmul/formats.py),
        with either of which embedding and head have 8 bits. Each is rounded to the nearest, projections unless there is
        calibration; all else stays in `dtype`.
      calibration: a UTF-8 text file like what the model is to read, a few MB of it. Weights of few bits are then found
        so that the products on this text stay what they were (GPTQ: pallas_kernels/quantized_matmul/calibrated.py),
        on the default device; the source must have a tokenizer.
      calibration_rows: the most rows of that text.
      calibration_row_tokens: the most tokens of a row; no more than the model's longest context.
      allow_pickle: also read pytorch_model*.bin (needs torch >= 2.10); only from a source that you trust.
      overwrite: replace a finished checkpoint in `destination`.
      progress: show a bar on stderr.

    Returns:
      The destination.

    Raises:
      CheckpointError: the source cannot be read or is no Falcon of its config.json, or the destination holds
        something else or has too little space; or calibration is asked for with native weights, without a tokenizer, or
        with a text that cannot be read.
      ConfigError: the source's config.json is none of a Falcon.
      ValueError: an unknown dtype or kind of weights.
    """
    quantize.require_weights(weights)
    if calibration is not None and weights == "native":
        raise CheckpointError("calibration is for weights of few bits: give weights='int4' or 'int8' with it")
    cast = require_dtype(dtype)
    folder = hub.local_folder(source, allow_pickle=allow_pickle)
    destination = Path(destination).expanduser().absolute()
    if is_converted(folder):
        raise CheckpointError(f"{folder} is a converted checkpoint already: convert takes a Hugging Face folder")
    if folder.resolve() == destination.resolve():
        raise CheckpointError(f"{destination} is the source: give another destination")
    tensors = hf_files.open_folder(folder, allow_pickle=allow_pickle)
    plan = mapping.plan(FalconConfig.from_hf(folder), tensors.tensors)
    require_tied_head(tensors, plan)
    text = None
    if calibration is not None:
        text = read_text(calibration, folder, plan.config, calibration_rows, calibration_row_tokens)
    settings = {
        "dtype": None if cast is None else cast.name,
        "weights": weights,
        "calibration": None if text is None else text.record(),
        "config": plan.config.to_hf(),
        "source": tensors.fingerprint(),
    }
    _prepare(destination, overwrite)
    with Conversion(destination, settings, list(stored_shapes(plan.config, weights))) as work:
        _require_space(destination, _bytes_left(plan, tensors, cast, weights, work.finished))
        with _progress_bar(tensors, plan, work, progress) as bar:
            others = [entry for entry in plan.entries if text is None or _layer_of(entry) is None]
            _convert_tensors(tensors, others, cast, weights, work, bar)
            if text is not None:
                _convert_layers(tensors, plan, cast, text.token_ids, weights, work, bar)
        work.finish(plan.config, folder)
    return destination


def stored_shapes(config: FalconConfig, weights: str) -> dict[str, tuple[int, ...]]:
    """Shapes by path of the arrays that a checkpoint with such weights holds, in the model's order."""
    native = mapping.shapes(config)
    return {
        name: part.shape
        for path, shape in native.items()
        for name, part in quantize.described(path, shape, np.float32, weights).items()
    }


def require_tied_head(tensors: hf_files.HFFolder, plan: mapping.Plan) -> None:
    """Refuses a stored head that is not the embedding it is said to be.

    Raises:
      CheckpointError: their bits differ.
    """
    if plan.tied_copy and not tensors.same_bits(*plan.tied_copy):
        head = tensors.tensors[plan.tied_copy[0]]
        raise CheckpointError(
            f"{head} differs from the embedding, but config.json says that it is tied: set tie_word_embeddings to "
            "false there if the head is its own"
        )


class Conversion:
    """A destination in the making: its arrays so far, and the journal of finished tensors.

    Locked while it is open; the lock goes with the process, however that ends.

    Raises:
      CheckpointError: another process works on it, or it was begun from another source or with other settings.
    """

    def __init__(self, destination: Path, settings: Mapping[str, Any], paths: list[str]):
        # Late, as in load.py, which imports this file.
        from falcon_jax.checkpoint.store import ArrayFolder

        self._destination = destination
        self._folder = destination / UNFINISHED_FOLDER
        self._settings = dict(settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = open(self._folder / "journal.jsonl", "ab")  # noqa: SIM115, closed by __exit__
        try:
            self._lock()
            self._check_settings()
            self.finished = self._read_journal()
            self._remove_leftovers()
            self._arrays = ArrayFolder(self._folder / PARAMS_FOLDER)
            moved = (destination / PARAMS_FOLDER).exists()
            if not moved and not (self._folder / PARAMS_FOLDER).exists():
                self._arrays.create(paths)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "Conversion":
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def add(self, group: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Stores the arrays of one or more tensors, by the tensors' names, and notes them as finished."""
        arrays = {path: array for tensor in group.values() for path, array in tensor.items()}
        lines = []
        for name, tensor in group.items():
            records = {
                path: ArrayRecord(array.shape, array.dtype.name, host_checksum(array)) for path, array in tensor.items()
            }
            self.finished[name] = records
            described = {path: record_to_json(record) for path, record in records.items()}
            lines.append(json.dumps({"tensor": name, "arrays": described}))
        self._arrays.put(arrays)
        self._journal.write(("\n".join(lines) + "\n").encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def read(self, tensors: Iterable[str]) -> dict[str, np.ndarray]:
        """The stored arrays of finished tensors, by path.

        Raises:
          CheckpointError: one is damaged.
        """
        records = {path: record for name in tensors for path, record in self.finished[name].items()}
        arrays = self._arrays.read_host({path: record.abstract() for path, record in records.items()})
        for path, array in arrays.items():
            if host_checksum(array) != records[path].checksum:
                raise CheckpointError(f"{self._folder}: {path} is damaged: delete the folder and convert again")
        return arrays

    def finish(self, config: FalconConfig, source: Path) -> None:
        """Puts everything in its place, the manifest last."""
        expected = stored_shapes(config, self._settings["weights"])
        found = {path: record for records in self.finished.values() for path, record in records.items()}
        if {path: record.shape for path, record in found.items()} != expected:
            raise CheckpointError(f"{self._folder}: its journal is damaged: delete the folder and convert again")
        if (self._folder / PARAMS_FOLDER).exists():
            os.rename(self._folder / PARAMS_FOLDER, self._destination / PARAMS_FOLDER)
        carry_files(source, self._destination)
        sync_folder(self._destination)
        Manifest(config, {path: found[path] for path in expected}, self._settings).write(self._destination)
        shutil.rmtree(self._folder)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{self._destination}: another process is converting into it") from error

    def _check_settings(self) -> None:
        path = self._folder / "settings.json"
        wanted = json.loads(json.dumps(self._settings))
        if not path.exists():
            write_text(path, json.dumps(wanted, indent=1) + "\n")
        found = hf_files.read_json(path)
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise CheckpointError(
                f"{self._destination} holds an unfinished conversion with another {', '.join(differing)}: go on with "
                "what it was begun with, or delete the folder"
            )

    def _read_journal(self) -> dict[str, dict[str, ArrayRecord]]:
        finished = {}
        content = (self._folder / "journal.jsonl").read_bytes()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            entry = json.loads(line)
            finished[entry["tensor"]] = {path: record_from_json(record) for path, record in entry["arrays"].items()}
        # A line cut off by the interruption: its tensors are done again.
        self._journal.truncate(whole)
        return finished

    def _remove_leftovers(self) -> None:
        for path in self._folder.iterdir():
            if path.name not in ("journal.jsonl", "settings.json", PARAMS_FOLDER):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _progress_bar(tensors: hf_files.HFFolder, plan: mapping.Plan, work: Conversion, shown: bool) -> tqdm:
    sizes = {entry.hf_name: tensors.tensors[entry.hf_name].num_bytes for entry in plan.entries}
    done = sum(size for name, size in sizes.items() if name in work.finished)
    return tqdm(total=sum(sizes.values()), initial=done, unit="B", unit_scale=True, desc="convert", disable=not shown)


def _convert_tensors(
    tensors: hf_files.HFFolder,
    entries: Iterable[mapping.Entry],
    dtype: np.dtype | None,
    weights: str,
    work: Conversion,
    bar: tqdm,
) -> None:
    """One by one, small ones stored together."""
    sizes = {name: tensor.num_bytes for name, tensor in tensors.tensors.items()}
    group: dict[str, dict[str, np.ndarray]] = {}
    for entry in entries:
        if entry.hf_name in work.finished:
            continue
        if group and sum(sizes[name] for name in (*group, entry.hf_name)) > GROUP_BYTES:
            _flush(work, group, bar, sizes)
        arrays = entry.from_hf(tensors.read(entry.hf_name), dtype)
        group[entry.hf_name] = {
            name: part
            for path in list(arrays)
            for name, part in quantize.on_host(path, arrays.pop(path), weights).items()
        }
    if group:
        _flush(work, group, bar, sizes)


def _flush(work: Conversion, group: dict[str, dict[str, np.ndarray]], bar: tqdm, sizes: Mapping[str, int]) -> None:
    work.add(group)
    bar.update(sum(sizes[name] for name in group))
    group.clear()  # before the next tensor is read


def _convert_layers(
    tensors: hf_files.HFFolder,
    plan: mapping.Plan,
    dtype: np.dtype | None,
    token_ids: np.ndarray,
    weights: str,
    work: Conversion,
    bar: tqdm,
) -> None:
    """Layer by layer, each found on calibration text and stored at once; one that is stored in part is done again."""
    layers = [[entry for entry in plan.entries if _layer_of(entry) == i] for i in range(plan.config.num_layers)]
    unfinished = [any(entry.hf_name not in work.finished for entry in entries) for entries in layers]
    if not any(unfinished):
        return

    def read(entries: Iterable[mapping.Entry]) -> dict[str, np.ndarray]:
        return {
            path: array
            for entry in entries
            for path, array in entry.from_hf(tensors.read(entry.hf_name), dtype).items()
        }

    [name] = [entry.hf_name for entry in plan.entries if entry.parts[0].path == quantize.EMBEDDING]
    stored = work.read([name])
    embedding = QuantizedWeight(*(stored[f"{quantize.EMBEDDING}.{part}"] for part in QuantizedWeight._fields))
    computed_in = dtype or hf_files.parameter_dtype(tensors.tensors[name])
    text = LayerCalibration(plan.config, embedding, token_ids, weights, computed_in)
    del stored, embedding
    for layer, entries in enumerate(layers):
        if not unfinished[layer]:
            shapes = {part.path: part.shape for entry in entries for part in entry.parts}
            text.skip(layer, work.read([entry.hf_name for entry in entries]), shapes)
            continue
        made = text.quantize(layer, read(entries))
        names = {
            entry.hf_name: [
                name for part in entry.parts for name in quantize.described(part.path, part.shape, np.float32, weights)
            ]
            for entry in entries
        }
        done = sum(tensors.tensors[name].num_bytes for name in names if name not in work.finished)
        work.add({tensor: {name: made.pop(name) for name in parts} for tensor, parts in names.items()})
        bar.update(done)


def _layer_of(entry: mapping.Entry) -> int | None:
    """The layer that a tensor is of; None where it is of none."""
    found = re.match(r"layers\.(\d+)\.", entry.parts[0].path)
    return None if found is None else int(found[1])


def _prepare(destination: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: give a folder to make")
    if (destination / MANIFEST_FILE).exists():
        # Killed right after its manifest was written, a finished conversion leaves its journal.
        shutil.rmtree(destination / UNFINISHED_FOLDER, ignore_errors=True)
        if not overwrite:
            raise CheckpointError(
                f"{destination} holds a finished checkpoint: give another destination, or overwrite=True (--overwrite)"
            )
        # The manifest first: without it the rest does not load.
        (destination / MANIFEST_FILE).unlink()
        shutil.rmtree(destination / PARAMS_FOLDER, ignore_errors=True)
        for name in CARRIED_FILES:
            (destination / name).unlink(missing_ok=True)
    if any(destination.iterdir()) and not (destination / UNFINISHED_FOLDER).exists():
        raise CheckpointError(f"{destination} is not empty and holds no conversion: give another destination")


def _bytes_left(
    plan: mapping.Plan,
    tensors: hf_files.HFFolder,
    dtype: np.dtype | None,
    weights: str,
    finished: Mapping[str, Any],
) -> int:
    return sum(
        array.size * array.dtype.itemsize
        for entry in plan.entries
        if entry.hf_name not in finished
        for part in entry.parts
        for array in quantize.described(
            part.path, part.shape, dtype or hf_files.parameter_dtype(tensors.tensors[entry.hf_name]), weights
        ).values()
    )


def _require_space(destination: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(destination).free
    if num_bytes and free < num_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{destination}: {free / 1e9:.2f} GB are free, the conversion takes "
            f"{(num_bytes + _SPARE_BYTES) / 1e9:.2f} GB more"
        )
