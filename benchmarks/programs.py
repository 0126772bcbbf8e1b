"""Counts the programs that JAX compiles, and those that it reads from the compilation cache instead."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class Programs:
    """compiled: by XLA, here and now. from_cache: read from the folder of an earlier run, in a fraction of the time."""

    compiled: int = 0
    from_cache: int = 0


@contextlib.contextmanager
def count_programs() -> Iterator[Programs]:
    """Counts while the body runs; what this process has in memory already is neither."""
    programs = Programs()

    def count_all(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":  # of a program from the cache too
            programs.compiled += 1

    def count_read(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            programs.from_cache += 1
            programs.compiled -= 1

    jax.monitoring.register_event_duration_secs_listener(count_all)
    jax.monitoring.register_event_listener(count_read)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(count_all)
        jax.monitoring.unregister_event_listener(count_read)
