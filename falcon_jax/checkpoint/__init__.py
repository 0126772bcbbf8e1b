"""Checkpoints: Hugging Face folders in and out, one tensor at a time, and the project's own checked orbax folders."""

from falcon_jax.checkpoint.convert import convert
from falcon_jax.checkpoint.export import export
from falcon_jax.checkpoint.load import LoadedCheckpoint, load, read_config
from falcon_jax.errors import CheckpointError

__all__ = ["convert", "export", "load", "read_config", "LoadedCheckpoint", "CheckpointError"]
