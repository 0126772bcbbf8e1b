"""Contestants on one case of a kernel: compiled side by side, checked, then timed in turns.

Owns how a figure comes about; what contestants compute stands in kernel_prefill.py, kernel_decode.py and
kernel_torch.py. A contestant that fails is an entry with a reason, and so is one of ours whose answer is wrong: its
time is never taken. The trap: JAX returns before the GPU has begun, so a time is that of many calls in a row.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

# A turn lasts about this long, so that telling the GPU of the first call (0.1 ms) does not count.
TURN_S = 0.03
MAX_CALLS = 100
# The rule for kernels: so many times the error of the plain version in the same dtype, and a little.
ALLOWED_ERROR = 2.0
ALLOWED_ABSOLUTE = 1e-5


class Runner(Protocol):
    """A contestant ready to run, its inputs on the device."""

    def seconds(self, num_calls: int) -> float:
        """Of one call, the mean of `num_calls` in a row."""
        ...


@dataclasses.dataclass(frozen=True)
class Program:
    """A contestant in JAX: `function(*arguments)`, which returns a tuple of arrays, compiled as a whole.

    ours: a wrong answer is refused; a peer's is said.
    num_checked: how many of the results, from the first, must equal the exact ones; 0 where it computes something else.
    reason: why it cannot run here, or None.
    compiler_options: of XLA.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    arguments: tuple[Any, ...]
    ours: bool = False
    num_checked: int = 0
    reason: str | None = None
    compiler_options: dict[str, Any] | None = None


@dataclasses.dataclass
class Entry:
    """What became of a contestant: its times, or a reason why there are none.

    failed: it should have run; False where it cannot run here at all.
    error: the largest error of its results over what is allowed; None where nothing was compared.
    """

    name: str
    ours: bool = False
    reason: str | None = None
    failed: bool = False
    error: float | None = None
    runner: Runner | None = None
    times_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        return statistics.median(self.times_s) if self.times_s else None

    def fail(self, reason: str) -> None:
        self.reason = " ".join(reason.split())[:300]
        self.failed, self.runner = True, None
        self.times_s.clear()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """An exception inside becomes the reason: one contestant never stops the others."""
        try:
            yield
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled JAX program and its arguments."""

    program: Callable[..., tuple[jax.Array, ...]]
    arguments: tuple[Any, ...]

    def __call__(self) -> tuple[jax.Array, ...]:
        return self.program(*self.arguments)

    def seconds(self, num_calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(num_calls - 1):
            self()
        jax.block_until_ready(self())  # one stream: the last to begin is the last to end
        return (time.perf_counter() - begin) / num_calls


class Group(NamedTuple):
    """Programs that compute one function.

    exact: the function in float32; its results are what the others are compared with.
    plain: name of the program whose error is the measure: the plain version in the case's dtype.
    """

    programs: Sequence[Program]
    exact: Program
    plain: str


def prepare(*groups: Group) -> list[Entry]:
    """Compiles all, runs each once and compares within its group."""
    entries = [[Entry(program.name, program.ours, program.reason) for program in group.programs] for group in groups]
    references = [Entry(group.exact.name) for group in groups]
    _compile(
        [program for group in groups for program in (*group.programs, group.exact)],
        [entry for found, reference in zip(entries, references) for entry in (*found, reference)],
    )
    for group, found, reference in zip(groups, entries, references):
        _compare(group, found, reference)
    return [entry for found in entries for entry in found]


def _compare(group: Group, entries: Sequence[Entry], reference: Entry) -> None:
    allowed: list[float] = []
    expected: tuple[jax.Array, ...] = ()
    with reference.failing():
        expected = _run(reference)
        made = _run(next(entry for entry in entries if entry.name == group.plain))
        allowed = [ALLOWED_ERROR * float(_distance(*pair)) + ALLOWED_ABSOLUTE for pair in zip(made, expected)]
    for program, entry in zip(group.programs, entries):
        if entry.runner is not None:
            with entry.failing():
                if reference.failed:
                    raise RuntimeError(f"nothing to compare it with ({reference.reason})")
                _check(program, entry, expected, allowed)


def _compile(programs: Sequence[Program], entries: Sequence[Entry]) -> None:
    """Traces one after the other and compiles side by side, since a compilation keeps one core busy."""
    compiling = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        for program, entry in zip(programs, entries):
            if program.reason is None:
                with entry.failing():
                    lowered = jax.jit(program.function).lower(*program.arguments)
                    compiling.append((pool.submit(lowered.compile, program.compiler_options), program, entry))
        for future, program, entry in compiling:
            with entry.failing():
                entry.runner = Compiled(future.result(), program.arguments)


def _run(entry: Entry) -> tuple[jax.Array, ...]:
    if not isinstance(entry.runner, Compiled):
        raise RuntimeError(f"{entry.name}: {entry.reason}")
    return jax.block_until_ready(entry.runner())


def _check(program: Program, entry: Entry, expected: Sequence[jax.Array], allowed: Sequence[float]) -> None:
    made = _run(entry)
    if not all(bool(_finite(x)) for x in made):
        return entry.fail("wrong: it gives numbers that are not finite")
    if program.num_checked:
        compared = zip(made[: program.num_checked], expected, allowed)
        entry.error = max(float(_distance(x, right)) / limit for x, right, limit in compared)
    if program.ours and entry.error is not None and not entry.error <= 1:
        entry.fail(f"wrong: its error is {entry.error:.2f} of what is allowed")


@jax.jit
def _distance(x: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x.astype(jnp.float32) - expected.astype(jnp.float32)))


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def take_turns(entries: Sequence[Entry], num_turns: int) -> None:
    """Times those that can run, turn by turn, so that a slow phase of the machine falls on all of them.

    Who follows whom changes from turn to turn, so that nobody always meets a chip that the same one has heated. The
    runners are dropped at the end, and their memory with them.
    """
    calls: dict[str, int] = {}
    for entry in _ready(entries):
        with entry.failing():
            assert entry.runner is not None
            calls[entry.name] = min(MAX_CALLS, max(2, math.ceil(TURN_S / entry.runner.seconds(2))))
    for turn in range(num_turns):
        ready = _ready(entries)
        first = turn % max(1, len(ready))
        for entry in ready[first:] + ready[:first]:
            with entry.failing():
                assert entry.runner is not None
                entry.times_s.append(entry.runner.seconds(calls[entry.name]))
    for entry in entries:
        entry.runner = None


def _ready(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.runner is not None]
