"""Attention of one query token a row against a cache of keys and values, contiguous or in pages."""

from pallas_kernels.decode_attention.api import decode_attention, decode_attention_in_chain

__all__ = ["decode_attention", "decode_attention_in_chain"]
