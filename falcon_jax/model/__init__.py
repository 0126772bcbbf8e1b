"""The Falcon decoder: Flax modules that declare parameters, and pure functions of arrays that run them.

The KV cache is an argument and a result, never module state. Outside this folder parameters are a plain tree of
arrays (`params.Params`), and nothing imports flax.
"""
