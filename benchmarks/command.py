"""How a benchmark's command ends: its document as the last line on stdout, an exit code, errors in one line."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from falcon_jax.errors import USER_ERRORS, one_line


def finish(measure: Callable[[], dict[str, Any]], failures: Callable[[dict[str, Any]], list[str]]) -> int:
    """Runs `measure`, prints what it returns, and says what `failures` finds in it.

    Returns:
      The exit code: 0 done, 1 something of ours failed, 2 not to be done, 130 interrupted, 141 nobody reads on.
    """
    try:
        document = measure()
        print(json.dumps(document), flush=True)
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
    found = failures(document)
    for failure in found:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if found else 0
