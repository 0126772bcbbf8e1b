"""Model FLOPs and the share of the hardware's peak that they are (MFU). Plain arithmetic over a configuration.

The convention is that of PaLM's report (Chowdhery et al., 2022, appendix B) but for the causal half: a token costs 6
FLOPs a parameter that multiplies it, 2 forward and 4 backward, and attention's two products over the half of the keys
that it may see. Parameters that multiply are all matrices, the head included (once, where it is tied), the embedding's
lookup not; norms, biases and what is computed a second time in the backward pass do not count. Packed documents count
as one text of the row's length.
"""

import math
import re

import jax.numpy as jnp

from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params

# Dense bf16 FLOP/s by JAX's device_kind; the first match wins. Source: NVIDIA's data sheets of the A100 (2021), H100
# (2023) and H200 (2024) Tensor Core GPUs, which give all but the first with sparsity, twice this.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H[12]00 NVL", 835e12),
    (r"NVIDIA H100.*HBM3.*", 989e12),
    (r"NVIDIA H200.*", 989e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where none is stated here."""
    return next((flops for pattern, flops in PEAK_FLOPS if re.fullmatch(pattern, device_kind)), None)


def multiplying_parameters(config: FalconConfig) -> int:
    """Parameters of the blocks' matrices and of the head."""
    sizes = {
        path: math.prod(leaf.shape)
        for path, leaf in model_params.flatten(model_params.abstract(config, jnp.float32)).items()
        if path.endswith(".weight")
    }
    if not config.tie_word_embeddings:  # tied, the embedding is the head
        del sizes["embed.weight"]
    return sum(sizes.values())


def train_flops_per_token(config: FalconConfig, length: int, *, is_frozen: bool = False) -> float:
    """FLOPs of a training step over its tokens, in rows of `length` tokens.

    is_frozen: the matrices have no gradients, and so cost 4 FLOPs a parameter and token; adapters beside them are small
    and not counted.
    """
    # Scores and weighted values, each 2 N H a key; on average half of the keys are seen; backward is twice forward.
    attention = 3 * 2 * (2 * config.num_heads * config.head_dim) * length / 2
    return (4 if is_frozen else 6) * multiplying_parameters(config) + config.num_layers * attention
