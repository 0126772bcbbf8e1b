"""Tiny Falcon models of transformers: the reference that parity tests compare with.

Each variant keeps what is peculiar in its published configuration, and every parameter is random, norms and
biases included: with their default values a swapped or forgotten one would go unseen.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from hypothesis import strategies as st
from transformers import FalconConfig, FalconForCausalLM

TINY_VOCAB_SIZE = 97  # no multiple of 64
_HEAD_DIM = 8

# As in the published config.json: the heads of falcon-7b are odd and it states K = N beside multi_query; 40B
# and 180B leave num_ln_in_parallel_attn out; the G = N / K of the 180B is odd. Six heads in falcon-rw-7b make
# ALiBi take its last slopes from the next power of two.
_SEQUENTIAL = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
_NEW = {"new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 2}
_UNTIED = {"tie_word_embeddings": False, "rope_theta": 500042.0, "max_position_embeddings": 256}
_VARIANTS: dict[str, dict[str, Any]] = {
    "falcon-rw-1b": _SEQUENTIAL | {"num_attention_heads": 4, "num_kv_heads": 4},
    "falcon-rw-7b": _SEQUENTIAL | {"num_attention_heads": 6, "num_kv_heads": 6},
    "falcon-7b": {"num_attention_heads": 5, "num_kv_heads": 5, "multi_query": True},
    "falcon-40b": _NEW | {"num_attention_heads": 8},
    "falcon-180b": _NEW | {"num_attention_heads": 6},
    "falcon2-11b": _NEW | _UNTIED | {"num_attention_heads": 4, "num_ln_in_parallel_attn": 1},
    "falcon-40b-alibi": {"num_attention_heads": 4, "num_kv_heads": 1, "multi_query": True, "alibi": True},
}
VARIANTS = tuple(_VARIANTS)
# The published falcon-7b's own head count, which no mesh divides: width 568 at head dim 8.
SEVENTY_ONE_HEADS = {"num_attention_heads": 71, "num_kv_heads": 71, "hidden_size": 71 * _HEAD_DIM}


def tiny_config(variant: str, **changes: Any) -> FalconConfig:
    """The variant with 2 layers, heads of 8 and a vocabulary of 97; `changes` are transformers' keys.

    `tiny_config("falcon-7b", **SEVENTY_ONE_HEADS)` has the published head count.
    """
    keys: dict[str, Any] = {
        "vocab_size": TINY_VOCAB_SIZE,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    keys |= _VARIANTS[variant] | changes
    keys.setdefault("hidden_size", _HEAD_DIM * keys["num_attention_heads"])
    keys.setdefault("architectures", ["FalconForCausalLM"])
    return FalconConfig(**keys)


@st.composite
def hf_configs(draw: st.DrawFn) -> FalconConfig:
    """Any small Falcon that transformers can run: odd head counts, every K, both norm layouts, any rope.

    One seed decides all. Drawn choice by choice, examples of a short run resemble one another: of 30, one had
    grouped heads and one a rope scaling.
    """
    rng = random.Random(draw(st.integers(0, 2**64 - 1)))
    block = rng.choice(["sequential", "parallel", "new", "new"])
    alibi = rng.random() < 0.35
    num_heads = rng.choice([1, 3, 4, 5, 6, 7, 8, 9, 10])
    # Rotary heads are even, and dynamic scaling divides by H - 2. ALiBi would take any, but transformers 5.23 asks for
    # even ones there too.
    width = num_heads * rng.choice([4, 6, 8, 16])
    keys: dict[str, Any] = {
        "vocab_size": rng.choice([size for size in range(65, 250) if size % 64 != 0]),
        "hidden_size": width,
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": num_heads,
        "ffn_hidden_size": rng.choice([None, 2 * width, 77]),
        "alibi": alibi,
        "bias": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.5,
        "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
        "max_position_embeddings": rng.choice([12, 64]),
        "eos_token_id": rng.choice([11, [11, 5], None]),
        "pad_token_id": rng.choice([None, 0]),
        "architectures": ["FalconForCausalLM"],
    }
    if block == "new":
        divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
        keys |= {"new_decoder_architecture": True, "num_kv_heads": rng.choice(divisors[1:-1] or divisors)}
        keys |= {"num_ln_in_parallel_attn": rng.choice([None, 1, 2])}
    else:
        keys |= {"parallel_attn": block == "parallel", "multi_query": rng.random() < 0.5}
    if not alibi:
        keys["rope_parameters"] = _rope_parameters(rng, keys["max_position_embeddings"])
    return FalconConfig(**keys)


def _rope_parameters(rng: random.Random, max_tokens: int) -> dict[str, Any]:
    scaling = rng.choice(["default", "linear", "dynamic", "yarn"])
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": rng.choice([100.0, 10000.0, 500042.0])}
    if scaling != "default":
        rope["factor"] = rng.choice([1.0, 2.0, 4.5])
    if scaling == "yarn":
        optional = {
            "original_max_position_embeddings": rng.choice([8, max_tokens]),
            "attention_factor": rng.choice([0.8, 1.3]),
            "beta_fast": rng.choice([8.0, 32]),
            "beta_slow": rng.choice([0.5, 2]),
            "truncate": rng.random() < 0.5,
        }
        rope |= {key: value for key, value in optional.items() if rng.random() < 0.5}
        if rng.random() < 0.5:
            rope |= {"mscale": 0.7, "mscale_all_dim": 1.2}
    return rope


def make_model(config: FalconConfig, seed: int = 0) -> FalconForCausalLM:
    """A model in float32 and eval mode, sdpa attention, each parameter random.

    Matrices are scaled by their inputs so that attention scores and logits spread by 1 to 3 at any width: the
    attention is far from uniform and an error of 1e-4 in a logit is an error of 1e-4, not of the whole value.
    For bf16, save with dtype="bfloat16" and load again: `model.to` would round RoPE's frequencies as well.
    """
    model = FalconForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                # The embedding is the tied head too: 2 / sqrt(D) makes logits of 2 from a normalised state.
                gain = 2.0 if name in ("transformer.word_embeddings.weight", "lm_head.weight") else 1.2
                parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
            elif name.endswith("weight"):  # the scale of a norm
                parameter.copy_(1.0 + 0.25 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model.requires_grad_(False)


def save_model(
    model: FalconForCausalLM,
    folder: str | Path,
    *,
    max_shard_size: int | None = None,
    dtype: str | None = None,
    strip_prefix: bool = False,
    store_tied_head: bool = False,
    extra_vocab_rows: int = 0,
    pickle: bool = False,
) -> Path:
    """Writes `model` as a Hugging Face folder, in one of the forms that checkpoints have; returns the folder.

    Args:
        max_shard_size: bytes a file; above it several files and an index. None: one file.
        dtype: "float32", "bfloat16" or "float16"; None: the model's own.
        strip_prefix: names without `transformer.`, as of a base model, but with an untied head.
        store_tied_head: store `lm_head.weight` beside the embedding that it equals.
        extra_vocab_rows: rows appended to embedding and head that config.json does not count.
        pickle: pytorch_model.bin instead of safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _stored_tensors(model, strip_prefix, store_tied_head, extra_vocab_rows)
    target = getattr(torch, dtype) if dtype is not None else model.dtype
    tensors = {name: tensor.to(target).contiguous() for name, tensor in tensors.items()}

    keys = json.loads(model.config.to_json_string(use_diff=False))
    keys |= {"architectures": ["FalconModel" if strip_prefix else "FalconForCausalLM"]}
    keys |= {"dtype": str(target).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    _write_shards(tensors, folder, max_shard_size, pickle)
    return folder


def _stored_tensors(
    model: FalconForCausalLM, strip_prefix: bool, store_tied_head: bool, extra_vocab_rows: int
) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if extra_vocab_rows:
        for seed, name in enumerate(["transformer.word_embeddings.weight", "lm_head.weight"]):
            generator = torch.Generator().manual_seed(0 if tied else seed)
            rows = torch.randn((extra_vocab_rows, tensors[name].shape[1]), generator=generator)
            tensors[name] = torch.cat([tensors[name], rows.to(tensors[name].dtype)])
    if tied and not store_tied_head:
        del tensors["lm_head.weight"]
    if strip_prefix:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return tensors


def _write_shards(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_size: int | None, pickle: bool) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if max_shard_size is not None and shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes

    stem, suffix = ("pytorch_model", ".bin") if pickle else ("model", ".safetensors")
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        of = f"-{index:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{stem}{of}{suffix}"
        if pickle:
            torch.save(shard, path)
        else:
            safetensors.torch.save_file(shard, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


END_OF_TEXT = "<|endoftext|>"  # id 0 of the tiny tokenizer
_TEXT = """The lighthouse keeper climbed the stair at dusk, as she had every evening for thirty years.
Below her the sea was grey and the gulls were quarrelling on the rocks. "It will blow tonight," she said to
the lamp, for there was nobody else to say it to; and the lamp, when she had lit it, seemed to agree with her.
In the village they counted 1, 2, 3, 10, 100 boats, and again: naïve, café, Zürich, 東京, 🦅.
"""


def tiny_tokenizer(folder: str | Path, vocab_size: int = 320) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE on a few lines; writes tokenizer.json and tokenizer_config.json into `folder`.

    Any text survives encode and decode. The 256 bytes and <|endoftext|> (id 0) come first, so `vocab_size` is
    at least 257, and a model for it needs `tiny_config(variant, vocab_size=320)`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    keys = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
    return tokenizer
