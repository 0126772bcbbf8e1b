import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

from falcon_jax import sharding
from falcon_jax.checkpoint import CheckpointError, convert, load
from falcon_jax.model import params as model_params
from tests import hf_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(Hugging Face folder, converted folder) of the tiny 40B, in bfloat16."""
    base = tmp_path_factory.mktemp("load")
    model = hf_models.make_model(hf_models.tiny_config("falcon-40b"))
    source = hf_models.save_model(model, base / "hf", dtype="bfloat16")
    return source, convert(source, base / "out", progress=False)


@pytest.fixture
def converted(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "out")


@pytest.mark.parametrize("which", [0, 1], ids=["hugging face", "converted"])
def test_sharded_over_eight_devices_equals_one(folders, cpu_devices, which):
    mesh = sharding.make_mesh(fsdp=2, tensor=4, devices=cpu_devices)
    whole = model_params.flatten(load(folders[which]).params)
    parts = model_params.flatten(load(folders[which], mesh=mesh).params)
    assert list(whole) == list(parts)
    for path, array in parts.items():
        assert array.sharding == sharding.param_sharding(path, array.shape, mesh), path
        assert len(whole[path].sharding.device_set) == 1
        assert array.dtype == whole[path].dtype
        assert np.array_equal(array, whole[path]), path


def test_seventy_one_heads_load_onto_eight_devices(tmp_path, cpu_devices):
    config = hf_models.tiny_config("falcon-7b", **hf_models.SEVENTY_ONE_HEADS)
    source = hf_models.save_model(hf_models.make_model(config), tmp_path / "hf")
    out = convert(source, tmp_path / "out", progress=False)
    mesh = sharding.make_mesh(tensor=8, devices=cpu_devices)
    whole, parts = (model_params.flatten(load(out, mesh=where).params) for where in (None, mesh))
    assert all(np.array_equal(whole[path], parts[path]) for path in whole)


def test_a_dtype_is_cast_on_the_device(folders, cpu_devices):
    mesh = sharding.make_mesh(tensor=8, devices=cpu_devices)
    stored = model_params.flatten(load(folders[1]).params)
    cast = model_params.flatten(load(folders[1], dtype="float32", mesh=mesh).params)
    for path, array in cast.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, np.asarray(stored[path]).astype(np.float32))


def largest_file(folder):
    return max((path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_flipped_bit_is_noticed_and_named(converted, cpu_devices, devices):
    mesh = sharding.make_mesh(tensor=devices, devices=cpu_devices)
    data = largest_file(converted)
    flip_a_bit(data)
    with pytest.raises(CheckpointError, match=f"{data.parent.name} has changed since the conversion"):
        load(converted, mesh=mesh)


def test_verification_can_be_left_out(converted):
    flip_a_bit(largest_file(converted))
    load(converted, verify=False)


def test_every_array_is_verified(converted, folders):
    """A flip in the smallest array is found just as well, and the rest of the folder is not blamed."""
    path = converted / "params" / "layers.1.mlp_norm.bias" / "0"
    flip_a_bit(path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp_norm\.bias has changed"):
        load(converted)


@pytest.mark.parametrize("damage", ["cut", "gone", "folder gone", "description", "dtype"])
def test_a_damaged_array_is_named(converted, damage):
    data = largest_file(converted)
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-3])
    elif damage == "gone":
        data.unlink()
    elif damage == "folder gone":
        shutil.rmtree(data.parent)
    else:
        path = data.parent / ".zarray"
        path.write_text("{" if damage == "description" else path.read_text().replace("bfloat16", "<f2"))
    with pytest.raises(CheckpointError, match=data.parent.name) as caught:
        load(converted)
    assert "\n" not in str(caught.value)


def test_a_changed_manifest_is_refused(converted):
    path = converted / "manifest.json"
    content = json.loads(path.read_text())
    content["config"]["layer_norm_epsilon"] = 1e-6
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json has changed"):
        load(converted)
    content["version"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="version 99, expected"):
        load(converted)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is not JSON"):
        load(converted)


def test_a_folder_without_a_tokenizer_has_none(folders, tmp_path):
    assert load(folders[1]).tokenizer_folder is None
    source = shutil.copytree(folders[0], tmp_path / "hf")
    hf_models.tiny_tokenizer(source)
    assert load(source).tokenizer_folder == source


@pytest.mark.parametrize("source", ["/no/such/folder", "nowhere", "./org/name", "a/b/c", "tests/no-such-model"])
def test_an_unknown_path_says_what_is_accepted_and_touches_no_network(source, monkeypatch):
    def fail(*arguments, **keywords):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"does not exist: expected a folder made by falcon_jax\.convert"):
        load(source)


def test_a_hub_model_without_network_is_one_clear_line():
    with pytest.raises(CheckpointError, match="no-such-org/no-such-model is no folder here") as caught:
        load("no-such-org/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_hub_model_is_fetched_without_its_pickles(folders, monkeypatch):
    asked = {}

    def download(model, allow_patterns):
        asked[model] = allow_patterns
        return str(folders[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load("some-org/some-model")
    assert asked == {"some-org/some-model": ["*.safetensors", "*.json"]}


def test_a_file_is_no_checkpoint(folders):
    with pytest.raises(CheckpointError, match="is a file: expected"):
        load(folders[0] / "model.safetensors")


def test_an_unknown_dtype_is_refused(folders):
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float16, bfloat16, float32"):
        load(folders[1], dtype="int8")


def test_arrays_go_to_the_default_device(folders, cpu_devices):
    with jax.default_device(cpu_devices[3]):
        for folder in folders:
            leaves = jax.tree.leaves(load(folder).params)
            assert {device for leaf in leaves for device in leaf.devices()} == {cpu_devices[3]}
