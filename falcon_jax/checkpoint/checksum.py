"""A checksum of an array's bits that a host and a device compute alike, also over a sharded array.

Two 32-bit sums over the row-major elements: of their bits, and of their bits times an odd number made from the
position. One flipped bit changes both, since 2**k times an odd number is never 0 modulo 2**32; a block that is
lost, doubled or moved changes the second. Addition has no order, so a device sums its own shard and nothing is
gathered. This guards against rot and truncation, not against an adversary.

The trap: the position's number is a product of one for its place in a block of 65,536 and one for the block, so
that the host can keep the first as a table (4.9 GB/s on one core, against 1 for hashing each position).
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

_BLOCK = 1 << 16
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def host_checksum(array: np.ndarray) -> str:
    """The checksum of a host array, as 16 hexadecimal digits.

    Args:
      array: of any shape, elements of 1, 2 or 4 bytes. Read in blocks: no copy of a contiguous array is made.

    Raises:
      ValueError: for elements of another size.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(_unsigned(array.dtype))
    table = _odd(np.arange(min(_BLOCK, max(flat.size, 1)), dtype=np.uint32))
    blocks = _odd(np.arange(min(_BLOCK, -(-flat.size // _BLOCK)), dtype=np.uint32))
    words = np.empty(table.size, np.uint32)
    plain = weighted = 0
    for block, start in enumerate(range(0, flat.size, _BLOCK)):
        part = flat[start : start + _BLOCK]
        bits = words[: part.size]
        np.copyto(bits, part)
        plain += int(bits.sum(dtype=np.uint32))
        np.multiply(bits, table[: part.size], out=bits)
        weighted += int(bits.sum(dtype=np.uint32)) * int(blocks[block % _BLOCK])
    return _text(plain, weighted)


def checksums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """The checksums of arrays by name, each computed where its shards lie.

    An array that spans processes takes all of them, each with the same arrays: every process sums its own shards, and
    the sums of all arrays are exchanged at once.

    Raises:
      ValueError: for elements of a size other than 1, 2 or 4 bytes.
    """
    started: dict[str, jax.Array | str] = {}
    spanning: dict[str, list[jax.Array]] = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            started[name] = host_checksum(array)
        elif array.is_fully_addressable:
            started[name] = start_checksum(array)
        else:
            spanning[name] = _start_own(array)
    texts = {name: finish_checksum(words) for name, words in started.items()} | _finish_spanning(spanning)
    return {name: texts[name] for name in arrays}


def _finish_spanning(started: Mapping[str, list[jax.Array]]) -> dict[str, str]:
    if not started:
        return {}
    own = np.zeros((len(started), 2), np.uint32)
    for sums, shards in zip(own, started.values()):
        for words in shards:
            sums += np.asarray(words)  # modulo 2**32
    total = multihost_utils.process_allgather(own).sum(axis=0, dtype=np.uint32)
    return {name: _text(*sums) for name, sums in zip(started, total.tolist())}


def _start_own(array: jax.Array) -> list[jax.Array]:
    """The words of this process's shards, of which each is one process's alone (others may have copies)."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    _unsigned(array.dtype)
    mine = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    origins = [[range(size)[part].start for size, part in zip(array.shape, shard.index)] for shard in mine]
    return [
        device_words(shard.data, np.asarray(origin, np.uint32), array.shape) for shard, origin in zip(mine, origins)
    ]


def start_checksum(array: jax.Array) -> jax.Array | str:
    """Begins the checksum of a device array; `finish_checksum` waits for it.

    An accelerator (or a mesh of CPU devices) runs the jitted form; a single CPU device's memory is the host's own,
    and there the host form is six times faster than what XLA makes of the jitted one.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    _unsigned(array.dtype)
    if len(array.sharding.device_set) == 1 and next(iter(array.sharding.device_set)).platform == "cpu":
        return host_checksum(np.asarray(array))
    return device_words(array)


def finish_checksum(words: jax.Array | str) -> str:
    """The text of a checksum that `start_checksum` began."""
    if isinstance(words, str):
        return words
    plain, weighted = np.asarray(words).tolist()
    return _text(plain, weighted)


@functools.partial(jax.jit, static_argnames="shape")
def device_words(
    array: jax.Array, origin: Sequence[int] | jax.Array | None = None, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """The checksum's two words, uint32 [2], on the array's own devices.

    origin, shape: where the array lies in a larger one, of which these words are its part.
    """
    unsigned = _unsigned(array.dtype)
    boolean = array.dtype == jnp.bool_
    bits = array.astype(unsigned) if boolean else jax.lax.bitcast_convert_type(array, unsigned)
    bits = bits.astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in range(array.ndim - 1, -1, -1):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        if origin is not None:
            along = along + jnp.asarray(origin[axis], jnp.uint32)
        position = position + along * jnp.uint32(stride % 2**32)
        stride *= (array.shape if shape is None else shape)[axis]
    factor = _odd(position % _BLOCK) * _odd(position // _BLOCK)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * factor, dtype=jnp.uint32)])


def _odd(number):
    """An odd 32-bit number that looks random, from a uint32 array of either library (murmur3's finaliser)."""
    number = (number ^ (number >> 16)) * np.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * np.uint32(0xC2B2AE35)
    number = number ^ (number >> 16)
    return (number << 1) | np.uint32(1)


def _unsigned(dtype) -> type[np.unsignedinteger]:
    dtype = np.dtype(dtype)
    if dtype.itemsize not in _UNSIGNED:
        raise ValueError(f"a checksum takes elements of 1, 2 or 4 bytes, got {dtype.name} ({dtype.itemsize} bytes)")
    return _UNSIGNED[dtype.itemsize]


def _text(plain: int, weighted: int) -> str:
    return f"{plain % 2**32:08x}{weighted % 2**32:08x}"
