"""Converts a Hugging Face Falcon (a folder, or a model on the hub) into a checked folder that loads fast.

Needs memory for two of the largest tensors, whatever the model's size. Interrupted, the same command goes on. With
--calibration, weights of few bits keep more of the model's quality; the model is run on the text a layer at a time.

python scripts/convert_checkpoint.py ~/models/falcon-7b ~/models/falcon-7b-jax
python scripts/convert_checkpoint.py ~/models/falcon-7b ~/models/falcon-7b-int4 --weights int4 --calibration book.txt
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors, or a hub id such as tiiuae/falcon-7b."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder to make; it may hold this conversion, interrupted."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """What the weights are stored as; as they are if left out."""
    weights: Literal["native", "int8", "int4"] = "native"
    """Of the blocks' projections: as dtype says, or rounded to 8 or 4 bits, embedding and head then to 8."""
    calibration: Path | None = None
    """Text file (a few MB, like what the model is to read) on which weights of 8 or 4 bits are found; without it each
    is rounded to the nearest."""
    calibration_rows: int = 128
    """Most rows of that text."""
    calibration_row_tokens: int = 2048
    """Most tokens of a row; no more than the model's longest context."""
    allow_pickle: bool = False
    """Also reads pytorch_model*.bin, with torch >= 2.10; a pickle can run code, so only from a source you trust."""
    overwrite: bool = False
    """Replaces a finished checkpoint in the destination."""
    quiet: bool = False
    """Shows no progress bar."""


def main() -> int:
    """The exit code: 0 done, 2 not to be done, 130 interrupted."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from falcon_jax.checkpoint import CheckpointError, convert
    from falcon_jax.errors import ConfigError, one_line

    try:
        convert(
            arguments.source,
            arguments.destination,
            dtype=arguments.dtype,
            weights=arguments.weights,
            calibration=arguments.calibration,
            calibration_rows=arguments.calibration_rows,
            calibration_row_tokens=arguments.calibration_row_tokens,
            allow_pickle=arguments.allow_pickle,
            overwrite=arguments.overwrite,
            progress=not arguments.quiet,
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(arguments.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
