"""How far a kernel may be off: the rule that all of them are held to (CONTRIBUTING.md)."""

from typing import Any

import jax.numpy as jnp


def allowed(error_of_plain: Any) -> Any:
    """The largest error allowed, by that of the plain version in the kernel's dtype."""
    return 2 * error_of_plain + 1e-5


def error(made: Any, exact: Any) -> Any:
    """The largest error, in float32; NaN where one is NaN."""
    return jnp.max(jnp.abs(made.astype(jnp.float32) - exact))


def require_close(made: Any, plain: Any, exact: Any) -> None:
    """Asserts the rule for what a kernel made, given the plain version in its dtype and in float32."""
    found, most = float(error(made, exact)), float(allowed(error(plain, exact)))
    assert found <= most, f"{found} > {most}"
