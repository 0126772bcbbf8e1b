"""What is to be generated, and the least time that it can take on this device, by counting.

Owns the counts; how fast the device reads and multiplies is measured by hardware.py.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from benchmarks import hardware
from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.cache import cache_bytes

# More than any cache holds.
MEMORY_READ_BYTES = {"cpu": 512 * 2**20, "gpu": 2**30}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What to generate: `batch_size` prompts of `context_tokens` ids each, continued by `new_tokens`.

    With one new token nothing is decoded: the prefill gives it.
    """

    batch_size: int
    context_tokens: int
    new_tokens: int

    def prompts(self, config: FalconConfig) -> Int[np.ndarray, "B T"]:
        """Random ids, the same every time."""
        generator = np.random.default_rng(0)
        return generator.integers(0, config.vocab_size, (self.batch_size, self.context_tokens), np.int32)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does a second: bytes read of far more than any cache holds, operations of a large product."""

    memory_bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, dtype: str) -> "Rates":
        return cls(hardware.read_bandwidth(_most_read_bytes()), hardware.matrix_rate(dtype))


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least that a generation must read and multiply, and how fast this device can.

    weight_bytes, cache_bytes: read by one decode step of the whole batch, the cache at its mean length.
    read_bytes_per_s: measured over as many bytes as a step reads, so in the processor's cache if they fit there.
    memory_bytes_per_s: measured over far more than any cache holds.
    prefill_flops: of all prompts, the head for each last token alone; flops_per_s of a large product in this dtype.
    """

    weight_bytes: int
    cache_bytes: int
    read_bytes_per_s: float
    memory_bytes_per_s: float
    prefill_flops: int
    flops_per_s: float

    @classmethod
    def of(cls, config: FalconConfig, workload: Workload, dtype: str, weights: str, rates: Rates) -> "Limit":
        read_bytes = step_weight_bytes(config, dtype, weights)
        cache = cache_bytes(config, workload.batch_size, workload.context_tokens + workload.new_tokens // 2, dtype)
        memory = rates.memory_bytes_per_s
        fits_no_cache = read_bytes + cache >= _most_read_bytes()
        read = memory if fits_no_cache else max(memory, hardware.read_bandwidth(read_bytes + cache))
        return cls(read_bytes, cache, read, memory, prefill_flops(config, workload), rates.flops_per_s)

    @property
    def ms_per_step(self) -> float:
        """Milliseconds of a decode step that does nothing but read, at `read_bytes_per_s`."""
        return 1e3 * (self.weight_bytes + self.cache_bytes) / self.read_bytes_per_s

    @property
    def prefill_ms(self) -> float:
        return 1e3 * self.prefill_flops / self.flops_per_s

    def record(self, batch_size: int) -> dict[str, Any]:
        """As it stands in a document."""
        return dataclasses.asdict(self) | {
            "ms_per_step": self.ms_per_step,
            "decode_tokens_per_s": 1e3 * batch_size / self.ms_per_step,
            "prefill_ms": self.prefill_ms,
        }

    def lines(self, batch_size: int) -> list[str]:
        """What a reader should know before any measurement."""
        return [
            f"limit: a decode step reads {self.weight_bytes / 1e6:.1f} MB of weights and {self.cache_bytes / 1e6:.2f} "
            f"MB of cache; this device reads that much at {self.read_bytes_per_s / 1e9:.1f} GB/s (memory alone: "
            f"{self.memory_bytes_per_s / 1e9:.1f} GB/s), so {1e3 * batch_size / self.ms_per_step:.1f} tokens/s "
            f"({self.ms_per_step:.3f} ms a step)",
            f"limit: the prefill is {self.prefill_flops / 1e9:.3f} GFLOP; this device multiplies at "
            f"{self.flops_per_s / 1e9:.0f} GFLOP/s, so {self.prefill_ms:.2f} ms to the first token",
        ]

    def shares(self, result: dict[str, Any]) -> dict[str, float]:
        """How much of the limits a result reaches: in decode of the read limit, in the first token of the product's."""
        found = {}
        if "ms_per_step" in result:
            found["share_of_read_limit"] = self.ms_per_step / result["ms_per_step"]
        if "first_token_ms" in result:
            found["share_of_flops_limit"] = self.prefill_ms / result["first_token_ms"]
        return found


def weight_bytes(config: FalconConfig, dtype: str, weights: str = "native") -> int:
    """Bytes of all parameters as they lie on the device: scales and padding of weights in few bits included."""
    return sum(_parameter_bytes(config, dtype, weights).values())


def step_weight_bytes(config: FalconConfig, dtype: str, weights: str = "native") -> int:
    """Bytes of weights that a decode step must read: all but an embedding table that is not the head as well."""
    sizes = _parameter_bytes(config, dtype, weights)
    unread = () if config.tie_word_embeddings else ("embed.weight",)
    return sum(size for path, size in sizes.items() if not path.startswith(unread))


def prefill_flops(config: FalconConfig, workload: Workload) -> int:
    """Multiplications and additions of the matrix products and of causal attention, for all prompts together."""
    D, H, T = config.width, config.head_dim, workload.context_tokens
    projections = D * (2 * D + 2 * config.num_kv_heads * H) + 2 * D * config.mlp_width
    attention = 2 * D * T * (T + 1) // 2  # q . k and the sum over v, for the keys that causality shows
    return 2 * workload.batch_size * (config.num_layers * (T * projections + attention) + D * config.vocab_size)


def measured_limits(
    jobs: Sequence[tuple[FalconConfig, Workload]], dtype: str, weights: str, *, say: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], list[Limit]]]:
    """One pair: what the machine is, and the limit of each job on it. An iterator, as places.py asks for."""
    say("measures what this device reads and multiplies a second")
    rates = Rates.measure(dtype)
    yield hardware.describe(), [Limit.of(config, workload, dtype, weights, rates) for config, workload in jobs]


def _most_read_bytes() -> int:
    return MEMORY_READ_BYTES.get(jax.default_backend(), 2**30)


def _parameter_bytes(config: FalconConfig, dtype: str, weights: str) -> dict[str, int]:
    leaves = model_params.flatten(model_params.abstract(config, dtype, weights))
    return {path: leaf.size * leaf.dtype.itemsize for path, leaf in leaves.items()}
