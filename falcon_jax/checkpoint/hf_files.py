"""Tensors of a Hugging Face folder, one at a time: safetensors files and, on request, PyTorch pickles.

Owns what makes a folder readable or not: its index, its shards, their headers and sizes. All of that is checked
before the first tensor is read. Knows nothing of Falcon's tensor names.

The trap: memory-mapped pages count as the process's own memory, so data is read into a buffer of its own; and a
pickle runs code when it is read, so one is opened only when asked for.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from falcon_jax.errors import CheckpointError

CONFIG_FILE = "config.json"
SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# What the safetensors format defines, with the types that a Falcon's parameters come in.
FLOAT_TYPES: dict[str, np.dtype] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}
_BITS = {"F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64} | {
    f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)
}
_BITS |= {"BOOL": 8, "F16": 16, "BF16": 16, "F32": 32}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MIN_TORCH = (2, 10)  # before it, weights_only=True could be led to run code
_COMPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies and what it is; `start` is its first byte in a safetensors file."""

    name: str
    file: Path
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    num_bytes: int
    start: int | None  # None in a pickle

    def __str__(self) -> str:
        return f"{self.file}: {self.name} ({self.dtype}{list(self.shape)})"


class HFFolder:
    """The checked tensors of one folder; see `open_folder`."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], files: list[Path]):
        self.folder = folder
        self.tensors = dict(tensors)
        self._files = files

    def read(self, name: str) -> np.ndarray:
        """The tensor, in memory that belongs to the caller.

        Raises:
          CheckpointError: its type is no parameter's, or the file has become shorter.
        """
        tensor = self.tensors[name]
        dtype = parameter_dtype(tensor)
        if tensor.start is None:
            return _read_pickled(tensor, dtype)
        array = aligned_empty(tensor.shape, dtype)
        with open(tensor.file, "rb", buffering=0) as file:
            _read_into(file, tensor, tensor.start, array)
        return array

    def same_bits(self, first: str, second: str) -> bool:
        """Whether two tensors are equal, bit by bit; holds 32 MB of a safetensors file at a time."""
        left, right = self.tensors[first], self.tensors[second]
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        pairs = zip(self._pieces(left), self._pieces(right))
        return all(np.array_equal(a, b) for a, b in pairs)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this folder's content from another's without reading it all: names, sizes, times, headers."""
        files = {}
        for path in self._files:
            status = path.stat()
            files[path.name] = [status.st_size, status.st_mtime_ns]
        layout = [[t.name, t.file.name, t.dtype, list(t.shape), t.start] for t in self.tensors.values()]
        digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        return {"files": files, "tensors": digest}

    def _pieces(self, tensor: Tensor) -> Iterator[np.ndarray]:
        if tensor.start is None:
            yield _read_pickled(tensor, parameter_dtype(tensor)).reshape(-1).view(np.uint8)
            return
        with open(tensor.file, "rb", buffering=0) as file:
            for start in range(0, tensor.num_bytes, _COMPARE_BYTES):
                piece = np.empty(min(_COMPARE_BYTES, tensor.num_bytes - start), np.uint8)
                _read_into(file, tensor, tensor.start + start, piece)
                yield piece


def open_folder(folder: str | Path, *, allow_pickle: bool = False) -> HFFolder:
    """Finds and checks the tensors of a Hugging Face folder; reads headers alone.

    Args:
      folder: holds `model.safetensors`, or its shards with `model.safetensors.index.json`.
      allow_pickle: also take `pytorch_model*.bin` where there are no safetensors. Needs torch >= 2.10.

    Raises:
      CheckpointError: a file is missing, cut short or malformed, the index and the shards disagree, there are two
        sets of weights, or there are pickles alone and they are not allowed.
    """
    folder = Path(folder)
    for single, index, read_header in (
        (SAFETENSORS_FILE, SAFETENSORS_INDEX, read_safetensors_header),
        (PICKLE_FILE, PICKLE_INDEX, _read_pickle_header),
    ):
        has_single, has_index = (folder / single).exists(), (folder / index).exists()
        if not has_single and not has_index:
            continue
        if has_single and has_index:
            raise CheckpointError(f"{folder} holds both {single} and {index}: remove the one that is out of date")
        if single == PICKLE_FILE:
            _require_pickle(folder, allow_pickle)
        if has_single:
            return HFFolder(folder, read_header(folder / single), [folder / single])
        return _open_sharded(folder, folder / index, read_header)
    raise CheckpointError(_why_nothing(folder))


def read_safetensors_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked against each other and the file's size.

    Raises:
      CheckpointError: the header is malformed, a tensor's bytes are not what its type and shape take, tensors
        overlap or leave a hole, or the file is shorter or longer than they say.

    Source: the format's description in the safetensors README.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: {size} bytes cannot hold its header of {length}: the file is cut short or is no "
                    "safetensors file; get it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its header is damaged ({error}): get the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is no JSON object: get the file again")
    header.pop("__metadata__", None)
    tensors = [_parse_entry(path, 8 + length, name, entry) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.num_bytes)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if (tensor.start or 0) < end else "follows a hole"
            raise CheckpointError(f"{tensor} {what}: it begins at byte {tensor.start}, expected {end}")
        end += tensor.num_bytes
        if end > size:
            raise CheckpointError(f"{tensor} ends at byte {end}, the file at {size}: it is cut short, get it again")
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes behind its last tensor, expected none: get it again")
    return {tensor.name: tensor for tensor in tensors}


def parameter_dtype(tensor: Tensor) -> np.dtype:
    """The numpy type of a tensor that is a parameter.

    Raises:
      CheckpointError: it is not float16, bfloat16 or float32.
    """
    if tensor.dtype not in FLOAT_TYPES:
        raise CheckpointError(f"{tensor}: a parameter is {', '.join(FLOAT_TYPES)}, not {tensor.dtype}")
    return FLOAT_TYPES[tensor.dtype]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins at a multiple of 64 bytes, which a CPU device takes over without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _open_sharded(folder: Path, index: Path, read_header) -> HFFolder:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index}: weight_map is missing or is no map from tensor to file")
    shards = sorted(set(listed.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}, expected the name of a file beside it")
        if not (folder / shard).is_file():
            first = next(name for name, file in listed.items() if file == shard)
            raise CheckpointError(f"{folder / shard} is missing: {index.name} places {first} and others in it")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = read_header(folder / shard)
        for name, tensor in found.items():
            if name not in listed:
                raise CheckpointError(f"{tensor} is not listed in {index.name}: the shard is of another checkpoint")
            if listed[name] != shard:
                raise CheckpointError(f"{tensor} is a duplicate: {index.name} places it in {listed[name]}")
        lacking = [name for name, file in listed.items() if file == shard and name not in found]
        if lacking:
            raise CheckpointError(
                f"{folder / shard} lacks {', '.join(lacking[:3])} ({len(lacking)} in all), which {index.name} "
                "places there: get the file again"
            )
        tensors |= found
    return HFFolder(folder, tensors, [index, *(folder / shard for shard in shards)])


def _why_nothing(folder: Path) -> str:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        return f"{folder} {what}: expected a Hugging Face folder with {SAFETENSORS_FILE}"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder} holds {shards[0]}, but neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX}"
    return f"{folder} holds no weights: expected {SAFETENSORS_FILE}, or shards with {SAFETENSORS_INDEX}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return content


def _parse_entry(path: Path, base: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
            raise ValueError("no whole number of at least 0")
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} has a damaged header entry {entry!r}: get the file again") from error
    if dtype not in _BITS:
        raise CheckpointError(f"{path}: {name} has the type {dtype!r}; known are {', '.join(_BITS)}")
    expected = math.prod(shape) * _BITS[dtype] // 8
    if end - begin != expected:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes; {dtype}{list(shape)} takes {expected}")
    return Tensor(name, path, dtype, shape, expected, base + begin)


def _read_into(file: BinaryIO, tensor: Tensor, start: int, array: np.ndarray) -> None:
    file.seek(start)
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        # A call reads at most 2 GiB, and may read less.
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(f"{tensor}: the file has become shorter while it was read: get it again")
        view = view[count:]


# PyTorch pickles.


def _require_pickle(folder: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} holds pickles alone ({PICKLE_FILE} or its shards), which can run code when they are read: if "
            "you trust their source, allow them with allow_pickle=True (--allow-pickle)"
        )
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{folder}: .bin files need torch >= 2.10: pip install 'falcon-jax[torch]'") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        raise CheckpointError(f"{folder}: .bin files need torch >= 2.10, which reads them safely; this is {version}")


def _load_pickle(path: Path) -> dict[str, Any]:
    """The state dict of one .bin file as tensors mapped from it: nothing is read until it is touched."""
    import torch

    try:
        state = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise, OSError for a short one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} is not a state dict that torch reads safely: {reason}") from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict (tensors by name)")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{path} is not a state dict: {name!r} is a {kind}, expected a tensor under a name")
    return state


def _read_pickle_header(path: Path) -> dict[str, Tensor]:
    import torch

    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    return {
        name: Tensor(name, path, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes, None)
        for name, tensor in _load_pickle(path).items()
    }


def _read_pickled(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    import torch

    # Mapped anew for each tensor, so that the pages of those before it are given back.
    source = _load_pickle(tensor.file)[tensor.name].contiguous()
    array = aligned_empty(tensor.shape, dtype)
    flat = source.reshape(-1).view(torch.uint8) if source.numel() else source.reshape(-1)
    array.reshape(-1).view(np.uint8)[:] = flat.numpy() if source.numel() else []
    return array
