"""One layer at a time, and what each of its projections is given: for models that do not fit in memory.

Owns how the inputs of a projection are seen. Knows nothing of files, or of what is done with what it tells.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params
from falcon_jax.model.step import ForwardOptions, Step, spans


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run(
    config: FalconConfig,
    params: model_params.Params,
    x: Float[Array, "B T D"],
    hessians: Mapping[str, Float[Array, "I I"]],
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "I I"]]]:
    """One layer over B whole rows from position 0.

    Args:
      params: the layer's own native tree, of x's dtype.
      hessians: by projection ("attention.query", "mlp.down"), the sum so far of i i^T over its inputs i, float32.
        Donated.

    Returns:
      What the next layer is given, and the sums with these rows added.
    """
    B, T = x.shape[:2]
    block = model_params.bind_block(config, params)
    recorders = {name: _Recorder.put_in(block, name) for name in hessians}
    x, _ = block(x, Step.begin(config, ForwardOptions(), T, *spans(None, B, T, None)), None)
    return x, {name: hessians[name] + recorder.outer_products() for name, recorder in recorders.items()}


class _Recorder:
    """Stands where a projection stood, and keeps what it was called with."""

    def __init__(self, linear: Any):
        self._linear = linear
        self.outputs = linear.outputs
        self._inputs: Array | None = None

    @classmethod
    def put_in(cls, block: Any, name: str) -> "_Recorder":
        part, projection = name.split(".")
        recorder = cls(getattr(getattr(block, part), projection))
        setattr(getattr(block, part), projection, recorder)
        return recorder

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        self._inputs = x
        return self._linear(x)

    def outer_products(self) -> Float[Array, "I I"]:
        """The sum of i i^T over the inputs i, products and sums in float32."""
        assert self._inputs is not None, "the block does not call this projection"
        num_input_axes = len(self._linear.inputs)
        x = self._inputs.reshape(-1, *self._inputs.shape[self._inputs.ndim - num_input_axes :])
        x = x.reshape(len(x), -1)
        rows = (((0,), (0,)), ((), ()))
        return jax.lax.dot_general(x, x, rows, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
