"""What the kernels must know of the device they will run on, and of the mode they are traced in.

Decided while tracing, by the device that a jitted call would use: the mesh's, or else the default one. The trap: that
is not always a GPU on a machine that has one (`jax.default_device`, a mesh of CPU devices).
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import config as jax_config
from jax.sharding import Mesh

# Hopper's own instructions (wgmma, setmaxnreg) exist on this compute capability alone, not on newer ones.
HOPPER = "9.0"
NUM_SMS = 132  # of an H100 SXM or an H200
MAX_SMEM_BYTES = 227 * 1024  # that one block may use

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed compute capability", default=None)


@contextlib.contextmanager
def assume_capability(capability: str) -> Iterator[None]:
    """Traces inside as if for a GPU of that compute capability ("9.0"): to compile for one that is not here."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


def interpreting() -> bool:
    """Whether Pallas kernels traced now will be interpreted on the CPU (`plgpu.force_gpu_interpret_mode`)."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def device(mesh: Mesh | None = None) -> Any:
    """The device (a jax.Device), or one like it, on which a call traced now will run."""
    if mesh is not None:
        return mesh.devices.flat[0]
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default if default is not None else jax.local_devices()[0]


def capability(mesh: Mesh | None = None) -> str | None:
    """Compute capability of the GPU that a call traced now will run on, as "9.0"; None where that is no GPU."""
    if (assumed := _assumed.get()) is not None:
        return assumed
    target = device(mesh)
    return getattr(target, "compute_capability", None) if target.platform == "gpu" else None


def mosaic_reason(mesh: Mesh | None = None) -> str | None:
    """Why a kernel for Hopper cannot run here, or None where it can (also: by interpretation)."""
    if interpreting():
        return None
    found = capability(mesh)
    if found is None:
        return f"it needs a Hopper GPU, and this would run on {device(mesh).platform!r}"
    if found != HOPPER:
        return f"it needs a GPU of compute capability {HOPPER} (Hopper), and this one's is {found}"
    return None


def num_sms(mesh: Mesh | None = None) -> int:
    """Streaming multiprocessors of the device: how many blocks run at once, where each takes one to itself."""
    if interpreting():
        return 2  # enough to have blocks side by side
    if _assumed.get() is not None:
        return NUM_SMS
    return device(mesh).core_count


def sms_of_a_kernel(at_most: int | None) -> int:
    """How many multiprocessors a kernel has, of which it may have so many, or all (None).

    Raises:
      ValueError: it may have none.
    """
    if at_most is not None and at_most < 1:
        raise ValueError(f"num_sms is {at_most}; a kernel needs at least one multiprocessor")
    return num_sms() if at_most is None else min(at_most, num_sms())
