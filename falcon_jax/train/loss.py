"""Cross-entropy a piece of the tokens at a time, its gradient made on the way forward.

float32 logits of a whole batch would outgrow everything else on the device. Each piece's logits are made once: while
they exist, so do their softmax and with it the gradients of the hidden states and of the head. Made again in the
backward pass, as rematerialization would, the head's product would be computed a fourth time.

Source: the fused linear cross-entropy of Hsu et al., Liger Kernel (2024), here in plain JAX; the z-loss is that of
Chowdhery et al., PaLM (2022), section 5.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from falcon_jax.model.linear import multiply


class LossSums(NamedTuple):
    """Sums over real targets, float32: of nats, and of the squared logarithms of the softmax's denominators."""

    nats: Float[Array, ""]
    squares: Float[Array, ""]


def cross_entropy(
    logits: Float[Array, "... V"], targets: Integer[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Nats of each target, and the log of each softmax denominator (for the z-loss), both float32."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    # A sum over one column, and no lookup: the vocabulary may be split over devices.
    chosen = jnp.where(_is_target(logits, targets), logits, 0.0).sum(-1)
    return log_total - chosen, log_total


def _is_target(logits: Array, targets: Array) -> Bool[Array, "... V"]:
    return jnp.arange(logits.shape[-1], dtype=jnp.int32) == targets[..., None]


def token_nats(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    is_transposed: bool,
    targets: Integer[Array, "R T"],
    chunk_tokens: int,
) -> Float[Array, "R T"]:
    """Nats of each target, float32. Not for differentiation.

    Args:
      head: [V, D] if `is_transposed`, else [D, V].
      chunk_tokens: how many tokens' logits exist at once.
    """
    pieces = _pieces(hidden, targets, jnp.ones(targets.shape, bool), chunk_tokens)

    def of_piece(piece: tuple[Array, Array, Array]) -> Array:
        return cross_entropy(multiply(piece[0], head, transposed=is_transposed, dtype=jnp.float32), piece[1])[0]

    return jax.lax.map(of_piece, pieces).reshape(-1)[: targets.size].reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 5, 6))
def loss_sums(
    hidden: Float[Array, "R T D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    is_transposed: bool,
    targets: Integer[Array, "R T"],
    is_real: Bool[Array, "R T"],
    z_loss: float,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], LossSums]:
    """(nats + z_loss * squared log denominators summed over the real targets, the two sums apart).

    Differentiable in `hidden` and `head` through the first result; the sums apart are for reading and give no gradient.
    Arguments as for `token_nats`.
    """
    pieces = _pieces(hidden, targets, is_real, chunk_tokens)

    def add(sums: LossSums, piece: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, is_real = piece
        logits = multiply(hidden, head, transposed=is_transposed, dtype=jnp.float32)
        return _added(sums, *cross_entropy(logits, targets), is_real), None

    sums, _ = jax.lax.scan(add, _no_sums(), pieces)
    return sums.nats + z_loss * sums.squares, sums


def _forward(hidden, head, is_transposed, targets, is_real, z_loss, chunk_tokens):
    pieces = _pieces(hidden, targets, is_real, chunk_tokens)
    # Contracts the tokens of a piece: [n, V], [n, D] -> [V, D], or the other way round.
    over_tokens = (((0,), (0,)), ((), ()))

    def add(carry: tuple[LossSums, Array], piece: tuple[Array, Array, Array]):
        sums, head_gradient = carry
        hidden, targets, is_real = piece
        logits = multiply(hidden, head, transposed=is_transposed, dtype=jnp.float32)
        nats, log_total = cross_entropy(logits, targets)
        probabilities = jnp.exp(logits - log_total[:, None])
        slope = probabilities * (1 + 2 * z_loss * log_total)[:, None] - _is_target(logits, targets)
        slope = jnp.where(is_real[:, None], slope, 0.0).astype(hidden.dtype)  # [n, V]
        sides = (slope, hidden) if is_transposed else (hidden, slope)
        head_gradient += jax.lax.dot_general(*sides, over_tokens, preferred_element_type=jnp.float32)
        hidden_gradient = multiply(slope, head, transposed=not is_transposed)
        return (_added(sums, nats, log_total, is_real), head_gradient), hidden_gradient

    start = _no_sums(), jnp.zeros(head.shape, jnp.float32)
    (sums, head_gradient), by_piece = jax.lax.scan(add, start, pieces)
    hidden_gradient = by_piece.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    kept = hidden_gradient, head_gradient, jnp.zeros((), head.dtype)
    return (sums.nats + z_loss * sums.squares, sums), kept


def _backward(is_transposed, z_loss, chunk_tokens, kept, cotangents):
    hidden_gradient, head_gradient, like_head = kept
    scale = cotangents[0]
    # After the sums: a mean's share would be too small for float16.
    by_hidden = (hidden_gradient * scale).astype(hidden_gradient.dtype)
    return by_hidden, (head_gradient * scale).astype(like_head.dtype), None, None


loss_sums.defvjp(_forward, _backward)


def _no_sums() -> LossSums:
    zero = jnp.zeros((), jnp.float32)
    return LossSums(zero, zero)


def _added(sums: LossSums, nats: Array, log_total: Array, is_real: Array) -> LossSums:
    return LossSums(
        sums.nats + jnp.where(is_real, nats, 0.0).sum(),
        sums.squares + jnp.where(is_real, log_total**2, 0.0).sum(),
    )


def _pieces(hidden: Array, targets: Array, is_real: Array, chunk_tokens: int) -> tuple[Array, Array, Array]:
    """Hidden states [pieces, n, D], targets and whether they are real [pieces, n]; the last one filled up."""
    size = targets.size
    chunk = min(chunk_tokens, size)
    padding = -size % chunk

    def split(array: Array) -> Array:
        flat = array.reshape(size, *array.shape[2:])
        padded = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(-1, chunk, *flat.shape[1:])

    return split(hidden), split(targets), split(is_real)
