"""Counts what XLA compiles: a Python value that slips into a jitted function shows up here."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by one with every program that XLA compiles, down to the smallest."""
    compiled: list[str] = []

    def count(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
