"""How many tokens the KV cache can hold: asked before anything is allocated, answered in one line.

Owns what memory is free and the two refusals. The trap: on a CPU nobody stops an allocation that is too large
before the system kills the process, so the bound must come from here.
"""

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_jax import sharding
from falcon_jax.config import FalconConfig
from falcon_jax.errors import RequestError
from falcon_jax.model.cache import cache_bytes

GIB = 2**30
# The rest is for activations; on a host, for everybody else too.
DEVICE_SHARE = 0.9
HOST_SHARE = 0.5
# Default bound on a row: ALiBi goes on past the trained length, but a slip in max_new_tokens should not run
# for days.
ROW_LENGTHS = 8
ROW_TOKENS = 32768


def check_cache(
    config: FalconConfig,
    *,
    num_rows: int,
    num_tokens: int,
    capacity: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    max_cache_tokens: int | None = None,
    max_cache_bytes: int | None = None,
) -> None:
    """Refuses a cache that cannot be held.

    Args:
      num_tokens: of the longest row, prompt and new ones together.
      capacity: slots a row that the cache would have for them.
      max_cache_tokens: bound on `num_tokens`; None: 8 times the trained length, at least 32768.
      max_cache_bytes: bound on the cache's bytes on a device; None: what is free there (on a CPU, on the
        host).

    Raises:
      RequestError: says what was asked for and what there is.
    """
    asked = f"the cache cannot hold {num_tokens} tokens a row (prompt and max_new_tokens together)"
    mend = "shorten the prompt, lower max_new_tokens"
    most = max(ROW_LENGTHS * config.max_tokens, ROW_TOKENS) if max_cache_tokens is None else max_cache_tokens
    if num_tokens > most:
        raise RequestError(f"{asked}: max_cache_tokens is {most}; {mend} or raise max_cache_tokens")
    needed = cache_bytes(config, num_rows, capacity, dtype)
    if mesh is not None:
        shape = (num_rows, capacity, config.num_kv_heads, config.head_dim)
        shard = sharding.cache_sharding(shape, mesh).shard_shape(shape)
        needed = needed * math.prod(shard) // math.prod(shape)
    free = free_bytes(mesh) if max_cache_bytes is None else max_cache_bytes
    if free is not None and needed > free:
        sizes = f"{num_rows} rows take {needed / GIB:.3f} GiB and {free / GIB:.3f} GiB are there"
        raise RequestError(f"{asked}: {sizes}; {mend} or run fewer rows")


def free_bytes(mesh: Mesh | None = None) -> int | None:
    """What a cache may take on the fullest device of `mesh`, or on the default device; None if unknown."""
    devices = jax.local_devices()
    devices = devices[:1] if mesh is None else [device for device in devices if device in mesh.local_devices]
    free = [_device_free_bytes(device) for device in devices]
    known = [size for size in free if size is not None]
    if known:
        return min(known)
    if all(device.platform == "cpu" for device in devices):
        host = _host_free_bytes()
        return None if host is None else int(host * HOST_SHARE) // max(len(devices), 1)
    return None


def _device_free_bytes(device: Any) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * DEVICE_SHARE)


def _host_free_bytes() -> int | None:
    """Memory still to be had: what Linux calls available, within the container's own limit."""
    sizes = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            sizes.append(int(fields["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        sizes.append(max(int(text) - int(used.read_text()), 0))
    return min(sizes, default=None)
