"""Runs kernels by interpretation on the CPU, and fails where two threads touch memory without an order between them."""

import contextlib
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside are interpreted; wait for them inside. Raises where there was a data race."""
    # A warpgroup that waits holds a thread of XLA's, which has as many as there are devices or cores.
    assert len(jax.devices("cpu")) >= 8, "with fewer than eight CPU devices interpretation may hang"
    # Copies fill what lies outside an array with zeros, as the hardware does.
    parameters = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="zero")
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with plgpu.force_gpu_interpret_mode(parameters), jax.default_device(jax.devices("cpu")[0]):
        yield
    assert not gpu_callbacks.get_races().races_found, "a data race; the interpreter printed where"
