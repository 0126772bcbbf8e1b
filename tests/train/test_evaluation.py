"""Windows as literal numbers, and scores against float64 numpy on whole documents."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_jax.config import FalconConfig, Rope
from falcon_jax.errors import ConfigError
from falcon_jax.model import params as model_params
from falcon_jax.model.decoder import ForwardOptions
from falcon_jax.train.data import tokenize_corpus
from falcon_jax.train.evaluation import Score, cut_windows, evaluate, lower_ahead
from falcon_jax.train.shards import Split
from falcon_jax.train.step import StepOptions, make_eval_step
from tests import models
from tests.compilations import count_compilations
from tests.train import toys

TWO_DOCUMENTS = Split.of(np.asarray([0, 1, 2, 3, 4, 5, 0, 6, 7], np.uint16), np.asarray([0, 6]), 7)


def targets_of(split: Split, length: int, stride: int) -> list[int]:
    windows = cut_windows(split, length, stride)
    tokens, counts, skips = windows.batch(0, len(windows))
    return [int(target) for row, count, skip in zip(tokens, counts, skips) for target in row[1 + skip : 1 + count]]


def test_windows_without_overlap_stay_in_their_document() -> None:
    windows = cut_windows(TWO_DOCUMENTS, 2)
    tokens, counts, skips = windows.batch(0, 5)
    np.testing.assert_array_equal(tokens, [[0, 1, 2], [2, 3, 4], [4, 5, 0], [0, 6, 7], [0, 0, 0]])
    np.testing.assert_array_equal(counts, [2, 2, 1, 2, 0])
    np.testing.assert_array_equal(skips, 0)


def test_sliding_windows_count_what_the_one_before_did_not() -> None:
    windows = cut_windows(TWO_DOCUMENTS, 3, 2)
    tokens, counts, skips = windows.batch(0, 3)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 3], [2, 3, 4, 5], [0, 6, 7, 0]])
    np.testing.assert_array_equal(counts, [3, 3, 2])
    np.testing.assert_array_equal(skips, [0, 1, 0])
    assert windows.num_targets == 7


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), length=st.integers(1, 50), data=st.data())
def test_every_token_is_counted_once(sizes: list[int], length: int, data: st.DataObject) -> None:
    sizes = [*sizes, 1]
    stride = data.draw(st.integers(1, length))
    documents = [np.arange(size + 1) + 100 * number for number, size in enumerate(sizes)]
    starts = np.cumsum([0, *map(len, documents[:-1])])
    split = Split.of(np.concatenate(documents).astype(np.uint16), starts, 1)
    assert targets_of(split, length, stride) == [token for document in documents for token in document[1:].tolist()]


@pytest.mark.parametrize(("length", "stride"), [(4, 5), (4, 0)])
def test_a_stride_beyond_the_window_is_refused(length: int, stride: int) -> None:
    with pytest.raises(ConfigError, match=f"stride is {stride} and length {length}"):
        cut_windows(TWO_DOCUMENTS, length, stride)


def test_scores_are_those_of_numpy_at_any_length_and_stride(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, model_config: FalconConfig
) -> None:
    split = tokenize_corpus(corpus, tokenizer_folder, tmp_path)["valid"]
    params = models.random_params(model_config)
    # Within the trained length of 64, and beyond it.
    shapes = [(16, 16), (16, 5), (100, 100)]
    scores = list(evaluate(model_config, params, split, shapes, dtype="float32", batch_tokens=300, progress=False))
    assert [(score.length, score.stride) for score in scores] == shapes
    for score in scores:
        expected = toys.numpy_nats(model_config, params, split, score.length, score.stride)
        assert score.nats == pytest.approx(expected, rel=1e-5)
        assert score.num_tokens == len(split.tokens) - 2
        assert score.bits_per_byte == pytest.approx(expected / math.log(2) / split.num_bytes, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(expected / score.num_tokens), rel=1e-4)


def test_programs_compiled_ahead_are_those_that_run(model_config: FalconConfig) -> None:
    device = jax.devices()[0]
    params = jax.device_put(models.random_params(model_config), device)
    layout = jax.sharding.SingleDeviceSharding(device)
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), params)
    # Two strides of one length share a program.
    shapes, settings = [(3, 3), (5, 5), (5, 2)], {"dtype": "float32", "batch_tokens": 7}
    programs = list(lower_ahead(model_config, described, TWO_DOCUMENTS, shapes, **settings))
    assert len(programs) == 2
    for program in programs:
        program.compile()
    with count_compilations() as compiled:
        scores = list(evaluate(model_config, params, TWO_DOCUMENTS, shapes, **settings, progress=False))
    assert len(scores) == 3 and compiled == []


def test_padding_does_not_change_the_angles_of_dynamic_rope() -> None:
    rope = Rope(scaling="dynamic", factor=2.0, original_max_tokens=8)
    config = models.tiny("falcon-7b", num_layers=1, max_tokens=8, rope=rope)
    params = models.random_params(config)
    step = make_eval_step(config, StepOptions(compute_dtype="float32"), ForwardOptions())
    rows = np.arange(42, dtype=np.uint16).reshape(2, 21)
    padded = step(params, rows, np.asarray([12, 20], np.int32))
    alone = step(params, rows[:1, :13], np.asarray([12], np.int32))
    np.testing.assert_allclose(padded[0, :12], alone[0], rtol=1e-5)


def test_what_cannot_be_scored_is_refused(model_config: FalconConfig) -> None:
    params = model_params.abstract(model_config, jnp.float32)
    for split, batch_tokens, message in (
        (Split.of(np.asarray([0, 999]), np.asarray([0]), 1), 8, "token 999, and the model has a vocab_size of 296"),
        (Split.of(np.asarray([0, 0]), np.asarray([0, 1]), 0), 8, "the text is empty"),
        (Split.of(np.zeros(0, np.int32), np.zeros(0, np.int64), 0), 8, "the text is empty"),
        (TWO_DOCUMENTS, 0, "batch_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(evaluate(model_config, params, split, [(8, 8)], batch_tokens=batch_tokens, progress=False))


def test_a_score_that_outgrows_a_float_is_null_in_json() -> None:
    score = Score(8, 8, nats=1e5, num_tokens=10, num_bytes=20)
    assert score.perplexity == math.inf
    assert score.record()["perplexity"] is None
    assert Score(8, 2, math.nan, 1, 1).record()["bits_per_byte"] is None
