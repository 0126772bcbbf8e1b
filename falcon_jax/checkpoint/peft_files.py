"""Adapters in the form of Hugging Face's PEFT: a folder with adapter_config.json and adapter_model.safetensors.

Owns how such a folder is read and written, and loading a model with an adapter merged. Theirs are matrices of modules:
lora_A [r, inputs] and lora_B [outputs, r]; ours are [*inputs, r] and [r, *outputs] of projections.

Query, key and value are one module there, query_key_value, with one A and a B of interleaved rows (mapping.py). What
is read from it becomes the target "query_key_value", three b that share one a, and is written back bit by bit. Where
query, key or value have an a of their own, the module's A is theirs one above the other, and each one's rows of B
are zero but for its own columns: the same function exactly, at the sum of their ranks.

The trap: PEFT's settings can change what the same arrays compute, and their number grows. A setting that is not known
here is refused unless it is off.
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from falcon_jax import sharding
from falcon_jax.checkpoint import hf_files, hub, mapping
from falcon_jax.checkpoint.load import LoadedCheckpoint, load
from falcon_jax.checkpoint.manifest import Manifest, is_converted, sync_folder, write_text
from falcon_jax.config import FalconConfig
from falcon_jax.errors import CheckpointError
from falcon_jax.model import adapters as model_adapters
from falcon_jax.model import quantize
from falcon_jax.model.adapters import FUSED, FUSED_PARTS, TARGETS, LoRA
from falcon_jax.model.params import Params, flatten, unflatten

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
# The modules of a layer, by what an adapter on all of one means here.
_MODULES = {
    FUSED: "self_attention.query_key_value",
    "output": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
# Settings that are read below, and those that say nothing of what the arrays compute.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
_READ |= {"layers_to_transform", "bias", "init_lora_weights"}
_IRRELEVANT = {"auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"}
_IRRELEVANT |= {"inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"}
_IRRELEVANT |= {"megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
# Starts of training that leave the base's weights alone. Others ("pissa", "olora", ...) take a part out of them.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Module:
    """One of theirs: its name in a FalconForCausalLM, its layer, our target, and the entry of its weight."""

    name: str
    layer: int
    target: str
    entry: mapping.Entry

    def entries(self, target: str, rank: int, config: FalconConfig) -> tuple[mapping.Entry, mapping.Entry]:
        """How lora_A and lora_B become the arrays of `target` in this layer."""
        shapes = model_adapters.shapes(config, self.layer, target, rank)
        (path, shape), *rest = shapes.items()
        num_outputs, num_inputs = self.entry.hf_shape
        first = mapping.Part(path, shape, ((0, 0, rank),))
        parts = tuple(mapping.Part(path, shape, part.runs) for (path, shape), part in zip(rest, self.entry.parts))
        return (
            mapping.Entry(f"{_PREFIX}{self.name}.lora_A.weight", (rank, num_inputs), (first,), transposed=True),
            mapping.Entry(f"{_PREFIX}{self.name}.lora_B.weight", (num_outputs, rank), parts, transposed=True),
        )


def read_adapter(folder: str | os.PathLike[str], config: FalconConfig) -> tuple[LoRA, Params]:
    """A PEFT folder's adapter for the model of `config`: what it is, and its arrays in float32 on the default device.

    Where a module's scale is not the whole's (rank_pattern, alpha_pattern), its b is multiplied by the difference.

    Raises:
      CheckpointError: a file is missing or damaged, a tensor is missing, of another shape or of no module of this
        model, or the settings ask for something that is not supported here.
    """
    folder = Path(folder).expanduser()
    where, settings = folder / CONFIG_FILE, _read_settings(folder)
    tensors = _read_tensors(folder)
    modules = [module for module in _modules(config) if _is_target(settings, module)]
    if not modules:
        raise CheckpointError(
            f"{where}: target_modules is {settings['target_modules']!r}; the model has "
            f"{', '.join(name.split('.')[1] for name in _MODULES.values())} in {config.num_layers} layers"
        )
    lora = LoRA(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        targets=tuple(name for name in TARGETS if any(module.target == name for module in modules)),
        rank_stabilized=bool(settings.get("use_rslora")),
    )
    leaves: dict[str, np.ndarray] = {}
    for module in modules:
        leaves |= _read_module(settings, module, tensors, lora, config, folder / TENSORS_FILE)
    if tensors:
        tensor = next(iter(tensors.values()))
        raise CheckpointError(f"{tensor} belongs to none of the modules that {CONFIG_FILE} names in this model")
    return lora, unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def write_adapter(
    folder: str | os.PathLike[str],
    config: FalconConfig,
    lora: LoRA,
    adapters: Params,
    *,
    base_model: str | None = None,
) -> Path:
    """Writes adapters as a PEFT folder in float32; one that is there is replaced.

    While it is written the folder has no adapter_config.json, without which nothing takes it for an adapter.

    Query, key and value with an a of their own become one module of the sum of their ranks.

    Args:
      base_model: name or folder of the model that they belong to, for PEFT to load it by itself.

    Returns:
      The folder.

    Raises:
      ConfigError: the arrays are no adapters of a Falcon.
    """
    folder = Path(folder).expanduser()
    model_adapters.pairs(adapters)  # no halves
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(adapters).items()}
    tensors, ranks = {}, {}
    for module in _modules(config):
        found = _module_matrices(module, leaves, config)
        if found:
            tensors |= found
            ranks[module] = next(iter(found.values())).shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    partial = folder / f"{TENSORS_FILE}.part"
    with open(partial, "wb") as file:
        file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / TENSORS_FILE)
    sync_folder(folder)
    settings = _settings(lora, ranks, config.num_layers, base_model)
    write_text(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
    return folder


def load_merged(
    source: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    dtype: Any = None,
    weights: str = "native",
    mesh: Mesh | None = None,
    verify: bool = True,
) -> LoadedCheckpoint:
    """`load`, with a PEFT folder's adapter merged into the weights, which are put into few bits after that.

    Peak memory is that of the native model and one weight more, whatever `weights` is.

    Raises:
      CheckpointError: as `load` and `read_adapter`; or the checkpoint's weights are in few bits already.
    """
    quantize.require_weights(weights)
    folder = hub.local_folder(source)
    if is_converted(folder) and (stored := Manifest.read(folder).weights) != "native":
        raise CheckpointError(
            f"{folder} holds {stored} weights, into which no adapter is merged: give a native checkpoint"
        )
    loaded = load(folder, dtype=dtype, mesh=mesh, verify=verify)
    lora, adapters = read_adapter(adapter, loaded.config)
    if mesh is not None:
        leaves = flatten(adapters)
        adapters = unflatten(jax.device_put(leaves, sharding.params_sharding(leaves, mesh)))
    merged = flatten(model_adapters.merge(loaded.params, adapters, lora, donate=True))
    if weights == "native":
        return loaded._replace(params=unflatten(merged))
    made: dict[str, jax.Array] = {}
    for path in list(merged):
        array = merged.pop(path)
        made |= quantize.on_device(path, array, weights, quantize.layouts(path, array.shape, weights, mesh))
    return loaded._replace(params=unflatten(made))


def _modules(config: FalconConfig) -> list[_Module]:
    """All that adapters may be on, in the model's order."""
    targets = {module: target for target, module in _MODULES.items()}
    found = []
    for entry in mapping.table(config):
        matched = re.fullmatch(r"transformer\.h\.(\d+)\.(\w+\.\w+)\.weight", entry.hf_name)
        if matched and matched[2] in targets:
            found.append(_Module(entry.hf_name.removesuffix(".weight"), int(matched[1]), targets[matched[2]], entry))
    return found


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = f"holds no {CONFIG_FILE}" if folder.is_dir() else "is no folder"
        raise CheckpointError(f"{folder} {what}: expected an adapter of PEFT, {CONFIG_FILE} with {TENSORS_FILE}")
    settings = hf_files.read_json(path)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {settings.get('peft_type')!r}; only 'LORA' is supported here")
    for name, value in settings.items():
        if name not in _READ | _IRRELEVANT and value not in (None, False, [], {}, ""):
            raise CheckpointError(f"{path}: {name} is {value!r}, which is not supported here: expected it to be off")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path}: bias is {settings['bias']!r}; adapters here leave biases alone: expected 'none'"
        )
    start = settings.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changed the model that it belongs to: save the adapter "
            "from peft with path_initial_model_for_weight_conversion"
        )

    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {name} is {settings.get(name)!r}, expected {expected}")

    def is_pattern(name: str, is_value: Any) -> bool:
        patterns = settings.setdefault(name, {})
        return isinstance(patterns, dict) and all(_is_regex(key) and is_value(patterns[key]) for key in patterns)

    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    require("r", _is_rank(settings.get("r")), "a whole number of at least 1")
    require("lora_alpha", _is_scale(settings.get("lora_alpha")), "a number above 0")
    require("use_rslora", settings.get("use_rslora") in (None, True, False), "true or false")
    require("rank_pattern", is_pattern("rank_pattern", _is_rank), "whole numbers by module")
    require("alpha_pattern", is_pattern("alpha_pattern", _is_scale), "numbers above 0 by module")
    are_names = isinstance(targets, list) and bool(targets) and all(isinstance(name, str) for name in targets)
    require("target_modules", are_names or _is_regex(targets), "names of modules, or one pattern")
    numbers = layers if isinstance(layers, list) else [layers]
    require("layers_to_transform", layers is None or all(type(n) is int for n in numbers), "numbers of layers, or null")
    return settings


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_target(settings: Mapping[str, Any], module: _Module) -> bool:
    """Whether the adapter is on a module.

    Source: check_target_module_exists of peft/tuners/tuners_utils.py.
    """
    targets, layers = settings["target_modules"], settings.get("layers_to_transform")
    if layers is not None and module.layer not in (layers if isinstance(layers, list) else [layers]):
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module.name) is not None
    return any(module.name == name or module.name.endswith(f".{name}") for name in targets)


def _of_module(patterns: Mapping[str, Any], module: _Module, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says of a module. Source: get_pattern_key of peft/utils/other.py."""
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module.name))
    return next(matching, default)


def _read_tensors(folder: Path) -> dict[str, hf_files.Tensor]:
    """The tensors by the names that they have on a FalconForCausalLM; those of a bare FalconModel lack a part."""
    path = folder / TENSORS_FILE
    if not path.exists() and (folder / _PICKLE_FILE).exists():
        raise CheckpointError(f"{folder} holds {_PICKLE_FILE}, a pickle: save the adapter again, as {TENSORS_FILE}")
    bare = f"{_PREFIX}h."
    found = hf_files.read_safetensors_header(path)
    return {name.replace(bare, f"{_PREFIX}transformer.h.", 1): tensor for name, tensor in found.items()}


def _read_module(
    settings: Mapping[str, Any],
    module: _Module,
    tensors: dict[str, hf_files.Tensor],
    lora: LoRA,
    config: FalconConfig,
    where: Path,
) -> dict[str, np.ndarray]:
    """Our arrays of one module, whose tensors are taken out of `tensors`."""
    rank = _of_module(settings["rank_pattern"], module, lora.rank)
    alpha = float(_of_module(settings["alpha_pattern"], module, lora.alpha))
    entries = module.entries(module.target, rank, config)
    arrays: dict[str, np.ndarray] = {}
    for entry in entries:
        tensor = tensors.pop(entry.hf_name, None)
        if tensor is None:
            raise CheckpointError(f"{where}: {entry.hf_name} is missing, which {CONFIG_FILE} calls for")
        if tensor.shape != entry.hf_shape:
            raise CheckpointError(
                f"{tensor} has the wrong shape: {CONFIG_FILE} and the model call for {list(entry.hf_shape)}"
            )
        stored = hf_files.HFFolder(where.parent, {tensor.name: tensor}, [where]).read(tensor.name)
        arrays |= entry.from_hf(stored, np.dtype(np.float32))
    factor = dataclasses.replace(lora, rank=rank, alpha=alpha).scale / lora.scale
    if not math.isclose(factor, 1.0, rel_tol=1e-9):
        for path in arrays:
            if path.endswith(".b"):
                arrays[path] *= np.float32(factor)
    return arrays


def _module_matrices(module: _Module, leaves: Mapping[str, np.ndarray], config: FalconConfig) -> dict[str, np.ndarray]:
    """lora_A and lora_B of a module by name; none where it has no adapter."""
    found, target = dict(leaves), module.target
    paths = list(model_adapters.shapes(config, module.layer, target, 1))
    if target == FUSED and paths[0] not in found:
        found = _fused(module.layer, found, config)
    if paths[0] not in found:
        return {}
    rank = found[paths[0]].shape[-1]
    return {entry.hf_name: entry.to_hf(found) for entry in module.entries(target, rank, config)}


def _fused(layer: int, leaves: Mapping[str, np.ndarray], config: FalconConfig) -> dict[str, np.ndarray]:
    """Adapters of query, key and value, each with its own a, as one with one a; {} where there is none."""
    prefix = f"layers.{layer}.attention."
    own = [name for name in FUSED_PARTS if f"{prefix}{name}.a" in leaves]
    if not own:
        return {}
    a = np.concatenate([leaves[f"{prefix}{name}.a"] for name in own], axis=-1)
    shapes = model_adapters.shapes(config, layer, FUSED, a.shape[-1])
    fused = {path: np.zeros(shape, a.dtype) for path, shape in shapes.items()}
    fused[f"{prefix}{FUSED}.a"] = a
    start = 0
    for name in own:
        b = leaves[f"{prefix}{name}.b"]
        fused[f"{prefix}{name}.b"][start : start + len(b)] = b
        start += len(b)
    return fused


def _settings(lora: LoRA, ranks: Mapping[_Module, int], num_layers: int, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks, all of one scale."""
    usual = Counter(ranks.values()).most_common(1)[0][0]

    def alpha(rank: int) -> int | float:
        ratio = math.sqrt(rank / lora.rank) if lora.rank_stabilized else rank / lora.rank
        return int(lora.alpha * ratio) if (lora.alpha * ratio).is_integer() else lora.alpha * ratio

    names, unusual = [], {}
    for target, module_name in _MODULES.items():
        on = {module: rank for module, rank in ranks.items() if module.target == target}
        names += [module_name.split(".")[1]] if len(on) == num_layers else [module.name for module in on]
        unusual |= {module.name: rank for module, rank in on.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": alpha(usual),
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "target_modules": names,
        "rank_pattern": {re.escape(name): rank for name, rank in unusual.items()},
        "alpha_pattern": {re.escape(name): alpha(rank) for name, rank in unusual.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
