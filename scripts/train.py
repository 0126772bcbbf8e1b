"""Trains a Falcon from scratch on text files. A run found in --output is resumed from its newest checkpoint."""

import dataclasses
import sys

import tyro

from falcon_jax import commands
from falcon_jax import options as shared
from falcon_jax.errors import CheckpointError, ConfigError, one_line
from falcon_jax.train.loop import NotFiniteError, Trainer
from falcon_jax.train.settings import TrainConfig

SIGNALLED = 3  # with a checkpoint written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    run: TrainConfig
    compilation_cache: shared.CompilationCache = None


def main() -> int:
    """The exit code: 0 done or out of --max-seconds, 2 not to be done, 3 stopped by a signal."""
    try:
        arguments = tyro.cli(tyro.conf.OmitArgPrefixes[Arguments], description=__doc__)
        commands.use_compilation_cache(arguments.compilation_cache)
        config = arguments.run
        trainer = Trainer(config)
        if trainer.step:
            print(f"{config.output}: goes on from the checkpoint of step {trainer.step}", file=sys.stderr)
        result = trainer.run()
    except (ValueError, NotImplementedError, NotFiniteError, OSError) as error:
        known = (ConfigError, CheckpointError, NotFiniteError, OSError)
        # An attention that is unknown, or that cannot run here, is found when the step is made.
        if not isinstance(error, known) and "attention: implementation=" not in str(error):
            raise
        print(f"train: {one_line(error)}", file=sys.stderr)
        return 2
    best = "not validated yet"
    if result.best_step >= 0:
        best = f"best on validation {result.bits_per_byte:.4f} bits a byte after step {result.best_step}"
    if not result.is_complete:
        print(f"{config.output}: checkpoint of step {result.step}; the same command goes on from there; {best}")
        return SIGNALLED if result.was_signalled else 0
    print(f"{config.output / 'model'}: {result.step} steps; {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
