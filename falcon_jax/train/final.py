"""The end of a run: its weights as a Hugging Face folder, which this package and transformers load."""

import shutil
from pathlib import Path

from falcon_jax.checkpoint.export import export_params
from falcon_jax.config import FalconConfig
from falcon_jax.model.params import Params


def write_model(
    config: FalconConfig, params: Params, folder: Path, tokenizer_folder: Path, dtype: str = "bfloat16"
) -> None:
    """Writes the weights in `dtype`, the configuration and the tokenizer's files, in place of what lies at `folder`.

    The folder appears by one rename, when it is whole.
    """
    incoming = folder.with_name(f"{folder.name}.incoming")
    shutil.rmtree(incoming, ignore_errors=True)  # of a process that was lost while writing
    export_params(config, params, incoming, dtype=dtype, tokenizer_folder=tokenizer_folder)
    if folder.exists():
        shutil.rmtree(folder)
    incoming.rename(folder)
