"""The Falcon decoder, one module for every published variant.

Sequential blocks (RW):     h = x + attention(norm_1(x));  y = h + mlp(norm_2(h))
Parallel blocks (the rest): y = (mlp(norm_m(x)) + attention(norm_a(x))) + x, where norm_m is norm_a or a second norm

Source: Almazrouei et al., The Falcon Series of Open Language Models (2023), and modeling_falcon.py of transformers,
whose order of additions and roundings is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from falcon_jax.config import FalconConfig
from falcon_jax.model import quantize, stages
from falcon_jax.model.attention import Attention
from falcon_jax.model.cache import KVCache
from falcon_jax.model.embedding import Embedding, gathered
from falcon_jax.model.linear import LayerNorm, Linear, Quantized, apart, apart_backward, multiply
from falcon_jax.model.peers import Peers
from falcon_jax.model.step import ForwardOptions, Step, spans
from pallas_kernels.quantized_matmul import (
    Product,
    QuantizedWeight,
    dequantize,
    exact_gelu,
    project,
    quantized_matmul,
    size_of,
)

__all__ = ["FalconDecoder", "ForwardOptions"]


class MLP(nnx.Module):
    """Up, exact GELU (erf, not tanh), down."""

    def __init__(self, config: FalconConfig, weights: str):
        self.up = Linear((config.width,), (config.mlp_width,), bias=config.bias, weights=weights)
        self.down = Linear((config.mlp_width,), (config.width,), bias=config.bias, weights=weights)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(exact_gelu(self.up(x)))


class Block(nnx.Module):
    """One layer: attention and MLP, one after the other or side by side."""

    def __init__(self, config: FalconConfig, weights: str):
        self.parallel = config.block == "parallel"
        self.dropout_rate = config.hidden_dropout
        self.has_mlp_norm = config.num_norms == 2
        self.attention_norm = LayerNorm(config.width, epsilon=config.norm_epsilon)
        if self.has_mlp_norm:
            self.mlp_norm = LayerNorm(config.width, epsilon=config.norm_epsilon)
        self.attention = Attention(config, weights)
        self.mlp = MLP(config, weights)

    def __call__(
        self, x: Float[Array, "B T D"], step: Step, slots: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        normed = self.attention_norm(x)
        normed, for_attention = apart(normed, 2)
        attended, slots = self.attention(for_attention, step, slots)
        if not self.parallel:
            x = self._dropout(attended, step, 0) + x
            return self._dropout(self.mlp(self.mlp_norm(x)), step, 1) + x, slots
        if self.has_mlp_norm:
            normed = self.mlp_norm(x)
        return self._dropout(apart_backward(self.mlp(normed)) + attended, step, 0) + x, slots

    def _dropout(self, x: Array, step: Step, place: int) -> Array:
        """Zeroes what a block adds to the residual, entry by entry with the configured probability, in training."""
        if step.dropout_keys is None or self.dropout_rate == 0.0:
            return x
        keys = jax.vmap(jax.random.fold_in, (0, None))(step.dropout_keys, place)
        # A row at a time, so that what is drawn for it depends on no other row. 16 random bits decide well enough, and
        # making them costs half of what 32 do.
        drawn = jax.lax.map(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16), keys)
        kept = drawn >= round(self.dropout_rate * 2**16)
        return jnp.where(kept, x / (1.0 - self.dropout_rate), 0).astype(x.dtype)


class Ends(nnx.Module):
    """What is before and after the blocks: embedding, final norm and head. Built without arrays, as FalconDecoder.

    implementation: of a head in few bits, as `quantized_matmul.project` has it.
    """

    def __init__(
        self, config: FalconConfig, mesh: Mesh | None, weights: str = "native", implementation: str | None = None
    ):
        self.config = config
        self.mesh = mesh
        self._implementation = implementation
        self.embed = Embedding(config, mesh, weights)
        self.final_norm = LayerNorm(config.width, epsilon=config.norm_epsilon)
        if not config.tie_word_embeddings:
            form = quantize.form_of(quantize.HEAD, weights)
            self.lm_head = Linear((config.width,), (config.vocab_size,), bias=False, weights=form)

    @property
    def dtype(self) -> jnp.dtype:
        """The model's: that of all parameters but weights in few bits."""
        return self.final_norm.scale.dtype

    def token_vectors(self, token_ids: Int[Array, "B T"], peers: Peers | None = None) -> Float[Array, "B T D"]:
        """What goes into the first block."""
        return self.embed(token_ids, self.dtype, None if peers is None else peers.rows)

    def logits(self, hidden: Float[Array, "*batch D"], peers: Peers | None = None) -> Float[Array, "*batch V"]:
        """Float32 logits of hidden states: the product in the parameters' dtype with float32 accumulation.

        Where the vocabulary is split over a mesh, so are they; with `peers` all devices have them whole. Not
        differentiable where the head is in few bits and a kernel takes it; `head` is another way.
        """
        with jax.named_scope("logits"):
            head, is_transposed = self._head()
            if isinstance(head, QuantizedWeight):
                made = self._logits_of_few_bits(hidden, head)
            else:
                made = multiply(hidden, head, transposed=is_transposed, dtype=jnp.float32)
            if peers is None or not self.embed.is_split:
                return made
            return gathered(made, self.mesh, peers.logits)

    def _logits_of_few_bits(self, hidden: Float[Array, "*batch D"], head: QuantizedWeight) -> Float[Array, "*batch V"]:
        V = self.config.vocab_size
        rows = hidden.reshape(-1, hidden.shape[-1])
        # Over axes that split rows, XLA alone knows which rows a device has.
        if self.mesh is not None and self.mesh.size > size_of(self.mesh):
            made = quantized_matmul(rows, head, V, dtype="float32", implementation="xla")
        else:
            product = Product(rows, head, V, is_split=self.embed.is_split, dtype="float32")
            [made] = project([product], mesh=self.mesh, implementation=self._implementation)
        return made.reshape(*hidden.shape[:-1], V)

    def head(self) -> tuple[Float[Array, "V D"] | Float[Array, "D V"], bool]:
        """The matrix of the head, and whether it is [V, D] (the embedding's own) rather than [D, V]. Of one in few bits
        what it stands for, in the model's dtype."""
        head, is_transposed = self._head()
        if isinstance(head, QuantizedWeight):
            head = dequantize(head, self.config.width, self.config.vocab_size).astype(self.dtype)
            return head, False
        return head, is_transposed

    def _head(self) -> tuple[Array | QuantizedWeight, bool]:
        """As it is stored; of one in few bits, a weight [D, V] in either case, the second means nothing."""
        is_tied = self.config.tie_word_embeddings
        weight = (self.embed if is_tied else self.lm_head).weight
        return (weight.arrays() if isinstance(weight, Quantized) else weight[...]), is_tied


class FalconDecoder(Ends):
    """Embedding, L blocks, final norm and head. Built without arrays; get a working one from `params.bind`.

    weights: what the blocks' projections are stored as, one of quantize.WEIGHTS, which says what the rest is.
    """

    def __init__(
        self, config: FalconConfig, options: ForwardOptions, mesh: Mesh | None = None, weights: str = "native"
    ):
        super().__init__(config, mesh, weights, "xla" if options.stages == "xla" else None)
        self.options = options
        self.weights = weights
        self.layers = nnx.List([Block(config, weights) for _ in range(config.num_layers)])
        self.has_adapters = False  # see adapters.bind

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        num_tokens: Int[Array, " B"] | None = None,
        cache_is_empty: bool = False,
        peers: Peers | None = None,
        norm_sums: Sequence[stages.NormSums] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The final hidden states of T tokens a row, and the cache that now holds them.

        Args:
          token_ids: rows padded on the right; padding may be any valid id.
          cache: what the rows hold already; row b's tokens continue at position cache.lengths[b]. None starts at 0
            and keeps nothing.
          num_tokens: how many of each row's T tokens are real; None means all.
          cache_is_empty: the caller knows that no row holds anything yet (static): attention then reads the T new keys
            and not the whole cache.
          peers: how kernels on the devices of the mesh reach each other's memory, for up to 64 tokens in all; None: XLA
            adds up what the devices make.
          norm_sums: as `stages.run` has them; nothing else reads them.

        Returns:
          Hidden states [B, T, D] in the parameters' dtype (at padding: finite, meaningless) and the cache with each
          row's length advanced by num_tokens, None where none came in.
        """
        B, T = token_ids.shape
        offsets, ends = spans(cache, B, T, num_tokens)
        read = None if cache_is_empty else cache
        step = Step.begin(self.config, self.options, T, offsets, ends, read, self.mesh)

        x = self.token_vectors(token_ids, peers)
        if cache is not None and self._takes_stages(B * T, cache_is_empty):
            rows = None if peers is None else peers.rows
            x, kept = stages.run(self, x, step, cache, self.options.stages, rows, norm_sums)
            keys, values = zip(*kept, strict=True)
            return x, KVCache(keys, values, ends)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            slots = None if cache is None else (cache.keys[i], cache.values[i])
            with jax.named_scope(f"layer_{i}"):
                x, slots = block(x, step, slots)
            if slots is not None:
                keys.append(slots[0])
                values.append(slots[1])
        x = self.final_norm(x)
        return x, None if cache is None else KVCache(tuple(keys), tuple(values), ends)

    def _takes_stages(self, num_tokens: int, cache_is_empty: bool) -> bool:
        """Whether so many tokens go through the fused stages.

        Raises:
          NotImplementedError: the options ask for the kernels by name, and they cannot run here.
        """
        asked = self.options.stages
        if asked == "xla":
            return False
        if asked is None and not stages.pays(self.weights, num_tokens, cache_is_empty):
            return False
        reason = "the model has adapters" if self.has_adapters else stages.reason_against(self, num_tokens)
        if reason is not None and asked is not None:
            raise NotImplementedError(f"stages={asked!r} cannot run here: {reason}")
        return reason is None

    def attention_probabilities(self, token_ids: Int[Array, "B T"], layer: int) -> Float[Array, "B N T T"]:
        """What each query of `layer` (0 .. L-1) gives to each key, in float32."""
        B, T = token_ids.shape
        offsets, ends = spans(None, B, T, None)
        step = Step.begin(self.config, self.options, T, offsets, ends, mesh=self.mesh)
        x = self.token_vectors(token_ids)
        for block in list(self.layers)[:layer]:
            x, _ = block(x, step, None)
        block = self.layers[layer]
        return block.attention.probabilities(block.attention_norm(x), step)
