"""What the benchmarks' commands share: progress, the document kept in a file, and how a command ends.

The document is the last line on stdout; progress, and what of ours failed, go to stderr.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from falcon_jax.errors import RequestError, exit_code

RESULTS = Path(__file__).parent / "results"


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def check_name(name: str | None) -> None:
    """What --save may be. Raises: RequestError."""
    if name is not None and Path(name).name != name:
        raise RequestError(f"--save is {name!r}; it must be a name, without a folder")


def check_known(flag: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises: RequestError where one of those given is not among those known."""
    for value in given:
        if value not in known:
            raise RequestError(f"--{flag} {value} is unknown; known are {', '.join(known)}")


def save(document: dict[str, Any], name: str | None) -> None:
    """Writes `document` to benchmarks/results/NAME.json, or nowhere."""
    if name is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def parse_variant(words: str) -> dict[str, Any]:
    """Settings from what --variants has, "batch_size=32,remat=block"; dashes will do in names.

    Raises:
      RequestError: a part that is not name=value.
    """
    found = {}
    for part in words.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or not name:
            raise RequestError(f"--variants {words}: {part!r} is not name=value, as in stages=2,groups=1")
        found[name.replace("-", "_")] = _value(value)
    return found


def _value(text: str) -> Any:
    """A number or a truth value as JSON has it, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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
