"""Writes a converted checkpoint back as a Hugging Face folder that transformers loads, its tensors bit by bit the same.

python scripts/export_checkpoint.py ~/models/falcon-7b-jax ~/models/falcon-7b-again
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder made by convert_checkpoint.py."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder to make."""
    max_shard_gb: float = 5.0
    """Most gigabytes a file holds; a larger model gets several and an index."""


def main() -> int:
    """The exit code: 0 done, 2 not to be done, 130 interrupted."""
    arguments = tyro.cli(Arguments, description=__doc__)
    from falcon_jax.checkpoint import CheckpointError, export
    from falcon_jax.errors import ConfigError, one_line

    if arguments.max_shard_gb <= 0:
        print(f"error: --max-shard-gb is {arguments.max_shard_gb}; it must be above 0", file=sys.stderr)
        return 2
    try:
        export(arguments.checkpoint, arguments.destination, max_shard_bytes=int(arguments.max_shard_gb * 1e9))
    except KeyboardInterrupt:
        return 130
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(arguments.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
