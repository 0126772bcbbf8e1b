"""Merges a LoRA adapter in PEFT's form into its model, and writes that as a Hugging Face folder.

python scripts/merge_lora.py ~/models/falcon-7b runs/book/adapter ~/models/falcon-7b-book
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, one made by convert_checkpoint.py, or a hub id such as tiiuae/falcon-7b."""
    adapter: Annotated[Path, tyro.conf.Positional]
    """Folder with adapter_config.json and adapter_model.safetensors."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """What the weights are stored as; as they are if left out."""


def main() -> int:
    """The exit code: 0 done, 2 not to be done, 130 interrupted."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from falcon_jax.checkpoint.export import export_params
    from falcon_jax.checkpoint.peft_files import load_merged
    from falcon_jax.errors import exit_code

    def work() -> None:
        config, params, tokenizer_folder = load_merged(arguments.model, arguments.adapter, dtype=arguments.dtype)
        export_params(config, params, arguments.destination, tokenizer_folder=tokenizer_folder)
        print(arguments.destination)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
