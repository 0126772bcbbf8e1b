"""Kernels for transformer decoders on GPUs, and the plain versions that they must equal.

Knows arrays and shapes, never a model's configuration. A folder a kernel: `api.py` is what callers use,
`reference.py` the slow right version, further files the fast ones; `dispatch.py` holds the contract by which
`implementation=` picks among them.
"""
