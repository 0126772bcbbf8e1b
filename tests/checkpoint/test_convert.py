import importlib
import json
import shutil
from collections import namedtuple
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch

from falcon_jax.checkpoint import CheckpointError, convert, load, mapping
from falcon_jax.checkpoint.store import ArrayFolder
from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.model import params as model_params
from tests import hf_models

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def model():
    """40B: two norms, grouped heads."""
    return hf_models.make_model(hf_models.tiny_config("falcon-40b"))


@pytest.fixture
def source(model, tmp_path):
    return hf_models.save_model(model, tmp_path / "hf")


def flat(folder, **arguments):
    return model_params.flatten(load(folder, **arguments).params)


def assert_same(left, right):
    assert list(left) == list(right)
    for path, array in left.items():
        assert array.dtype == right[path].dtype, path
        assert np.array_equal(array, right[path]), path


def rewrite(folder, change):
    """Loads the one safetensors file, changes the dict of tensors, and writes it back."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(source, destination, match, **arguments):
    with pytest.raises(CheckpointError, match=match) as caught:
        convert(source, destination, progress=False, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        load(destination)
    return str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_lists_exactly_the_model_s_parameters(preset):
    expected = model_params.flatten(model_params.abstract(PRESETS[preset], "float32"))
    assert mapping.shapes(PRESETS[preset]) == {path: leaf.shape for path, leaf in expected.items()}


@pytest.mark.parametrize("variant", hf_models.VARIANTS)
def test_query_key_and_value_are_what_transformers_splits_off(variant):
    hf_model: Any = hf_models.make_model(hf_models.tiny_config(variant))
    attention = hf_model.transformer.h[0].self_attention
    config = FalconConfig.from_hf(hf_model.config.to_dict())
    fused = attention.query_key_value
    names = {"query": 0, "key": 1, "value": 2}
    prefix = "transformer.h.0.self_attention.query_key_value"
    entries = {entry.hf_name: entry for entry in mapping.table(config)}
    weights = entries[f"{prefix}.weight"].from_hf(fused.weight.numpy())
    x = torch.randn(1, 3, config.width, generator=torch.Generator().manual_seed(0))
    expected = attention._split_heads(x @ fused.weight.T)
    for name, which in names.items():
        found = np.einsum("btd,dnh->btnh", x.numpy(), weights[f"layers.0.attention.{name}.weight"])
        # The new decoder repeats keys and values for each query head.
        repeats = expected[which].shape[2] // found.shape[2]
        np.testing.assert_allclose(np.repeat(found, repeats, axis=2), expected[which].numpy(), atol=1e-5)
    if config.bias:
        biases = entries[f"{prefix}.bias"].from_hf(fused.bias.numpy())
        expected = attention._split_heads(fused.bias[None, None])
        for name, which in names.items():
            assert np.array_equal(biases[f"layers.0.attention.{name}.bias"], expected[which][0, 0].numpy())


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"max_shard_size": 20_000},
        {"strip_prefix": True},
        {"store_tied_head": True},
        {"extra_vocab_rows": 3},
        {"extra_vocab_rows": 3, "store_tied_head": True, "strip_prefix": True, "max_shard_size": 20_000},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "max_shard_size": 10_000},
        {"pickle": True},
        {"pickle": True, "max_shard_size": 20_000, "dtype": "bfloat16", "strip_prefix": True},
    ],
    ids=str,
)
def test_every_form_of_a_folder_converts_to_the_same_parameters(model, tmp_path, form):
    source = hf_models.save_model(model, tmp_path / "hf", **form)
    pickled = form.get("pickle", False)
    convert(source, tmp_path / "out", allow_pickle=pickled, progress=False)
    loaded = load(tmp_path / "out")
    # Our own reading of the plainest form is the reference here; test_query_key_and_value... and the parity tests
    # compare that with transformers.
    plain = hf_models.save_model(model, tmp_path / "plain")
    dtype, rows = TYPES[form.get("dtype", "float32")], form.get("extra_vocab_rows", 0)
    assert loaded.config.vocab_size == hf_models.TINY_VOCAB_SIZE + rows
    found, expected = model_params.flatten(loaded.params), flat(plain)
    assert list(found) == list(expected)
    for path, array in found.items():
        assert array.dtype == dtype
        kept = array[: hf_models.TINY_VOCAB_SIZE] if path == "embed.weight" else array
        assert np.array_equal(kept, np.asarray(expected[path]).astype(dtype)), path
    assert_same(found, flat(source, allow_pickle=pickled))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_dtype_is_cast_once_and_noted(source, tmp_path, dtype):
    convert(source, tmp_path / "out", dtype=dtype, progress=False)
    expected = {path: np.asarray(array).astype(TYPES[dtype]) for path, array in flat(source).items()}
    assert_same(flat(tmp_path / "out"), expected)
    assert_same(flat(source, dtype=dtype), expected)


def test_numbers_beyond_float16_are_refused_and_never_become_infinite(source, tmp_path):
    rewrite(source, lambda tensors: tensors["transformer.ln_f.weight"].fill_(1e5))
    refused(source, tmp_path / "out", "transformer.ln_f.weight holds numbers beyond float16", dtype="float16")
    shutil.rmtree(tmp_path / "out")
    convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match=r"final_norm.scale holds numbers beyond float16"):
        load(tmp_path / "out", dtype="float16")


def test_the_result_is_an_ordinary_orbax_checkpoint_with_config_and_tokenizer(source, tmp_path):
    hf_models.tiny_tokenizer(source)
    (source / "generation_config.json").write_text("{}")
    out = convert(source, tmp_path / "out", progress=False)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "params",
        "manifest.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tree = ocp.StandardCheckpointer().restore(out / "params")
    assert np.array_equal(tree["layers"]["1"]["mlp"]["up"]["weight"], flat(out)["layers.1.mlp.up.weight"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert FalconConfig.from_hf(manifest["config"]) == FalconConfig.from_hf(source)
    assert manifest["arrays"]["embed.weight"].keys() == {"shape", "dtype", "checksum"}
    assert load(out).tokenizer_folder == out


def test_a_progress_bar_counts_bytes(source, tmp_path, capsys):
    convert(source, tmp_path / "out")
    assert "convert: 100%" in capsys.readouterr().err


def test_a_missing_tensor_is_named(source, tmp_path):
    rewrite(source, lambda tensors: tensors.pop("transformer.h.1.mlp.dense_h_to_4h.weight"))
    message = refused(source, tmp_path / "out", r"missing transformer\.h\.1\.mlp\.dense_h_to_4h\.weight")
    assert str(source) in message


def test_many_missing_tensors_are_counted(source, tmp_path):
    def keep_one_layer(tensors):
        for name in [name for name in tensors if ".h.1." in name]:
            del tensors[name]

    rewrite(source, keep_one_layer)
    refused(source, tmp_path / "out", r"missing transformer\.h\.1\..*, \.\.\. \(\d+ in all\)")


def test_an_extra_tensor_is_named(source, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"transformer.h.0.adapter.weight": torch.ones(3)}))
    message = refused(source, tmp_path / "out", r"transformer\.h\.0\.adapter\.weight belongs to no Falcon")
    assert "model.safetensors" in message


def test_old_exports_buffers_are_passed_over(source, tmp_path):
    expected = flat(source)
    buffers = {
        "transformer.h.0.self_attention.rotary.inv_freq": torch.ones(4),
        "transformer.h.1.self_attention.maybe_rotary.inv_freq": torch.ones(4),
        "transformer.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.self_attention.masked_bias": torch.tensor(True),
    }
    rewrite(source, lambda tensors: tensors.update(buffers))
    convert(source, tmp_path / "out", progress=False)
    assert_same(flat(tmp_path / "out"), expected)


def test_a_wrong_shape_is_named_with_the_right_one(source, tmp_path):
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(source, tmp_path / "out", r"model.safetensors: .*dense_h_to_4h.*\[64, 256\].*calls for \[256, 64\]")


def test_fewer_vocabulary_rows_than_configured_are_refused(source, tmp_path):
    edit_config(source, vocab_size=98)
    refused(source, tmp_path / "out", r"word_embeddings.*\[97, 64\].*calls for \[98, 64\]")


def test_a_tensor_of_no_parameter_s_type_is_refused(source, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"transformer.ln_f.bias": torch.ones(64, dtype=torch.int64)}))
    refused(source, tmp_path / "out", r"transformer\.ln_f\.bias \(I64\[64\]\)")


def test_a_name_with_and_without_prefix_is_there_twice(source, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"ln_f.bias": torch.ones(64)}))
    refused(source, tmp_path / "out", r"ln_f\.bias .*is there twice")


def test_a_tied_head_that_differs_from_the_embedding_is_refused(model, tmp_path):
    source = hf_models.save_model(model, tmp_path / "hf", store_tied_head=True)
    rewrite(source, lambda tensors: tensors["lm_head.weight"][96, 63].mul_(1.5))
    refused(source, tmp_path / "out", r"lm_head\.weight .*differs from the embedding.*tie_word_embeddings")
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load(source)


def test_a_missing_head_says_how_tied_ones_are_configured(source, tmp_path):
    edit_config(source, tie_word_embeddings=False)
    refused(source, tmp_path / "out", r"missing lm_head\.weight.*tie_word_embeddings true")


def test_an_untied_head_must_have_the_embedding_s_rows(tmp_path):
    untied = hf_models.make_model(hf_models.tiny_config("falcon2-11b"))
    source = hf_models.save_model(untied, tmp_path / "hf", extra_vocab_rows=3)
    assert load(source).config.vocab_size == hf_models.TINY_VOCAB_SIZE + 3
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:97].clone()}))
    refused(source, tmp_path / "out", r"lm_head\.weight .*\[97, 32\].*calls for \[100, 32\]")


def test_a_truncated_shard_and_a_missing_one_leave_nothing(model, tmp_path):
    source = hf_models.save_model(model, tmp_path / "hf", max_shard_size=20_000)
    shard = sorted(source.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    refused(source, tmp_path / "out", shard.name)
    shard.unlink()
    refused(source, tmp_path / "out", f"{shard.name} is missing")
    assert not (tmp_path / "out").exists()


def test_a_missing_config_is_a_clear_error(source, tmp_path):
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_finished_destination_is_replaced_on_request_alone(source, model, tmp_path):
    convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="holds a finished checkpoint"):
        convert(source, tmp_path / "out", progress=False)
    other = hf_models.save_model(model, tmp_path / "other", dtype="bfloat16")
    convert(other, tmp_path / "out", overwrite=True, progress=False)
    assert_same(flat(tmp_path / "out"), flat(other))


def test_a_destination_with_other_files_is_left_alone(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused(source, out, "is not empty and holds no conversion")
    refused(source, out, "is not empty and holds no conversion", overwrite=True)
    assert (out / "thesis.tex").read_text() == "mine"
    refused(source, out / "thesis.tex", "is a file")
    with pytest.raises(CheckpointError, match="is the source"):
        convert(source, source, progress=False)


def test_a_converted_folder_is_no_source(source, tmp_path):
    convert(source, tmp_path / "out", progress=False)
    refused(tmp_path / "out", tmp_path / "again", "is a converted checkpoint already")


def test_too_little_space_is_said_before_anything_is_converted(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    refused(source, tmp_path / "out", r"0\.00 GB are free, the conversion takes \d\.\d+ GB more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weights": "int3"}, "weights is 'int3'; supported: 'native'"), ({"dtype": "float64"}, "dtype is 'float64'")],
)
def test_unknown_settings_are_refused(source, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", progress=False, **arguments)


def test_an_error_in_the_midst_leaves_nothing_that_loads(source, tmp_path, monkeypatch):
    module = importlib.import_module("falcon_jax.checkpoint.convert")
    monkeypatch.setattr(module, "GROUP_BYTES", 0)
    original = ArrayFolder.put
    calls = []

    def put(self, arrays):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        original(self, arrays)

    monkeypatch.setattr(ArrayFolder, "put", put)
    with pytest.raises(OSError, match="No space"):
        convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="interrupted"):
        load(tmp_path / "out")
