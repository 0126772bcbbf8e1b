"""Falcon models in JAX: load or convert a checkpoint, look at logits, generate text.

The names below are the public ones. Each is imported when it is first asked for, so that `FalconConfig`
alone, or `--help`, does not wait for JAX, Flax and Orbax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falcon_jax.checkpoint import convert as convert
    from falcon_jax.checkpoint import export as export
    from falcon_jax.config import PRESETS as PRESETS
    from falcon_jax.config import FalconConfig as FalconConfig
    from falcon_jax.errors import CheckpointError as CheckpointError
    from falcon_jax.errors import ConfigError as ConfigError
    from falcon_jax.errors import RequestError as RequestError
    from falcon_jax.falcon import Completion as Completion
    from falcon_jax.falcon import Falcon as Falcon
    from falcon_jax.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Falcon": "falcon_jax.falcon",
    "Completion": "falcon_jax.falcon",
    "FalconConfig": "falcon_jax.config",
    "PRESETS": "falcon_jax.config",
    "Tokenizer": "falcon_jax.tokenizer",
    "convert": "falcon_jax.checkpoint",
    "export": "falcon_jax.checkpoint",
    "CheckpointError": "falcon_jax.errors",
    "ConfigError": "falcon_jax.errors",
    "RequestError": "falcon_jax.errors",
}

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'falcon_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
