"""What the stages of a layer compute, one product of several, and what the kernels for them ask of their arguments.

Imports no kernel, so that a model can ask whether its tokens would fit one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.quantized_matmul.formats import ROWS_AT_ONCE, QuantizedWeight, storage
from pallas_kernels.quantized_matmul.integers import IntegerRows

MAX_ROWS = 64  # of x, up to which weights are streamed by them (stream.py); more are prompts (wide_tiles.py)
SIDE = 64  # inputs and outputs come in multiples of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """activation(x @ weight + bias): [..., O].

    x: [..., I], or [8, I] as IntegerRows for weights of this form. Of rows that these lack anything comes out.
    weight: [I, O], or a QuantizedWeight of as many.
    num_outputs: O.
    bias: [O] or None, added to the product rounded to x's dtype.
    activation: None, or "gelu" (exact).
    rotary: None, or cos and sin [rows, 32] by which the two halves of every 64 outputs, a head, are rotated at last.
    slots: None, or where the result goes instead, into an array [S, O] in x's dtype that the caller gives up: each
      row's place in it, int32 [rows], S or more for none. Rows of x past these places are dropped.
    is_split: on a mesh, whether the outputs, with those of the weight and of slots, lie over its tensor axis.
    dtype: what the sums, added up in float32, are rounded to: x's, or "float32" where nothing else is done to them.
    affine: None, or float32 [2, O], what scale and shift of a deferred norm come to, for an x that does not hold them
      (`integers.TOKEN_ROWS`).
    """

    x: Any
    weight: Any
    num_outputs: int = dataclasses.field(metadata={"static": True})
    bias: Any = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
    rotary: tuple[Any, Any] | None = None
    slots: tuple[Any, Any] | None = None
    is_split: bool = dataclasses.field(default=False, metadata={"static": True})
    dtype: str | None = dataclasses.field(default=None, metadata={"static": True})
    affine: Any = None

    @property
    def num_rows(self) -> int:
        return math.prod(self.x.shape[:-1])

    @property
    def out_dtype(self) -> Any:
        return jnp.dtype(self.dtype or self.x.dtype)

    def check(self, caller: str) -> None:
        """Raises ValueError, in the name of `caller`, where the weight or the bias does not fit x."""
        x, weight, num_outputs, num_rows = self.x, self.weight, self.num_outputs, self.num_rows
        more = (self.bias, self.activation, self.rotary, self.slots)
        if self.out_dtype != x.dtype and (self.dtype != "float32" or any(one is not None for one in more)):
            raise ValueError(
                f"{caller}: results of {self.dtype} for x of {x.dtype}; bare products alone come in another dtype, in "
                "float32"
            )
        if isinstance(x, IntegerRows) and x.form != form_of(weight):
            raise ValueError(f"{caller}: x as integers for weights of {x.form!r} with one of {form_of(weight)!r}")
        if self.rotary is not None and (
            num_outputs % SIDE or any(angles.shape != (num_rows, SIDE // 2) for angles in self.rotary)
        ):
            shapes = [angles.shape for angles in self.rotary]
            raise ValueError(f"{caller}: cos and sin {shapes} do not rotate {num_rows} rows of {num_outputs} outputs")
        if self.slots is not None:
            array, places = self.slots
            if (array.ndim, array.shape[-1], array.dtype) != (2, num_outputs, x.dtype) or len(places) > num_rows:
                raise ValueError(
                    f"{caller}: slots {array.shape} of {array.dtype} with {len(places)} places do not take {num_rows} "
                    f"rows of {num_outputs} outputs of {x.dtype}"
                )
        if self.affine is not None and (self.affine.shape, self.affine.dtype) != ((2, num_outputs), jnp.float32):
            found = f"{self.affine.dtype}{list(self.affine.shape)}"
            raise ValueError(f"{caller}: what scale and shift come to is {found}, not float32[2, {num_outputs}]")
        if self.bias is not None and self.bias.shape != (num_outputs,):
            raise ValueError(f"{caller}: a bias {self.bias.shape} does not fit {num_outputs} outputs")
        if not isinstance(weight, QuantizedWeight):
            if weight.shape != (x.shape[-1], num_outputs):
                raise ValueError(
                    f"{caller}: a weight {weight.shape} does not fit x {x.shape} and {num_outputs} outputs"
                )
            return
        expected = storage(weight.form, x.shape[-1], num_outputs)
        if (weight.values.shape, weight.scales.shape) != (expected.values.shape, expected.scales.shape):
            found = f"values {weight.values.shape} with scales {weight.scales.shape}"
            wanted = f"{expected.values.shape} with {expected.scales.shape}"
            raise ValueError(
                f"{caller}: {weight.form} {found} do not fit x {x.shape} and {num_outputs} outputs, which take {wanted}"
            )


def form_of(weight: Any) -> str:
    """ "native", or the form of a QuantizedWeight."""
    return weight.form if isinstance(weight, QuantizedWeight) else "native"


def reason_against(num_rows: int, sizes: Sequence[int], dtype: DTypeLike) -> str | None:
    """Why the kernels cannot take so many rows of products with these inputs and outputs, or None where they can."""
    if dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {jnp.dtype(dtype)}"
    if num_rows < 1:
        return "it takes rows, and there are none"
    if any(size % SIDE for size in sizes):
        return f"it takes multiples of {SIDE} inputs and outputs, not {', '.join(map(str, sizes))}"
    return None


def reason_against_products(products: Sequence[Product]) -> str | None:
    """The same for the products of one launch."""
    forms = sorted({form_of(product.weight) for product in products})
    if len(forms) > 1:
        return f"it takes weights of one form, not {' and '.join(forms)}"
    for product in products:
        if forms == ["native"] and product.weight.dtype != product.x.dtype:
            return f"it takes x and weights of one dtype, not {product.x.dtype} and {product.weight.dtype}"
        if product.num_rows > MAX_ROWS and (product.rotary is not None or product.slots is not None):
            return f"it rotates and fills slots with up to {MAX_ROWS} rows, not {product.num_rows}"
        if product.num_rows > MAX_ROWS and product.out_dtype != product.x.dtype:
            return f"its results are of another dtype than x with up to {MAX_ROWS} rows, not {product.num_rows}"
        sizes = product.x.shape[-1], product.num_outputs
        if (reason := reason_against(product.num_rows, sizes, product.x.dtype)) is not None:
            return reason
    return None


def in_order(num_rows: int, form: str, candidates: Mapping[str, Any]) -> dict[str, Any]:
    """The implementations "mosaic" and "xla", the faster one first, as measured on an H200 (benchmarks/LOG.md).

    With 1,024 rows and weights of 16 bits both stages together take as long by either; more rows and fewer have not
    been compared. XLA unpacks other weights first, which whole models show to be slower at 512 and 4,000 rows.
    """
    names = ("xla", "mosaic") if num_rows > MAX_ROWS and form == "native" else ("mosaic", "xla")
    return {name: candidates[name] for name in names}


def rows_read(given: int, num_rows: int | None) -> int:
    """How many rows kernels read of `given`, a multiple of 8, if the first `num_rows` of them (None: all) matter."""
    if num_rows is None or given > ROWS_AT_ONCE:
        return given
    return next(rows for rows in (2, 4, ROWS_AT_ONCE) if rows >= num_rows)


def in_eights(x: Any) -> Any:
    """x [..., I] as rows [R, I], R a multiple of 8: the last ones are zeros. IntegerRows are that already."""
    if isinstance(x, IntegerRows):
        return x
    x = x.reshape(-1, x.shape[-1])
    return jnp.pad(x, ((0, -x.shape[0] % ROWS_AT_ONCE), (0, 0)))
