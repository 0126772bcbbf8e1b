"""Reads a compiled program (scheduled HLO text, of one device): what it exchanges, what it computes, what is large.

Knows nothing of models or time. Everything is counted as often as it runs: the body of a loop by the trip count that
XLA states; a loop without one counts once, and says so. The traps: operands are printed without types, so each is
looked up; and the groups of a collective come in three notations, all in logical device numbers, which are places in
the mesh and not the topology's ids.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

import numpy as np

from falcon_jax.train.planning.devices import GPUS_PER_MACHINE

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|condition|body|calls|\w+_computations?)=\{?(%[\w.-]+(?:, %[\w.-]+)*)")
# What moves no data of its own.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "call",
    "conditional",
    "optimization-barrier",
    "async-start",
    "async-update",
}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where logical devices lie: `axes` (name, size) of the mesh they number in row-major order, and their ids in the
    topology, of which each machine has GPUS_PER_MACHINE in a row."""

    axes: tuple[tuple[str, int], ...]
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of exchange, with all that are like it.

    axes: of the mesh, along which the members of a group differ. size: members of a group.
    members_a_machine: the fewest of a group that share a machine with one of it; `size` where all do.
    synchronous: nothing else can run meanwhile.
    count: times a step. sent_bytes: by each device in all of them together, by a ring's arithmetic.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    members_a_machine: int
    synchronous: bool
    count: int
    sent_bytes: float

    @property
    def within_machine(self) -> bool:
        return self.members_a_machine == self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Instructions that are alike. kind: "product", "attention" or "memory". flops, bytes: of one of them."""

    kind: str
    flops: float
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """largest: (bytes, type, place in the source) of the largest values that are neither arguments nor results.
    num_unknown_loops: whose trip counts XLA does not state."""

    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]
    largest: tuple[tuple[int, str, str], ...]
    num_unknown_loops: int

    @property
    def flops(self) -> float:
        """Of products and attention, all that run."""
        return sum((work.flops * work.count for work in self.work), 0.0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in reversed(self.values()) if instruction.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    def operand_types(self, instruction: Instruction) -> list[str]:
        return [self[name].type for name in instruction.operands]


def read(text: str, places: Places, length: int, num_largest: int = 5) -> Program:
    """A program of rows of `length` tokens, which attention kernels are counted by."""
    computations, entry = _computations(text)
    collectives: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    work: collections.Counter[tuple] = collections.Counter()
    values: dict[tuple[str, str], int] = {}
    unknown = 0
    groups = functools.lru_cache(maxsize=None)(lambda notation: _groups_of(notation, places))
    for computation, instruction, times, is_async in _walk(computations, entry):
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            payload = sum(map(num_bytes, computation.operand_types(instruction)))
            axes, size, together = groups(_notation(instruction, places))
            if size > 1:
                synchronous = not (is_async or opcode.endswith("-start"))
                entries = collectives[kind, axes, size, together, synchronous]
                entries[0] += times
                entries[1] += times * sent_bytes(kind, size, payload)
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            found, flops = _flops(computations, computation, instruction, length)
            work[found, flops, _moved_bytes(computations, computation, instruction)] += times
        if opcode == "while":
            unknown += _trip_count(instruction) is None
        elif opcode not in _FREE and not opcode.endswith(("-start", "-done", "-update")):
            place = re.search(r'op_name="([^"]*)"', instruction.attributes)
            for array in _ARRAY.finditer(instruction.type):
                values[array[0], place[1] if place else instruction.name] = num_bytes(array[0])
    largest = sorted(((size, *key) for key, size in values.items()), reverse=True)
    return Program(
        collectives=tuple(
            Collective(
                kind=kind,
                axes=axes,
                size=size,
                members_a_machine=together,
                synchronous=synchronous,
                count=int(count),
                sent_bytes=sent,
            )
            for (kind, axes, size, together, synchronous), (count, sent) in sorted(collectives.items())
        ),
        work=tuple(
            Work(kind=kind, flops=flops, bytes=moved, count=count) for (kind, flops, moved), count in work.items()
        ),
        largest=tuple(largest[:num_largest]),
        num_unknown_loops=unknown,
    )


def sent_bytes(kind: str, size: int, payload: int) -> float:
    """What each member of a group sends in one collective over `payload` bytes of operands, around a ring."""
    others = (size - 1) / size
    factor = {
        "all-reduce": 2 * others,
        "all-gather": size - 1,  # the operand is one member's share
        "reduce-scatter": others,
        "all-to-all": others,
        "ragged-all-to-all": others,
    }
    return float(factor.get(kind, 1) * payload)


@functools.lru_cache(maxsize=65536)
def num_bytes(type: str) -> int:
    """Of an array's or a tuple's type, as in "(bf16[8,64]{1,0}, s32[])"."""
    return sum(math.prod(dimensions) * _bits(name) // 8 for name, dimensions in _arrays(type))


def _arrays(type: str) -> list[tuple[str, list[int]]]:
    return [(name, [int(size) for size in sizes.split(",") if size]) for name, sizes in _ARRAY.findall(type)]


def _bits(name: str) -> int:
    if name in _BITS:
        return _BITS[name]
    match = re.match(r"[a-z]+(\d+)", name)  # s32, f32, f8e4m3fn, ...
    if match is None:
        raise ValueError(f"an array of unknown type {name!r} in the compiled program")
    return int(match[1])


# The text.


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    current, entry = Computation(), ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if match := _COMPUTATION.match(line):
                current = computations[match[2]] = Computation()
                entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, type, opcode, rest = match.groups()
            operands, attributes = _split_operands(rest)
            current[name] = Instruction(name, type, opcode, operands, attributes, bool(root))
    return computations, entry


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """Names of the operands, and what follows the parenthesis that closes them."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return tuple(re.findall(r"%([\w.-]+)", rest[: match.start()])), rest[match.end() :]
    return (), rest


def _walk(
    computations: dict[str, Computation], name: str, times: int = 1, is_async: bool = False
) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    """Each instruction that runs by itself, how often, and whether inside an asynchronous call."""
    computation = computations[name]
    for instruction in computation.values():
        yield computation, instruction, times, is_async
        if instruction.opcode not in ("while", "call", "conditional", "async-start"):
            continue
        trips = (_trip_count(instruction) or 1) if instruction.opcode == "while" else 1
        for called in _called(instruction):
            yield from _walk(computations, called, times * trips, is_async or instruction.opcode == "async-start")


def _called(instruction: Instruction) -> list[str]:
    return [name.removeprefix("%") for names in _CALLED.findall(instruction.attributes) for name in names.split(", ")]


def _trip_count(loop: Instruction) -> int | None:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    return int(match[1]) if match else None


# Groups of a collective.


def _notation(collective: Instruction, places: Places) -> str:
    if match := re.search(r"source_target_pairs=(\{\{.*?\}\}|\{\})", collective.attributes):
        return f"pairs {match[1]}"
    match = re.search(r"replica_groups=(.*?)(?=, [a-z_]+=|$)", collective.attributes)
    if match is None or match[1] in ("{}", "{{}}"):
        return f"[1,{len(places.ids)}]<=[{len(places.ids)}]"
    return match[1]


def _groups_of(notation: str, places: Places) -> tuple[tuple[str, ...], int, int]:
    """Axes along which members differ, members a group, and the fewest that share a machine with one of them."""
    groups = groups_of(notation)
    groups = groups[: max(1, 65536 // groups.shape[1])]  # they are alike
    sizes = [size for _, size in places.axes]
    coordinates = np.unravel_index(groups, sizes)
    axes = tuple(
        name for (name, _), along in zip(places.axes, coordinates, strict=True) if (along != along[:, :1]).any()
    )
    machines = np.asarray(places.ids)[groups] // GPUS_PER_MACHINE
    together = min(int(np.unique(row, return_counts=True)[1].min()) for row in machines)
    return axes, groups.shape[1], together


def groups_of(notation: str) -> np.ndarray:
    """[groups, members] of logical devices.

    Args:
      notation: {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0); mesh['a'=2,'b'=2] {'b'}, where 'b':(2)4 is a part of an
        axis (behind the first factor 2, the next of 4); or "pairs {{0,1},{1,0}}" of senders and receivers.
    """
    if notation.startswith(("{{", "pairs {{")):
        return np.asarray(json.loads(notation.removeprefix("pairs ").replace("{", "[").replace("}", "]")))
    numbers = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?").match(notation)
    if numbers is not None:
        shape, reshaped, order = ([int(n) for n in part.split(",")] if part else [] for part in numbers.groups())
        devices = np.arange(math.prod(reshaped)).reshape(reshaped)
        return devices.transpose(order or range(len(reshaped))).reshape(shape)
    named = re.match(r"@?mesh\[(.*?)\](?:, device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)?\s*\{(.*?)\}", notation)
    if named is None or named[2]:
        raise ValueError(f"groups of a collective in an unknown notation: {notation[:100]!r}")
    return _groups_over_axes(named[1], named[4])


def _groups_over_axes(mesh: str, axes: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    # Axis -> its (factors before, part) that the group runs over; the whole of it where nothing is said.
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    }
    split, over = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        for factor, is_over in ((before, False), (part, True), (size // (before * part), False)):
            split.append(factor)
            over.append(is_over)
    devices = np.arange(math.prod(sizes.values())).reshape(split)
    order = sorted(range(len(split)), key=lambda i: over[i])  # stable: those of a group last
    members = math.prod(size for size, is_over in zip(split, over, strict=True) if is_over)
    return devices.transpose(order).reshape(-1, members)


# What an instruction costs.


def _flops(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction, length: int
) -> tuple[str, float]:
    """("product", "attention" or "memory", FLOPs)."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    if target and re.match(r"__cudnn\$fmha|mosaic_gpu", target[1]):
        return "attention", _attention_flops(computation, instruction, length)
    found = _product_flops(computations, computation, instruction)
    return ("product" if found else "memory"), found


def _product_flops(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode in ("fusion", "fusion-start"):
        inner = computations[_called(instruction)[0]]
        return sum((_product_flops(computations, inner, each) for each in inner.values()), 0.0)
    contracted = re.search(
        r'lhs_contracting_dim(?:s=\{([\d,]*)\}|ensions":\[([\d,"]*)\])'
        if instruction.opcode != "dot"
        else r"lhs_contracting_dims=\{([\d,]*)\}()",
        instruction.attributes,
    )
    if contracted is None or instruction.opcode not in ("dot", "custom-call"):
        return 0.0
    left = _arrays(computation.operand_types(instruction)[0])[0][1]
    contracted_sizes = [left[int(i)] for i in re.findall(r"\d+", contracted[1] or contracted[2] or "")]
    return 2.0 * math.prod(_arrays(instruction.type)[0][1]) * math.prod(contracted_sizes)


def _attention_flops(computation: Computation, kernel: Instruction, length: int) -> float:
    """Of causal attention over whole rows: 2 products forward, 5 backward, over half of the pairs."""
    fours = [found for type in computation.operand_types(kernel) for found in _arrays(type) if len(found[1]) == 4]
    if not fours or length not in fours[0][1]:
        raise ValueError(f"a kernel that is not attention over {length} tokens: {kernel.type}")
    products = 2 if len(fours) <= 3 else 5  # q, k, v; or also the result's gradient
    return products * 2 * math.prod(fours[0][1]) * length / 2


def _moved_bytes(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> int:
    """Read and written, in memory. A slice counts as what it takes, an update in place as what it puts."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "fusion":
        inner = computations[_called(instruction)[0]]
        parameters = [each for each in inner.values() if each.opcode == "parameter"]
        return sum(_read_bytes(inner, each) for each in parameters) + _written_bytes(inner, inner.root)
    types = computation.operand_types(instruction)
    if opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * num_bytes(instruction.type)
    if opcode == "dynamic-update-slice":
        return 2 * num_bytes(types[1])
    return sum(map(num_bytes, types)) + num_bytes(instruction.type)


def _read_bytes(inner: Computation, value: Instruction) -> int:
    total = 0
    for user in inner.users[value.name]:
        if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == value.name:
            total += num_bytes(user.type)
        elif user.opcode in ("bitcast", "reshape"):
            total += _read_bytes(inner, user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        else:
            return num_bytes(value.type)
    return min(total, num_bytes(value.type))


def _written_bytes(inner: Computation, value: Instruction) -> int:
    if value.opcode == "tuple":
        return sum(_written_bytes(inner, inner[name]) for name in value.operands)
    if value.opcode in ("bitcast", "reshape", "copy"):
        return _written_bytes(inner, inner[value.operands[0]])
    if value.opcode == "dynamic-update-slice":
        return num_bytes(inner[value.operands[1]].type)
    return num_bytes(value.type)
