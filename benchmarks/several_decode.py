"""Decoding over several devices: how much sooner than on one, and whether CUDA graphs with collectives in them hold.

The models are random and made on their devices; they generate through the engine, as in measure.py.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks import measure
from benchmarks.limits import Workload
from benchmarks.places import Say
from benchmarks.several_jobs import Job, Layout, Result, half_dtype
from falcon_jax import Falcon
from falcon_jax.config import FalconConfig
from falcon_jax.generate.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Captured:
    """What CUDA graphs hold. sums, cuda_graphs: as of `Falcon.from_config`."""

    sums: str | None = None
    xla_flags: str = ""
    cuda_graphs: bool = True


# XLA's own list of what it captures, and collectives with the loop around them. As a compiler's option the list could
# not be added to; and one process has one XLA_FLAGS. By XLA's dumps jax 0.11.2 captures neither even so, 0.12 both: a
# graph that the driver has refused (LOG.md).
WITH_COLLECTIVES = "--xla_gpu_enable_command_buffer=+COLLECTIVES,+WHILE,+CONDITIONAL"
# XLA's own least, where generate/programs.py wants two: between two all-reduces of a parallel layer stand four.
LARGE_GRAPHS = "--xla_gpu_graph_min_graph_size=5"
GRAPHS = {
    "as by default": Captured(),
    "none": Captured(cuda_graphs=False),
    "as by default, sums by XLA": Captured("xla"),
    "graphs of five launches, sums by XLA": Captured("xla", LARGE_GRAPHS),
    "collectives and loops too, sums by XLA": Captured("xla", WITH_COLLECTIVES),
}
GRAPH_PROMPT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class OverMesh(measure.Contestant):
    """falcon_jax over a mesh, with random weights made where they lie."""

    name: ClassVar[str] = measure.Ours.name
    ours: ClassVar[bool] = True
    config: FalconConfig
    layout: Layout
    weights: str
    dtype: str
    sums: str | None = None

    def load(self) -> measure.OurRunner:
        options = {"dtype": self.dtype, "weights": self.weights, "sums": self.sums}
        return measure.OurRunner(Falcon.from_config(self.config, mesh=self.layout.mesh(), **options))


@dataclasses.dataclass(frozen=True)
class Decode(Job):
    """Tokens a second of batches of several sizes, loaded once."""

    part: ClassVar[str] = "decode"
    model: str
    config: FalconConfig
    layout: Layout
    weights: str
    workloads: tuple[Workload, ...]
    repeats: int
    timeout_s: float
    sums: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.weights}, {self.layout}" + (f", sums by {self.sums}" if self.sums else "")

    @property
    def process(self) -> Any:
        return self.name  # its own, whose peak of memory is this model's

    def run(self, say: Say) -> Iterator[Result]:
        about = {"model": self.model, "num_layers": self.config.num_layers, "layout": str(self.layout)}
        about |= {"num_devices": self.layout.num_devices, "weights": self.weights, "sums": self.sums}
        cases = [measure.Case(f"batch {one.batch_size}", one, self.repeats) for one in self.workloads]
        contestant = OverMesh(self.config, self.layout, self.weights, half_dtype(), self.sums)
        for case, (_, results) in zip(cases, measure.measure_group([contestant], cases, say=say)):
            figures = {key: value for key, value in results[0].items() if key not in ("name", "interleaved")}
            yield about | dataclasses.asdict(case.workload) | figures | peaks(self.layout)


def peaks(layout: Layout) -> Result:
    """The most GiB that each device has held in this process; null where devices do not say."""
    statistics = [device.memory_stats() for device in jax.devices()[: layout.num_devices]]
    if any(of_device is None for of_device in statistics):
        return {"peak_gib": None, "peak_gib_by_device": None}
    by_device = [of_device["peak_bytes_in_use"] / measure.GIB for of_device in statistics if of_device is not None]
    return {"peak_gib": max(by_device), "peak_gib_by_device": [round(peak, 3) for peak in by_device]}


@dataclasses.dataclass(frozen=True)
class Graphs(Job):
    """Thousands of steps with one choice of what CUDA graphs hold. captured: a key of GRAPHS."""

    part: ClassVar[str] = "graphs"
    model: str
    config: FalconConfig
    layout: Layout
    captured: str
    num_steps: int
    timeout_s: float

    @property
    def name(self) -> str:
        return f"{self.model}, {self.layout}, captured: {self.captured}"

    @property
    def process(self) -> Any:
        return self.name

    @property
    def xla_flags(self) -> str:
        return GRAPHS[self.captured].xla_flags

    def run(self, say: Say) -> Iterator[Result]:
        chosen = GRAPHS[self.captured]
        options = {"dtype": half_dtype(), "sums": chosen.sums, "cuda_graphs": chosen.cuda_graphs}
        model = Falcon.from_config(self.config, mesh=self.layout.mesh(), **options)
        model.engine.eos_token_ids = np.array([-1], np.int32)  # no id: nothing ends early
        prompt = Workload(1, GRAPH_PROMPT_TOKENS, self.num_steps).prompts(self.config).tolist()
        generation = model.engine.start(prompt, max_new_tokens=self.num_steps + 1, sampling=Sampling(), ahead=True)
        # The first one, the prompt's, begins the second, which compiles.
        tokens: list[int] = [*generation.next_chunk()[0][0], *generation.next_chunk()[0][0]]
        num_before, begin = len(tokens), time.perf_counter()
        while not generation.finished:
            tokens += generation.next_chunk()[0][0]
        seconds = time.perf_counter() - begin
        yield {
            "model": self.model,
            "num_layers": self.config.num_layers,
            "layout": str(self.layout),
            "captured": self.captured,
            **dataclasses.asdict(chosen),
            "num_steps": len(tokens) - 1,
            "decode_tokens_per_s": (len(tokens) - num_before) / seconds,
            "tokens": tokens,  # for `with_agreement`, which takes them out
        }


def with_agreement(result: Result, kept: dict[str | None, tuple[str, list[int]]]) -> Result:
    """A result of Graphs without its tokens, and whether they are those of the first that had any and added up so too.

    kept: of each way to add up that first one's name and tokens, put there by this function.
    """
    tokens = result.pop("tokens", None)
    if tokens is None:
        return result
    name, first = kept.setdefault(result["sums"], (result["name"], tokens))
    differs = next((step for step, (one, other) in enumerate(zip(tokens, first)) if one != other), None)
    agreement = {"compared_with": name, "first_step_that_differs": differs}
    return result | agreement | {"ok": tokens == first}
