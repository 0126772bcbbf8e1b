"""The `implementation=` contract, shared by every kernel of this package.

`None` takes the first implementation, in the caller's order of preference, that works for the arguments at hand. A
named one is used or refused, never replaced: what it cannot take raises NotImplementedError with the reason.
"""

from collections.abc import Callable, Mapping


def choose(kernel: str, implementation: str | None, candidates: Mapping[str, Callable[[], str | None]]) -> str:
    """Returns the name of the implementation to run.

    Args:
      kernel: name for messages.
      implementation: a key of `candidates`, or None for the first usable one.
      candidates: in order of preference; each value returns None where the implementation can take the call's
        arguments, or the reason why it cannot.

    Raises:
      ValueError: `implementation` is not one of `candidates`.
      NotImplementedError: the named implementation (or, for None, every one) cannot take these arguments.
    """
    if implementation is not None:
        if implementation not in candidates:
            raise ValueError(
                f"{kernel}: implementation={implementation!r} is unknown; known are {', '.join(candidates)}"
            )
        reason = candidates[implementation]()
        if reason is not None:
            raise NotImplementedError(f"{kernel}: implementation={implementation!r} cannot run here: {reason}")
        return implementation
    reasons = []
    for name, reason_against in candidates.items():
        reason = reason_against()
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{kernel}: no implementation can run here ({'; '.join(reasons)})")
