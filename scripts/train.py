"""Trains a Falcon on text: from scratch, from a checkpoint (--base), or low-rank adapters beside one (--lora too).

A run found in --output is resumed from its newest checkpoint.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from falcon_jax import commands, sharding
from falcon_jax import options as shared
from falcon_jax.errors import ConfigError, one_line
from falcon_jax.model import params as model_params
from falcon_jax.train import processes
from falcon_jax.train.loop import NotFiniteError, Trainer, prepare_output
from falcon_jax.train.recipes import RECIPES
from falcon_jax.train.settings import TrainConfig

MAX_UNSPLIT_SHARE = 0.1  # of the training state, before it is worth a word
SIGNALLED = 3  # with a checkpoint written
# Options that say one thing in different ways: given one, a recipe's value for the others is left out.
ALTERNATIVES = (("steps", "tokens", "time_budget_s"), ("warmup_steps", "warmup_tokens"), ("model", "base"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    run: TrainConfig
    recipe: Literal["falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon-180b"] | None = None
    """A published run, whose model, tokens, rates, batch, ramp and layout stand where no option says otherwise."""
    distributed: bool = False
    """One of several processes, which find each other as Slurm, Open MPI or Kubernetes started them."""
    tokenize_only: bool = False
    """End when the tokens are made, which one machine without accelerators can do before many with them begin."""
    compilation_cache: shared.CompilationCache = None


def main() -> int:
    """The exit code: 0 done or out of --max-seconds, 2 not to be done, 3 stopped by a signal, 130 before any step."""

    def work() -> int:
        arguments = parse(sys.argv[1:])
        if arguments.tokenize_only and arguments.distributed:
            raise ConfigError("--tokenize-only is for one process: leave --distributed out")
        if arguments.distributed:
            join_processes()
        commands.use_compilation_cache(arguments.compilation_cache)
        return tokenize(arguments.run) if arguments.tokenize_only else train(arguments.run)

    return commands.finish(
        work, known=NotFiniteError, less="lower --batch-size, raise --num-micro-batches, or take --remat block"
    )


def parse(words: Sequence[str]) -> Arguments:
    """The command line's words, after those of the recipe; tyro ends the process where they cannot be."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    recipe = RECIPES.get(_value_of("recipe", words) or "")
    standing = {} if recipe is None else recipe.settings()
    for group in ALTERNATIVES:
        if names.intersection(group):
            standing = {name: value for name, value in standing.items() if name not in group}
    # Of an option given twice the last one holds.
    first = [part for name, value in standing.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return tyro.cli(tyro.conf.OmitArgPrefixes[Arguments], args=[*first, *words], description=__doc__)


def _value_of(option: str, words: Sequence[str]) -> str | None:
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith(f"--{option}="):
            return word.partition("=")[2]
        if word == f"--{option}":
            return following
    return None


def join_processes() -> None:
    """Before JAX makes its devices, which are all processes' from then on. Raises: ConfigError where none are found."""
    # It would take SIGTERM for itself, which the run waits for.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {one_line(error)}: start one process a node, or a GPU, with srun, mpirun or a Kubernetes "
            "JobSet, or leave the option out"
        ) from error


def tokenize(config: TrainConfig) -> int:
    splits = prepare_output(config)
    sizes = ", ".join(f"{len(split.tokens):,} to {name}" for name, split in splits.items())
    print(f"{config.output / 'tokens'}: tokens, {sizes}")
    return 0


def train(config: TrainConfig) -> int:
    trainer = Trainer(config)
    if trainer.step and processes.is_main():
        print(f"{config.output}: goes on from the checkpoint of step {trainer.step}", file=sys.stderr)
    say_what_is_idle(config, trainer)
    result = trainer.run()
    if processes.is_main():
        best = "not validated yet"
        if result.best_step >= 0:
            best = f"best on validation {result.bits_per_byte:.4f} bits a byte after step {result.best_step}"
        if result.is_complete:
            made = config.output / ("adapter" if config.lora else "model")
            print(f"{made}: {result.step} steps; {best}")
        else:
            print(f"{config.output}: checkpoint of step {result.step}; the same command goes on from there; {best}")
    return SIGNALLED if result.was_signalled else 0


def say_what_is_idle(config: TrainConfig, trainer: Trainer) -> None:
    """What was hardly meant: a warm-up that the run does not get through, GPUs that each hold the same."""
    total_steps = trainer.total_steps
    if not processes.is_main():
        return
    if total_steps is not None and config.num_warmup_steps > total_steps:
        print(
            f"note: warm-up takes {config.num_warmup_steps} steps and the run has {total_steps}: the learning rate "
            f"never reaches {config.learning_rate}",
            file=sys.stderr,
        )
    if trainer.mesh is None or config.lora:
        return
    leaves = model_params.flatten(model_params.abstract(trainer.model_config, jnp.float32))
    for axis, share in sharding.unsplit_shares(leaves, trainer.mesh).items():
        if share > MAX_UNSPLIT_SHARE:
            print(
                f"note: {share:.0%} of the weights and the optimizer's state lie whole along {axis}, whose size "
                f"{trainer.mesh.shape[axis]} does not divide them: another division of the GPUs takes less memory",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
