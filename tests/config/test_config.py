"""config.json means the same to us and to transformers; what contradicts itself is refused."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, FalconForCausalLM
from transformers import FalconConfig as HFConfig
from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

from falcon_jax import config as config_module
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


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    # Not a Falcon that we know.
    "model type": (SMALL | {"model_type": "llama"}, ["model_type", "'llama'", "'falcon'"]),
    "architecture": (
        SMALL | {"architectures": ["FalconForSequenceClassification"]},
        ["architectures", "FalconForSequenceClassification", "FalconForCausalLM"],
    ),
    "architectures not a list": (SMALL | {"architectures": "FalconForCausalLM"}, ["architectures", "list"]),
    "RW without model type": (
        SMALL | {"architectures": ["RWForCausalLM"]},
        ["model_type is missing", "RefinedWeb"],
    ),
    "activation": (SMALL | {"activation": "gelu_new"}, ["activation", "'gelu_new'", "'gelu'"]),
    "hidden_act": (SMALL | {"hidden_act": "relu"}, ["hidden_act", "'relu'", "'gelu'"]),
    "residual after norm": (
        SMALL | {"apply_residual_connection_post_layernorm": True},
        ["apply_residual_connection_post_layernorm"],
    ),
    # Heads.
    "width": (SMALL | {"hidden_size": 30}, ["hidden_size", "30", "num_attention_heads", "4", "32"]),
    "kv heads": (GROUPED | {"num_kv_heads": 3}, ["num_kv_heads", "3", "num_attention_heads", "4", "1, 2, 4"]),
    "no heads": (SMALL | {"num_attention_heads": 0}, ["num_attention_heads", "0", "at least 1"]),
    "no kv heads": (GROUPED | {"num_kv_heads": 0}, ["num_kv_heads", "0", "at least 1"]),
    "grouped heads, multi query": (SMALL | {"num_kv_heads": 2}, ["num_kv_heads", "2", "multi_query true"]),
    "grouped heads, multi head": (
        SMALL | {"num_kv_heads": 2, "multi_query": False},
        ["num_kv_heads", "2", "multi_query false", "set num_kv_heads to 4"],
    ),
    "odd head dim": (SMALL | {"hidden_size": 20}, ["hidden_size", "20", "5", "even"]),
    "stated head dim": (SMALL | {"head_dim": 16}, ["head_dim", "16", "8"]),
    "ff_factor": (SMALL | {"ff_factor": 3}, ["ff_factor", "3", "ffn_hidden_size", "96"]),
    # Blocks.
    "sequential new decoder": (
        GROUPED | {"parallel_attn": False},
        ["parallel_attn", "new_decoder_architecture true"],
    ),
    "sequential RefinedWeb": (LEGACY_40B | {"parallel_attn": False}, ["parallel_attn", "RefinedWeb"]),
    "RefinedWeb, old": (
        LEGACY_40B | {"new_decoder_architecture": False},
        ["new_decoder_architecture", "RefinedWeb"],
    ),
    "RefinedWebModel, new": (LEGACY_7B | {"new_decoder_architecture": True}, ["new_decoder_architecture"]),
    "two norms, old": (SMALL | {"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn", "2", "1 or null"]),
    "three norms": (
        GROUPED | {"num_ln_in_parallel_attn": 3},
        ["num_ln_in_parallel_attn", "3", "1, 2 or null"],
    ),
    "norms as flag": (GROUPED | {"num_ln_in_parallel_attn": True}, ["num_ln_in_parallel_attn", "True"]),
    # Positions.
    "alibi and scaling": (
        SMALL | {"alibi": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ["alibi", "'linear'"],
    ),
    "rope type": (
        SMALL | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        ["rope_type", "'llama3'", "yarn"],
    ),
    "rope types": (
        SMALL | {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
        ["rope_type is 'yarn'", "type is 'linear'", "rope_scaling"],
    ),
    "no factor": (
        SMALL | {"rope_scaling": {"type": "linear"}},
        ["factor", "rope_scaling", "missing", "at least 1"],
    ),
    "small factor": (
        SMALL | {"rope_scaling": {"type": "linear", "factor": 0.5}},
        ["factor", "0.5", "at least 1"],
    ),
    "factor as text": (
        SMALL | {"rope_scaling": {"type": "linear", "factor": "2"}},
        ["factor", "'2'", "number"],
    ),
    "factor without scaling": (SMALL | {"rope_parameters": {"factor": 2.0}}, ["factor", "2.0", "'default'"]),
    "rope not an object": (SMALL | {"rope_scaling": 2.0}, ["rope_scaling", "2.0", "object"]),
    "unknown rope key": (
        SMALL | {"rope_scaling": {"type": "yarn", "factor": 2.0, "short_factor": [1.0]}},
        ["short_factor", "rope_scaling", "'yarn'"],
    ),
    "beta of linear": (
        SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 16}},
        ["beta_fast", "16", "'linear'"],
    ),
    "betas swapped": (
        SMALL | {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}},
        ["beta_fast", "1.0", "beta_slow", "32.0"],
    ),
    "two thetas": (
        SMALL | {"rope_theta": 1e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ["rope_theta is 100000.0", "rope_parameters is 10000.0"],
    ),
    "two ropes": (
        SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        ["rope_parameters", "rope_scaling", "linear"],
    ),
    "dynamic from elsewhere": (
        SMALL | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
        ["original_max_position_embeddings", "512", "max_position_embeddings", "2048"],
    ),
    "dynamic on pairs": (
        SMALL | {"hidden_size": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ["head dim is 2", "at least 4"],
    ),
    "partial rotary": (SMALL | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1"]),
    "negative theta": (SMALL | {"rope_theta": -1.0}, ["rope_theta", "-1.0", "above 1"]),
    # Types and ranges.
    "text for a number": (SMALL | {"num_hidden_layers": "2"}, ["num_hidden_layers", "'2'", "whole number"]),
    "flag for a number": (SMALL | {"num_hidden_layers": True}, ["num_hidden_layers", "True", "whole number"]),
    "float for a number": (SMALL | {"vocab_size": 97.0}, ["vocab_size", "97.0", "whole number"]),
    "number for a flag": (SMALL | {"bias": 1}, ["bias", "1", "true or false"]),
    "null for a flag": (SMALL | {"multi_query": None}, ["multi_query", "None", "true or false"]),
    "epsilon": (SMALL | {"layer_norm_epsilon": 0.0}, ["layer_norm_epsilon", "0.0", "above 0"]),
    "no epsilon": (SMALL | {"layer_norm_epsilon": None}, ["layer_norm_epsilon", "None", "number"]),
    "endless epsilon": (
        SMALL | {"layer_norm_epsilon": float("nan")},
        ["layer_norm_epsilon", "nan", "number"],
    ),
    "endless integer": (SMALL | {"rope_theta": 10**400}, ["rope_theta", "number"]),
    "head dim as text": (SMALL | {"head_dim": "8"}, ["head_dim", "'8'", "whole number"]),
    "dropout": (SMALL | {"hidden_dropout": 1.5}, ["hidden_dropout", "1.5", "below 1"]),
    "length": (
        SMALL | {"max_position_embeddings": None},
        ["max_position_embeddings", "None", "whole number"],
    ),
    "negative id": (SMALL | {"pad_token_id": -1}, ["pad_token_id", "-1", "at least 0"]),
    "eos as text": (
        SMALL | {"eos_token_id": "<|endoftext|>"},
        ["eos_token_id", "<|endoftext|>", "whole number"],
    ),
    "eos list": (SMALL | {"eos_token_id": [11, None]}, ["eos_token_id", "None", "whole number"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_by_key_and_value(name: str):
    keys, words = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        FalconConfig.from_hf(keys)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", SMALL)
def test_a_missing_key_is_named(key: str):
    with pytest.raises(ConfigError, match=f"{key}.* is missing"):
        FalconConfig.from_hf({name: value for name, value in SMALL.items() if name != key})


@pytest.mark.parametrize("key", ["multi_query", "parallel_attn", "eos_token_id"])
def test_a_legacy_file_states_what_its_readers_disagree_on(key: str):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        FalconConfig.from_hf({name: value for name, value in LEGACY_7B.items() if name != key})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1]", "holds a list"),
        (b"{}", "vocab_size is missing"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: bytes | None, words: str, tmp_path: Path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    for source in (path, str(path), tmp_path):
        with pytest.raises(ConfigError, match=words) as error:
            FalconConfig.from_hf(source)
        assert str(error.value).startswith(f"{path}: ")


@pytest.fixture(scope="module")
def unchecked() -> ModuleType:
    """falcon_jax.config as users import it: conftest.py has annotations checked, which comes before our errors."""
    loader = importlib.machinery.SourceFileLoader("unchecked_config", str(config_module.__file__))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_norms": 3}, "num_norms is 3; it must be 1 or 2"),
        ({"num_norms": True}, "num_norms is True"),
        ({"positions": "learned"}, "positions is 'learned'; it must be alibi or rope"),
        ({"positions": "alibi"}, "rope is Rope"),
        ({"rope": None}, "rope is None"),
        ({"block": "diagonal"}, "block is 'diagonal'; it must be parallel or sequential"),
        ({"block": "sequential", "num_norms": 1}, "num_norms is 1"),
        ({"block": "sequential", "num_norms": 2, "num_kv_heads": 2}, "num_kv_heads is 2"),
        ({"eos_token_ids": [11]}, "eos_token_ids is"),
        ({"max_tokens": 2048.0}, "max_tokens"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(unchecked: ModuleType, changes: dict[str, Any], words: str):
    config = unchecked.FalconConfig.from_hf(SMALL)
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scaling": "longrope"}, "rope_type"),
        ({"theta": "1e4"}, "rope_theta"),
        ({"factor": 2.0}, "factor is 2.0"),
        ({"scaling": "linear", "original_max_tokens": 2048}, "original_max_tokens is 2048"),
        ({"scaling": "yarn", "truncate": None}, "truncate is None"),
        ({"scaling": "yarn", "mscale": 0.0}, "mscale is 0.0"),
        ({"scaling": "yarn", "original_max_tokens": 0}, "original_max_position_embeddings"),
    ],
)
def test_rope_refuses_numbers_that_mean_nothing(unchecked: ModuleType, fields: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        unchecked.Rope(**fields)


def test_whole_numbers_become_the_floats_they_stand_for(unchecked: ModuleType):
    assert repr(unchecked.Rope(theta=10000)) == repr(Rope())
    config = unchecked.FalconConfig.from_hf(SMALL | {"hidden_dropout": 0, "rope_theta": 10000})
    assert repr(config) == repr(FalconConfig.from_hf(SMALL))
