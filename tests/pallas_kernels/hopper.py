"""Compiles functions for an H100, on a machine without one, and reports what the compiler says of the result.

    with hopper.Compiler() as compiler:
        report = compiler.compile(attention, jax.ShapeDtypeStruct((1, 4096, 32, 64), "bfloat16"), ..., scale=0.125)
        assert not report.problems() and len(report.launches) == 1

It owns a second process, since only there JAX may see the CUDA plugin: in a folder of its own that tools/install.sh
makes, or in the environment on a GPU machine. The trap: functions travel to it by name, so they must be importable.

By hand, from the repository's root (arrays as in HLO, anything else as in Python):

    python -m tests.pallas_kernels.hopper pallas_kernels.flash_attention.forward:forward 'bf16[1,4096,32,64]' \\
        'bf16[1,4096,32,64]' 'bf16[1,4096,32,64]' None None 'f32[32]' float32 0.125 --dump sass > forward.sass
"""

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import faulthandler
import hashlib
import importlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import compat

ROOT = Path(__file__).resolve().parents[2]
H100 = Path(__file__).with_name("h100.txtpb")
REGISTERS_PER_BLOCK = 65536
# The slowest kernel takes 5 s on one slow core.
MAX_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic kernel of a compiled function.

    registers: a thread has at launch; `set_max_registers` moves them between warpgroups afterwards.
    stack_bytes, spill_store_bytes, spill_load_bytes: of a thread's own memory, which is not on the chip.
    shared_memory_bytes: of a block, asked for at launch.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_memory_bytes: int
    num_blocks: int
    num_threads: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a function.

    kernels: those of Mosaic. XLA's own say nothing of themselves.
    warnings: all that ptxas said beyond the usual (above all: products run one after another for want of registers).
    launches: what the GPU is told to do, in order: kernels, fusions, copies. A loop's body counts once.
    temp_bytes, output_bytes: as XLA lays them out in the GPU's memory.
    log: all that was printed, dumps included.
    """

    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]
    launches: tuple[str, ...]
    temp_bytes: int
    output_bytes: int
    log: str

    def problems(self) -> list[str]:
        """Why the kernels would be slow, or would not start."""
        found = list(self.warnings)
        for kernel in self.kernels:
            for what in ("stack_bytes", "spill_store_bytes", "spill_load_bytes"):
                if value := getattr(kernel, what):
                    found.append(f"{kernel.name}: {what} {value}")
            if kernel.registers * kernel.num_threads > REGISTERS_PER_BLOCK:
                found.append(f"{kernel.name}: {kernel.num_threads} threads of {kernel.registers} registers")
            if kernel.shared_memory_bytes > compat.MAX_SMEM_BYTES:
                found.append(f"{kernel.name}: shared_memory_bytes {kernel.shared_memory_bytes}")
        return found

    def __str__(self) -> str:
        lines = [
            f"{kernel.name}: {kernel.num_blocks} blocks of {kernel.num_threads} threads, {kernel.registers} registers, "
            f"{kernel.shared_memory_bytes} bytes of shared memory"
            for kernel in self.kernels
        ]
        lines.append(f"{len(self.launches)} launches: {', '.join(self.launches)}")
        lines.append(f"{self.output_bytes} bytes of output, {self.temp_bytes} of temporaries")
        return "\n".join(lines + [f"PROBLEM {problem}" for problem in self.problems()])


class CompileError(Exception):
    """The function could not be compiled; the message has what the other process said, its traceback last."""


class Compiler:
    """A process that compiles, started with the first call: one at a time, of which each takes a second or two."""

    def __init__(self):
        self._opened = contextlib.ExitStack()
        self._known: dict[str, dict[str, Any]] = {}
        self._process: Any = None
        self._log: Any = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process. The next call would start another."""
        self._process = None
        with contextlib.suppress(BrokenPipeError):
            self._opened.close()  # closes the process's input, at which it ends

    def compile(self, function: Callable, *arguments: Any, dump: Sequence[str] = (), **keywords: Any) -> Report:
        """Compiles a call of `function`.

        Args:
          function: importable, traced as if on an H100.
          arguments, keywords: of the call; each jax.ShapeDtypeStruct in them, at any depth, is an array of the GPU, all
            else a constant.
          dump: "sass", "ptx" or others that MOSAIC_GPU_DUMP_* names, printed into the report's log.

        Raises:
          CompileError: tracing or compiling failed.
        """
        call = pickle.dumps((function, arguments, keywords, tuple(dump)))
        process = self._running()
        start = os.fstat(self._log.fileno()).st_size
        try:
            process.stdin.write(call)
            process.stdin.flush()
            reply = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code, said = process.wait(), self._said_since(start)
            self.close()
            raise CompileError(f"the compiling process ended with {code}:\n{said}") from error
        log = self._said_since(start)
        kernels, warnings = _read_ptxas(log)
        launch_configs, launches, temp_bytes, output_bytes = reply
        return Report(_joined(kernels, launch_configs, self._known), warnings, launches, temp_bytes, output_bytes, log)

    def _running(self) -> Any:
        if self._process is None:
            self._known = {}
            self._log = self._opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._process = self._opened.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", f"from {__spec__.name} import serve; serve()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    cwd=ROOT,
                    env=_environment(),
                )
            )
        return self._process

    def _said_since(self, start: int) -> str:
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), end - start, start).decode(errors="replace")


def _environment() -> dict[str, str]:
    """Of the compiling process. Raises FileNotFoundError where no compiler is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOSAIC_GPU_")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return environment
    folder = Path(sys.prefix) / "gpu_compiler"
    if not folder.is_dir():
        raise FileNotFoundError(f"no compiler for NVIDIA GPUs in {folder}: `make setup` installs it on Linux")
    # Else it would be another ptxas that the machine happens to have.
    programs = folder / "nvidia" / "cu13" / "bin"
    return environment | {"PYTHONPATH": str(folder), "PATH": f"{programs}{os.pathsep}{environment.get('PATH', '')}"}


def _read_ptxas(log: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The kernels that ptxas tells of, in order, as the first fields of Kernel; and whatever else it says."""
    kernels: list[dict[str, Any]] = []
    warnings = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append({"name": match[1], "stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            for what, value in zip(("stack_bytes", "spill_store_bytes", "spill_load_bytes"), match.groups()):
                kernels[-1][what] += int(value)  # of the kernel and of functions that it calls
        elif match := re.match(r"ptxas info\s*: Used (\d+) registers", line):
            kernels[-1]["registers"] = int(match[1])
        elif line.startswith("ptxas"):
            usual = r"ptxas info\s*: (\d+ bytes gmem|Function properties for|Compile time =)"
            if not re.match(usual, line):
                warnings.append(line)
    return kernels, tuple(warnings)


def _joined(
    kernels: list[dict[str, Any]],
    launch_configs: list[tuple[str, str, int, int, int]],
    known: dict[str, dict[str, Any]],
) -> tuple[Kernel, ...]:
    """Adds to what ptxas knows of kernels what only their launches say.

    known: what ptxas said of kernels before, by digest, and gets what it says now: a process compiles each just once.
    """
    waiting = list(kernels)
    joined = []
    for name, digest, num_blocks, num_threads, shared_memory_bytes in launch_configs:
        if digest not in known:
            kernel = next((kernel for kernel in waiting if kernel["name"] == f"{name}_mosaic_gpu_kernel"), None)
            if kernel is None:
                raise CompileError(f"ptxas said nothing of {name!r}, but of {[kernel['name'] for kernel in waiting]}")
            waiting.remove(kernel)
            known[digest] = kernel
        sizes: dict[str, Any] = {"num_blocks": num_blocks, "num_threads": num_threads}
        joined.append(Kernel(**known[digest], **sizes, shared_memory_bytes=shared_memory_bytes))
    return tuple(joined)


def serve() -> None:
    """The other process's loop: pickled calls come in, pickled facts go out. What fails ends it, with a traceback."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints goes to the log
    libc = ctypes.CDLL(None)
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100.read_text(), topology="1x1x1")
    target = SingleDeviceSharding(topology.devices[0])
    while True:
        try:
            function, arguments, keywords, dump = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        names = [f"MOSAIC_GPU_DUMP_{name.upper()}" for name in dump]
        os.environ.update(dict.fromkeys(names, "1"))
        # Mosaic's search for layouts can go on without end: then says where it is, and ends the process.
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        reply = _compile(function, arguments, keywords, target)
        faulthandler.cancel_dump_traceback_later()
        for name in names:
            del os.environ[name]
        libc.fflush(None)
        pickle.dump(reply, replies)
        replies.flush()


def _compile(function: Callable, arguments: tuple, keywords: dict, target: SingleDeviceSharding) -> tuple:
    leaves, tree = jax.tree.flatten((arguments, keywords))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(*values):
        given = iter(values)
        filled = [next(given) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
        arguments, keywords = jax.tree.unflatten(tree, filled)
        return function(*arguments, **keywords)

    placed = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=target) for array in arrays]
    with compat.assume_capability(compat.HOPPER):
        lowered = jax.jit(call).trace(*placed).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    launches = tuple(_launches(compiled.as_text() or ""))
    return _launch_configs(lowered), launches, memory.temp_size_in_bytes, memory.output_size_in_bytes


def _launches(hlo: str) -> Iterator[str]:
    """Names of what a scheduled module makes the GPU do."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = ""
    lines: list[tuple[str, str]] = []
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := re.match(r"  (?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z-]*)\(", line):
            lines.append((match[1], line))

    def walk(name: str) -> Iterator[str]:
        for opcode, line in computations[name]:
            if opcode in ("call", "while", "conditional", "async-start"):
                if opcode == "while":
                    yield opcode
                calls = r"(?:to_apply|condition|body|calls|\w+_computations?)=\{?(%[\w.-]+(?:, %[\w.-]+)*)"
                for names in re.findall(calls, line):
                    for called in names.split(", "):
                        yield from walk(called.removeprefix("%"))
            elif opcode == "custom-call":
                yield re.findall(r'custom_call_target="([^"]+)"', line)[0]
            elif opcode not in _NOTHING_TO_DO and not opcode.endswith("-done"):
                yield opcode

    return walk(entry)


_NOTHING_TO_DO = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "async-update"}


def _launch_configs(lowered: Any) -> list[tuple[str, str, int, int, int]]:
    """Of each Mosaic kernel: name, digest, blocks, threads of a block and bytes of shared memory."""
    # Nothing public tells; kernels travel as serialised MLIR inside the module.
    from jax._src.interpreters import mlir
    from jax._src.lib import mosaic_gpu_dialect  # pyright: ignore[reportPrivateImportUsage]
    from jaxlib.mlir import ir

    found = []

    def each(operation: Any, name: str, visit: Callable) -> None:
        def see(candidate: Any) -> Any:
            if candidate.operation.name == name:
                visit(candidate)
            return ir.WalkResult.ADVANCE

        operation.walk(see)

    def custom_call(call: Any) -> None:
        if "mosaic_gpu" not in str(call.attributes["call_target_name"]):
            return
        context = mlir.make_ir_context()
        context.allow_unregistered_dialects = True
        with context:
            mosaic_gpu_dialect.register_dialect(context)
            module = ir.StringAttr(call.attributes["mhlo.backend_config"]["module"]).value_bytes
            kernel, digest = ir.Module.parse(module), hashlib.sha256(module).hexdigest()
            name = ir.StringAttr(kernel.operation.attributes["sym_name"]).value

            def launch(operation: Any) -> None:
                # asynchronous tokens, grid and block of three each, clusters, dynamic shared memory, ...
                sizes = list(ir.DenseI32ArrayAttr(operation.attributes["operandSegmentSizes"]))
                values = iter(operation.operands)
                segments = [[next(values) for _ in range(size)] for size in sizes]
                constants = [
                    [ir.IntegerAttr(value.owner.attributes["value"]).value for value in segment]
                    for segment in segments[1:7] + segments[10:11]
                ]
                grid_x, grid_y, grid_z, block_x, block_y, block_z, smem = (sum(values) for values in constants)
                found.append((name, digest, grid_x * grid_y * grid_z, block_x * block_y * block_z, smem))

            each(kernel.operation, "stable_mosaic_gpu.gpu.launch", launch)

    each(lowered.compiler_ir("stablehlo").operation, "stablehlo.custom_call", custom_call)
    return found


def _argument(text: str) -> Any:
    """An array's type from `bf16[1,4096,64]`, else a Python literal, else the text itself."""
    types = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "s32": "int32"}
    if match := re.fullmatch(r"(\w+)\[([\d,]*)\]", text):
        if match[1] not in types:
            raise SystemExit(f"{text}: its type should be one of {', '.join(types)}")
        return jax.ShapeDtypeStruct([int(size) for size in match[2].split(",") if size], types[match[1]])
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles a call of a function for an H100 and reports on the result.")
    parser.add_argument("function", help="module:name")
    parser.add_argument("arguments", nargs="*", help="bf16[1,4096,64], or a Python value, or name=either")
    parser.add_argument("--dump", action="append", default=[], help="sass or ptx, printed before the report")
    options = parser.parse_args()
    module, _, name = options.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    keyword = re.compile(r"([A-Za-z_]\w*)=(.*)")
    matches = [(text, keyword.fullmatch(text)) for text in options.arguments]
    positional = [_argument(text) for text, match in matches if match is None]
    named = {match[1]: _argument(match[2]) for _, match in matches if match is not None}
    with Compiler() as compiler:
        report = compiler.compile(function, *positional, dump=options.dump, **named)
    if options.dump:
        print(report.log)
    print(report, file=sys.stderr)


if __name__ == "__main__":
    main()
