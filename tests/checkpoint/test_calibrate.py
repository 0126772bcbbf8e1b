"""Conversions whose weights of few bits are found on calibration text."""

import json

import numpy as np
import pytest

import falcon_jax
from falcon_jax.checkpoint import CheckpointError, load
from falcon_jax.checkpoint.calibrate import LayerCalibration, read_text
from falcon_jax.checkpoint.convert import Conversion
from falcon_jax.checkpoint.manifest import Manifest
from falcon_jax.model import params as model_params
from falcon_jax.tokenizer import Tokenizer
from falcon_jax.train.final import write_model
from tests import commands, hf_models
from tests.models import random_params, tiny

VOCAB_SIZE = 320  # of hf_models.tiny_tokenizer
TEXT = "The lighthouse keeper said to the lamp that the sea was grey, and the gulls had counted 10 boats. " * 12


def write_source(folder, variant="falcon-40b"):
    """A Hugging Face folder of two random layers, with a tokenizer."""
    config = tiny(variant, vocab_size=VOCAB_SIZE, initializer_range=0.15)
    hf_models.tiny_tokenizer(folder / "tokenizer")
    write_model(config, random_params(config), folder / "hf", folder / "tokenizer", dtype="float32")
    return folder / "hf"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def calibrated(source, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "out"
    return falcon_jax.convert(source, out, weights="int4", calibration=text, progress=False)


def arrays_of(folder, weights="int4"):
    return {path: np.asarray(leaf) for path, leaf in model_params.flatten(load(folder, weights=weights).params).items()}


def logits(folder, ids, weights):
    return falcon_jax.Falcon.from_checkpoint(folder, dtype="float32", weights=weights).logits(ids)


def errors_of_logits(source, calibrated):
    """On a text that was not calibrated on: with calibrated codes, with the nearest ones."""
    ids = [
        Tokenizer.from_folder(source).encode("And the keeper counted the gulls; the lamp was grey that evening.")[:24]
    ]
    exact = logits(source, ids, "native")
    return [float(np.linalg.norm(logits(folder, ids, "int4") - exact)) for folder in (calibrated, source)]


def test_logits_of_parallel_blocks_are_closer_than_with_the_nearest_codes(source, calibrated):
    found, nearest = errors_of_logits(source, calibrated)
    assert found < 0.8 * nearest


def test_logits_of_sequential_blocks_with_biases_are_too(text, tmp_path):
    source = write_source(tmp_path, "falcon-rw-1b")
    out = falcon_jax.convert(source, tmp_path / "out", weights="int4", calibration=text, progress=False)
    found, nearest = errors_of_logits(source, out)
    assert found < 0.8 * nearest


def test_all_but_the_projections_is_what_it_would_be_without(source, calibrated):
    nearest, found = arrays_of(source), arrays_of(calibrated)
    assert list(found) == list(nearest)
    for path, array in nearest.items():
        assert (found[path].shape, found[path].dtype) == (array.shape, array.dtype)
        if path.startswith("layers.") and ".weight." in path:
            assert path.endswith("scales") or not np.array_equal(found[path], array), path
        else:
            np.testing.assert_array_equal(found[path], array)


def test_eight_bits_take_calibration_too(source, text, tmp_path):
    out = falcon_jax.convert(source, tmp_path / "out", weights="int8", calibration=text, progress=False)
    nearest, found = arrays_of(source, "int8"), arrays_of(out, "int8")
    path = "layers.0.mlp.down.weight"
    np.testing.assert_array_equal(found[f"{path}.scales"], nearest[f"{path}.scales"])
    assert not np.array_equal(found[f"{path}.values"], nearest[f"{path}.values"])


def test_the_manifest_says_how_the_weights_were_found(source, calibrated, text, tmp_path):
    manifest = Manifest.read(calibrated)
    assert manifest.calibrated
    tokens = len(Tokenizer.from_folder(source).encode(TEXT))
    recorded = manifest.settings["calibration"]
    assert (recorded["rows"], recorded["row_tokens"]) == (tokens // 64, 64)
    assert len(recorded["text_sha256"]) == 64
    assert not Manifest.read(falcon_jax.convert(source, tmp_path / "out", weights="int4", progress=False)).calibrated


@pytest.mark.parametrize("kept_lines", [None, -1], ids=["a layer missing", "a layer stored in part"])
def test_interrupted_it_goes_on_at_the_first_unfinished_layer(
    kept_lines, source, calibrated, text, tmp_path, monkeypatch
):
    original, quantized = LayerCalibration.quantize, []

    def quantize(self, layer, arrays):
        if kept_lines is None and layer == 1:
            raise KeyboardInterrupt
        return original(self, layer, arrays)

    def finish(*arguments):
        raise KeyboardInterrupt

    def convert(**changes):
        arguments = {"weights": "int4", "calibration": text, "progress": False} | changes
        return falcon_jax.convert(source, tmp_path / "out", **arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerCalibration, "quantize", quantize)
        patch.setattr(Conversion, "finish", finish)
        convert()
    journal = tmp_path / "out" / "unfinished" / "journal.jsonl"
    if kept_lines is not None:  # as when the process is killed while it writes the layer's lines
        content = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(content[:kept_lines]) + content[-1][:20])
    for changes in ({"calibration": None}, {"calibration_rows": 1}):
        with pytest.raises(CheckpointError, match="unfinished conversion with another calibration"):
            convert(**changes)

    def counted(self, layer, arrays):
        quantized.append(layer)
        return original(self, layer, arrays)

    monkeypatch.setattr(LayerCalibration, "quantize", counted)
    convert()
    assert quantized == [1]
    for path, array in arrays_of(calibrated).items():
        np.testing.assert_array_equal(arrays_of(tmp_path / "out")[path], array)


def test_a_finished_layer_that_was_damaged_is_found_before_going_on(source, text, tmp_path, monkeypatch):
    def quantize(self, layer, arrays, original=LayerCalibration.quantize):
        if layer == 1:
            raise KeyboardInterrupt
        return original(self, layer, arrays)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerCalibration, "quantize", quantize)
        falcon_jax.convert(source, tmp_path / "out", weights="int4", calibration=text, progress=False)
    path = tmp_path / "out" / "unfinished" / "params" / "layers.0.mlp.up.weight.values" / "0.0.0"
    damaged = bytearray(path.read_bytes())
    damaged[5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up\.weight\.values is damaged"):
        falcon_jax.convert(source, tmp_path / "out", weights="int4", calibration=text, progress=False)


def test_rows_are_whole_and_spread_over_the_text(source, text):
    config = tiny("falcon-40b", vocab_size=VOCAB_SIZE)
    ids = Tokenizer.from_folder(source).encode(TEXT)
    rows = read_text(text, source, config, 128, 2048).token_ids
    assert rows.shape == (len(ids) // 64, 64)  # the model's longest context
    assert rows[0].tolist() == ids[:64] and rows[-1].tolist() == ids[-64:]
    # Of a text much longer than the rows, a part is encoded.
    rows = read_text(text, source, config, 3, 10).token_ids
    assert rows.shape == (3, 10)
    assert rows[0].tolist() == ids[:10]
    long = Tokenizer.from_folder(source).encode(TEXT[len(TEXT) - 160 :])
    assert rows[-1].tolist() == long[:10]


def test_a_text_shorter_than_a_row_gives_all_of_itself(source, tmp_path):
    (tmp_path / "short.txt").write_text("The sea.")
    rows = read_text(tmp_path / "short.txt", source, tiny("falcon-40b", vocab_size=VOCAB_SIZE), 128, 2048).token_ids
    assert rows.tolist() == [Tokenizer.from_folder(source).encode("The sea.")]


def test_each_wrong_input_is_one_message_and_nothing_is_written(source, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    small = tmp_path / "small"
    small.mkdir()
    write_model(tiny("falcon-7b"), random_params(tiny("falcon-7b")), small / "hf", source)
    out = tmp_path / "out"
    script = commands.load_script("convert_checkpoint")
    for folder, weights, path, said in [
        (source, "native", text, "calibration is for weights of few bits"),
        (source, "int4", tmp_path / "none.txt", "none.txt cannot be read: No such file"),
        (source, "int4", tmp_path, "cannot be read: Is a directory"),
        (source, "int4", tmp_path / "empty.txt", "empty.txt is empty"),
        (source, "int4", tmp_path / "latin.txt", "latin.txt is not UTF-8 text"),
        (bare, "int4", text, "bare holds no tokenizer.json"),
        (small / "hf", "int4", text, "but the model has a vocab_size of 97"),
    ]:
        options = (folder, out, "--weights", weights, "--calibration", path, "--quiet")
        assert commands.exit_code(script, monkeypatch, *options) == 2, said
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert shown.err.startswith("error: ") and said in shown.err
        assert not out.exists()
    with pytest.raises(CheckpointError, match="calibration_rows is 0; it must be at least 1"):
        falcon_jax.convert(source, out, weights="int4", calibration=text, calibration_rows=0)
    assert not out.exists()


def test_activations_that_are_not_finite_are_told(source, text, tmp_path, monkeypatch):
    def overflowing(self, layer, arrays, original=LayerCalibration.quantize):
        return original(self, layer, {path: np.full_like(array, 1e38) for path, array in arrays.items()})

    monkeypatch.setattr(LayerCalibration, "quantize", overflowing)
    with pytest.raises(CheckpointError, match=r"layer 0: .* not finite in float32"):
        falcon_jax.convert(source, tmp_path / "out", weights="int4", calibration=text, progress=False)


def test_the_command_calibrates(source, text, calibrated, tmp_path, monkeypatch, capsys):
    options = (source, tmp_path / "out", "--weights", "int4", "--calibration", text, "--quiet")
    assert commands.exit_code(commands.load_script("convert_checkpoint"), monkeypatch, *options) == 0
    found, expected = (json.loads((f / "manifest.json").read_text()) for f in (tmp_path / "out", calibrated))
    assert found == expected
