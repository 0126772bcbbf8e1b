"""Hugging Face's names, defaults and legacy forms of a Falcon configuration, as plain dictionaries.

Owns how config.json spells each field of FalconConfig, and which spellings contradict each other. Knows no
FalconConfig class: `read` returns its keyword arguments, `write` reads its attributes.

The trap: transformers ignores what it does not use, so a file can say two things and load there. Here it is
refused, apart from what published files really say (falcon-7b: `num_kv_heads` 71 beside `multi_query` true).

Source: transformers 5.17: configuration_falcon.py, modeling_falcon.py and modeling_rope_utils.py.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from falcon_jax.errors import ConfigError

# Field -> the keys that name it in files: first the one that we write, then RefinedWeb's and other tools'.
ALIASES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "width": ("hidden_size", "n_embed", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_kv_heads", "n_head_kv", "num_key_value_heads"),
    "mlp_width": ("ffn_hidden_size", "intermediate_size"),
    "activation": ("activation", "hidden_act"),
    "max_tokens": ("max_position_embeddings",),
    "norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps"),
    "eos_token_ids": ("eos_token_id",),
}
# Names in transformers.activations.ACT2FN of the GELU by the error function; others approximate it.
EXACT_GELU = ("gelu", "gelu_python")
ARCHITECTURES = ("FalconForCausalLM", "FalconModel", "RWForCausalLM", "RWModel")
LEGACY_NEW, LEGACY_OLD = "RefinedWeb", "RefinedWebModel"


def label(field: str) -> str:
    """How messages name a field: our name, and the key in config.json where that differs."""
    key = ALIASES.get(field, (field,))[0]
    return field if key == field else f"{field} ({key})"


def require_whole(name: str, value: object, *, at_least: int) -> int:
    """Returns `value` if it is a whole number (True and 3.0 are not) of at least that; ConfigError if not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {at_least}")
    return value


def require_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Returns `value` as a float if it is a finite number (True is not) within bounds; ConfigError if not."""
    limits = [("at least", at_least), ("above", above), ("below", below)]
    wanted = " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)
    error = ConfigError(f"{name} is {value!r}; it must be a number {wanted}".rstrip())
    # Written so that NaN, infinity and integers beyond a float's range all fail.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise error
    if at_least is not None and value < at_least:
        raise error
    if (above is not None and value <= above) or (below is not None and value >= below):
        raise error
    return float(value)


def require_flag(name: str, value: object) -> bool:
    """Returns `value` if it is True or False; ConfigError if not."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What yarn multiplies cos and sin by when the configuration does not say it.

    Source: YaRN (Peng et al. 2023), equation 22: 0.1 ln(s) + 1; the ratio of two of them is DeepSeek's, as in
    `_compute_yarn_parameters`.
    """

    def softening(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if mscale and mscale_all_dim:
        return softening(mscale) / softening(mscale_all_dim)
    return softening(1.0)


def read(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of FalconConfig that `keys`, the content of a config.json, stand for.

    "rope" is None or the keyword arguments of Rope. What FalconConfig and Rope check by themselves is not
    checked here.

    Raises:
        ConfigError: a key is missing, unsupported, or contradicts another.
    """
    model_type = _family(keys)
    _refuse_unsupported(keys)
    fields: dict[str, Any] = {
        field: require_whole(name, value, at_least=1)
        for field in ("vocab_size", "width", "num_layers", "num_heads")
        for name, value in [_required(keys, ALIASES[field])]
    }
    block = _block(keys, model_type)
    fields |= {"block": block["block"], "num_norms": block["num_norms"]}
    fields["num_kv_heads"] = _kv_heads(keys, fields["num_heads"], block["new_decoder"], block["multi_query"])
    fields["mlp_width"] = _mlp_width(keys, fields["width"])
    max_tokens = _optional(keys, ALIASES["max_tokens"], 2048)
    fields["max_tokens"] = require_whole(label("max_tokens"), max_tokens, at_least=1)
    fields["norm_epsilon"] = _optional(keys, ALIASES["norm_epsilon"], 1e-5)
    for name, default in (("initializer_range", 0.02), ("hidden_dropout", 0.0), ("attention_dropout", 0.0)):
        fields[name] = _optional(keys, (name,), default)
    for name, default in (("bias", False), ("tie_word_embeddings", True)):
        fields[name] = _flag(keys, name, default)
    fields |= _token_ids(keys, model_type)
    _check_head_dim(keys, fields["width"], fields["num_heads"])
    rope = _rope(keys, fields["max_tokens"])
    alibi = _flag(keys, "alibi", False)
    if alibi and rope["scaling"] != "default":
        raise ConfigError(
            f"alibi is true beside rope scaling {rope['scaling']!r}; a model has one kind of positions: "
            "set alibi to false or remove the rope scaling"
        )
    # transformers 5.x writes default rope_parameters for ALiBi models too; they mean nothing there.
    return fields | {"positions": "alibi" if alibi else "rope", "rope": None if alibi else rope}


def _family(keys: Mapping[str, Any]) -> str:
    model_type = keys.get("model_type")
    architectures = keys.get("architectures") or []
    if not isinstance(architectures, list | tuple):
        raise ConfigError(f"architectures is {architectures!r}; it must be a list such as ['FalconForCausalLM']")
    for name in architectures:
        if name not in ARCHITECTURES:
            raise ConfigError(f"architectures names {name!r}; supported are {', '.join(ARCHITECTURES)}")
    if model_type is None:
        if any(name.startswith("RW") for name in architectures):
            raise ConfigError(
                f"model_type is missing beside architectures {list(architectures)}; "
                f"it must be {LEGACY_NEW!r} (as the 40B) or {LEGACY_OLD!r} (as the 7B and the RW models)"
            )
        return "falcon"
    if model_type not in ("falcon", LEGACY_NEW, LEGACY_OLD):
        raise ConfigError(f"model_type is {model_type!r}; supported are 'falcon', {LEGACY_NEW!r} and {LEGACY_OLD!r}")
    return model_type


def _refuse_unsupported(keys: Mapping[str, Any]) -> None:
    name, activation = _first(keys, ALIASES["activation"])
    if activation is not None and activation not in EXACT_GELU:
        raise ConfigError(
            f"{name} is {activation!r}; every Falcon uses the exact GELU, {EXACT_GELU[0]!r} "
            "(gelu_new, gelu_fast and their like approximate it)"
        )
    if _flag(keys, "apply_residual_connection_post_layernorm", False):
        raise ConfigError(
            "apply_residual_connection_post_layernorm is true; no published Falcon uses it and transformers "
            "dropped it: it must be false or absent"
        )
    partial = keys.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise ConfigError(f"partial_rotary_factor is {partial!r}; Falcon rotates whole heads: it must be 1 or absent")


def _block(keys: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    legacy = model_type != "falcon"
    new_decoder = _flag(keys, "new_decoder_architecture", model_type == LEGACY_NEW)
    if legacy and new_decoder != (model_type == LEGACY_NEW):
        raise ConfigError(
            f"new_decoder_architecture is {new_decoder} beside model_type {model_type!r}; "
            f"{LEGACY_NEW!r} is the new decoder and {LEGACY_OLD!r} the old one"
        )
    if model_type == LEGACY_OLD:
        # Copies of the code that reads these files disagree on the defaults, so there is none to rely on.
        for name in ("multi_query", "parallel_attn"):
            _required(keys, (name,))
    parallel = _flag(keys, "parallel_attn", True)
    if new_decoder and not parallel:
        raise ConfigError(
            "parallel_attn is false beside the new decoder architecture "
            f"({'model_type ' + repr(model_type) if legacy else 'new_decoder_architecture true'}), "
            "whose blocks are always parallel; set parallel_attn to true"
        )
    return {
        "new_decoder": new_decoder,
        "multi_query": _flag(keys, "multi_query", True),
        "block": "parallel" if parallel else "sequential",
        "num_norms": _num_norms(keys, new_decoder, parallel),
    }


def _num_norms(keys: Mapping[str, Any], new_decoder: bool, parallel: bool) -> int:
    """As FalconDecoderLayer, but for what crashes in its forward pass."""
    key = "num_ln_in_parallel_attn"
    num_norms = keys.get(key)
    if num_norms is not None and (isinstance(num_norms, bool) or num_norms not in (1, 2)):
        raise ConfigError(f"{key} is {num_norms!r}; it must be 1, 2 or null")
    if not parallel:  # the key speaks of parallel blocks alone; a sequential one has its two norms whatever it says
        return 2
    if new_decoder:
        return 2 if num_norms is None else num_norms
    if num_norms == 2:
        raise ConfigError(
            f"{key} is 2 without new_decoder_architecture; the old parallel block has one norm: "
            f"set {key} to 1 or null, or new_decoder_architecture to true"
        )
    return 1


def _kv_heads(keys: Mapping[str, Any], num_heads: int, new_decoder: bool, multi_query: bool) -> int:
    """K, the key and value heads that the layer has: its fused QKV rows are (K, N / K + 2, H)."""
    name, stated = _first(keys, ALIASES["num_kv_heads"])
    if stated is not None:
        require_whole(name, stated, at_least=1)
    if new_decoder:  # multi_query says nothing here: falcon-40b has it true beside 8 heads
        return num_heads if stated is None else stated
    if multi_query:
        # transformers fills in N where nothing is said, so published multi-query files say N (falcon-7b: 71).
        if stated not in (None, 1, num_heads):
            raise ConfigError(
                f"{name} is {stated} beside multi_query true without new_decoder_architecture, which has 1; "
                f"set {name} to 1, or new_decoder_architecture to true for {stated} grouped heads"
            )
        return 1
    if stated not in (None, num_heads):
        raise ConfigError(
            f"{name} is {stated} beside multi_query false without new_decoder_architecture, which has one "
            f"for each query head; set {name} to {num_heads}, or new_decoder_architecture to true"
        )
    return num_heads


def _mlp_width(keys: Mapping[str, Any], width: int) -> int:
    name, mlp_width = _first(keys, ALIASES["mlp_width"])
    if mlp_width is None:
        name, mlp_width = ALIASES["mlp_width"][0], 4 * width
    require_whole(name, mlp_width, at_least=1)
    ratio = keys.get("ff_factor")  # falcon2-11b says it a second time
    if ratio is not None and require_number("ff_factor", ratio) * width != mlp_width:
        raise ConfigError(
            f"ff_factor is {ratio!r}, which makes the MLP {ratio * width} wide, but {name} is {mlp_width}; "
            f"remove ff_factor or set {name} to {ratio * width}"
        )
    return mlp_width


def _check_head_dim(keys: Mapping[str, Any], width: int, num_heads: int) -> None:
    head_dim = keys.get("head_dim")
    if head_dim is not None and require_whole("head_dim", head_dim, at_least=1) * num_heads != width:
        raise ConfigError(
            f"head_dim is {head_dim!r}, but hidden_size {width} / num_attention_heads {num_heads} is "
            f"{width / num_heads:g}; Falcon has no other head dim: remove head_dim"
        )


def _token_ids(keys: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    # Absent in a current file means what FalconConfig of transformers fills in. Legacy files always say it.
    default = 11 if model_type == "falcon" else None
    eos = keys.get("eos_token_id", default)
    if eos is None and "eos_token_id" not in keys:
        raise ConfigError(f"eos_token_id is missing; a {model_type} file names it, or null for none")
    eos_ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    return {
        "bos_token_id": keys.get("bos_token_id", default),
        "eos_token_ids": tuple(eos_ids),
        "pad_token_id": keys.get("pad_token_id"),
    }


def _rope(keys: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """The keyword arguments of Rope; `rope_parameters` (5.x) and `rope_scaling` (4.x) must agree."""
    found = {
        name: _rope_entry(name, keys[name], keys, max_tokens)
        for name in ("rope_parameters", "rope_scaling")
        if keys.get(name)
    }
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise ConfigError(
            f"rope_parameters is {keys['rope_parameters']!r} and rope_scaling is {keys['rope_scaling']!r}; "
            "they must mean the same: remove one"
        )
    return next(iter(found.values())) if found else _rope_entry("rope_parameters", {}, keys, max_tokens)


# Keys of a rope dictionary that are fields of Rope by the same name and pass through as they are.
_ROPE_FIELDS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ROPE_KEYS = {*_ROPE_FIELDS, "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}


def _rope_entry(name: str, entry: Any, keys: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{name} is {entry!r}; it must be an object such as {{'rope_type': 'default'}} or null")
    partial = entry.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise ConfigError(f"partial_rotary_factor in {name} is {partial!r}; Falcon rotates whole heads: it must be 1")
    unknown = sorted(set(entry) - _ROPE_KEYS - {"partial_rotary_factor"})
    scaling = _agreed(name, [("rope_type", entry.get("rope_type")), ("type", entry.get("type"))]) or "default"
    if scaling not in ("default", "linear", "dynamic", "yarn"):
        raise ConfigError(f"rope_type in {name} is {scaling!r}; supported are default, linear, dynamic and yarn")
    if unknown:
        raise ConfigError(f"{unknown[0]} in {name} is {entry[unknown[0]]!r}; {scaling!r} scaling has no such key")
    theta = _agreed("the configuration", [("rope_theta", keys.get("rope_theta")), (name, entry.get("rope_theta"))])
    rope: dict[str, Any] = {"scaling": scaling}
    rope["theta"] = require_number("rope_theta", 10000.0 if theta is None else theta, above=1.0)
    rope |= {key: entry[key] for key in _ROPE_FIELDS if entry.get(key) is not None}
    original = _agreed(
        "the configuration",
        [
            (f"original_max_position_embeddings in {name}", entry.get("original_max_position_embeddings")),
            ("original_max_position_embeddings", keys.get("original_max_position_embeddings")),
        ],
    )
    if scaling in ("dynamic", "yarn"):
        rope["original_max_tokens"] = max_tokens if original is None else original
    if scaling == "default":
        # Without a scaling a factor of 1 is harmless; Rope refuses another one.
        return rope | ({} if entry.get("factor") is None else {"factor": entry["factor"]})
    return rope | {"factor": _rope_factor(name, entry, scaling, original, max_tokens)}


def _rope_factor(name: str, entry: Mapping[str, Any], scaling: str, original: Any, max_tokens: int) -> float:
    if entry.get("factor") is not None:
        return require_number(f"factor in {name}", entry["factor"], at_least=1.0)
    if scaling == "yarn" and "factor" in entry and original is not None:  # null: the ratio of the two contexts
        require_whole(f"original_max_position_embeddings in {name}", original, at_least=1)
        return require_whole("max_position_embeddings", max_tokens, at_least=original) / original
    raise ConfigError(f"factor in {name} is missing; {scaling!r} scaling needs a number of at least 1")


def _agreed(where: str, named: list[tuple[str, Any]]) -> Any:
    """The one value among `named` that is not None; ConfigError if two differ."""
    stated = [(name, value) for name, value in named if value is not None]
    for name, value in stated[1:]:
        if value != stated[0][1]:
            raise ConfigError(
                f"{stated[0][0]} is {stated[0][1]!r} and {name} is {value!r} in {where}; "
                "they must mean the same: remove one"
            )
    return stated[0][1] if stated else None


def _first(keys: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of `names` with a value, and the value; (names[0], None) if none. Two must not differ."""
    value = _agreed("the configuration", [(name, keys.get(name)) for name in names])
    return next((name for name in names if keys.get(name) is not None), names[0]), value


def _required(keys: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    name, value = _first(keys, names)
    if value is None:
        also = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
        raise ConfigError(f"{name}{also} is missing; a Falcon configuration must state it")
    return name, value


def _optional(keys: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value, or `default` where no name is present. A null is passed on, for FalconConfig to refuse."""
    if not any(name in keys for name in names):
        return default
    return _first(keys, names)[1]


def _flag(keys: Mapping[str, Any], name: str, default: bool) -> bool:
    return require_flag(name, keys.get(name, default))


def write(config: Any) -> dict[str, Any]:
    """The content of a config.json for a FalconConfig, with RoPE in both the 5.x and the 4.x spelling."""
    eos = config.eos_token_ids
    keys: dict[str, Any] = {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "ffn_hidden_size": config.mlp_width,
        "activation": EXACT_GELU[0],
        "alibi": config.positions == "alibi",
        "new_decoder_architecture": config.new_decoder_architecture,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.block == "parallel",
        "num_ln_in_parallel_attn": config.num_norms if config.new_decoder_architecture else None,
        "bias": config.bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_tokens,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }
    return keys if config.rope is None else keys | _write_rope(config.rope)


def _write_rope(rope: Any) -> dict[str, Any]:
    if rope.scaling == "default":
        parameters = {"rope_type": "default", "rope_theta": rope.theta}
        return {"rope_theta": rope.theta, "rope_scaling": None, "rope_parameters": parameters}
    scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "yarn":
        scaling["original_max_position_embeddings"] = rope.original_max_tokens
        scaling |= {key: value for key in _ROPE_FIELDS if (value := getattr(rope, key)) is not None}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
    }
