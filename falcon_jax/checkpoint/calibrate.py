"""Weights of few bits that are found on calibration text, one layer after the other.

Owns the rows of text, their hidden states, and the order in which a layer's projections are rounded: each sees what
the layers and projections before it make of the text once they are rounded. Knows nothing of folders in the making:
`convert` hands a layer over and stores what comes back. The rounding itself is quantized_matmul/calibrated.py.

The trap: memory. Beside one layer there are the hidden states of all rows, on the host, and on the device the hessians
of one stage: for the widest projection a few float32 arrays of its inputs squared (4.3 GB each at 32,768 inputs).
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError
from falcon_jax.model import layerwise, quantize
from falcon_jax.model.params import Params, unflatten
from falcon_jax.tokenizer import TOKENIZER_FILE, Tokenizer
from pallas_kernels.quantized_matmul import QuantizedWeight, dequantize, output_rows, quantize_calibrated

_MAX_CHARACTERS_PER_TOKEN = 16  # of ordinary text; how much of a long one is encoded
_BATCH_TOKENS = 8192  # through a layer at once
# Of one layer, in order: whose inputs are looked at, and what is rounded by them. What is rounded in one stage is in
# place when the inputs of the next are looked at.
_QKV = {"attention.query": ("attention.query", "attention.key", "attention.value")}
_OUTPUT, _UP, _DOWN = ({name: (name,)} for name in ("attention.output", "mlp.up", "mlp.down"))
_STAGES = {"parallel": (_QKV | _UP, _OUTPUT | _DOWN), "sequential": (_QKV, _OUTPUT, _UP, _DOWN)}


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """token_ids: whole rows. sha256: of the text file that they are from."""

    token_ids: Int32[np.ndarray, "R T"]
    sha256: str

    def record(self) -> dict[str, Any]:
        """What tells this text from another, for the settings of a conversion."""
        num_rows, row_tokens = self.token_ids.shape
        return {"text_sha256": self.sha256, "rows": num_rows, "row_tokens": row_tokens}


def read_text(
    path: str | os.PathLike[str], tokenizer_folder: Path, config: FalconConfig, max_rows: int, max_row_tokens: int
) -> CalibrationText:
    """Rows of the model's longest context, at most `max_row_tokens`, spread evenly over a text.

    A text with fewer than `max_rows` rows gives as many as it has; one shorter than a row gives all of itself.

    Raises:
      CheckpointError: the file cannot be read, is not UTF-8 or is empty; the folder has no tokenizer, or one with more
        ids than the model; or a number is not positive.
    """
    for name, number in {"calibration_rows": max_rows, "calibration_row_tokens": max_row_tokens}.items():
        if number < 1:
            raise CheckpointError(f"{name} is {number}; it must be at least 1")
    try:
        content = Path(path).expanduser().read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}: calibration takes a text file") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error.reason}): calibration takes a text file") from error
    if not (tokenizer_folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{tokenizer_folder} holds no {TOKENIZER_FILE}, without which calibration reads no text")
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    rows = _rows(text, tokenizer, max_rows, min(config.max_tokens, max_row_tokens))
    if not rows.size:
        raise CheckpointError(f"{path} is empty: calibration takes text like that which the model is to read")
    if rows.max() >= config.vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder / TOKENIZER_FILE} makes the id {rows.max()} of {path}, but the model has a vocab_size "
            f"of {config.vocab_size}"
        )
    return CalibrationText(rows, hashlib.sha256(content).hexdigest())


def _rows(text: str, tokenizer: Tokenizer, max_rows: int, row_tokens: int) -> Int32[np.ndarray, "R T"]:
    """No ids where the text has none."""
    row_characters = _MAX_CHARACTERS_PER_TOKEN * row_tokens
    if len(text) > max_rows * row_characters:
        starts = np.linspace(0, len(text) - row_characters, max_rows).astype(int)
        rows = [tokenizer.encode(text[start : start + row_characters])[:row_tokens] for start in starts]
        whole = [row for row in rows if len(row) == row_tokens]
        if whole:
            return np.asarray(whole, np.int32)
    ids = np.asarray(tokenizer.encode(text), np.int32)
    row_tokens = min(row_tokens, len(ids))
    num_rows = min(max_rows, len(ids) // max(row_tokens, 1))
    starts = np.linspace(0, len(ids) - row_tokens, num_rows).astype(int)
    return ids[starts[:, None] + np.arange(row_tokens)]


class LayerCalibration:
    """The rows on their way through the layers, which are handed over in order.

    Args:
      embedding: as it is stored, in 8 bits.
      weights: "int8" or "int4".
      dtype: that the layers are run in.
    """

    def __init__(
        self,
        config: FalconConfig,
        embedding: QuantizedWeight,
        token_ids: Int32[np.ndarray, "R T"],
        weights: str,
        dtype: np.dtype,
    ):
        self._config = config
        self._weights = weights
        self._dtype = dtype
        most = max(1, _BATCH_TOKENS // token_ids.shape[1])
        num_rows = next(size for size in range(most, 0, -1) if len(token_ids) % size == 0)
        table = QuantizedWeight(*map(jnp.asarray, embedding))
        batches = np.split(token_ids, len(token_ids) // num_rows)
        self._batches = [np.asarray(_token_vectors(table, rows, config.width, dtype)) for rows in batches]

    def quantize(self, layer: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rounds a layer's projections, and takes the rows through it.

        Args:
          arrays: the layer's own, native, by path.

        Returns:
          The same with the projections in few bits.

        Raises:
          CheckpointError: the layer makes numbers of the text that are not finite.
        """
        params = {path: jnp.asarray(array, self._dtype) for path, array in arrays.items()}
        made: dict[str, np.ndarray] = {}
        for stage in _STAGES[self._config.block]:
            hessians = self._hessians(layer, params, stage)
            for looked_at, projections in stage.items():
                hessian = hessians.pop(looked_at)
                for path in (f"layers.{layer}.{projection}.weight" for projection in projections):
                    matrix = arrays[path].reshape(quantize.matrix_shape(path, arrays[path].shape))
                    weight = quantize_calibrated(jnp.asarray(matrix), hessian, self._weights)
                    params[path] = self._native(path, weight, arrays[path].shape)
                    made |= quantize.named(path, QuantizedWeight(*map(np.asarray, weight)))
        self._advance(layer, params)
        return {path: array for path, array in arrays.items() if f"{path}.values" not in made} | made

    def skip(self, layer: int, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Takes the rows through a layer that was rounded before.

        Args:
          arrays: what `quantize` returned for it.
          shapes: of its native arrays, by path.
        """
        params = {}
        for path, shape in shapes.items():
            if quantize.form_of(path, self._weights) != "native":
                weight = QuantizedWeight(*(jnp.asarray(arrays[f"{path}.{part}"]) for part in QuantizedWeight._fields))
                params[path] = self._native(path, weight, shape)
            else:
                params[path] = jnp.asarray(arrays[path], self._dtype)
        self._advance(layer, params)

    def _hessians(self, layer: int, params: Mapping[str, Array], looked_at: Iterable[str]) -> dict[str, Array]:
        """Of the inputs of those projections, over all rows."""
        sums: dict[str, Array] = {}
        for name in looked_at:
            path = f"layers.{layer}.{name}.weight"
            num_inputs, _ = quantize.matrix_shape(path, params[path].shape)
            sums[name] = jnp.zeros((num_inputs, num_inputs), jnp.float32)
        for hidden in self._batches:
            _, sums = layerwise.run(self._config, _tree(layer, params), hidden, sums)
        for name, hessian in sums.items():
            if not np.isfinite(jnp.trace(hessian)):
                raise CheckpointError(
                    f"layer {layer}: {name} is given numbers on the calibration text that are not finite in "
                    f"{self._dtype}: convert with another dtype"
                )
        return sums

    def _advance(self, layer: int, params: Mapping[str, Array]) -> None:
        for number, hidden in enumerate(self._batches):
            self._batches[number] = np.asarray(layerwise.run(self._config, _tree(layer, params), hidden, {})[0])

    def _native(self, path: str, weight: QuantizedWeight, shape: tuple[int, ...]) -> Array:
        """What a weight stands for, as a native layer has it."""
        return _dequantized(weight, quantize.matrix_shape(path, shape), self._dtype).reshape(shape)


def _tree(layer: int, params: Mapping[str, Array]) -> Params:
    return unflatten(params)["layers"][layer]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _token_vectors(
    table: QuantizedWeight, token_ids: Int32[Array, "R T"], width: int, dtype: np.dtype
) -> Float[Array, "R T D"]:
    return output_rows(table, token_ids)[..., :width].astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantized(weight: QuantizedWeight, shape: tuple[int, int], dtype: np.dtype) -> Array:
    return dequantize(weight, *shape).astype(dtype)
