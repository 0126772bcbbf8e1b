"""What FalconConfig refuses: one line that names the key, its value and what would be right."""

import dataclasses
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from falcon_jax import config as config_module
from falcon_jax.config import FalconConfig, Rope
from falcon_jax.errors import ConfigError
from tests.config.test_config import GROUPED, LEGACY_7B, LEGACY_40B, SMALL

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
