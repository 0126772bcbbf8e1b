"""Adapters as peft writes and reads them: the same logits there and here."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from falcon_jax import sharding
from falcon_jax.checkpoint import CheckpointError, load
from falcon_jax.checkpoint.manifest import Manifest
from falcon_jax.checkpoint.peft_files import CONFIG_FILE, TENSORS_FILE, load_merged, read_adapter, write_adapter
from falcon_jax.config import FalconConfig
from falcon_jax.model import adapters as model_adapters
from falcon_jax.model import params as model_params
from falcon_jax.model.adapters import LoRA
from falcon_jax.model.step import ForwardOptions
from pallas_kernels.quantized_matmul import QuantizedWeight, dequantize
from tests import commands, hf_models

# peft asks transformers for it, from 5.24 on by a name on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils"
)
IDS = np.random.default_rng(0).integers(0, hf_models.TINY_VOCAB_SIZE, (2, 12))
MODULES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def peft_adapter(variant, folder, **changes):
    """A model with a random adapter of peft, saved as `folder`/hf and `folder`/adapter; its logits."""
    model = hf_models.make_model(hf_models.tiny_config(variant))
    hf_models.save_model(model, folder / "hf")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "task_type": "CAUSAL_LM"}
    settings |= {"init_lora_weights": False} | changes  # no zeros: b is random too
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    adapted.save_pretrained(folder / "adapter")
    return torch_logits(adapted)


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS)).logits.numpy()


def logits_by_peft(variant, adapter):
    model = hf_models.make_model(hf_models.tiny_config(variant))
    return torch_logits(peft.PeftModel.from_pretrained(model, adapter))


def our_logits(config, params, adapters, lora):
    @jax.jit
    def run(params, adapters):
        decoder = model_params.bind(config, params, ForwardOptions(alibi="hf_bf16"))
        decoder = model_adapters.bind(decoder, adapters, lora)
        return decoder.logits(decoder(jnp.asarray(IDS, jnp.int32))[0])

    return run(params, adapters), lambda params: run(params, jax.tree.map(jnp.zeros_like, adapters))


def assert_same(left, right):
    assert model_params.flatten(left).keys() == model_params.flatten(right).keys()
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("variant", ["falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon2-11b"])
def test_an_adapter_of_peft_means_the_same_here_and_goes_back_bit_by_bit(variant, tmp_path):
    unusual = {"rank_pattern": {"dense": 2}, "alpha_pattern": {"h.1.mlp.dense_4h_to_h": 3}}
    changes = {"falcon-7b": unusual | {"use_rslora": True}, "falcon2-11b": {"target_modules": ["query_key_value"]}}
    expected = peft_adapter(variant, tmp_path, **changes.get(variant, unusual))
    config, params, _ = load(tmp_path / "hf")
    lora, adapters = read_adapter(tmp_path / "adapter", config)
    assert (lora.rank, lora.alpha, lora.rank_stabilized) == (4, 8.0, variant == "falcon-7b")
    logits, merged_logits = our_logits(config, params, adapters, lora)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    merged = model_adapters.merge(params, adapters, lora)
    np.testing.assert_allclose(merged_logits(merged), expected, rtol=0, atol=1e-4)
    write_adapter(tmp_path / "back", config, lora, adapters)
    assert_same(adapters, read_adapter(tmp_path / "back", config)[1])
    if variant == "falcon2-11b":  # by default nothing is unusual, and the files say so
        before, after = (safetensors.numpy.load_file(tmp_path / name / TENSORS_FILE) for name in ("adapter", "back"))
        assert_same(before, after)
    np.testing.assert_allclose(logits_by_peft(variant, tmp_path / "back"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_projections_with_an_a_of_their_own_become_one_module_that_means_the_same(rank_stabilized, tmp_path):
    """In one layer of two, where the other has another projection's."""
    hf_config = hf_models.tiny_config("falcon-40b")
    source = hf_models.save_model(hf_models.make_model(hf_config), tmp_path / "hf")
    config, params, _ = load(source)
    lora = LoRA(3, 5.0, ("query", "value", "up"), rank_stabilized)
    rng = np.random.default_rng(1)
    leaves = {
        path: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32))
        for path, leaf in model_params.flatten(model_adapters.abstract(config, lora)).items()
        if path.startswith(("layers.0.mlp", "layers.1.attention"))
    }
    adapters = model_params.unflatten(leaves)
    logits, _ = our_logits(config, params, adapters, lora)
    write_adapter(tmp_path / "adapter", config, lora, adapters, base_model=str(source))
    np.testing.assert_allclose(logits_by_peft("falcon-40b", tmp_path / "adapter"), logits, rtol=0, atol=1e-4)
    found, again = read_adapter(tmp_path / "adapter", config)
    assert (found.targets, found.scale) == (("query_key_value", "up"), pytest.approx(lora.scale, rel=1e-12))
    assert again["layers"][1]["attention"]["query_key_value"]["a"].shape == (config.width, 6)
    assert list(again["layers"][0]) == ["mlp"]


def test_an_adapter_merges_while_a_model_is_loaded(tmp_path, cpu_devices):
    expected = peft_adapter("falcon-7b", tmp_path, target_modules=r"transformer\.h\.\d\.(self_attention|mlp)\.dense\w*")
    config, params, _ = load_merged(tmp_path / "hf", tmp_path / "adapter")
    params = jax.tree.map(np.asarray, model_params.flatten(params))
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=cpu_devices)
    few = load_merged(tmp_path / "hf", tmp_path / "adapter", weights="int8", mesh=mesh).params
    few, path = model_params.flatten(few), "layers.1.mlp.down.weight"
    where = model_params.layouts(config, mesh, "int8")
    for name, leaf in few.items():
        assert leaf.sharding == where[name]
        assert name not in params or np.allclose(leaf, params[name], rtol=0, atol=1e-6)
    weight = QuantizedWeight(few[f"{path}.values"], few[f"{path}.scales"])
    step = np.abs(params[path]).max(axis=0) / 127
    assert np.all(np.abs(np.asarray(dequantize(weight, *params[path].shape)) - params[path]) <= 0.51 * step)
    Manifest(config, {}, {"weights": "int4"}).write(tmp_path)
    with pytest.raises(CheckpointError, match="holds int4 weights, into which no adapter is merged: give a native"):
        load_merged(tmp_path, tmp_path / "adapter")
    script = commands.load_script("merge_lora")
    with pytest.MonkeyPatch.context() as patch:
        arguments = (tmp_path / "hf", tmp_path / "adapter", tmp_path / "merged")
        assert commands.exit_code(script, patch, *arguments) == 0
        assert commands.exit_code(script, patch, *arguments) == 2  # not empty
    merged = transformers.FalconForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32", local_files_only=True)
    np.testing.assert_allclose(torch_logits(merged), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder that could be read, and the configuration that it is for."""
    folder = tmp_path_factory.mktemp("good")
    config = FalconConfig.from_hf(hf_models.tiny_config("falcon-40b").to_dict())
    adapters = model_adapters.init(config, LoRA(4, 8.0, ("query_key_value", "down")), jax.random.key(0))
    return write_adapter(folder, config, LoRA(4, 8.0), adapters), config


def changed(good, folder, settings=None, tensors=None):
    """A copy of the good folder with other settings, and tensors by what `tensors` makes of them."""
    shutil.copytree(good[0], folder)
    content = json.loads((folder / CONFIG_FILE).read_text()) | (settings or {})
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    if tensors is not None:
        found = tensors(safetensors.numpy.load_file(folder / TENSORS_FILE))
        safetensors.numpy.save_file(found, folder / TENSORS_FILE)
    return folder


PREFIX = "base_model.model.transformer.h.0."
FIRST = f"{PREFIX}self_attention.query_key_value.lora_A.weight"


def test_adapters_of_a_bare_model_and_of_half_precision_are_read(good, tmp_path):
    def bare(tensors):
        return {name.replace("transformer.", ""): tensor.astype(np.float16) for name, tensor in tensors.items()}

    lora, adapters = read_adapter(changed(good, tmp_path / "bare", tensors=bare), good[1])
    assert lora == LoRA(4, 8.0, ("query_key_value", "down"))
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), read_adapter(*good)[1])
    assert_same(adapters, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is supported here"),
        ({"use_dora": True}, "use_dora is True, which is not supported here: expected it to be off"),
        ({"some_new_setting": 3}, "some_new_setting is 3, which is not supported here"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported"),
        ({"bias": "all"}, "bias is 'all'; adapters here leave biases alone: expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the model"),
        ({"r": 0}, "r is 0, expected a whole number of at least 1"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number above 0"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern is .*, expected whole numbers by module"),
        ({"target_modules": []}, r"target_modules is \[\], expected names of modules, or one pattern"),
        (
            {"target_modules": ["q_proj"]},
            r"target_modules is \['q_proj'\]; the model has query_key_value, dense, .* 2 la",
        ),
        ({"target_modules": ["query_key_value"]}, "dense_4h_to_h.lora_A.weight .* belongs to none of the modules"),
        ({"target_modules": "all-linear"}, "h.0.self_attention.dense.lora_A.weight is missing, which adapter_config"),
        ({"layers_to_transform": [0]}, "h.1.* belongs to none of the modules that adapter_config.json names"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0', expected numbers of layers, or null"),
        ({"r": 5}, r"lora_A.weight \(F32\[4, 64\]\) has the wrong shape: .* call for \[5, 64\]"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(good, tmp_path, settings, said):
    with pytest.raises(CheckpointError, match=said) as raised:
        read_adapter(changed(good, tmp_path / "bad", settings), good[1])
    assert str(tmp_path / "bad") in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_are_no_adapter_are_named(good, tmp_path):
    def without_first(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != FIRST}

    def as_integers(tensors):
        return tensors | {FIRST: tensors[FIRST].astype(np.int32)}

    def with_head(tensors):
        return tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 64), np.float32)}

    for number, (tensors, said) in enumerate(
        [
            (without_first, f"{FIRST} is missing, which {CONFIG_FILE} calls for"),
            (as_integers, r"I32\[4, 64\]\): a parameter is F16, BF16, F32, not I32"),
            (with_head, "lm_head.lora_A.weight .* belongs to none of the modules"),
        ]
    ):
        with pytest.raises(CheckpointError, match=said):
            read_adapter(changed(good, tmp_path / str(number), tensors=tensors), good[1])
    with pytest.raises(CheckpointError, match="nowhere is no folder: expected an adapter of PEFT"):
        read_adapter(tmp_path / "nowhere", good[1])
    folder = changed(good, tmp_path / "pickled")
    (folder / TENSORS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds adapter_model\.bin, a pickle: save the adapter again"):
        read_adapter(folder, good[1])
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS_FILE} cannot be read"):
        read_adapter(folder, good[1])
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"pickled holds no {CONFIG_FILE}"):
        read_adapter(folder, good[1])
    with pytest.raises(CheckpointError, match=r"has the wrong shape: .* call for \[4, 48\]"):
        read_adapter(good[0], dataclasses.replace(good[1], width=48))
