"""Cases that a change to what they are about should run, and every run need not: `pytest --thorough` has them too.

Each is one more shape, form or variant of a fact that the cases beside it show as well.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrization, for `--thorough` alone. A tuple is one case of several arguments."""
    return [_only_thorough(case) for case in cases]


def thorough_but(cases: Iterable[Any], *names: str) -> list[Any]:
    """All cases, those of other names for `--thorough` alone.

    Raises:
      ValueError: a name that no case has.
    """
    cases = list(cases)
    unknown = set(names) - {str(case) for case in cases}
    if unknown:
        raise ValueError(f"no case is called {', '.join(sorted(unknown))}")
    return [case if str(case) in names else _only_thorough(case) for case in cases]


def _only_thorough(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.thorough)
