import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from falcon_jax.checkpoint import hf_files
from falcon_jax.errors import CheckpointError


def tensors():
    generator = np.random.default_rng(0)
    return {
        "a": generator.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "b": generator.normal(size=(7,)).astype(np.float32),
        "c": generator.normal(size=(2, 2)).astype(np.float16),
    }


@pytest.fixture
def single(tmp_path):
    safetensors.numpy.save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    content = tensors()
    places = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    for shard in set(places.values()):
        part = {name: content[name] for name in content if places[name] == shard}
        safetensors.numpy.save_file(part, tmp_path / shard)
    write_index(tmp_path, places)
    return tmp_path


def write_index(folder, places, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_tensor_is_read_bit_by_bit(single):
    folder = hf_files.open_folder(single)
    for name, expected in tensors().items():
        found = folder.read(name)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
        assert found.ctypes.data % 64 == 0


def test_shards_are_read_as_one(sharded):
    folder = hf_files.open_folder(sharded)
    assert set(folder.tensors) == {"a", "b", "c"}
    assert folder.read("c").tobytes() == tensors()["c"].tobytes()


def test_bits_are_compared_across_files(sharded):
    folder = hf_files.open_folder(sharded)
    assert folder.same_bits("a", "a")
    assert not folder.same_bits("a", "b")


def test_the_fingerprint_follows_the_content(single):
    before = hf_files.open_folder(single).fingerprint()
    assert before == hf_files.open_folder(single).fingerprint()
    safetensors.numpy.save_file(tensors() | {"b": np.zeros(8, np.float32)}, single / "model.safetensors")
    assert before != hf_files.open_folder(single).fingerprint()


@pytest.mark.parametrize("kept", [0, 5, 40, -1], ids=["nothing", "half a length", "half a header", "all but a byte"])
def test_a_file_cut_short_is_named(single, kept):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut short"):
        hf_files.open_folder(single)


def test_a_tensor_cut_short_is_named(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: [abc] .*ends at byte"):
        hf_files.open_folder(single)


def test_bytes_behind_the_last_tensor_are_refused(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="1 bytes behind its last tensor"):
        hf_files.open_folder(single)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, r"b .*overlaps.*begins at byte \d+, expected"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, "b .*follows a hole"),
        ({"a": entry([3], 0, 8)}, r"a has 8 bytes; F32\[3\] takes 12"),
        ({"a": entry([2], 0, 8, "F33")}, "a has the type 'F33'"),
        ({"a": entry([-2], 0, 8)}, "a has a damaged header entry"),
        ({"a": {"dtype": "F32"}}, "a has a damaged header entry"),
        ({"a": 5}, "a has a damaged header entry"),
        (b'{"a": 1', "header is damaged"),
        (b"\xff\xfe{}", "header is damaged"),
        (b"[]", "no JSON object"),
        (b'{"a": {}, "a": {}}', "'a' is there twice"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, message):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_files.open_folder(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_type_that_no_parameter_has_is_refused_when_read(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": entry([2], 0, 16, "I64")}, bytes(16))
    folder = hf_files.open_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: a \(I64\[2\]\).*BF16"):
        folder.read("a")


def test_a_missing_shard_is_named_with_a_tensor_in_it(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing: .*places b"):
        hf_files.open_folder(sharded)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, "c .*is not listed"),
        (
            {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors", "d": "two.safetensors"},
            "two.safetensors lacks d",
        ),
        ({"a": "two.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "two.safetensors lacks a"),
        ({"a": "../one.safetensors"}, "expected the name of a file beside it"),
        ({}, "weight_map"),
        (["a"], "weight_map"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(sharded, places, message):
    write_index(sharded, places)
    with pytest.raises(CheckpointError, match=message):
        hf_files.open_folder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    safetensors.numpy.save_file({"a": tensors()["a"], "b": tensors()["b"]}, sharded / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"b .*is a duplicate: .*places it in two\.safetensors"):
        hf_files.open_folder(sharded)


def test_two_sets_of_weights_are_refused(sharded):
    safetensors.numpy.save_file(tensors(), sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        hf_files.open_folder(sharded)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights: expected model\.safetensors"):
        hf_files.open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        hf_files.open_folder(tmp_path / "nowhere")
    safetensors.numpy.save_file(tensors(), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors, but neither"):
        hf_files.open_folder(tmp_path)


def test_pickles_are_read_on_request_alone(tmp_path):
    state = {name: torch.from_numpy(array.astype(np.float32)).bfloat16() for name, array in tensors().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"can run code.*allow_pickle=True"):
        hf_files.open_folder(tmp_path)
    folder = hf_files.open_folder(tmp_path, allow_pickle=True)
    for name, tensor in state.items():
        assert folder.read(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    assert folder.same_bits("a", "a")
    assert not folder.same_bits("a", "b")


def test_safetensors_are_preferred_to_pickles(single):
    torch.save({"z": torch.zeros(1)}, single / "pytorch_model.bin")
    assert set(hf_files.open_folder(single, allow_pickle=True).tensors) == {"a", "b", "c"}


class Payload:
    """What a hostile file would hold."""

    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, expected a state dict"),
        ({"a": torch.zeros(3), "epoch": 3}, "'epoch' is a int, expected a tensor"),
        ({"state_dict": {"a": torch.zeros(3)}}, "'state_dict' is a dict, expected a tensor"),
        ({}, "expected a state dict"),
        ({"a": Payload()}, "is not a state dict that torch reads safely"),
    ],
    ids=["a tensor", "a number in it", "nested", "empty", "code"],
)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path, content, message, capsys):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_files.open_folder(tmp_path, allow_pickle=True)
    assert "pytorch_model.bin" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_a_plain_pickle_and_a_truncated_one_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a state dict"):
        hf_files.open_folder(tmp_path, allow_pickle=True)
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a state dict"):
        hf_files.open_folder(tmp_path, allow_pickle=True)


def test_an_older_torch_is_refused_for_pickles(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"torch >= 2\.10"):
        hf_files.open_folder(tmp_path, allow_pickle=True)


def test_sharded_pickles_are_read_through_their_index(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "two.bin")
    write_index(tmp_path, {"a": "one.bin", "b": "two.bin"}, "pytorch_model.bin.index.json")
    folder = hf_files.open_folder(tmp_path, allow_pickle=True)
    assert np.array_equal(folder.read("a"), np.ones(3, np.float32))
    shutil.copy(tmp_path / "one.bin", tmp_path / "two.bin")
    with pytest.raises(CheckpointError, match=r"a .*is a duplicate"):
        hf_files.open_folder(tmp_path, allow_pickle=True)
