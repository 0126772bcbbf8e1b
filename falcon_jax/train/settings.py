"""What a training run is asked to do, checked before anything is loaded."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import falcon_jax
from falcon_jax import checkpoint
from falcon_jax.checkpoint import hub
from falcon_jax.config import FalconConfig
from falcon_jax.errors import ConfigError
from falcon_jax.model.adapters import LoRA
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train.data import end_of_text_id
from falcon_jax.train.schedule import BatchRamp, Schedule
from falcon_jax.train.step import StepOptions

BUNDLED_NAME = "falcon-nano"
BUNDLED_MODEL = Path(falcon_jax.__file__).parent / "assets" / BUNDLED_NAME
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Give `steps` or `tokens`, or `time_budget_s` to let a measurement choose."""

    data: Path
    """Folder or tar archive with train/ and valid/ of .txt, .jsonl(.gz), .parquet, .arrow or .json; a folder made by
    `save_to_disk`, or hf:owner/name of the Hugging Face hub; or a folder of tokens that an earlier run made."""
    text_field: str = "text"
    """Where lines of JSON and rows of a data set have their text."""
    valid_share: float | None = None
    """Share of the documents that make the validation split, for data without one."""
    output: Path
    """Folder for checkpoints, metrics.jsonl, tokens and the final model. A run found there is resumed."""
    model: str | None = None
    """Name of a preset, or path of a Hugging Face config.json; falcon-nano if left out. Its weights begin at random."""
    base: str | None = None
    """In place of `model`, a checkpoint to go on from: a Hugging Face folder, a converted one, a hub id, or
    "falcon-nano" for the weights of the bundled one."""
    lora: bool = False
    """Train low-rank adapters beside the frozen weights of `base`, and write them into output/adapter, in PEFT's
    format."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    lora_targets: tuple[Literal["query_key_value", "query", "key", "value", "output", "up", "down"], ...] = (
        "query_key_value",
    )
    """Projections that get an adapter."""
    base_weights: Literal["native", "int8", "int4"] = "native"
    """What the frozen projections are stored as beside adapters."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json and tokenizer_config.json; that of `base`, or falcon-nano's, if left out."""
    steps: int | None = None
    """Optimizer steps in all."""
    tokens: int | None = None
    """Or tokens in all: the fewest steps that have so many."""
    time_budget_s: float | None = None
    """Seconds for the whole run, pauses and compilation included: the speed is measured once, when warm-up ends, and
    sets the number of steps, which the checkpoint keeps."""
    max_seconds: float | None = None
    """Seconds for this process: then it writes a checkpoint and ends; the same command goes on from there."""
    batch_size: int = 32
    """Rows a step, over all devices."""
    length: int = 2048
    """Tokens a row."""
    mask_documents: bool = False
    """Rows hold documents one after the other. With this a token sees none before its own."""
    learning_rate: float = 1e-3
    """The highest, reached when warm-up ends."""
    warmup_steps: int = 200
    warmup_tokens: int | None = None
    """In place of warmup_steps: warm-up and cosine then go by tokens, not by steps, which differs under a ramp."""
    ramp_tokens: int = 0
    """Tokens over which the rows a step rise to batch_size, by equal parts; 0: batch_size from the start."""
    ramp_start_rows: int | None = None
    """Rows of the first steps of the ramp, in whole micro-batches (in a pipeline a multiple of its stages of them); one
    of them if left out, and as much is added at a time."""
    min_rate_ratio: float = 0.1
    """Share of the highest learning rate that the last step has; 0 goes down to nothing."""
    seed: int = 0
    log_every: int = 20
    """Steps between lines of metrics. Losses are read that many steps late, so that the device never waits."""
    validate_every: int = 500
    checkpoint_every: int = 1000
    checkpoint_every_s: float | None = None
    """Also after so many seconds without one."""
    tensorboard: bool = False
    """Also write event files for TensorBoard into output/tensorboard."""
    attention: str | None = None
    """Attention implementation: "mosaic" (Hopper GPUs), "cudnn" or "xla"; the best that works by default."""
    remat: Literal["none", "block", "products", "stage"] = "none"
    """What the backward pass computes again, for less memory: nothing; blocks, a third more time; all of a block but
    its products; in a pipeline, all that a stage does with a micro-batch."""
    remat_layers: int | None = None
    """How many layers, from the first on, that is done to; all if left out."""
    data_parallel: int = 1
    """Devices that split the rows, and weights and optimizer between steps: a step gathers each weight once."""
    fsdp: int = 1
    """Devices that split them too, but gather a weight when a block needs it, and again backward: slower, in less
    memory. In a pipeline the same as data_parallel."""
    tensor: int = 1
    """Devices that split heads, MLP and vocabulary."""
    stage: int = 1
    """Devices that split the layers, as stages of a pipeline."""
    step: StepOptions = dataclasses.field(default_factory=StepOptions)

    def __post_init__(self) -> None:
        if self.step.separator is not None:
            raise ConfigError("step.separator is taken from the tokenizer: give mask_documents instead")
        if [self.steps, self.tokens, self.time_budget_s].count(None) != 2:
            raise ConfigError(
                f"steps is {self.steps}, tokens is {self.tokens} and time_budget_s is {self.time_budget_s}: "
                "give one of the three"
            )
        for name in ("steps", "tokens", "time_budget_s", "max_seconds", "checkpoint_every_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        at_least_1 = ("batch_size", "length", "log_every", "validate_every", "checkpoint_every")
        for name in (*at_least_1, "data_parallel", "fsdp", "tensor", "stage"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        rows = self.data_parallel * self.fsdp * self.step.num_micro_batches
        if self.batch_size % rows:
            raise ConfigError(
                f"batch_size is {self.batch_size}; data_parallel * fsdp * num_micro_batches = {rows} must divide it"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")
        if self.model is not None and self.base is not None:
            raise ConfigError(f"model is {self.model!r} and base {self.base!r}, which has a configuration: give one")
        if self.lora:
            if self.base is None:
                raise ConfigError("lora needs the checkpoint that it adapts: give base")
            self.adapters()
        elif self.base_weights != "native":
            raise ConfigError(f"base_weights is {self.base_weights!r}, which only frozen weights can be: give lora too")
        self._check_idle()
        self._check_schedule()

    def _check_idle(self) -> None:
        """Refuses settings that would do nothing beside the others."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        is_set = {name: getattr(self, name) != default for name, default in fields.items()}
        needless = [
            (not self.lora, [name for name in ("lora_rank", "lora_alpha", "lora_targets") if is_set[name]], "lora"),
            (not self.ramp_tokens, ["ramp_start_rows"] if is_set["ramp_start_rows"] else [], "ramp_tokens"),
            (self.stage == 1, ["pipeline_rounds"] if self.step.pipeline_rounds > 1 else [], "stage above 1"),
            (self.tensor == 1, ["splits_sequence"] if self.step.splits_sequence else [], "tensor above 1"),
            (self.remat == "none", ["remat_layers"] if is_set["remat_layers"] else [], "remat"),
            (self.stage == 1, ["remat 'stage'"] if self.remat == "stage" else [], "stage above 1"),
        ]
        for is_idle, names, needed in needless:
            if is_idle and names:
                raise ConfigError(f"{names[0]} is for a run with {needed}: give that too, or leave it out")
        if self.lora and self.step.splits_sequence:
            raise ConfigError("splits_sequence is not for adapters: leave it out, or train without lora")
        if self.remat_layers is not None and (self.remat_layers < 1 or self.stage > 1):
            raise ConfigError(
                f"remat_layers is {self.remat_layers} with stage {self.stage}; it must be at least 1, and a pipeline "
                "takes no such number"
            )

    def _check_schedule(self) -> None:
        self.schedule()
        self.ramp.rows(0)  # checks what it is made of
        if self.time_budget_s is None:
            return
        if self.ramp_tokens:
            raise ConfigError(
                f"ramp_tokens is {self.ramp_tokens} with a time budget, which measures steps of one size: give steps "
                "or tokens instead of time_budget_s, or no ramp"
            )
        if self.num_warmup_steps < 10:
            raise ConfigError(
                f"warm-up has {self.num_warmup_steps} steps; a time budget measures speed over 10 or more"
            )

    def schedule(self) -> Schedule:
        """In steps, or in tokens where `warmup_tokens` is given; `rate` knows which."""
        warmup = self.warmup_steps if self.warmup_tokens is None else self.warmup_tokens
        return Schedule(self.learning_rate, warmup, self.min_rate_ratio)

    @functools.cached_property
    def ramp(self) -> BatchRamp:
        """Rows and tokens of each step."""
        quantum = self.batch_size // self.step.num_micro_batches * self.stage
        start = quantum if self.ramp_start_rows is None else self.ramp_start_rows
        return BatchRamp(self.batch_size, self.length, start, quantum, self.ramp_tokens)

    def rate(self, step: int, total_steps: int | None) -> float:
        """Learning rate of step 0, 1, ..., total_steps - 1; None: not settled yet."""
        if self.warmup_tokens is None:
            return self.schedule().rate(step + 1, total_steps)
        total = None if total_steps is None else self.ramp.tokens_before(total_steps)
        return self.schedule().rate(self.ramp.tokens_before(step + 1), total)

    @property
    def total_steps(self) -> int | None:
        """None: a measurement decides."""
        return self.steps if self.tokens is None else self.ramp.num_steps(self.tokens)

    @property
    def num_warmup_steps(self) -> int:
        return self.warmup_steps if self.warmup_tokens is None else self.ramp.num_steps(self.warmup_tokens)

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return math.prod((self.data_parallel, self.fsdp, self.tensor, self.stage))

    def model_config(self) -> FalconConfig:
        """Raises: ConfigError where `model` is neither a preset nor a file; CheckpointError where `base` is none."""
        if self.base is not None:
            return checkpoint.read_config(self.base_folder)
        return FalconConfig.named(self.model or BUNDLED_NAME)

    @property
    def model_name(self) -> str:
        """For people to read."""
        return Path(self.base or self.model or BUNDLED_NAME).name

    @functools.cached_property
    def base_folder(self) -> Path:
        """The folder of `base`, fetched where it is on the hub."""
        assert self.base is not None
        return BUNDLED_MODEL if self.base == BUNDLED_NAME else hub.local_folder(self.base)

    @property
    def tokenizer_folder(self) -> Path:
        if self.tokenizer is not None:
            return self.tokenizer
        return BUNDLED_MODEL if self.base is None else self.base_folder

    @property
    def step_options(self) -> StepOptions:
        """`step`, with what follows from the data."""
        separator = end_of_text_id(self.tokenizer_folder) if self.mask_documents else None
        return dataclasses.replace(self.step, separator=separator)

    @property
    def forward(self) -> ForwardOptions:
        """How the model runs."""
        return ForwardOptions(attention=self.attention, remat=self.remat, num_remat_layers=self.remat_layers)

    def adapters(self) -> LoRA:
        """What adapters are trained. Raises: ConfigError where there are none such."""
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets)

    def identity(self) -> dict[str, object]:
        """What a resumed run must share with the run that it resumes, or its steps would mean something else."""
        shared: dict[str, object] = {name: getattr(self, name) for name in ("batch_size", "length", "seed")}
        shared["ramp_tokens"] = self.ramp_tokens
        if self.ramp_tokens:
            shared |= {"ramp_start_rows": self.ramp.start_rows, "ramp_quantum_rows": self.ramp.quantum}
        shared |= {"base": self.base, "base_weights": self.base_weights}
        shared["lora"] = dataclasses.asdict(self.adapters()) if self.lora else None
        shared["stages"] = (self.stage, self.step.pipeline_rounds) if self.stage > 1 else None
        step = {f"step.{name}": value for name, value in dataclasses.asdict(self.step_options).items()}
        return {**self.model_config().to_hf(), **shared, **step}


def check_same_run(config: TrainConfig, data: Mapping[str, object], path: Path) -> None:
    """Compares the run's identity with the one recorded at `path`, where there is one.

    data: what is known of its tokens so far. A setting that was not recorded, since an earlier version had none such,
    counts as its default.

    Raises: ConfigError naming the first setting that differs.
    """
    if not path.is_file():
        return
    identity = _identity(config, data)
    recorded = json.loads(path.read_text(encoding="utf-8"))
    defaults = _defaults(config, recorded)
    for name, value in identity.items():
        former = recorded.get(name, defaults.get(name, value))
        if former != value:
            raise ConfigError(f"{path.parent} holds a run {_difference(config, name, former, value)}")
    for name, former in recorded.items():
        # Not named above: a later version's setting, or of the data what is not known yet.
        if name not in identity and not name.startswith(_DATA) and former != defaults.get(name):
            raise ConfigError(f"{path.parent} holds a run {_difference(config, name, former, None)}")


def record_run(config: TrainConfig, data: Mapping[str, object], path: Path) -> None:
    """Writes the run's identity to `path`, where there is none."""
    if not path.is_file():
        incoming = path.with_name(f"{path.name}.incoming")
        incoming.write_text(json.dumps(_identity(config, data), indent=2) + "\n", encoding="utf-8")
        os.replace(incoming, path)  # a process that is lost in between leaves no half file


_DATA = "data."  # begins the names of what identifies the tokens


def _identity(config: TrainConfig, data: Mapping[str, object]) -> dict[str, object]:
    identity = config.identity() | {f"{_DATA}{name}": value for name, value in data.items()}
    return json.loads(json.dumps(identity))  # as it comes back: tuples are lists


def _defaults(config: TrainConfig, recorded: Mapping[str, object]) -> dict[str, object]:
    """What an identity has where nothing was asked for; for the model's part, where its configuration says nothing."""
    run = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    step = {f"step.{name}": value for name, value in dataclasses.asdict(StepOptions()).items()}
    try:
        model = FalconConfig.from_hf(recorded).to_hf()
    except ConfigError:  # it names no model, so not this one
        model = dict.fromkeys(config.model_config().to_hf())
    return {**run, "lora": None, "stages": None, **step, **model}


def _difference(config: TrainConfig, name: str, former: object, value: object) -> str:
    if name == f"{_DATA}tokens_sha256":
        return f"on other tokens than those of {config.data}: give the same data, or another --output"
    if name == f"{_DATA}tokenizer_sha256":
        return f"with another tokenizer than {config.tokenizer_folder}: give the same one, or another --output"
    shown = name.removeprefix(_DATA)
    return f"with {shown} = {former!r}, and this one has {value!r}: take the same value, or another --output"
