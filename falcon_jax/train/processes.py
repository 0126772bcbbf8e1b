"""Several processes of one run: which of them writes, and what all have to agree on.

All run the same program on their own devices, and each collective has to be reached by all in the same order. So what a
process alone decides (a signal, its clock) becomes an action only once all know of it. With one process nothing here
talks to anybody.
"""

import collections
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from falcon_jax.errors import ConfigError
from falcon_jax.model.params import Params

MAX_WAIT_MS = 7 * 24 * 3600 * 1000  # for process 0; where it is lost the service is, and the wait ends at once
DONE = "done"
_turns = itertools.count()  # of main_first, alike in all processes


def is_main() -> bool:
    """Whether this process writes what is written once: metrics, pictures, the final model, a progress bar."""
    return jax.process_index() == 0


def main_first[T](work: Callable[[], T]) -> T:
    """Runs `work` in process 0, and when it is done there in the others: files that are made once and read by all.

    However long that takes: the others wait for a word through the service that JAX's processes found each other by,
    and not in a collective, which gives up after a time (gloo's after 30 s).

    Raises: in process 0 what `work` raises; in the others then ConfigError, so that none waits for it.
    """
    if jax.process_count() == 1:
        return work()
    service: Any = distributed.global_state.client
    key = f"falcon_jax/main_first/{next(_turns)}"
    if not is_main():
        if service.blocking_key_value_get(key, MAX_WAIT_MS) != DONE:
            raise ConfigError("process 0 could not begin the run; its message says why")
        return work()
    try:
        result = work()
    except BaseException:
        service.key_value_set(key, "failed")
        raise
    service.key_value_set(key, DONE)
    return result


def as_main(values: Sequence[float]) -> list[float]:
    """Process 0's numbers, in all of them; in float32 where there are several."""
    if jax.process_count() == 1:
        return list(values)
    return [float(value) for value in multihost_utils.broadcast_one_to_all(np.asarray(values, np.float32))]


def everywhere(function: Callable[..., jax.Array], mesh: Mesh | None) -> Callable[..., jax.Array]:
    """`function` with a result that each process can read."""
    if jax.process_count() == 1 or mesh is None:
        return function
    spread = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda *arguments: spread(function(*arguments))


def on_main(params: Params, dtype: Any) -> Params:
    """Weights in `dtype` in process 0's own memory, one array after the other; other processes get nothing of use."""

    def fetched(leaf: jax.Array) -> np.ndarray | None:
        rounded = leaf.astype(dtype)
        if jax.process_count() == 1:
            return np.asarray(rounded)
        whole = multihost_utils.process_allgather(rounded, tiled=True)
        return np.asarray(whole) if is_main() else None

    return jax.tree.map(fetched, params)


def wait_for_all(what: str) -> None:
    """Returns when every process has come here. A process that ends earlier takes the others' collectives along."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Agreement:
    """What any process wants, known to all at the same step.

    Each step every process says what it wants, and what any wanted `lag` steps before comes back. So nobody waits for
    the step that is running: the answer is a small reduction that was put on the devices behind an earlier one. lag: 0
    with one process.
    """

    def __init__(self) -> None:
        self.lag = 0 if jax.process_count() == 1 else 2
        self._asked: collections.deque[jax.Array] = collections.deque()
        self._mesh = Mesh(np.asarray(jax.devices()), ("all",))
        nowhere = NamedSharding(self._mesh, PartitionSpec())
        self._any = jax.jit(lambda wants: wants.any(axis=0), out_shardings=nowhere)

    def ask(self, *wants: bool) -> tuple[bool, ...]:
        """Call with as many arguments each time, once a step in every process."""
        if self.lag == 0:
            return wants
        mine = np.asarray([wants])
        by_device = NamedSharding(self._mesh, PartitionSpec("all"))
        shape = (self._mesh.size, len(wants))
        self._asked.append(self._any(jax.make_array_from_callback(shape, by_device, lambda _: mine)))
        if len(self._asked) <= self.lag:
            return (False,) * len(wants)
        return tuple(bool(want) for want in np.asarray(self._asked.popleft()))


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Turns the first SIGTERM or SIGINT into an event; a second one acts as it did before."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread may handle signals
        return
    former = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: object) -> None:
        stopping.set()
        signal.signal(number, former[number])

    for number in former:
        signal.signal(number, stop)
    try:
        yield stopping
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
