"""`attention_norm`: what models call. Checks the arguments, picks the implementation, runs it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch
from pallas_kernels.attention_norm.meeting import meeting_size, new_meeting
from pallas_kernels.attention_norm.reference import Norm, add_xla, attention_norm_xla
from pallas_kernels.attention_norm.sharded import attention_norm_over, by_peers
from pallas_kernels.peers import Addresses
from pallas_kernels.quantized_matmul import deferred
from pallas_kernels.quantized_matmul.integers import Integers
from pallas_kernels.quantized_matmul.product import (
    MAX_ROWS,
    ROWS_AT_ONCE,
    SIDE,
    Product,
    form_of,
    in_eights,
    in_order,
    reason_against_products,
)
from pallas_kernels.quantized_matmul.sharded import size_of


def attention_norm(
    xs: Sequence[Float[Array, "*rows _"]],
    weights: Sequence[Any],
    residual: Float[Array, "*rows D"],
    norms: Sequence[Norm],
    *,
    biases: Sequence[Float[Array, " D"]] = (),
    epsilon: float,
    meeting: Int[Array, " M"] | None = None,
    mesh: Mesh | None = None,
    are_split: Sequence[bool] = (),
    peers: Addresses | None = None,
    num_rows: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows D"], list[Float[Array, "*rows D"]], Int[Array, " M"]]:
    """What a layer's output projections add to the residual, and the layer norms that the next stage reads.

    Args:
      xs, weights: one or several inputs [..., I] with their weights [I, D], or QuantizedWeights; all of one form.
      norms: scale and shift [D] of each norm, one or more.
      biases: as many as `xs`, or none.
      meeting: what the call before returned, for as many rows and outputs; `new_meeting`'s or None for the first of a
        chain. The array through which blocks of the kernel meet. Calls of one program hand it on: two that run at the
        same time could keep each other's blocks from the GPU for ever.
      mesh, are_split: None, or a mesh, and for each x whether it and its weight's inputs lie over the mesh's tensor
        axis. Each device adds up its part, rounded to x's dtype; the sum over the axis, residual and norms follow.
      peers: None, or where the kernels of all devices find one another's memory (pallas_kernels/peers): they then make
        the sum, in float32, and all that follows. Up to 64 rows, for which there is room; by "mosaic" alone.
      num_rows: how many rows mean something, the first ones; the others need not be read or sent. None: all.
      implementation: "mosaic" (Hopper GPUs, bfloat16), "xla", or None for the faster one that takes the call.

    Returns:
      The new residual, a normalized copy for each norm, in the residual's dtype; and `meeting` for the next call.

    Raises:
      ValueError: shapes that do not fit, or an unknown `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    products = checked_products(xs, weights, biases, residual, norms)
    D = residual.shape[-1]
    if meeting is None:
        meeting = new_meeting(products[0].num_rows, D)
    elif meeting.size < (needed := meeting_size(products[0].num_rows, D)):
        raise ValueError(
            f"attention_norm: `meeting` holds {meeting.size} numbers; so many rows and outputs take {needed}"
        )
    if peers is not None:
        return _by_peers(
            xs, weights, biases, residual, norms, meeting, epsilon, mesh, are_split, peers, num_rows, implementation
        )
    if size_of(mesh) > 1:
        add = functools.partial(_add, num_outputs=residual.shape[-1], implementation=implementation)
        made = attention_norm_over(mesh, xs, weights, are_split, residual, norms, biases, epsilon, add)
        return *made, meeting
    candidates = {"mosaic": lambda: _mosaic_reason(products), "xla": lambda: None}
    candidates = in_order(products[0].num_rows, form_of(weights[0]), candidates)
    if dispatch.choose("attention_norm", implementation, candidates) == "xla":
        return *attention_norm_xla(xs, weights, biases, residual, norms, epsilon), meeting

    if products[0].num_rows > MAX_ROWS:
        from pallas_kernels.attention_norm.wide import attention_norm_wide

        rows = [x.reshape(-1, x.shape[-1]) for x in xs]
        out, normed, meeting = attention_norm_wide(
            rows, weights, biases, residual.reshape(-1, D), norms, meeting, epsilon=epsilon
        )
        return out.reshape(residual.shape), [x.reshape(residual.shape) for x in normed], meeting

    from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic

    out, normed, meeting = attention_norm_mosaic(
        [in_eights(x) for x in xs], weights, biases, in_eights(residual), norms, meeting,
        epsilon=epsilon, num_rows=products[0].num_rows if num_rows is None else num_rows,
    )  # fmt: skip

    back = functools.partial(_back, num_rows=products[0].num_rows, shape=residual.shape)
    return back(out), [back(x) for x in normed], meeting


def attention_norm_deferred(
    xs: Sequence[Float[Array, "R _"]],
    weights: Sequence[Any],
    residual: Float[Array, "R D"],
    norms: Sequence[Norm],
    *,
    biases: Sequence[Float[Array, " D"]] = (),
    epsilon: float,
    mesh: Mesh | None = None,
    are_split: Sequence[bool] = (),
    peers: Addresses | None = None,
    num_rows: int | None = None,
    integers: Integers | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "R D"], list[Any], deferred.Moments]:
    """`attention_norm` of up to 6 rows whose layer norms end in the `project` that reads them, so that no block of the
    kernel waits for another (quantized_matmul/deferred.py).

    Args:
      xs, residual: R = 8 rows, of which the last two mean nothing; D a multiple of 64.
      mesh: over several devices it takes `peers` too.
      integers: None, or as which integers the rows for norms are written, on one device. All else as of
        `attention_norm`.

    Returns:
      The new residual [8, D]; for each norm the x [8, D] of a product of `project`, IntegerRows if so asked; and that
      call's `moments`.

    Raises:
      ValueError: shapes that do not fit, or an unknown `implementation`.
      NotImplementedError: the named implementation cannot take these arguments.
    """
    products = checked_products(xs, weights, biases, residual, norms)
    if residual.ndim != 2 or residual.shape[0] != ROWS_AT_ONCE or residual.shape[1] % SIDE:
        wanted = f"{ROWS_AT_ONCE} rows of a multiple of {SIDE}"
        raise ValueError(f"attention_norm_deferred: a residual {residual.shape} should be {wanted}")
    if integers is not None and size_of(mesh) > 1:
        raise NotImplementedError("attention_norm_deferred: integers are made on one device")
    if peers is not None:
        return _by_peers(
            xs, weights, biases, residual, norms, None, epsilon, mesh, are_split, peers, num_rows, implementation
        )
    if size_of(mesh) > 1:
        raise NotImplementedError(f"attention_norm_deferred: over {size_of(mesh)} devices it takes `peers`")
    candidates = {"mosaic": lambda: _mosaic_reason(products), "xla": lambda: None}
    if dispatch.choose("attention_norm_deferred", implementation, candidates) == "xla":
        out, _ = attention_norm_xla(xs, weights, biases, residual, [], epsilon)
        rows, moments = deferred.begin(out, norms, epsilon)
        return out, rows if integers is None else [integers.of(x) for x in rows], moments

    from pallas_kernels.attention_norm.mosaic import defer_norm_mosaic

    return defer_norm_mosaic(
        xs, weights, biases, residual, norms, epsilon=epsilon, integers=integers, num_rows=num_rows
    )  # fmt: skip


def _by_peers(
    xs: Sequence[Array],
    weights: Sequence[Any],
    biases: Sequence[Array],
    residual: Array,
    norms: Sequence[Norm],
    meeting: Array | None,
    epsilon: float,
    mesh: Mesh | None,
    are_split: Sequence[bool],
    peers: Addresses,
    num_rows: int | None,
    implementation: str | None,
) -> Any:
    """`attention_norm`, or where there is no `meeting` `attention_norm_deferred`, whose kernels make the sum too."""
    from pallas_kernels.attention_norm.mosaic import attention_norm_mosaic, defer_norm_mosaic
    from pallas_kernels.peers.exchange import Exchange

    D, given = residual.shape[-1], math.prod(residual.shape[:-1])
    if peers.count != size_of(mesh) or peers.width != D or peers.num_rows < given + -given % ROWS_AT_ONCE:
        room = f"{peers.num_rows} rows of {peers.width} on {peers.count} devices"
        raise ValueError(f"attention_norm: mailboxes of {room} do not fit {given} of {D} on {size_of(mesh)}")
    num_rows = given if num_rows is None else num_rows
    exchange = Exchange.of(peers, num_rows)
    rest = list(biases), in_eights(residual), [tuple(norm) for norm in norms], meeting

    def on_device(xs: Sequence[Array], weights: Sequence[Any], table: Array, rest: Any) -> Any:
        products = [Product(x, weight, D) for x, weight in zip(xs, weights, strict=True)]
        candidates = {"mosaic": lambda: _sum_reason(products), "xla": lambda: "with `peers` kernels add up"}
        dispatch.choose("attention_norm", implementation or "mosaic", candidates)
        biases, residual, norms, meeting = rest
        begin = list(map(in_eights, xs)), weights, biases, residual, norms
        if meeting is None:
            return defer_norm_mosaic(*begin, epsilon=epsilon, exchange=exchange, table=table, num_rows=num_rows)
        return attention_norm_mosaic(
            *begin, meeting, epsilon=epsilon, exchange=exchange, table=table, num_rows=num_rows
        )  # fmt: skip

    made = by_peers(mesh, xs, weights, are_split, peers, rest, on_device)
    if meeting is None:
        return made
    out, normed, meeting = made
    back = functools.partial(_back, num_rows=given, shape=residual.shape)
    return back(out), [back(x) for x in normed], meeting


def _back(x: Array, num_rows: int, shape: tuple[int, ...]) -> Array:
    return x[:num_rows].reshape(shape)


def _add(xs: Sequence[Array], weights: Sequence[Any], *, num_outputs: int, implementation: str | None) -> Array:
    """What a device's products come to, rounded to x's dtype: [..., num_outputs]."""
    products = [Product(x, weight, num_outputs) for x, weight in zip(xs, weights, strict=True)]
    candidates = {"mosaic": lambda: _sum_reason(products), "xla": lambda: None}
    candidates = in_order(products[0].num_rows, form_of(weights[0]), candidates)
    if dispatch.choose("attention_norm", implementation, candidates) == "xla":
        return add_xla(products)

    from pallas_kernels.attention_norm.mosaic import add_mosaic

    made = add_mosaic([in_eights(x) for x in xs], weights, num_outputs, num_rows=products[0].num_rows)
    return made[: products[0].num_rows].reshape(*xs[0].shape[:-1], num_outputs)


def checked_products(
    xs: Sequence[Array], weights: Sequence[Any], biases: Sequence[Array], residual: Array, norms: Sequence[Norm]
) -> list[Product]:
    """What is added to the residual; raises ValueError where it does not fit it, or the norms do not."""
    if not norms or not xs or len(xs) != len(weights) or len(biases) not in (0, len(xs)):
        given = f"{len(xs)} inputs, {len(weights)} weights, {len(biases)} biases and {len(norms)} norms"
        raise ValueError(f"attention_norm: {given}; it takes as many of the first two, and at least one norm")
    D = residual.shape[-1]
    if any(x.shape[:-1] != residual.shape[:-1] for x in xs):
        raise ValueError(f"attention_norm: rows of {[x.shape for x in xs]} differ from the residual's {residual.shape}")
    if any(array.shape != (D,) for norm in norms for array in norm):
        raise ValueError(f"attention_norm: norms {[tuple(a.shape for a in norm) for norm in norms]} are not all ({D},)")
    every_bias = list(biases) or [None] * len(xs)
    products = [Product(x, weight, D, bias) for x, weight, bias in zip(xs, weights, every_bias, strict=True)]
    for product in products:
        product.check("attention_norm")
    return products


def _mosaic_reason(products: Sequence[Product]) -> str | None:
    return compat.mosaic_reason() or reason_against_products(products)


def _sum_reason(products: Sequence[Product]) -> str | None:
    if products[0].num_rows > MAX_ROWS:
        return f"over several devices it takes up to {MAX_ROWS} rows, not {products[0].num_rows}"
    return _mosaic_reason(products)
