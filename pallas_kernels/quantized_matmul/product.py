"""What the input stage computes: one product of several, with what is done to it at once."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """activation(x @ weight + bias): [..., O] in x's dtype.

    x: [..., I].
    weight: [I, O], or a QuantizedWeight of as many.
    num_outputs: O.
    bias: [O] or None, added to the product rounded to x's dtype.
    activation: None, or "gelu" (exact).
    """

    x: Any
    weight: Any
    num_outputs: int = dataclasses.field(metadata={"static": True})
    bias: Any = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
