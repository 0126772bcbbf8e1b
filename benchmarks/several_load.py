"""From disk to several devices: a converted checkpoint, checked, and a training state saved on one mesh for another."""

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import jax
import ml_dtypes
import numpy as np

from benchmarks import convert_real_size
from benchmarks.places import Say
from benchmarks.several_correct import take_step
from benchmarks.several_jobs import Job, Layout, Result, half_dtype
from falcon_jax import Falcon
from falcon_jax.checkpoint.convert import Conversion, stored_shapes
from falcon_jax.checkpoint.store import TrainCheckpoints
from falcon_jax.config import FalconConfig
from falcon_jax.train import step as train_step
from falcon_jax.train.step import StepOptions

NUM_LOADS = 2  # the first compiles the checksums
SPARE = 1.1  # of a checkpoint's size, that the disk must have


@dataclasses.dataclass(frozen=True)
class Load(Job):
    """A random checkpoint onto a mesh, with its checksums compared. folder: where to put it for a while."""

    part: ClassVar[str] = "load"
    model: str
    config: FalconConfig
    layout: Layout
    folder: Path | None
    timeout_s: float

    @property
    def name(self) -> str:
        return f"{self.model}, {self.config.num_layers} layers, {self.layout}"

    def run(self, say: Say) -> Iterator[Result]:
        num_bytes = 2 * self.config.num_parameters
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="falcon_jax-") as folder:
            require_space(Path(folder), num_bytes)
            say(f"{self}: writes {num_bytes / 1e9:.1f} GB")
            checkpoint = Path(folder) / "converted"
            begin = time.perf_counter()
            write(checkpoint, self.config)
            write_s = time.perf_counter() - begin
            read_s, seconds = _read(checkpoint), []
            for _ in range(NUM_LOADS):
                convert_real_size.forget(checkpoint)
                begin = time.perf_counter()
                model = Falcon.from_checkpoint(checkpoint, mesh=self.layout.mesh())
                jax.block_until_ready(model.params)
                seconds.append(time.perf_counter() - begin)
                del model
        yield {
            "model": self.model,
            "num_layers": self.config.num_layers,
            "layout": str(self.layout),
            "num_bytes": num_bytes,
            "write_s": write_s,
            "load_s": [round(one, 3) for one in seconds],
            "load_gb_per_s": num_bytes / min(seconds) / 1e9,
            "read_gb_per_s": num_bytes / read_s / 1e9,  # one thread, into one small buffer
        }


@dataclasses.dataclass(frozen=True)
class Restore(Job):
    """A training state after a step on one mesh, saved, and restored onto another."""

    part: ClassVar[str] = "load"
    model: str
    config: FalconConfig
    layout: Layout
    onto: Layout
    folder: Path | None
    timeout_s: float

    @property
    def name(self) -> str:
        return f"{self.model} training state, {self.layout} onto {self.onto}"

    def run(self, say: Say) -> Iterator[Result]:
        state, _ = take_step(self.config, self.layout, half_dtype())
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="falcon_jax-") as folder:
            require_space(Path(folder), num_bytes)
            with TrainCheckpoints(folder) as checkpoints:
                begin = time.perf_counter()
                checkpoints.save(1, state)
                checkpoints.wait()
                save_s = time.perf_counter() - begin
                target = train_step.abstract_state(self.config, StepOptions(), self.onto.mesh())
                begin = time.perf_counter()
                restored, _ = checkpoints.restore(target)
                jax.block_until_ready(restored)
                restore_s = time.perf_counter() - begin
        differing = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for (path, one), other in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(restored), strict=True)
            if not same_bits(one, other)
        ]
        yield {
            "model": self.model,
            "num_layers": self.config.num_layers,
            "layout": str(self.layout),
            "onto": str(self.onto),
            "num_bytes": num_bytes,
            "save_s": save_s,
            "restore_s": restore_s,
            "differing": differing[:5],
            "ok": not differing,
        }


def same_bits(one: jax.Array, other: jax.Array) -> bool:
    mine, others = (np.ascontiguousarray(jax.device_get(array)).view(np.uint8) for array in (one, other))
    return one.dtype == other.dtype and np.array_equal(mine, others)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises: OSError where the disk has no room for so much."""
    free = shutil.disk_usage(folder).free
    if free < SPARE * num_bytes:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, and {SPARE * num_bytes / 1e9:.1f} are needed: --folder")


def write(folder: Path, config: FalconConfig) -> None:
    """A converted checkpoint of random bfloat16 numbers, which nothing compresses."""
    shapes = stored_shapes(config, "native")
    pieces = convert_real_size.random_pieces()
    settings = {"dtype": "bfloat16", "weights": "native", "calibration": None, "config": config.to_hf(), "source": None}
    with Conversion(folder, settings, list(shapes)) as work:
        for path, shape in shapes.items():
            buffer = np.empty(2 * math.prod(shape), np.uint8)
            for begin in range(0, buffer.size, convert_real_size.PIECE_BYTES):
                part = buffer[begin : begin + convert_real_size.PIECE_BYTES]
                part[:] = np.frombuffer(next(pieces), np.uint8, part.size)
            work.add({path: {path: buffer.view(ml_dtypes.bfloat16).reshape(shape)}})
        work.finish(config, folder)


def _read(folder: Path) -> float:
    """Seconds to read all files from the disk: what a load cannot do in less, but for reading several at once."""
    convert_real_size.forget(folder)
    buffer = bytearray(convert_real_size.PIECE_BYTES)
    begin = time.perf_counter()
    for path in convert_real_size.files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def jobs(
    model: str, config: FalconConfig, state: tuple[str, FalconConfig], count: int, folder: Path | None, timeout_s: float
) -> list[Job]:
    """A checkpoint of `model` over tensor, and a training state (a model's name and shape) from fsdp to data x tensor.

    Raises: never; folders that cannot be written are failures of the jobs.
    """
    name, trained = state
    return [
        Load(model, config, Layout(tensor=count), folder, timeout_s),
        Restore(name, trained, Layout(fsdp=count), Layout(data=2, tensor=count // 2), folder, timeout_s),
    ]
