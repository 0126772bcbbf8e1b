import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from falcon_jax.checkpoint import CheckpointError, convert, export, load
from falcon_jax.checkpoint.export import export_params
from falcon_jax.config import FalconConfig
from tests import hf_models, models


def stored_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def logits(folder, dtype):
    model = transformers.FalconForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


@pytest.mark.parametrize("variant", hf_models.VARIANTS)
def test_there_and_back_every_tensor_is_bit_identical_and_transformers_loads_it(variant, tmp_path):
    model = hf_models.make_model(hf_models.tiny_config(variant))
    source = hf_models.save_model(model, tmp_path / "hf", dtype="bfloat16")
    convert(source, tmp_path / "out", progress=False)
    back = export(tmp_path / "out", tmp_path / "back")
    assert_same_bits(stored_tensors(source), stored_tensors(back))
    assert (source / "config.json").read_text() == (back / "config.json").read_text()
    assert torch.equal(logits(source, torch.bfloat16), logits(back, torch.bfloat16))


def test_other_forms_come_back_under_transformers_own_names(tmp_path):
    model = hf_models.make_model(hf_models.tiny_config("falcon2-11b"))
    form = {"strip_prefix": True, "extra_vocab_rows": 3, "max_shard_size": 9_000}
    source = hf_models.save_model(model, tmp_path / "hf", **form)
    hf_models.tiny_tokenizer(source)
    convert(source, tmp_path / "out", progress=False)
    back = export(tmp_path / "out", tmp_path / "back")
    expected = {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor
        for name, tensor in stored_tensors(source).items()
    }
    assert_same_bits(expected, stored_tensors(back))
    assert FalconConfig.from_hf(back).vocab_size == hf_models.TINY_VOCAB_SIZE + 3
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    logits(back, torch.float32)


def test_shards_hold_no_more_than_asked_and_the_index_lists_them(tmp_path):
    model = hf_models.make_model(hf_models.tiny_config("falcon-40b"))
    source = hf_models.save_model(model, tmp_path / "hf")
    convert(source, tmp_path / "out", progress=False)
    back = export(tmp_path / "out", tmp_path / "back", max_shard_bytes=70_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    shards = sorted(back.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == sorted(set(index["weight_map"].values()))
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(path).values()) for path in shards]
    assert max(sizes) <= 70_000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert_same_bits(stored_tensors(source), stored_tensors(back))
    assert torch.equal(logits(source, torch.float32), logits(back, torch.float32))


def test_a_legacy_or_recast_config_is_written_anew(tmp_path):
    model = hf_models.make_model(hf_models.tiny_config("falcon-7b"))
    source = hf_models.save_model(model, tmp_path / "hf")
    config = FalconConfig.from_hf(source)
    keys = json.loads((source / "config.json").read_text())
    keys |= {"model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"]}
    keys |= {"auto_map": {"AutoModel": "modelling_RW.RWModel"}}
    (source / "config.json").write_text(json.dumps(keys))
    convert(source, tmp_path / "out", progress=False)
    back = export(tmp_path / "out", tmp_path / "back")
    assert json.loads((back / "config.json").read_text()) == config.to_hf()
    logits(back, torch.float32)
    convert(source, tmp_path / "narrow", dtype="bfloat16", progress=False)
    back = export(tmp_path / "narrow", tmp_path / "back16")
    assert {tensor.dtype for tensor in stored_tensors(back).values()} == {torch.bfloat16}
    assert "dtype" not in json.loads((back / "config.json").read_text())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    base = tmp_path_factory.mktemp("export")
    source = hf_models.save_model(hf_models.make_model(hf_models.tiny_config("falcon-7b")), base / "hf")
    return convert(source, base / "out", progress=False)


def test_a_damaged_checkpoint_is_not_exported(converted, tmp_path):
    data = converted / "params" / "embed.weight" / "0.0"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"embed\.weight has changed"):
        export(converted, tmp_path / "back")
    with pytest.raises(CheckpointError):
        load(tmp_path / "back")
    content[5] ^= 1
    data.write_bytes(content)
    # What the failed attempt left is no obstacle.
    export(converted, tmp_path / "back")
    load(tmp_path / "back")


def test_a_destination_that_holds_something_is_left_alone(converted, tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        export(converted, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_no_converted_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "nowhere", tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"is no folder made by falcon_jax\.convert"):
        export(tmp_path, tmp_path / "back")


def test_the_shard_size_must_be_positive(converted, tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        export(converted, tmp_path / "back", max_shard_bytes=0)


@pytest.mark.parametrize("variant", ["falcon-rw-1b", "falcon-180b", "falcon2-11b"])
def test_parameters_in_memory_are_written_and_load_as_they_were(variant, tmp_path):
    config = models.tiny(variant)
    params = models.random_params(config)
    export_params(config, params, tmp_path / "hf", dtype="bfloat16")
    loaded = load(tmp_path / "hf")
    assert loaded.config == config
    for path, array in models.model_params.flatten(loaded.params).items():
        expected = models.model_params.flatten(params)[path]
        assert np.array_equal(array, np.asarray(expected).astype(array.dtype)), path


def test_parameters_of_another_model_are_refused(tmp_path):
    config = models.tiny("falcon-7b")
    params = models.random_params(models.tiny("falcon-7b", num_layers=3))
    with pytest.raises(CheckpointError, match=r"do not fit the configuration: layers\.2\."):
        export_params(config, params, tmp_path / "hf")
