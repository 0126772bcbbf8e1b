"""The errors a user can cause, each a ValueError whose one line says what was wrong and what would be right."""

import contextlib
import os
import sys
from collections.abc import Callable


def one_line(error: BaseException) -> str:
    """An error's message on one line, as the commands print it."""
    return " ".join(str(error).split())


class ConfigError(ValueError):
    """A model configuration that contradicts itself, lacks a key or names something unknown."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file and the tensor, and what was expected there."""


class RequestError(ValueError):
    """A generation request that cannot be served: an empty prompt, a sampling value out of range, too many tokens."""


# What a command answers with one line and exit code 2; any other error is ours, and keeps its traceback.
USER_ERRORS = (CheckpointError, ConfigError, RequestError)


def exit_code(work: Callable[[], int | None]) -> int:
    """Runs what a command does, and turns how it ends into the command's exit code.

    Returns:
      What `work` returns, 0 for None; 2 after a user's error, told in one line on stderr; 130 where it was interrupted,
      141 where nobody reads on.
    """
    try:
        code = work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, into a pipe that is gone.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return code or 0
