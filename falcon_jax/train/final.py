"""The end of a run: its weights as a Hugging Face folder, which this package and transformers load."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from falcon_jax.checkpoint import mapping
from falcon_jax.config import FalconConfig
from falcon_jax.model import params as model_params

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_model(
    config: FalconConfig,
    params: model_params.Params,
    folder: Path,
    tokenizer_folder: Path,
    dtype: str = "bfloat16",
) -> None:
    """Writes config.json, model.safetensors in `dtype` and the tokenizer's files, in place of what lies at
    `folder`.

    The whole model passes through host memory once, in `dtype`. The folder appears by one rename.
    """
    incoming = folder.with_name(f"{folder.name}.incoming")
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    rounded = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))(params)
    arrays = {path: np.asarray(leaf) for path, leaf in model_params.flatten(rounded).items()}
    tensors = {
        entry.hf_name: entry.to_hf({part.path: arrays[part.path] for part in entry.parts})
        for entry in mapping.table(config)
    }
    # transformers asks for the format, and refuses files that name none.
    save_file(tensors, incoming / "model.safetensors", metadata={"format": "pt"})
    settings = {**config.to_hf(), "dtype": dtype}
    (incoming / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, incoming / name)
    if folder.exists():
        shutil.rmtree(folder)
    incoming.rename(folder)
