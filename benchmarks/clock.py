"""What is left of a run's time."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """What is left of a run's time, by what was done in it."""

    def __init__(self, begin: float, max_seconds: float | None):
        self.begin, self.max_seconds = begin, max_seconds
        self.slowest_s: dict[str, float] = {}

    def is_late(self, name: str) -> bool:
        """Whether one more, as slow as the slowest of its name or else of all, would end too late."""
        if self.max_seconds is None:
            return False
        expected_s = self.slowest_s.get(name, max(self.slowest_s.values(), default=0.0))
        return time.perf_counter() - self.begin + expected_s > self.max_seconds

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.slowest_s[name] = max(self.slowest_s.get(name, 0.0), time.perf_counter() - began)
