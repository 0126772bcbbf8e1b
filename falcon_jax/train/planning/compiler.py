"""Compiles a job's real training step for GPUs that are not there, in a process of its own.

That process alone sees JAX's CUDA plugin and takes the CPU for its devices; with a plugin in its environment, every
program on a machine without a GPU would print a traceback. What XLA says on its way is read from its stderr: a bad
sharding is an error nowhere else.
"""

import dataclasses
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from falcon_jax import sharding
from falcon_jax.errors import USER_ERRORS, ConfigError, one_line
from falcon_jax.train import step as train_step
from falcon_jax.train.planning import hlo
from falcon_jax.train.planning.devices import GPUS_PER_MACHINE
from falcon_jax.train.planning.job import Job
from pallas_kernels import compat

PACKAGES = Path(__file__).resolve().parents[3]
FOLDER = Path(sys.prefix) / "gpu_compiler"  # where tools/install.sh puts the plugin
_REMATERIALIZED = re.compile(
    r"Involuntary full rematerialization\..*?from sharding (.*?) efficiently for HLO operation (.*)"
)


class CompilationError(RuntimeError):
    """The step does not compile, which is our fault; the message ends with what the process said."""


@dataclasses.dataclass(frozen=True)
class Rematerialization:
    """An array that XLA could bring from one sharding to the other only by gathering all of it on each device.

    shardings: "{...} to {...}". operation: type and opcode. name: the operation's place in the source, where XLA knows.
    """

    shardings: str
    operation: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What became of a job's step. Bytes are of one device.

    peak_bytes: of everything at once, by the compiler's own assignment of buffers. argument_bytes: of it, the state and
      the batch. seconds: tracing, lowering and compiling, without the process's start.
    """

    peak_bytes: int
    argument_bytes: int
    program: hlo.Program
    rematerializations: tuple[Rematerialization, ...]
    seconds: float


def compile_step(job: Job) -> Compiled:
    """Takes seconds for a small model, and a minute or two for sixty layers; a few GB of this machine's memory.

    Raises:
      ConfigError: no compiler is installed, or the step refuses the job.
      CompilationError: otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        reply, log = Path(folder) / "reply", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.run(
                [sys.executable, "-c", f"from {__spec__.name} import serve; serve()", str(reply)],
                input=pickle.dumps(job),
                stdout=output,
                stderr=output,
                env=environment(),
                check=False,
            )
        said = log.read_text(errors="replace")
        if process.returncode or not reply.is_file():
            raise CompilationError(f"{job.layout}: the compiling process ended with {process.returncode}:\n{said}")
        answer = pickle.loads(reply.read_bytes())
    if isinstance(answer, str):
        raise ConfigError(answer)
    return dataclasses.replace(answer, rematerializations=rematerializations(said))


def environment() -> dict[str, str]:
    """Of a process that compiles for NVIDIA GPUs. Raises: ConfigError where nothing is installed that could."""
    found = dict(os.environ)
    # Flags for a GPU's own run could ask for one. Warnings of XLA must be heard.
    found.pop("XLA_FLAGS", None)
    found |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}
    paths = [str(PACKAGES), *filter(None, [found.get("PYTHONPATH")])]
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        if not FOLDER.is_dir():
            raise ConfigError(
                f"there is no compiler for NVIDIA GPUs in {FOLDER}: `make setup` installs it on Linux; elsewhere than "
                "in a checkout, docs/planning.md has the one command"
            )
        paths.insert(0, str(FOLDER))
        # Else it would be another ptxas that the machine happens to have.
        programs = FOLDER / "nvidia" / "cu13" / "bin"
        found["PATH"] = f"{programs}{os.pathsep}{found.get('PATH', '')}"
    return found | {"PYTHONPATH": os.pathsep.join(paths)}


def rematerializations(log: str) -> tuple[Rematerialization, ...]:
    """What XLA's log says of them, each once."""
    found = []
    for shardings, operation in _REMATERIALIZED.findall(log):
        name = re.search(r'op_name="([^"]*)"', operation)
        described = re.match(r"%?\S+ = (\S+ [\w-]+)\(", operation)
        found.append(
            Rematerialization(shardings, described[1] if described else operation[:80], name[1] if name else "")
        )
    return tuple(dict.fromkeys(found))


def serve() -> None:
    """The other process: a pickled Job comes in, a pickled Compiled goes out, or a user's error as its line."""
    job = pickle.load(sys.stdin.buffer)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        answer: Any = _compile(job)
    except (*USER_ERRORS, NotImplementedError, ValueError) as error:
        if not isinstance(error, USER_ERRORS) and "attention: implementation=" not in str(error):
            raise
        answer = one_line(error)
    Path(sys.argv[1]).write_bytes(pickle.dumps(answer))


def _compile(job: Job) -> Compiled:
    from jax.experimental import topologies

    start = time.monotonic()
    machines, each = -(-job.num_devices // GPUS_PER_MACHINE), min(job.num_devices, GPUS_PER_MACHINE)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=job.device.description(), topology=f"1x{machines}x{each}"
    )
    mesh = sharding.make_mesh(**job.layout.sizes, devices=topology.devices)
    options = job.options()
    state = train_step.abstract_state(job.config, options, mesh)
    tokens = jax.ShapeDtypeStruct(job.tokens_shape(), jnp.uint16, sharding=sharding.micro_batches_sharding(mesh))
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    with compat.assume_capability("{}.{}".format(*job.device.capability)):
        step: Any = train_step.make_train_step(job.config, options, job.forward(), mesh)
        lowered = step.trace(state, tokens, rate).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    seconds = time.monotonic() - start
    places = hlo.Places(tuple(job.layout.sizes.items()), tuple(device.id for device in mesh.devices.flat))
    program = hlo.read(compiled.as_text(), places, job.length)
    return Compiled(
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        program=program,
        rematerializations=(),
        seconds=seconds,
    )
