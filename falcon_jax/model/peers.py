"""What a step of decoding over several GPUs must know so that its kernels reach the other devices' memory.

With it nothing of the step is a collective of XLA's, and the whole loop of steps can be one CUDA graph on each device
(generate/programs.py): what a layer's devices make is added up by its output stages, token vectors of a split
vocabulary by a small kernel of their own, and a split head's logits are gathered by another.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_jax.config import FalconConfig
from pallas_kernels import peers
from pallas_kernels.peers import Addresses, Mailboxes
from pallas_kernels.quantized_matmul import MAX_ROWS, SIDE, size_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peers:
    """Where the devices' mailboxes are: for rows of the model's width, and for a device's share of the logits."""

    rows: Addresses
    logits: Addresses


class Memory:
    """The mailboxes of a model over a mesh; it must live as long as a program that was given `peers` may run.

    Args:
      num_rows: the most tokens of a step, of all sequences; rounded up to a multiple of 8.

    Raises:
      NotImplementedError: `reason_against` says why.
    """

    def __init__(self, config: FalconConfig, mesh: Mesh, num_rows: int):
        self._mailboxes = [Mailboxes(mesh, num_rows, width) for width in (config.width, _share(config, mesh))]
        self.peers = Peers(*(mailboxes.addresses for mailboxes in self._mailboxes))


def reason_against(config: FalconConfig, dtype: jnp.dtype, mesh: Mesh, num_tokens: int) -> str | None:
    """Why steps of so many tokens cannot do without collectives, or None where they can."""
    if dtype != jnp.bfloat16 or config.width % SIDE:
        return f"the kernels take bfloat16 and a width that is a multiple of {SIDE}, not {dtype} and {config.width}"
    if num_tokens > MAX_ROWS:
        return f"the kernels take up to {MAX_ROWS} tokens a step, not {num_tokens}"
    return peers.reason_against(mesh)


def _share(config: FalconConfig, mesh: Mesh) -> int:
    """Of the vocabulary, what a device has where it is split."""
    return -(-config.vocab_size // size_of(mesh))
