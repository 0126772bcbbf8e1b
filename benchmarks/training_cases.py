"""What is trained, by which settings, and what is asked of it: all that can be said before anything is measured.

Owns the counting of FLOPs, the settings of ours, and the table of bars. Knows nothing of time.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from benchmarks import peers
from falcon_jax.config import PRESETS, FalconConfig
from falcon_jax.errors import RequestError, one_line
from falcon_jax.model.adapters import LoRA
from falcon_jax.model.quantize import WEIGHTS
from falcon_jax.model.step import ForwardOptions
from falcon_jax.train import flops as train_flops
from falcon_jax.train.step import StepOptions

# As it stands in a document. The letters are those of CONTRIBUTING.md; P is new.
FLOPS = "B T (6 P + 6 L T N H), P all parameters, a tied head once; with a frozen model 4 P"
DEFAULT_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows of `length` tokens to train on. lora: adapters alone, beside frozen weights."""

    config: FalconConfig
    length: int
    lora: LoRA | None = None

    def tokens(self, batch_size: int) -> Int[np.ndarray, "B columns"]:
        """Random ids, the same every time: one more a row than `length`, since each is the next one's input."""
        generator = np.random.default_rng(0)
        return generator.integers(0, self.config.vocab_size, (batch_size, self.length + 1), np.int32)

    def flops(self, batch_size: int) -> int:
        """Of a step, by the convention of the bars (FLOPS): half of attention, nothing that is computed twice."""
        config = self.config
        parameters = (4 if self.lora else 6) * config.num_parameters
        attention = 6 * config.num_layers * self.length * config.num_heads * config.head_dim
        return batch_size * self.length * (parameters + attention)

    def model_flops(self, batch_size: int) -> float:
        """The same by falcon_jax/train/flops.py: without what does not multiply, such as biases and norms."""
        a_token = train_flops.train_flops_per_token(self.config, self.length, is_frozen=self.lora is not None)
        return batch_size * self.length * a_token

    def update_bytes(self) -> int:
        """What AdamW cannot help but read and write of whole weights: these and two moments, float32, each once."""
        return 0 if self.lora else 2 * 3 * 4 * self.config.num_parameters


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings of ours: rows a step, the form of frozen weights beside adapters, and the step's own options.

    Raises:
      RequestError: settings that cannot go together.
    """

    batch_size: int = DEFAULT_ROWS
    weights: str = "native"
    forward: ForwardOptions = dataclasses.field(default_factory=ForwardOptions)
    step: StepOptions = dataclasses.field(default_factory=StepOptions)

    def __post_init__(self) -> None:
        parts = self.step.num_micro_batches
        if self.batch_size < 1 or self.batch_size % parts:
            raise RequestError(f"batch_size is {self.batch_size}; it must be a multiple of num_micro_batches, {parts}")
        if self.weights not in WEIGHTS:
            raise RequestError(f"weights is {self.weights!r}; supported: {', '.join(map(repr, WEIGHTS))}")
        if self.forward.remat == "stage":
            raise RequestError("remat 'stage' is for a pipeline; take 'none', 'products' or 'block'")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Variant":
        """From names of its own fields, of ForwardOptions' and of StepOptions'.

        Raises:
          RequestError: an unknown name, a value of another type than the default, or out of range.
        """
        owners: tuple[Any, ...] = (cls, ForwardOptions, StepOptions)
        given: list[dict[str, Any]] = [{} for _ in owners]
        defaults = [_defaults(owner()) for owner in owners]
        for name, value in settings.items():
            place = next((i for i, known in enumerate(defaults) if name in known), None)
            if place is None:
                known = ", ".join(name for owner in defaults for name in owner)
                raise RequestError(f"a variant's {name} is unknown; known are {known}")
            given[place][name] = _typed(name, value, defaults[place][name])
        own, forward, step = given
        try:
            return cls(forward=ForwardOptions(**forward), step=StepOptions(**step), **own)
        except ValueError as error:
            raise RequestError(one_line(error)) from error

    @property
    def settings(self) -> dict[str, Any]:
        """Rows and remat, and whatever is not as by default."""
        found: dict[str, Any] = {"batch_size": self.batch_size, "remat": self.forward.remat}
        for mine, default in ((self, Variant()), (self.forward, ForwardOptions()), (self.step, StepOptions())):
            usual = _defaults(default)
            found |= {name: value for name, value in _defaults(mine).items() if value != usual[name]}
        return found


def _defaults(options: Any) -> dict[str, Any]:
    """Plain fields by name."""
    named = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: value for name, value in named.items() if not dataclasses.is_dataclass(value)}


def _typed(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise RequestError(f"a variant's {name} is {value!r}; it must be {type(default).__name__}, as {default!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure of ours, and what is asked of it; None: it is only told.

    figure: one of FIGURES. weights: of which form of frozen weights.
    """

    figure: str
    asked: float | None
    weights: str = "native"

    def is_better(self, one: float, other: float) -> bool:
        return one < other if FIGURES[self.figure].less_is_better else one > other

    def is_reached(self, value: float) -> bool | None:
        """None where nothing is asked."""
        return None if self.asked is None else not self.is_better(self.asked, value)


@dataclasses.dataclass(frozen=True)
class Figure:
    """key: in a result, whose value times `factor` is told as `text`."""

    key: str
    factor: float
    text: str
    less_is_better: bool = False

    def of(self, result: Mapping[str, Any]) -> float | None:
        """None where the result has none, because it failed or the device does not say."""
        value = result.get(self.key)
        return None if value is None else self.factor * value


FIGURES = {
    "tokens_per_s": Figure("tokens_per_s", 1.0, "{:,.0f} tokens/s"),
    "tflops_per_s": Figure("tflops_per_s", 1.0, "{:.0f} TFLOP/s"),
    "peak_gb": Figure("peak_gib", 2**30 / 1e9, "{:.2f} GB", less_is_better=True),  # what it is compared with is in GB
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to train, the variants of ours, and how many rows each peer takes, by its name."""

    name: str
    what: str
    work: Work
    variants: tuple[Variant, ...]
    peer_rows: Mapping[str, int]
    bars: tuple[Bar, ...] = ()


def bars() -> tuple[Case, ...]:
    """What training is judged by, most important first; the variant that is likely best comes first in each.

    Rows are what fits an H200 without computing anything twice. Of ours the compiler plans 72 GB for 16 rows of
    falcon-rw-1b and 115 GB for 32, 60 GB for 16 of falcon-7b's width; of the peers these were seen to run.
    """
    seven = PRESETS["falcon-7b"]
    return (
        _case(
            "rw-1b",
            Work(PRESETS["falcon-rw-1b"], 2048),
            ({"batch_size": 16}, {"batch_size": 32}, {"batch_size": 24}),
            {peers.COMPILED: 16, peers.PLAIN: 8},
            Bar("tokens_per_s", 60_000),
        ),
        _case(
            "7b-width",
            Work(dataclasses.replace(seven, num_layers=8), 2048),
            ({"batch_size": 16}, {"batch_size": 32}),
            {peers.COMPILED: 4, peers.PLAIN: 4},
            Bar("tflops_per_s", 500),
        ),
        _case(
            "7b-lora",
            Work(seven, 512, LoRA()),
            tuple({"batch_size": 1, "weights": weights} for weights in ("native", "int4", "int8")),
            {},
            # What litgpt says that it takes, in bfloat16 and with a base of 4 bits.
            Bar("peak_gb", 16.7),
            Bar("peak_gb", None, "int8"),
            Bar("peak_gb", 9.4, "int4"),
        ),
    )


def _case(
    name: str, work: Work, settings: Sequence[Mapping[str, Any]], peer_rows: Mapping[str, int], *asked: Bar
) -> Case:
    return Case(name, describe(work), work, tuple(Variant.of(one) for one in settings), peer_rows, asked)


def describe(work: Work) -> str:
    """A preset's name, as far as the model is one, and what of it is trained."""
    config = work.config
    whole = [name for name, preset in PRESETS.items() if preset == config]
    cut = [
        f"{config.num_layers} layer{'s' if config.num_layers > 1 else ''} of {name}"
        for name, preset in PRESETS.items()
        if dataclasses.replace(preset, num_layers=config.num_layers) == config
    ]
    model = (whole or cut or ["a model of no name"])[0]
    return f"{model}{' LoRA' if work.lora else ''}, T={work.length}"
