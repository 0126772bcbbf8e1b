"""Where a step's time goes: a trace of JAX's profiler, read, and added up by kernel and by place in the model.

What a trace says of a kernel is its name, its time, and the operation of the compiled program that it belongs to. The
program's text says of an operation which functions of ours it came from. So a matrix product can be told from the
others, and forward from backward.

The trap: a plane of a GPU may also have lines that sum up others; only its streams count.
"""

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

NUM_ROWS = 25
NAME_CHARACTERS = 90
# Events that last as long as others within them; on a CPU the trace has both.
_ENCLOSING = re.compile(r"(while|conditional|call|async-\w+)(\.\d+)*")
_NUMBERS = re.compile(r"([._]\d+)+$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.+?) [a-z][a-z0-9-]*\(.*")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME_OF = re.compile(r"stack_frame_id=(\d+)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_OWN_FOLDERS = ("falcon_jax/model/", "falcon_jax/train/", "pallas_kernels/")
NUM_FUNCTIONS = 3


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel's run. operation: of the compiled program, None where the trace does not say."""

    kernel: str
    operation: str | None
    ns: float


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operation comes from: its pass, the innermost functions of ours, JAX's primitive, its result.

    part: "forward", "forward again" (rematerialized), "backward", or "the rest", above all the update.
    """

    part: str
    functions: str
    primitive: str
    result: str

    def __str__(self) -> str:
        return f"{self.part:13} {self.functions}: {self.primitive} {self.result}"


def folder_name(text: str) -> str:
    """A text as a name of a folder."""
    return re.sub(r"[^\w.=-]+", "_", text).strip("_")


def record(run: Callable[[], object], folder: Path) -> Path:
    """Traces a call; returns the trace's file, below `folder`, as TensorBoard and XProf find it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would outnumber everything else
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        run()
    finally:
        jax.profiler.stop_trace()
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)


def summary(trace: Path, program: str, num_steps: int) -> dict[str, Any]:
    """Milliseconds a step of all kernels and of those of each part, and the most expensive ones by two keys."""
    events = read(trace)
    known = places(program)
    placed = [(known[event.operation], event) for event in events if event.operation in known]
    by_part: dict[str, float] = collections.defaultdict(float)
    for place, event in placed:
        by_part[place.part] += event.ns / num_steps / 1e6
    return {
        "kernels_ms": sum(event.ns for event in events) / num_steps / 1e6,
        "part_ms": dict(by_part),
        "by_kernel": _rows(((without_numbers(event.kernel), event) for event in events), num_steps),
        "by_place": _rows(((str(place), event) for place, event in placed), num_steps),
    }


def without_numbers(name: str) -> str:
    """A kernel's name without the numbers that XLA appends: loop_add_fusion_12 and loop_add_fusion.3 are one kind."""
    return _NUMBERS.sub("", name)


def _rows(events: Iterable[tuple[str, Event]], num_steps: int) -> list[dict[str, Any]]:
    """Milliseconds and calls a step of the most expensive keys, most expensive first."""
    total_ns: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    for key, event in events:
        total_ns[key] += event.ns
        calls[key] += 1
    dearest = sorted(total_ns, key=lambda key: -total_ns[key])[:NUM_ROWS]
    return [
        {"name": key, "ms": round(total_ns[key] / num_steps / 1e6, 4), "calls": round(calls[key] / num_steps, 1)}
        for key in dearest
    ]


# The trace.


def read(trace: Path) -> list[Event]:
    """The runs of kernels on the GPUs; on a machine without any, of the CPU's operations."""
    data = jax.profiler.ProfileData
    with warnings.catch_warnings():
        # jaxlib makes a class at the first look into an event, which Python 3.12 does not like; as an error it would
        # end the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        planes = list(data.from_file(str(trace)).planes)
        gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        if gpus:
            return [event for plane in gpus for event in _of_gpu(plane)]
        return [event for plane in planes if plane.name == "/host:CPU" for event in _of_cpu(plane)]


def _of_gpu(plane: Any) -> Iterator[Event]:
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in streams or lines:
        for event in line.events:
            yield Event(event.name, _operation(event), event.duration_ns)


def _of_cpu(plane: Any) -> Iterator[Event]:
    for line in plane.lines:
        for event in line.events:
            operation = _operation(event)
            if operation is not None and not _ENCLOSING.fullmatch(operation):
                yield Event(event.name, operation, event.duration_ns)


def _operation(event: Any) -> str | None:
    return next((str(value) for name, value in event.stats if name == "hlo_op"), None)


# The program.


def places(program: str) -> dict[str, Place]:
    """Each operation of a compiled program, by name, as far as its text says where it comes from."""
    functions = _Frames(_tables(program))
    found = {}
    for line in program.splitlines():
        instruction, named = _INSTRUCTION.match(line), _OP_NAME.search(line)
        if instruction is None or named is None:
            continue
        name, result = instruction.groups()
        frame = _FRAME_OF.search(line)
        origin = named[1].split(";")[0]
        found[name] = Place(
            _part(origin),
            functions.of(int(frame[1])) if frame else "",
            origin.rpartition("/")[2],
            re.sub(r"\{[^{}]*\}|/\*.*?\*/| ", "", result),
        )
    return found


def _part(origin: str) -> str:
    """By the transformations that JAX notes in an operation's name."""
    if "rematted_computation" in origin:
        return "forward again"
    if "transpose(" in origin:
        return "backward"
    return "forward" if "jvp(" in origin else "the rest"


def _tables(program: str) -> dict[str, dict[int, str]]:
    """The numbered lines below each of the text's headings."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in program.splitlines():
        if line in _TABLES:
            current = tables.setdefault(line, {})
        elif current is not None and (numbered := re.match(r"(\d+) (.*)", line)):
            current[int(numbered[1])] = numbered[2]
        else:
            current = None
    return tables


class _Frames:
    """Call stacks by the number of their innermost frame."""

    def __init__(self, tables: Mapping[str, Mapping[int, str]]):
        files, names, places, frames = (tables.get(name, {}) for name in _TABLES)
        self._names: dict[int, str | None] = {}  # of a frame; None: not our function
        self._parents: dict[int, int] = {}
        for number, text in frames.items():
            numbers = _fields(text)
            at = _fields(places.get(numbers.get("file_location_id", 0), ""))
            file = files.get(at.get("file_name_id", 0), "")
            is_own = any(folder in file for folder in _OWN_FOLDERS) and "site-packages" not in file
            name = names.get(at.get("function_name_id", 0), "").strip('"')
            self._names[number] = _short(name) if is_own else None
            self._parents[number] = numbers.get("parent_frame_id", 0)
        # XLA prints a parent's number plus one, and none as 1: no frame would otherwise be its own parent.
        if any(number == parent for number, parent in self._parents.items()):
            self._parents = {number: parent - 1 for number, parent in self._parents.items()}

    def of(self, number: int) -> str:
        """The innermost functions of ours, the inner one last."""
        names: list[str] = []
        seen = set()
        while number in self._names and number not in seen:
            seen.add(number)
            name = self._names[number]
            if name and name not in names:
                names.append(name)
            number = self._parents[number]
        return " > ".join(reversed(names[:NUM_FUNCTIONS]))


def _fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


def _short(function: str) -> str:
    """Without what is inside a function, and a class for its call."""
    return function.partition(".<locals>")[0].removesuffix(".__call__")


# For people.


def lines(title: str, profile: Mapping[str, Any]) -> list[str]:
    """Two tables: by kernel, then by place."""
    total, step = profile["kernels_ms"], profile["ms_per_step"]
    made = [
        "",
        f"{title}: kernels take {total:.2f} ms a step, traced; without a trace a step takes {step:.2f} ms",
        *_table("kernel", profile["by_kernel"], total),
    ]
    if not profile["by_place"]:
        return [*made, "the trace does not say which operation a kernel belongs to"]
    share = sum(profile["part_ms"].values()) / total if total else 0.0
    parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in profile["part_ms"].items())
    made += ["", f"the same by place, as far as it is known ({share:.0%}): {parts}"]
    return [*made, *_table("place", profile["by_place"], total)]


def _table(name: str, rows: Sequence[Mapping[str, Any]], total_ms: float) -> list[str]:
    made = [f"{'ms a step':>10} {'share':>6} {'calls':>7}  {name}"]
    for row in rows:
        share = row["ms"] / total_ms if total_ms else 0.0
        made.append(f"{row['ms']:10.3f} {share:6.1%} {row['calls']:7g}  {row['name'][:NAME_CHARACTERS]}")
    return made
