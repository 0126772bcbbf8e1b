"""Converts and loads a random Falcon of real size, and measures time, peak memory and speed against the disk's own.

The source is a Hugging Face folder in shards of 5 GB, written as it goes: random bfloat16 numbers as small as trained
weights, so that nothing compresses. Every step runs in a process of its own, from a disk cache emptied of its files.
Two floors stand beside the load: reading the same files into one small buffer ("read"), which is the disk, and into
memory that is kept ("read-kept"), which a load to the CPU has to do as well; on a virtual machine that gives freed
memory back to its host, the second is what limits.

python benchmarks/convert_real_size.py /tmp/real-size --output benchmarks/results/convert-falcon-7b.json
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from falcon_jax.checkpoint import convert, load, mapping
from falcon_jax.config import PRESETS, FalconConfig

SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 16 << 20
BOUND_BYTES = 500_000_000  # beside twice the largest tensor


@dataclasses.dataclass(frozen=True)
class Arguments:
    folder: Annotated[Path, tyro.conf.Positional]
    """Where the model goes, twice its size; emptied at the end."""
    preset: str = "falcon-7b"
    """Whose shape the model has."""
    output: Path | None = None
    """JSON file for the results."""
    rounds: int = 3
    """Times that reading and loading are measured; the best counts."""
    keep: bool = False
    """Leaves the folders for another run."""
    step: Literal["all", "convert", "load", "load-unverified", "read", "read-kept"] = "all"
    """What to measure; anything but "all" is what this script calls itself for."""


def write_source(folder: Path, config: FalconConfig) -> None:
    folder.mkdir(parents=True)
    shards: list[list[mapping.Entry]] = [[]]
    for entry in mapping.table(config):
        if shards[-1] and sum(map(num_bytes, (*shards[-1], entry))) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    places = {}
    pieces = random_pieces()
    for number, entries in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, start = {}, 0
        for entry in entries:
            end = start + num_bytes(entry)
            header[entry.hf_name] = {"dtype": "BF16", "shape": entry.hf_shape, "data_offsets": [start, end]}
            places[entry.hf_name], start = name, end
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for begin in range(0, start, PIECE_BYTES):
                file.write(next(pieces)[: min(PIECE_BYTES, start - begin)])
    index = {"metadata": {"total_size": sum(map(num_bytes, mapping.table(config)))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def random_pieces() -> Iterator[memoryview]:
    """Buffers of random bfloat16 between 2**-15 and 2**-5 in size, both signs."""
    generator = np.random.default_rng(0)
    while True:
        bits = generator.integers(0, 2**64, PIECE_BYTES // 8, dtype=np.uint64).view(np.uint16)
        # Sign and the 7 bits of the fraction stay random; the exponent keeps 3 random bits: 112 to 119.
        bits &= np.uint16(0x83FF)
        bits |= np.uint16(112 << 7)
        yield bits.view(np.uint8).data


def num_bytes(entry: mapping.Entry) -> int:
    return math.prod(entry.hf_shape) * 2


def forget(folder: Path) -> None:
    """Writes the folder's files out and drops them from the disk cache, so that reading them is reading the disk."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def memory(key: str) -> int:
    """Bytes from /proc/self/status."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(step: str, folder: Path) -> dict[str, Any]:
    """One step in this process."""
    source, converted = folder / "hf", folder / "converted"
    jax.devices()  # starting the device is no part of a load
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    if step == "convert":
        convert(source, converted)
    elif step == "read":
        buffer = bytearray(PIECE_BYTES)
        for path in files(converted / "params"):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    elif step == "read-kept":
        kept = []
        for path in files(converted / "params"):
            kept.append(np.empty(path.stat().st_size, np.uint8))
            with open(path, "rb", buffering=0) as file:
                file.readinto(kept[-1])
    else:
        jax.block_until_ready(load(converted, verify=step == "load").params)
    seconds = time.perf_counter() - start
    device = jax.devices()[0].device_kind
    return {"seconds": seconds, "peak_extra_bytes": memory("VmHWM") - before, "device": device}


def in_process(step: str, arguments: Arguments) -> dict[str, Any]:
    forget(arguments.folder)
    command = [sys.executable, __file__, str(arguments.folder), "--step", step]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(step, result, file=sys.stderr)
    return result


def measure_all(arguments: Arguments) -> dict[str, Any]:
    config = PRESETS[arguments.preset]
    source, converted = arguments.folder / "hf", arguments.folder / "converted"
    if not (source / "config.json").exists():
        write_source(source, config)
    shutil.rmtree(converted, ignore_errors=True)
    total = sum(map(num_bytes, mapping.table(config)))
    largest = max(map(num_bytes, mapping.table(config)))
    converting = in_process("convert", arguments)
    # Several times around, so that a slow phase of the disk does not fall on one of them alone.
    steps = ("read", "read-kept", "load", "load-unverified")
    rounds = [{step: in_process(step, arguments) for step in steps} for _ in range(arguments.rounds)]
    best = {step: min((turn[step] for turn in rounds), key=lambda result: result["seconds"]) for step in rounds[0]}
    rates = {step: total / result["seconds"] / 1e9 for step, result in best.items()}
    bound = 2 * largest + BOUND_BYTES
    if converting["peak_extra_bytes"] > bound:
        raise SystemExit(f"converting took {converting['peak_extra_bytes']} bytes beside the program, bound {bound}")
    return {
        "preset": arguments.preset,
        "total_bytes": total,
        "largest_tensor_bytes": largest,
        "convert_s": converting["seconds"],
        "convert_gb_per_s": total / converting["seconds"] / 1e9,
        "convert_peak_extra_bytes": converting["peak_extra_bytes"],
        "convert_peak_extra_bound_bytes": bound,
        "raw_read_gb_per_s": rates["read"],
        "kept_read_gb_per_s": rates["read-kept"],
        "load_s": best["load"]["seconds"],
        "load_gb_per_s": rates["load"],
        "load_share_of_raw_read": rates["load"] / rates["read"],
        "load_share_of_kept_read": rates["load"] / rates["read-kept"],
        "load_unverified_gb_per_s": rates["load-unverified"],
        "load_peak_extra_bytes": best["load"]["peak_extra_bytes"],
        "rounds": rounds,
        "device": rounds[0]["load"]["device"],
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        "command": f"python benchmarks/convert_real_size.py FOLDER --preset {arguments.preset}",
    }


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.step != "all":
        print(json.dumps(measure(arguments.step, arguments.folder)))
        return
    try:
        results = measure_all(arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder / "hf", ignore_errors=True)
            shutil.rmtree(arguments.folder / "converted", ignore_errors=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
