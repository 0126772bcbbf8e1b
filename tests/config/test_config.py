"""config.json means the same to us and to transformers; what contradicts itself is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, FalconForCausalLM
from transformers import FalconConfig as HFConfig
from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

from falcon_jax.config import PRESETS, Block, FalconConfig, Positions, Rope, RopeScaling
from falcon_jax.errors import ConfigError
from tests.hf_models import SEVENTY_ONE_HEADS, VARIANTS, hf_configs, tiny_config

# Parameters of the published checkpoints, counted from their shapes.
PUBLISHED = {
    "falcon-rw-1b": 1_311_625_216,
    "falcon-rw-7b": 7_516_020_736,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 178_557_088_768,
    "falcon2-11b": 11_102_822_400,
}

# The keys of published files that matter here, legacy and current.
LEGACY_7B: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 4544,
    "model_type": "RefinedWebModel",
    "multi_query": True,
    "n_head": 71,
    "n_layer": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
LEGACY_RW_1B: dict[str, Any] = LEGACY_7B | {
    "alibi": True,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 2048,
    "multi_query": False,
    "n_head": 32,
    "n_layer": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
LEGACY_40B: dict[str, Any] = {key: value for key, value in LEGACY_7B.items() if key != "multi_query"} | {
    "hidden_size": 8192,
    "model_type": "RefinedWeb",
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
}
CURRENT_7B: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 4544,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "parallel_attn": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "vocab_size": 65024,
}
CURRENT_40B: dict[str, Any] = CURRENT_7B | {
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
CURRENT_11B: dict[str, Any] = CURRENT_40B | {
    "activation": "gelu",
    "ff_factor": 4,
    "ffn_hidden_size": 16384,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_ln_in_parallel_attn": 1,
    "rope_scaling": None,
    "rope_theta": 500042,
    "tie_word_embeddings": False,
}
CURRENT_180B: dict[str, Any] = CURRENT_40B | {
    "hidden_size": 14848,
    "num_attention_heads": 232,
    "num_hidden_layers": 80,
}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}


@pytest.mark.parametrize(
    ("keys", "preset"),
    [
        pytest.param(LEGACY_7B, "falcon-7b", id="RefinedWebModel-7b"),
        pytest.param(LEGACY_RW_1B, "falcon-rw-1b", id="RefinedWebModel-rw-1b"),
        pytest.param(LEGACY_40B, "falcon-40b", id="RefinedWeb-40b"),
        pytest.param(CURRENT_7B, "falcon-7b", id="falcon-7b"),
        pytest.param(CURRENT_40B, "falcon-40b", id="falcon-40b"),
        pytest.param(CURRENT_180B, "falcon-180b", id="falcon-180b"),
        pytest.param(CURRENT_11B, "falcon2-11b", id="falcon2-11b"),
    ],
)
def test_a_published_file_gives_its_preset(keys: dict[str, Any], preset: str):
    assert FalconConfig.from_hf(keys) == PRESETS[preset]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str):
    assert PRESETS[name].num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_and_transformers(name: str, tmp_path: Path):
    config = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert FalconConfig.from_hf(tmp_path) == FalconConfig.from_hf(tmp_path / "config.json") == config
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HFConfig)
    assert loaded.architectures == ["FalconForCausalLM"]
    assert FalconConfig.from_hf(loaded.to_dict()) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_a_tiny_variant_is_its_preset_made_small(name: str):
    tiny, preset = FalconConfig.from_hf(tiny_config(name).to_dict()), PRESETS[name]
    for field in (
        "positions",
        "block",
        "num_norms",
        "bias",
        "tie_word_embeddings",
        "new_decoder_architecture",
    ):
        assert getattr(tiny, field) == getattr(preset, field), field
    kinds = [(c.num_kv_heads == 1, c.num_kv_heads == c.num_heads, c.num_heads % 2) for c in (tiny, preset)]
    assert kinds[0] == kinds[1]


def test_num_kv_heads_beside_multi_query_is_no_contradiction():
    config = FalconConfig.from_hf(tiny_config("falcon-7b", **SEVENTY_ONE_HEADS).to_dict())
    assert (config.num_heads, config.num_kv_heads, config.num_groups, config.head_dim) == (71, 1, 71, 8)


def layout(config: HFConfig) -> dict[str, torch.Size]:
    """Names and shapes of the parameters that transformers makes for `config`."""
    with torch.device("meta"):
        model = FalconForCausalLM._from_config(config, attn_implementation="sdpa")
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@given(hf_configs())
@settings(max_examples=40)
def test_to_hf_means_the_same_to_transformers(original: HFConfig):
    config = FalconConfig.from_hf(original.to_dict())
    written = HFConfig(**config.to_hf())
    assert FalconConfig.from_hf(written.to_dict()) == config
    assert layout(written) == layout(original)
    assert sum(shape.numel() for shape in layout(original).values()) == config.num_parameters
    for key in ("alibi", "tie_word_embeddings", "layer_norm_epsilon", "eos_token_id", "pad_token_id", "bias"):
        assert getattr(written, key) == getattr(original, key), key
    if config.rope is not None:
        ours, theirs = FalconRotaryEmbedding(written), FalconRotaryEmbedding(original)
        assert torch.equal(ours.inv_freq, theirs.inv_freq)
        assert ours.attention_scaling == theirs.attention_scaling
        assert math.isclose(config.rope.table_scale, theirs.attention_scaling, rel_tol=1e-12)


@st.composite
def config_fields(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of any FalconConfig."""
    numbers = st.integers(1, 1 << 20)
    block = draw(st.sampled_from(get_args(Block)))
    positions = draw(st.sampled_from(get_args(Positions)))
    num_heads = draw(st.integers(1, 300))
    divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
    max_tokens = draw(numbers)
    token_ids = st.integers(0, 1 << 17)
    return {
        "vocab_size": draw(numbers),
        "width": num_heads * 2 * draw(st.integers(2, 128)),
        "num_layers": draw(numbers),
        "num_heads": num_heads,
        "num_kv_heads": draw(st.sampled_from([1, num_heads] if block == "sequential" else divisors)),
        "mlp_width": draw(numbers),
        "positions": positions,
        "rope": draw(ropes(max_tokens)) if positions == "rope" else None,
        "block": block,
        "num_norms": 2 if block == "sequential" else draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "max_tokens": max_tokens,
        "norm_epsilon": draw(st.floats(1e-12, 1.0)),
        "bos_token_id": draw(st.none() | token_ids),
        "eos_token_ids": tuple(draw(st.lists(token_ids, max_size=3))),
        "pad_token_id": draw(st.none() | token_ids),
        "initializer_range": draw(st.floats(0.0, 1.0)),
        "hidden_dropout": draw(st.floats(0.0, 0.9)),
        "attention_dropout": draw(st.floats(0.0, 0.9)),
    }


@st.composite
def ropes(draw: st.DrawFn, max_tokens: int) -> Rope:
    theta, factor = draw(st.floats(2.0, 1e7)), draw(st.floats(1.0, 64.0))
    scaling = draw(st.sampled_from(get_args(RopeScaling)))
    if scaling == "default":
        return Rope(theta=theta)
    if scaling != "yarn":
        return Rope(theta=theta, scaling=scaling, factor=factor)
    positive = st.none() | st.floats(0.1, 4.0)
    return Rope(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_tokens=draw(st.sampled_from([None, 1, max_tokens])),
        attention_factor=draw(positive),
        beta_fast=draw(st.floats(2.0, 64.0)),
        beta_slow=draw(st.floats(0.1, 2.0)),
        mscale=draw(positive),
        mscale_all_dim=draw(positive),
        truncate=draw(st.booleans()),
    )


@given(config_fields())
@settings(max_examples=120)
def test_from_hf_undoes_to_hf(fields: dict[str, Any]):
    config = FalconConfig(**fields)
    assert FalconConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert FalconConfig.from_hf(HFConfig(**config.to_hf()).to_dict()) == config
    assert hash(FalconConfig.from_hf(config.to_hf())) == hash(config)


@pytest.mark.parametrize(
    ("alias", "key"),
    [
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_embed", "hidden_size"),
        ("n_embd", "hidden_size"),
        ("n_head_kv", "num_kv_heads"),
        ("num_key_value_heads", "num_kv_heads"),
        ("intermediate_size", "ffn_hidden_size"),
        ("hidden_act", "activation"),
        ("layer_norm_eps", "layer_norm_epsilon"),
    ],
)
def test_an_alias_means_its_key_and_two_that_differ_are_refused(alias: str, key: str):
    keys = GROUPED | {"ffn_hidden_size": 96, "activation": "gelu", "layer_norm_epsilon": 1e-6}
    config = FalconConfig.from_hf(keys)
    value = keys.pop(key)
    assert FalconConfig.from_hf(keys | {alias: value}) == config
    assert FalconConfig.from_hf(keys | {alias: value, key: value}) == config
    assert FalconConfig.from_hf(keys | {alias: value, key: None}) == config
    other = "gelu_new" if key == "activation" else value * 2
    with pytest.raises(ConfigError, match=rf"{key} is {value!r} and {alias} is {other!r}"):
        FalconConfig.from_hf(keys | {alias: other, key: value})


def test_absent_keys_mean_what_transformers_fills_in():
    assert FalconConfig.from_hf(SMALL) == FalconConfig.from_hf(HFConfig(**SMALL).to_dict())
    config = FalconConfig.from_hf(SMALL)
    assert (config.mlp_width, config.max_tokens, config.eos_token_ids) == (128, 2048, (11,))
    assert config.rope == Rope()


@pytest.mark.parametrize(("eos", "ids"), [(5, (5,)), ([5, 7], (5, 7)), ([], ()), (None, ())])
def test_eos_is_a_number_a_list_or_nothing(eos: object, ids: tuple[int, ...]):
    assert FalconConfig.from_hf(SMALL | {"eos_token_id": eos}).eos_token_ids == ids


@pytest.mark.parametrize("activation", ["gelu", "gelu_python"])
def test_names_of_the_exact_gelu_are_taken(activation: str):
    assert FalconConfig.from_hf(SMALL | {"activation": activation}).to_hf()["activation"] == "gelu"


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 500042}, Rope(theta=500042.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(scaling="linear", factor=2.0)),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}, "rope_theta": 20000.0},
            Rope(theta=20000.0, scaling="linear", factor=2.0),
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e5}},
            Rope(theta=1e5, scaling="dynamic", factor=4.0, original_max_tokens=2048),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            Rope(scaling="yarn", factor=4.0, original_max_tokens=2048),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 1024},
            Rope(scaling="yarn", factor=2.0, original_max_tokens=1024),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": None,
                    "original_max_position_embeddings": 512,
                }
            },
            Rope(scaling="yarn", factor=4.0, original_max_tokens=512),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 10000}, Rope()),
        ({"rope_scaling": None, "rope_parameters": None}, Rope()),
        # A linear scaling divides every frequency, so where the stretch began does not matter.
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 512}},
            Rope(scaling="linear", factor=2.0),
        ),
    ],
)
def test_both_spellings_of_rope_are_read_as_transformers_reads_them(keys: dict[str, Any], rope: Rope):
    config = FalconConfig.from_hf(SMALL | keys)
    assert config.rope == rope
    theirs = FalconRotaryEmbedding(HFConfig(**json.loads(json.dumps(SMALL | keys))))
    ours = FalconRotaryEmbedding(HFConfig(**config.to_hf()))
    assert torch.equal(theirs.inv_freq, ours.inv_freq)
    assert theirs.attention_scaling == ours.attention_scaling == rope.table_scale


def test_alibi_passes_over_the_default_rope_that_transformers_writes():
    keys = HFConfig(**SMALL, alibi=True).to_dict()
    assert keys["rope_parameters"]["rope_type"] == "default"
    config = FalconConfig.from_hf(keys)
    assert (config.positions, config.rope) == ("alibi", None)


def test_sequential_blocks_have_two_norms_whatever_the_key_for_parallel_ones_says():
    for num_norms in (None, 1, 2):
        keys = SMALL | {"parallel_attn": False, "num_ln_in_parallel_attn": num_norms}
        assert FalconConfig.from_hf(keys).num_norms == 2
        assert sum("layernorm.weight" in name for name in layout(HFConfig(**keys))) == 4


def test_dynamic_and_yarn_learn_the_trained_length_from_the_config():
    config = dataclasses.replace(PRESETS["falcon-7b"], rope=Rope(scaling="dynamic", factor=2.0))
    assert config.rope is not None and config.rope.original_max_tokens == config.max_tokens
