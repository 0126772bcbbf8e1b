"""Whether a step's attention runs beside the MLP's first product, and on how many of the GPU's multiprocessors.

In a parallel layer neither reads what the other makes, and where XLA is told so they run at the same time in a CUDA
graph (generate/programs.py). Attention of a token or two with one key head reads next to nothing and still takes
microseconds, in which no weights are read if it has the GPU to itself. On a few multiprocessors that the product
leaves free it takes longer, and nobody waits for it, if it is done before the product is.

So queries, keys and values become a launch of their own, which costs less than attention did; one that was measured to
pay for weights of 16 and 8 bits, and not for 4 bits (benchmarks/LOG.md).
"""

import math

from falcon_jax.config import FalconConfig
from pallas_kernels.quantized_matmul.formats import TILE_OUTPUTS

# By what an H200 does: memory is read at BYTES_PER_US; attention beside that takes LATENCY_US and, for each 64 keys of
# a head of 64 on a multiprocessor, TILE_US.
BYTES_PER_US, LATENCY_US, TILE_US = 4.1e6, 22.0, 0.83
TILE_KEYS = 64
CHOICES = (4, 8, 12, 16)
BYTES_OF_A_WEIGHT = {"native": 2, "int8": 1}


def attention_sms(config: FalconConfig, weights: str, batch: int, capacity: int, num_sms: int) -> int:
    """How many multiprocessors attention gets for itself; 0 where it does not run beside the product.

    Args:
      weights: their form; "native" ones are taken to have 16 bits.
      batch: rows of the cache, one token each; capacity: slots of a row.
      num_sms: of the GPU.
    """
    # More key heads have not been measured.
    if config.block != "parallel" or config.num_kv_heads > 1 or weights not in BYTES_OF_A_WEIGHT:
        return 0
    of_attention = (config.num_heads + 2) * config.head_dim
    first_us, second_us = (
        outputs * config.width * BYTES_OF_A_WEIGHT[weights] / BYTES_PER_US
        for outputs in (of_attention, config.mlp_width)
    )
    # Where the first launch has fewer tiles than there are multiprocessors, the second begins on the others.
    share = min(1.0, of_attention / TILE_OUTPUTS / num_sms)
    window_us = first_us + second_us - first_us / share
    tiles = batch * math.ceil(capacity / TILE_KEYS) * config.head_dim / 64
    mlp_tiles = math.ceil(config.mlp_width / TILE_OUTPUTS)
    for sms in CHOICES:
        fits = LATENCY_US + TILE_US * tiles / sms <= window_us
        # With more turns some multiprocessors would work on when the others are done.
        if fits and sms < num_sms and math.ceil(mlp_tiles / (num_sms - sms)) == math.ceil(mlp_tiles / num_sms):
            return sms
    return 0
