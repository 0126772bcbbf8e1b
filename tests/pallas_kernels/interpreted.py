"""Runs kernels by interpretation on the CPU, and fails where two threads touch memory without an order between them."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import callback as callbacks
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside are interpreted; wait for them inside. Raises where there was a data race."""
    # A warpgroup that waits holds a thread of XLA's, which has as many as there are devices or cores.
    assert len(jax.devices("cpu")) >= 8, "with fewer than eight CPU devices interpretation may hang"
    # Copies fill what lies outside an array with zeros, as the hardware does.
    parameters = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="zero")
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with (
        plgpu.force_gpu_interpret_mode(parameters),
        jax.default_device(jax.devices("cpu")[0]),
        mock.patch.object(callbacks, "io_callback_impl", _call_with_numpy_arrays),
        mock.patch.object(shared_memory, "_to_int", _to_int),
    ):
        yield
    assert not gpu_callbacks.get_races().races_found, "a data race; the interpreter printed where"


def _call_with_numpy_arrays(*args: Any, callback: Any, **_: Any) -> Any:
    """What an instruction of a kernel comes to: a call of Python. JAX puts its arguments on a device before that, which
    takes longer than the call."""
    return [np.asarray(made) for made in callback(*map(np.array, args))]


def _to_int(x: Any, as_of_jax: Any = shared_memory._to_int) -> Any:
    return x.item() if isinstance(x, np.ndarray) else as_of_jax(x)
