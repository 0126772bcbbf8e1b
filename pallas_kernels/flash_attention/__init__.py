"""Causal attention with shared key/value heads and ALiBi computed from positions, never from a bias tensor."""

from pallas_kernels.flash_attention.api import attention

__all__ = ["attention"]
