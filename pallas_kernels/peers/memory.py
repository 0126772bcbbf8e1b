"""Memory of each GPU that the others of its machine write into, by address.

XLA's own sum over devices stands between two launches, belongs to no CUDA graph, and the GPU waits for its host at
each. Here a kernel writes its part of a tile of 64 columns into every device's mailbox, and reads those of all in its
own (exchange.py).

A mailbox is plain memory to XLA, which neither sees who writes there nor may move it: it is made once, waited for, and
kept by whoever made it (`Mailboxes`). Programs get addresses (`Addresses`). Each word says which launch it belongs to,
so nothing is ever set back:

    [eighth][tile]                               how often these 8 rows of a tile have been exchanged: int32
    [launch % 2][device][row][column] as words   what that device made, beside the launch's number (words.py)

A launch that exchanges all rows of a tile at once counts in the first eighth alone. Two halves are enough: a device
begins launch n + 2, which writes where launch n did, when it has what all made in n + 1, and nobody sends that before
its own launch n has ended, in which it read what lay there.

The trap: a program that is compiled for several devices must run on all of them, and all its launches in the same
order, which jitted programs of one host thread do.
"""

import ctypes
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS as TILE
from pallas_kernels.quantized_matmul.product import ROWS_AT_ONCE
from pallas_kernels.sharded import HEAD_AXIS
from pallas_kernels.words import WORD_BYTES

# Tiles past the last one, which blocks ask after and have none of.
MOST_PAST_END = 1024
# Ways in which JAX gets a GPU's memory that the others may write into, once the driver has been told so.
ALLOCATORS = ("default", "bfc", "platform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the mailboxes are of all devices of a mesh's tensor axis.

    table: of each device a row: its own place on the axis, 0, and the low and high half of each mailbox's address. It
      lies over the axis.
    num_rows, width: what a mailbox has room for; static.
    """

    table: Int[jax.Array, "n E"]
    num_rows: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> int:
        return self.table.shape[0]


class Mailboxes:
    """The memory itself, zeros at first. It must live as long as a program that was given `addresses` may run.

    Args:
      num_rows, width: the most that is exchanged; rounded up to multiples of 8 and 64.

    Attributes:
      addresses: what programs are given.

    Raises:
      NotImplementedError: these devices cannot write each other's memory.
    """

    def __init__(self, mesh: Mesh, num_rows: int, width: int):
        if (reason := reason_against(mesh)) is not None:
            raise NotImplementedError(f"mailboxes: {reason}")
        num_rows, width = num_rows + -num_rows % ROWS_AT_ONCE, width + -width % TILE
        over_axis = NamedSharding(mesh, PartitionSpec(HEAD_AXIS))
        num_ints = num_bytes(mesh.size, num_rows, width) // 4
        zeros = jax.jit(lambda: jnp.zeros((mesh.size, num_ints), jnp.int32), out_shardings=over_axis)
        # Before all are zero nobody may write into any.
        self._memory = jax.block_until_ready(zeros())
        by_device = {shard.device: shard.data.unsafe_buffer_pointer() for shard in self._memory.addressable_shards}
        rows = table_of([by_device[device] for device in mesh.devices.flat])
        self.addresses = Addresses(jax.device_put(rows, over_axis), num_rows, width)


def words_begin(num_rows: int, width: int) -> int:
    """Of a mailbox, the first byte after its counts."""
    counts = num_rows // ROWS_AT_ONCE * (width // TILE) + MOST_PAST_END
    return 4 * (counts + -counts % 4)


def num_bytes(count: int, num_rows: int, width: int) -> int:
    """Of a mailbox, for so many devices."""
    return words_begin(num_rows, width) + 2 * count * num_rows * width * WORD_BYTES


def table_of(addresses: list[int]) -> np.ndarray:
    """`Addresses.table`."""
    halves = np.asarray(addresses, np.uint64).view(np.uint32).view(np.int32)  # the low half first
    return np.stack([np.concatenate([np.asarray([i, 0], np.int32), halves]) for i in range(len(addresses))])


def reason_against(mesh: Mesh) -> str | None:
    """Why the devices of a mesh have no mailboxes, or None where they can have some."""
    if mesh.shape.get(HEAD_AXIS, 1) != mesh.size or mesh.size < 2:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
        return f"they take a mesh of several devices of the axis {HEAD_AXIS!r} alone, not {sizes}"
    if compat.interpreting():
        return "they are addresses, which interpreted kernels cannot use"
    if (reason := compat.mosaic_reason(mesh)) is not None:
        return reason
    if jax.__version_info__ >= (0, 12):
        return "with jax 0.12 they have not run yet"
    if jax.process_count() > 1:
        return "processes do not see each other's memory"
    if (allocator := os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default")) not in ALLOCATORS:
        return f"GPUs may not write into what the allocator {allocator!r} gives, as far as is known"
    if not _all_reach_each_other([device.local_hardware_id for device in mesh.devices.flat]):
        return "these GPUs do not reach each other's memory"
    return None


def _all_reach_each_other(ordinals: list[int]) -> bool:
    """By CUDA's driver, which XLA has told to let them where they can."""
    driver = ctypes.CDLL("libcuda.so.1")
    can = ctypes.c_int()
    for one in ordinals:
        for other in ordinals:
            if one != other and (driver.cuDeviceCanAccessPeer(ctypes.byref(can), one, other) != 0 or not can.value):
                return False
    return True
