"""How a benchmark's command ends: its document as the last line on stdout, and what of ours failed on stderr."""

import json
import sys
from collections.abc import Callable
from typing import Any

from falcon_jax.errors import exit_code


def finish(measure: Callable[[], dict[str, Any]], failures: Callable[[dict[str, Any]], list[str]]) -> int:
    """Runs `measure`, prints what it returns, and says what `failures` finds in it.

    Returns:
      The exit code: 1 if something of ours failed, else as of every command.
    """

    def work() -> int:
        document = measure()
        print(json.dumps(document), flush=True)
        found = failures(document)
        for failure in found:
            print(f"error: {failure}", file=sys.stderr)
        return 1 if found else 0

    return exit_code(work)
