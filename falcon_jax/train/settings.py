"""What a training run is asked to do, checked before anything is loaded."""

import dataclasses
import json
from pathlib import Path

import falcon_jax
from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.train.schedule import Schedule
from falcon_jax.train.step import StepOptions

BUNDLED_TOKENIZER = Path(falcon_jax.__file__).parent / "assets" / "falcon-nano"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Give `steps`, or `time_budget_s` to let a measurement choose them."""

    data: Path
    """Folder or .tar(.xz) with train/*.txt and valid/*.txt; or a folder of tokens that an earlier run made."""
    output: Path
    """Folder for checkpoints, metrics.jsonl, tokens and the final model. A run found there is resumed."""
    model: str = "falcon-nano"
    """Name of a preset, or path of a Hugging Face config.json."""
    tokenizer: Path = BUNDLED_TOKENIZER
    """Folder with tokenizer.json and tokenizer_config.json."""
    steps: int | None = None
    """Optimizer steps in all."""
    time_budget_s: float | None = None
    """Seconds for the whole run, pauses and compilation included: the speed is measured once, when warm-up ends, and
    sets the number of steps, which the checkpoint keeps."""
    max_seconds: float | None = None
    """Seconds for this process: then it writes a checkpoint and ends; the same command goes on from there."""
    batch_size: int = 32
    """Rows a step, over all devices."""
    length: int = 2048
    """Tokens a row."""
    learning_rate: float = 1e-3
    """The highest, reached when warm-up ends."""
    warmup_steps: int = 200
    min_rate_ratio: float = 0.1
    """Share of the highest learning rate that the last step has; 0 goes down to nothing."""
    seed: int = 0
    log_every: int = 20
    """Steps between lines of metrics. Losses are read that many steps late, so that the device never waits."""
    validate_every: int = 500
    checkpoint_every: int = 1000
    checkpoint_every_s: float | None = None
    """Also after so many seconds without one."""
    attention: str | None = None
    """Attention implementation: "mosaic" (Hopper GPUs), "cudnn" or "xla"; the best that works by default."""
    remat: bool = False
    """Compute blocks again in the backward pass: less memory, a third more time."""
    data_parallel: int = 1
    """Devices that split the rows and hold all weights."""
    fsdp: int = 1
    """Devices that split the rows and the weights."""
    tensor: int = 1
    """Devices that split the heads and the MLP."""
    step: StepOptions = dataclasses.field(default_factory=StepOptions)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.time_budget_s is None):
            raise ConfigError(f"steps is {self.steps} and time_budget_s is {self.time_budget_s}: give one of the two")
        for name in ("steps", "time_budget_s", "max_seconds", "checkpoint_every_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        for name in ("batch_size", "length", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.time_budget_s is not None and self.warmup_steps < 10:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; a time budget measures speed over 10 or more")
        rows = self.data_parallel * self.fsdp * self.step.num_micro_batches
        if self.batch_size % rows:
            raise ConfigError(
                f"batch_size is {self.batch_size}; data_parallel * fsdp * num_micro_batches = {rows} must divide it"
            )
        self.schedule()

    def schedule(self) -> Schedule:
        return Schedule(self.learning_rate, self.warmup_steps, self.min_rate_ratio)

    def model_config(self) -> FalconConfig:
        """Raises: ConfigError where `model` is neither a preset nor a file."""
        if self.model in PRESETS:
            return PRESETS[self.model]
        if not Path(self.model).exists():
            raise ConfigError(f"model {self.model!r} is neither a file nor one of {', '.join(PRESETS)}")
        return FalconConfig.from_hf(Path(self.model))

    def identity(self) -> dict[str, object]:
        """What a resumed run must share with the run that it resumes, or its steps would mean something else."""
        shared = {name: getattr(self, name) for name in ("batch_size", "length", "seed")}
        step = {f"step.{name}": value for name, value in dataclasses.asdict(self.step).items()}
        return {**self.model_config().to_hf(), **shared, **step}


def check_same_run(config: TrainConfig, path: Path) -> None:
    """Records the run's identity at `path`, or compares with the one recorded there.

    Raises: ConfigError naming the first setting that differs.
    """
    identity = json.loads(json.dumps(config.identity()))  # as it comes back: tuples are lists
    if not path.is_file():
        path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for name in identity.keys() | recorded.keys():
        if identity.get(name) != recorded.get(name):
            raise ConfigError(
                f"{path.parent} holds a run with {name} = {recorded.get(name)!r}, and this one has "
                f"{identity.get(name)!r}: take the same value, or another --output"
            )
