"""Hugging Face's tensors and ours: one table of names, shapes and layouts, read in both directions.

Owns which tensors a Falcon has, what they are called in the wild, and how each is laid out on either side. Touches
no file. A linear map is [out, in] there and [in, out...] here. Their fused query_key_value has rows (K, G + 2, H),
of which the last two are the key's and the value's; here the three are apart.

The trap: the fused rows go by the number of key and value heads in effect (`FalconConfig.num_kv_heads`), never by
the one in config.json.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from falcon_jax.checkpoint.hf_files import Tensor, aligned_empty, parameter_dtype
from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError

PREFIX = "transformer."
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"

# Buffers that old exports carry and no model reads: rotary tables and attention masks.
IGNORED = re.compile(
    r"(transformer\.)?(h\.\d+\.self_attention\.)?(rotary|rotary_emb|maybe_rotary)\.(inv_freq|cos_cached|sin_cached)"
    r"|(transformer\.)?h\.\d+\.self_attention\.(masked_bias|causal_mask|attention_mask)"
)
_TRANSPOSE_ROWS = 64  # 5 GB/s on one core; a whole transpose by numpy makes 0.9


@dataclass(frozen=True)
class Part:
    """One of our arrays, and where its columns lie among the rows of their tensor."""

    path: str
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...] = ()  # (first row there, first column here, how many)


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs, and the one or three arrays of ours that it holds."""

    hf_name: str
    hf_shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool

    def from_hf(self, tensor: np.ndarray, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
        """Our arrays by path, of `dtype` (None: as it is). What needs no change is passed on, not copied.

        Raises:
          CheckpointError: a finite number is too large for `dtype`.
        """
        dtype = tensor.dtype if dtype is None else np.dtype(dtype)
        if not self.transposed:
            return {self.parts[0].path: self._cast(tensor, dtype).reshape(self.parts[0].shape)}
        rows = tensor.reshape(tensor.shape[0], -1)
        arrays = {}
        for part in self.parts:
            arrays[part.path] = aligned_empty(part.shape, dtype)
            columns = _bits(arrays[part.path]).reshape(rows.shape[1], -1)
            for there, here, count in _blocks(part):
                block = self._cast(rows[there : there + count], dtype)
                columns[:, here : here + count] = _bits(block).T
        return arrays

    def to_hf(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Their tensor: bit by bit what `from_hf` took apart, if that kept the dtype."""
        if not self.transposed:
            return np.ascontiguousarray(arrays[self.parts[0].path]).reshape(self.hf_shape)
        tensor = aligned_empty(self.hf_shape, arrays[self.parts[0].path].dtype)
        rows = _bits(tensor).reshape(self.hf_shape[0], -1)
        for part in self.parts:
            columns = _bits(np.ascontiguousarray(arrays[part.path])).reshape(rows.shape[1], -1)
            for there, here, count in _blocks(part):
                rows[there : there + count] = columns[:, here : here + count].T
        return tensor

    def _cast(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if values.dtype == dtype:
            return values
        with np.errstate(over="ignore"):
            narrowed = values.astype(dtype)
        if dtype == np.float16 and np.any(np.isinf(narrowed) & np.isfinite(values)):
            raise CheckpointError(f"{self.hf_name} holds numbers beyond float16's 65504: use bfloat16 or float32")
        return narrowed


@dataclass(frozen=True)
class Plan:
    """How one folder's tensors become a model's."""

    config: FalconConfig  # the folder's, with as many vocabulary rows as the embedding really has
    entries: tuple[Entry, ...]  # in the model's order, under the folder's own names
    tied_copy: tuple[str, str] | None  # names of a stored head and the embedding that it must equal
    ignored: tuple[str, ...]


def table(config: FalconConfig) -> tuple[Entry, ...]:
    """Every tensor of a Falcon in the model's order, under transformers' own names."""
    D, F, V = config.width, config.mlp_width, config.vocab_size
    N, H = config.num_heads, config.head_dim
    entries = [Entry(EMBEDDING, (V, D), (Part("embed.weight", (V, D)),), transposed=False)]
    for layer in range(config.num_layers):
        theirs, ours = f"{PREFIX}h.{layer}.", f"layers.{layer}."
        for hf_norm, norm in _norm_names(config):
            entries += _norm(theirs + hf_norm, ours + norm, D)
        entries += _fused(theirs + "self_attention.query_key_value", ours + "attention.", config)
        linears = (
            ("self_attention.dense", "attention.output", (N, H), (D,)),
            ("mlp.dense_h_to_4h", "mlp.up", (D,), (F,)),
            ("mlp.dense_4h_to_h", "mlp.down", (F,), (D,)),
        )
        for hf_linear, linear, inputs, outputs in linears:
            entries += _linear(theirs + hf_linear, ours + linear, inputs, outputs, config.bias)
    entries += _norm(f"{PREFIX}ln_f", "final_norm", D)
    if not config.tie_word_embeddings:
        entries += _linear(HEAD.removesuffix(".weight"), "lm_head", (D,), (V,), bias=False)
    return tuple(entries)


def plan(config: FalconConfig, tensors: Mapping[str, Tensor]) -> Plan:
    """Matches a folder's tensors with the table, under whichever of their names it uses.

    Raises:
      CheckpointError: a tensor is missing, not of this model, there twice, or of the wrong shape or type.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if IGNORED.fullmatch(name):
            continue
        canonical = name if name.startswith(PREFIX) or name == HEAD else PREFIX + name
        if canonical in found:
            raise CheckpointError(f"{tensor} is there twice, also as {found[canonical]}: remove one")
        found[canonical] = tensor
    config = _with_real_vocabulary(config, found)
    entries = table(config)
    known = {entry.hf_name for entry in entries} | {HEAD}
    _refuse_missing([entry for entry in entries if entry.hf_name not in found], found)
    _refuse_extra([tensor for canonical, tensor in found.items() if canonical not in known])
    for entry in entries:
        tensor = found[entry.hf_name]
        _check_shape(tensor, entry.hf_shape)
        parameter_dtype(tensor)
    tied_copy = None
    if config.tie_word_embeddings and HEAD in found:
        _check_shape(found[HEAD], (config.vocab_size, config.width))
        tied_copy = (found[HEAD].name, found[EMBEDDING].name)
    renamed = tuple(dataclasses.replace(entry, hf_name=found[entry.hf_name].name) for entry in entries)
    ignored = tuple(name for name in tensors if IGNORED.fullmatch(name))
    return Plan(config, renamed, tied_copy, ignored)


def shapes(config: FalconConfig) -> dict[str, tuple[int, ...]]:
    """Our arrays' shapes by path, in the model's order."""
    return {part.path: part.shape for entry in table(config) for part in entry.parts}


def _norm_names(config: FalconConfig) -> tuple[tuple[str, str], ...]:
    if config.num_norms == 1:
        return (("input_layernorm", "attention_norm"),)
    if config.block == "parallel":
        return (("ln_attn", "attention_norm"), ("ln_mlp", "mlp_norm"))
    return (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm"))


def _norm(theirs: str, ours: str, width: int) -> list[Entry]:
    names = (("weight", "scale"), ("bias", "bias"))
    return [
        Entry(f"{theirs}.{hf_name}", (width,), (Part(f"{ours}.{name}", (width,)),), transposed=False)
        for hf_name, name in names
    ]


def _linear(theirs: str, ours: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool) -> list[Entry]:
    num_in, num_out = int(np.prod(inputs)), int(np.prod(outputs))
    weight = Part(f"{ours}.weight", (*inputs, *outputs), ((0, 0, num_out),))
    entries = [Entry(f"{theirs}.weight", (num_out, num_in), (weight,), transposed=True)]
    if bias:
        entries.append(Entry(f"{theirs}.bias", (num_out,), (Part(f"{ours}.bias", outputs),), transposed=False))
    return entries


def _fused(theirs: str, ours: str, config: FalconConfig) -> list[Entry]:
    D, N, K, G, H = config.width, config.num_heads, config.num_kv_heads, config.num_groups, config.head_dim
    heads = {"query": N, "key": K, "value": K}
    runs: dict[str, list[tuple[int, int, int]]] = {name: [] for name in heads}
    for k in range(K):
        row = k * (G + 2) * H
        runs["query"].append((row, k * G * H, G * H))
        runs["key"].append((row + G * H, k * H, H))
        runs["value"].append((row + (G + 1) * H, k * H, H))
    rows = (K * (G + 2) * H,)

    def entry(kind: str, inputs: tuple[int, ...]) -> Entry:
        parts = tuple(
            Part(f"{ours}{name}.{kind}", (*inputs, number, H), tuple(runs[name])) for name, number in heads.items()
        )
        return Entry(f"{theirs}.{kind}", rows + inputs, parts, transposed=True)

    return [entry("weight", (D,))] + ([entry("bias", ())] if config.bias else [])


def _blocks(part: Part) -> Iterator[tuple[int, int, int]]:
    """The runs in pieces that stay in a core's cache while they are transposed."""
    for there, here, count in part.runs:
        for start in range(0, count, _TRANSPOSE_ROWS):
            yield there + start, here + start, min(_TRANSPOSE_ROWS, count - start)


def _bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which numpy moves faster than the types that it does not know itself."""
    return array.view(f"u{array.dtype.itemsize}")


def _with_real_vocabulary(config: FalconConfig, found: Mapping[str, Tensor]) -> FalconConfig:
    """Fine-tunes add rows to the table and leave vocab_size as it was; fewer rows than that is an error."""
    embedding = found.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[0] <= config.vocab_size:
        return config
    return dataclasses.replace(config, vocab_size=embedding.shape[0])


def _refuse_missing(missing: list[Entry], found: Mapping[str, Tensor]) -> None:
    if not missing:
        return
    names = _some([entry.hf_name for entry in missing])
    where = next((tensor.file.parent for tensor in found.values()), "the folder")
    hint = ""
    if [entry.hf_name for entry in missing] == [HEAD]:
        hint = "; if the head is the embedding, config.json must say tie_word_embeddings true"
    raise CheckpointError(f"{where}: missing {names}, which config.json calls for{hint}")


def _refuse_extra(extra: list[Tensor]) -> None:
    if extra:
        names = _some([tensor.name for tensor in extra])
        raise CheckpointError(
            f"{extra[0].file}: {names} belongs to no Falcon of this config.json: wrong file or wrong config.json"
        )


def _check_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(f"{tensor} has the wrong shape: config.json calls for {list(expected)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
