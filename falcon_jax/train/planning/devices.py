"""GPUs that a run is planned for: what XLA must know to compile for one, and what an estimate of time is made of.

One table for all of it. The compiler's part was checked against the descriptions that XLA itself ships. The trap:
`memory_bytes` is what CUDA says the device has; less than that can be had (`usable_bytes`).
"""

import dataclasses

from falcon_jax.errors import ConfigError
from falcon_jax.train import flops

GPUS_PER_MACHINE = 8
# What a plan may fill. The rest is for what no plan counts: the CUDA context, NCCL's buffers, workspaces of cuDNN and
# cuBLAS, and fragments. Assumed.
USABLE_SHARE = 0.8
# What JAX takes of a GPU unless told otherwise by MEMORY_VARIABLE, and what it is told in docs/examples.
JAX_SHARE, EXAMPLE_SHARE = 0.75, 0.9
MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, in a machine of GPUS_PER_MACHINE of them.

    kind: JAX's device_kind. capability: CUDA's. Shared memory, registers and fpus are a multiprocessor's (SM's).
    product_share, attention_share, memory_share: of the peaks, what large products, attention kernels and copies reach.
    link_bytes_per_s, network_bytes_per_s: what a collective sends from each GPU inside a machine, and between machines
      where each GPU has a network port of its own.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    num_sms: int
    fpus_per_sm: int
    shared_memory_bytes: int
    shared_memory_per_block_bytes: int
    clock_ghz: float
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_s: float
    product_share: float
    attention_share: float
    memory_share: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    usable_share: float = USABLE_SHARE

    def __post_init__(self) -> None:
        if not 0 < self.usable_share <= 1:
            raise ConfigError(f"the usable share of memory is {self.usable_share}; it must be above 0 and at most 1")
        if self.network_bytes_per_s <= 0:
            raise ConfigError(f"the network's bandwidth is {self.network_bytes_per_s / 1e9:g} GB/s; it must be above 0")

    @property
    def usable_bytes(self) -> int:
        return int(self.usable_share * self.memory_bytes)

    @property
    def peak_flops(self) -> float:
        """Dense, bf16, a second."""
        found = flops.peak_flops(self.kind)
        assert found is not None, self.kind
        return found

    def description(self) -> str:
        """As XLA takes it: a GpuTargetConfigProto in its text form."""
        major, minor = self.capability
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory_per_block_bytes}
  shared_memory_per_core: {self.shared_memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {self.num_sms}
  fpus_per_core: {self.fpus_per_sm}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {self.memory_bytes_per_s:.0f}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.kind}"
"""


# SMs, clocks, caches and memory bandwidth: NVIDIA's data sheets and tuning guides of the A100, H100 and H200 (SXM).
# memory_bytes: as CUDA reports it on such a device (H200: as XLA ships it).
# Shares of the peaks. Hopper: benchmarks/LOG.md and README (an H200: products of 8192^3 793 of 989 TFLOP/s, copies 4.27
# of 4.8 TB/s; attention of falcon-40b forward and backward 367 TFLOP/s). A100: products and copies assumed as Hopper's;
# attention from Dao, FlashAttention-2 (2023), figures 4 to 6: about half of the peak at head dim 64 and 2,048 tokens.
# Links: nccl-tests issues 149 and 178 (A100, 200 and 208 GB/s of the 300 GB/s one way) and 212 (H100, 370 of 450).
# Network: a port of 200 Gb/s (A100) or 400 Gb/s (Hopper) a GPU as in NVIDIA's DGX, of which NCCL moves 91 % (nccl-tests
# issue 100). Clouds give less: a p4d machine has 400 Gb/s for eight GPUs, 6.25 GB/s each.
_A100 = {
    "capability": (8, 0),
    "num_sms": 108,
    "fpus_per_sm": 64,
    "shared_memory_bytes": 164 * 1024,
    "shared_memory_per_block_bytes": 163 * 1024,
    "clock_ghz": 1.41,
    "l2_bytes": 40 * 2**20,
    "product_share": 0.8,
    "attention_share": 0.5,
    "memory_share": 0.89,
    "link_bytes_per_s": 204e9,
    "network_bytes_per_s": 0.91 * 25e9,
}
_HOPPER = {
    "capability": (9, 0),
    "num_sms": 132,
    "fpus_per_sm": 128,
    "shared_memory_bytes": 228 * 1024,
    "shared_memory_per_block_bytes": 227 * 1024,
    "clock_ghz": 1.98,
    "product_share": 0.8,
    "attention_share": 0.37,
    "memory_share": 0.89,
    "link_bytes_per_s": 370e9,
    "network_bytes_per_s": 0.91 * 50e9,
}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="a100-40",
            kind="NVIDIA A100-SXM4-40GB",
            memory_bytes=42_298_834_944,
            memory_bytes_per_s=1555e9,
            **_A100,
        ),
        Device(
            name="a100-80",
            kind="NVIDIA A100-SXM4-80GB",
            memory_bytes=85_100_068_864,
            memory_bytes_per_s=2039e9,
            **_A100,
        ),
        Device(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            memory_bytes=84_929_347_584,
            memory_bytes_per_s=3352e9,
            l2_bytes=50 * 2**20,
            **_HOPPER,
        ),
        Device(
            name="h200",
            kind="NVIDIA H200",
            memory_bytes=150_754_820_096,
            memory_bytes_per_s=4800e9,
            l2_bytes=60 * 2**20,
            **_HOPPER,
        ),
    )
}


def named(name: str) -> Device:
    """Raises: ConfigError where there is no such device."""
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}; known are {', '.join(DEVICES)}")
    return DEVICES[name]
